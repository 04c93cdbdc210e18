//! l2fwd, watched through the events that it prints with `--json`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::case::Context;
use crate::process::{PATIENCE, Process};

/// Part of the line that a start prints if the previous run was killed.
const RECOVERED: &str = "ended uncleanly, recovered";

/// A running l2fwd.
#[derive(Debug)]
pub(crate) struct L2fwd {
    /// Process of l2fwd.
    pub(crate) process: Process,
    events: Vec<Value>,
    patience: Duration,
}

/// How l2fwd is started.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    under: Vec<String>,
    arguments: Vec<String>,
    environment: Vec<(&'static str, PathBuf)>,
    patience: Duration,
}

impl Start {
    /// Creates a start; `arguments` are the EAL's, `--`, and l2fwd's own.
    pub(crate) fn new(arguments: impl AsRef<str>) -> Self {
        Self {
            under: Vec::new(),
            arguments: arguments.as_ref().split_whitespace().map(Into::into).collect(),
            environment: Vec::new(),
            patience: PATIENCE,
        }
    }

    /// Starts l2fwd through another program, such as strace, that keeps its pid.
    pub(crate) fn under<S: Into<String>>(mut self, command: impl IntoIterator<Item = S>) -> Self {
        self.under = command.into_iter().map(Into::into).collect();
        self
    }

    /// Sets an environment variable of l2fwd.
    pub(crate) fn environment(mut self, name: &'static str, value: &Path) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// Adds arguments of l2fwd's own.
    pub(crate) fn with(mut self, arguments: &str) -> Self {
        self.arguments.extend(arguments.split_whitespace().map(Into::into));
        self
    }

    /// Sets how long to wait for an event.
    pub(crate) fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Builds the command line.
    pub(crate) fn command(&self, context: &Context) -> Command {
        let program = context.program("l2fwd").to_string_lossy().into_owned();
        let mut line = self.under.iter().cloned().chain([program]);
        let mut command = Command::new(line.next().unwrap_or_default());
        command.args(line);
        if !self.arguments.iter().any(|word| word == "--file-prefix") {
            command.args(["--file-prefix", "fwd"]);
        }
        command.args(&self.arguments).arg("--json").envs(self.environment.iter().cloned());
        command
    }

    /// Starts l2fwd.
    pub(crate) fn spawn(&self, context: &Context) -> Result<L2fwd> {
        let process = Process::spawn(context, "l2fwd", &mut self.command(context))?;
        Ok(L2fwd { process, events: Vec::new(), patience: self.patience })
    }

    /// Starts l2fwd, which must exit with `code` after one line with `why`.
    pub(crate) fn refused(&self, context: &Context, code: i32, why: &str) -> Result<()> {
        let ended = self.spawn(context)?.wait()?;
        let said = ended.stderr.trim_end();
        ensure!(
            ended.code == code && said.contains(why) && said.lines().count() == 1,
            "exit code {}: {said}",
            ended.code
        );
        Ok(())
    }

    /// Starts l2fwd, and returns when it forwards.
    pub(crate) fn forwarding(&self, context: &Context) -> Result<L2fwd> {
        let mut l2fwd = self.spawn(context)?;
        l2fwd.await_event("that it forwards", |event| event["event"] == "forwarding")?;
        Ok(l2fwd)
    }
}

impl L2fwd {
    /// Reads events up to the first one for which `wanted` is true.
    pub(crate) fn await_event(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        let until = Instant::now() + self.patience;
        let seconds = self.patience.as_secs();
        let late = || format!("l2fwd did not report {what} within {seconds} s");
        while let Some(line) =
            self.process.line(until.saturating_duration_since(Instant::now())).with_context(late)?
        {
            self.keep(&line).with_context(|| format!("l2fwd printed '{line}'"))?;
            if self.events.last().is_some_and(&wanted) {
                return Ok(());
            }
        }
        bail!("l2fwd ended without reporting {what}")
    }

