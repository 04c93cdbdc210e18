//! `count run`: opens, maps, unmaps and closes a NIC in every mode, and counts the instructions.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use nix::time::{ClockId, clock_gettime};
use vireo_bus_pci::{Bus, PciDevice};
use vireo_eal::clock::thread_time;
use vireo_eal::ioctl::{self, Calls};
use vireo_eal::mem::Region;
use vireo_eal::program::note;
use vireo_eal::vfio::{Phase, Vfio, VfioMode};
use vireo_eal::{Error, ErrorKind, Result};

use super::{Call, Recording, Round, Row, forward};
use crate::environment::environment;
use crate::measure::{Wiring, each_map, regions};
use crate::report::write_json;
use crate::run::wirings;

/// Rounds that only open a device. The cost of a walk through sysfs depends on what the kernel has already
/// allocated, which differs between rounds, so the median of a few rounds would differ between boots.
const OPENS: u32 = 32;
/// Rounds that count the instructions of each call.
const SPLIT_ROUNDS: u32 = 3;

/// Count the instructions that each VFIO mode takes, and write a recording
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// File for the recording
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// Modes to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "container,cdev,compat")]
    modes: Vec<VfioMode>,
    /// Kinds of NIC; by default every kind with four NICs bound to vfio-pci
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    nics: Vec<String>,
    /// Rounds to count; one more runs first and is left out, because the kernel fills its caches in it
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Size of the mapped region, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    map_mib: u32,
}

/// One step of one round.
#[derive(Clone, Default)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) memory: Option<String>,
    pub(super) bytes: Option<u64>,
    pub(super) packets: Option<u64>,
    pub(super) instructions: u64,
    pub(super) waiting: u64,
    pub(super) calls: Vec<Calls>,
}

impl Step {
    pub(super) fn named(name: &'static str) -> Self {
        Self { name, ..Self::default() }
    }
}

/// Time that a closure took: on the CPU and in total.
#[derive(Clone, Copy)]
struct Taken {
    worked: Duration,
    took: Duration,
}

impl Taken {
    fn by<T>(body: impl FnOnce() -> T) -> (T, Self) {
        let (since, before) = (Instant::now(), thread_time());
        let result = body();
        let (took, worked) = (since.elapsed(), thread_time().saturating_sub(before));
        (result, Self { worked, took })
    }

    /// Measures what reading the clocks costs. The first reading after a sleep takes longer and is discarded.
    fn reading() -> Self {
        let ((), _) = Self::by(|| ());
        let ((), reading) = Self::by(|| ());
        reading
    }

