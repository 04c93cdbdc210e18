//! `start eal`: times the EAL's start without any device, Vireo's and DPDK's in turn.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use vireo_eal::{Error, ErrorKind, Result};

use super::phases::{Recording, Row};
use crate::environment::environment;
use crate::report::write_json;
use crate::stats::median;

/// Time the EAL's start without any device and write a recording
#[derive(Args, Debug)]
pub(crate) struct EalArgs {
    /// File for the recording
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// Vireo's example program vireo-eal-start
    #[arg(long, value_name = "FILE")]
    vireo: PathBuf,
    /// The same program with DPDK; NAME says how it is linked
    #[arg(long, value_name = "NAME=FILE", required = true, value_parser = named)]
    dpdk: Vec<(String, PathBuf)>,
    /// Pairs of runs per DPDK program
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
}

fn named(text: &str) -> std::result::Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("it is not of the form NAME=FILE")?;
    Ok((name.to_owned(), path.into()))
}

/// Milliseconds of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    /// Time of the call that starts the EAL, including the parsing of its arguments.
    init: f64,
    /// Time from spawning the process to its end.
    process: f64,
}

pub(crate) fn run(args: &EalArgs) -> Result<()> {
    let mut recording =
        Recording { environment: environment(args.pairs)?, rows: Vec::new(), failures: Vec::new() };
    for (name, dpdk) in &args.dpdk {
        let pairs = (0..args.pairs).map(|pair| {
            let (first, second) = if pair % 2 == 0 { (&args.vireo, dpdk) } else { (dpdk, &args.vireo) };
            let (first, second) = (time(first)?, time(second)?);
            Ok(if pair % 2 == 0 { (first, second) } else { (second, first) })
        });
        recording.rows.extend(rows(name, &pairs.collect::<Result<Vec<_>>>()?));
    }
    write_json(&args.json, &recording)
}

fn rows(name: &str, pairs: &[(Sample, Sample)]) -> [Row; 2] {
    let row = |phase: &str, of: fn(&Sample) -> f64| Row {
        nic: None,
        mode: Some("none".into()),
        phase: format!("{phase}, {name}"),
        ms: median(&pairs.iter().map(|(vireo, _)| of(vireo)).collect::<Vec<_>>()).unwrap_or(f64::NAN),
        dpdk_ms: median(&pairs.iter().map(|(_, dpdk)| of(dpdk)).collect::<Vec<_>>()),
        counted: false,
    };
    [row("eal init", |sample| sample.init), row("process", |sample| sample.process)]
}

fn time(program: &Path) -> Result<Sample> {
    let mut command = Command::new(program);
    command.args(["--no-pci", "--no-huge", "-m", "64", "--file-prefix", "start"]);
    let since = Instant::now();
    let output =
        command.output().map_err(|error| Error::io(format!("cannot start {}", program.display()), &error))?;
    let process = since.elapsed().as_secs_f64() * 1e3;
    let printed = String::from_utf8_lossy(&output.stdout);
    match init(&printed) {
        Some(init) if output.status.success() => Ok(Sample { init, process }),
        _ => {
            let complaints = String::from_utf8_lossy(&output.stderr);
            let last = complaints.lines().last().unwrap_or("nothing");
            let why = format!("{}; its last line was: {last}", output.status);
            let what = format!("cannot time {}", program.display());
            Err(Error::new(ErrorKind::Protocol, what, why).with_hint(format!("run: {command:?}")))
        }
    }
}

/// Returns the milliseconds in `init took N ns`.
fn init(printed: &str) -> Option<f64> {
    let nanos = printed.lines().find_map(|line| line.strip_prefix("init took ")?.strip_suffix(" ns"))?;
    Some(nanos.parse::<u64>().ok()? as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_their_medians_taken() {
        assert_eq!(init("init took 1500000 ns\n"), Some(1.5));
        assert_eq!(init("EAL: something\n"), None);
        let sample = |init| Sample { init, process: init + 1.0 };
        let rows = rows("shared", &[(sample(1.0), sample(10.0)), (sample(3.0), sample(30.0))]);
        assert_eq!(
            (rows[0].phase.as_str(), rows[0].ms, rows[0].dpdk_ms),
            ("eal init, shared", 2.0, Some(20.0))
        );
        assert_eq!((rows[1].phase.as_str(), rows[1].ms), ("process, shared", 3.0));
        assert!(time(Path::new("true")).unwrap_err().to_string().contains("cannot time true"));
    }
}
