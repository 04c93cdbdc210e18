//! The socket of a port, or of its frontend, and the thread that serves the frontends on it one after the
//! other.

mod early;
#[cfg(test)]
mod tests;

use std::io::ErrorKind as IoKind;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vireo_eal::rlimit::more_files;
use vireo_eal::socket::try_connect;
use vireo_eal::{Error, ErrorKind, Result};

use super::backend::Backend;
use super::shared::Shared;

/// Delay before the next attempt to accept or to connect, in milliseconds.
const RETRY: u8 = 100;

/// Number of file descriptors by which the hint raises the limit: a frontend takes two for each ring and one
/// for each memory region.
const MORE_FILES: u64 = 1024;

/// How long a frontend must be silent before a change of its memory counts as complete, in milliseconds.
const SILENCE: u8 = 100;

/// State that the thread and the owner of the port share.
#[derive(Debug, Default)]
struct Session {
    ending: AtomicBool,
    /// The connection that is being served.
    connection: Mutex<Option<UnixStream>>,
}

impl Session {
    fn set(&self, connection: Option<UnixStream>) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }
}

/// Path of a socket in the file system; removed on drop.
#[derive(Debug)]
struct Name(PathBuf);

/// Serves the frontends at a path. On drop it closes the connection, ends its thread and removes the socket
/// file that it created.
#[derive(Debug)]
pub(super) struct Server {
    session: Arc<Session>,
    /// A duplicate of the listener, or the other end of the socket that a client polls while it waits.
    /// Shutting it down ends accepting and wakes the thread that waits in it.
    waker: UnixStream,
    thread: Option<JoinHandle<()>>,
    _name: Option<Name>,
}

impl Server {
    /// Listens at `path` for frontends that will fill `rings`.
    ///
    /// # Errors
    /// `Busy` when another process listens there, otherwise when the file is not a socket or cannot be
    /// created.
    pub(super) fn listen(path: &Path, name: &Arc<str>, rings: &[Arc<Shared>]) -> Result<Self> {
        remove_stale_socket(path, name)?;
        let failed =
            |error: std::io::Error| Error::io(format!("{name}: cannot listen at {}", path.display()), &error);
        let (listener, socket) = bind(path).map_err(|errno| failed(errno.into()))?;
        let waker = UnixStream::from(OwnedFd::from(listener.try_clone().map_err(failed)?));
        let port = Port::new(name, rings);
        let serve = move |port: &Port| port.accept(&listener);
        Self::start(port, waker, Some(socket), serve).map_err(failed)
    }

    /// Connects to the frontends that listen at `path`, one after the other, as long as the port exists.
    ///
    /// # Errors
    /// When a socket cannot have that path, or the process has run out of a resource.
    pub(super) fn connect(path: &Path, name: &Arc<str>, rings: &[Arc<Shared>]) -> Result<Self> {
        let failed =
            |error: std::io::Error| Error::io(format!("{name}: cannot use {}", path.display()), &error);
        UnixAddr::new(path).map_err(|errno| failed(errno.into()))?;
        let (waker, ends) = UnixStream::pair().map_err(failed)?;
        let port = Port::new(name, rings);
        let path = path.to_owned();
        Self::start(port, waker, None, move |port: &Port| port.seek(&path, &ends)).map_err(failed)
    }

    fn start(
        port: Port,
        waker: UnixStream,
        name: Option<Name>,
        serve: impl FnOnce(&Port) + Send + 'static,
    ) -> std::io::Result<Self> {
        let session = Arc::clone(&port.session);
        let thread = std::thread::Builder::new().name(format!("vireo-{}", port.name));
        let thread = thread.spawn(move || serve(&port))?;
        Ok(Self { session, waker, thread: Some(thread), _name: name })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.session.ending.store(true, Ordering::SeqCst);
        let _ = self.waker.shutdown(Shutdown::Both);
        if let Some(stream) = &*self.session.connection.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread that serves vhost-user frontends panicked");
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Binds and listens like `UnixListener::bind`, but removes the path if it cannot listen.
fn bind(path: &Path) -> nix::Result<(UnixListener, Name)> {
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let name = Name(path.to_owned());
    socket::listen(&fd, Backlog::MAXCONN)?;
    Ok((UnixListener::from(fd), name))
}

/// Removes a socket that a killed process left behind.
fn remove_stale_socket(path: &Path, name: &str) -> Result<()> {
    let what = || format!("{name}: cannot listen at {}", path.display());
    let file = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == IoKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(what(), &error)),
    };
    if !file.is_socket() {
        return Err(Error::new(ErrorKind::Usage, what(), "the file there is not a socket"));
    }
    match try_connect(path) {
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(|error| Error::io(what(), &error)),
        Err(errno) if errno != Errno::EAGAIN => Err(Error::os(what(), errno)),
        _ => Err(Error::new(ErrorKind::Busy, what(), "another process listens there")
            .with_hint(format!("see which: ss -xlp src {}", path.display()))),
    }
}

/// State of a port's thread.
struct Port {
    name: Arc<str>,
    rings: Vec<Arc<Shared>>,
    session: Arc<Session>,
    /// Command to suggest when the process has no descriptor left. The sandbox does not let the thread read
    /// the limit.
    more_files: String,
}

