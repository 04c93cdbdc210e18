//! Descriptors that are passed over a unix socket (`SCM_RIGHTS`, unix(7)).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};

use crate::error::{Error, ErrorKind, Result};
use crate::rlimit;

/// Maximum number of descriptors in one message (`SCM_MAX_FD` of the kernel).
pub const MAX_FDS: usize = 253;

/// Sends `bytes`, and `fds` with the first of them. Returns how many bytes were sent.
///
/// # Errors
/// `EINVAL` for more than [`MAX_FDS`] descriptors; otherwise if the socket is closed or full.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> nix::Result<usize> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &control };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
}

/// Receives bytes into `buffer`, and all descriptors that came with them. Returns the number of bytes, which is 0 if
/// the other end is closed.
///
/// # Errors
/// `Os` if the process or the machine has too many open files, or the connection is broken. `what` is what fails then.
pub fn receive(socket: &UnixStream, buffer: &mut [u8], what: &str) -> Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|errno| Error::os(what, errno))?;
    let (bytes, flags) = (message.bytes, message.flags);
    // All descriptors that the kernel has installed are owned before any message is refused. nix returns none if some
    // were not installed (`MSG_CTRUNC`), so they are read from its buffer.
    // SAFETY: the kernel has just installed these descriptors in this process, and nothing else owns them.
    let fds = rights(&control).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(Error::new(ErrorKind::Os, what, "the kernel could not install all of them")
            .with_hint(rlimit::more_files(MAX_FDS as u64)));
    }
    Ok((bytes, fds))
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
}
