//! IOMMU groups.

use std::ffi::CString;
use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use crate::device_node::{self, NOIOMMU_PREFIX};
use crate::error::{Error, Operation, Result};
use crate::{Container, Device, sys};

/// State of a [`Group`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupStatus {
    /// Whether no kernel driver other than a VFIO driver uses a device of the group.
    pub is_viable: bool,
    /// Whether the group is in a container.
    pub has_container: bool,
}

/// An IOMMU group, opened through its node (`/dev/vfio/N`, or `/dev/vfio/noiommu-N` for a device without an
/// IOMMU). The node can be opened only once at a time. While a device of the group is open, the group stays
/// in its container.
#[derive(Debug)]
pub struct Group<F = OwnedFd> {
    fd: F,
    number: u32,
}

impl Group {
    /// Opens the group's node at `path`.
    ///
    /// # Errors
    /// [`Error::Open`]: `EBUSY` when the group is already open, or one of its devices is open as a character
    /// device. [`Error::WrongNode`] when sysfs does not identify the node as that of a group.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_fd(device_node::open(path)?)
    }
}

impl<F: AsFd> Group<F> {
    /// Wraps an open descriptor of a group.
    ///
    /// # Errors
    /// [`Error::WrongNode`] when sysfs does not identify the descriptor as that of a group.
    pub fn from_fd(fd: F) -> Result<Self> {
        let wanted = "VFIO group";
        let name = device_node::name_of(&fd, wanted, |class, _| class == "vfio")?;
        let number = name.strip_prefix(NOIOMMU_PREFIX).unwrap_or(&name).parse();
        let number = number.map_err(|_| Error::WrongNode { fd: fd.as_fd().as_raw_fd(), wanted })?;
        Ok(Self { fd, number })
    }

    /// Wraps a descriptor without the sysfs check of [`Group::from_fd`].
    ///
    /// # Safety
    /// `fd` must refer to a group's node. Another driver may respond to these ioctls by writing arbitrary
    /// data to arbitrary addresses.
    pub unsafe fn from_fd_unchecked(fd: F, number: u32) -> Self {
        Self { fd, number }
    }

    /// Returns the number of the group, which is also in the name of its node.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Reads the state of the group (`VFIO_GROUP_GET_STATUS`).
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn status(&self) -> Result<GroupStatus> {
        let argsz = size_of::<sys::vfio_group_status>() as u32;
        let mut status = sys::vfio_group_status { argsz, flags: 0 };
        // SAFETY: the structure is complete and has no addresses.
        unsafe { sys::call(self.as_fd(), sys::VFIO_GROUP_GET_STATUS, &mut status) }
            .map_err(|errno| Operation::GroupStatus(self.number).failed(errno))?;
        Ok(GroupStatus {
            is_viable: status.flags & sys::VFIO_GROUP_FLAGS_VIABLE != 0,
            has_container: status.flags & sys::VFIO_GROUP_FLAGS_CONTAINER_SET != 0,
        })
    }

    /// Adds the group to `container`.
    ///
    /// # Errors
    /// `EINVAL` when the group is already in a container; `EPERM` when it has no IOMMU and the process has no
    /// `CAP_SYS_RAWIO`.
    pub fn set_container(&self, container: &Container) -> Result<()> {
        let mut fd = container.as_fd().as_raw_fd();
        // SAFETY: the argument is a descriptor that stays open during the call.
        unsafe { sys::call(self.as_fd(), sys::VFIO_GROUP_SET_CONTAINER, &mut fd) }
            .map(drop)
            .map_err(|errno| Operation::SetContainer(self.number).failed(errno))
    }

    /// Removes the group from its container. When the last group leaves a container, the container loses its mappings.
    ///
    /// # Errors
    /// `EBUSY` while a device of the group is open.
    pub fn unset_container(&self) -> Result<()> {
        // SAFETY: this ioctl has no argument.
        unsafe { sys::ioctl(self.as_fd(), sys::VFIO_GROUP_UNSET_CONTAINER, std::ptr::null_mut()) }
            .map(drop)
            .map_err(|errno| Operation::UnsetContainer(self.number).failed(errno))
    }

