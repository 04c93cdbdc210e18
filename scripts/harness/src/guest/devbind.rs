//! devbind: NICs by interface and by pattern, and requests that devbind refuses.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use scopeguard::guard;
use serde_json::Value;

use super::machine::{Nic, Role, device, is_bound, program, rebind_on_drop};
use super::refuse::one_line;
use crate::case::{Cases, Context};
use crate::process::run;

pub(super) fn cases(cases: &mut Cases) {
    cases.add("devbind: NICs by interface and by pattern", by_name);
    cases.add("devbind: an interface in another network namespace", elsewhere).on_both_kernels();
}

fn nic() -> String {
    Nic::E1000e.bdf(Role::FwdRx)
}

/// Binds the NIC to e1000e by a pattern, and returns the name of its interface.
fn to_kernel(context: &Context) -> Result<String> {
    let nic = nic();
    let pattern = nic.trim_start_matches("0000:").replace(".0", ".*");
    program(context, "devbind", &format!("--bind e1000e {pattern}"))?.expect(0)?;
    ensure!(is_bound(&nic, "e1000e"), "not bound to e1000e");
    let mut entries = fs::read_dir(device(&nic).join("net"))?;
    entries
        .next()
        .context("the NIC has no interface")??
        .file_name()
        .into_string()
        .ok()
        .context("the name of the interface is not UTF-8")
}

/// The NIC's entry in the output of `--status-dev net`.
fn status(context: &Context) -> Result<Value> {
    let ended = program(context, "devbind", "--status-dev net --json")?.expect(0)?;
    let list: Vec<Value> = serde_json::from_str(&ended.stdout)?;
    list.into_iter().find(|entry| entry["address"] == nic()).context("the NIC is not on the list")
}

fn by_name(context: &Context) -> Result<()> {
    let _again = rebind_on_drop(nic());
    let interface = to_kernel(context)?;
    let listed = status(context)?;
    ensure!(listed["interfaces"] == serde_json::json!([interface]), "listed: {listed}");
    ensure!(listed["active"] == false && listed["recorded"] == "vfio-pci", "listed: {listed}");
    let refused = program(context, "devbind", &format!("--bind vfio-pci {interface}0"))?.expect(69)?;
    one_line(&refused.stderr, "vireo-devbind", "no PCI device has a network interface of that name")?;
    program(context, "devbind", &format!("--bind vfio-pci {interface}"))?.expect(0)?;
    ensure!(is_bound(&nic(), "vfio-pci"), "not bound to vfio-pci");
    ensure!(status(context)?["recorded"].is_null(), "the record was not deleted");
    Ok(())
}

fn elsewhere(context: &Context) -> Result<()> {
    let _again = rebind_on_drop(nic());
    let interface = to_kernel(context)?;
    // The shell prints a line once it is in the namespace, and the namespace ends with the shell.
    let mut shell = Command::new("unshare");
    shell.args(["-n", "sh", "-c", "echo; exec sleep 1000"]).stdout(Stdio::piped()).process_group(0);
    let mut shell = guard(shell.spawn()?, |mut shell| {
        let _ = shell.kill();
        let _ = shell.wait();
    });
    let mut line = String::new();
    BufReader::new(shell.stdout.take().context("no pipe")?).read_line(&mut line)?;
    ensure!(!line.is_empty(), "the guest has no network namespaces");
    let mut link = Command::new("ip");
    link.args(["link", "set", "dev", &interface, "netns", &shell.id().to_string()]);
    run(context, "ip", &mut link)?.expect(0)?;

    let listed = status(context)?;
    ensure!(listed["other_namespace"] == true && listed["active"] == true, "listed: {listed}");
    let refused = program(context, "devbind", &format!("--bind vfio-pci {}", nic()))?.expect(75)?;
    one_line(&refused.stderr, "vireo-devbind", "its interface is in another network namespace")?;
    ensure!(is_bound(&nic(), "e1000e"), "the NIC was taken from e1000e");
    program(context, "devbind", &format!("--force --bind vfio-pci {}", nic()))?.expect(0)?;
    ensure!(is_bound(&nic(), "vfio-pci"), "not bound to vfio-pci");
    Ok(())
}
