//! Telemetry socket, where DPDK's clients look for it: version 2 of DPDK's protocol
//! (`doc/guides/howto/telemetry.rst`). What is asked and answered is up to the program.
//!
//! Each client gets a greeting, and then an answer to each of its requests, one message each. A single thread
//! serves all clients and waits for none of them: it has no more than [`MAX_CLIENTS`] of them, one request of
//! each, and drops those that leave an answer unread.

mod client;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::args::EalArgs;
use crate::error::{Error, Result};
use crate::event::{Event, wait_for_any};
use crate::runtime;
use crate::seqpacket::{Connection, Listener};

pub use client::{TelemetryClient, sockets};

/// Maximum number of clients at a time; DPDK has the same. Another one is disconnected.
pub const MAX_CLIENTS: usize = 10;
/// Maximum length of a request in bytes. A client that sends a longer one is disconnected.
pub const MAX_REQUEST: usize = 4096;
/// Maximum length of an answer in bytes, for which clients make room.
pub const MAX_ANSWER: usize = 64 << 10;
/// How long a client may leave an answer unread.
const PATIENCE: Duration = Duration::from_secs(1);

/// Name of the socket.
const NAME: &str = "dpdk_telemetry.v2";
/// Maximum number of processes with the same `--file-prefix` that have a socket.
const INSTANCES: usize = 10;

/// Hint of all failures: the socket is not worth more.
const WITHOUT: &str = "start with --no-telemetry";

/// Socket at which a program answers requests about itself. Dropping it removes the socket.
#[derive(Debug)]
pub struct TelemetrySocket {
    listener: Listener,
    path: PathBuf,
    /// Ends [`serve`](Self::serve). A shutdown of the listener would end it for a successor, too.
    stopped: Event,
    /// Whether the socket belongs to another process: the predecessor of this process, or its successor.
    is_lent: AtomicBool,
}

impl TelemetrySocket {
    /// Creates the socket `dpdk_telemetry.v2` in DPDK's runtime directory for the `--file-prefix`. If a
    /// process of DPDK has that one, a number is appended to the name, as DPDK does (`dpdk-telemetry.py -i`).
    /// Returns `None` with `--no-telemetry` or `--in-memory`.
    ///
    /// # Errors
    /// `Permission` or `Io` if the directory or the socket cannot be created.
    pub fn new(args: &EalArgs) -> Result<Option<Self>> {
        if args.no_telemetry || args.memory.in_memory {
            return Ok(None);
        }
        let directory = runtime::dpdk_dir(&args.file_prefix);
        directory
            .and_then(|directory| Self::create_in(&directory))
            .map_err(|error| error.with_hint(WITHOUT))
            .map(Some)
    }

    /// Returns the socket at `path` of a process that has passed its `listener`. It belongs to that process until
    /// [`TelemetrySocket::take`].
    pub(crate) fn of_predecessor(listener: OwnedFd, path: PathBuf) -> Result<Self> {
        let socket = Self::of(Listener::from_fd(listener), path)?;
        socket.leave();
        Ok(socket)
    }

    /// Takes the socket from the predecessor.
    pub(crate) fn take(&self) {
        self.is_lent.store(false, Ordering::Relaxed);
    }

    /// Leaves the socket to the successor.
    pub(crate) fn leave(&self) {
        self.is_lent.store(true, Ordering::Relaxed);
    }

    fn of(listener: Listener, path: PathBuf) -> Result<Self> {
        Ok(Self { listener, path, stopped: Event::new()?, is_lent: AtomicBool::new(false) })
    }

