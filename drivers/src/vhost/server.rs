//! The socket of a port, or of its frontend, and the thread that serves the frontends on it one after the
//! other.

mod conversation;
mod early;
mod session;
#[cfg(test)]
mod tests;

use std::io::ErrorKind as IoKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use vhost::vhost_user::Error as VhostError;
use vireo_eal::handover::{Fds, ReceivedFds};
use vireo_eal::rlimit::more_files;
use vireo_eal::socket::try_connect;
use vireo_eal::{Error, ErrorKind, Result};

use self::conversation::Conversation;
use self::session::{Session, Woken};
use super::backend::{Backend, BackendRecord};
use super::shared::Shared;

/// Delay before the next attempt to accept or to connect, in milliseconds.
const RETRY: u8 = 100;

/// Number of file descriptors by which the hint raises the limit: a frontend takes three for each ring and one
/// for each memory region.
const MORE_FILES: u64 = 1024;

/// How long a frontend must be silent before a change of its memory counts as complete, in milliseconds.
const SILENCE: u8 = 100;

/// Path of a socket in the file system; removed on drop.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    /// Whether the socket belongs to another process: the predecessor of this process, or its successor.
    is_lent: AtomicBool,
}

/// Where a port meets its frontends.
#[derive(Debug)]
enum Place {
    /// At a socket of its own.
    Listener(UnixListener, Name),
    /// At the frontend's socket.
    Path(PathBuf),
}

