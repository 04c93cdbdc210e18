//! `coherence`: counts how often cache lines move between two cores that forward packets over shared memory.
//!
//! Between processes, most of the time per packet is that of cache lines on their way from one core to the other.
//! Their number depends on the code alone: valgrind records the memory accesses of a program that runs both ends
//! of a connection in one thread, and a simulation of two caches counts those that have to wait for the other
//! core.

mod caches;
mod trace;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use serde::{Deserialize, Serialize};
use vireo_eal::program::{self, note};
use vireo_eal::{Error, ErrorKind, Result};

use crate::report::write_json;
use crate::table::table;
use crate::words::three;
use trace::Replay;

/// Paths of the lane that forwards.
const PATHS: [&str; 2] = ["tied", "general"];
/// Packets per poll.
const BURSTS: [u32; 3] = [32, 8, 1];
/// Most cache lines that a packet in a full burst may move on a tied lane, by what the lane does with Ethernet
/// addresses: 2 for a packet that both ends write, and
/// for each burst two indices per ring, each of which is written at one end and read at the other.
const MOST: [(&str, f64); 2] = [("rewritten", 2.25), ("unchanged", 0.25)];

/// Count the cache lines that move between two cores per forwarded packet, in a simulation of their caches
#[derive(Args, Debug)]
pub(crate) struct CoherenceArgs {
    /// The example coherence of vireo-l2fwd, built with --features vireo-eal/trace-prefetches
    #[arg(value_name = "WORKLOAD")]
    workload: PathBuf,
    /// Also write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Count only full bursts on tied lanes, and fail if one moves more lines than the ring itself must
    #[arg(long)]
    check: bool,
}

/// A case, and its figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Path of the lane that forwards: `tied` or `general`.
    path: &'static str,
    /// What the lane does with Ethernet addresses: `rewritten` or `unchanged`.
    addresses: &'static str,
    /// Packets per poll.
    burst: u32,
    /// Cache lines per forwarded packet that a core has to wait for, because the other core has them.
    coherence_events: f64,
}

/// Contents of the JSON output.
#[derive(Serialize)]
struct Figures<'a> {
    coherence_events: &'a [Row],
}

/// What the workload prints.
#[derive(Deserialize)]
struct Said {
    packets: u64,
    mark: u64,
    maps: String,
}

pub(crate) fn coherence(args: &CoherenceArgs) -> Result<()> {
    let rows = count(&args.workload, args.check)?;
    program::print(&text(&rows))?;
    if let Some(path) = &args.json {
        write_json(path, &Figures { coherence_events: &rows })?;
    }
    if args.check { check(&rows) } else { Ok(()) }
}

/// Compares full bursts on tied lanes with [`MOST`].
fn check(rows: &[Row]) -> Result<()> {
    for row in rows {
        let (_, most) =
            MOST.into_iter().find(|(addresses, _)| *addresses == row.addresses).unwrap_or_default();
        if row.coherence_events > most {
            let what = format!(
                "{} cache lines move per packet with {} addresses",
                row.coherence_events, row.addresses
            );
            return Err(Error::new(ErrorKind::Protocol, what, format!("the ring needs no more than {most}")));
        }
    }
    Ok(())
}

/// Counts all cases with the program `workload`, or only those that [`MOST`] limits.
pub(crate) fn count(workload: &Path, only_limited: bool) -> Result<Vec<Row>> {
    let (paths, bursts) = if only_limited { (1, 1) } else { (PATHS.len(), BURSTS.len()) };
    let mut rows = Vec::new();
    for path in &PATHS[..paths] {
        for (addresses, _) in MOST {
            note(&format!("coherence: {path}, addresses {addresses}"));
            for burst in BURSTS.into_iter().take(bursts) {
                let coherence_events = case(workload, [&burst.to_string(), addresses, path])?;
                rows.push(Row { path, addresses, burst, coherence_events });
            }
        }
    }
    Ok(rows)
}

fn case(workload: &Path, args: [&str; 3]) -> Result<f64> {
    let failed = |why: String| {
        let run = format!("{} {}", workload.display(), args.join(" "));
        Error::new(ErrorKind::Os, format!("cannot count {run}"), why)
    };
    let directory = tempfile::tempdir().map_err(|error| Error::io("cannot create a directory", &error))?;
    let log = directory.path().join("trace");
    let output = Command::new("valgrind")
        .args(["--tool=lackey", "--trace-mem=yes"])
        .arg(format!("--log-file={}", log.display()))
        .arg(workload)
        .args(args)
        .output()
        .map_err(|error| {
            Error::io("cannot start valgrind", &error).with_hint("install it: apt-get install valgrind")
        })?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let said: Said = serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))?;
    let shared = trace::shared(&said.maps);
    let mut replay = Replay::new(&shared, said.mark);
    let unread = |error| Error::io(format!("cannot read {}", log.display()), &error);
    for line in BufReader::new(File::open(&log).map_err(unread)?).lines() {
        replay.line(&line.map_err(unread)?);
    }
    match replay.events() {
        Some(0) => Err(failed("it used no memory that both ends map".to_owned())),
        Some(events) => Ok(events as f64 / said.packets as f64),
        None => Err(failed("its marks are not in the trace".to_owned())),
    }
}

pub(crate) fn text(rows: &[Row]) -> String {
    let heads = ["path", "addresses", "burst", "cache lines per packet"];
    let cells = rows.iter().map(|row| {
        let Row { path, addresses, burst, coherence_events } = row;
        [path.to_string(), addresses.to_string(), burst.to_string(), three(*coherence_events)]
    });
    table(heads, 2, cells.collect(), false)
}
