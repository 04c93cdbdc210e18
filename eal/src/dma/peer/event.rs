//! The call descriptor of a peer.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::error::{Error, ErrorKind, Result};

/// The eventfd by which a peer is woken.
///
/// The peer has the same open file and may take `O_NONBLOCK` from it at any time: a write then sleeps while the
/// counter is full, until the peer reads it. Nothing helps against that: a look at the flag or at the room is old
/// when the write comes, and an eventfd's write has no other way not to sleep (`RWF_NOWAIT` is not for it). So a
/// peer must be trusted with the lcore that serves it.
#[derive(Debug)]
pub struct PeerEvent(File);

impl PeerEvent {
    /// Takes the descriptor, and makes its writes return at once, as long as the peer leaves them so.
    ///
    /// # Errors
    /// `Protocol` when it is no eventfd: a write to anything else could block though the peer does nothing wrong.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let what = "cannot use a frontend's call descriptor";
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|error| Error::io(what, &error))?;
        if link.as_os_str() != "anon_inode:[eventfd]" {
            return Err(Error::new(ErrorKind::Protocol, what, format!("{} is no eventfd", link.display())));
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|errno| Error::os(what, errno))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(|errno| Error::os(what, errno))?;
        Ok(Self(fd.into()))
    }

    /// Wakes the peer. A counter that is full has woken it, so the error of a write says nothing.
    #[cold]
    #[inline(never)]
    pub fn signal(&self) {
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

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
