//! A connection to a frontend, and the request handler of the `vhost` crate.
//!
//! The handler has a socket of its own, to which requests are passed one by one, and from which answers go back. Where
//! another process has begun the conversation, the handler learns from requests made up here what that process's handler
//! knew, without the frontend.

use std::fmt;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};
use vhost::vhost_user::{BackendReqHandler, Error, Result};
use vireo_eal::rights;

use super::early;
use super::session::Connection;
use crate::vhost::backend::Backend;

/// Request, flags and size of the body in bytes (vhost-user, "Header").
const HEADER: usize = 3 * size_of::<u32>();
/// Protocol version, in the lower two bits of the flags.
pub(super) const VERSION: u32 = 1;

/// A request of the frontend.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Request {
    fn new(request: FrontendReq, body: &[u8]) -> Self {
        let header = [request as u32, VERSION, body.len() as u32].map(u32::to_ne_bytes);
        Self { bytes: [header.as_flattened(), body].concat(), fds: Vec::new() }
    }

    fn receive(socket: &UnixStream) -> Result<Self> {
        let mut bytes = vec![0; HEADER];
        let (read, fds) = loop {
            match rights::receive(socket, &mut bytes, "cannot receive a frontend's files") {
                Err(error) if error.errno() == Some(Errno::EINTR) => {}
                Err(error) => return Err(Error::ReqHandlerError(std::io::Error::other(error))),
                Ok((0, _)) => return Err(Error::Disconnected),
                Ok(received) => break received,
            }
        };
        let rest = |bytes: &mut [u8]| {
            let read = { socket }.read_exact(bytes);
            read.map_err(|error| match error.kind() {
                IoKind::UnexpectedEof => Error::PartialMessage,
                _ => Error::SocketBroken(error),
            })
        };
        rest(&mut bytes[read..])?;
        // The handler would lose the message, and wait for another one.
        if fds.len() > MAX_ATTACHED_FD_ENTRIES {
            return Err(Error::IncorrectFds);
        }
        // The handler refuses a longer one by its header.
        let size = bytes.last_chunk().map_or(0, |size| u32::from_ne_bytes(*size) as usize);
        if size <= MAX_MSG_SIZE {
            bytes.resize(HEADER + size, 0);
            rest(&mut bytes[HEADER..])?;
        }
        Ok(Self { bytes, fds })
    }

    fn send(self, socket: &UnixStream) -> Result<()> {
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        let sent =
            rights::send(socket, &self.bytes, &fds).map_err(|errno| Error::SocketBroken(errno.into()))?;
        { socket }.write_all(&self.bytes[sent..]).map_err(Error::SocketBroken)
    }
}

/// A conversation with one frontend. Dropping it takes the rings away from the lcores, and closes the connection if no
/// other process has it.
pub(super) struct Conversation {
    connection: Connection,
    handler: BackendReqHandler<Mutex<Backend>>,
}

impl fmt::Debug for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conversation").field("connection", &self.connection).finish_non_exhaustive()
    }
}

impl Conversation {
    /// # Errors
    /// When the process has run out of a resource.
    pub(super) fn new(socket: UnixStream, backend: Backend) -> std::io::Result<Self> {
        let (inner, ours) = UnixStream::pair()?;
        inner.set_nonblocking(true)?;
        let backend = Arc::new(Mutex::new(backend));
        let handler = BackendReqHandler::from_stream(ours, Arc::clone(&backend));
        let connection = Connection { socket: socket.into(), inner: inner.into(), backend };
        Ok(Self { connection, handler })
    }

    /// Continues a conversation in which the frontend has accepted `features` and `protocol_features`.
    ///
    /// # Errors
    /// When the process has run out of a resource, or the frontend could not have accepted them.
    pub(super) fn resume(
        socket: UnixStream,
        backend: Backend,
        features: u64,
        protocol_features: u64,
    ) -> Result<Self> {
        let mut resumed = Self::new(socket, backend).map_err(Error::SocketError)?;
        let accepted =
            [(FrontendReq::SET_PROTOCOL_FEATURES, protocol_features), (FrontendReq::SET_FEATURES, features)];
        let accepted = accepted.into_iter().filter(|(_, bits)| *bits != 0);
        let accepted = accepted.map(|(request, bits)| Request::new(request, &bits.to_ne_bytes()));
        for request in [Request::new(FrontendReq::GET_FEATURES, &[])].into_iter().chain(accepted) {
            request.send(&resumed.connection.inner)?;
            resumed.handler.handle_request()?;
        }
        resumed.answers()?;
        Ok(resumed)
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.connection.socket
    }

    pub(super) fn backend(&self) -> MutexGuard<'_, Backend> {
        self.connection.backend()
    }

    /// Receives and answers the next request.
    ///
    /// # Errors
    /// When the frontend has hung up or broken the protocol.
    pub(super) fn handle_request(&mut self) -> Result<()> {
        let request = Request::receive(self.socket())?;
        if let Some(answered) = early::handle(&request, &mut self.backend(), self.socket()) {
            return answered;
        }
        request.send(&self.connection.inner)?;
        let handled = self.handler.handle_request();
        let answers = self.answers()?;
        self.socket().write_all(&answers).map_err(Error::SocketBroken)?;
        handled
    }

    /// Takes what the handler has answered.
    fn answers(&self) -> Result<Vec<u8>> {
        let mut answers = Vec::new();
        match (&*self.connection.inner).read_to_end(&mut answers) {
            Err(error) if error.kind() != IoKind::WouldBlock => Err(Error::SocketBroken(error)),
            _ => Ok(answers),
        }
    }
}
