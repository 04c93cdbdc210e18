//! Pages for DMA: one mapping per region, in one of four backings.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs, statfs};
use nix::unistd::ftruncate;

use super::numa::{self, OnNode, Placement};
use super::shortage::{self, default_hugepage_size};
use super::{limits, page_size as cpu_page_size};
use crate::error::{Error, ErrorKind, Result};

/// Below which the limits of the machine are read.
const ROOT: &str = "/";
const GIANT_PAGE: usize = 1 << 30;
/// Of every memfd: closed on exec, and of a size that can be fixed.
const MEMFD: MFdFlags = MFdFlags::MFD_CLOEXEC.union(MFdFlags::MFD_ALLOW_SEALING);

/// Where the pages of a [`Region`] come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A hugetlb memfd: hugepages without a mount, that another process can map by its descriptor.
    HugeMemfd,
    /// As that, of 1 GiB pages.
    GiantMemfd,
    /// A file on a hugetlbfs mount (`--huge-dir`) that never has a name. hugetlbfs files cannot be sealed.
    HugeFile {
        /// The mount.
        dir: PathBuf,
    },
    /// Private anonymous hugepages (`--in-memory`), by `hugepage-rs`.
    HugeAnonymous,
    /// A memfd of ordinary pages (`--no-huge`): of 4 KiB, or what the kernel is built with.
    SmallPages,
}

impl Backing {
    /// Name for the start-up report.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HugeMemfd => "hugetlb memfd",
            Self::GiantMemfd => "hugetlb memfd of 1 GiB pages",
            Self::HugeFile { .. } => "hugetlbfs file",
            Self::HugeAnonymous => "anonymous hugepages",
            Self::SmallPages => "memfd of ordinary pages",
        }
    }

    /// Size of its pages in bytes.
    ///
    /// # Errors
    /// `Unavailable` when the kernel has no hugepages, `Io` when `dir` is no hugetlbfs mount.
    pub fn page_size(&self) -> Result<usize> {
        match self {
            Self::SmallPages => Ok(cpu_page_size()),
            Self::GiantMemfd => Ok(GIANT_PAGE),
            Self::HugeFile { dir } => mounted_page_size(dir),
            Self::HugeMemfd | Self::HugeAnonymous => default_hugepage_size(),
        }
    }
}

/// Contiguous virtual memory that a device may reach.
///
/// It hands out no references into itself: a device may write it at any time. Everything goes through
/// [`DmaRing`](crate::dma::DmaRing) and [`PoolCache`](crate::dma::PoolCache).
#[derive(Debug)]
pub struct Region {
    address: NonNull<u8>,
    len: usize,
    page_size: usize,
    fd: Option<OwnedFd>,
    backing: Backing,
}

// SAFETY: the mapping belongs to the process, not to a thread. Rings have bytes of their own and reach them by atomics, and
// a packet buffer is reached by whoever has its only handle.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` gives no other access.
unsafe impl Sync for Region {}

