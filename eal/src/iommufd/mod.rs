//! I/O page tables by `/dev/iommu`, on their own: this module knows nothing of VFIO or PCI, and
//! whoever attaches devices to an [`Ioas`] (VFIO cdev, vDPA, a test with none) needs only its id.
//!
//! ```no_run
//! use std::sync::Arc;
//! use vireo_eal::iommufd::{Access, Iommufd};
//! use vireo_eal::mem::{Backing, Region};
//!
//! # fn main() -> vireo_eal::Result<()> {
//! let ioas = Iommufd::open()?.ioas_alloc()?;
//! let region = Arc::new(Region::new(2 << 20, Backing::SmallPages)?);
//! let mapping = ioas.map(&region, Some(4 << 30), Access::ReadWrite)?;
//! assert_eq!(mapping.iova(), 4 << 30);
//! # Ok(())
//! # }
//! ```
//!
//! Objects destroy themselves: a [`Mapping`] unmaps before its [`Ioas`] is destroyed, which is before the
//! descriptor is closed, because each holds an `Arc` of the next.

mod sys;

use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use iommufd_bindings as uapi;
use nix::errno::Errno;
use nix::libc::{self, c_int};

use crate::dma::IovaRanges;
use crate::error::{Error, ErrorKind, Result};
use crate::ioctl::counted;
use crate::mem::Region;
use crate::node;

/// Path of the device node.
pub const PATH: &str = "/dev/iommu";

/// What devices may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Write only.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    fn flags(self) -> u32 {
        match self {
            Self::Read => uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
            Self::Write => uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
            Self::ReadWrite => Self::Read.flags() | Self::Write.flags(),
        }
    }
}

/// Whose `RLIMIT_MEMLOCK` pinned pages count against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accounting {
    /// The user's, all processes together (the kernel's default).
    PerUser,
    /// The process's, as the VFIO container does it; needs `CAP_SYS_RESOURCE`.
    PerProcess,
}

/// An open `/dev/iommu`: the owner of address spaces.
#[derive(Clone, Debug)]
pub struct Iommufd(Arc<OwnedFd>);

/// Whether two descriptors are of one open file, as a descriptor that was passed twice is (kcmp(2)). No where the kernel
/// does not tell.
fn is_same_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    /// `enum kcmp_type` of linux/kcmp.h.
    const KCMP_FILE: c_int = 0;
    let own = std::process::id();
    // SAFETY: kcmp reads and writes no memory of this process.
    unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, one.as_raw_fd(), other.as_raw_fd()) == 0 }
}

/// An [`Iommufd`] that somebody else keeps open.
#[derive(Clone, Debug, Default)]
pub(crate) struct WeakIommufd(Weak<OwnedFd>);

impl WeakIommufd {
    pub(crate) fn upgrade(&self) -> Option<Iommufd> {
        self.0.upgrade().map(Iommufd)
    }
}

macro_rules! call {
    ($name:literal, $fd:expr, $ioctl:ident, $arg:expr) => {
        // SAFETY: the argument is the structure of this ioctl, `size` filled in, and lives for the call;
        // addresses inside it are valid by the invariants named at the call.
        counted($name, || unsafe { sys::$ioctl($fd.as_raw_fd(), $arg) })
    };
}

impl Iommufd {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// `Unavailable` on a kernel without iommufd, `Permission` without access to the node.
    pub fn open() -> Result<Self> {
        Self::open_at(PATH.as_ref())
    }

    pub(crate) fn open_at(path: &Path) -> Result<Self> {
        let file = node::open(path).map_err(|error| match error.errno() {
            Some(Errno::ENOENT | Errno::ENODEV) => error
                .because("this kernel has no iommufd (CONFIG_IOMMUFD)")
                .with_hint("run: modprobe iommufd, or choose --vfio-mode container"),
            _ => error,
        })?;
        Ok(Self::of_node(file.into()))
    }