    /// Keeps an event. Of consecutive periods without another event, only the latest is kept, because a soak
    /// prints them for hours.
    fn keep(&mut self, line: &str) -> serde_json::Result<()> {
        let event: Value = serde_json::from_str(line)?;
        let is_periodic = |event: &Value| event["event"] == "statistics" || event["event"] == "counters";
        // A period begins with statistics, and counters follow.
        if event["event"] == "statistics" {
            while self.events.pop_if(|last| is_periodic(last)).is_some() {}
        }
        self.events.push(event);
        Ok(())
    }

    /// Latest statistics of each port in l2fwd's output up to now.
    pub(crate) fn latest_statistics(&mut self) -> Option<&Vec<Value>> {
        while let Ok(Some(line)) = self.process.line(Duration::ZERO) {
            let _ = self.keep(&line);
        }
        self.events
            .iter()
            .rfind(|event| event["event"] == "statistics")
            .and_then(|event| event["ports"].as_array())
    }

    /// Reads events up to statistics in which `wanted` is true for a port.
    pub(crate) fn await_statistics(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        self.await_event(what, |event| {
            event["ports"].as_array().is_some_and(|ports| ports.iter().any(&wanted))
        })
    }

    /// Waits until port 0 has received packets.
    pub(crate) fn await_traffic(&mut self) -> Result<()> {
        self.await_statistics("that it received packets", |port| {
            port["port"] == 0 && port["received"].as_u64().is_some_and(|count| count > 0)
        })
    }

    /// Waits until `port` enters `state`.
    pub(crate) fn await_state(&mut self, port: usize, state: &str) -> Result<()> {
        self.await_event(&format!("that port {port} is {state}"), |event| {
            event["event"] == "port_state" && event["port"] == port && event["state"] == state
        })
    }

    /// Starts `successor`, which takes the place of this l2fwd. Returns it when it forwards, and the time in microseconds
    /// in which none of both polled. This l2fwd must end in order.
    pub(crate) fn replace(self, context: &Context, successor: &Start) -> Result<(Self, f64)> {
        let mut next = successor.spawn(context)?;
        next.await_event("that it took over", |event| event["event"] == "took_over")?;
        let gap = next.events.last().and_then(|event| event["gap_us"].as_f64()).context("no gap")?;
        let ended = self.wait()?;
        ensure!(ended.code == 0, "the predecessor exited with {}", ended.code);
        ensure!(!ended.warns(), "the predecessor printed warnings or errors");
        ensure!(
            ended.event("handed_over").is_ok()
                && ended.events.last().is_some_and(|event| event["event"] == "end"),
            "the predecessor did not say that it handed over and ended"
        );
        Ok((next, gap))
    }

    /// Sends `signal`, and waits for the end of l2fwd.
    pub(crate) fn end(self, signal: Signal) -> Result<Ended> {
        self.process.signal(signal)?;
        self.wait()
    }

    /// Waits for the end of l2fwd.
    pub(crate) fn wait(mut self) -> Result<Ended> {
        let until = Instant::now() + self.patience;
        while let Some(line) = self.process.line(until.saturating_duration_since(Instant::now()))? {
            // A killed process may leave half a line.
            let _ = self.keep(&line);
        }
        let code = self.process.wait(PATIENCE)?;
        Ok(Ended { code, stderr: self.process.stderr()?, events: self.events })
    }

    /// Kills l2fwd.
    pub(crate) fn kill(self) -> Result<()> {
        let ended = self.end(Signal::SIGKILL)?;
        ensure!(ended.code == 137, "l2fwd exited with {}", ended.code);
        Ok(())
    }

    /// Ends l2fwd with SIGINT. It must exit with 0 after its last event, without a complaint on standard
    /// error.
    pub(crate) fn stop(self) -> Result<Ended> {
        self.stop_by(Signal::SIGINT)
    }

    /// As [`L2fwd::stop`], with another signal.
    pub(crate) fn stop_by(self, signal: Signal) -> Result<Ended> {
        let ended = self.stop_complaining(signal)?;
        ensure!(ended.complaints().is_empty(), "l2fwd printed warnings or errors");
        Ok(ended)
    }

