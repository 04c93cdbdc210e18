//! Device nodes that a mode opens and those that it does not open, according to strace.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::ensure;

use super::machine::{NICS, Nic, Role, moved, need_mode, nodes_of, program};
use super::traffic::forwarder;
use crate::case::{Cases, Context, read};
use crate::process::run;

/// Kind of device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    Iommufd,
    Container,
    Group,
    Cdev,
}

fn node(path: &str) -> Option<Node> {
    match path {
        "/dev/iommu" => Some(Node::Iommufd),
        "/dev/vfio/vfio" => Some(Node::Container),
        // The directory is read to find a device's node.
        "/dev/vfio/devices" => None,
        _ if path.starts_with("/dev/vfio/devices/") => Some(Node::Cdev),
        _ if path.starts_with("/dev/vfio/") => Some(Node::Group),
        _ => None,
    }
}

/// Kinds of the device nodes that a trace of strace names.
fn traced(trace: &str) -> BTreeSet<Node> {
    trace.split('"').filter_map(node).collect()
}

/// Adds a case: `mode` opens nodes of these kinds and no others.
pub(super) fn opens(cases: &mut Cases, name: &str, mode: &'static str, kinds: &'static [Node]) {
    cases
        .add(name, move |context| {
            let trace = context.path("trace");
            let start =
                forwarder(mode, Nic::E1000e, Nic::VirtioNet).under(strace(context, "open,openat,openat2"));
            start.forwarding(context)?.stop()?;
            let opened = traced(&read(trace)?);
            ensure!(opened == kinds.iter().copied().collect(), "l2fwd opened {opened:?}");
            Ok(())
        })
        .on_both_kernels();
}

/// Adds a case with renamed device nodes. A container may see them under other names, so Vireo finds them by
/// their device numbers.
pub(super) fn by_other_names(cases: &mut Cases, mode: &'static str) {
    cases
        .add(format!("device nodes with other names, {mode}"), move |context| {
            need_mode(mode)?;
            let mut moves = Vec::new();
            for node in nodes_of(mode)? {
                let name = node.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if name != "iommu" {
                    // The name that a device plugin gives to a no-IOMMU group; any other name for the other
                    // nodes.
                    let other = name.strip_prefix("noiommu-").map_or(format!("{name}0000"), Into::into);
                    moves.push(moved(&node, &node.with_file_name(other))?);
                }
            }
            forwarder(mode, Nic::E1000e, Nic::VirtioNet).forwarding(context)?.stop()?;
            drop(moves);
            Ok(())
        })
        .on_both_kernels();
}

/// Command that traces `calls` of all threads to the file `trace`. strace runs as a grandchild, so that the
/// child is the program itself.
pub(super) fn strace(context: &Context, calls: &str) -> Vec<String> {
    let trace = context.path("trace").to_string_lossy().into_owned();
    ["strace", "-D", "-f", "-e", &format!("trace={calls}"), "-o", &trace].map(Into::into).into()
}

/// Adds a case: closing a device closes its group. A group can be opened only once, so a process that kept
/// one without a device would lock out all others.
pub(super) fn leaves(cases: &mut Cases, mode: &'static str) {
    cases.add(format!("a closed device leaves its group to others, {mode}"), move |context| {
        need_mode(mode)?;
        let devices = [Nic::E1000e, Nic::VirtioNet].map(|nic| nic.bdf(Role::FwdRx));
        let ended = program(context, "leave", &format!("{} {mode}", devices.join(" ")))?.expect(0)?;
        ensure!(ended.stdout.lines().count() == 3, "{}", ended.stdout);
        ensure!(ended.stderr.is_empty(), "the program printed errors");
        Ok(())
    });
}

/// Adds cases: a process that receives the descriptors opens no node and drives the device.
pub(super) fn hands_over(cases: &mut Cases, mode: &'static str) {
    for nic in NICS {
        cases
            .add(format!("descriptors of {} passed to another process, {mode}", nic.name()), move |context| {
                let mut command = Command::new("strace");
                command
                    .args(["-f", "-e", "trace=open,openat,openat2,execve", "-o"])
                    .arg(context.path("trace"));
                command.arg(context.program("handover")).args([nic.bdf(Role::FwdRx).as_str(), mode]);
                let said = run(context, "handover", &mut command)?.expect(0)?.stdout;
                let text = format!("mode {mode}: with descriptors from another process; first register");
                ensure!(said.contains(&text), "the device was not taken over");
                let trace = read(context.path("trace"))?;
                let taker: Vec<&str> = trace
                    .lines()
                    .skip_while(|line| !(line.contains("execve") && line.contains("\"take\"")))
                    .skip(1)
                    .collect();
                ensure!(!taker.is_empty(), "strace saw no second process");
                ensure!(traced(&taker.join("\n")).is_empty(), "the second process opened a node");
                Ok(())
            })
            .in_full_if(nic == Nic::E1000);
    }
}
