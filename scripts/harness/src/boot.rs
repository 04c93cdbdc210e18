//! Host side of a boot: starts the guest with the agent, sends it cases, and collects stacks from a guest
//! that hangs.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::agent::{Answer, PORT, Request};
use crate::case::{Report, skip, skipped_by};
use crate::guest::Boot;
use crate::host::stacks;
use crate::qmp::Qmp;
use crate::tap::Progress;

/// Time limit for building the guest's programs, and a kernel that is not in the cache.
const PREPARE: Duration = Duration::from_secs(3600);
/// Time limit from QEMU's start to the agent's first message, on a busy machine without KVM.
const START: Duration = Duration::from_secs(180);
/// Time limit from the last case to the end of the guest.
const END: Duration = Duration::from_secs(60);
/// Time without output after which a console or a lab is considered finished.
const SILENCE: Duration = Duration::from_secs(2);
/// Lines of the kernel's log that are reported after a hang.
const LOG_LINES: usize = 60;

/// Settings of all boots.
#[derive(Clone, Debug)]
pub(crate) struct Lab {
    /// Path of the checkout.
    pub(crate) repo: PathBuf,
    /// Options of `lab run` for all boots.
    pub(crate) options: Vec<String>,
    /// Whether cases run in full (`--full`).
    pub(crate) full: bool,
}

/// A guest that runs cases.
#[derive(Debug)]
pub(crate) struct Session {
    lab: Child,
    dir: TempDir,
    host: UnixStream,
    answers: Receiver<Answer>,
    /// Release of the guest's kernel.
    pub(crate) release: String,
}

/// Why a request has no report.
#[derive(Debug)]
pub(crate) enum Lost {
    /// The request exceeded its time limit.
    Hung,
    /// The guest or QEMU ended, with the lab's last output.
    Ended(String),
}

impl Session {
    /// Boots the guest.
    ///
    /// # Errors
    /// The error of [`skip`] if the lab reports that this machine lacks something that the boot needs.
    pub(crate) fn start(lab: &Lab, kernel: &str, boot: Boot) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vireo-boot.").tempdir()?;
        let mut command = Command::new(lab.repo.join("scripts/lab"));
        command.args(["run", "--kernel", kernel, "--timeout", "0", "--monitor", "--harness"]).arg(dir.path());
        command.args(&lab.options).args(boot.lab_options());
        command.args(["--", "vireo-harness", "agent", boot.name()]).args(lab.full.then_some("--full"));
        let said = File::create(dir.path().join("lab.log"))?;
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).process_group(0);
        let mut child = command.spawn().context("cannot start scripts/lab")?;
        let mut progress = Progress::new(&format!("boot '{}' of kernel {kernel}", boot.name()));
        match connect(&mut child, dir.path(), &mut progress) {
            Ok((host, answers, release)) => Ok(Self { lab: child, dir, host, answers, release }),
            Err(error) => {
                let said = tail(&dir.path().join("lab.log"), 20);
                end(&mut child);
                if let Some(reason) = skipped_by(&said) {
                    return skip(reason);
                }
                Err(error.context(format!("boot '{}' failed\n{said}", boot.name())))
            }
        }
    }

    /// Runs a case or a soak; `say` receives its progress.
    pub(crate) fn request(
        &mut self,
        request: &Request,
        limit: Duration,
        mut say: impl FnMut(String),
    ) -> std::result::Result<Report, Lost> {
        let line = serde_json::to_string(request).map_err(|error| Lost::Ended(error.to_string()))? + "\n";
        if let Err(error) = self.host.write_all(line.as_bytes()) {
            return Err(Lost::Ended(format!("{error}\n{}", self.final_output())));
        }
        let until = Instant::now() + limit;
        loop {
            match self.answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Answer::Done(report)) => return Ok(report),
                Ok(Answer::Progress(line)) => say(line),
                Ok(Answer::Ready(_)) => {}
                Err(RecvTimeoutError::Timeout) => return Err(Lost::Hung),
                Err(RecvTimeoutError::Disconnected) => return Err(Lost::Ended(self.final_output())),
            }
        }
    }

    /// Last output of the lab after the guest has ended.
    fn final_output(&mut self) -> String {
        await_end(&mut self.lab);
        tail(&self.dir.path().join("lab.log"), 10)
    }

    /// Reports what a guest that hangs is doing: the processors' registers from QEMU, the end of the kernel's log, the
    /// kernel's own stacks by sysrq if it still answers, and the host's threads.
    pub(crate) fn stacks(&self) -> String {
        let log = self.dir.path().join("console.log");
        let before = fs::metadata(&log).map(|log| log.len()).unwrap_or_default();
        let mut text = match self.ask() {
            Ok(registers) => {
                const WORDS: [&str; 7] = ["CPU#", "RIP=", "local APIC", "LVTT", "Timer", "ISR", "IRR"];
                let of_interest = |line: &&str| WORDS.iter().any(|word| line.contains(word));
                registers.lines().filter(of_interest).map(|line| format!("{line}\n")).collect()
            }
            Err(error) => format!("cannot query QEMU: {error:#}\n"),
        };
        let console = fs::read(&log).unwrap_or_default();
        let (before, since) = console.split_at(usize::try_from(before).unwrap_or(0).min(console.len()));
        let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\r', "");
        text += &format!("the end of the kernel's log:\n{}\n", last_lines(&of(before), LOG_LINES));
        text += &format!("its output after sysrq:\n{}\n", of(since));
        text + "processes on the host:\n" + &stacks::of_group(self.lab.id().cast_signed())
    }

    /// Sends sysrqs to the kernel, each a BREAK and a key on the serial console: print all messages (9), the
    /// processors' stacks (l), timers (q), every task's stack (t). Returns the registers, including those of
    /// the first two processors' timers.
    fn ask(&self) -> Result<String> {
        let mut qemu = Qmp::new(UnixStream::connect(self.dir.path().join("monitor"))?)?;
        let mut console = UnixStream::connect(self.dir.path().join("console"))?;
        console.set_read_timeout(Some(SILENCE))?;
        for key in [b'9', b'l', b'q', b't'] {
            qemu.command("chardev-send-break console")?;
            console.write_all(&[key])?;
            // The kernel must have read the key before the next BREAK. Its output is also in the log.
            let mut buffer = [0; 4096];
            while let Ok(1..) = console.read(&mut buffer) {}
        }
        let registers = ["info registers -a", "info lapic 0", "info lapic 1"];
        Ok(registers.map(|ask| qemu.command(ask)).into_iter().collect::<Result<Vec<_>>>()?.join("\n"))
    }

    /// Ends the boot normally. The exit code of the lab's command must be 0.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.host.shutdown(std::net::Shutdown::Both)?;
        let until = Instant::now() + END;
        loop {
            match self.lab.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    bail!("the boot ended with {status}\n{}", tail(&self.dir.path().join("lab.log"), 20))
                }
                None if Instant::now() > until => bail!("the guest did not end within {} s", END.as_secs()),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        end(&mut self.lab);
    }
}

