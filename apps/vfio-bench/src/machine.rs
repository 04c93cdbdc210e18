//! How much CPU time and speed the machine gives to a run.

use std::fs;
use std::hint::black_box;
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};

use crate::record::Machine;

/// Additions per measurement of the CPU's speed. They take some milliseconds.
const STEPS: u32 = 2_000_000;
/// A tick of `/proc/stat` in milliseconds (`USER_HZ` is 100 on every architecture that Vireo runs on).
const TICK_MS: f64 = 10.0;

/// Counters at the start of a run.
#[derive(Debug)]
pub(crate) struct Watch(Machine);

impl Watch {
    pub(crate) fn begin() -> Self {
        let since = Instant::now();
        (0..STEPS).for_each(|step| _ = black_box(step));
        let micros = since.elapsed().as_secs_f64() * 1e6;
        Self(Machine { speed: f64::from(STEPS) / micros, ..counters() })
    }

    pub(crate) fn end(self) -> Machine {
        let (before, now) = (self.0, counters());
        Machine {
            speed: before.speed,
            steal_ms: now.steal_ms - before.steal_ms,
            pressure_ms: now.pressure_ms - before.pressure_ms,
            preemptions: now.preemptions.saturating_sub(before.preemptions),
        }
    }
}

/// Reads the counters of the kernel; 0 for those it does not have.
fn counters() -> Machine {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    Machine {
        speed: 0.0,
        steal_ms: steal_ticks(&read("/proc/stat")).unwrap_or_default() as f64 * TICK_MS,
        pressure_ms: pressure_us(&read("/proc/pressure/cpu")).unwrap_or_default() as f64 / 1e3,
        preemptions: getrusage(UsageWho::RUSAGE_SELF)
            .map_or(0, |usage| usage.involuntary_context_switches().cast_unsigned()),
    }
}

/// Returns the eighth number of the first line (`Documentation/filesystems/proc.rst`).
fn steal_ticks(stat: &str) -> Option<u64> {
    stat.strip_prefix("cpu ")?.split_whitespace().nth(7)?.parse().ok()
}

/// Returns `total` of the line `some` (`Documentation/accounting/psi.rst`).
fn pressure_us(cpu: &str) -> Option<u64> {
    cpu.lines().find_map(|line| line.strip_prefix("some ")?.split_once("total="))?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        assert_eq!(steal_ticks("cpu  1 2 3 4 5 6 7 88 9 10\ncpu0 1"), Some(88));
        assert_eq!(steal_ticks("intr 1"), None);
        let pressure = "some avg10=1.10 avg60=0.50 avg300=0.10 total=123456\nfull avg10=0.00 total=0\n";
        assert_eq!(pressure_us(pressure), Some(123_456));
        assert_eq!(pressure_us(""), None);
    }

    #[test]
    fn a_watch_counts_what_happens_meanwhile() {
        let machine = Watch::begin().end();
        assert!(machine.speed > 0.0 && machine.steal_ms >= 0.0 && machine.pressure_ms >= 0.0, "{machine:?}");
    }
}