    /// Converts the times to a step, less the cost of reading the clocks.
    fn step(self, name: &'static str, reading: Self, calls: Vec<Calls>) -> Step {
        let waiting = |taken: Self| taken.took.saturating_sub(taken.worked);
        Step {
            instructions: nanos(self.worked.saturating_sub(reading.worked)),
            waiting: nanos(waiting(self).saturating_sub(waiting(reading))),
            calls,
            ..Step::named(name)
        }
    }
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

pub(super) fn run(args: &RunArgs) -> Result<()> {
    check_clock()?;
    let (bus, mut rows) = (Bus::default(), Vec::new());
    // Map the same pages in all modes: the cost differs between sets of pages, possibly by how scattered they
    // are.
    let regions = regions((args.map_mib as usize) << 20)?;
    for wiring in wirings(&args.nics, &bus, note)? {
        for &mode in &args.modes {
            let counted = |rounds: u32| {
                (0..rounds).map(|_| round(&bus, &wiring, mode, &regions)).collect::<Result<Vec<_>>>()
            };
            let mut rounds = counted(args.rounds + 1)?.split_off(1);
            for _ in 0..OPENS {
                rounds.push(open(&bus, &wiring, mode)?.steps);
            }
            ioctl::split_waiting(true);
            let split = counted(SPLIT_ROUNDS)?;
            ioctl::split_waiting(false);
            rows.extend(merge(wiring.nic, mode.name(), &rounds, &split));
            note(&format!("{} {mode}", wiring.nic));
        }
    }
    write_json(&args.json, &Recording { environment: environment(args.rounds)?, rows })
}

/// Checks that the clock counts instructions: the environment must say so, and a loop of twice the length
/// must take twice the time, every time.
pub(crate) fn check_clock() -> Result<()> {
    const STEPS: u64 = 1 << 18;
    let wrong = |why: &str| {
        Err(Error::new(ErrorKind::Unavailable, "cannot count instructions", why)
            .with_hint("run: scripts/lab count"))
    };
    if std::env::var_os("VIREO_LAB_ICOUNT").is_none() {
        return wrong("this machine's clock does not count them");
    }
    let time = |steps: u64| {
        let since = Instant::now();
        for step in 0..steps {
            std::hint::black_box(step);
        }
        since.elapsed().as_nanos() as u64
    };
    // Take the minimum, because a timer interrupt lengthens some of the loops.
    let least = |steps: u64| (0..8).map(|_| time(steps)).min().unwrap_or_default();
    let near = |one: u64, other: u64| one.abs_diff(other) <= other / 1000;
    let once = least(STEPS);
    if near(least(STEPS), once) && near(least(2 * STEPS), 2 * once) {
        return Ok(());
    }
    wrong("a loop did not take the same time twice")
}

/// Runs one round: a device from open to close, then a forwarder.
fn round(
    bus: &Bus,
    wiring: &Wiring,
    mode: VfioMode,
    regions: &[(&'static str, Arc<Region>)],
) -> Result<Vec<Step>> {
    let Opened { device, vfio, mut steps } = open(bus, wiring, mode)?;
    let (done, reset) = measured("reset", || device.vfio().reset());
    if done? {
        steps.push(reset);
    }
    each_map(device.vfio().space(), regions, |map| {
        let (mapping, step) = measured("map", || map.make());
        if let Some(mapping) = mapping? {
            let ((), unmap) = measured("unmap", || drop(mapping));
            let of = |step| Step { memory: Some(map.name()), bytes: Some(map.bytes()), ..step };
            steps.extend([step, unmap].map(of));
        }
        Ok(())
    })?;
    let ((), close) = measured("close", || drop((device, vfio)));
    steps.push(close);
    steps.extend(forward::steps(bus, wiring, mode)?);
    Ok(steps)
}

/// An open device, and the steps that opened it.
struct Opened {
    device: PciDevice,
    vfio: Vfio,
    steps: Vec<Step>,
}

fn open(bus: &Bus, wiring: &Wiring, mode: VfioMode) -> Result<Opened> {
    let vfio = Vfio::new(None);
    settle();
    let reading = Taken::reading();
    let device = bus.open(&wiring.inner[0], &vfio, mode)?;
    let phase = |phase: &Phase| {
        let taken = Taken { worked: phase.worked, took: phase.took };
        taken.step(phase.name, reading, phase.calls.clone())
    };
    let steps = device.report.phases.iter().map(phase).collect();
    Ok(Opened { device, vfio, steps })
}

/// Counts the instructions of `body`, which begins just after a timer interrupt.
pub(super) fn measured<T>(name: &'static str, body: impl FnOnce() -> T) -> (T, Step) {
    settle();
    let reading = Taken::reading();
    let calls = ioctl::table();
    let (result, taken) = Taken::by(body);
    (result, taken.step(name, reading, ioctl::since(&calls)))
}

/// Sleeps until the kernel has finished its deferred work, and then until just after a timer interrupt. A
/// step that begins at an arbitrary time contains one interrupt more or less by chance, which is 0.3 % of a
/// million instructions.
fn settle() {
    /// Multiple of the timer period for HZ of 100, 250 and 1000. Since Linux 6.5 the interrupt occurs at
    /// multiples of the period on the monotonic clock. Before 6.5 it occurs at an offset from them that is
    /// constant until the next boot.
    const GRID: u64 = 20_000_000;
    const BEHIND: u64 = 1_000_000;
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    std::thread::sleep(Duration::from_nanos(2 * GRID + BEHIND - nanos(now) % GRID));
}

/// Merges rounds: the median of each step over `rounds`, and of its calls over `split`. All rounds have the
/// same steps in the same order. Rounds that only open a device have the first steps only.
fn merge(nic: &str, mode: &str, rounds: &[Vec<Step>], split: &[Vec<Step>]) -> Vec<Row> {
    let Some(first) = rounds.first() else { return Vec::new() };
    let row = |(at, step): (usize, &Step)| {
        let all: Vec<&Step> = rounds.iter().filter_map(|steps| steps.get(at)).collect();
        let split: Vec<&Step> = split.iter().filter_map(|steps| steps.get(at)).collect();
        let round = |step: &&Step| Round { instructions: step.instructions, waiting: step.waiting };
        let each = all.iter().map(round).collect();
        let sorted = sorted(all, |step| step.instructions);
        let median = quartile(&sorted, 2);
        Row {
            nic: nic.to_owned(),
            mode: mode.to_owned(),
            step: step.name.to_owned(),
            memory: step.memory.clone(),
            bytes: step.bytes,
            packets: step.packets,
            instructions: median.instructions,
            spread: quartile(&sorted, 3).instructions - quartile(&sorted, 1).instructions,
            waiting: median.waiting,
            rounds: each,
            calls: calls(&split),
        }
    };
    first.iter().enumerate().map(row).collect()
}

/// Returns the median of the calls of each name.
fn calls(rounds: &[&Step]) -> Vec<Call> {
    let Some(first) = rounds.first() else { return Vec::new() };
    let of_name = |call: &Calls| {
        let same = |step: &&Step| step.calls.iter().find(|other| other.name == call.name).copied();
        let sorted = sorted(rounds.iter().filter_map(same).collect(), |call| call.worked);
        let median = quartile(&sorted, 2);
        Call {
            name: call.name.to_owned(),
            calls: median.calls,
            instructions: nanos(median.worked),
            waiting: nanos(median.time.saturating_sub(median.worked)),
        }
    };
    first.calls.iter().map(of_name).collect()
}

fn sorted<T, K: Ord>(mut all: Vec<T>, by: impl Fn(&T) -> K) -> Vec<T> {
    all.sort_by_key(by);
    all
}

/// Returns a quartile; the second is the median.
fn quartile<T>(sorted: &[T], quarter: usize) -> &T {
    &sorted[(sorted.len() * quarter / 4).min(sorted.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Taken = Taken { worked: Duration::ZERO, took: Duration::ZERO };

    fn taken(worked: u64, waited: u64) -> Taken {
        Taken { worked: Duration::from_nanos(worked), took: Duration::from_nanos(worked + waited) }
    }

    #[test]
    fn a_row_is_the_median_and_the_distance_of_the_quartiles() {
        let round = |instructions, waiting| {
            let open = taken(instructions, waiting).step("open", NONE, Vec::new());
            vec![open, taken(7, 0).step("close", NONE, Vec::new())]
        };
        let mut rounds = [round(500, 3), round(100, 1), round(300, 2), round(9000, 4), round(200, 5)];
        // A round that only opens the device.
        rounds[4].truncate(1);
        let rows = merge("e1000e", "cdev", &rounds, &[]);
        let row = |name: &str, instructions, spread, waiting, rounds: &[(u64, u64)]| Row {
            nic: "e1000e".into(),
            mode: "cdev".into(),
            step: name.into(),
            memory: None,
            bytes: None,
            packets: None,
            instructions,
            spread,
            waiting,
            rounds: rounds.iter().map(|&(instructions, waiting)| Round { instructions, waiting }).collect(),
            calls: Vec::new(),
        };
        let open = row("open", 300, 300, 2, &[(500, 3), (100, 1), (300, 2), (9000, 4), (200, 5)]);
        assert_eq!(rows, [open, row("close", 7, 0, 0, &[(7, 0); 4])]);
    }

    #[test]
    fn what_reading_the_clocks_takes_is_left_out() {
        let step = taken(1500, 900).step("reset", taken(900, 20), Vec::new());
        assert_eq!((step.instructions, step.waiting), (600, 880));
        let nothing = taken(890, 15).step("reset", taken(900, 20), Vec::new());
        assert_eq!((nothing.instructions, nothing.waiting), (0, 0));
    }

    #[test]
    fn a_call_is_the_median_of_the_rounds_that_tell() {
        let round = |worked, waited, calls| {
            let Taken { worked, took: time } = taken(worked, waited);
            let call = Calls { name: "VFIO_DEVICE_RESET", calls, time, worked };
            vec![taken(1, 0).step("reset", NONE, vec![call])]
        };
        let rows =
            merge("e1000e", "cdev", &[round(0, 9, 1)], &[round(30, 2, 1), round(10, 1, 1), round(20, 3, 1)]);
        let call = Call { name: "VFIO_DEVICE_RESET".into(), calls: 1, instructions: 20, waiting: 3 };
        assert_eq!(rows[0].calls, [call]);
    }

    #[test]
    fn nobody_counts_by_an_ordinary_clock() {
        assert!(std::env::var_os("VIREO_LAB_ICOUNT").is_none());
        let error = check_clock().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().ends_with("run: scripts/lab count"), "{error}");
    }
}
