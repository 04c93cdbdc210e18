//! `start run`: starts l2fwd and testpmd in turn as child processes, while frames arrive.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use vireo_bus_pci::Bus;
use vireo_eal::bdf::Bdf;
use vireo_eal::clock::Tsc;
use vireo_eal::lcore::{StopFlag, pin_to};
use vireo_eal::program::note;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};

use super::phases::{L2FWD, Mark, Phases, Recording, TESTPMD, ends, phases, rows};
use crate::cores::Cores;
use crate::count::check_clock;
use crate::environment::environment;
use crate::measure::{Side, Wiring};
use crate::process::l2fwd;
use crate::report::write_json;
use crate::run::wirings;
use crate::testpmd::{TestpmdArgs, allow, start_on};

/// Longest wait for the first packet.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time between two frames for a program that is to be counted.
const PERIOD: Duration = Duration::from_micros(100);

/// Time the starts of l2fwd and testpmd on this machine's NICs and write a recording
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// File for the recording
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// Modes to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "container,cdev,compat")]
    modes: Vec<VfioMode>,
    /// Kinds of NIC, with four of each bound to vfio-pci. QEMU's 82540EM (e1000) is left out: DPDK's driver
    /// hangs on it under VFIO, and it receives nothing for a second after each reset, which would hide
    /// everything else
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "virtio-net,e1000e")]
    nics: Vec<String>,
    /// Rounds; each runs every mode once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Count instructions, on one CPU whose clock counts them (lab run --icount): frames are sent only when the program
    /// forwards, and the sender sleeps in between, because each of the two advances the clock
    #[arg(long)]
    counted: bool,
    /// Vireo's l2fwd; default: the one next to this program
    #[arg(long, value_name = "FILE")]
    l2fwd: Option<PathBuf>,
    #[command(flatten)]
    testpmd: TestpmdArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Vireo,
    Dpdk,
}

struct Rig<'a> {
    args: &'a RunArgs,
    l2fwd: PathBuf,
    bus: Bus,
    cores: Cores,
    stop: StopFlag,
}

pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let cores = if args.counted {
        check_clock()?;
        Cores::of_forwarder(&[])?
    } else {
        Cores::of_this_process()?
    };
    let rig = Rig {
        args,
        l2fwd: l2fwd(args.l2fwd.as_deref())?,
        bus: Bus::default(),
        cores,
        stop: StopFlag::on_signals()?,
    };
    // The environment counts the available cores, which is not possible once this thread is pinned.
    let mut recording =
        Recording { environment: environment(args.rounds)?, rows: Vec::new(), failures: Vec::new() };
    // Otherwise the TSC frequency would be determined during the first start.
    Tsc::hz();
    pin_to(rig.cores.generator)?;
    let mut outcome = Ok(());
    for wiring in wirings(&args.nics, &rig.bus, note)? {
        outcome = rig.record(&wiring, &mut recording);
        if outcome.is_err() {
            break;
        }
    }
    write_json(&args.json, &recording).and(outcome)
}

/// Programs to start, in the order A B B A. DPDK supports only VFIO groups.
fn schedule(mode: VfioMode, round: u32) -> Vec<Program> {
    match mode {
        VfioMode::Container | VfioMode::Noiommu if round.is_multiple_of(2) => {
            vec![Program::Vireo, Program::Dpdk]
        }
        VfioMode::Container | VfioMode::Noiommu => vec![Program::Dpdk, Program::Vireo],
        _ => vec![Program::Vireo],
    }
}