// SAFETY: the mapping is the region's own until it is dropped, and every access to it expects that a device may write: the
// region hands out no references.
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
    /// `Os` when the pages are not there, with what is free and the command that reserves more.
    pub fn new(len: usize, backing: Backing) -> Result<Self> {
        Self::on_nodes(len, backing, &[], Placement::Preferred)
    }

    /// As [`Region::new`], with parts of it on chosen NUMA nodes; the rest comes from where the kernel likes.
    ///
    /// # Errors
    /// As for [`Region::new`]; also when a node does not have its pages and [`Placement::Required`] asks for them.
    pub fn on_nodes(len: usize, backing: Backing, nodes: &[OnNode], placement: Placement) -> Result<Self> {
        let page_size = backing.page_size()?;
        let len = len
            .max(1)
            .checked_next_multiple_of(page_size)
            .filter(|len| isize::try_from(*len).is_ok())
            .ok_or_else(|| Error::new(ErrorKind::Usage, "cannot reserve memory", "the size is too large"))?;
        if placement == Placement::Required {
            shortage::check_nodes(Path::new(ROOT), nodes, page_size)?;
        }
        match backing {
            // Miri reads no files.
            Backing::SmallPages if cfg!(miri) => {}
            Backing::SmallPages => {
                limits::check(Path::new(ROOT), || cannot_reserve(len, &backing), len as u64)?
            }
            _ => shortage::check_free(Path::new(ROOT), len, page_size)?,
        }
        let memfd = |pages: MFdFlags| {
            let fd = memfd_create(c"vireo", MEMFD | pages)
                .map_err(|errno| Error::os(format!("cannot create a {}", backing.name()), errno))?;
            Self::from_fd(fd, len, page_size, backing.clone())
        };
        let region = match &backing {
            // Miri has no memfd and takes no advice.
            Backing::SmallPages if cfg!(miri) => return Self::private(len, page_size),
            Backing::HugeAnonymous => Self::anonymous(len, page_size),
            Backing::HugeMemfd => memfd(MFdFlags::MFD_HUGETLB),
            Backing::GiantMemfd => memfd(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB),
            Backing::SmallPages => memfd(MFdFlags::empty()),
            Backing::HugeFile { dir } => {
                let file = huge_file(dir)?;
                check_mount(&file, dir, len, page_size)?;
                Self::from_fd(file.into(), len, page_size, backing.clone())
            }
        }?;
        region.bind(nodes, placement)?;
        let region = region.populated()?;
        region.tell_what_is_elsewhere(nodes);
        Ok(region)
    }

    fn bind(&self, nodes: &[OnNode], placement: Placement) -> Result<()> {
        let what = || cannot_reserve(self.len, &self.backing);
        for on in nodes {
            self.address_of(&on.bytes)?;
            // SAFETY: the bytes are within this region's own mapping, as just checked.
            unsafe { numa::bind(self.address, on, placement) }
                .map_err(|errno| Error::os(format!("{} on NUMA node {}", what(), on.node), errno))?;
        }
        Ok(())
    }

    /// Logs how much of each node's parts is elsewhere: the command that gives a node more pages is for all of them.
    fn tell_what_is_elsewhere(&self, nodes: &[OnNode]) {
        let mut of_node: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
        for on in nodes {
            // SAFETY: the bytes are within this region's own mapping: `bind` has checked them.
            let pages = unsafe { numa::elsewhere(self.address, on, self.page_size) }.unwrap_or(0);
            let (elsewhere, bytes) = of_node.entry(on.node).or_default();
            *elsewhere += pages;
            *bytes += on.bytes.len();
        }
        for (node, (pages, bytes)) in of_node.into_iter().filter(|(_, (pages, _))| *pages > 0) {
            tracing::warn!(
                "{} of {} KiB of packet memory are not on NUMA node {node}, where the NICs are that use it; {}",
                (pages * self.page_size) >> 10,
                bytes >> 10,
                shortage::more_on_node(Path::new(ROOT), node, self.page_size, pages)
            );
        }
    }

    fn from_fd(fd: OwnedFd, len: usize, page_size: usize, backing: Backing) -> Result<Self> {
        let what = || cannot_reserve(len, &backing);
        ftruncate(&fd, len as i64).map_err(|errno| Error::os(what(), errno))?;
        if !matches!(backing, Backing::HugeFile { .. }) {
            // Another process that is given the descriptor could else cut pages off under our feet.
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
            fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| Error::os(what(), errno))?;
        }
        let address =
            map_shared(&fd, len).map_err(|errno| no_pages(Error::os(what(), errno), len, page_size))?;
        Ok(Self { address, len, page_size, fd: Some(fd), backing })
    }

    /// The same pages at other addresses, as another process maps them.
    pub(crate) fn mapped_again(&self) -> Result<Self> {
        let what = "cannot map packet memory a second time";
        let fd = self.fd.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, what, format!("{} are no file", self.backing.name()))
                .with_hint("leave --in-memory out")
        })?;
        let address = map_shared(fd, self.len).map_err(|errno| Error::os(what, errno))?;
        let (len, page_size, backing) = (self.len, self.page_size, self.backing.clone());
        let again = Self { address, len, page_size, fd: None, backing };
        again.keep_out_of_core_dumps();
        Ok(again)
    }

    /// Memory that nobody else can map, of ordinary pages.
    fn private(len: usize, page_size: usize) -> Result<Self> {
        let what = "cannot reserve private memory";
        let length = NonZeroUsize::new(len).ok_or_else(|| Error::os(what, Errno::EINVAL))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let address = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }
            .map_err(|errno| Error::os(what, errno))?;
        Ok(Self { address: address.cast(), len, page_size, fd: None, backing: Backing::SmallPages })
    }

    fn anonymous(len: usize, page_size: usize) -> Result<Self> {
        let what = "cannot reserve anonymous hugepages";
        let layout = Layout::from_size_align(len, page_size)
            .map_err(|_| Error::new(ErrorKind::Os, what, "the size is too large"))?;
        // SAFETY: `len` is at least one page, so the layout's size is not zero.
        let pointer = unsafe { hugepage_rs::alloc(layout) };
        let address =
            NonNull::new(pointer).ok_or_else(|| no_pages(Error::os(what, Errno::ENOMEM), len, page_size))?;
        Ok(Self { address, len, page_size, fd: None, backing: Backing::HugeAnonymous })
    }

    /// Takes the pages, which only a write does: a fault later on that finds none is SIGBUS. `MAP_POPULATE` does not
    /// say that it failed.
    fn populated(self) -> Result<Self> {
        // SAFETY: the range is this region's own mapping, of read and write permission and not yet shared.
        let result = unsafe { madvise(self.address.cast(), self.len, MmapAdvise::MADV_POPULATE_WRITE) };
        if let Err(errno) = result {
            let (len, page_size, what) = (self.len, self.page_size, cannot_reserve(self.len, &self.backing));
            // Its own pages are not among those that others use.
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

    /// False: a region has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that are certainly contiguous in physical memory.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Where the pages come from.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The file behind the pages, for `IOMMU_IOAS_MAP_FILE` and for other processes; none with `--in-memory`.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Physical address of each page, from `/proc/self/pagemap`
    /// (`Documentation/admin-guide/mm/pagemap.rst`). They stay right as long as something keeps the pages in
    /// place: hugetlb pages move, too.
    ///
    /// # Errors
    /// `Permission` when the kernel hides them from this process.
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

    /// Virtual address of the bytes `range`, to be mapped for devices.
    pub(crate) fn address_of(&self, range: &Range<usize>) -> Result<u64> {
        if range.start < range.end && range.end <= self.len {
            return Ok(self.address.as_ptr() as u64 + range.start as u64);
        }
        let what = format!("cannot map bytes {range:?} of a region");
        Err(Error::new(ErrorKind::Usage, what, format!("it has {}", self.len)))
    }

    /// First byte, valid for [`Region::len`] bytes while the region lives.
    pub(crate) fn as_ptr(&self) -> NonNull<u8> {
        self.address
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `address` and `len` describe a mapping that this value made and that nothing else unmaps;
        // whoever points into the region holds an `Arc` of it.
        if let Err(errno) = unsafe { munmap(self.address.cast::<c_void>(), self.len) } {
            tracing::error!("cannot unmap {} bytes of packet memory: {errno}", self.len);
        }
    }
}

/// Maps the first `len` bytes of a file.
fn map_shared(fd: &OwnedFd, len: usize) -> nix::Result<NonNull<u8>> {
    let length = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
    unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, 0) }.map(NonNull::cast)
}

