//! Containers: the I/O address space of groups.

use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use vireo_iommufd::{Access, Memory};

use crate::error::{Error, Operation, Result};
use crate::mapping::Mapping;
use crate::{device_node, info, sys};

/// Path of the container node.
pub const PATH: &str = "/dev/vfio/vfio";

/// IOMMU type of a [`Container`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IommuType {
    /// An IOMMU whose mappings can only be unmapped as a whole.
    Type1v2,
    /// No IOMMU: devices use physical addresses.
    NoIommu,
}

impl IommuType {
    fn number(self) -> u32 {
        match self {
            Self::Type1v2 => sys::VFIO_TYPE1v2_IOMMU,
            Self::NoIommu => sys::VFIO_NOIOMMU_IOMMU,
        }
    }
}

/// IOVAs that can be mapped, as reported by [`Container::iova_ranges`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Iovas {
    /// Ranges that every device in the container can use.
    pub ranges: Vec<RangeInclusive<u64>>,
    /// Size in bytes of the smallest page that the IOMMU maps; 1 if the kernel does not report it.
    pub smallest_page: u64,
}

/// A container: `/dev/vfio/vfio`, or `/dev/iommu`, for which iommufd emulates a container. When the last
/// group leaves a `/dev/vfio/vfio` container, the kernel removes its mappings.
#[derive(Debug)]
pub struct Container(OwnedFd);

impl Container {
    /// Opens `/dev/vfio/vfio`.
    ///
    /// # Errors
    /// [`Error::Open`]: `ENOENT` or `ENODEV` without VFIO, `EACCES` without access to the node.
    pub fn open() -> Result<Self> {
        device_node::open(PATH.as_ref()).map(Self)
    }

    /// Opens the node at `path`: `/dev/iommu`, or the path of one of the two nodes in a Linux container.
    ///
    /// # Errors
    /// As for [`Container::open`]; [`Error::WrongNode`] when sysfs does not identify the node as
    /// `/dev/vfio/vfio` or `/dev/iommu`.
    pub fn open_at(path: &Path) -> Result<Self> {
        Self::from_fd(device_node::open(path)?)
    }

