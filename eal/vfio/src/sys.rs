//! VFIO ioctls (`include/uapi/linux/vfio.h`), and the only functions that issue them.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::ioctl::ioctl_num_type;
pub(crate) use vfio_bindings::bindings::vfio::*;
use vireo_iommufd::observed;

/// An ioctl: its name in the header and its number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) name: &'static str,
    number: u8,
}

macro_rules! requests {
    ($($name:ident = $number:literal,)*) => {
        $(pub(crate) const $name: Request = Request { name: stringify!($name), number: $number };)*
    };
}

requests! {
    VFIO_GET_API_VERSION = 0x64,
    VFIO_CHECK_EXTENSION = 0x65,
    VFIO_SET_IOMMU = 0x66,
    VFIO_GROUP_GET_STATUS = 0x67,
    VFIO_GROUP_SET_CONTAINER = 0x68,
    VFIO_GROUP_UNSET_CONTAINER = 0x69,
    VFIO_GROUP_GET_DEVICE_FD = 0x6a,
    VFIO_DEVICE_GET_INFO = 0x6b,
    VFIO_DEVICE_GET_REGION_INFO = 0x6c,
    VFIO_DEVICE_GET_IRQ_INFO = 0x6d,
    VFIO_DEVICE_SET_IRQS = 0x6e,
    VFIO_DEVICE_RESET = 0x6f,
    VFIO_IOMMU_GET_INFO = 0x70,
    VFIO_IOMMU_MAP_DMA = 0x71,
    VFIO_IOMMU_UNMAP_DMA = 0x72,
    VFIO_DEVICE_BIND_IOMMUFD = 0x76,
    VFIO_DEVICE_ATTACH_IOMMUFD_PT = 0x77,
    VFIO_DEVICE_DETACH_IOMMUFD_PT = 0x78,
}

/// Issues an ioctl whose argument is an address or an integer.
///
/// # Safety
/// `fd` must refer to a VFIO node. `argument` must be what `request` takes, and each address in it must refer
/// to memory that the kernel may read or write as this ioctl does.
pub(crate) unsafe fn ioctl(
    fd: BorrowedFd<'_>,
    request: Request,
    argument: *mut c_void,
) -> nix::Result<c_int> {
    observed(request.name, || {
        #[cfg(test)]
        if let Some(answer) = crate::kernel::answer(request.name, argument) {
            return answer;
        }
        let code = nix::request_code_none!(b';', request.number) as ioctl_num_type;
        // SAFETY: the caller guarantees the argument.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), code, argument) })
    })
}

/// Issues an ioctl whose argument is a structure.
///
/// # Safety
/// As for [`ioctl`]; `argument` must be the structure that `request` takes, with its size filled in.
pub(crate) unsafe fn call<T>(fd: BorrowedFd<'_>, request: Request, argument: &mut T) -> nix::Result<c_int> {
    // SAFETY: the caller guarantees the structure, which lives until after the call.
    unsafe { ioctl(fd, request, std::ptr::from_mut(argument).cast()) }
}
