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

pub(crate) use self::text::{LEGEND, cells, cost, text};

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
    /// Of one NIC `open`, `bind`, `attach`, `reset`, `map`, `unmap` and `close`; of a forwarder between two of them `start`,
    /// which is all of its way to the first poll, and `forward`, a poll that moves a burst.
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
    /// Instructions of the thread, of ours and of the kernel: the median over the rounds. An interrupt adds some, and takes
    /// some away from a loop in which the kernel waits.
    instructions: u64,
    /// Difference of the quartiles.
    spread: u64,
    /// Instructions that would have fitted into the time in which the thread waited, in the same round.
    waiting: u64,
    /// Of the instructions, those of ioctls; none where that was not counted.
    #[serde(default)]
    in_ioctls: Option<u64>,
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
        .write_all(text(&counted).as_bytes())
        .map_err(|error| Error::io("cannot write to standard output", &error))?;
    args.json.as_ref().map_or(Ok(()), |path| write_json(path, &Figures { environment, counted }))
}
