//! A device's descriptors as a value: opened here, or received from a launcher that may open what this
//! process may not.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Iommufd;

/// The descriptors behind one device.
#[derive(Debug)]
pub enum DeviceFds {
    /// Of modes `cdev` and `noiommu-cdev`.
    Cdev(CdevFds),
    /// Of modes `container`, `compat` and `noiommu`.
    Group(GroupFds),
}

/// A character device and the iommufd that it will be bound to. Before that it gives access to nothing.
#[derive(Debug)]
pub struct CdevFds {
    /// `/dev/iommu`.
    pub(super) iommufd: Iommufd,
    /// `/dev/vfio/devices/vfioN`.
    pub(super) device: OwnedFd,
}

/// A group and the container that it will join.
#[derive(Debug)]
pub struct GroupFds {
    /// `/dev/vfio/vfio`, or `/dev/iommu` in mode `compat`.
    pub(super) container: OwnedFd,
    /// `/dev/vfio/N` or `/dev/vfio/noiommu-N`.
    pub(super) group: OwnedFd,
}

impl From<CdevFds> for DeviceFds {
    fn from(fds: CdevFds) -> Self {
        Self::Cdev(fds)
    }
}

impl From<GroupFds> for DeviceFds {
    fn from(fds: GroupFds) -> Self {
        Self::Group(fds)
    }
}

const CDEV: u8 = b'c';
const GROUP: u8 = b'g';

impl DeviceFds {
    /// Passes the descriptors to the process at the other end of `socket` (`SCM_RIGHTS`).
    ///
    /// # Errors
    /// When the socket is closed or full.
    pub fn send(&self, socket: &UnixStream) -> Result<()> {
        let (kind, first, second) = match self {
            Self::Cdev(CdevFds { iommufd, device }) => (CDEV, iommufd.as_fd(), device.as_fd()),
            Self::Group(GroupFds { container, group }) => (GROUP, container.as_fd(), group.as_fd()),
        };
        let fds = [first.as_raw_fd(), second.as_raw_fd()];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&[kind])],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map(drop)
        .map_err(|errno| Error::os("cannot pass the device's descriptors on", errno))
    }

    /// Takes descriptors that [`DeviceFds::send`] passed.
    ///
    /// # Errors
    /// `Protocol` when the message is not one of ours; whatever descriptors it carried are closed.
    pub fn receive(socket: &UnixStream) -> Result<Self> {
        let what = "cannot receive the device's descriptors";
        let mut kind = [0];
        let mut space = nix::cmsg_space!([i32; 2]);
        let mut parts = [IoSliceMut::new(&mut kind)];
        let message =
            recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                .map_err(|errno| Error::os(what, errno))?;
        let bytes = message.bytes;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for control in message.cmsgs().map_err(|errno: Errno| Error::os(what, errno))? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel has just installed these descriptors for us, nobody else owns them.
                fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let pair: std::result::Result<[OwnedFd; 2], _> = fds.try_into();
        match (bytes, kind[0], pair) {
            (1, CDEV, Ok([iommufd, device])) => {
                Ok(CdevFds { iommufd: Iommufd::from_fd(iommufd), device }.into())
            }
            (1, GROUP, Ok([container, group])) => Ok(GroupFds { container, group }.into()),
            _ => Err(Error::new(ErrorKind::Protocol, what, "the message is not one of Vireo's")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn descriptors_arrive_in_their_places() {
        let (here, there) = UnixStream::pair().unwrap();
        let (container, group) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let inodes = [&container, &group].map(|file| file.metadata().unwrap().ino());
        DeviceFds::from(GroupFds { container: container.into(), group: group.into() }).send(&here).unwrap();
        let Ok(DeviceFds::Group(GroupFds { container, group })) = DeviceFds::receive(&there) else {
            panic!("no group")
        };
        assert_eq!([container, group].map(|fd| File::from(fd).metadata().unwrap().ino()), inodes);
    }

    #[test]
    fn other_messages_are_refused() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(b"c").unwrap();
        assert_eq!(DeviceFds::receive(&there).unwrap_err().kind(), ErrorKind::Protocol);
        drop(here);
        assert!(DeviceFds::receive(&there).is_err());
    }
}
