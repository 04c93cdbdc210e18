//! Socket of a vhost-user port, as client or as server.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vireo_eal::lcore::StopFlag;
use vireo_eal::socket;
use vireo_eal::{Error, ErrorKind, Result};

/// Poll interval in milliseconds, at which a wait for the peer checks whether the program is to stop.
const LOOK_EVERY: u8 = 100;

/// Connects port `name` to the peer that listens at `path`.
///
/// # Errors
/// `Unavailable` when no process listens there.
pub(super) fn connect(name: &str, path: &Path) -> Result<UnixStream> {
    let what = format!("cannot connect {name} to {}", path.display());
    socket::connect(path, what, "start the vhost side first, or set server=1")
}

/// A listening socket; its path is removed on drop.
#[derive(Debug)]
pub(super) struct Listening {
    listener: UnixListener,
    name: Arc<str>,
    path: PathBuf,
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Another process may already have removed the path, which has the same effect.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Listening {
    /// Listens at `path` for the peer of port `name`.
    ///
    /// # Errors
    /// `Busy` when another process listens there.
    pub(super) fn at(name: &Arc<str>, path: &Path) -> Result<Self> {
        let what = || format!("cannot listen for {name} at {}", path.display());
        remove_stale(path)
            .map_err(|why| Error::new(ErrorKind::Busy, what(), why).with_hint("use another path"))?;
        let listener = UnixListener::bind(path).map_err(|error| Error::io(what(), &error))?;
        let listening = Self { listener, name: Arc::clone(name), path: path.to_owned() };
        listening.listener.set_nonblocking(true).map_err(|error| listening.failed(&error))?;
        Ok(listening)
    }

    fn failed(&self, error: &io::Error) -> Error {
        Error::io(format!("cannot listen for {} at {}", self.name, self.path.display()), error)
    }

    /// Returns the peer that has connected, if any; does not wait.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn accept(&self) -> Result<Option<UnixStream>> {
        match self.listener.accept() {
            // An accepted socket blocks, even if the listener does not.
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }
}

/// Listens at `path` until the peer of port `name` connects or `stop` is set. Accepts one connection and then
/// removes the path, so that a second peer does not wait in vain.
///
/// # Errors
/// `Busy` when another process listens at `path`, `Unavailable` when `stop` is set.
pub(super) fn accept(name: &Arc<str>, path: &Path, stop: &StopFlag) -> Result<UnixStream> {
    let listening = Listening::at(name, path)?;
    tracing::info!("{name} waits for a vhost-user peer at {}", path.display());
    while !stop.is_set() {
        if let Some(stream) = listening.accept()? {
            return Ok(stream);
        }
        let mut fds = [PollFd::new(listening.listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(LOOK_EVERY)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(listening.failed(&errno.into())),
        }
    }
    let what = format!("cannot listen for {name} at {}", path.display());
    Err(Error::new(ErrorKind::Unavailable, what, "stopped before a peer connected"))
}

/// Removes a socket on which no process listens, such as a killed process leaves behind.
fn remove_stale(path: &Path) -> std::result::Result<(), &'static str> {
    match std::fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(found) if !found.file_type().is_socket() => return Err("the file there is not a socket"),
        Ok(_) => {}
    }
    match socket::try_connect(path) {
        Err(Errno::ECONNREFUSED) => {
            // If the path cannot be removed, the following bind reports it.
            let _ = std::fs::remove_file(path);
            Ok(())
        }
        _ => Err("another process listens there"),
    }
}
