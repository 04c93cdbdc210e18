//! DPDK's testpmd as a child process that forwards between two NICs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, thread};

use clap::Args;
use vireo_eal::bdf::Bdf;
use vireo_eal::lcore::pin_to;
use vireo_eal::{Error, ErrorKind, Result};

use crate::process::Process;

/// Library that coreutils' `stdbuf` preloads. Without it, testpmd buffers its output until it fills a page.
const LINE_BUFFERED: &str = "/usr/libexec/coreutils/libstdbuf.so";
/// Texts that testpmd prints when it forwards, and when it has counted what it forwarded.
const FORWARDS: &str = "Press enter to exit";
const COUNTED: &str = "Accumulated forward statistics";

/// Path of testpmd, and the plug-ins that it loads.
#[derive(Args, Debug)]
pub(crate) struct TestpmdArgs {
    /// DPDK's testpmd
    #[arg(long, value_name = "FILE", default_value = "dpdk-testpmd")]
    testpmd: PathBuf,
    /// Plug-ins for testpmd to load; default: all that it finds
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    plugins: Vec<String>,
}

impl TestpmdArgs {
    /// Fails if testpmd is not installed.
    pub(crate) fn check(&self) -> Result<()> {
        let path = env::var_os("PATH").unwrap_or_default();
        if self.testpmd.is_file() || env::split_paths(&path).any(|dir| dir.join(&self.testpmd).is_file()) {
            return Ok(());
        }
        let what = format!("cannot find {}", self.testpmd.display());
        Err(Error::new(ErrorKind::Unavailable, what, "it is not in PATH")
            .with_hint("run: apt-get install dpdk-dev, or give its path: --testpmd FILE"))
    }

    /// Returns a command that forwards between the two NICs by itself. testpmd's main lcore waits for input
    /// without polling, so both lcores are on `cpu`. `eal` holds additional arguments of DPDK's EAL.
    pub(crate) fn command(&self, cpu: usize, addresses: [Bdf; 2], eal: &[&str]) -> Command {
        let mut command = Command::new(&self.testpmd);
        if Path::new(LINE_BUFFERED).exists() {
            command.env("LD_PRELOAD", LINE_BUFFERED).env("_STDBUF_O", "L");
        }
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "--no-telemetry", "--file-prefix", "start"]);
        command.args(self.plugins.iter().flat_map(|plugin| ["-d", plugin]));
        command.args(allow(addresses)).args(eal);
        command.args(["--", "--auto-start", "--forward-mode=mac", "--nb-cores=1", "--no-mlockall"]);
        command.args(["--total-num-mbufs=8192", "--rxd=1024", "--txd=1024"]);
        command
    }
}

pub(crate) fn allow(addresses: [Bdf; 2]) -> impl Iterator<Item = OsString> {
    addresses.into_iter().flat_map(|address| ["-a".into(), address.to_string().into()])
}

/// Starts `command` from a thread that is pinned to `cpu`, which the child inherits. Its output is read on
/// CPU `reader`.
pub(crate) fn start_on(cpu: usize, command: Command, reader: Option<usize>) -> Result<Process> {
    let start = || {
        pin_to(cpu)?;
        Process::start_read_on(command, reader)
    };
    thread::scope(|scope| scope.spawn(start).join()).map_err(|_| {
        Error::new(
            ErrorKind::Protocol,
            "cannot start a forwarder",
            "a thread panicked (its message is above)",
        )
    })?
}

/// Waits until testpmd forwards.
pub(crate) fn await_forwarding(process: &mut Process) -> Result<()> {
    process.wait_for(FORWARDS).map(|_| ())
}

/// Stops testpmd. Returns what it counted as lost.
pub(crate) fn stop(mut process: Process) -> Result<BTreeMap<String, u64>> {
    process.interrupt()?;
    let losses = losses(process.wait_for(COUNTED)?);
    process.reap()?;
    Ok(losses)
}

/// Returns the sums of the ports' counters of lost packets.
fn losses(statistics: &str) -> BTreeMap<String, u64> {
    let words: Vec<&str> = statistics.split_whitespace().collect();
    let mut losses = BTreeMap::new();
    for pair in words.windows(2) {
        let name = match pair[0] {
            "RX-dropped:" => "testpmd_rx_dropped",
            "RX-error:" => "testpmd_rx_errors",
            "TX-dropped:" => "testpmd_tx_dropped",
            _ => continue,
        };
        // After a number of 14 digits or more, the next label follows without a space.
        let digits: String = pair[1].chars().take_while(char::is_ascii_digit).collect();
        *losses.entry(name.to_owned()).or_default() += digits.parse().unwrap_or(0);
    }
    losses
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output of DPDK 22.11.
    const STATISTICS: &str = "
Telling cores to stop...
Waiting for lcores to finish...

  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 65410          RX-dropped: 12            RX-total: 65422
  RX-error: 3
  RX-nombufs: 0             
  TX-packets: 0              TX-dropped: 0             TX-total: 0
  ----------------------------------------------------------------------------

  ---------------------- Forward statistics for port 1  ----------------------
  RX-packets: 0              RX-dropped: 10000000000000RX-total: 10000000000000
  TX-packets: 65400          TX-dropped: 10            TX-total: 65410
  ----------------------------------------------------------------------------

  +++++++++++++++ Accumulated forward statistics";

    #[test]
    fn losses_are_what_the_ports_dropped() {
        let expected = [
            ("testpmd_rx_dropped", 10_000_000_000_012),
            ("testpmd_rx_errors", 3),
            ("testpmd_tx_dropped", 10),
        ];
        let expected = expected.map(|(name, count)| (name.to_owned(), count));
        assert_eq!(losses(STATISTICS), expected.into());
        assert!(losses("").is_empty());
    }

    #[test]
    fn a_testpmd_that_is_not_there_is_said_before_it_is_started() {
        let args = |path: &str| TestpmdArgs { testpmd: path.into(), plugins: Vec::new() };
        assert!(args("sh").check().is_ok() && args("/bin/sh").check().is_ok());
        let error = args("no-such-testpmd").check().unwrap_err().to_string();
        assert!(error.contains("cannot find no-such-testpmd") && error.contains("dpdk-dev"), "{error}");
    }
}