/// Serves the frontends at a path. On drop it closes the connection, ends its thread and removes the socket
/// file that it created.
#[derive(Debug)]
pub(super) struct Server {
    session: Arc<Session>,
    place: Arc<Place>,
    thread: Option<JoinHandle<()>>,
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
        listener.set_nonblocking(true).map_err(failed)?;
        Self::start(Place::Listener(listener, socket), name, rings).inspect(|server| server.session.serve())
    }

    /// Connects to the frontends that listen at `path`, one after the other, as long as the port exists.
    ///
    /// # Errors
    /// When a socket cannot have that path, or the process has run out of a resource.
    pub(super) fn connect(path: &Path, name: &Arc<str>, rings: &[Arc<Shared>]) -> Result<Self> {
        let failed =
            |errno: Errno| Error::io(format!("{name}: cannot use {}", path.display()), &errno.into());
        UnixAddr::new(path).map_err(failed)?;
        Self::start(Place::Path(path.to_owned()), name, rings).inspect(|server| server.session.serve())
    }

    /// Prepares to serve, at `path`, the frontends of another process, which has passed its `listener` if it has one.
    /// Serves nobody before [`Server::keep`].
    ///
    /// # Errors
    /// When the process has run out of a resource.
    pub(super) fn attach(
        path: &Path,
        listener: Option<OwnedFd>,
        name: &Arc<str>,
        rings: &[Arc<Shared>],
    ) -> Result<Self> {
        let path = path.to_owned();
        let place = match listener {
            Some(listener) => Place::Listener(listener.into(), Name { path, is_lent: AtomicBool::new(true) }),
            None => Place::Path(path),
        };
        Self::start(place, name, rings)
    }

    fn start(place: Place, name: &Arc<str>, rings: &[Arc<Shared>]) -> Result<Self> {
        let (session, place) = (Arc::new(Session::new()?), Arc::new(place));
        let port = Port {
            name: Arc::clone(name),
            rings: rings.to_vec(),
            session: Arc::clone(&session),
            more_files: more_files(MORE_FILES),
        };
        let thread = std::thread::Builder::new().name(format!("vireo-{name}"));
        let meets = Arc::clone(&place);
        let thread = thread.spawn(move || port.run(&meets));
        let thread = thread.map_err(|error| Error::io(format!("{name}: cannot start a thread"), &error))?;
        Ok(Self { session, place, thread: Some(thread) })
    }

    /// The socket at which the port listens, if it does.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &*self.place {
            Place::Listener(listener, _) => Some(listener.as_fd()),
            Place::Path(_) => None,
        }
    }

    /// Pauses, and describes the connection for another process, if there is one. Until [`Server::keep`] or
    /// [`Server::leave`], nothing touches the rings or the connection.
    ///
    /// # Errors
    /// `Busy` if the frontend is in the middle of a request or of a change.
    pub(super) fn record(&self, fds: &mut Fds<'_>) -> Result<Option<(u32, BackendRecord)>> {
        self.session.pause()?;
        let Some(connection) = self.session.connection() else { return Ok(None) };
        let record = connection.backend().record(fds)?;
        Ok(Some((fds.add_duplicate(connection.socket.as_fd())?, record)))
    }

    /// Continues the conversation that another process has described, and fills `rings` as that did. The frontend is
    /// not served before [`Server::keep`].
    ///
    /// # Errors
    /// `Protocol` if the record contradicts itself, or another number of rings.
    pub(super) fn resume(
        &self,
        (socket, record): &(u32, BackendRecord),
        name: &Arc<str>,
        rings: &[Arc<Shared>],
        fds: &ReceivedFds,
    ) -> Result<()> {
        let backend = Backend::new(name, rings.to_vec());
        let (socket, (features, protocol)) = (fds.get(*socket)?.into(), record.features());
        let refused = |error: VhostError| {
            Error::new(ErrorKind::Protocol, format!("cannot continue {name}"), error.to_string())
        };
        let conversation = Conversation::resume(socket, backend, features, protocol).map_err(refused)?;
        conversation.backend().restore(record, fds)?;
        self.session.set_connection(Some(conversation.connection().clone()));
        self.session.continue_with(conversation);
        Ok(())
    }

    /// Serves frontends from now on: no other process does.
    pub(super) fn keep(&self) {
        self.lend(false);
        self.session.serve();
    }

    /// Leaves the frontends to another process.
    pub(super) fn leave(&self) {
        self.lend(true);
        self.session.set_connection(None);
        self.session.end();
    }

    fn lend(&self, lent: bool) {
        if let Place::Listener(_, name) = &*self.place {
            name.is_lent.store(lent, Ordering::Relaxed);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.session.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread that serves vhost-user frontends panicked");
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.is_lent.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Binds and listens like `UnixListener::bind`, but removes the path if it cannot listen.
fn bind(path: &Path) -> nix::Result<(UnixListener, Name)> {
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let name = Name { path: path.to_owned(), is_lent: AtomicBool::new(false) };
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
    /// Serves frontends until the port ends.
    fn run(&self, place: &Place) {
        if !self.session.obey() {
            return;
        }
        if let Some(begun) = self.session.take_begun() {
            self.converse(begun);
        }
        match place {
            Place::Listener(listener, _) => self.accept(listener),
            Place::Path(path) => self.seek(path),
        }
    }

    /// Accepts frontends until the port ends. A shortage of resources in the process or the system is
    /// temporary: it is logged once, and accepting is retried.
    fn accept(&self, listener: &UnixListener) {
        let mut logged = false;
        while self.session.wait(Some(listener.as_fd()), PollTimeout::NONE) != Woken::End {
            match listener.accept() {
                Ok((stream, _)) => {
                    logged = false;
                    self.serve(stream);
                }
                Err(error) if error.kind() == IoKind::WouldBlock => {}
                Err(error) => {
                    if !std::mem::replace(&mut logged, true) {
                        tracing::error!("{}", self.refusal(&error));
                    }
                    if self.session.wait(None, RETRY) == Woken::End {
                        return;
                    }
                }
            }
        }
    }

    /// Connects to the frontend at `path`, and to the next one when it is gone, until the port ends. A reason why it
    /// cannot connect is logged once, until the reason changes.
    fn seek(&self, path: &Path) {
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
            if self.session.wait(None, RETRY) == Woken::End {
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
        match Conversation::new(stream, Backend::new(&self.name, self.rings.clone())) {
            Ok(conversation) => {
                tracing::info!("{}: a frontend has connected", self.name);
                self.converse(conversation);
            }
            Err(error) => tracing::error!("{}", self.refusal(&error)),
        }
    }

    /// Answers a frontend until it hangs up, breaks the protocol, or the port ends.
    fn converse(&self, mut conversation: Conversation) {
        self.session.set_connection(Some(conversation.connection().clone()));
        while self.await_request(&conversation) {
            if let Err(why) = conversation.handle_request() {
                tracing::info!("{}: the frontend has disconnected: {why}", self.name);
                break;
            }
        }
        self.session.set_connection(None);
    }

    /// Waits for a request. Each time the frontend is silent for [`SILENCE`], unmaps the memory regions that it has
    /// removed, and drops what it transmits through disabled rings. Returns false when the port ends.
    fn await_request(&self, conversation: &Conversation) -> bool {
        loop {
            // The contents of the rings are determined first: for later contents, a request that enables the ring
            // may already be on its way.
            let disabled = conversation.backend().disabled();
            let is_settled = disabled.is_none() && conversation.backend().is_settled();
            let longest = if is_settled { PollTimeout::NONE } else { SILENCE.into() };
            match self.session.wait(Some(conversation.socket().as_fd()), longest) {
                Woken::Ready => return true,
                Woken::End => return false,
                Woken::Silence => {
                    disabled.into_iter().flatten().for_each(|(ring, end)| ring.lock().discard(end));
                    conversation.backend().settle();
                }
            }
        }
    }
}
