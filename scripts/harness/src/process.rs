//! A program under test: its output, its exit, and its end with the case.

use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{Context, read};
use crate::host::stacks;

/// How long a case waits for a program.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How long a script has to clean up.
pub(crate) const GRACE: Duration = Duration::from_secs(10);

/// Programs of a case that have been started and not dropped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Started(Arc<Mutex<Vec<i32>>>);

impl Started {
    /// The programs and all processes that they started.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let programs = self.programs().clone();
        programs
            .into_iter()
            .flat_map(|program| [vec![program], stacks::descendants(program)].concat())
            .collect()
    }

    fn programs(&self) -> MutexGuard<'_, Vec<i32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A program that was started. Dropping this value kills it, with all processes that it started.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    pid: Pid,
    /// Programs of the case; this one is among them.
    started: Started,
    exit: Receiver<std::io::Result<ExitStatus>>,
    status: Option<ExitStatus>,
    lines: Receiver<String>,
    stdout: PathBuf,
    stderr: PathBuf,
    /// Time from SIGTERM to SIGKILL.
    grace: Duration,
}

impl Process {
    /// Starts `command`. Its output goes to `NAME.out` and `NAME.err` in the case's directory. Lines of
    /// standard output can also be awaited.
    pub(crate) fn spawn(context: &Context, name: &str, command: &mut Command) -> Result<Self> {
        let (name, stdout, stderr) = unused(context, name);
        let errors = File::create(&stderr)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let mut child =
            command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let (to_lines, lines) = channel();
        let output = child.stdout.take().context("the program has no standard output")?;
        let mut copy = File::create(&stdout)?;
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let _ = copy.write_all(&line);
                // Lines that no case waits for are read here too, because a full pipe would stop the program.
                let _ = to_lines.send(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned());
                line.clear();
            }
        });
        Ok(Self::watched(context, name, child, lines, (stdout, stderr)))
    }

    /// Starts `command` with a standard output of the caller's choice.
    pub(crate) fn spawn_to(
        context: &Context,
        name: &str,
        command: &mut Command,
        stdout: Stdio,
    ) -> Result<Self> {
        let (name, out, stderr) = unused(context, name);
        let errors = File::create(&stderr)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Self::watched(context, name, child, channel().1, (out, stderr)))
    }

    fn watched(
        context: &Context,
        name: String,
        mut child: std::process::Child,
        lines: Receiver<String>,
        (stdout, stderr): (PathBuf, PathBuf),
    ) -> Self {
        let pid = Pid::from_raw(child.id().cast_signed());
        let started = context.started.clone();
        started.programs().push(pid.as_raw());
        let (to_exit, exit) = channel();
        std::thread::spawn(move || to_exit.send(child.wait()));
        Self { name, pid, started, exit, status: None, lines, stdout, stderr, grace: Duration::ZERO }
    }

    /// Makes the drop ask the program to end and clean up before it is killed.
    pub(crate) fn gracefully(mut self) -> Self {
        self.grace = GRACE;
        self
    }

    /// Process id of the program.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Standard error of the program so far.
    pub(crate) fn stderr(&self) -> Result<String> {
        read(&self.stderr)
    }

    /// Standard output of the program, complete once it has ended.
    pub(crate) fn stdout(&self) -> Result<String> {
        read(&self.stdout)
    }

    /// Next line of standard output, or `None` at its end.
    pub(crate) fn line(&self, limit: Duration) -> Result<Option<String>> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                let waits = stacks::of_process(self.pid());
                bail!("{} printed no further line; its stacks:\n{waits}", self.name)
            }
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        if self.status.is_some() {
            bail!("{} has already ended", self.name);
        }
        kill(self.pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits for the end of the program. The exit code is that of a shell: 128 plus the number of the signal
    /// that ended the program.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<i32> {
        let status = match self.status {
            Some(status) => status,
            None => match self.exit.recv_timeout(limit) {
                Ok(status) => *self.status.insert(status?),
                Err(_) => {
                    let waits = stacks::of_process(self.pid());
                    bail!("{} did not end; its stacks:\n{waits}", self.name)
                }
            },
        };
        status
            .code()
            .or_else(|| status.signal().map(|signal| 128 + signal))
            .ok_or_else(|| anyhow!("{} ended with {status}", self.name))
    }

    /// Whether the program has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.status = self.status.or_else(|| self.exit.try_recv().ok().and_then(Result::ok));
        self.status.is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.grace.is_zero() && !self.has_ended() {
            let _ = kill(self.pid, Signal::SIGTERM);
            self.status = self.exit.recv_timeout(self.grace).ok().and_then(Result::ok);
        }
        if !self.has_ended() {
            stacks::signal_all(&stacks::descendants(self.pid()), Signal::SIGKILL);
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = self.exit.recv_timeout(PATIENCE);
        }
        let pid = self.pid();
        self.started.programs().retain(|program| *program != pid);
    }
}

