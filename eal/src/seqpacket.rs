//! Unix sockets that keep the boundaries of messages (`SOCK_SEQPACKET`, unix(7)). No call waits.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt,
    listen, recv, send, socket,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Uid, geteuid};

/// Listening socket.
#[derive(Debug)]
pub(crate) struct Listener(OwnedFd);

/// Connection: one that a [`Listener`] accepted, or the other end of it.
#[derive(Debug)]
pub(crate) struct Connection(OwnedFd);

fn unconnected() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// Returns whether a process listens at `path`.
fn is_served(path: &UnixAddr) -> nix::Result<bool> {
    match connect(unconnected()?.as_raw_fd(), path) {
        // The listener's queue is full.
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

impl Listener {
    /// Listens at `path`, where only this user and root can connect. A socket that a dead process left there
    /// is replaced.
    ///
    /// # Errors
    /// `EADDRINUSE` if a process listens there.
    pub(crate) fn bind(path: &Path) -> nix::Result<Self> {
        let address = UnixAddr::new(path)?;
        if is_served(&address)? {
            return Err(Errno::EADDRINUSE);
        }
        let fd = unconnected()?;
        // The file gets the mode of the socket (Linux, `unix_bind_bsd`).
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Errno::from_raw(error.raw_os_error().unwrap_or_default()));
            }
            _ => {}
        }
        bind(fd.as_raw_fd(), &address)?;
        listen(&fd, Backlog::new(16)?)?;
        Ok(Self(fd))
    }

    /// Returns a listener of another process.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Accepts a connection, if one waits. A connection of another user than this one and root is closed.
    ///
    /// # Errors
    /// `EMFILE` and the like.
    pub(crate) fn accept(&self) -> nix::Result<Option<Connection>> {
        match accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            Ok(fd) => {
                // SAFETY: the kernel has just created the descriptor, and nothing else owns it.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                let peer = Uid::from_raw(getsockopt(&fd, PeerCredentials)?.uid());
                Ok((peer == geteuid() || peer.is_root()).then_some(Connection(fd)))
            }
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Connection {
    /// Connects to the listener at `path`.
    ///
    /// # Errors
    /// `ECONNREFUSED` or `ENOENT` if nothing listens there; `EAGAIN` if the listener's queue is full.
    pub(crate) fn to(path: &Path) -> nix::Result<Self> {
        let fd = unconnected()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(fd))
    }

    /// Receives a message into `buffer`, if one waits. Returns its whole length, which may be more than
    /// `buffer` holds; 0 at the end of the connection.
    ///
    /// # Errors
    /// Why the connection ended.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> nix::Result<Option<usize>> {
        match recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_TRUNC) {
            Ok(len) => Ok(Some(len)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Sends a message, if the connection has room for it. Returns whether it had.
    ///
    /// # Errors
    /// Why the connection ended, or `EMSGSIZE`.
    pub(crate) fn send(&self, message: &[u8]) -> nix::Result<bool> {
        match send(self.0.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