impl Rig<'_> {
    /// Starts every program on these NICs in every mode and round, and adds what was seen to `recording`. A
    /// start that fails costs only itself. Fails if a signal stops the program.
    fn record(&self, wiring: &Wiring, recording: &mut Recording) -> Result<()> {
        let modes = &self.args.modes;
        let mut starts = vec![(Vec::new(), Vec::new()); modes.len()];
        let rounds = (0..self.args.rounds).flat_map(|round| (0..modes.len()).map(move |mode| (round, mode)));
        for (round, index) in rounds {
            let mode = modes[index];
            for program in schedule(mode, round) {
                let start = format!("round {}: {} {mode} {program:?}", round + 1, wiring.nic);
                match self.time(wiring, mode, program) {
                    Ok(phases) => {
                        let total = phases.last().map_or(0.0, |(_, ms)| *ms);
                        note(&format!("{start} {total:.0} ms"));
                        let (vireo, dpdk) = &mut starts[index];
                        if program == Program::Vireo { vireo } else { dpdk }.push(phases);
                    }
                    Err(error) if self.stop.is_set() => return Err(error),
                    Err(error) => {
                        note(&format!("{start} failed: {error}"));
                        recording.failures.push(format!("{start}: {error}"));
                    }
                }
            }
        }
        for (mode, (vireo, dpdk)) in modes.iter().zip(&starts) {
            recording.rows.extend(rows(wiring.nic, mode.name(), [vireo, dpdk], self.args.counted));
        }
        Ok(())
    }

    /// Times one start until a frame has come through, and ends the program.
    fn time(&self, wiring: &Wiring, mode: VfioMode, program: Program) -> Result<Phases> {
        let mut side = Side::start(&self.bus, [&wiring.sender, &wiring.receiver], mode, true)?;
        let addresses = wiring.inner.each_ref().map(|info| info.address);
        let (command, marks): (_, &[Mark]) = match program {
            Program::Vireo => (self.l2fwd(addresses, mode), &L2FWD),
            Program::Dpdk => (self.args.testpmd.command(self.cores.forwarder, addresses, &[]), &TESTPMD),
        };
        let mut process = start_on(self.cores.forwarder, command, self.cores.idle)?;
        let (early, first) = if self.args.counted {
            let ends = ends(&mut process, marks)?;
            (Some(ends), self.first_arrival(&mut side))
        } else {
            // Do not limit the frames in flight, because for most of the time none returns.
            let stream = side.probes(u64::MAX, PATIENCE);
            (None, side.send(&stream, &self.stop)?.first)
        };
        if self.stop.is_set() {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "cannot complete the recording",
                "stopped by a signal",
            ));
        }
        // If a mark is missing as well, its error says more.
        let ends = early.map_or_else(|| ends(&mut process, marks), Ok)?;
        let began = process.started();
        process.interrupt()?;
        process.reap()?;
        side.stop("generator")?;
        let Some(first) = first else {
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("no frame came back through {} and {}", addresses[0], addresses[1]),
                format!("{program:?} was sent frames for {} s", PATIENCE.as_secs()),
            )
            .with_hint("check that the first two and the last two NICs are connected"));
        };
        Ok(phases(began, ends, first))
    }

    /// Sends a frame per [`PERIOD`] until one arrives, and returns when that was, in TSC ticks.
    fn first_arrival(&self, side: &mut Side) -> Option<u64> {
        let since = Instant::now();
        while since.elapsed() < PATIENCE && !self.stop.is_set() {
            side.send_burst(1);
            std::thread::sleep(PERIOD);
            if side.drain() > 0 {
                return Some(Tsc::now());
            }
        }
        None
    }

    fn l2fwd(&self, addresses: [Bdf; 2], mode: VfioMode) -> Command {
        let mut command = Command::new(&self.l2fwd);
        command.args(["-l", &self.cores.forwarder.to_string(), "--log-level", "lib.eal.init:debug"]);
        command.args(["--file-prefix", "start", "--vfio-mode", mode.name()]);
        command.args(allow(addresses)).args(["--", "-p", "3", "-q", "2", "-T", "0"]);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_start_in_turn_where_dpdk_has_the_mode() {
        assert_eq!(schedule(VfioMode::Container, 0), [Program::Vireo, Program::Dpdk]);
        assert_eq!(schedule(VfioMode::Noiommu, 1), [Program::Dpdk, Program::Vireo]);
        assert_eq!(schedule(VfioMode::Cdev, 1), [Program::Vireo]);
    }
}
