//! Pages for DMA: one mapping per region, with one of five backings.

mod addresses;

use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::ftruncate;

use self::addresses::Addresses;
use super::backing::Backing;
use super::numa::{self, Placement};
use super::{limits, page_size as cpu_page_size, shortage};
use crate::error::{Error, ErrorKind, Result};

/// Directory under which the limits of the machine are read.
const ROOT: &str = "/";

/// Contiguous virtual memory that a device may access.
///
/// A region hands out no references into itself, because a device may write it at any time. All access goes
/// through [`DmaRing`](crate::dma::DmaRing) and [`PoolCache`](crate::dma::PoolCache).
#[derive(Debug)]
pub struct Region {
    address: NonNull<u8>,
    len: usize,
    page_size: usize,
    fd: Option<OwnedFd>,
    backing: Backing,
    node: Option<u32>,
    /// The same for all regions whose addresses one call has reserved.
    run: Arc<()>,
}

// SAFETY: the mapping belongs to the process, not to a thread. Rings have bytes of their own and access them
// by atomics. A packet buffer is accessed only through its single handle.
unsafe impl Send for Region {}
// SAFETY: as above. `&Region` gives no other access.
unsafe impl Sync for Region {}

// SAFETY: the region owns the mapping until it is dropped. Every access to it expects that a device may
// write, because the region hands out no references.
unsafe impl vireo_iommufd::Memory for Region {
    fn address(&self) -> NonNull<u8> {
        self.address
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Region {
    /// Reserves and faults in at least `len` bytes, rounded up to whole pages of `backing`.
    ///
    /// # Errors
    /// `Os` if the pages are not available. The error reports the free pages and the command that reserves
    /// more.
    pub fn new(len: usize, backing: Backing) -> Result<Self> {
        let mut regions = Self::adjoining(&[(None, len)], backing, Placement::Preferred)?;
        regions.pop().ok_or_else(|| Error::os("cannot reserve memory", Errno::EINVAL))
    }

    /// Creates one region per part, as [`Region::new`] does. Each of `parts` is the NUMA node that its pages
    /// come from and a number of bytes. Without a node, the kernel chooses. In this process, each region
    /// begins where the one before it ends, so that one pool can have packet buffers of all.
    ///
    /// # Errors
    /// Same as [`Region::new`]. With [`Placement::Required`], it is also an error if a node does not have the
    /// pages.
    pub fn adjoining(
        parts: &[(Option<u32>, usize)],
        backing: Backing,
        placement: Placement,
    ) -> Result<Vec<Self>> {
        if parts.is_empty() {
            return Ok(Vec::new());
        }
        let page_size = backing.page_size()?;
        let whole = |(node, len): &(Option<u32>, usize)| {
            Some((*node, (*len).max(1).checked_next_multiple_of(page_size)?))
        };
        let sum = |parts: &[(Option<u32>, usize)]| {
            parts.iter().try_fold(0_usize, |sum, (_, len)| sum.checked_add(*len))
        };
        let parts = parts.iter().map(whole).collect::<Option<Vec<_>>>();
        let (parts, len) = parts
            .and_then(|parts| sum(&parts).map(|len| (parts, len)))
            .filter(|(_, len)| isize::try_from(*len).is_ok())
            .ok_or_else(|| Error::new(ErrorKind::Usage, "cannot reserve memory", "the size is too large"))?;
        if placement == Placement::Required {
            shortage::check_nodes(Path::new(ROOT), &parts, page_size)?;
        }
        match backing {
            // Miri cannot read files.
            Backing::SmallPages if cfg!(miri) => {}
            Backing::SmallPages => {
                limits::check(Path::new(ROOT), || cannot_reserve(len, &backing), len as u64)?
            }
            _ => shortage::check_free(Path::new(ROOT), len, page_size)?,
        }
        let mut addresses = match backing {
            Backing::HugeAnonymous => Some(Addresses::of_anonymous(len, page_size)?),
            Backing::SmallPages if cfg!(miri) => Some(Addresses::of_private(len)?),
            // The kernel chooses the address of a single region.
            _ if parts.len() == 1 => None,
            _ => Some(Addresses::reserve(len, page_size)?),
        };
        let (mut regions, run) = (Vec::with_capacity(parts.len()), Arc::new(()));
        for (node, part) in parts {
            let address = addresses.as_ref().map(|addresses| addresses.next(part)).transpose()?;
            let file = backing.file(part, page_size)?;
            let (address, backing) =
                (map_part(&backing, file.as_ref(), part, page_size, address)?, backing.clone());
            // From here on, the region unmaps these addresses.
            if let Some(addresses) = &mut addresses {
                addresses.skip(part);
            }
            regions.push(Self {
                address,
                len: part,
                page_size,
                fd: file,
                backing,
                node,
                run: Arc::clone(&run),
            });
        }
        // All pages get a policy before the first is allocated.
        regions.iter().try_for_each(|region| region.bind(placement))?;
        let regions = regions.into_iter().map(Self::populated).collect::<Result<Vec<_>>>()?;
        regions.iter().for_each(Self::warn_of_other_nodes);
        Ok(regions)
    }

    /// Maps the regions of another process, whose `files` have the pages. `parts` and `backing` are those with which
    /// that process called [`Region::adjoining`].
    ///
    /// # Errors
    /// `Busy` if the files are others than those of these parts. Otherwise `Os` if they cannot be mapped.
    pub fn adopt(
        files: Vec<OwnedFd>,
        parts: &[(Option<u32>, usize)],
        backing: &Backing,
    ) -> Result<Vec<Self>> {
        let page_size = backing.page_size()?;
        let lens: Vec<usize> = parts.iter().map(|(_, len)| len.max(&1).next_multiple_of(page_size)).collect();
        let is_such = files
            .iter()
            .map(|file| file_size(file, page_size, backing))
            .eq(lens.iter().map(|len| Some(*len)));
        if !is_such {
            let why = "its packet memory has another size or other pages than these arguments ask for";
            return Err(Error::new(ErrorKind::Busy, "cannot use the ports of the running program", why)
                .with_hint("give both the same arguments"));
        }
        let mut addresses = Addresses::reserve(lens.iter().sum(), page_size)?;
        let (mut regions, run) = (Vec::with_capacity(files.len()), Arc::new(()));
        for ((file, len), (node, _)) in files.into_iter().zip(lens).zip(parts) {
            let failed = |errno| Error::os("cannot map the packet memory of another process", errno);
            let address = map_shared(&file, len, Some(addresses.next(len)?)).map_err(failed)?;
            // From here on, the region unmaps these addresses.
            addresses.skip(len);
            let (backing, run) = (backing.clone(), Arc::clone(&run));
            regions.push(Self { address, len, page_size, fd: Some(file), backing, node: *node, run });
        }
        regions.into_iter().map(Self::populated).collect()
    }

    fn bind(&self, placement: Placement) -> Result<()> {
        let Some(node) = self.node else { return Ok(()) };
        // SAFETY: these are the bytes of this region's own mapping.
        unsafe { numa::bind(self.address, self.len, node, placement) }.map_err(|errno| {
            Error::os(format!("{} on NUMA node {node}", cannot_reserve(self.len, &self.backing)), errno)
        })
    }

    /// Logs how much of the region is not on its node.
    fn warn_of_other_nodes(&self) {
        let Some(node) = self.node else { return };
        // SAFETY: these are the bytes of this region's own mapping.
        let pages = unsafe { numa::elsewhere(self.address, self.len, node, self.page_size) }.unwrap_or(0);
        if pages > 0 {
            tracing::warn!(
                "{} of {} KiB of packet memory are not on NUMA node {node}, the node of the NICs that use it; {}",
                (pages * self.page_size) >> 10,
                self.len >> 10,
                shortage::more_on_node(Path::new(ROOT), node, self.page_size, pages)
            );
        }
    }

    /// Returns the region with the label `node`. A test machine has only one node.
    #[cfg(test)]
    pub(crate) fn with_node(mut self, node: Option<u32>) -> Self {
        self.node = node;
        self
    }

    /// Maps the same pages at other addresses, as another process would.
    pub(crate) fn mapped_again(&self) -> Result<Self> {
        let what = "cannot map packet memory a second time";
        let fd = self.fd.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, what, format!("{} are not a file", self.backing.name()))
                .with_hint("leave --in-memory out")
        })?;
        let address = map_shared(fd, self.len, None).map_err(|errno| Error::os(what, errno))?;
        let (len, page_size, backing) = (self.len, self.page_size, self.backing.clone());
        let again = Self { address, len, page_size, fd: None, backing, node: self.node, run: Arc::default() };
        again.keep_out_of_core_dumps();
        Ok(again)
    }

    /// Allocates the pages, which takes a write: a later fault that finds no page is a SIGBUS. `MAP_POPULATE`
    /// does not report its failure.
    fn populated(self) -> Result<Self> {
        // Miri does not support `madvise`.
        if cfg!(miri) {
            return Ok(self);
        }
        // SAFETY: the range is this region's own mapping, is readable and writable, and is not yet shared.
        let result = unsafe { madvise(self.address.cast(), self.len, MmapAdvise::MADV_POPULATE_WRITE) };
        if let Err(errno) = result {
            let (len, page_size, what) = (self.len, self.page_size, cannot_reserve(self.len, &self.backing));
            // The region's own pages must not count as used when the error is written.
            drop(self);
            return Err(no_pages(Error::os(what, errno), len, page_size));
        }
        self.keep_out_of_core_dumps();
        Ok(self)
    }

    fn keep_out_of_core_dumps(&self) {
        // SAFETY: the range is this region's own mapping, and the advice changes no content.
        let result = unsafe { madvise(self.address.cast(), self.len, MmapAdvise::MADV_DONTDUMP) };
        if let Err(errno) = result {
            tracing::debug!("packet memory stays in core dumps: {errno}");
        }
    }

    /// Length in bytes, a multiple of the page size.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns false: a region has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Page size in bytes. Each page is contiguous in physical memory.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// NUMA node that the pages were requested from, or `None` if no node was requested.
    pub fn node(&self) -> Option<u32> {
        self.node
    }

    /// Source of the pages.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// File behind the pages, for `IOMMU_IOAS_MAP_FILE` and for other processes. `None` with `--in-memory`.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Physical address of each page, from `/proc/self/pagemap` (`Documentation/admin-guide/mm/pagemap.rst`).
    /// The addresses are valid only while something keeps the pages in place: hugetlb pages move, too.
    ///
    /// # Errors
    /// `Permission` if the kernel hides the addresses from this process.
    pub fn physical_addresses(&self) -> Result<Vec<u64>> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let page_size = cpu_page_size() as u64;
        let what = "cannot read physical addresses from /proc/self/pagemap";
        let file = File::open("/proc/self/pagemap").map_err(|error| Error::io(what, &error))?;
        let start = self.address.as_ptr() as u64;
        (0..self.len / self.page_size)
            .map(|page| {
                let address = start + (page * self.page_size) as u64;
                let mut entry = [0; 8];
                file.read_exact_at(&mut entry, address / page_size * 8)
                    .map_err(|error| Error::io(what, &error))?;
                let entry = u64::from_ne_bytes(entry);
                if entry & PRESENT == 0 || entry & FRAME == 0 {
                    return Err(Error::os(what, Errno::EPERM)
                        .because("the kernel hides them from this process")
                        .with_hint("run as root (CAP_SYS_ADMIN)"));
                }
                Ok((entry & FRAME) * page_size)
            })
            .collect()
    }

    /// Virtual address of the bytes `range`, for mapping them to devices.
    pub(crate) fn address_of(&self, range: &Range<usize>) -> Result<u64> {
        if range.start < range.end && range.end <= self.len {
            return Ok(self.address.as_ptr() as u64 + range.start as u64);
        }
        let what = format!("cannot map bytes {range:?} of a region");
        Err(Error::new(ErrorKind::Usage, what, format!("it has {} bytes", self.len)))
    }

    /// Address of the first byte, as a number.
    pub fn addr(&self) -> usize {
        self.address.addr().get()
    }

    /// Address of the first byte, valid for [`Region::len`] bytes while the region lives.
    pub(crate) fn as_ptr(&self) -> NonNull<u8> {
        self.address
    }

    /// Returns whether one call of [`Region::adjoining`] created both, so that a pointer into one also
    /// reaches the other.
    pub(crate) fn adjoins(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.run, &other.run)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `address` and `len` describe a mapping that this value made and that nothing else unmaps.
        // Everything that points into the region holds an `Arc` of it.
        if let Err(errno) = unsafe { munmap(self.address.cast::<c_void>(), self.len) } {
            tracing::error!("cannot unmap {} bytes of packet memory: {errno}", self.len);
        }
    }
}

