//! A device's descriptors as a value: opened by this process, or received from a launcher that may open what
//! this process may not.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Iommufd;
use crate::rights;

/// Descriptors of one device.
#[derive(Debug)]
pub enum DeviceFds {
    /// Descriptors in modes `cdev` and `noiommu-cdev`.
    Cdev(CdevFds),
    /// Descriptors in modes `container`, `compat` and `noiommu`.
    Group(GroupFds),
}

/// Character device, and the iommufd that it will be bound to. Before the bind it gives access to nothing.
#[derive(Debug)]
pub struct CdevFds {
    /// `/dev/iommu`.
    pub(super) iommufd: Iommufd,
    /// `/dev/vfio/devices/vfioN`.
    pub(super) device: OwnedFd,
}

/// IOMMU group, and the container that it will join.
#[derive(Debug)]
pub struct GroupFds {
    /// `/dev/vfio/vfio`, or `/dev/iommu` in mode `compat`.
    pub(super) container: OwnedFd,
    /// `/dev/vfio/N` or `/dev/vfio/noiommu-N`, which can be opened only once: devices of one group share it.
    pub(super) group: Arc<File>,
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
    /// If the socket is closed or full.
    pub fn send(&self, socket: &UnixStream) -> Result<()> {
        let (kind, first, second) = match self {
            Self::Cdev(CdevFds { iommufd, device }) => (CDEV, iommufd.as_fd(), device.as_fd()),
            Self::Group(GroupFds { container, group }) => (GROUP, container.as_fd(), group.as_fd()),
        };
        rights::send(socket, &[kind], &[first, second])
            .map(drop)
            .map_err(|errno| Error::os("cannot send the device's descriptors", errno))
    }

    /// Receives descriptors that [`DeviceFds::send`] passed.
    ///
    /// # Errors
    /// `Protocol` if the message is not one of Vireo's, `Permission` if its `/dev/iommu` is something else.
    /// All descriptors in a refused message are closed.
    pub fn receive(socket: &UnixStream) -> Result<Self> {
        let what = "cannot receive the device's descriptors";
        let mut kind = [0];
        let (len, fds) = rights::receive(socket, &mut kind, what)?;
        let pair: std::result::Result<[OwnedFd; 2], _> = fds.try_into();
        match (Some(kind[0]).filter(|_| len == 1), pair) {
            (Some(CDEV), Ok([iommufd, device])) => {
                Ok(CdevFds { iommufd: Iommufd::from_fd(iommufd)?, device }.into())
            }
            (Some(GROUP), Ok([container, group])) => {
                Ok(GroupFds { container, group: Arc::new(group.into()) }.into())
            }
            _ => Err(Error::new(ErrorKind::Protocol, what, "the message is not from Vireo")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rights::MAX_FDS;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn descriptors_arrive_in_their_places() {
        let (here, there) = UnixStream::pair().unwrap();
        let (container, group) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let inodes = [&container, &group].map(|file| file.metadata().unwrap().ino());
        DeviceFds::from(GroupFds { container: container.into(), group: Arc::new(group) })
            .send(&here)
            .unwrap();
        let Ok(DeviceFds::Group(GroupFds { container, group })) = DeviceFds::receive(&there) else {
            panic!("no group")
        };
        assert_eq!([&File::from(container), &*group].map(|file| file.metadata().unwrap().ino()), inodes);
    }

    /// Surplus descriptors are closed too. Otherwise a hostile sender could use up all that this process may
    /// have open.
    #[test]
    fn descriptors_of_a_refused_message_are_closed() {
        let (here, there) = UnixStream::pair().unwrap();
        for count in [1, 3, MAX_FDS] {
            let (mut reader, writer) = UnixStream::pair().unwrap();
            rights::send(&here, b"c", &vec![writer.as_fd(); count]).unwrap();
            assert_eq!(DeviceFds::receive(&there).unwrap_err().kind(), ErrorKind::Protocol, "{count}");
            drop(writer);
            reader.set_nonblocking(true).unwrap();
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "{count}");
        }
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
