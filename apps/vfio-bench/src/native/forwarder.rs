//! Measures one run: a forwarder with two ports on shared-memory rings, and testpmd at the other end, which
//! sends some bursts and counts what circulates.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use vireo_eal::{Error, ErrorKind, Result};

use super::Side;
use crate::cores::Cores;
use crate::process::Process;

/// Program under comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    Dpdk,
    Vireo,
}

/// Results of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Packets per second in each direction.
    pub(super) pps: f64,
    /// Ticks of busy polls per packet.
    pub(super) ticks: f64,
}

/// Programs and cores of every run.
#[derive(Debug)]
pub(super) struct Rig {
    pub(super) testpmd: PathBuf,
    pub(super) l2fwd: PathBuf,
    /// Cores: the peer is the generator, the program under comparison the forwarder.
    pub(super) cores: Cores,
    pub(super) seconds: Duration,
}

/// Sends 8 bursts of 32 packets into each port: as many packets as a ring of 256 has descriptors.
const START: &str = "start tx_first 8";
const PROMPT: &str = "testpmd>";
/// Time until the caches are warm and the CPU frequency is up.
const WARM_UP: Duration = Duration::from_millis(300);

impl Rig {
    /// Measures `program` as the forwarder at the end `side`.
    pub(super) fn run(&self, side: Side, program: Program) -> Result<Sample> {
        let directory = tempfile::Builder::new()
            .prefix("vireo-native.")
            .tempdir()
            .map_err(|error| Error::io("cannot create a directory for sockets", &error))?;
        let sockets = directory.path();
        let mut subject;
        let mut peer;
        if side == Side::Vhost {
            subject = self.subject(side, program, sockets)?;
            peer = self.testpmd(side.other(), "peer", self.cores.generator, sockets)?;
        } else {
            peer = self.testpmd(side.other(), "peer", self.cores.generator, sockets)?;
            subject = self.subject(side, program, sockets)?;
        }
        match program {
            Program::Dpdk => command(&mut subject, "start")?,
            Program::Vireo => subject.wait_for("entering main loop").map(drop)?,
        }
        command(&mut peer, START)?;
        thread::sleep(WARM_UP);
        peer.type_line("show port stats all")?;
        peer.wait_for(PROMPT)?;
        thread::sleep(self.seconds);
        peer.type_line("show port stats all")?;
        let pps = rate(peer.wait_for(PROMPT)?)?;
        match program {
            Program::Dpdk => subject.type_line("stop")?,
            Program::Vireo => subject.interrupt()?,
        }
        let ticks = ticks(subject.wait_for("MHz Clock")?)?;
        for mut testpmd in [(program == Program::Dpdk).then_some(subject), Some(peer)].into_iter().flatten() {
            testpmd.type_line("quit")?;
            testpmd.reap()?;
        }
        Ok(Sample { pps, ticks })
    }

    fn subject(&self, side: Side, program: Program, sockets: &Path) -> Result<Process> {
        match program {
            Program::Dpdk => self.testpmd(side, "subject", self.cores.forwarder, sockets),
            Program::Vireo => self.l2fwd(side, sockets),
        }
    }

    /// Starts testpmd and waits for its prompt. Its main lcore waits for commands on the core of its
    /// forwarding lcore.
    fn testpmd(&self, side: Side, prefix: &str, cpu: usize, sockets: &Path) -> Result<Process> {
        // Without stdbuf, testpmd buffers its answers until they fill a page.
        let mut command = Command::new("stdbuf");
        command.arg("-oL").arg(&self.testpmd);
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "--no-telemetry", "--log-level=error"]);
        virtual_devices(&mut command, side, &format!("native-{prefix}-{}", std::process::id()), sockets);
        command.args(["-m", "256", "--", "-i", "--forward-mode=io", "--nb-cores=1", "--record-core-cycles"]);
        command.args(["--total-num-mbufs=4096", "--no-mlockall"]);
        let mut testpmd = Process::start(command)?;
        testpmd.wait_for(PROMPT).map_err(|error| {
            error.with_hint(format!(
                "check that {} runs; to install it: apt-get install dpdk-dev",
                self.testpmd.display()
            ))
        })?;
        Ok(testpmd)
    }

    /// Starts l2fwd, which leaves packets unchanged like testpmd's io mode, and waits until its ports accept
    /// connections.
    fn l2fwd(&self, side: Side, sockets: &Path) -> Result<Process> {
        let mut command = Command::new(&self.l2fwd);
        command.args(["-l", &self.cores.forwarder.to_string()]);
        virtual_devices(&mut command, side, &format!("native-{}", std::process::id()), sockets);
        command.args(["--", "-p", "3", "-q", "2", "-T", "0", "--no-mac-updating", "--record-core-cycles"]);
        let mut l2fwd = Process::start(command)?;
        l2fwd.wait_for("Checking link status")?;
        Ok(l2fwd)
    }
}

/// Adds arguments for two ports that need no NICs, hugepages or root. Vireo takes the same arguments as DPDK.
fn virtual_devices(command: &mut Command, side: Side, prefix: &str, sockets: &Path) {
    command.args(["--no-pci", "--no-huge", "--file-prefix", prefix]);
    for port in 0..2 {
        let socket = sockets.join(port.to_string());
        command.arg("--vdev").arg(match side {
            Side::VirtioUser => format!("net_virtio_user{port},path={},queue_size=256", socket.display()),
            Side::Vhost => format!("net_vhost{port},iface={}", socket.display()),
        });
    }
}

/// Types a testpmd command and waits until it is done.
fn command(testpmd: &mut Process, line: &str) -> Result<()> {
    testpmd.type_line(line)?;
    testpmd.wait_for(PROMPT).map(drop)
}

/// Packets per second in each direction: the mean over the ports of testpmd's `Rx-pps` since its last
/// display.
fn rate(statistics: &str) -> Result<f64> {
    let rates: Vec<f64> = statistics.split("Rx-pps:").skip(1).filter_map(first_number).collect();
    match rates.len() {
        2 => Ok((rates[0] + rates[1]) / 2.0),
        _ => Err(unread("Rx-pps of two ports", statistics)),
    }
}

/// Returns `CPU cycles/packet`, as testpmd and l2fwd print it.
fn ticks(end: &str) -> Result<f64> {
    let (_, figure) =
        end.rsplit_once("CPU cycles/packet=").ok_or_else(|| unread("CPU cycles/packet", end))?;
    first_number(figure).ok_or_else(|| unread("CPU cycles/packet", end))
}

fn first_number(text: &str) -> Option<f64> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text[..end].parse().ok()
}

fn unread(what: &str, text: &str) -> Error {
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing").trim();
    Error::new(ErrorKind::Protocol, format!("cannot find {what}"), format!("the last line was: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_what_testpmd_prints() {
        let port = "  RX-packets: 13309760   RX-missed: 0\n  Throughput (since last show)\n  Rx-pps:      4000000          Rx-bps: 1\n";
        let text = format!("{port}{}\ntestpmd>", port.replace("4000000", "5000000"));
        assert_eq!(rate(&text).unwrap(), 4.5e6);
        assert!(rate(port).unwrap_err().to_string().contains("Rx-pps of two ports"));
        let end = "  CPU cycles/packet=308.71 (total cycles=8217728304 / total io packets=26619424) at 2600 MHz Clock";
        assert_eq!(ticks(end).unwrap(), 308.71);
        assert!(ticks("Done.").is_err());
    }
}
