//! `report`: recordings in, tables and files out.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind as IoKind, IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};
use std::process;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vireo_eal::{Error, ErrorKind, Result};

use crate::compare::Comparison;
use crate::record::Recording;
use crate::{html, table};

/// Merges recordings of several boots and prints what they say about the modes.
#[derive(clap::Args, Debug)]
pub(crate) struct ReportArgs {
    /// Recordings that `run` wrote, one per boot
    #[arg(required = true, value_name = "IN.json")]
    recordings: Vec<PathBuf>,
    /// Also writes rows, pairs, maps, environment and noise floor as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also writes a page with plots that needs nothing else, not even a network
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
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

/// Prints and writes the report; packets that do not add up are an error, after everything is written.
pub(crate) fn report(args: &ReportArgs) -> Result<()> {
    report_to(args, &mut stdout(), stdout().is_terminal())
}

/// [`report`], printing to `out`, with rules around the tables if that is a terminal.
pub(crate) fn report_to(args: &ReportArgs, out: &mut impl Write, terminal: bool) -> Result<()> {
    let recordings = args.recordings.iter().map(|path| read(path)).collect::<Result<Vec<Recording>>>()?;
    if recordings.iter().all(|r| r.runs.is_empty() && r.maps.is_empty()) {
        let why = "the recordings hold no runs";
        return Err(
            Error::new(ErrorKind::Usage, "nothing to report", why).mend("record with: run --json FILE")
        );
    }
    let comparison = Comparison::of(&recordings);
    if let Some(path) = &args.json {
        write_json(path, &comparison)?;
    }
    if let Some(path) = &args.html {
        write(path, &html::page(&comparison)?)?;
    }
    match out.write_all(table::text(&comparison, terminal).as_bytes()) {
        // `report … | head` has seen enough.
        Err(e) if e.kind() != IoKind::BrokenPipe => return Err(Error::io("cannot print the report", &e)),
        _ => {}
    }
    match comparison.problems.as_slice() {
        [] => Ok(()),
        [first, ..] => {
            let what = format!("packets do not add up in {} run(s)", comparison.problems.len());
            Err(Error::new(ErrorKind::Protocol, what, first)
                .mend("the rows marked ! prove nothing; run again"))
        }
    }
}

pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let what = format!("cannot read recording {}", path.display());
    let file = File::open(path).map_err(|e| Error::io(&what, &e))?;
    // The text of serde_json names line and column.
    serde_json::from_reader(BufReader::new(file)).map_err(|e| match e.io_error_kind() {
        Some(kind) => Error::io(&what, &kind.into()),
        None => Error::new(ErrorKind::Io, &what, e.to_string()),
    })
}

pub(crate) fn write_json(path: &Path, figures: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(figures)
        .map_err(|e| Error::new(ErrorKind::Protocol, "cannot write JSON", e.to_string()))?;
    write(path, &(json + "\n"))
}

/// A reader never sees half a file; what is not a regular file (`/dev/stdout`) cannot be replaced.
fn write(path: &Path, text: &str) -> Result<()> {
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