/// Length in bytes of a file that another process has created for `backing`; `None` if it is none. A memfd must be
/// sealed at its size, or the other process could truncate it in use.
fn file_size(file: &OwnedFd, page_size: usize, backing: &Backing) -> Option<usize> {
    let has_pages = match backing {
        Backing::HugeAnonymous => false,
        Backing::SmallPages => true,
        _ => fstatfs(file).is_ok_and(|found| {
            found.filesystem_type() == HUGETLBFS_MAGIC && found.block_size() as usize == page_size
        }),
    };
    let is_sealed = || {
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        seals.is_ok_and(|seals| seals.contains(SEALS))
    };
    let is_fixed = matches!(backing, Backing::HugeFile { .. }) || is_sealed();
    let size = fstat(file).ok().and_then(|found| usize::try_from(found.st_size).ok());
    size.filter(|_| has_pages && is_fixed)
}

/// Seals of a memfd: it keeps its size.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// Returns the first byte of `len` bytes of `backing`. Maps `file` if there is one. Otherwise, the pages are
/// already at `address`.
fn map_part(
    backing: &Backing,
    file: Option<&OwnedFd>,
    len: usize,
    page_size: usize,
    address: Option<NonNull<u8>>,
) -> Result<NonNull<u8>> {
    let failed = |errno| Error::os(cannot_reserve(len, backing), errno);
    let Some(fd) = file else { return address.ok_or_else(|| failed(Errno::EINVAL)) };
    ftruncate(fd, len as i64).map_err(failed)?;
    if !matches!(backing, Backing::HugeFile { .. }) {
        // Otherwise, another process that has the descriptor could truncate the file in use.
        fcntl(fd, FcntlArg::F_ADD_SEALS(SEALS)).map_err(failed)?;
    }
    map_shared(fd, len, address).map_err(|errno| no_pages(failed(errno), len, page_size))
}

