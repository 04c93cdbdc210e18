//! `start`: times what a forwarder does between its start and its first packet, for Vireo and for DPDK.

mod eal;
mod phases;
mod run;
mod waterfall;

use std::io::{Write, stdout};

use clap::Subcommand;
use serde::Serialize;
use vireo_eal::{Error, ErrorKind, Result};

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
    /// Starts that failed, each with its reason. `rows` are medians of the others.
    failures: Vec<String>,
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
    let mut figures = Figures { environment: Vec::new(), rows: Vec::new(), failures: Vec::new() };
    for recording in recordings {
        figures.environment.push(recording.environment);
        figures.rows.extend(recording.rows);
        figures.failures.extend(recording.failures);
    }
    if let Some(path) = &args.json {
        write_json(path, &figures)?;
    }
    match figures.failures.as_slice() {
        [] => Ok(()),
        failures => Err(Error::new(
            ErrorKind::Unavailable,
            format!("starts that failed: {}", failures.len()),
            "the medians are over the others",
        )
        .with_hint("for more starts per median, run: bench start --rounds 10")),
    }
}
