//! `count`: counts what each mode costs in instructions, in a guest whose clock counts them (`scripts/lab
//! count`).

mod forward;
mod run;
mod text;

use std::io::{Write, stdout};

use clap::Subcommand;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vireo_eal::{Error, Result};

use crate::record::Environment;
use crate::report::{MergeArgs, read, write_json};

pub(crate) use self::run::check_clock;
pub(crate) use self::text::{LEGEND, PARTS_LEGEND, Part, compared, cost, parts, text};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(run::RunArgs),
    Report(MergeArgs),
}

/// Counts of one boot.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Recording {
    pub(crate) environment: Environment,
    pub(crate) rows: Vec<Row>,
}

/// Counts of one step in one mode.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Row {
    /// `virtio-net`, `e1000` or `e1000e`.
    pub(crate) nic: String,
    /// Name of the VFIO mode.
    pub(crate) mode: String,
    /// Name of the step. Steps of one NIC are `open`, `bind`, `attach`, `reset` (if the NIC has one), `map`,
    /// `unmap` and `close`. Steps of a forwarder between two NICs are `start` (everything up to the first
    /// poll), `first packet` (`start` and the polls that forward the first packet) and `forward` (a poll that
    /// moves a burst).
    pub(crate) step: String,
    /// Page size and call of `map` and `unmap`, such as `2 MiB, map-file`.
    #[serde(default)]
    pub(crate) memory: Option<String>,
    /// Size of the region of `map` and `unmap`, in bytes.
    #[serde(default)]
    bytes: Option<u64>,
    /// Packets that `forward` moves in one poll.
    #[serde(default)]
    packets: Option<u64>,
    /// Instructions of the thread, in user space and in the kernel: median over the rounds. Every step except
    /// `forward` begins just after a timer interrupt. It therefore contains the same number of timer
    /// interrupts in each round, and none if it is shorter than their period.
    instructions: u64,
    /// Interquartile range of the instructions over the rounds.
    spread: u64,
    /// Instructions that would have fit into the time that the thread waited, in the same round.
    waiting: u64,
    /// Counts of each round, in order; empty in recordings of Vireo before 0.2.
    #[serde(default)]
    rounds: Vec<Round>,
    /// Calls to VFIO and iommufd in this step. Empty for `first packet`, whose calls are those of `start`,
    /// and in recordings of Vireo before 0.2. The instructions outside of calls are Vireo's own code, other
    /// system calls (sysfs, config space, memory), page faults and interrupts.
    #[serde(default)]
    calls: Vec<Call>,
}

/// Counts of a step in one round.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize, JsonSchema)]
struct Round {
    /// Instructions of the thread.
    instructions: u64,
    /// Instructions that would have fit into the time that the thread waited.
    waiting: u64,
}

/// Cost of the calls of one name in a step. Calls are counted in separate rounds, because counting them takes
/// instructions too, which no other figure contains.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, JsonSchema)]
struct Call {
    /// Name of the ioctl, such as `VFIO_IOMMU_MAP_DMA`; `open` for opening a device node; `close` for closing
    /// a device.
    name: String,
    /// Number of calls.
    calls: u64,
    /// Instructions of the thread in all of these calls: the kernel's, and a few around each system call.
    instructions: u64,
    /// Instructions that would have fit into the time that the thread waited in these calls.
    waiting: u64,
}

/// Contents of the JSON output.
#[derive(Debug, Serialize)]
struct Figures {
    /// Environment of each boot.
    environment: Vec<Environment>,
    counted: Vec<Row>,
}

pub(crate) fn count(command: &Command) -> Result<()> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Report(args) => report(args),
    }
}

fn report(args: &MergeArgs) -> Result<()> {
    let recordings = args.recordings.iter().map(|path| read(path)).collect::<Result<Vec<Recording>>>()?;
    let (environment, counted): (_, Vec<_>) =
        recordings.into_iter().map(|recording| (recording.environment, recording.rows)).unzip();
    let counted = counted.concat();
    stdout()
        .write_all((text(&counted) + &text::parts_text(&counted)).as_bytes())
        .map_err(|error| Error::io("cannot write to standard output", &error))?;
    args.json.as_ref().map_or(Ok(()), |path| write_json(path, &Figures { environment, counted }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_an_older_recording_is_read() {
        let row = r#"{"nic": "e1000e", "mode": "cdev", "step": "map", "memory": "2 MiB, map", "bytes": 134217728,
            "packets": null, "instructions": 3650228, "spread": 21, "waiting": 0, "in_ioctls": 3648481}"#;
        let row: Row = serde_json::from_str(row).unwrap();
        assert_eq!((row.instructions, row.bytes), (3_650_228, Some(128 << 20)));
        assert!(row.rounds.is_empty() && row.calls.is_empty());
        assert!(!text(std::slice::from_ref(&row)).contains("VFIO_"));
        assert_eq!(text::parts_text(&[row]), "");
    }
}