impl Port {
    fn new(name: &Arc<str>, rings: &[Arc<Shared>]) -> Self {
        Self {
            name: Arc::clone(name),
            rings: rings.to_vec(),
            session: Arc::default(),
            more_files: more_files(MORE_FILES),
        }
    }

    /// Accepts frontends until the port ends. A shortage of resources in the process or the system is
    /// temporary: it is logged once, and accepting is retried.
    fn accept(&self, listener: &UnixListener) {
        let mut logged = false;
        loop {
            let accepted = listener.accept();
            if self.session.is_ending() {
                return;
            }
            match accepted {
                Ok((stream, _)) => {
                    logged = false;
                    self.serve(stream);
                }
                Err(error) => {
                    if !std::mem::replace(&mut logged, true) {
                        tracing::error!("{}", self.refusal(&error));
                    }
                    if ends_soon(listener) {
                        return;
                    }
                }
            }
        }
    }

    /// Connects to the frontend at `path`, and to the next one when it is gone, until the other end of `ends`
    /// is closed. A reason why it cannot connect is logged once, until the reason changes.
    fn seek(&self, path: &Path, ends: &UnixStream) {
        let mut logged = None;
        loop {
            match try_connect(path) {
                Ok(stream) => {
                    logged = None;
                    self.serve(stream);
                }
                Err(errno) => {
                    if logged.replace(errno) != Some(errno) {
                        self.log_connect_error(path, errno);
                    }
                }
            }
            // Also wait after a connection, in case a frontend hangs up at once.
            if self.session.is_ending() || ends_soon(ends) {
                return;
            }
        }
    }

    fn log_connect_error(&self, path: &Path, errno: Errno) {
        let (name, path) = (&self.name, path.display());
        match errno {
            Errno::ENOENT | Errno::ECONNREFUSED | Errno::EAGAIN => {
                tracing::info!("{name}: no frontend listens at {path} yet; trying ten times a second");
            }
            errno => tracing::warn!(
                "{}",
                Error::os(format!("{name}: cannot connect to {path}, and keeps trying"), errno)
            ),
        }
    }

    fn refusal(&self, error: &std::io::Error) -> Error {
        let error = Error::io(format!("{}: cannot accept a frontend, and keeps trying", self.name), error);
        match error.errno() {
            Some(Errno::EMFILE) => error.with_hint(&*self.more_files),
            Some(Errno::ENFILE) => {
                error.with_hint("run: sysctl fs.file-max=$(($(cat /proc/sys/fs/file-max) + 1024))")
            }
            Some(Errno::ENOMEM | Errno::ENOBUFS) => error.with_hint("see what uses the memory: free -m"),
            _ => error,
        }
    }

    fn serve(&self, stream: UnixStream) {
        tracing::info!("{}: a frontend has connected", self.name);
        let why = converse(stream, &self.session, &self.name, &self.rings);
        self.session.set(None);
        tracing::info!("{}: the frontend has disconnected: {why}", self.name);
    }
}

/// Waits for [`RETRY`], even if a frontend connects. Returns whether the port ends meanwhile, which shuts
/// down `socket`.
fn ends_soon(socket: &impl AsFd) -> bool {
    let mut hung_up = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut hung_up, PollTimeout::from(RETRY)).is_ok_and(|ready| ready > 0)
}

/// Answers a frontend until it hangs up or breaks the protocol; returns the reason.
fn converse(stream: UnixStream, session: &Session, name: &Arc<str>, rings: &[Arc<Shared>]) -> VhostError {
    match stream.try_clone() {
        Ok(clone) => session.set(Some(clone)),
        Err(error) => return VhostError::SocketError(error),
    }
    // The port may have ended before the connection was visible to it.
    if session.is_ending() {
        return VhostError::Disconnected;
    }
    let backend = Arc::new(Mutex::new(Backend::new(name, rings.to_vec())));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
    loop {
        await_request(&handler, &backend);
        let handled = early::handle(&handler, &backend).unwrap_or_else(|| handler.handle_request());
        match handled {
            Ok(()) | Err(VhostError::SocketRetry(_)) => {}
            Err(error) => return error,
        }
    }
}

/// Each time the frontend is silent for [`SILENCE`], unmaps the memory regions that it has removed, and drops
/// what it transmits through disabled rings. Returns when there is a request, or when no such region or ring
/// is left.
fn await_request(handler: &BackendReqHandler<Mutex<Backend>>, backend: &Mutex<Backend>) {
    let lock = || backend.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        // The contents of the rings are determined first: for later contents, a request that enables the ring
        // may already be on its way.
        let disabled = lock().disabled();
        if disabled.is_none() && lock().is_settled() {
            return;
        }
        // The next request fails with the same error.
        let Ok(socket) = handler.try_clone_connection() else { return };
        let mut heard = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut heard, PollTimeout::from(SILENCE)) {
            Ok(0) => {
                disabled.into_iter().flatten().for_each(|(ring, end)| ring.lock().discard(end));
                lock().settle();
            }
            Err(Errno::EINTR) => {}
            _ => return,
        }
    }
}