fn cannot_reserve(len: usize, backing: &Backing) -> String {
    format!("cannot reserve {} MiB as {}", len.div_ceil(1 << 20), backing.name())
}

/// Pages of a hugetlbfs mount are its blocks.
fn mounted_page_size(dir: &Path) -> Result<usize> {
    let what = || format!("cannot use --huge-dir {}", dir.display());
    let found = statfs(dir).map_err(|errno| {
        Error::os(what(), errno).with_kind(ErrorKind::Io).with_hint(format!(
            "run: mkdir -p {0} && mount -t hugetlbfs none {0}; or {NO_MOUNT}",
            dir.display()
        ))
    })?;
    match usize::try_from(found.block_size()) {
        Ok(size) if found.filesystem_type() == HUGETLBFS_MAGIC => Ok(size),
        _ => Err(Error::new(ErrorKind::Io, what(), "it is not a hugetlbfs mount")
            .with_hint(format!("run: mount -t hugetlbfs none {}; or {NO_MOUNT}", dir.display()))),
    }
}

const NO_MOUNT: &str = "leave --huge-dir out: no mount is needed";

/// A mount may have less than the machine: its `size=`. That `file` has the pages that were found in `dir` decides what is
/// contiguous in physical memory.
fn check_mount(file: &File, dir: &Path, len: usize, page_size: usize) -> Result<()> {
    let what = || format!("cannot use --huge-dir {}", dir.display());
    let found = fstatfs(file).map_err(|errno| Error::os(what(), errno).with_kind(ErrorKind::Io))?;
    if found.filesystem_type() != HUGETLBFS_MAGIC || found.block_size() as usize != page_size {
        return Err(Error::new(ErrorKind::Io, what(), "something else was mounted there meanwhile"));
    }
    let (total, free) = (found.blocks(), found.blocks_free());
    // A mount without a size of its own has no count of blocks.
    if total == 0 || free as usize >= len / page_size {
        return Ok(());
    }
    let why = format!("{} pages are needed and the mount has {free} of {total} free", len / page_size);
    let wanted = total.saturating_sub(free) as usize + len / page_size;
    Err(Error::new(ErrorKind::Io, what(), why).with_hint(mount_again(dir, wanted, page_size)))
}

