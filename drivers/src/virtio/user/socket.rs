//! The socket of a vhost-user port, as client or as server.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

/// How long a wait for the peer takes to see that the program is to stop, in milliseconds.
const LOOK_EVERY: u8 = 100;

/// Connects port `name` to the peer that listens at `path`.
///
/// # Errors
/// `Unavailable` when nobody listens there.
pub(super) fn connect(name: &str, path: &Path) -> Result<UnixStream> {
    let what = || format!("cannot connect {name} to {}", path.display());
    let cure = "start the vhost side first, or give server=1";
    try_connect(path).map_err(|errno| match errno {
        Errno::ENOENT => Error::os(what(), errno).because("there is no such socket").mend(cure),
        Errno::ECONNREFUSED => Error::os(what(), errno)
            .kind_is(ErrorKind::Unavailable)
            .because("nobody listens on that socket")
            .mend(cure),
        Errno::EAGAIN => Error::os(what(), errno).because("others wait for that socket already"),
        errno => Error::os(what(), errno),
    })
}

/// Connects without waiting for a place in the listener's queue.
fn try_connect(path: &Path) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false).map_err(|error| errno_of(&error))?;
    Ok(stream)
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw)
}

/// A socket that we listen on; its name goes with it.
struct Listening<'a> {
    listener: UnixListener,
    path: &'a Path,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        // Somebody else may have removed it, which is as good.
        let _ = std::fs::remove_file(self.path);
    }
}

/// Listens at `path` until the peer of port `name` connects, or `stop` is set. There is one connection: after
/// it the socket has no name any more, so that a second peer does not wait for nothing.
///
/// # Errors
/// `Busy` when another process listens at `path`, `Unavailable` when `stop` is set.
pub(super) fn accept(name: &str, path: &Path, stop: &StopFlag) -> Result<UnixStream> {
    let what = || format!("cannot listen for {name} at {}", path.display());
    let failed = |error: &io::Error| Error::io(what(), error);
    remove_stale(path).map_err(|why| Error::new(ErrorKind::Busy, what(), why).mend("give another path"))?;
    let listener = UnixListener::bind(path).map_err(|error| failed(&error))?;
    let listening = Listening { listener, path };
    listening.listener.set_nonblocking(true).map_err(|error| failed(&error))?;
    tracing::info!("{name} waits for a vhost-user peer at {}", path.display());
    while !stop.is_set() {
        let mut fds = [PollFd::new(listening.listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(LOOK_EVERY)) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(Error::os(what(), errno)),
        }
        match listening.listener.accept() {
            // An accepted socket blocks, whatever the listener does.
            Ok((stream, _)) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    Err(Error::new(ErrorKind::Unavailable, what(), "stopped before a peer came"))
}

/// Removes a socket on which nobody listens, as a killed process leaves it.
fn remove_stale(path: &Path) -> std::result::Result<(), &'static str> {
    match std::fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(found) if !found.file_type().is_socket() => return Err("there is a file that is no socket"),
        Ok(_) => {}
    }
    match try_connect(path) {
        Err(Errno::ECONNREFUSED) => {
            // What cannot be removed is named by the bind that follows.
            let _ = std::fs::remove_file(path);
            Ok(())
        }
        _ => Err("another process listens there"),
    }
}
