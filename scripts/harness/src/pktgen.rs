//! pktgen, judged by the JSON that it prints at its end.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::case::Context;
use crate::process::{PATIENCE, Process};

/// Figures that must be 0 even where frames may be lost or overtaken.
const WRONG: [&str; 4] = ["duplicates", "wrong_address", "corrupt", "strays"];

/// A running pktgen.
#[derive(Debug)]
pub(crate) struct Pktgen(pub(crate) Process);

impl Pktgen {
    /// Starts pktgen; `arguments` are the EAL's, `--`, and pktgen's own.
    pub(crate) fn spawn(context: &Context, arguments: &str) -> Result<Self> {
        let mut command = Command::new(context.program("pktgen"));
        command.args(arguments.split_whitespace()).arg("--json");
        Ok(Self(Process::spawn(context, "pktgen", &mut command)?))
    }

    /// Waits for the end of pktgen, up to `limit`.
    pub(crate) fn wait(mut self, limit: Duration) -> Result<Stream> {
        let line = self.0.line(limit)?;
        let code = self.0.wait(PATIENCE)?;
        ensure!(code <= 1, "pktgen exited with {code}");
        let line = line.context("pktgen printed nothing")?;
        Ok(Stream { complete: code == 0, figures: serde_json::from_str(&line)? })
    }

    /// Ends pktgen early.
    pub(crate) fn stop(self) -> Result<Stream> {
        self.0.signal(Signal::SIGINT)?;
        self.wait(PATIENCE)
    }
}

/// Result of a stream.
#[derive(Debug)]
pub(crate) struct Stream {
    /// Whether every frame came back once, in order, as it was sent.
    pub(crate) complete: bool,
    /// All figures.
    pub(crate) figures: Value,
}

impl Stream {
    /// Figure by its name; 0 if there is none.
    pub(crate) fn figure(&self, name: &str) -> u64 {
        self.figures[name].as_u64().unwrap_or_default()
    }

    /// Counter of a port by its name; 0 if there is none.
    pub(crate) fn counter(&self, port: usize, name: &str) -> u64 {
        self.figures["counters"][port][name].as_u64().unwrap_or_default()
    }

    /// Checks that `sent` frames were sent and `received` came back, and nothing else.
    pub(crate) fn came_back(&self, sent: u64, received: u64) -> Result<()> {
        let is = (self.figure("sent"), self.figure("received"));
        ensure!(
            is == (sent, received),
            "pktgen sent {} and received {}, not {sent} and {received}",
            is.0,
            is.1
        );
        self.expect_in_order()
    }

    /// Checks that every frame that came back is one that was sent, and that no frame overtook another.
    pub(crate) fn expect_in_order(&self) -> Result<()> {
        self.intact()?;
        self.is_zero("reordered")
    }

    /// Checks that every frame that came back is one that was sent. This is for a stream that flows while a
    /// NIC of the guest starts or lacks buffers: QEMU queues frames for a NIC that cannot receive, and
    /// `qemu_net_queue_send` lets the first frame that the NIC takes overtake them.
    pub(crate) fn intact(&self) -> Result<()> {
        WRONG.iter().try_for_each(|name| self.is_zero(name))
    }

    fn is_zero(&self, name: &str) -> Result<()> {
        ensure!(self.figure(name) == 0, "pktgen reports {name} = {}", self.figure(name));
        Ok(())
    }
}