    fn create_in(directory: &Path) -> Result<Self> {
        let mut instance = 0;
        loop {
            let suffix = if instance == 0 { String::new() } else { format!(":{instance}") };
            let path = directory.join(format!("{NAME}{suffix}"));
            match Listener::bind(&path) {
                Ok(listener) => return Self::of(listener, path),
                Err(Errno::EADDRINUSE) if instance + 1 < INSTANCES => instance += 1,
                Err(errno) => {
                    return Err(Error::os(
                        format!("cannot create the telemetry socket {}", path.display()),
                        errno,
                    ));
                }
            }
        }
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves clients until [`stop`](Self::stop). Each client gets `greeting`, and the result of `answer` for
    /// each of its requests. Both are at most [`MAX_ANSWER`] bytes long.
    pub fn serve(&self, greeting: &str, answer: impl Fn(&[u8]) -> String) {
        /// Descriptors that are polled before those of clients.
        const OWN: usize = 2;
        let mut clients: Vec<Client> = Vec::new();
        let mut request = [0; MAX_REQUEST];
        loop {
            let own = [self.listener.as_fd(), self.stopped.as_fd()];
            let mut polled = own.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).to_vec();
            polled.extend(clients.iter().map(Client::polled));
            match poll(&mut polled, timeout(&clients)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return tracing::warn!("the telemetry socket is closed: poll: {errno}"),
            }
            let ready: Vec<bool> = polled.iter().map(|fd| fd.any() == Some(true)).collect();
            if ready[1] {
                return;
            }
            let mut of_clients = ready.iter().skip(OWN);
            clients
                .retain_mut(|client| client.serve(of_clients.next() == Some(&true), &mut request, &answer));
            if ready[0] {
                match self.listener.accept() {
                    Ok(Some(connection)) if clients.len() < MAX_CLIENTS => {
                        clients.push(Client { connection, unread: Some(Unread::new(greeting.to_owned())) });
                    }
                    Ok(_) => {}
                    // Descriptors or memory are used up: the latest client makes room.
                    Err(_) if clients.pop().is_some() => {}
                    Err(errno) => return tracing::warn!("the telemetry socket is closed: accept4: {errno}"),
                }
            }
        }
    }

    /// Makes [`serve`](Self::serve) return, in all threads and for good.
    pub fn stop(&self) {
        self.stopped.signal();
    }

    /// Waits until `begin` is signaled or the socket is [stopped](Self::stop).
    pub fn wait_for(&self, begin: &Event) {
        wait_for_any([begin, &self.stopped], None);
    }
}

impl AsFd for TelemetrySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for TelemetrySocket {
    fn drop(&mut self) {
        if self.is_lent.load(Ordering::Relaxed) {
            return;
        }
        // After `--user` this fails, and the next process takes the socket over.
        let _ = std::fs::remove_file(&self.path);
        let _ = self.path.parent().map(std::fs::remove_dir);
    }
}

/// Answer that a client has not read yet.
#[derive(Debug)]
struct Unread {
    text: String,
    /// When the client is disconnected.
    until: Instant,
}

impl Unread {
    fn new(text: String) -> Self {
        Self { text, until: Instant::now() + PATIENCE }
    }
}

#[derive(Debug)]
struct Client {
    connection: Connection,
    /// Answer for which the connection had no room yet. No request is read until it has been sent.
    unread: Option<Unread>,
}

impl Client {
    fn polled(&self) -> PollFd<'_> {
        let awaited = if self.unread.is_some() { PollFlags::POLLOUT } else { PollFlags::POLLIN };
        PollFd::new(self.connection.as_fd(), awaited)
    }

    /// Reads a request and answers it, as far as this is possible without waiting. Returns false if the
    /// client is to be disconnected.
    fn serve(&mut self, is_ready: bool, request: &mut [u8], answer: impl Fn(&[u8]) -> String) -> bool {
        if is_ready && self.unread.is_none() {
            match self.connection.receive(request) {
                Ok(Some(len)) if (1..=request.len()).contains(&len) => {
                    self.unread = Some(Unread::new(answer(&request[..len])));
                }
                Ok(None) => return true,
                _ => return false,
            }
        }
        let Some(unread) = &self.unread else { return true };
        match self.connection.send(unread.text.as_bytes()) {
            Ok(true) => {
                self.unread = None;
                true
            }
            Ok(false) => Instant::now() < unread.until,
            Err(_) => false,
        }
    }
}

