//! Sentences about what else the machine did during the runs.

use super::numbered;
use crate::record::{Machine, Recording, Run};
use crate::words::{percent, round};

/// A run at less than this fraction of the CPU's best speed counts as disturbed.
const SLOW: f64 = 0.8;
/// A run counts as disturbed if it lost more than this many milliseconds to a hypervisor or to waiting for a
/// CPU.
const LOST_MS: f64 = 5.0;

/// Returns one sentence per boot and kind of disturbance.
pub(super) fn of(recordings: &[Recording]) -> Vec<String> {
    let mut found = Vec::new();
    for (boot, recording) in numbered(recordings) {
        let machines: Vec<&Machine> =
            recording.runs.iter().filter_map(|run: &Run| run.machine.as_ref()).collect();
        let best = machines.iter().map(|machine| machine.speed).fold(0.0, f64::max);
        let mut say = |count: usize, what: &str| {
            if count > 0 {
                found.push(format!("boot {boot}: {what} in {count} of {} runs", machines.len()));
            }
        };
        let slow = machines.iter().filter(|machine| machine.speed < SLOW * best);
        let slowest = machines.iter().map(|machine| machine.speed).fold(f64::INFINITY, f64::min) / best;
        say(
            slow.count(),
            &format!(
                "the CPU ran at less than {} % of its best speed (down to {} %)",
                round(SLOW),
                percent(slowest)
            ),
        );
        let count =
            |lost: fn(&Machine) -> f64| machines.iter().filter(|machine| lost(machine) > LOST_MS).count();
        say(count(|machine| machine.steal_ms), "a hypervisor gave the CPUs to other guests");
        say(count(|machine| machine.pressure_ms), "threads waited for a CPU");
    }
    found
}