    /// Takes a descriptor of `/dev/iommu` that somebody else opened.
    ///
    /// # Errors
    /// `Permission` when it is of something else, as far as sysfs tells.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let what = || format!("cannot use descriptor {} as {PATH}", fd.as_raw_fd());
        match node::class_and_name(&fd).map_err(|errno| Error::os(what(), errno))? {
            Some((class, name)) if class == "misc" && name == "iommu" => Ok(Self::of_node(fd)),
            // What another device makes of these ioctls nobody knows.
            _ => Err(Error::new(ErrorKind::Permission, what(), "it is no iommufd")),
        }
    }

    /// As [`Iommufd::from_fd`], for a descriptor that was opened as the node, or looked at already.
    pub(crate) fn of_node(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    pub(crate) fn downgrade(&self) -> WeakIommufd {
        WeakIommufd(Arc::downgrade(&self.0))
    }

    /// Chooses whose limit pinned pages count against; only before the first object is allocated.
    ///
    /// # Errors
    /// `EBUSY` when there are objects, `EPERM` without `CAP_SYS_RESOURCE`.
    pub fn set_accounting(&self, accounting: Accounting) -> Result<()> {
        self.set_option(
            uapi::iommufd_option_IOMMU_OPTION_RLIMIT_MODE,
            0,
            u64::from(accounting == Accounting::PerProcess),
        )
    }

    /// Whether the two are the same open file, so that their address spaces can share pages.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || is_same_file(&self.0, &other.0)
    }

    fn set_option(&self, option_id: u32, object_id: u32, value: u64) -> Result<()> {
        let mut option = uapi::iommu_option {
            size: size_of::<uapi::iommu_option>() as u32,
            option_id,
            op: uapi::iommufd_option_ops_IOMMU_OPTION_OP_SET as u16,
            __reserved: 0,
            object_id,
            val64: value,
        };
        call!("IOMMU_OPTION", self.0, option, &mut option)
            .map(drop)
            .map_err(|errno| Error::os(format!("cannot set iommufd option {option_id}"), errno))
    }

    /// Allocates an empty I/O address space (`IOMMU_IOAS_ALLOC`).
    ///
    /// # Errors
    /// When the kernel is out of memory.
    pub fn ioas_alloc(&self) -> Result<Arc<Ioas>> {
        let mut alloc = uapi::iommu_ioas_alloc {
            size: size_of::<uapi::iommu_ioas_alloc>() as u32,
            flags: 0,
            out_ioas_id: 0,
        };
        call!("IOMMU_IOAS_ALLOC", self.0, ioas_alloc, &mut alloc)
            .map_err(|errno| Error::os("cannot allocate an I/O address space", errno))?;
        Ok(Arc::new(Ioas { id: alloc.out_ioas_id, iommufd: self.clone() }))
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// I/O address space: what devices that are attached to it can reach. Destroyed on drop.
#[derive(Debug)]
pub struct Ioas {
    id: u32,
    iommufd: Iommufd,
}

impl Ioas {
    /// Object id, for whoever attaches devices.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The descriptor that it lives in.
    pub fn iommufd(&self) -> &Iommufd {
        &self.iommufd
    }

    /// Addresses that every attached device can use, and the alignment in bytes that mappings need.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn iova_ranges(&self) -> Result<(IovaRanges, u64)> {
        let mut ranges: Vec<uapi::iommu_iova_range> = Vec::new();
        loop {
            let mut query = uapi::iommu_ioas_iova_ranges {
                size: size_of::<uapi::iommu_ioas_iova_ranges>() as u32,
                ioas_id: self.id,
                num_iovas: ranges.len() as u32,
                __reserved: 0,
                allowed_iovas: ranges.as_mut_ptr() as u64,
                out_iova_alignment: 0,
            };
            // The kernel writes at most `num_iovas` ranges, which is the length of the vector behind the address.
            match call!("IOMMU_IOAS_IOVA_RANGES", self.iommufd.0, ioas_iova_ranges, &mut query) {
                Ok(_) => {
                    ranges.truncate(query.num_iovas as usize);
                    let ranges = IovaRanges::new(ranges.iter().map(|range| range.start..=range.last));
                    return Ok((ranges, query.out_iova_alignment));
                }
                Err(Errno::EMSGSIZE) if query.num_iovas as usize > ranges.len() => {
                    let empty = uapi::iommu_iova_range { start: 0, last: 0 };
                    ranges.resize(query.num_iovas as usize, empty);
                }
                Err(errno) => return Err(Error::os("cannot read the IOVA ranges", errno)),
            }
        }
    }

    /// Keeps `ranges` usable: a device that cannot reach them is refused when it attaches, instead of
    /// shrinking the space.
    ///
    /// # Errors
    /// `EADDRINUSE` when an attached device cannot reach them already.
    pub fn allow_iovas(&self, ranges: &[RangeInclusive<u64>]) -> Result<()> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|range| uapi::iommu_iova_range { start: *range.start(), last: *range.end() })
            .collect();
        let mut allow = uapi::iommu_ioas_allow_iovas {
            size: size_of::<uapi::iommu_ioas_allow_iovas>() as u32,
            ioas_id: self.id,
            num_iovas: ranges.len() as u32,
            __reserved: 0,
            allowed_iovas: ranges.as_ptr() as u64,
        };
        // The kernel reads `num_iovas` ranges, which is the length of the vector behind the address.
        call!("IOMMU_IOAS_ALLOW_IOVAS", self.iommufd.0, ioas_allow_iovas, &mut allow)
            .map(drop)
            .map_err(|errno| Error::os("cannot reserve IOVA ranges", errno))
    }

    /// Whether the IOMMU may use large pages for mappings made from now on (`IOMMU_OPTION_HUGE_PAGES`).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_huge_pages(&self, on: bool) -> Result<()> {
        self.iommufd.set_option(uapi::iommufd_option_IOMMU_OPTION_HUGE_PAGES, self.id, u64::from(on))
    }

    /// Maps all of `region` with one call (`IOMMU_IOAS_MAP`), at `iova` or where the kernel likes.
    ///
    /// # Errors
    /// `EEXIST` when something is mapped there, `ENOMEM` at the limit of locked memory, `EINVAL`/`EADDRINUSE`
    /// outside of the usable ranges.
    pub fn map(self: &Arc<Self>, region: &Arc<Region>, iova: Option<u64>, access: Access) -> Result<Mapping> {
        self.map_range(region, 0..region.len(), iova, access)
    }

    /// Maps the bytes `range` of `region` with one call. Its ends are multiples of the alignment that
    /// [`Ioas::iova_ranges`] gives, also inside a hugepage.
    ///
    /// # Errors
    /// As for [`Ioas::map`]; `Usage` when the region has no such bytes.
    pub fn map_range(
        self: &Arc<Self>,
        region: &Arc<Region>,
        range: Range<usize>,
        iova: Option<u64>,
        access: Access,
    ) -> Result<Mapping> {
        let user_va = region.address_of(&range)?;
        let len = range.len() as u64;
        let mut map = uapi::iommu_ioas_map {
            size: size_of::<uapi::iommu_ioas_map>() as u32,
            flags: fixed(iova) | access.flags(),
            ioas_id: self.id,
            __reserved: 0,
            user_va,
            length: len,
            iova: iova.unwrap_or(0),
        };
        // The pages stay mapped: the `Mapping` holds an `Arc` of the region.
        call!("IOMMU_IOAS_MAP", self.iommufd.0, ioas_map, &mut map)
            .map_err(|errno| Error::os(map_what(len, iova), errno))?;
        Ok(Mapping { ioas: Arc::clone(self), iova: map.iova, len, region: Arc::clone(region) })
    }

    /// Maps all of `region` by its file (`IOMMU_IOAS_MAP_FILE`, kernel 6.13), not by its virtual address.
    ///
    /// # Errors
    /// As for [`Ioas::map`]; `Unavailable` on an older kernel and for memory without a file.
    pub fn map_file(
        self: &Arc<Self>,
        region: &Arc<Region>,
        iova: Option<u64>,
        access: Access,
    ) -> Result<Mapping> {
        let what = || map_what(region.len() as u64, iova);
        let fd = region.fd().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, what(), "the memory has no file")
                .with_hint("run without --in-memory")
        })?;
        let mut map = uapi::iommu_ioas_map_file {
            size: size_of::<uapi::iommu_ioas_map_file>() as u32,
            flags: fixed(iova) | access.flags(),
            ioas_id: self.id,
            fd: fd.as_raw_fd() as c_int,
            start: 0,
            length: region.len() as u64,
            iova: iova.unwrap_or(0),
        };
        call!("IOMMU_IOAS_MAP_FILE", self.iommufd.0, ioas_map_file, &mut map).map_err(
            |errno| match errno {
                Errno::ENOTTY => {
                    Error::os(what(), errno).because("IOMMU_IOAS_MAP_FILE needs kernel 6.13 or newer")
                }
                _ => Error::os(what(), errno),
            },
        )?;
        Ok(Mapping { ioas: Arc::clone(self), iova: map.iova, len: map.length, region: Arc::clone(region) })
    }

    /// Maps here what `source` maps, sharing its pinned pages (`IOMMU_IOAS_COPY`).
    ///
    /// # Errors
    /// As for [`Ioas::map`]; `EINVAL` when the two spaces are of different descriptors.
    pub fn copy(self: &Arc<Self>, source: &Mapping, iova: Option<u64>, access: Access) -> Result<Mapping> {
        let what = || map_what(source.len, iova);
        if !self.iommufd.is_same(&source.ioas.iommufd) {
            return Err(Error::new(
                ErrorKind::Usage,
                what(),
                "the source belongs to another open /dev/iommu",
            ));
        }
        let mut copy = uapi::iommu_ioas_copy {
            size: size_of::<uapi::iommu_ioas_copy>() as u32,
            flags: fixed(iova) | access.flags(),
            dst_ioas_id: self.id,
            src_ioas_id: source.ioas.id,
            length: source.len,
            dst_iova: iova.unwrap_or(0),
            src_iova: source.iova,
        };
        call!("IOMMU_IOAS_COPY", self.iommufd.0, ioas_copy, &mut copy)
            .map_err(|errno| Error::os(what(), errno))?;
        Ok(Mapping {
            ioas: Arc::clone(self),
            iova: copy.dst_iova,
            len: source.len,
            region: Arc::clone(&source.region),
        })
    }

    fn unmap(&self, iova: u64, length: u64) -> nix::Result<u64> {
        let mut unmap = uapi::iommu_ioas_unmap {
            size: size_of::<uapi::iommu_ioas_unmap>() as u32,
            ioas_id: self.id,
            iova,
            length,
        };
        call!("IOMMU_IOAS_UNMAP", self.iommufd.0, ioas_unmap, &mut unmap)?;
        Ok(unmap.length)
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        let mut destroy = uapi::iommu_destroy { size: size_of::<uapi::iommu_destroy>() as u32, id: self.id };
        if let Err(errno) = call!("IOMMU_DESTROY", self.iommufd.0, destroy, &mut destroy) {
            tracing::error!("cannot destroy I/O address space {}: {errno}", self.id);
        }
    }
}

