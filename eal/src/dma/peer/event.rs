//! Call and kick descriptors of a peer.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::error::{Error, ErrorKind, Result};

/// An eventfd of a peer: the call that wakes it, or the kick by which it wakes this process. The latter is not read,
/// because a read might wait.
///
/// The peer has the same open file and may clear `O_NONBLOCK` at any time. A write then sleeps while the
/// counter is full, until the peer reads it. Vireo cannot prevent that: a check of the flag or of the counter
/// is outdated when the write happens, and a write to an eventfd has no other nonblocking mode (it does not
/// support `RWF_NOWAIT`). A peer must therefore be trusted with the lcore that serves it.
#[derive(Debug)]
pub struct PeerEvent(File);

impl PeerEvent {
    /// Takes the descriptor and makes its writes nonblocking, which the peer can undo.
    ///
    /// # Errors
    /// `Protocol` if the descriptor is not an eventfd: a write to anything else, or a look at whether it is readable,
    /// could block even if the peer does nothing wrong.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let what = "cannot use a frontend's call or kick descriptor";
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|error| Error::io(what, &error))?;
        if link.as_os_str() != "anon_inode:[eventfd]" {
            return Err(Error::new(
                ErrorKind::Protocol,
                what,
                format!("{} is not an eventfd", link.display()),
            ));
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|errno| Error::os(what, errno))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(|errno| Error::os(what, errno))?;
        Ok(Self(fd.into()))
    }

    /// Wakes the peer. Write errors are ignored, because a full counter has already woken the peer.
    #[cold]
    #[inline(never)]
    pub fn signal(&self) {
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }
}

impl AsFd for PeerEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_eventfd_is_a_call_descriptor() {
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        let call = PeerEvent::new(event.as_fd().try_clone_to_owned().unwrap()).unwrap();
        call.signal();
        call.signal();
        assert_eq!(event.read().unwrap(), 2);
        event.write(u64::MAX - 1).unwrap();
        call.signal();
        assert_eq!(
            PeerEvent::new(tempfile::tempfile().unwrap().into()).unwrap_err().kind(),
            ErrorKind::Protocol
        );
    }
}
