//! Client of a telemetry socket. It is not the EAL's, so that no mistake is made at both ends, and it can misbehave.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

use crate::process::PATIENCE;

/// Path of the socket of a process with this `--file-prefix`, in the directory that stands for `/var/run`.
pub(crate) fn socket_of(run: &Path, prefix: &str) -> PathBuf {
    run.join("dpdk").join(prefix).join("dpdk_telemetry.v2")
}

/// A connected client.
#[derive(Debug)]
pub(crate) struct Telemetry(OwnedFd);

impl Telemetry {
    /// Connects, and leaves the greeting unread.
    pub(crate) fn silent(path: &Path) -> Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().try_into()?))?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        Ok(Self(fd))
    }

    /// Connects, and checks that the greeting is that of process `pid`.
    pub(crate) fn connect(path: &Path, pid: i32) -> Result<Self> {
        let client = Self::silent(path)?;
        let greeting = client.receive()?;
        ensure!(greeting["pid"] == pid && greeting["max_output_len"].is_u64(), "{greeting}");
        Ok(client)
    }

    fn receive(&self) -> Result<Value> {
        let mut message = vec![0; 64 << 10];
        let len = recv(self.0.as_raw_fd(), &mut message, MsgFlags::empty())?;
        serde_json::from_slice(&message[..len]).context("an answer is no JSON")
    }

    /// Sends bytes without waiting, and does not read the answer. Returns whether the connection took them.
    pub(crate) fn send(&self, bytes: &[u8]) -> bool {
        send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT).is_ok()
    }

    /// Returns the answer to a request.
    pub(crate) fn ask(&self, request: &str) -> Result<Value> {
        ensure!(self.send(request.as_bytes()), "cannot send {request}");
        let (name, _) = request.split_once(',').unwrap_or((request, ""));
        Ok(self.receive()?[name].take())
    }

    /// Returns a number in the answer to a request.
    pub(crate) fn number(&self, request: &str, name: &str) -> Result<u64> {
        let answer = self.ask(request)?;
        answer[name]
            .as_u64()
            .with_context(|| format!("no number {name} in the answer to {request}: {answer}"))
    }
}
