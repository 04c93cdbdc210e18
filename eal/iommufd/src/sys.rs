//! Arguments of the ioctls of `/dev/iommu` (`include/uapi/linux/iommufd.h`), and the only function that
//! issues these ioctls.

use std::os::fd::{AsRawFd, BorrowedFd};

pub(crate) use iommufd_bindings::*;
use nix::errno::Errno;
use nix::libc;
use nix::sys::ioctl::ioctl_num_type;

use crate::observe::observed;

/// Argument of an ioctl.
///
/// # Safety
/// The structure is the argument of ioctl `NUMBER`. It has no padding, and its first field is its size, a `u32`.
pub(crate) unsafe trait Argument {
    /// Name of the ioctl in the header.
    const NAME: &'static str;
    /// Command number, without the ioctl type.
    const NUMBER: u8;
}

macro_rules! arguments {
    ($($name:ident = $number:literal: $structure:ident ($size:literal),)*) => {
        $(
            // SAFETY: name, number and structure are those of the header. The bindings and the line below
            // assert the layout, whose fields add up without padding.
            unsafe impl Argument for $structure {
                const NAME: &'static str = stringify!($name);
                const NUMBER: u8 = $number;
            }

            const _: () = assert!(size_of::<$structure>() == $size && std::mem::offset_of!($structure, size) == 0);
        )*

        /// Name and request code of every ioctl, as used by the calls.
        #[cfg(test)]
        pub(crate) const REQUESTS: &[(&str, ioctl_num_type)] =
            &[$((<$structure as Argument>::NAME, request::<$structure>()),)*];
    };
}

arguments! {
    IOMMU_DESTROY = 0x80: iommu_destroy (8),
    IOMMU_IOAS_ALLOC = 0x81: iommu_ioas_alloc (12),
    IOMMU_IOAS_ALLOW_IOVAS = 0x82: iommu_ioas_allow_iovas (24),
    IOMMU_IOAS_COPY = 0x83: iommu_ioas_copy (40),
    IOMMU_IOAS_IOVA_RANGES = 0x84: iommu_ioas_iova_ranges (32),
    IOMMU_IOAS_MAP = 0x85: iommu_ioas_map (40),
    IOMMU_IOAS_UNMAP = 0x86: iommu_ioas_unmap (24),
    IOMMU_OPTION = 0x87: iommu_option (24),
    IOMMU_VFIO_IOAS = 0x88: iommu_vfio_ioas (12),
    IOMMU_HWPT_ALLOC = 0x89: iommu_hwpt_alloc (48),
    IOMMU_GET_HW_INFO = 0x8a: iommu_hw_info (40),
    IOMMU_HWPT_SET_DIRTY_TRACKING = 0x8b: iommu_hwpt_set_dirty_tracking (16),
    IOMMU_HWPT_GET_DIRTY_BITMAP = 0x8c: iommu_hwpt_get_dirty_bitmap (48),
    IOMMU_HWPT_INVALIDATE = 0x8d: iommu_hwpt_invalidate (32),
    IOMMU_FAULT_QUEUE_ALLOC = 0x8e: iommu_fault_alloc (16),
    IOMMU_IOAS_MAP_FILE = 0x8f: iommu_ioas_map_file (40),
    IOMMU_VIOMMU_ALLOC = 0x90: iommu_viommu_alloc (40),
    IOMMU_VDEVICE_ALLOC = 0x91: iommu_vdevice_alloc (24),
    IOMMU_IOAS_CHANGE_PROCESS = 0x92: iommu_ioas_change_process (8),
    IOMMU_VEVENTQ_ALLOC = 0x93: iommu_veventq_alloc (32),
    IOMMU_HW_QUEUE_ALLOC = 0x94: iommu_hw_queue_alloc (40),
    IOMMU_IOAS_NOIOMMU_GET_PA = 0x95: iommu_ioas_noiommu_get_pa (40),
}

/// `struct iommu_ioas_noiommu_get_pa` (Linux 7.3), which `iommufd-bindings` 0.2 lacks.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct iommu_ioas_noiommu_get_pa {
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) ioas_id: u32,
    pub(crate) __reserved: u32,
    pub(crate) iova: u64,
    pub(crate) length: u64,
    pub(crate) out_phys: u64,
}

const fn request<A: Argument>() -> ioctl_num_type {
    nix::request_code_none!(IOMMUFD_TYPE, A::NUMBER) as ioctl_num_type
}

/// Issues the ioctl whose argument is `argument`, after filling in the argument's size.
///
/// # Safety
/// `fd` must be an iommufd. Each address in `argument` must refer to memory that the kernel may read or write
/// as this ioctl does.
pub(crate) unsafe fn call<A: Argument>(fd: BorrowedFd<'_>, argument: &mut A) -> nix::Result<()> {
    let pointer = std::ptr::from_mut(argument);
    // SAFETY: the first field is a `u32`, by the trait's contract.
    unsafe { *pointer.cast::<u32>() = size_of::<A>() as u32 };
    observed(A::NAME, || {
        #[cfg(test)]
        if let Some(answer) = crate::kernel::answer(pointer) {
            return answer;
        }
        // SAFETY: the kernel reads and writes `size` bytes at `pointer`. The caller guarantees the addresses in them.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request::<A>(), pointer) }).map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests are numbered as in `include/uapi/linux/iommufd.h`, starting with `_IO(';', 0x80)`.
    #[test]
    fn requests_are_numbered_as_in_the_header() {
        for (index, (name, request)) in REQUESTS.iter().enumerate() {
            assert_eq!(*request, 0x3b80 + index as ioctl_num_type, "{name}");
        }
        assert_eq!(REQUESTS.len(), 22);
        assert_eq!(REQUESTS[9].0, "IOMMU_HWPT_ALLOC");
        assert_eq!(u32::from(<iommu_hw_queue_alloc as Argument>::NUMBER), IOMMUFD_CMD_HW_QUEUE_ALLOC);
    }
}
