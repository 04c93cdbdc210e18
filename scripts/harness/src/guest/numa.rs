//! Two NUMA nodes with one CPU each: the node that packet memory comes from, and the warnings about NICs,
//! lcores and memory on different nodes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::machine::{Nic, Role, device, set};
use super::refuse::refused_as;
use super::traffic::{carries, ports};
use crate::case::{Cases, read};
use crate::l2fwd::{L2fwd, Start};
use crate::process::run;

const NIC: Nic = Nic::E1000e;

/// Moves the forwarder's NICs to these nodes, as if firmware had reported them to the kernel.
fn on_nodes(rx: u32, tx: u32) -> Result<[impl Drop + use<>; 2]> {
    let at = |role, node: u32| {
        let file = device(&NIC.bdf(role)).join("numa_node");
        set(file, &node.to_string())
    };
    Ok([at(Role::FwdRx, rx)?, at(Role::FwdTx, tx)?])
}

fn hugepages_of(node: u32) -> PathBuf {
    format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages").into()
}

/// Builds a start of l2fwd. Lcore 1 runs on the CPU of node 1.
fn start(mode: &str, lcore: u32, memory: &str) -> Start {
    Start::new(format!("-l {lcore} --vfio-mode {mode} {memory} {} -- -p 3 -q 2 -T 0", ports(NIC, NIC)))
}

/// Number of hugepages of packet memory per node, as the kernel counts them.
fn pages(l2fwd: &L2fwd) -> Result<BTreeMap<u32, u64>> {
    let maps = read(format!("/proc/{}/numa_maps", l2fwd.process.pid()))?;
    let words = maps.lines().filter(|line| line.contains("/memfd:vireo")).flat_map(str::split_whitespace);
    let mut found = BTreeMap::new();
    for (node, pages) in words.filter_map(|word| word.strip_prefix('N')?.split_once('=')) {
        *found.entry(node.parse()?).or_default() += pages.parse::<u64>()?;
    }
    Ok(found)
}

pub(super) fn cases(cases: &mut Cases) {
    for mode in ["container", "cdev"] {
        cases.add(format!("packet memory is on the node of the NICs, {mode}"), move |context| {
            let _nodes = on_nodes(1, 1)?;
            let l2fwd = start(mode, 1, "").forwarding(context)?;
            let found = pages(&l2fwd)?;
            ensure!(found.keys().eq([&1]), "pages by node: {found:?}");
            l2fwd.stop()?;
            Ok(())
        });
    }
    cases.add("each of two NICs has memory on its node", |context| {
        let _nodes = on_nodes(0, 1)?;
        let l2fwd = start("cdev", 1, "").forwarding(context)?;
        let found = pages(&l2fwd)?;
        // Each node has half of the buffers, followed by rings.
        ensure!(found.get(&0) == Some(&5) && found.get(&1) == Some(&5), "pages by node: {found:?}");
        let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
        one_warning(&ended.stderr, "lcore 1 is on NUMA node 1, its port 0000:00:0d.0 is on node 0")
    });
    cases.add("frames cross between nodes, and every buffer comes back to its own", |context| {
        let _nodes = on_nodes(0, 1)?;
        let l2fwd = start("cdev", 1, "").forwarding(context)?;
        carries(context, "auto", NIC, NIC)?;
        let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
        one_warning(&ended.stderr, "packets cross between nodes; CPUs of node 0 for -l: 0")
    });
    cases.add("--numa-mem by node", |context| {
        let _nodes = on_nodes(1, 1)?;
        let l2fwd = start("cdev", 1, "--numa-mem 16,64").forwarding(context)?;
        let found = pages(&l2fwd)?;
        ensure!(found.get(&0) == Some(&8) && found.get(&1) == Some(&32), "pages by node: {found:?}");
        l2fwd.stop()?;
        Ok(())
    });
    cases.add("--numa-mem that leaves out the node of the NICs", |context| {
        let _nodes = on_nodes(1, 1)?;
        let l2fwd = start("cdev", 1, "--numa-mem 64,0").forwarding(context)?;
        let found = pages(&l2fwd)?;
        ensure!(found.keys().eq([&0]), "pages by node: {found:?}");
        let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
        one_warning(&ended.stderr, "is on node 1, and the port's packet memory is on node 0")
    });
    cases.add("refused: --numa-mem with too little for a node, until what it names", |context| {
        let _nodes = on_nodes(1, 1)?;
        let arguments = |memory: &str| format!("-l 1 --numa-mem {memory} {} -- -p 3 -q 2", ports(NIC, NIC));
        let line =
            refused_as(context, ("root", ""), &arguments("16,2"), (64, "need 18 MiB on node 1; use "))?;
        let (_, enough) = line.split_once("; use --numa-mem ").context("no hint")?;
        let enough = enough.split_whitespace().next().context("no hint")?;
        start("cdev", 1, &format!("--numa-mem {enough}")).forwarding(context)?.stop()?;
        let text = "cannot use --numa-mem 0,0,64: node 2 has no memory";
        refused_as(context, ("root", ""), &arguments("0,0,64"), (64, text)).map(drop)
    });
    cases.add(
        "refused: --numa-mem and a node without hugepages, until the command that it names",
        |context| {
            let _nodes = on_nodes(1, 1)?;
            let _pages = set(hugepages_of(1), "4")?;
            let arguments = format!("-l 1 --numa-mem 0,32 {} -- -p 3 -q 2", ports(NIC, NIC));
            let text = "on NUMA node 1: 16 pages of 2048 KiB are needed and 4 are free there; run: ";
            let line = refused_as(context, ("root", ""), &arguments, (71, text))?;
            let (_, command) = line.split_once("run: ").context("no command")?;
            run(context, "hint", Command::new("sh").args(["-c", command]))?.expect(0)?;
            start("cdev", 1, "--numa-mem 0,32").forwarding(context)?.stop()?;
            Ok(())
        },
    );
    cases.add(
        "a node without hugepages is replaced by another, until the command that is named",
        |context| {
            const TEXT: &str =
                "of packet memory are not on NUMA node 1, the node of the NICs that use it; run: ";
            let _nodes = on_nodes(1, 1)?;
            let _pages = set(hugepages_of(1), "4")?;
            let warnings = |stderr: &str| {
                stderr
                    .lines()
                    .filter_map(|line| line.split_once(TEXT))
                    .map(|(_, command)| command.to_owned())
                    .collect()
            };
            let l2fwd = start("cdev", 1, "").forwarding(context)?;
            let found = pages(&l2fwd)?;
            ensure!(found.get(&1) == Some(&4), "pages by node: {found:?}");
            let said: Vec<String> = warnings(&l2fwd.stop_complaining(Signal::SIGINT)?.stderr);
            ensure!(said.len() == 1, "expected one warning: {said:?}");
            run(context, "hint", Command::new("sh").args(["-c", &said[0]]))?.expect(0)?;
            let said: Vec<String> =
                warnings(&start("cdev", 1, "").forwarding(context)?.stop_complaining(Signal::SIGINT)?.stderr);
            ensure!(said.is_empty(), "the command does not suffice: {said:?}");
            Ok(())
        },
    );
}

fn one_warning(stderr: &str, text: &str) -> Result<()> {
    let warnings = stderr.lines().filter(|line| line.contains("NUMA")).count();
    ensure!(warnings == 1 && stderr.contains(text), "expected one warning with: {text}");
    Ok(())
}
