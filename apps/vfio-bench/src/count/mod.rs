//! `count`: what each mode costs in instructions, in a guest whose clock counts them (`scripts/lab count`).

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

pub(crate) use self::text::{LEGEND, PARTS_LEGEND, Part, compared, cost, parts, text};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(run::RunArgs),
    Report(MergeArgs),
}

/// What was counted in one boot.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Recording {
    pub(crate) environment: Environment,
    pub(crate) rows: Vec<Row>,
}

/// One step in one mode.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Row {
    /// `virtio-net`, `e1000` or `e1000e`.
    pub(crate) nic: String,
    /// Name of the VFIO mode.
    pub(crate) mode: String,
    /// Of one NIC `open`, `bind`, `attach`, `reset` (where it has one), `map`, `unmap` and `close`; of a forwarder between
    /// two of them `start`, which is all of its way to the first poll, `first packet`, which is that and the polls that
    /// forward the first one, and `forward`, a poll that moves a burst.
    pub(crate) step: String,
    /// Pages and call of `map` and `unmap`, such as `2 MiB, map-file`.
    #[serde(default)]
    pub(crate) memory: Option<String>,
    /// Size of the region of `map` and `unmap`.
    #[serde(default)]
    bytes: Option<u64>,
    /// Packets that `forward` moves in one poll.
    #[serde(default)]
    packets: Option<u64>,
    /// Instructions of the thread, of ours and of the kernel: the median over the rounds. Each step but `forward` begins just
    /// behind a timer interrupt, so that as many of these fall into it as it is long, each time, and none into one that is
    /// shorter than their period.
    instructions: u64,
    /// Difference of the quartiles.
    spread: u64,
    /// Instructions that would have fitted into the time in which the thread waited, in the same round.
    waiting: u64,
    /// Each round, in their order; none in recordings of Vireo before 0.2.
    #[serde(default)]
    rounds: Vec<Round>,
    /// Which of the instructions are calls to VFIO and iommufd; none for `first packet`, which has those of `start`, and in
    /// recordings of Vireo before 0.2. The rest is our own code, other system calls (sysfs, config space, memory), page
    /// faults and interrupts.
    #[serde(default)]
    calls: Vec<Call>,
}

/// A step in one round.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize, JsonSchema)]
struct Round {
    /// Instructions of the thread.
    instructions: u64,
    /// Instructions that would have fitted into the time in which it waited.
    waiting: u64,
}

/// What a step spends in calls of one name. It is counted in rounds of its own, because it takes instructions itself, which
/// are in no other figure.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, JsonSchema)]
struct Call {
    /// Name of the ioctl, such as `VFIO_IOMMU_MAP_DMA`; `open` of a device node; `close` of a device.
    name: String,
    /// How many.
    calls: u64,
    /// Instructions of the thread in all of them: the kernel's, but for a few around the system call.
    instructions: u64,
    /// Instructions that would have fitted into the time in which the thread waited in them.
    waiting: u64,
}

/// What is written as JSON.
#[derive(Debug, Serialize)]
struct Figures {
    /// Of each boot.
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
