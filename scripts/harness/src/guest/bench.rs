//! vfio-bench on the guest's NICs: the contents of a recording, and the checks before a recording starts.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Boot;
use super::machine::{Nic, Role};
use super::traffic::start_steady_stream;
use crate::case::{Cases, Context, read};
use crate::process::{Ended, run_for};

/// Time limit for a round: a NIC may need seconds for each start.
const ROUND: Duration = Duration::from_secs(120);

pub(super) fn cases(cases: &mut Cases, boot: Boot, mode: &'static str) {
    cases.add("vfio-bench records rate, throughput, latency and start", move |context| {
        let runs = record(context, &["--nics", "e1000e", "--modes", mode])?;
        // The second run is the mode's twin.
        ensure!(runs.len() == 2, "{} runs, not 2", runs.len());
        for run in runs {
            for figure in ["forward_pps", "open_ms", "first_packet_ms"] {
                ensure!(run[figure].as_f64().unwrap_or_default() > 0.0, "{figure} is {}", run[figure]);
            }
            ensure!(run["latency_ns"]["p50"].as_u64().unwrap_or_default() > 0, "{}", run["latency_ns"]);
            let throughput = run["throughput"].as_array().context("no throughput")?;
            let frames: Vec<_> = throughput.iter().map(|found| found["frame"].as_u64()).collect();
            ensure!(frames == [Some(60), Some(1514)], "frames of {frames:?} bytes");
            let tried = |found: &Value| found["trials"].as_array().is_some_and(|trials| !trials.is_empty());
            ensure!(throughput.iter().all(tried), "a throughput without a trial");
        }
        let mut report = Command::new(context.program("vfio-bench"));
        run_for(context, "report", report.arg("report").arg(context.path("run.json")), ROUND)?.expect(0)?;
        Ok(())
    });
    cases.add("vfio-bench records beside an external generator", move |context| {
        let nic = Nic::E1000e;
        let pktgen = start_steady_stream(context, boot.generator_mode(), nic)?;
        let ports = [Role::FwdRx, Role::FwdTx].map(|role| nic.bdf(role)).join(",");
        let runs = record(context, &["--ports", &ports, "--cores", "1", "--modes", mode])?;
        pktgen.stop()?.intact()?;
        for run in runs {
            ensure!(run["forward_pps"].as_f64().unwrap_or_default() > 0.0, "{run}");
            ensure!(run["received"].as_u64() > Some(0) && run["latency_ns"]["count"] == 0, "{run}");
        }
        Ok(())
    });
    cases
        .add("vfio-bench names NICs that are not connected", move |context| {
            let nic = Nic::E1000e;
            let roles = [Role::GenTx, Role::FwdTx, Role::FwdRx, Role::GenRx].map(|role| nic.bdf(role));
            let ended = bench(context, &["--ports", &roles.join(","), "--modes", mode])?.expect(69)?;
            let wanted = format!("no frame from {} arrives at {}", roles[0], roles[1]);
            ensure!(ended.stderr.contains(&wanted), "unexpected output: {}", ended.stderr);
            Ok(())
        })
        .in_full();
}

/// Records a round and returns its runs.
fn record(context: &Context, arguments: &[&str]) -> Result<Vec<Value>> {
    bench(context, arguments)?.expect(0)?;
    let mut runs = Vec::new();
    let mut ended = false;
    for line in read(context.path("run.json"))?.lines() {
        let entry: Value = serde_json::from_str(line)?;
        runs.extend(entry.get("run").cloned());
        ended |= entry.get("end").is_some();
    }
    ensure!(ended, "the recording has no end");
    Ok(runs)
}

fn bench(context: &Context, arguments: &[&str]) -> Result<Ended> {
    let mut command = Command::new(context.program("vfio-bench"));
    command.arg("run").args(arguments).args(["--rounds", "1", "--limit", "1", "--map-mib", "16", "--json"]);
    run_for(context, "bench", command.arg(context.path("run.json")), ROUND)
}
