//! The socket of a port, or the frontend's, and the thread that serves one frontend after the other on it.

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

/// How soon to try again to accept or to connect, in milliseconds.
const RETRY: u8 = 100;

/// Descriptors that a process is told to have more of: a frontend's are two for each ring, and one for each region of memory.
const MORE_FILES: u64 = 1024;

/// How long a frontend must be silent before a change of its memory counts as complete, in milliseconds.
const SILENCE: u8 = 100;

/// What the thread and the owner of the port have in common.
#[derive(Debug, Default)]
struct Session {
    ending: AtomicBool,
    /// The connection that is served now.
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

/// The name of a socket in the file system; removed on drop.
#[derive(Debug)]
struct Name(PathBuf);

/// Serves the frontends at a path; on drop it hangs up, ends its thread and removes the socket file that it made.
#[derive(Debug)]
pub(super) struct Server {
    session: Arc<Session>,
    /// The listener once more, or the other end of what a client polls while it waits: shut down, it accepts no more
    /// and wakes whoever waits in it.
    waker: UnixStream,
    thread: Option<JoinHandle<()>>,
    _name: Option<Name>,
}

impl Server {
    /// Listens at `path` for frontends that will fill `rings`.
    ///
    /// # Errors
    /// `Busy` when somebody listens there, else when the file is no socket or cannot be made.
    pub(super) fn listen(path: &Path, name: &Arc<str>, rings: &[Arc<Shared>]) -> Result<Self> {
        make_way(path, name)?;
        let failed =
            |error: std::io::Error| Error::io(format!("{name}: cannot listen at {}", path.display()), &error);
        let (listener, socket) = bind(path).map_err(|errno| failed(errno.into()))?;
        let waker = UnixStream::from(OwnedFd::from(listener.try_clone().map_err(failed)?));
        let port = Port::new(name, rings);
        let serve = move |port: &Port| port.accept(&listener);
        Self::start(port, waker, Some(socket), serve).map_err(failed)
    }

    /// Connects to the frontends that listen at `path`, one after the other, as long as there is a port.
    ///
    /// # Errors
    /// When no socket can have that path, or the process has run out of something.
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

/// As `UnixListener::bind`, which leaves the name behind when it cannot listen.
fn bind(path: &Path) -> nix::Result<(UnixListener, Name)> {
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let name = Name(path.to_owned());
    socket::listen(&fd, Backlog::MAXCONN)?;
    Ok((UnixListener::from(fd), name))
}

/// Removes a socket that a process left when it was killed.
fn make_way(path: &Path, name: &str) -> Result<()> {
    let what = || format!("{name}: cannot listen at {}", path.display());
    let file = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == IoKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(what(), &error)),
    };
    if !file.is_socket() {
        return Err(Error::new(ErrorKind::Usage, what(), "there is a file that is no socket"));
    }
    match try_connect(path) {
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(|error| Error::io(what(), &error)),
        Err(errno) if errno != Errno::EAGAIN => Err(Error::os(what(), errno)),
        _ => Err(Error::new(ErrorKind::Busy, what(), "another process listens there")
            .with_hint(format!("see which: ss -xlp src {}", path.display()))),
    }
}

/// What the thread of a port needs.
struct Port {
    name: Arc<str>,
    rings: Vec<Arc<Shared>>,
    session: Arc<Session>,
    /// Command for when the process has no descriptor left; the sandbox does not let the thread read the limit.
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

    /// Accepts frontends until the port ends. That the process or the system has run out of something does not last:
    /// it is said once, and tried again.
    fn accept(&self, listener: &UnixListener) {
        let mut said = false;
        loop {
            let accepted = listener.accept();
            if self.session.is_ending() {
                return;
            }
            match accepted {
                Ok((stream, _)) => {
                    said = false;
                    self.serve(stream);
                }
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::error!("{}", self.refusal(&error));
                    }
                    if ends_soon(listener) {
                        return;
                    }
                }
            }
        }
    }

    /// Connects to the frontend at `path`, and to the next one when it is gone, until the other end of `ends` is closed.
    /// Each reason why it cannot connect is logged once.
    fn seek(&self, path: &Path, ends: &UnixStream) {
        let mut said = None;
        loop {
            match try_connect(path) {
                Ok(stream) => {
                    said = None;
                    self.serve(stream);
                }
                Err(errno) => {
                    if said.replace(errno) != Some(errno) {
                        self.tell(path, errno);
                    }
                }
            }
            // Also after a connection, for a frontend that hangs up at once.
            if self.session.is_ending() || ends_soon(ends) {
                return;
            }
        }
    }

    fn tell(&self, path: &Path, errno: Errno) {
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
        let error = Error::io(format!("{}: cannot accept a frontend, and tries on", self.name), error);
        match error.errno() {
            Some(Errno::EMFILE) => error.with_hint(&*self.more_files),
            Some(Errno::ENFILE) => {
                error.with_hint("run: sysctl fs.file-max=$(($(cat /proc/sys/fs/file-max) + 1024))")
            }
            Some(Errno::ENOMEM | Errno::ENOBUFS) => error.with_hint("see what takes the memory: free -m"),
            _ => error,
        }
    }

    fn serve(&self, stream: UnixStream) {
        tracing::info!("{}: a frontend has connected", self.name);
        let why = converse(stream, &self.session, &self.name, &self.rings);
        self.session.set(None);
        tracing::info!("{}: the frontend is gone: {why}", self.name);
    }
}

/// Waits for [`RETRY`], whoever connects; whether the port ends meanwhile, which is when `socket` is shut down.
fn ends_soon(socket: &impl AsFd) -> bool {
    let mut hung_up = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut hung_up, PollTimeout::from(RETRY)).is_ok_and(|ready| ready > 0)
}

/// Answers a frontend until it hangs up or breaks the protocol; gives the reason.
fn converse(stream: UnixStream, session: &Session, name: &Arc<str>, rings: &[Arc<Shared>]) -> VhostError {
    match stream.try_clone() {
        Ok(clone) => session.set(Some(clone)),
        Err(error) => return VhostError::SocketError(error),
    }
    // The port may have ended before it could see the connection.
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

/// While the frontend is silent for [`SILENCE`], unmaps the memory regions that it has removed, and drops what it
/// transmits by disabled rings. Returns when there is a request, or no such region and ring.
fn await_request(handler: &BackendReqHandler<Mutex<Backend>>, backend: &Mutex<Backend>) {
    let lock = || backend.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        // What a ring holds is looked at first: of what comes later, a request that enables it may already be on its way.
        let disabled = lock().disabled();
        if disabled.is_none() && lock().is_settled() {
            return;
        }
        // The next request fails by the same error.
        let Ok(socket) = handler.try_clone_connection() else { return };
        let mut heard = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut heard, PollTimeout::from(SILENCE)) {
            Ok(0) => {
                disabled.into_iter().flatten().for_each(|(ring, end)| ring.discard(end));
                lock().settle();
            }
            Err(Errno::EINTR) => {}
            _ => return,
        }
    }
}
