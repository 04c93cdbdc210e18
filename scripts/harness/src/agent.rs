//! Guest side of a boot: receives the names of cases over a virtio-serial port and sends reports back.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::case::{Outcome, Report, read};
use crate::guest::machine::{port, state};
use crate::guest::{Boot, soak};
use crate::process::Started;

/// Name of the virtio-serial port, in QEMU and in the guest.
pub(crate) const PORT: &str = "harness";

/// Request from the host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Run the case of this name.
    Case(String),
    /// Run this soak.
    Soak(soak::Plan),
}

/// Answer from the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The agent is ready, on a kernel of this release.
    Ready(String),
    /// The case or soak has ended.
    Done(Report),
    /// Progress of the request.
    Progress(String),
}

/// Serves requests until the host ends the boot.
pub(crate) fn serve(boot: Boot, full: bool, programs: &Path) -> Result<()> {
    let node = port(PORT)?.context("the guest has no virtio-serial port for the harness")?;
    let open = || OpenOptions::new().read(true).write(true).open(&node);
    let mut host = open().with_context(|| format!("cannot open {}", node.display()))?;
    let requests = BufReader::new(host.try_clone()?);
    let cases = boot.cases();
    answer(&mut host, &Answer::Ready(read("/proc/sys/kernel/osrelease")?.trim().to_owned()))?;
    let mut before = state();
    for line in requests.lines() {
        let report = match serde_json::from_str(&line?)? {
            Request::Soak(plan) => soak::run(&plan, programs, &mut |line| {
                // If the host is gone, sending the report fails.
                let _ = answer(&mut host, &Answer::Progress(line));
            }),
            Request::Case(name) => match cases.0.iter().find(|case| case.name == name) {
                None => Report { name, ..Report::failed("the guest has no such case".into()) },
                Some(case) => judged(case.run(full, programs, &Started::default()), &mut before),
            },
        };
        answer(&mut host, &Answer::Done(report))?;
    }
    Ok(())
}

fn answer(host: &mut File, answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_string(answer)?;
    line.push('\n');
    host.write_all(line.as_bytes()).context("cannot send the answer to the host")
}

/// Fails a case that left the machine changed.
fn judged(mut report: Report, before: &mut String) -> Report {
    let after = state();
    if after != *before && !matches!(report.outcome, Outcome::Failed(_)) {
        let gone = before
            .lines()
            .filter(|line| !after.lines().any(|is| is == *line))
            .map(|line| format!("- {line}"));
        let new = after
            .lines()
            .filter(|line| !before.lines().any(|was| was == *line))
            .map(|line| format!("+ {line}"));
        let changes: Vec<String> = gone.chain(new).collect();
        report.outcome =
            Outcome::Failed(format!("the case left the machine changed:\n{}", changes.join("\n")));
    }
    if matches!(report.outcome, Outcome::Failed(_)) {
        // Remove leftovers that would make the next case fail too.
        for entry in std::fs::read_dir("/var/run/vireo").into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
        *before = state();
    }
    report
}
