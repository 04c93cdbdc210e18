//! vfio-bench's references: other forwarders than Vireo's, on NICs that are bound to vfio-pci again
//! afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::machine::{Nic, Role, is_bound, rebind_on_drop};
use crate::case::{Cases, Context, read, skip};
use crate::process::{Process, await_that, run_for};

/// Time limit for a run; testpmd alone needs several seconds to start.
const PATIENCE: Duration = Duration::from_secs(180);
const BRIDGE: &str = "/sys/class/net/vireo-bridge";
/// Directories of DPDK's libraries on Debian, which include the drivers that testpmd loads. On Debian one
/// directory is a link to the other, but not in the guest.
const LIBRARIES: [&str; 2] = ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"];

pub(super) fn cases(cases: &mut Cases) {
    for (reference, name) in [("bridge", "bridge"), ("testpmd", "testpmd")] {
        cases
            .add(format!("reference: {name} forwards, and the NICs are on vfio-pci again"), move |context| {
                forwards(context, reference, name)
            })
            .in_full()
            .limit(240);
    }
    cases
        .add("reference: a signal removes the bridge, and the NICs are on vfio-pci again", ends_by_signal)
        .in_full()
        .limit(240);
}

fn bench(context: &Context, reference: &str, seconds: &str) -> (Command, PathBuf) {
    let file = context.path("run.json");
    let mut command = Command::new(context.program("vfio-bench"));
    command.args(["run", "--nics", "e1000e", "--modes", "container", "--rounds", "1", "--map-mib", "2"]);
    command.args(["--seconds", seconds, "--trial", "0.05", "--frame-sizes", "60", "--references", reference]);
    command.arg("--json").arg(&file);
    (command, file)
}

fn forwards(context: &Context, reference: &str, name: &str) -> Result<()> {
    let _again = [Role::FwdRx, Role::FwdTx].map(|role| rebind_on_drop(Nic::E1000e.bdf(role)));
    let (mut command, file) = bench(context, reference, "0.1");
    if reference == "testpmd" {
        if !Path::new("/bin/dpdk-testpmd").exists() {
            return skip("the guest has no dpdk-testpmd; run on the host: apt-get install dpdk-dev");
        }
        command.args(["--plugins", &plugins()?]);
    }
    run_for(context, "vfio-bench", &mut command, PATIENCE)?.expect(0)?;
    let lines = read(file)?;
    let lines = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let runs: Vec<&Value> =
        lines.iter().map(|line| &line["run"]).filter(|run| run["pair"] == "reference").collect();
    ensure!(runs.len() == 1 && runs[0]["mode"] == name, "runs of references: {runs:?}");
    ensure!(runs[0]["forward_pps"].as_f64() > Some(1000.0), "the reference forwarded nothing: {}", runs[0]);
    ensure!(runs[0]["latency_ns"]["count"].as_u64() > Some(0), "the run has no latency: {}", runs[0]);
    given_back()
}

/// File names of the drivers that testpmd needs for these NICs, as the lab has installed them.
fn plugins() -> Result<String> {
    let wanted =
        ["bus_pci", "bus_vdev", "mempool_ring", "net_e1000"].map(|name| format!("librte_{name}.so."));
    let files = LIBRARIES.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
    let files = files.filter_map(|entry| entry.file_name().into_string().ok());
    let files: Vec<String> = files.filter(|file| wanted.iter().any(|name| file.starts_with(name))).collect();
    ensure!(files.len() == wanted.len(), "the guest has only these of testpmd's drivers: {files:?}");
    Ok(files.join(","))
}

fn ends_by_signal(context: &Context) -> Result<()> {
    let _again = [Role::FwdRx, Role::FwdTx].map(|role| rebind_on_drop(Nic::E1000e.bdf(role)));
    let (mut command, _) = bench(context, "bridge", "2");
    let mut bench = Process::spawn(context, "vfio-bench", &mut command)?;
    // Once both NICs are in the bridge, the bridge forwards or is about to.
    let ports = || fs::read_dir(format!("{BRIDGE}/brif")).map_or(0, Iterator::count);
    await_that("both ports in the bridge", PATIENCE, || ports() == 2)?;
    bench.signal(Signal::SIGTERM)?;
    bench.wait(PATIENCE)?;
    given_back()
}

fn given_back() -> Result<()> {
    ensure!(!Path::new(BRIDGE).exists(), "the bridge was not removed");
    for role in [Role::FwdRx, Role::FwdTx] {
        let nic = Nic::E1000e.bdf(role);
        ensure!(is_bound(&nic, "vfio-pci"), "{nic} is not bound to vfio-pci");
    }
    Ok(())
}