    /// Opens the device with this `name` on its bus, such as `0000:00:04.0`. The container's IOMMU type must
    /// already be set. `token` is the VF token, most significant byte first. Devices that use SR-IOV need a
    /// token, and other devices must not get one. `keep` is what the device needs while it is open, such as
    /// its container.
    ///
    /// # Errors
    /// `EACCES` when the device needs a different token, `EBUSY` when the device is already open.
    pub fn device<K>(&self, name: &str, token: Option<&[u8; 16]>, keep: K) -> Result<Device<K>> {
        let fd = self.device_fd(name, token)?;
        // SAFETY: the descriptor is of a device of this group.
        unsafe { Device::new(name.to_owned(), fd, keep) }
    }

    /// Opens a device like [`Group::device`], but returns only its descriptor.
    ///
    /// # Errors
    /// As for [`Group::device`].
    pub fn device_fd(&self, name: &str, token: Option<&[u8; 16]>) -> Result<OwnedFd> {
        let operation = || Operation::OpenDevice(name.to_owned());
        let mut argument = name.to_owned();
        if let Some(token) = token {
            argument += " vf_token=";
            for (index, byte) in token.iter().enumerate() {
                let hyphen = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
                // Writing to a string cannot fail.
                let _ = write!(argument, "{hyphen}{byte:02x}");
            }
        }
        let argument = CString::new(argument)
            .map_err(|_| Error::Argument { operation: operation(), why: "the name contains a NUL byte" })?;
        let pointer = argument.as_ptr().cast_mut().cast();
        // SAFETY: the kernel reads a NUL-terminated string, which lives until after the call.
        let fd = unsafe { sys::ioctl(self.as_fd(), sys::VFIO_GROUP_GET_DEVICE_FD, pointer) }
            .map_err(|errno| operation().failed(errno))?;
        // SAFETY: the kernel has just installed this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl<F: AsFd> AsFd for Group<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{at, mock_kernel};
    use std::ffi::CStr;
    use std::fs::File;
    use std::os::fd::IntoRawFd;

    #[test]
    fn a_group_is_no_other_node() {
        assert!(matches!(Group::open("/dev/null".as_ref()), Err(Error::WrongNode { .. })));
        let error = Group::open("/dev/null/7".as_ref()).unwrap_err();
        assert!(matches!(error, Error::Open { .. }), "{error}");
    }

    #[test]
    fn the_state_is_that_of_the_flags_and_a_device_is_asked_for_with_its_token() {
        let mut asked = 0;
        let fd = mock_kernel(move |name, argument| match name {
            "VFIO_GROUP_GET_STATUS" => {
                let status: &mut sys::vfio_group_status = at(argument);
                assert_eq!(status.argsz, 8);
                (asked, status.flags) = (asked + 1, [1, 3][asked]);
                Ok(0)
            }
            "VFIO_GROUP_GET_DEVICE_FD" => {
                // SAFETY: the argument is a NUL-terminated string.
                let name = unsafe { CStr::from_ptr(argument.cast()) }.to_str().unwrap();
                match name.split_once(' ') {
                    None => Err(nix::errno::Errno::EACCES),
                    Some(("0000:00:04.0", "vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3")) => {
                        Ok(File::open("/dev/null").unwrap().into_raw_fd())
                    }
                    other => panic!("{other:?}"),
                }
            }
            "VFIO_DEVICE_GET_INFO" => Ok(0),
            "VFIO_GROUP_UNSET_CONTAINER" => Err(nix::errno::Errno::EBUSY),
            other => panic!("{other}"),
        });
        // SAFETY: the test answers the ioctls, so the descriptor never reaches a driver.
        let group = unsafe { Group::from_fd_unchecked(fd, 7) };
        assert_eq!(group.number(), 7);
        assert_eq!(group.status(), Ok(GroupStatus { is_viable: true, has_container: false }));
        assert_eq!(group.status(), Ok(GroupStatus { is_viable: true, has_container: true }));
        let token = 0xbd8d_9d2b_5a5f_4f5a_a211_f591_514b_a1f3_u128.to_be_bytes();
        let device = group.device("0000:00:04.0", Some(&token), 5).unwrap();
        assert_eq!((device.name(), device.kept(), device.is_pci()), ("0000:00:04.0", &5, false));
        let error = group.device("0000:00:04.0", None, ()).unwrap_err();
        assert_eq!(error.what(), "cannot open 0000:00:04.0 through its group");
        assert!(matches!(group.device_fd("a\0b", None), Err(Error::Argument { .. })));
        assert_eq!(
            group.unset_container().unwrap_err().what(),
            "cannot remove IOMMU group 7 from its container"
        );
    }
}