/// Time until the first client is to be disconnected.
fn timeout(clients: &[Client]) -> PollTimeout {
    let until = clients.iter().filter_map(|client| client.unread.as_ref()).map(|unread| unread.until).min();
    let Some(until) = until else { return PollTimeout::NONE };
    // In whole milliseconds, rounded up.
    let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// Runs `clients` while the socket in a new directory is served: the answer to a request is its length.
    pub(super) fn served(clients: impl FnOnce(&Path)) {
        let dir = tempfile::tempdir().unwrap();
        let socket = TelemetrySocket::create_in(dir.path()).unwrap();
        std::thread::scope(|scope| {
            let served = scope.spawn(|| socket.serve("hello", |request| format!("{}", request.len())));
            clients(socket.path());
            socket.stop();
            served.join().unwrap();
        });
    }

    struct Peer(Connection);

    impl Peer {
        fn new(path: &Path) -> Self {
            Self(Connection::to(path).unwrap())
        }

        /// Next message; `None` at the end of the connection.
        fn next(&self) -> Option<String> {
            let mut buffer = vec![0; MAX_ANSWER];
            loop {
                let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
                poll(&mut polled, PollTimeout::NONE).unwrap();
                match self.0.receive(&mut buffer) {
                    Ok(Some(0)) | Err(_) => return None,
                    Ok(Some(len)) => return Some(String::from_utf8(buffer[..len].to_vec()).unwrap()),
                    Ok(None) => {}
                }
            }
        }

        fn asks(&self, request: &[u8]) -> Option<String> {
            let _ = self.0.send(request);
            self.next()
        }
    }

    #[test]
    fn each_client_is_greeted_and_each_request_answered() {
        served(|path| {
            let peers = [Peer::new(path), Peer::new(path)];
            assert_eq!(peers.each_ref().map(Peer::next), [Some("hello".into()), Some("hello".into())]);
            for (peer, request) in peers.iter().zip(["/", "/ethdev/list"]) {
                assert_eq!(peer.asks(request.as_bytes()), Some(request.len().to_string()));
                assert_eq!(peer.asks(&[0xff; MAX_REQUEST]), Some(MAX_REQUEST.to_string()));
            }
        });
    }

    #[test]
    fn a_client_too_many_and_a_request_too_long_are_refused() {
        served(|path| {
            let peers: Vec<Peer> = (0..MAX_CLIENTS).map(|_| Peer::new(path)).collect();
            assert!(peers.iter().all(|peer| peer.next().is_some()));
            assert_eq!(Peer::new(path).next(), None);
            assert_eq!(peers[0].asks(&[b'/'; MAX_REQUEST + 1]), None);
            drop(peers);
            // Nobody else is disturbed, and places become free again.
            while Peer::new(path).next().is_none() {}
            for _ in 0..1000 {
                Peer::new(path).next();
            }
        });
    }

    #[test]
    fn a_client_that_reads_nothing_is_dropped_and_delays_nobody() {
        served(|path| {
            let (lazy, other) = (Peer::new(path), Peer::new(path));
            other.next();
            let (to_ended, ended) = channel();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // Until the connection has no more room, and then until it is closed.
                    loop {
                        match lazy.0.send(b"/") {
                            Ok(true) => {}
                            Ok(false) => {
                                let mut polled = [PollFd::new(lazy.0.as_fd(), PollFlags::POLLOUT)];
                                poll(&mut polled, PollTimeout::NONE).unwrap();
                            }
                            Err(_) => break,
                        }
                    }
                    to_ended.send(()).unwrap();
                });
                while ended.try_recv().is_err() {
                    assert_eq!(other.asks(b"/info"), Some("5".into()));
                }
            });
        });
    }

    #[test]
    fn a_socket_in_use_gets_a_number_and_one_of_the_dead_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let create = || TelemetrySocket::create_in(dir.path()).unwrap();
        let name = |socket: &TelemetrySocket| socket.path().file_name().unwrap().to_str().unwrap().to_owned();
        let first = create();
        let second = create();
        assert_eq!([name(&first), name(&second)], ["dpdk_telemetry.v2", "dpdk_telemetry.v2:1"]);
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(first.path()).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        drop(first);
        // What a killed process leaves.
        drop(Listener::bind(&dir.path().join(NAME)).unwrap());
        assert!(dir.path().join(NAME).exists());
        assert_eq!(name(&create()), "dpdk_telemetry.v2");
        drop(second);
        assert!(!dir.path().exists(), "an empty directory is left behind");
    }
}
