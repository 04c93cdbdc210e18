//! `start`: times what a forwarder does between its start and its first packet, for Vireo and for DPDK.

mod eal;
mod phases;
mod run;
mod waterfall;

use std::io::{Write, stdout};

use clap::Subcommand;
use serde::Serialize;
use vireo_eal::{Error, Result};

use crate::record::Environment;
use crate::report::{MergeArgs, read, write_json};
use phases::{Recording, Row};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(run::RunArgs),
    Eal(eal::EalArgs),
    Report(MergeArgs),
}

/// Contents of the JSON output.
#[derive(Debug, Serialize)]
struct Figures {
    /// Environment of each recording.
    environment: Vec<Environment>,
    rows: Vec<Row>,
}

pub(crate) fn start(command: &Command) -> Result<()> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Eal(args) => eal::run(args),
        Command::Report(args) => report(args),
    }
}

fn report(args: &MergeArgs) -> Result<()> {
    let recordings = args.recordings.iter().map(|path| read(path)).collect::<Result<Vec<Recording>>>()?;
    stdout()
        .write_all(waterfall::text(&recordings).as_bytes())
        .map_err(|error| Error::io("cannot write to standard output", &error))?;
    let Some(path) = &args.json else { return Ok(()) };
    let (environment, rows): (_, Vec<_>) =
        recordings.into_iter().map(|recording| (recording.environment, recording.rows)).unzip();
    write_json(path, &Figures { environment, rows: rows.concat() })
}
