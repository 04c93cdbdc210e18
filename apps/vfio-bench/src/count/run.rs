//! `count run`: opens, maps, unmaps and closes in every mode, and counts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use vireo_bus_pci::Bus;
use vireo_eal::clock::thread_time;
use vireo_eal::mem::Region;
use vireo_eal::program::note;
use vireo_eal::vfio::{Vfio, VfioMode};
use vireo_eal::{Error, ErrorKind, Result};

use super::{Recording, Row, forward};
use crate::environment::environment;
use crate::measure::{Wiring, map_table, regions};
use crate::record::MapTime;
use crate::report::write_json;
use crate::run::wirings;

/// Count the instructions that each VFIO mode takes, and write a recording
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// File for the recording
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// Modes to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "container,cdev,compat")]
    modes: Vec<VfioMode>,
    /// Kinds of NIC; by default every kind of which four are bound to vfio-pci
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    nics: Vec<String>,
    /// Rounds; one more comes before them, whose counts are left out because the kernel then makes what it keeps
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Size of the region that is mapped, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    map_mib: u32,
}

/// A step of one round.
#[derive(Default)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) memory: Option<String>,
    pub(super) bytes: Option<u64>,
    pub(super) packets: Option<u64>,
    pub(super) instructions: u64,
    pub(super) waiting: u64,
    pub(super) in_ioctls: Option<u64>,
}

impl Step {
    pub(super) fn named(name: &'static str) -> Self {
        Self { name, ..Self::default() }
    }
}

pub(super) fn run(args: &RunArgs) -> Result<()> {
    check_clock()?;
    let (bus, mut rows) = (Bus::default(), Vec::new());
    // The same pages in all modes: how far they are scattered decides what they cost.
    let regions = regions((args.map_mib as usize) << 20)?;
    for wiring in wirings(&args.nics, &bus, note)? {
        for &mode in &args.modes {
            let rounds = (0..=args.rounds)
                .map(|_| round(&bus, &wiring, mode, &regions))
                .collect::<Result<Vec<_>>>()?;
            rows.extend(merge(wiring.nic, mode.name(), &rounds[1..]));
            note(&format!("{} {mode}", wiring.nic));
        }
    }
    write_json(&args.json, &Recording { environment: environment(args.rounds)?, rows })
}

/// Time is instructions only where somebody says so, and then a loop of twice the length takes twice the time, each time.
fn check_clock() -> Result<()> {
    const STEPS: u64 = 1 << 18;
    let wrong = |why: &str| {
        Err(Error::new(ErrorKind::Unavailable, "cannot count instructions", why)
            .mend("run: scripts/lab count"))
    };
    if std::env::var_os("VIREO_LAB_ICOUNT").is_none() {
        return wrong("this machine's clock does not");
    }
    let time = |steps: u64| {
        let since = Instant::now();
        for step in 0..steps {
            std::hint::black_box(step);
        }
        since.elapsed().as_nanos() as u64
    };
    // The least of some: the timer's interrupt comes now and then.
    let least = |steps: u64| (0..8).map(|_| time(steps)).min().unwrap_or_default();
    let near = |one: u64, other: u64| one.abs_diff(other) <= other / 1000;
    let once = least(STEPS);
    if near(least(STEPS), once) && near(least(2 * STEPS), 2 * once) {
        return Ok(());
    }
    wrong("a loop did not take the same time twice")
}

/// One life of a device, and of a forwarder.
fn round(
    bus: &Bus,
    wiring: &Wiring,
    mode: VfioMode,
    regions: &[(&'static str, Arc<Region>)],
) -> Result<Vec<Step>> {
    let vfio = Vfio::new(None);
    let device = bus.open(&wiring.inner[0], &vfio, mode)?;
    let phases = device.report.phases.iter();
    let mut steps: Vec<Step> = phases.map(|phase| step(phase.name, phase.worked, phase.took)).collect();
    let (_, reset) = measured("reset", || device.vfio().reset());
    steps.push(reset);
    for time in map_table(device.vfio().space(), regions)? {
        steps.extend(of_mapping(&time));
    }
    let ((), close) = measured("close", || drop((device, vfio)));
    steps.push(close);
    steps.extend(forward::steps(bus, wiring, mode)?);
    Ok(steps)
}

fn step(name: &'static str, worked: Duration, took: Duration) -> Step {
    let nanos = |time: Duration| time.as_nanos() as u64;
    let waiting = nanos(took.saturating_sub(worked));
    Step { instructions: nanos(worked), waiting, ..Step::named(name) }
}

pub(super) fn measured<T>(name: &'static str, body: impl FnOnce() -> T) -> (T, Step) {
    let (since, before) = (Instant::now(), thread_time());
    let result = body();
    (result, step(name, thread_time() - before, since.elapsed()))
}

fn of_mapping(time: &MapTime) -> [Step; 2] {
    let memory = format!("{}, {}", time.memory, time.call);
    let nanos = |ms: f64| (ms * 1e6).round() as u64;
    let of = |name, ms, in_ioctls| Step {
        memory: Some(memory.clone()),
        bytes: Some(time.bytes),
        instructions: nanos(ms),
        in_ioctls,
        ..Step::named(name)
    };
    [of("map", time.map_ms, Some(nanos(time.map_ioctl_ms))), of("unmap", time.unmap_ms, None)]
}

/// The median of each step over the rounds, which all have the same steps.
fn merge(nic: &str, mode: &str, rounds: &[Vec<Step>]) -> Vec<Row> {
    let Some(first) = rounds.first() else { return Vec::new() };
    let row = |(at, step): (usize, &Step)| {
        let mut all: Vec<&Step> = rounds.iter().filter_map(|steps| steps.get(at)).collect();
        all.sort_by_key(|step| step.instructions);
        let at = |quarter: usize| all[(all.len() * quarter / 4).min(all.len() - 1)];
        let median = at(2);
        Row {
            nic: nic.to_owned(),
            mode: mode.to_owned(),
            step: step.name.to_owned(),
            memory: step.memory.clone(),
            bytes: step.bytes,
            packets: step.packets,
            instructions: median.instructions,
            spread: at(3).instructions - at(1).instructions,
            waiting: median.waiting,
            in_ioctls: median.in_ioctls,
        }
    };
    first.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_median_and_the_distance_of_the_quartiles() {
        let round = |instructions, waiting| {
            vec![
                step(
                    "open",
                    Duration::from_nanos(instructions),
                    Duration::from_nanos(instructions + waiting),
                ),
                step("close", Duration::from_nanos(7), Duration::from_nanos(7)),
            ]
        };
        let rows = merge(
            "e1000e",
            "cdev",
            &[round(500, 3), round(100, 1), round(300, 2), round(9000, 4), round(200, 5)],
        );
        let row = |name: &str, instructions, spread, waiting| Row {
            nic: "e1000e".into(),
            mode: "cdev".into(),
            step: name.into(),
            memory: None,
            bytes: None,
            packets: None,
            instructions,
            spread,
            waiting,
            in_ioctls: None,
        };
        assert_eq!(rows, [row("open", 300, 300, 2), row("close", 7, 0, 0)]);
    }

    #[test]
    fn nobody_counts_by_an_ordinary_clock() {
        assert!(std::env::var_os("VIREO_LAB_ICOUNT").is_none());
        let error = check_clock().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().ends_with("run: scripts/lab count"), "{error}");
    }
}
