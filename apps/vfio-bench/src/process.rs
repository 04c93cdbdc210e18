//! A child process whose output can be waited for, and which does not outlive its owner.

use std::env;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vireo_eal::clock::Tsc;
use vireo_eal::lcore::pin_to;
use vireo_eal::{Error, ErrorKind, Result};

/// Longest wait for a text before it counts as missing.
const PATIENCE: Duration = Duration::from_secs(20);

/// Returns the path of Vireo's l2fwd: `asked`, or the one next to this program.
pub(crate) fn l2fwd(asked: Option<&Path>) -> Result<PathBuf> {
    let beside = || {
        let own = env::current_exe().map_err(|error| Error::io("cannot find this program", &error))?;
        Ok(own.with_file_name("vireo-l2fwd"))
    };
    asked.map_or_else(beside, |path| Ok(path.to_owned()))
}

/// A running program, killed on drop.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: Receiver<Chunk>,
    /// Output so far. `seen` is how far it was waited for.
    text: String,
    seen: usize,
    /// Where each chunk ends in `text`, and when it arrived, in TSC ticks.
    arrivals: Vec<(usize, u64)>,
    started: u64,
}

/// Output that was read at once.
#[derive(Debug)]
struct Chunk {
    ticks: u64,
    bytes: Vec<u8>,
}

impl Process {
    /// Starts `command`. This process reads its standard output and standard error.
    pub(crate) fn start(command: Command) -> Result<Self> {
        Self::start_read_on(command, None)
    }

    /// Like [`start`](Self::start), but reads the output on CPU `reader`, where no busy poll delays its time
    /// stamp.
    pub(crate) fn start_read_on(mut command: Command, reader: Option<usize>) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let failed = |error: &io::Error| Error::io(format!("cannot start {name}"), error);
        let (mut pipe, writer) = io::pipe().map_err(|error| failed(&error))?;
        let stdout = writer.try_clone().map_err(|error| failed(&error))?;
        let started = Tsc::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(writer)
            .spawn()
            .map_err(|error| failed(&error))?;
        // `command` holds the write ends of the pipe. As long as it does, the end of the output cannot be
        // detected.
        drop(command);
        let stdin = child.stdin.take();
        let (sender, output) = channel();
        thread::spawn(move || {
            // If the thread cannot be pinned, it still reads, only later.
            let _ = reader.map(pin_to);
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = pipe.read(&mut bytes) {
                let chunk = Chunk { ticks: Tsc::now(), bytes: bytes[..len].to_vec() };
                if sender.send(chunk).is_err() {
                    return;
                }
            }
        });
        let (text, seen, arrivals) = (String::new(), 0, Vec::new());
        Ok(Self { name, child, stdin, output, text, seen, arrivals, started })
    }

    /// Writes a line to the standard input of the program.
    pub(crate) fn type_line(&mut self, line: &str) -> Result<()> {
        let Some(stdin) = &mut self.stdin else { return Ok(()) };
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .map_err(|error| Error::io(format!("cannot send {line:?} to {}", self.name), &error))
    }

    /// Waits until `text` is printed after what was waited for before. Returns the output up to the end of
    /// `text`.
    pub(crate) fn wait_for(&mut self, text: &str) -> Result<&str> {
        self.wait_for_any(&[text])
    }

    /// Like [`wait_for`](Self::wait_for), for the first of several texts.
    fn wait_for_any(&mut self, texts: &[&str]) -> Result<&str> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let from = self.seen;
            let ends = texts.iter().filter_map(|text| Some(self.text[from..].find(text)? + text.len()));
            if let Some(end) = ends.min() {
                self.seen += end;
                return Ok(&self.text[from..self.seen]);
            }
            let why = match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(chunk) => {
                    self.text.push_str(&String::from_utf8_lossy(&chunk.bytes));
                    self.arrivals.push((self.text.len(), chunk.ticks));
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {
                    format!("it did not print {} within {PATIENCE:?}", either(texts))
                }
                Err(RecvTimeoutError::Disconnected) => format!("it ended without printing {}", either(texts)),
            };
            let last = self.text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing");
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("cannot measure {}", self.name),
                format!("{why}; its last line was: {}", last.trim()),
            ));
        }
    }

    /// TSC ticks when the program was started.
    pub(crate) fn started(&self) -> u64 {
        self.started
    }

    /// Waits for the first of `texts`, like [`wait_for`](Self::wait_for). Returns when its end arrived, in
    /// TSC ticks.
    pub(crate) fn arrival_of(&mut self, texts: &[&str]) -> Result<u64> {
        self.wait_for_any(texts)?;
        let chunk = self.arrivals.partition_point(|(end, _)| *end < self.seen);
        Ok(self.arrivals.get(chunk).map_or(self.started, |(_, ticks)| *ticks))
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub(crate) fn interrupt(&self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT)
            .map_err(|errno| Error::os(format!("cannot stop {}", self.name), errno))
    }

    /// Waits for the program to end.
    pub(crate) fn reap(mut self) -> Result<()> {
        self.stdin = None;
        // The output ends when the program does, and unlike the program it can be waited for with a timeout.
        let deadline = Instant::now() + PATIENCE;
        while self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok() {}
        match self.child.try_wait() {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::io(format!("cannot wait for {}", self.name), &error)),
        }
    }
}

fn either(texts: &[&str]) -> String {
    texts.iter().map(|text| format!("{text:?}")).collect::<Vec<_>>().join(" or ")
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if the program has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_waited_for_piece_by_piece() {
        // A test that runs in the background of a shell ignores SIGINT, and so would the program it starts.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT", "cat"]);
        let mut cat = Process::start(command).unwrap();
        cat.type_line("prompt> one").unwrap();
        cat.type_line("prompt> two").unwrap();
        assert_eq!(cat.wait_for("prompt>").unwrap(), "prompt>");
        assert_eq!(cat.wait_for("prompt>").unwrap(), " one\nprompt>");
        cat.type_line("late prompt").unwrap();
        let arrival = cat.arrival_of(&["prompt", "late"]).unwrap();
        assert!(arrival > cat.started());
        cat.interrupt().unwrap();
        let error = cat.wait_for("three").unwrap_err().to_string();
        assert!(
            error.contains("it ended without printing \"three\"; its last line was: late prompt"),
            "{error}"
        );
        cat.reap().unwrap();
    }
}
