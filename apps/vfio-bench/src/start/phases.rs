//! The phases of a start, derived from what the program prints.

use serde::{Deserialize, Serialize};
use vireo_eal::Result;
use vireo_eal::clock::Tsc;

use crate::process::Process;
use crate::record::Environment;
use crate::stats::median;

/// Rows from one place: a boot of the guest, or the host.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Recording {
    pub(crate) environment: Environment,
    pub(crate) rows: Vec<Row>,
    /// Starts that failed, each with its reason. `rows` are medians of the others.
    #[serde(default)]
    pub(crate) failures: Vec<String>,
}

/// Medians of one phase.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Row {
    /// `None` if no device takes part.
    pub(crate) nic: Option<String>,
    /// VFIO mode.
    pub(crate) mode: Option<String>,
    pub(crate) phase: String,
    pub(crate) ms: f64,
    /// `None` if DPDK has no such mode or did not start.
    pub(crate) dpdk_ms: Option<f64>,
    /// Whether a millisecond is a million instructions, or a wait in which they would have fit.
    #[serde(default)]
    pub(crate) counted: bool,
}

/// A phase, and texts of which the first to appear ends the phase.
pub(super) type Mark = (&'static str, &'static [&'static str]);

/// Marks of l2fwd. The text of `eal` is logged at level debug: `--log-level lib.eal.init:debug`.
pub(super) const L2FWD: [Mark; 5] = [
    ("eal", &["EAL: debug: initialized"]),
    ("devices", &["Port 0: "]),
    ("memory", &["Initializing port 0"]),
    ("ports", &["Checking link status"]),
    ("link", &["entering main loop"]),
];

/// Marks of testpmd in DPDK 22.11. The bus opens a device either before it names the driver (e1000, whose
/// registers it maps) or after that (virtio). Memory is mapped for the devices in `devices` and, when the
/// heap grows for the pool, in `memory`.
pub(super) const TESTPMD: [Mark; 5] = [
    ("eal", &["EAL: Probe PCI driver", "EAL: Using IOMMU type"]),
    ("devices", &["create a new mbuf pool"]),
    ("memory", &["Configuring Port 0"]),
    ("ports", &["Checking link statuses"]),
    ("link", &["Done"]),
];

/// Phase from the start of the main loop to the arrival of a frame.
const FIRST_PACKET: &str = "first packet";
pub(super) const TOTAL: &str = "total";

/// Milliseconds of each phase of one start, including the first packet, and their sum.
pub(super) type Phases = Vec<(&'static str, f64)>;

/// Waits for `marks`, and returns when each phase ended, in TSC ticks.
pub(super) fn ends(program: &mut Process, marks: &[Mark]) -> Result<Vec<(&'static str, u64)>> {
    marks.iter().map(|(phase, texts)| Ok((*phase, program.arrival_of(texts)?))).collect()
}

/// Returns the phases of a program that began at `began` and whose first frame arrived at `first`, in TSC ticks.
pub(super) fn phases(began: u64, mut ends: Vec<(&'static str, u64)>, first: u64) -> Phases {
    ends.push((FIRST_PACKET, first));
    between(began, &ends)
}

/// Returns the lengths of the phases that end at `ends`, and their sum. A frame can arrive before the program
/// reports that it forwards. The first packet's phase then has length 0.
fn between(began: u64, ends: &[(&'static str, u64)]) -> Phases {
    let ms = |from: u64, to: u64| Tsc::to_nanos(to.saturating_sub(from)) as f64 / 1e6;
    let mut last = began;
    let lengths = ends.iter().map(|&(phase, end)| {
        let end = end.max(last);
        (phase, ms(std::mem::replace(&mut last, end), end))
    });
    let mut phases: Phases = lengths.collect();
    phases.push((TOTAL, ms(began, last)));
    phases
}

/// Returns the medians over several starts.
pub(super) fn rows(nic: &str, mode: &str, [vireo, dpdk]: [&[Phases]; 2], counted: bool) -> Vec<Row> {
    let Some(first) = vireo.first() else { return Vec::new() };
    let of = |phase: &str, starts: &[Phases]| {
        let lengths = starts.iter().flatten().filter(|(name, _)| *name == phase);
        median(&lengths.map(|(_, ms)| *ms).collect::<Vec<_>>())
    };
    let row = |&(phase, _): &(&str, f64)| Row {
        nic: Some(nic.to_owned()),
        mode: Some(mode.to_owned()),
        phase: phase.to_owned(),
        ms: of(phase, vireo).unwrap_or(f64::NAN),
        dpdk_ms: of(phase, dpdk),
        counted,
    };
    first.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn ticks(ms: u64) -> u64 {
        Tsc::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn phases_end_where_the_next_begin() {
        let phases = between(
            ticks(5),
            &[("eal", ticks(7)), ("devices", ticks(10)), ("link", ticks(30)), (FIRST_PACKET, ticks(29))],
        );
        let rounded: Vec<_> = phases.iter().map(|(phase, ms)| (*phase, ms.round())).collect();
        let expected = [("eal", 2.0), ("devices", 3.0), ("link", 20.0), (FIRST_PACKET, 0.0), (TOTAL, 25.0)];
        assert_eq!(rounded, expected);
    }

    #[test]
    fn marks_are_found_in_their_order() {
        let script = "echo EAL: Using IOMMU type 1; echo EAL: Probe PCI driver: a; \
            echo create a new mbuf pool; echo Configuring Port 0; echo Checking link statuses...; echo Done; cat";
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut program = Process::start(command).unwrap();
        let ends = ends(&mut program, &TESTPMD).unwrap();
        let phases = phases(program.started(), ends, u64::MAX);
        let names: Vec<_> = phases.iter().map(|(phase, _)| *phase).collect();
        assert_eq!(names, ["eal", "devices", "memory", "ports", "link", FIRST_PACKET, TOTAL]);
        assert!(phases[0].1 > 0.0);
    }

    #[test]
    fn rows_are_medians() {
        let start = |ms| vec![("eal", ms), (TOTAL, ms)];
        let rows = rows("e1000e", "cdev", [&[start(3.0), start(1.0), start(2.0)], &[]], false);
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].phase.as_str(), rows[0].ms, rows[0].dpdk_ms), ("eal", 2.0, None));
    }
}