/// A region, or a part of one, that is mapped in an [`Ioas`]. Unmapped on drop, before the pages can go back to the kernel.
#[derive(Debug)]
pub struct Mapping {
    ioas: Arc<Ioas>,
    iova: u64,
    len: u64,
    region: Arc<Region>,
}

impl Mapping {
    /// Device address of the first byte.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Its bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where it is mapped.
    pub fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// The pages.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Physical address of each page of a region that is mapped whole, for devices without an IOMMU
    /// (`IOMMU_IOAS_NOIOMMU_GET_PA`, kernel 7.3). The mapping pins the pages, so they stay right.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_RAWIO`; `EOPNOTSUPP` when no device without IOMMU is attached.
    pub fn physical_addresses(&self) -> Result<Vec<u64>> {
        let page_size = self.region.page_size() as u64;
        (0..self.len / page_size)
            .map(|page| {
                let mut query = sys::iommu_ioas_noiommu_get_pa {
                    size: size_of::<sys::iommu_ioas_noiommu_get_pa>() as u32,
                    ioas_id: self.ioas.id,
                    iova: self.iova + page * page_size,
                    length: page_size,
                    ..Default::default()
                };
                let what = "cannot read physical addresses from iommufd";
                call!("IOMMU_IOAS_NOIOMMU_GET_PA", self.ioas.iommufd.0, ioas_noiommu_get_pa, &mut query)
                    .map_err(|errno| Error::os(what, errno).with_hint("run as root (CAP_SYS_RAWIO)"))?;
                if query.length < page_size {
                    return Err(Error::new(
                        ErrorKind::Os,
                        what,
                        format!("a page of {page_size} bytes is contiguous for {} bytes only", query.length),
                    ));
                }
                Ok(query.out_phys)
            })
            .collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self.ioas.unmap(self.iova, self.len) {
            Ok(unmapped) if unmapped == self.len => {}
            Ok(unmapped) => tracing::error!("unmapped {unmapped} of {} bytes at {:#x}", self.len, self.iova),
            Err(errno) => tracing::error!("cannot unmap {} bytes at {:#x}: {errno}", self.len, self.iova),
        }
    }
}

