//! Measures one run: a forwarder with two ports on shared-memory rings, and a peer at the other end, which
//! sends some bursts and counts what circulates.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use vireo_eal::clock::Tsc;
use vireo_eal::{Error, ErrorKind, Result};

use super::Side;
use super::echo::{Echo, Running};
use crate::cores::Cores;
use crate::process::Process;

/// Program at an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// testpmd, in io mode.
    Dpdk,
    /// l2fwd as the forwarder, a thread of this process as the peer.
    Vireo,
}

/// Programs of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) forwarder: Program,
    pub(super) peer: Program,
}

impl Ends {
    pub(super) const DPDK: Self = Self { forwarder: Program::Dpdk, peer: Program::Dpdk };
}

/// Results of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Packets per second in each direction.
    pub(super) pps: f64,
    /// Ticks of busy polls per packet that the forwarder receives.
    pub(super) ticks: f64,
    /// The same of the peer.
    pub(super) peer_ticks: f64,
}

/// A running peer.
enum Peer {
    Testpmd(Process),
    Vireo(Running),
}

impl Peer {
    /// Lets packets circulate for `time`. Returns the rate in each direction, and the peer's ticks per packet.
    fn measure(&mut self, time: Duration) -> Result<(f64, f64)> {
        match self {
            Self::Testpmd(testpmd) => {
                command(testpmd, START)?;
                thread::sleep(WARM_UP);
                testpmd.type_line("show port stats all")?;
                testpmd.wait_for(PROMPT)?;
                thread::sleep(time);
                testpmd.type_line("show port stats all")?;
                let pps = rate(testpmd.wait_for(PROMPT)?)?;
                testpmd.type_line("stop")?;
                Ok((pps, ticks(testpmd.wait_for("MHz Clock")?)?))
            }
            Self::Vireo(echo) => {
                thread::sleep(WARM_UP);
                let (since, before) = (Instant::now(), echo.progress());
                thread::sleep(time);
                let (elapsed, after) = (since.elapsed().as_secs_f64(), echo.progress());
                let packets = (after.packets - before.packets) as f64;
                Ok((packets / elapsed / 2.0, (after.ticks - before.ticks) as f64 / packets))
            }
        }
    }

    fn end(self) -> Result<()> {
        match self {
            Self::Testpmd(testpmd) => quit(testpmd),
            Self::Vireo(echo) => echo.end(),
        }
    }
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
    /// Measures `ends`, with the forwarder at the end `side`.
    pub(super) fn run(&self, side: Side, ends: Ends) -> Result<Sample> {
        let directory = tempfile::Builder::new()
            .prefix("vireo-native.")
            .tempdir()
            .map_err(|error| Error::io("cannot create a directory for sockets", &error))?;
        let sockets = directory.path();
        let mut forwarder;
        let mut peer;
        if side == Side::Vhost {
            forwarder = self.forwarder(side, ends.forwarder, sockets)?;
            peer = self.peer(side.other(), ends.peer, sockets)?;
        } else {
            peer = self.peer(side.other(), ends.peer, sockets)?;
            forwarder = self.forwarder(side, ends.forwarder, sockets)?;
        }
        match ends.forwarder {
            Program::Dpdk => command(&mut forwarder, "start")?,
            Program::Vireo => forwarder.wait_for("entering main loop").map(drop)?,
        }
        let (pps, peer_ticks) = peer.measure(self.seconds)?;
        match ends.forwarder {
            Program::Dpdk => forwarder.type_line("stop")?,
            Program::Vireo => forwarder.interrupt()?,
        }
        let ticks = ticks(forwarder.wait_for("MHz Clock")?)?;
        if ends.forwarder == Program::Dpdk {
            quit(forwarder)?;
        }
        peer.end()?;
        Ok(Sample { pps, ticks, peer_ticks })
    }

    fn forwarder(&self, side: Side, program: Program, sockets: &Path) -> Result<Process> {
        match program {
            Program::Dpdk => self.testpmd(side, "forwarder", self.cores.forwarder, sockets),
            Program::Vireo => self.l2fwd(side, sockets),
        }
    }

    fn peer(&self, side: Side, program: Program, sockets: &Path) -> Result<Peer> {
        let cpu = self.cores.generator;
        Ok(match program {
            Program::Dpdk => Peer::Testpmd(self.testpmd(side, "peer", cpu, sockets)?),
            Program::Vireo => Peer::Vireo(Echo::open(side, |port| socket(sockets, port))?.start(cpu)),
        })
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

impl Sample {
    /// Packets per second in each direction that the peer would reach if it were busy all of the time.
    pub(super) fn peer_ceiling(&self) -> f64 {
        Tsc::hz() as f64 / self.peer_ticks / 2.0
    }
}

/// Path of the socket of port `port`.
fn socket(sockets: &Path, port: usize) -> String {
    sockets.join(port.to_string()).display().to_string()
}

/// Adds arguments for two ports that need no NICs, hugepages or root. Vireo takes the same arguments as DPDK.
fn virtual_devices(command: &mut Command, side: Side, prefix: &str, sockets: &Path) {
    command.args(["--no-pci", "--no-huge", "--file-prefix", prefix]);
    for port in 0..2 {
        let socket = socket(sockets, port);
        command.arg("--vdev").arg(match side {
            Side::VirtioUser => format!("net_virtio_user{port},path={socket},queue_size=256"),
            Side::Vhost => format!("net_vhost{port},iface={socket}"),
        });
    }
}

fn quit(mut testpmd: Process) -> Result<()> {
    testpmd.type_line("quit")?;
    testpmd.reap()
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