/// A mount's size stays what it was: hugetlbfs takes `-o remount` and does nothing.
fn mount_again(dir: &Path, pages: usize, page_size: usize) -> String {
    let (dir, page) = (dir.display(), page_size >> 10);
    let size = pages.saturating_mul(page);
    format!(
        "run: umount {dir} && mount -t hugetlbfs -o pagesize={page}K,size={size}K none {dir}; or {NO_MOUNT}"
    )
}

fn no_pages(error: Error, len: usize, page_size: usize) -> Error {
    if page_size == cpu_page_size() {
        return error.with_hint("free memory, or ask for fewer packet buffers");
    }
    shortage::no_pages(Path::new(ROOT), error, len, page_size)
}

/// A file in `dir` that has no name: nobody else opens it, and a killed process leaves none behind. Two processes with
/// one pid, in two containers, cannot meet in it.
fn huge_file(dir: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        // O_EXCL: nor does it get a name later (`open(2)`).
        .custom_flags((OFlag::O_TMPFILE | OFlag::O_EXCL).bits())
        .mode(0o600)
        .open(dir)
        .map_err(|error| {
            Error::io(format!("cannot create a file in {}", dir.display()), &error).with_hint(NO_MOUNT)
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn small_pages_round_up() {
        let region = Region::new(5000, Backing::SmallPages).unwrap();
        let page = cpu_page_size();
        assert_eq!((region.len(), region.page_size()), (5000_usize.next_multiple_of(page), page));
        let fd = region.fd().unwrap();
        assert_eq!(ftruncate(fd, 0), Err(Errno::EPERM), "whoever shares the pages cannot cut them off");
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
    fn sizes_beyond_the_address_space_are_refused() {
        assert_eq!(Region::new(usize::MAX, Backing::SmallPages).unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn a_huge_file_has_no_name_and_is_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let file = match huge_file(dir.path()) {
            // Overlays of old kernels.
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => return,
            file => file.unwrap(),
        };
        let found = file.metadata().unwrap();
        assert_eq!((found.mode() & 0o777, found.nlink()), (0o600, 0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let other = huge_file(dir.path()).unwrap();
        assert_ne!(other.metadata().unwrap().ino(), found.ino(), "two processes of one pid share nothing");
        let link = dir.path().join("link");
        std::fs::write(dir.path().join("victim"), "kept").unwrap();
        std::os::unix::fs::symlink(dir.path().join("victim"), &link).unwrap();
        assert!(huge_file(&link).is_err());
        assert_eq!(std::fs::read_to_string(&link).unwrap(), "kept");
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no fstatfs")]
    fn pages_of_another_size_are_not_taken_for_hugepages() {
        let error = check_mount(&tempfile::tempfile().unwrap(), Path::new("/mnt/huge"), 1, 4096).unwrap_err();
        assert_eq!(error.why(), "something else was mounted there meanwhile");
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn memory_beyond_the_machines_is_refused_before_it_is_taken() {
        let error = Region::new(1 << 46, Backing::SmallPages).unwrap_err();
        // The machine's memory or, in a container, a control group's.
        assert!(error.kind() == ErrorKind::Os && error.why().contains("MiB are needed and the"), "{error}");
    }

    #[test]
    fn a_full_mount_is_made_again_with_room_for_both() {
        assert_eq!(
            mount_again(Path::new("/mnt/huge"), 11, 2 << 20),
            "run: umount /mnt/huge && mount -t hugetlbfs -o pagesize=2048K,size=22528K none /mnt/huge; \
             or leave --huge-dir out: no mount is needed"
        );
    }

    #[test]
    fn pages_that_cannot_be_had_are_told_at_once() {
        // The second page is beyond the end of the file, as one is for which nothing is left.
        let file = tempfile::tempfile().unwrap();
        let page_size = cpu_page_size();
        file.set_len(page_size as u64).unwrap();
        let length = NonZeroUsize::new(2 * page_size).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let address = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) }.unwrap().cast();
        let backing = Backing::SmallPages;
        let region = Region { address, len: 2 * page_size, page_size, fd: None, backing };
        let error = region.populated().unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EFAULT));
        assert_eq!(error.what(), "cannot reserve 1 MiB as memfd of ordinary pages");
        assert!(error.hint().unwrap().contains("fewer packet buffers"));
    }
}
