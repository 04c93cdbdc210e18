//! A device's descriptors as a value: opened by this process, or received from a launcher that may open what
//! this process may not.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};

use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Iommufd;
use crate::rlimit;

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
        let fds = [first.as_raw_fd(), second.as_raw_fd()];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&[kind])],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
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
        let (kind, fds) = receive(socket, what)?;
        let pair: std::result::Result<[OwnedFd; 2], _> = fds.try_into();
        match (kind, pair) {
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

/// Maximum number of descriptors in one message (`SCM_MAX_FD` of the kernel).
pub(super) const MAX_FDS: usize = 253;

/// Receives a message of one byte, and all descriptors that came with it. The byte is `None` if the other end
/// is closed.
///
/// All descriptors that the kernel has installed are owned before any message is refused. nix returns none if
/// some were not installed (`MSG_CTRUNC`), so they are read from its buffer.
pub(super) fn receive(socket: &UnixStream, what: &str) -> Result<(Option<u8>, Vec<OwnedFd>)> {
    let mut byte = [0];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|errno| Error::os(what, errno))?;
    let (bytes, flags) = (message.bytes, message.flags);
    // SAFETY: the kernel has just installed these descriptors in this process, and nothing else owns them.
    let fds = rights(&control).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(Error::new(ErrorKind::Os, what, "the kernel could not install all of them")
            .with_hint(rlimit::more_files(MAX_FDS as u64)));
    }
    Ok(((bytes == 1).then_some(byte[0]), fds))
}

/// Returns the descriptors in `control`, which is zero where the kernel has written nothing. The kernel
/// writes no other message: all others must be requested by socket options.
fn rights(control: &[u8]) -> impl Iterator<Item = RawFd> {
    // The header contains the length of the message including the header, then level and type (cmsg(3)).
    let (header, data) = control.split_at(size_of::<libc::cmsghdr>());
    let len = header.first_chunk().map_or(0, |len| usize::from_ne_bytes(*len));
    let kind = [libc::SOL_SOCKET, libc::SCM_RIGHTS].map(i32::to_ne_bytes);
    let len = if header.ends_with(kind.as_flattened()) { len.saturating_sub(header.len()) } else { 0 };
    data[..len.min(data.len())].as_chunks().0.iter().map(|fd| RawFd::from_ne_bytes(*fd))
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let fds = vec![writer.as_raw_fd(); count];
            let control = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(here.as_raw_fd(), &[IoSlice::new(b"c")], &control, MsgFlags::empty(), None)
                .unwrap();
            assert_eq!(DeviceFds::receive(&there).unwrap_err().kind(), ErrorKind::Protocol, "{count}");
            drop(writer);
            reader.set_nonblocking(true).unwrap();
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "{count}");
        }
    }

    /// If a message is truncated, the descriptors that are present are read.
    #[test]
    fn descriptors_are_read_up_to_the_length() {
        let message = |len: usize, kind: i32, fds: &[i32]| {
            let words = [libc::SOL_SOCKET, kind].into_iter().chain(fds.iter().copied());
            [&len.to_ne_bytes()[..], &words.flat_map(i32::to_ne_bytes).collect::<Vec<_>>()].concat()
        };
        let read = |message: &[u8]| rights(message).collect::<Vec<_>>();
        assert_eq!(read(&message(20, libc::SCM_RIGHTS, &[7, 0])), [7]);
        assert_eq!(read(&message(24, libc::SCM_RIGHTS, &[7, 8])), [7, 8]);
        assert_eq!(read(&message(28, libc::SCM_RIGHTS, &[7, 8])), [7, 8]);
        assert_eq!(read(&message(24, libc::SCM_CREDENTIALS, &[7, 8])), []);
        assert_eq!(read(&[0; 24]), []);
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