    /// Takes ownership of an open descriptor of `/dev/vfio/vfio` or `/dev/iommu`.
    ///
    /// # Errors
    /// [`Error::WrongNode`] when sysfs does not identify the descriptor as one of these nodes.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let is_match = |class: &str, name: &str| class == "misc" && matches!(name, "vfio" | "iommu");
        device_node::name_of(&fd, "VFIO container", is_match)?;
        Ok(Self(fd))
    }

    /// Takes ownership of a descriptor without the sysfs check of [`Container::from_fd`].
    ///
    /// # Safety
    /// `fd` must refer to `/dev/vfio/vfio` or `/dev/iommu`. Another driver may respond to these ioctls by
    /// writing arbitrary data to arbitrary addresses.
    pub unsafe fn from_fd_unchecked(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Returns whether the container supports this IOMMU type.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn has(&self, iommu: IommuType) -> Result<bool> {
        // SAFETY: the argument is an integer.
        unsafe { sys::ioctl(self.as_fd(), sys::VFIO_CHECK_EXTENSION, integer(iommu.number())) }
            .map(|answer| answer > 0)
            .map_err(|errno| Operation::CheckExtension.failed(errno))
    }

    /// Sets the container's IOMMU type, after checking the kernel's API version. The container must already
    /// have a group.
    ///
    /// # Errors
    /// `ENODEV` when the kernel has no driver for the type, `EPERM` when the platform does not isolate
    /// interrupts. [`Error::ApiVersion`] when the kernel has a different API version.
    pub fn set_iommu(&self, iommu: IommuType) -> Result<()> {
        // SAFETY: this ioctl has no argument.
        let version = unsafe { sys::ioctl(self.as_fd(), sys::VFIO_GET_API_VERSION, ptr::null_mut()) }
            .map_err(|errno| Operation::SetIommu.failed(errno))?;
        if version != sys::VFIO_API_VERSION as i32 {
            return Err(Error::ApiVersion(version));
        }
        // SAFETY: the argument is an integer.
        unsafe { sys::ioctl(self.as_fd(), sys::VFIO_SET_IOMMU, integer(iommu.number())) }
            .map(drop)
            .map_err(|errno| Operation::SetIommu.failed(errno))
    }

    /// Reads the IOVA ranges that can be mapped. Each group that joins may narrow them.
    ///
    /// # Errors
    /// [`Error::NotReported`] on kernels before 5.4.
    pub fn iova_ranges(&self) -> Result<Iovas> {
        let operation = Operation::ReadIovaRanges;
        let answer = info::query(
            size_of::<sys::vfio_iommu_type1_info>(),
            |_| (),
            // SAFETY: `query` passes an 8-byte aligned buffer of at least the structure's size, with `argsz`
            // set to its length.
            |at| unsafe { sys::ioctl(self.as_fd(), sys::VFIO_IOMMU_GET_INFO, at.cast()) }.map(drop),
        )
        .map_err(|errno| operation.clone().failed(errno))?;
        let why = "the kernel does not report them (5.4 or newer does)";
        let ranges = info::iova_ranges(&answer).ok_or(Error::NotReported { operation, why })?;
        Ok(Iovas { ranges, smallest_page: info::smallest_page(&answer).unwrap_or(1) })
    }

    /// Maps the bytes `range` of `memory` at `iova` with one ioctl (`VFIO_IOMMU_MAP_DMA`). Drop the mapping
    /// before the last group leaves the container.
    ///
    /// # Errors
    /// `EEXIST` when the range overlaps an existing mapping, `ENOMEM` at the limit of locked memory, `ENOSPC`
    /// at the limit of mappings. [`Error::Argument`] when the range is empty or exceeds the memory.
    pub fn map_range<M: Memory + ?Sized>(
        self: &Arc<Self>,
        memory: &Arc<M>,
        range: Range<usize>,
        iova: u64,
        access: Access,
    ) -> Result<Mapping<Arc<M>>> {
        if range.start >= range.end || range.end > memory.len() {
            let operation = Operation::Map { len: range.len() as u64, iova };
            return Err(Error::Argument { operation, why: "the range is empty or exceeds the memory" });
        }
        // SAFETY: the bytes are inside the memory, as checked above.
        let first = unsafe { memory.address().add(range.start) };
        let bytes = NonNull::slice_from_raw_parts(first, range.len());
        // SAFETY: the mapping keeps `memory` alive, and `Memory` allows a device to access its bytes until it
        // is dropped.
        unsafe { self.map_user(bytes, iova, access) }?;
        Ok(Mapping::new(self, iova, range.len() as u64, Arc::clone(memory)))
    }

    /// Maps `memory` of this process at `iova` with one ioctl (`VFIO_IOMMU_MAP_DMA`).
    ///
    /// # Safety
    /// `memory` must stay mapped in this process until it is unmapped from the container or the last group
    /// has left the container. Until then, nothing may rely on its contents: devices may read it at any time,
    /// and write it if `access` permits.
    ///
    /// # Errors
    /// As for [`Container::map_range`].
    pub unsafe fn map_user(&self, memory: NonNull<[u8]>, iova: u64, access: Access) -> Result<()> {
        let flags = match access {
            Access::Read => sys::VFIO_DMA_MAP_FLAG_READ,
            Access::Write => sys::VFIO_DMA_MAP_FLAG_WRITE,
            Access::ReadWrite => sys::VFIO_DMA_MAP_FLAG_READ | sys::VFIO_DMA_MAP_FLAG_WRITE,
        };
        let len = memory.len() as u64;
        let mut map = sys::vfio_iommu_type1_dma_map {
            argsz: size_of::<sys::vfio_iommu_type1_dma_map>() as u32,
            flags,
            vaddr: memory.as_ptr().cast::<u8>() as u64,
            iova,
            size: len,
        };
        // SAFETY: the structure is complete, and the caller keeps the memory mapped in this process until it
        // is unmapped.
        unsafe { sys::call(self.as_fd(), sys::VFIO_IOMMU_MAP_DMA, &mut map) }
            .map(drop)
            .map_err(|errno| Operation::Map { len, iova }.failed(errno))
    }

    /// Unmaps all mappings within the `len` bytes at `iova` (`VFIO_IOMMU_UNMAP_DMA`), and returns the number
    /// of unmapped bytes.
    ///
    /// # Safety
    /// No [`Mapping`] in the range may be used afterwards. To keep it from being dropped, pass it to
    /// [`std::mem::forget`].
    ///
    /// # Errors
    /// `EINVAL` when the container no longer has an IOMMU type.
    pub unsafe fn unmap(&self, iova: u64, len: u64) -> Result<u64> {
        let mut unmap = sys::vfio_iommu_type1_dma_unmap {
            argsz: size_of::<sys::vfio_iommu_type1_dma_unmap>() as u32,
            flags: 0,
            iova,
            size: len,
            data: Default::default(),
        };
        // SAFETY: the structure is complete and asks for no dirty bitmap, so `data` is not used.
        unsafe { sys::call(self.as_fd(), sys::VFIO_IOMMU_UNMAP_DMA, &mut unmap) }
            .map_err(|errno| Operation::Unmap { len, iova }.failed(errno))?;
        Ok(unmap.size)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Converts an integer to the argument of an ioctl that takes an integer instead of an address.
fn integer(number: u32) -> *mut std::ffi::c_void {
    ptr::without_provenance_mut(number as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Group;
    use crate::kernel::{at, mock_kernel};
    use nix::errno::Errno;
    use std::cell::RefCell;
    use std::fs::File;
    use std::rc::Rc;
    use std::sync::atomic::AtomicU8;

    fn container(fd: OwnedFd) -> Arc<Container> {
        // SAFETY: the test answers the ioctls, so the descriptor never reaches a driver.
        Arc::new(unsafe { Container::from_fd_unchecked(fd) })
    }

    struct Page(Box<[AtomicU8; 4096]>);
    // SAFETY: the box owns the bytes, which are atomics.
    unsafe impl Memory for Page {
        fn address(&self) -> NonNull<u8> {
            NonNull::from(&*self.0).cast()
        }
        fn len(&self) -> usize {
            4096
        }
    }

    #[test]
    fn a_container_is_no_other_node() {
        let null = || File::open("/dev/null").unwrap().into();
        assert!(matches!(Container::from_fd(null()), Err(Error::WrongNode { .. })));
        assert!(matches!(Container::open_at("/dev/null".as_ref()), Err(Error::WrongNode { .. })));
    }

    #[test]
    fn a_group_joins_and_memory_is_unmapped_before_it_goes() {
        let log = Rc::<RefCell<Vec<String>>>::default();
        let seen = Rc::clone(&log);
        let fd = mock_kernel(move |name, argument| {
            seen.borrow_mut().push(match name {
                "VFIO_IOMMU_MAP_DMA" => {
                    let map: &mut sys::vfio_iommu_type1_dma_map = at(argument);
                    assert_eq!(map.argsz, 32);
                    format!("map {:#x}+{} {}", map.iova, map.size, map.flags)
                }
                "VFIO_IOMMU_UNMAP_DMA" => {
                    let unmap: &mut sys::vfio_iommu_type1_dma_unmap = at(argument);
                    format!("unmap {:#x}+{}", unmap.iova, unmap.size)
                }
                "VFIO_SET_IOMMU" | "VFIO_CHECK_EXTENSION" => format!("{name} {}", argument.addr()),
                other => other.into(),
            });
            Ok(i32::from(name == "VFIO_CHECK_EXTENSION"))
        });
        let container = container(fd);
        // SAFETY: the test answers the ioctls, so the descriptor never reaches a driver.
        let group = unsafe { Group::from_fd_unchecked(File::open("/dev/null").unwrap(), 3) };
        group.set_container(&container).unwrap();
        assert_eq!(container.has(IommuType::NoIommu), Ok(true));
        container.set_iommu(IommuType::Type1v2).unwrap();
        let memory = Arc::new(Page(Box::new([const { AtomicU8::new(0) }; 4096])));
        let mapping = container.map_range(&memory, 1024..2048, 0x1000, Access::Read).unwrap();
        assert_eq!((mapping.iova(), mapping.len(), Arc::strong_count(&memory)), (0x1000, 1024, 2));
        assert!(container.map_range(&memory, 0..4097, 0, Access::Read).is_err());
        drop(mapping);
        assert_eq!(Arc::strong_count(&memory), 1);
        drop(container.map_range(&memory, 0..4096, 0x2000, Access::ReadWrite).unwrap().unmap().unwrap());
        let wanted = [
            "VFIO_GROUP_SET_CONTAINER",
            "VFIO_CHECK_EXTENSION 8",
            "VFIO_GET_API_VERSION",
            "VFIO_SET_IOMMU 3",
            "map 0x1000+1024 1",
            "unmap 0x1000+1024",
            "map 0x2000+4096 3",
            "unmap 0x2000+4096",
        ];
        assert_eq!(*log.borrow(), wanted);
    }

    #[test]
    fn another_version_of_the_api_is_refused() {
        let container = container(mock_kernel(|name, _| {
            assert_eq!(name, "VFIO_GET_API_VERSION");
            Ok(1)
        }));
        let error = container.set_iommu(IommuType::Type1v2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot set the container's IOMMU type: the kernel has VFIO API version 1, not 0"
        );
    }

    #[test]
    fn ranges_that_the_kernel_does_not_report_are_an_error() {
        let container = container(mock_kernel(|_, _| Ok(0)));
        let error = container.iova_ranges().unwrap_err();
        assert!(matches!(error, Error::NotReported { .. }), "{error}");
    }

    #[test]
    fn what_could_not_be_unmapped_keeps_its_memory() {
        struct Owner<'a>(&'a std::cell::Cell<u32>);
        impl Drop for Owner<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let container = container(mock_kernel(|_, _| Err(Errno::EINVAL)));
        let dropped = std::cell::Cell::new(0);
        drop(Mapping::new(&container, 0, 4096, Owner(&dropped)));
        assert!(Mapping::new(&container, 0, 4096, Owner(&dropped)).unmap().is_err());
        assert_eq!(dropped.get(), 0);
    }

    #[test]
    fn a_wrong_number_of_unmapped_bytes_is_the_kernels_error() {
        let container = container(mock_kernel(|_, argument| {
            at::<sys::vfio_iommu_type1_dma_unmap>(argument).size = 1024;
            Ok(0)
        }));
        let error = Mapping::new(&container, 0, 4096, ()).unmap().unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}");
    }
}
