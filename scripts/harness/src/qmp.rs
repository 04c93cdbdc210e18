//! QMP, QEMU's monitor for programs, which answers every command and reports events
//! (docs/interop/qmp-spec.rst).

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// Time limit for QEMU to answer a command.
const ANSWER: Duration = Duration::from_secs(10);

/// Connection to a QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: UnixStream,
    lines: Lines<BufReader<UnixStream>>,
    /// Events that QEMU reported before an answer.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Opens the QMP session with the monitor at the other end of `stream`.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let lines = BufReader::new(stream.try_clone()?).lines();
        let mut qmp = Self { stream, lines, events: VecDeque::new() };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command of the human monitor, and returns its output.
    pub(crate) fn command(&mut self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().replace('\r', ""))
    }

    /// Executes a command, and returns its answer.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        writeln!(self.stream, "{}", json!({ "execute": command, "arguments": arguments }))?;
        let until = Instant::now() + ANSWER;
        loop {
            let answer = self.message(until).with_context(|| format!("QEMU did not answer {command}"))?;
            match (answer.get("return"), answer.get("error")) {
                (Some(value), _) => return Ok(value.clone()),
                (_, Some(error)) => bail!("{command} {arguments}: {error}"),
                // The greeting is neither an answer nor an event.
                _ if answer.get("event").is_some() => self.events.push_back(answer),
                _ => {}
            }
        }
    }

    /// Reads events up to the first one for which `wanted` is true; `what` describes that event in errors.
    pub(crate) fn await_event(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let until = Instant::now() + limit;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.message(until).with_context(|| format!("QEMU did not report {what}"))?,
            };
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    fn message(&mut self, until: Instant) -> Result<Value> {
        let left = until.saturating_duration_since(Instant::now());
        self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let line = self.lines.next().context("QEMU closed the connection")??;
        Ok(serde_json::from_str(&line)?)
    }
}
