//! The other end of a telemetry socket: a client of any process, DPDK's included.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{NAME, PATIENCE};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime;
use crate::seqpacket::Connection;

/// Connection to a telemetry socket, of DPDK's processes too.
#[derive(Debug)]
pub struct TelemetryClient {
    connection: Connection,
    path: PathBuf,
    greeting: String,
}

impl TelemetryClient {
    /// Connects to the socket at `path`, and receives the greeting.
    ///
    /// # Errors
    /// `Unavailable` if no process listens there or answers within a second; `Permission`.
    pub fn connect(path: &Path) -> Result<Self> {
        let failed = |errno| match errno {
            Errno::ECONNREFUSED | Errno::ENOENT => failure(path, errno).because("no process listens on it"),
            _ => failure(path, errno),
        };
        let connection = Connection::to(path).map_err(failed)?;
        let mut client = Self { connection, path: path.to_owned(), greeting: String::new() };
        client.greeting = client.receive()?;
        Ok(client)
    }

    /// Returns the greeting, an object in JSON.
    pub fn greeting(&self) -> &str {
        &self.greeting
    }

    /// Returns the answer to a request, an object in JSON.
    ///
    /// # Errors
    /// `Unavailable` if the process has ended or does not answer within a second.
    pub fn ask(&self, request: &str) -> Result<String> {
        match self.connection.send(request.as_bytes()) {
            Ok(true) => self.receive(),
            Ok(false) => Err(failure(&self.path, Errno::EAGAIN)),
            Err(errno) => Err(failure(&self.path, errno)),
        }
    }

    fn receive(&self) -> Result<String> {
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        let polled = poll(&mut [PollFd::new(self.connection.as_fd(), PollFlags::POLLIN)], timeout);
        let mut message = vec![0; LONGEST];
        match polled.and_then(|_| self.connection.receive(&mut message)) {
            Ok(Some(0)) => Err(failure(&self.path, Errno::ECONNRESET)),
            Ok(Some(len)) => {
                message.truncate(len);
                Ok(String::from_utf8_lossy(&message).into_owned())
            }
            Ok(None) => Err(failure(&self.path, Errno::ETIMEDOUT)),
            Err(errno) => Err(failure(&self.path, errno)),
        }
    }
}

/// Longest message that a client accepts, in bytes: more than any process is known to send.
const LONGEST: usize = 1 << 20;

fn failure(path: &Path, errno: Errno) -> Error {
    let error = Error::os(format!("cannot ask {}", path.display()), errno);
    match errno {
        Errno::EACCES | Errno::EPERM => error,
        _ => error.with_kind(ErrorKind::Unavailable),
    }
}

/// Returns the telemetry sockets that this user's processes have, those of DPDK among them.
///
/// # Errors
/// `Permission` or `Io` if the directory with them cannot be read.
pub fn sockets() -> Result<Vec<PathBuf>> {
    let base = runtime::dpdk_base();
    let entries = |dir: &Path| -> io::Result<Vec<PathBuf>> {
        match std::fs::read_dir(dir) {
            Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(Vec::new())
            }
            Err(error) => Err(error),
        }
    };
    let failed = |error: &io::Error| Error::io(format!("cannot read {}", base.display()), error);
    let mut found = Vec::new();
    for prefix in entries(&base).map_err(|error| failed(&error))? {
        // Directories of other users, in /tmp.
        found.extend(entries(&prefix).unwrap_or_default());
    }
    let is_socket = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix(NAME).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
    };
    found.retain(is_socket);
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::tests::served;
    use super::*;
    use crate::seqpacket::Listener;

    #[test]
    fn a_client_says_why_it_gets_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let error = TelemetryClient::connect(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().ends_with("ENOENT: no process listens on it"), "{error}");
        let mut client = None;
        served(|path| {
            let connected = TelemetryClient::connect(path).unwrap();
            assert_eq!((connected.greeting(), connected.ask("/info").unwrap()), ("hello", "5".into()));
            client = Some(connected);
        });
        let error = client.unwrap().ask("/info").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        // Nobody serves this one.
        let _listener = Listener::bind(&path).unwrap();
        let error = TelemetryClient::connect(&path).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ETIMEDOUT));
    }
}