/// Maps the first `len` bytes of a file, in place of the caller's `len` bytes at `address`. Without an
/// `address`, the kernel chooses it.
fn map_shared(fd: &OwnedFd, len: usize, address: Option<NonNull<u8>>) -> nix::Result<NonNull<u8>> {
    let length = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let (at, flags) = match address {
        Some(address) => (Some(address.addr()), MapFlags::MAP_SHARED | MapFlags::MAP_FIXED),
        None => (None, MapFlags::MAP_SHARED),
    };
    // SAFETY: a new mapping at an address that the kernel chooses overlaps no memory of this process, and
    // `Addresses` gave the other address to this mapping alone.
    let mapped = unsafe { mmap(at, length, access, flags, fd, 0) }?;
    // The pointer into the reserved addresses also reaches the next region.
    Ok(address.unwrap_or(mapped.cast()))
}

fn cannot_reserve(len: usize, backing: &Backing) -> String {
    format!("cannot reserve {} MiB as {}", len.div_ceil(1 << 20), backing.name())
}

fn no_pages(error: Error, len: usize, page_size: usize) -> Error {
    if page_size == cpu_page_size() {
        return error.with_hint("free memory, or ask for fewer packet buffers");
    }
    shortage::no_pages(Path::new(ROOT), error, len, page_size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::GIANT_PAGE;

    #[test]
    fn small_pages_round_up() {
        let region = Region::new(5000, Backing::SmallPages).unwrap();
        let page = cpu_page_size();
        assert_eq!((region.len(), region.page_size()), (5000_usize.next_multiple_of(page), page));
        let fd = region.fd().unwrap();
        assert_eq!(ftruncate(fd, 0), Err(Errno::EPERM), "whoever shares the pages cannot cut them off");
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri cannot unmap part of a mapping")]
    fn adjoining_regions_follow_each_other_and_go_one_by_one() {
        let page = cpu_page_size();
        let parts = [(None, 2 * page), (None, page + 1), (None, 1)];
        let mut regions = Region::adjoining(&parts, Backing::SmallPages, Placement::Preferred).unwrap();
        let lens: Vec<usize> = regions.iter().map(|region| region.len() / page).collect();
        assert_eq!(lens, [2, 2, 1]);
        let end = |region: &Region| region.as_ptr().addr().get() + region.len();
        assert!(regions.windows(2).all(|two| end(&two[0]) == two[1].as_ptr().addr().get()));
        assert!(regions[0].adjoins(&regions[2]));
        assert!(!regions[0].adjoins(&Region::new(1, Backing::SmallPages).unwrap()));
        drop(regions.remove(1));
        for region in &regions {
            // SAFETY: the byte is the last of a region that is still mapped.
            unsafe { region.as_ptr().add(region.len() - 1).write_volatile(1) };
        }
    }

    #[test]
    fn giant_pages_are_reserved_by_their_own_file() {
        match Region::new(1, Backing::GiantMemfd) {
            Ok(region) => assert_eq!((region.len(), region.page_size()), (GIANT_PAGE, GIANT_PAGE)),
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.contains("echo 1 > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_huge"),
                    "{text}"
                );
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn pages_of_another_process_are_adopted_whole() {
        let page = cpu_page_size();
        let parts = [(None, 2 * page), (Some(0), page - 1)];
        let own = Region::adjoining(&parts, Backing::SmallPages, Placement::Preferred).unwrap();
        let files = || own.iter().map(|region| region.fd().unwrap().try_clone_to_owned().unwrap()).collect();
        let adopted = Region::adopt(files(), &parts, &Backing::SmallPages).unwrap();
        assert!(adopted[1].adjoins(&adopted[0]));
        assert_eq!(adopted[1].addr(), adopted[0].addr() + 2 * page);
        assert_eq!(
            adopted.iter().map(|region| (region.node(), region.len())).collect::<Vec<_>>(),
            [(None, 2 * page), (Some(0), page)]
        );
        for wrong in [&parts[..1], &[parts[1], parts[0]], &[parts[0], parts[1], parts[1]]] {
            assert_eq!(
                Region::adopt(files(), wrong, &Backing::SmallPages).unwrap_err().kind(),
                ErrorKind::Busy
            );
        }
        // A file that the other process can truncate.
        let file = tempfile::tempfile().unwrap();
        file.set_len(page as u64).unwrap();
        let error = Region::adopt(vec![file.into()], &[(None, page)], &Backing::SmallPages).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
    }

    #[test]
    fn sizes_beyond_the_address_space_are_refused() {
        assert_eq!(Region::new(usize::MAX, Backing::SmallPages).unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn memory_beyond_the_machines_is_refused_before_it_is_taken() {
        let error = Region::new(1 << 46, Backing::SmallPages).unwrap_err();
        // The limit is the machine's memory or, in a container, that of a control group.
        assert!(error.kind() == ErrorKind::Os && error.why().contains("MiB are needed and the"), "{error}");
    }

    #[test]
    fn pages_that_cannot_be_had_are_told_at_once() {
        // The second page is beyond the end of the file. It fails like a page for which no memory is left.
        let file = tempfile::tempfile().unwrap();
        let page_size = cpu_page_size();
        file.set_len(page_size as u64).unwrap();
        let length = NonZeroUsize::new(2 * page_size).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no memory of this process.
        let address = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) }.unwrap().cast();
        let backing = Backing::SmallPages;
        let region = Region {
            address,
            len: 2 * page_size,
            page_size,
            fd: None,
            backing,
            node: None,
            run: Arc::default(),
        };
        let error = region.populated().unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EFAULT));
        assert_eq!(error.what(), "cannot reserve 1 MiB as memfd of ordinary pages");
        assert!(error.hint().unwrap().contains("fewer packet buffers"));
    }
}
