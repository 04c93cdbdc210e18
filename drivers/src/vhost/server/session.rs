//! What the owner of a port and the thread that serves its frontends tell each other.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vireo_eal::event::Event;
use vireo_eal::{Error, ErrorKind, Result};

use super::Conversation;
use crate::vhost::backend::Backend;

/// How long the thread may take to pause. It answers a request meanwhile, or waits for the rest of one.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the thread is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wish {
    /// Wait, with all descriptors open, and touch nothing.
    #[default]
    Pause,
    /// Serve frontends.
    Serve,
    /// End.
    End,
}

/// A connection, as the owner of the port sees it.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub(super) socket: Arc<UnixStream>,
    /// The other end of the handler's socket.
    pub(super) inner: Arc<UnixStream>,
    pub(super) backend: Arc<Mutex<Backend>>,
}

impl Connection {
    /// No panic leaves the backend half-changed.
    pub(super) fn backend(&self) -> MutexGuard<'_, Backend> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct State {
    wish: Wish,
    is_paused: bool,
    /// The connection that is being served.
    connection: Option<Connection>,
    /// A conversation that another process has begun, for the thread to continue.
    begun: Option<Conversation>,
}

/// Why [`Session::wait`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// There is something to read, or the other end has hung up.
    Ready,
    /// The time is over.
    Silence,
    /// The thread is to end.
    End,
}

/// State that the thread and the owner of the port share. The thread is paused at first.
#[derive(Debug)]
pub(super) struct Session {
    state: Mutex<State>,
    changed: Condvar,
    /// Signaled for a thread that waits in [`Session::wait`].
    wake: Event,
}

impl Session {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { state: Mutex::default(), changed: Condvar::new(), wake: Event::new()? })
    }

    /// No panic leaves the state half-changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wish(&self, wish: Wish) -> MutexGuard<'_, State> {
        let mut state = self.state();
        state.wish = wish;
        self.wake.signal();
        self.changed.notify_all();
        state
    }

    /// Lets the thread serve frontends.
    pub(super) fn serve(&self) {
        drop(self.wish(Wish::Serve));
    }

    /// Lets the thread end, even if it waits for the rest of a request.
    pub(super) fn end(&self) {
        if let Some(connection) = &self.wish(Wish::End).connection {
            for socket in [&connection.socket, &connection.inner] {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }

    /// Waits until the thread touches neither the rings nor the connection.
    ///
    /// # Errors
    /// `Busy` if the frontend is in the middle of a request. The thread then serves it.
    pub(super) fn pause(&self) -> Result<()> {
        let state = self.wish(Wish::Pause);
        let paused = self.changed.wait_timeout_while(state, PATIENCE, |state| !state.is_paused);
        let (mut state, timeout) = paused.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            state.wish = Wish::Serve;
            let why = "its frontend is in the middle of a request";
            return Err(
                Error::new(ErrorKind::Busy, "cannot hand over a vhost port", why).with_hint("try again")
            );
        }
        Ok(())
    }

    /// The connection that is being served.
    pub(super) fn connection(&self) -> Option<Connection> {
        self.state().connection.clone()
    }

    pub(super) fn set_connection(&self, connection: Option<Connection>) {
        self.state().connection = connection;
    }

    /// Gives a conversation to the thread, which is paused.
    pub(super) fn continue_with(&self, conversation: Conversation) {
        self.state().begun = Some(conversation);
    }

    /// The thread takes what [`Session::continue_with`] gave.
    pub(super) fn take_begun(&self) -> Option<Conversation> {
        self.state().begun.take()
    }

    /// Pauses the thread that calls this as long as it is to. Returns false if it is to end.
    pub(super) fn obey(&self) -> bool {
        let mut state = self.state();
        while state.wish == Wish::Pause {
            state.is_paused = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_paused = false;
        state.wish == Wish::Serve
    }

    /// Waits until `socket` can be read, if there is one, for at most `longest`. Pauses meanwhile if the thread is to.
    pub(super) fn wait(&self, socket: Option<BorrowedFd<'_>>, longest: impl Into<PollTimeout>) -> Woken {
        let longest = longest.into();
        while self.obey() {
            let fds = [Some(self.wake.as_fd()), socket].into_iter().flatten();
            let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            let ready = poll(&mut fds, longest);
            match ready {
                _ if self.wake.take() => {}
                Ok(0) => return Woken::Silence,
                Err(Errno::EINTR) => {}
                // In case of an error, the caller's next call fails, too.
                _ => return Woken::Ready,
            }
        }
        Woken::End
    }
}