/// Returns a name that no earlier program of the case has, and its files.
fn unused(context: &Context, name: &str) -> (String, PathBuf, PathBuf) {
    let mut number = 1;
    loop {
        let name = if number == 1 { name.to_owned() } else { format!("{name}-{number}") };
        let stderr = context.path(&format!("{name}.err"));
        if !stderr.exists() {
            let stdout = context.path(&format!("{name}.out"));
            return (name, stdout, stderr);
        }
        number += 1;
    }
}

/// Output of a program, and its exit code.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Exit code, as a shell reports it.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Ended {
    /// Fails unless the exit code is `code`.
    pub(crate) fn expect(self, code: i32) -> Result<Self> {
        match self.code == code {
            true => Ok(self),
            false => Err(anyhow!("exit code {}, not {code}", self.code)),
        }
    }
}

/// Runs `command` to its end, within `limit`.
pub(crate) fn run_for(
    context: &Context,
    name: &str,
    command: &mut Command,
    limit: Duration,
) -> Result<Ended> {
    let mut process = Process::spawn(context, name, command)?;
    let until = Instant::now() + limit;
    let late = || format!("{name} did not end within {} s", limit.as_secs());
    // Read the output first: it is complete when the thread that copies it ends.
    while process.line(until.saturating_duration_since(Instant::now())).with_context(late)?.is_some() {}
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
    let code = process.wait(left).with_context(late)?;
    Ok(Ended { code, stdout: process.stdout()?, stderr: process.stderr()? })
}

/// Runs `command` to its end, within [`PATIENCE`].
pub(crate) fn run(context: &Context, name: &str, command: &mut Command) -> Result<Ended> {
    run_for(context, name, command, PATIENCE)
}

/// Polls `done` until it is true, where the kernel offers no event to wait for.
pub(crate) fn await_that(what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + limit;
    while !done() {
        if Instant::now() > until {
            bail!("timed out after {} s waiting for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{Outcome, run_once};

    /// Runs `script`, and drops it once it has printed the pid of a process that it started. Returns whether
    /// the script cleaned up.
    fn dropped(script: &'static str, graceful: bool) -> bool {
        let (to_cleaned, cleaned) = channel();
        let (name, nowhere) = ("dropped".into(), std::path::Path::new("/"));
        let report = run_once(name, false, nowhere, &Started::default(), move |context| {
            let mark = context.path("cleaned");
            let mut command = Command::new("sh");
            command.args(["-c", script]).env("MARK", &mark);
            let program = Process::spawn(context, "script", &mut command)?;
            let started: i32 = program.line(PATIENCE)?.context("the script printed nothing")?.parse()?;
            drop(if graceful { program.gracefully() } else { program });
            let until = Instant::now() + PATIENCE;
            loop {
                let status = std::fs::read_to_string(format!("/proc/{started}/status")).unwrap_or_default();
                if status.is_empty() || status.contains("State:\tZ") {
                    break;
                }
                anyhow::ensure!(Instant::now() < until, "the process that the script started still runs");
                std::thread::sleep(Duration::from_millis(5));
            }
            to_cleaned.send(mark.exists())?;
            Ok(())
        });
        assert!(matches!(report.outcome, Outcome::Passed), "{report:?}");
        cleaned.recv().unwrap()
    }

    #[test]
    fn what_a_program_started_ends_with_it() {
        // The trap comes first: the pid may be printed before the script goes on.
        let script =
            "trap 'kill $!; touch $MARK; exit' TERM; setsid sh -c 'echo $$; exec sleep 1000' & wait; wait";
        assert!(!dropped(script, false));
        assert!(dropped(script, true));
    }
}
