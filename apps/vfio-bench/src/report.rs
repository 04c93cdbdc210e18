//! `report`: turns recordings into tables and files.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind as IoKind, IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};
use std::process;

use clap::ArgAction;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vireo_eal::{Error, ErrorKind, Result, program};

use crate::compare::Comparison;
use crate::record::{self, Environment, Recording};
use crate::run::percent;
use crate::{count, html, table};

/// Default of `--margin`: modes count as equal if the interval of their ratio lies within this of 1.
pub(crate) const MARGIN: f64 = 0.05;
/// Version of the JSON report.
const SCHEMA: u32 = 2;

/// Merge recordings of several boots and print what they say about the modes
#[derive(clap::Args, Debug)]
pub(crate) struct ReportArgs {
    /// Recordings of `run`, one per boot
    #[arg(required = true, value_name = "IN.json")]
    recordings: Vec<PathBuf>,
    /// Recordings of `count run`, one per boot, to report instructions along with times
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    counted: Vec<PathBuf>,
    /// Modes that differ by less than this, up and down, are called the same
    #[arg(long, value_name = "PERCENT", default_value_t = MARGIN * 100.0, value_parser = percent)]
    margin: f64,
    /// Disturbance that the caller observed; the report begins with it
    #[arg(long, value_name = "TEXT", action = ArgAction::Append)]
    disturbance: Vec<String>,
    /// Accept incomplete recordings, and report them as far as they go
    #[arg(long)]
    partial: bool,
    /// Also write everything as JSON: environment, counted, timed, raw, disturbances
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also write a self-contained page with plots, which needs no network
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Contents of a report.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Report {
    schema: u32,
    /// Environments of the timed boots, then of the counted boots.
    pub(crate) environment: Vec<Environment>,
    pub(crate) counted: Vec<count::Row>,
    pub(crate) timed: Comparison,
    /// The complete recordings.
    raw: Vec<Recording>,
    /// What else the machine did while it was timed.
    disturbances: Vec<String>,
}

impl Report {
    pub(crate) fn of(
        raw: Vec<Recording>,
        counted: Vec<count::Recording>,
        margin: f64,
        disturbances: &[String],
    ) -> Self {
        let mut timed = Comparison::of(&raw, margin);
        timed.disturbances.extend_from_slice(disturbances);
        let timed_boots = raw.iter().map(|recording| recording.environment.clone());
        let counted_boots = counted.iter().map(|recording| recording.environment.clone());
        Self {
            schema: SCHEMA,
            environment: timed_boots.chain(counted_boots).collect(),
            counted: counted.into_iter().flat_map(|recording| recording.rows).collect(),
            disturbances: timed.disturbances.clone(),
            timed,
            raw,
        }
    }
}

/// Merge recordings and print them
#[derive(clap::Args, Debug)]
pub(crate) struct MergeArgs {
    /// Recordings of the other subcommands
    #[arg(required = true, value_name = "IN.json")]
    pub(crate) recordings: Vec<PathBuf>,
    /// Also write rows and environments as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// Prints and writes the report. If packets do not add up, fails after everything is written.
pub(crate) fn report(args: &ReportArgs) -> Result<()> {
    report_to(args, &mut stdout(), stdout().is_terminal())
}

/// Like [`report`], but prints to `out`, with rules around the tables if `terminal` is set.
pub(crate) fn report_to(args: &ReportArgs, out: &mut impl Write, terminal: bool) -> Result<()> {
    let raw =
        args.recordings.iter().map(|path| record::read(path, args.partial)).collect::<Result<Vec<_>>>()?;
    if raw.iter().all(|r| r.runs.is_empty() && r.maps.is_empty()) {
        let why = "the recordings contain no runs";
        return Err(
            Error::new(ErrorKind::Usage, "nothing to report", why).with_hint("record with: run --json FILE")
        );
    }
    for (path, recording) in args.recordings.iter().zip(&raw).skip(1) {
        if let Some(difference) = raw[0].environment.other_machine(&recording.environment) {
            let what =
                format!("cannot report {} and {} together", args.recordings[0].display(), path.display());
            return Err(Error::new(
                ErrorKind::Usage,
                what,
                format!("they are from different machines: {difference}"),
            )
            .with_hint("report each one separately"));
        }
    }
    let counted = args.counted.iter().map(|path| read(path)).collect::<Result<_>>()?;
    let report = Report::of(raw, counted, args.margin / 100.0, &args.disturbance);
    if let Some(path) = &args.json {
        // Not pretty-printed: it would have hundreds of thousands of lines, one for each value.
        write(path, &(json(serde_json::to_string(&report))? + "\n"))?;
    }
    if let Some(path) = &args.html {
        write(path, &html::page(&report)?)?;
    }
    match out.write_all(table::text(&report, terminal).as_bytes()) {
        // The reader of `report … | head` has seen enough.
        Err(e) if e.kind() != IoKind::BrokenPipe => return Err(Error::io("cannot print the report", &e)),
        _ => {}
    }
    match report.timed.problems.as_slice() {
        [] => Ok(()),
        [first, ..] => {
            let what = format!("packet counts do not add up in {} run(s)", report.timed.problems.len());
            Err(Error::new(ErrorKind::Protocol, what, first)
                .with_hint("the rows marked ! prove nothing; run again"))
        }
    }
}

/// Prints the JSON schema of `report --json`. Its descriptions explain each value.
pub(crate) fn schema() -> Result<()> {
    program::print(&(json(serde_json::to_string_pretty(&schemars::schema_for!(Report)))? + "\n"))
}

pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let what = format!("cannot read recording {}", path.display());
    let file = File::open(path).map_err(|e| Error::io(&what, &e))?;
    // The message of serde_json contains line and column.
    serde_json::from_reader(BufReader::new(file)).map_err(|e| match e.io_error_kind() {
        Some(kind) => Error::io(&what, &kind.into()),
        None => Error::new(ErrorKind::Io, &what, e.to_string()),
    })
}

pub(crate) fn write_json(path: &Path, figures: &impl Serialize) -> Result<()> {
    write(path, &(json(serde_json::to_string_pretty(figures))? + "\n"))
}

fn json(text: serde_json::Result<String>) -> Result<String> {
    text.map_err(|error| Error::new(ErrorKind::Protocol, "cannot write JSON", error.to_string()))
}

/// Replaces the file, so that a reader never sees half of it. If `path` is not a regular file
/// (`/dev/stdout`), it cannot be replaced and is written in place.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    let failed = |e: &std::io::Error| Error::io(format!("cannot write {}", path.display()), e);
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return fs::write(path, text).map_err(|e| failed(&e));
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", process::id()));
    let scratch = PathBuf::from(name);
    fs::write(&scratch, text).and_then(|()| fs::rename(&scratch, path)).map_err(|e| {
        let _ = fs::remove_file(&scratch);
        failed(&e)
    })
}