fn fixed(iova: Option<u64>) -> u32 {
    if iova.is_some() { uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA } else { 0 }
}

fn map_what(len: u64, iova: Option<u64>) -> String {
    let size = len.div_ceil(1 << 20);
    match iova {
        Some(iova) => format!("cannot map {size} MiB for DMA at {iova:#x}"),
        None => format!("cannot map {size} MiB for DMA"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_iommufd_is_taken_for_one() {
        let null = std::fs::File::open("/dev/null").unwrap();
        for fd in [null.into(), tempfile::tempfile().unwrap().into()] {
            let error = Iommufd::from_fd(fd).unwrap_err();
            assert_eq!((error.kind(), error.why()), (ErrorKind::Permission, "it is no iommufd"));
        }
    }

    #[test]
    fn a_descriptor_that_was_duplicated_is_the_same_file() {
        let open = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let (one, other) = (open(), open());
        let again = one.try_clone().unwrap();
        // A kernel without CONFIG_KCMP, or a sandbox, does not tell.
        let tells = is_same_file(&one, &one);
        let [one, again, other] = [one, again, other].map(Iommufd::of_node);
        assert!(one.is_same(&one.clone()));
        assert_eq!(one.is_same(&again), tells);
        assert!(!one.is_same(&other));
    }
}
