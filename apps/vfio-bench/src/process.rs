//! A program whose output is waited for, and which does not outlive its owner.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vireo_eal::{Error, ErrorKind, Result};

/// Longest silence before what was waited for counts as missing.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running program. Killed on drop.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: Receiver<Vec<u8>>,
    /// What was printed, and how far it was waited for.
    text: String,
    seen: usize,
}

impl Process {
    /// Starts `command`, whose output and complaints this process reads.
    pub(super) fn start(mut command: Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let failed = |error: &io::Error| Error::io(format!("cannot start {name}"), error);
        let (mut reader, writer) = io::pipe().map_err(|error| failed(&error))?;
        let stdout = writer.try_clone().map_err(|error| failed(&error))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(writer)
            .spawn()
            .map_err(|error| failed(&error))?;
        // It holds the writing ends, and the program's end could not be seen.
        drop(command);
        let stdin = child.stdin.take();
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { name, child, stdin, output, text: String::new(), seen: 0 })
    }

    /// Types a line.
    pub(super) fn type_line(&mut self, line: &str) -> Result<()> {
        let Some(stdin) = &mut self.stdin else { return Ok(()) };
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .map_err(|error| Error::io(format!("cannot type {line:?} to {}", self.name), &error))
    }

    /// Waits until `text` is printed, behind what was waited for before; gives what came up to its end.
    pub(super) fn wait_for(&mut self, text: &str) -> Result<&str> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text[self.seen..].find(text) {
                let from = self.seen;
                self.seen += at + text.len();
                return Ok(&self.text[from..self.seen]);
            }
            let why = match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => {
                    self.text.push_str(&String::from_utf8_lossy(&bytes));
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => format!("it did not print {text:?} within {PATIENCE:?}"),
                Err(RecvTimeoutError::Disconnected) => format!("it ended without {text:?}"),
            };
            let last = self.text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing");
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("cannot measure {}", self.name),
                format!("{why}; its last line was: {}", last.trim()),
            ));
        }
    }

    /// As Ctrl-C would.
    pub(super) fn interrupt(&self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT)
            .map_err(|errno| Error::os(format!("cannot stop {}", self.name), errno))
    }

    /// Waits for the end.
    pub(super) fn reap(mut self) -> Result<()> {
        self.stdin = None;
        // The end of its output is the end of the program, and an event that can be waited for.
        let deadline = Instant::now() + PATIENCE;
        while self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok() {}
        match self.child.try_wait() {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::io(format!("cannot wait for {}", self.name), &error)),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_waited_for_piece_by_piece() {
        let mut cat = Process::start(Command::new("cat")).unwrap();
        cat.type_line("prompt> one").unwrap();
        cat.type_line("prompt> two").unwrap();
        assert_eq!(cat.wait_for("prompt>").unwrap(), "prompt>");
        assert_eq!(cat.wait_for("prompt>").unwrap(), " one\nprompt>");
        cat.interrupt().unwrap();
        let error = cat.wait_for("three").unwrap_err().to_string();
        assert!(error.contains("it ended without \"three\"; its last line was: prompt> two"), "{error}");
        cat.reap().unwrap();
    }
}
