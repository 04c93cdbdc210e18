//! VFIO character devices, which are bound to an iommufd.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use vireo_iommufd::{DeviceId, Iommufd};

use crate::error::{Error, Operation, Result};
use crate::{Device, device_node, sys};

/// A device opened through its own node (`/dev/vfio/devices/vfioN`, or `noiommu-vfioN` without an IOMMU)
/// instead of its group. The device is not accessible before [`bind`](Self::bind).
#[derive(Debug)]
pub struct Cdev {
    fd: OwnedFd,
    name: String,
}

impl Cdev {
    /// Opens the node at `path` of the device with this `name` on its bus.
    ///
    /// # Errors
    /// [`Error::Open`]: `EBUSY` or `EINVAL` when the device's group is open. [`Error::WrongNode`] when sysfs
    /// does not identify the node as that of a VFIO device.
    pub fn open(path: &Path, name: &str) -> Result<Self> {
        Self::from_fd(device_node::open(path)?, name)
    }

    /// Takes ownership of an open descriptor of the device with this `name` on its bus.
    ///
    /// # Errors
    /// [`Error::WrongNode`] when sysfs does not identify the descriptor as that of a VFIO device.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Self> {
        device_node::name_of(&fd, "VFIO device", |class, _| class == "vfio-dev")?;
        Ok(Self { fd, name: name.to_owned() })
    }

    /// Takes ownership of a descriptor without the sysfs check of [`Cdev::from_fd`].
    ///
    /// # Safety
    /// `fd` must refer to a VFIO device node. Another driver may respond to these ioctls by writing arbitrary
    /// data to arbitrary addresses.
    pub unsafe fn from_fd_unchecked(fd: OwnedFd, name: &str) -> Self {
        Self { fd, name: name.to_owned() }
    }

    /// Binds the device to `iommufd` until the device's descriptor is closed. `token` is the VF token, most
    /// significant byte first. Kernels before 6.17 accept no token here. In this case the device is bound
    /// without the token, because it may not need one.
    ///
    /// # Errors
    /// `EINVAL` when the device is already bound or its IOMMU is not cache-coherent; `EPERM` when its group
    /// is in use or the platform does not isolate interrupts; `EACCES` when the device needs a different
    /// token; [`Error::TokenUnsupported`] when the device needs a token and the kernel accepts none.
    pub fn bind(&self, iommufd: &Iommufd, token: Option<&[u8; 16]>) -> Result<DeviceId> {
        let operation = Operation::Bind(self.name.clone());
        match (self.bind_with(iommufd, token), token) {
            (Err(Errno::EINVAL), Some(_)) => match self.bind_with(iommufd, None) {
                Err(Errno::EACCES) => Err(Error::TokenUnsupported { operation }),
                result => result.map_err(|errno| operation.failed(errno)),
            },
            (result, _) => result.map_err(|errno| operation.failed(errno)),
        }
    }

    fn bind_with(&self, iommufd: &Iommufd, token: Option<&[u8; 16]>) -> nix::Result<DeviceId> {
        let mut bind = sys::vfio_device_bind_iommufd {
            argsz: size_of::<sys::vfio_device_bind_iommufd>() as u32,
            flags: if token.is_some() { sys::VFIO_DEVICE_BIND_FLAG_TOKEN } else { 0 },
            iommufd: iommufd.as_fd().as_raw_fd(),
            out_devid: 0,
            token_uuid_ptr: token.map_or(0, |token| token.as_ptr() as u64),
        };
        // SAFETY: the structure is complete; the token's 16 bytes are borrowed until after the call.
        unsafe { sys::call(self.as_fd(), sys::VFIO_DEVICE_BIND_IOMMUFD, &mut bind) }?;
        Ok(DeviceId(bind.out_devid))
    }

    /// Attaches the bound device to the address space or hardware page table with id `table`, and returns the
    /// id of the hardware page table that the device now uses. A second call replaces the first.
    ///
    /// # Errors
    /// `EINVAL` when the device's IOMMU cannot use the table, `EADDRINUSE` when an existing mapping is out of
    /// the device's reach, `ENOMEM` when pages that were not pinned so far cannot be pinned.
    pub fn attach(&self, table: u32) -> Result<u32> {
        let mut attach = sys::vfio_device_attach_iommufd_pt {
            argsz: size_of::<sys::vfio_device_attach_iommufd_pt>() as u32,
            flags: 0,
            pt_id: table,
            pasid: 0,
        };
        // SAFETY: the structure is complete and has no addresses.
        unsafe { sys::call(self.as_fd(), sys::VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }
            .map_err(|errno| Operation::Attach(self.name.clone()).failed(errno))?;
        Ok(attach.pt_id)
    }

    /// Detaches the device, which can then access no memory.
    ///
    /// # Errors
    /// When the device is not bound.
    pub fn detach(&self) -> Result<()> {
        let mut detach = sys::vfio_device_detach_iommufd_pt {
            argsz: size_of::<sys::vfio_device_detach_iommufd_pt>() as u32,
            flags: 0,
            pasid: 0,
        };
        // SAFETY: the structure is complete and has no addresses.
        unsafe { sys::call(self.as_fd(), sys::VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut detach) }
            .map(drop)
            .map_err(|errno| Operation::Detach(self.name.clone()).failed(errno))
    }

    /// Converts the bound device into a [`Device`]. `keep` is what the device needs while it is open, such as
    /// the address space it is attached to.
    ///
    /// # Errors
    /// `EINVAL` when the device is not bound.
    pub fn into_device<K>(self, keep: K) -> Result<Device<K>> {
        // SAFETY: the descriptor is that of a VFIO device node. Until the device is bound, the kernel refuses
        // all device operations.
        unsafe { Device::new(self.name, self.fd, keep) }
    }

    /// Returns the descriptor. Once the device is bound, it is the descriptor of a VFIO device.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for Cdev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{at, mock_kernel};
    use std::fs::File;

    fn cdev(fd: OwnedFd) -> Cdev {
        // SAFETY: the test answers the ioctls, so the descriptor never reaches a driver.
        unsafe { Cdev::from_fd_unchecked(fd, "0000:00:04.0") }
    }

    /// Returns an iommufd on which no ioctl succeeds. The tests in this module issue none.
    fn iommufd() -> Iommufd {
        let null = File::open("/dev/null").unwrap();
        // SAFETY: the null device has no ioctls.
        unsafe { Iommufd::from_fd_unchecked(null.into()) }
    }

    #[test]
    fn a_kernel_that_takes_no_token_is_asked_without() {
        const TOKEN: [u8; 16] = [7; 16];
        // `with` and `without` are the kernel's results for a bind with a token and without one.
        let kernel = |token: Option<&[u8; 16]>, with, without| {
            let cdev = cdev(mock_kernel(move |name, argument| {
                let bind: &mut sys::vfio_device_bind_iommufd = at(argument);
                assert_eq!((name, bind.argsz), ("VFIO_DEVICE_BIND_IOMMUFD", 24));
                bind.out_devid = 5;
                if bind.flags == 0 {
                    return without;
                }
                // SAFETY: the flag states that there is a token.
                assert_eq!(unsafe { *(bind.token_uuid_ptr as *const [u8; 16]) }, TOKEN);
                with
            }));
            cdev.bind(&iommufd(), token)
        };
        let kernel_for = |with, without| kernel(Some(&TOKEN), with, without);
        let operation = || Operation::Bind("0000:00:04.0".into());
        let failed = |errno| Err(operation().failed(errno));
        assert_eq!(kernel_for(Ok(0), Err(Errno::EACCES)), Ok(DeviceId(5)));
        assert_eq!(kernel_for(Err(Errno::EINVAL), Ok(0)), Ok(DeviceId(5)));
        assert_eq!(
            kernel_for(Err(Errno::EINVAL), Err(Errno::EACCES)),
            Err(Error::TokenUnsupported { operation: operation() })
        );
        assert_eq!(kernel_for(Err(Errno::EINVAL), Err(Errno::EBUSY)), failed(Errno::EBUSY));
        assert_eq!(kernel_for(Err(Errno::EACCES), Ok(0)), failed(Errno::EACCES));
        assert_eq!(kernel(None, Ok(0), Err(Errno::EINVAL)), failed(Errno::EINVAL));
    }

    #[test]
    fn a_device_is_attached_and_detached() {
        let cdev = cdev(mock_kernel(|name, argument| {
            if name == "VFIO_DEVICE_ATTACH_IOMMUFD_PT" {
                let attach: &mut sys::vfio_device_attach_iommufd_pt = at(argument);
                assert_eq!((attach.flags, attach.pt_id), (0, 9));
                attach.pt_id = 10;
                return Ok(0);
            }
            let detach: &mut sys::vfio_device_detach_iommufd_pt = at(argument);
            assert_eq!((name, detach.flags), ("VFIO_DEVICE_DETACH_IOMMUFD_PT", 0));
            Err(Errno::EINVAL)
        }));
        assert_eq!(cdev.attach(9), Ok(10));
        let error = cdev.detach().unwrap_err();
        assert_eq!(error.what(), "cannot detach 0000:00:04.0 from its address space");
        assert!(matches!(Cdev::open("/dev/null".as_ref(), "x"), Err(Error::WrongNode { .. })));
    }
}