    /// As [`L2fwd::stop`], where the log has more than warnings and errors.
    pub(crate) fn stop_talking(self) -> Result<Ended> {
        let ended = self.stop_complaining(Signal::SIGINT)?;
        ensure!(!ended.warns(), "l2fwd printed warnings or errors");
        Ok(ended)
    }

    /// As [`L2fwd::stop`], with `signal`, where complaints are expected.
    pub(crate) fn stop_complaining(self, signal: Signal) -> Result<Ended> {
        let ended = self.end(signal)?;
        ensure!(ended.code == 0, "l2fwd exited with {}", ended.code);
        ensure!(
            ended.events.last().is_some_and(|event| event["event"] == "end"),
            "l2fwd's last event is not its end"
        );
        Ok(ended)
    }

    /// Whether l2fwd reported at its start that it recovered from a killed run: from that of process `pid`,
    /// if given.
    pub(crate) fn recovered_from(&self, pid: Option<i32>) -> Result<bool> {
        let pid = pid.map(|pid| format!("(pid {pid})")).unwrap_or_default();
        Ok(self.process.stderr()?.lines().any(|line| line.contains(RECOVERED) && line.contains(&pid)))
    }
}

/// Result of an l2fwd that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Exit code, as a shell reports it.
    pub(crate) code: i32,
    /// Standard error.
    pub(crate) stderr: String,
    /// Events that l2fwd printed.
    pub(crate) events: Vec<Value>,
}

impl Ended {
    /// Lines of standard error, except the one about recovery from a killed run.
    pub(crate) fn complaints(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| !line.contains(RECOVERED)).collect()
    }

    /// Whether the log has warnings or errors.
    pub(crate) fn warns(&self) -> bool {
        self.complaints().iter().any(|line| line.contains("warning") || line.contains("error"))
    }

    /// Checks that `port` was opened in `mode`, and that `why` is part of the reason.
    pub(crate) fn opened(&self, port: usize, mode: &str, why: &str) -> Result<()> {
        let of_port = |event: &&Value| event["event"] == "open" && event["port"] == port;
        let open = self.events.iter().find(of_port).context("the port was not opened")?;
        let said = open["why"].as_str().unwrap_or_default();
        ensure!(
            open["mode"] == mode && said.contains(why),
            "port {port} is in mode {}: {said}",
            open["mode"]
        );
        Ok(())
    }

    /// First event named `name`.
    pub(crate) fn event(&self, name: &str) -> Result<&Value> {
        self.events.iter().find(|event| event["event"] == name).with_context(|| format!("no event '{name}'"))
    }

    /// Last statistics of `port`: sent, received and dropped.
    pub(crate) fn counts(&self, port: usize) -> Result<[u64; 3]> {
        let statistics = self.events.iter().rfind(|event| event["event"] == "statistics");
        let ports = statistics.and_then(|event| event["ports"].as_array()).context("no statistics")?;
        let counts = ports.iter().find(|of| of["port"] == port).context("no statistics of the port")?;
        Ok(["sent", "received", "dropped"].map(|name| counts[name].as_u64().unwrap_or_default()))
    }

    /// Checks that the last statistics of `port` are `sent`, `received` and none dropped.
    pub(crate) fn counted(&self, port: usize, sent: u64, received: u64) -> Result<()> {
        let counts = self.counts(port)?;
        ensure!(counts == [sent, received, 0], "port {port} counted {counts:?}, not [{sent}, {received}, 0]");
        Ok(())
    }

    /// Final value of a counter of `port`, by its name.
    pub(crate) fn counter(&self, port: usize, name: &str) -> Result<u64> {
        let of_port = |event: &&Value| event["event"] == "counters" && event["port"] == port;
        let counters = self.events.iter().rfind(of_port).context("the port counted nothing")?;
        counters["counters"][name].as_u64().with_context(|| format!("no counter {name}"))
    }
}