/// Ends the lab and the processes that it started.
fn end(lab: &mut Child) {
    let group = Pid::from_raw(lab.id().cast_signed());
    if matches!(lab.try_wait(), Ok(None)) {
        let _ = killpg(group, Signal::SIGTERM);
        let until = Instant::now() + Duration::from_secs(10);
        while matches!(lab.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // A lab that ended by itself may have left processes.
    let _ = killpg(group, Signal::SIGKILL);
    let _ = lab.wait();
}

/// Waits for the end of a lab whose guest is gone, because its message is complete only then. The caller ends
/// a lab that keeps running.
fn await_end(lab: &mut Child) {
    let until = Instant::now() + SILENCE;
    while matches!(lab.try_wait(), Ok(None)) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for QEMU's socket, which appears after the build of the programs and of the kernel, and then for the
/// agent's first message.
fn connect(
    lab: &mut Child,
    dir: &Path,
    progress: &mut Progress,
) -> Result<(UnixStream, Receiver<Answer>, String)> {
    let until = Instant::now() + PREPARE;
    let host = loop {
        if let Ok(host) = UnixStream::connect(dir.join(PORT)) {
            break host;
        }
        if let Some(status) = lab.try_wait()? {
            bail!("the lab ended with {status}");
        }
        if Instant::now() > until {
            bail!("QEMU did not start within {} s", PREPARE.as_secs());
        }
        progress.tick(|| tail(&dir.join("lab.log"), 1));
        std::thread::sleep(Duration::from_millis(20));
    };
    let (to_answers, answers) = channel();
    let lines = BufReader::new(host.try_clone()?).lines();
    std::thread::spawn(move || {
        for answer in lines.map_while(Result::ok).map_while(|line| serde_json::from_str(&line).ok()) {
            if to_answers.send(answer).is_err() {
                return;
            }
        }
    });
    match answers.recv_timeout(START) {
        Ok(Answer::Ready(release)) => Ok((host, answers, release)),
        Ok(other) => Err(anyhow!("the agent's first message was {other:?}")),
        Err(RecvTimeoutError::Timeout) => {
            Err(anyhow!("the agent did not answer within {} s", START.as_secs()))
        }
        Err(RecvTimeoutError::Disconnected) => {
            await_end(lab);
            Err(anyhow!("the guest ended before its first message"))
        }
    }
}

/// Returns the last `count` lines of a file.
pub(crate) fn tail(file: &Path, count: usize) -> String {
    last_lines(&String::from_utf8_lossy(&fs::read(file).unwrap_or_default()), count)
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
