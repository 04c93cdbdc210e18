//! Lcores that sleep until a NIC interrupts (`--rx-interrupt`).

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{SysconfVar, sysconf};

use super::Boot;
use super::machine::{Nic, Role, need_mode};
use super::recover::clear_bus_master;
use super::traffic::{carries, forwarder, ports, start_steady_stream, stream};
use crate::case::{Cases, Context, read};
use crate::l2fwd::{L2fwd, Start};

/// Frames in each direction, at [`RATE`] frames per second: so slowly that the lcores sleep between them.
const COUNT: u64 = 100;
const RATE: u64 = 100;

/// Time for which the CPU time of idle lcores is measured.
const IDLE: Duration = Duration::from_secs(1);

pub(super) fn cases(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for &nic in boot.nics() {
        let name = nic.name();
        let case = cases
            .add(format!("RX interrupts of {name} wake lcores that sleep, {mode}"), move |context| {
                wakes(context, boot, mode, nic, "")
            });
        // The kernel delivers interrupts in the same way in each mode.
        if mode != "cdev" && (mode != "noiommu" || nic != Nic::VirtioNet) {
            case.in_full();
        }
        if mode != "cdev" {
            continue;
        }
        cases
            .add(
                format!("RX interrupts of {name} continue after a restart of its port, {mode}"),
                move |context| continues(context, boot, mode, nic),
            )
            // All chips of Intel restart in the same way.
            .in_full_if(matches!(nic, Nic::E1000 | Nic::Igb));
        if boot == Boot::Iommu && nic == Nic::E1000e {
            cases
                .add(
                    format!("RX interrupts of {name} wake lcores that sleep, by INTx, {mode}"),
                    move |context| wakes(context, boot, mode, nic, "--vfio-intr legacy"),
                )
                .in_full();
        }
    }
}

/// Start of l2fwd with more of the EAL's `arguments`, and two lcores on the CPU that pktgen leaves free. Each polls one port, and the main lcore also
/// wakes by itself.
fn sleeper(mode: &str, nic: Nic, arguments: &str) -> Start {
    let lcores = "--lcores 1@1,2@1 --main-lcore 1";
    Start::new(format!(
        "{lcores} {arguments} --vfio-mode {mode} {} -- -p 3 -T 0.5 --rx-interrupt",
        ports(nic, nic)
    ))
}

fn wakes(context: &Context, boot: Boot, mode: &str, nic: Nic, arguments: &str) -> Result<()> {
    need_mode(mode)?;
    let generator = boot.generator_mode();
    let l2fwd = sleeper(mode, nic, arguments).forwarding(context)?;
    let busy = busy(&l2fwd)?;
    // Without interrupts, the lcores would use all of a CPU.
    ensure!(busy < 0.5, "idle lcores use {:.0} % of a CPU", 100.0 * busy);
    let woken = one_by_one(context, generator, nic)?;
    carries(context, generator, nic, nic)?;
    let ended = l2fwd.stop()?;
    let sleeps: Vec<u64> = ended
        .events
        .iter()
        .filter(|event| event["event"] == "sleep")
        .filter_map(|lcore| lcore["sleeps"].as_u64())
        .collect();
    ensure!(sleeps.len() == 2 && sleeps.iter().all(|sleeps| *sleeps >= COUNT / 2), "sleeps: {sleeps:?}");
    context.note(format!("idle: {:.1} % of a CPU", 100.0 * busy));
    if context.full {
        let l2fwd = forwarder(mode, nic, nic).forwarding(context)?;
        let polled = one_by_one(context, generator, nic)?;
        l2fwd.stop()?;
        context.note(format!("median latency of a lone frame: polled {polled} us, woken {woken} us"));
    }
    Ok(())
}

/// Sends frames in each direction, too slowly for more than one to be on its way. All of them must come back.
/// Returns the median latency of a frame, of the slower direction, in microseconds.
fn one_by_one(context: &Context, mode: &str, nic: Nic) -> Result<u64> {
    let mut slowest = 0;
    for (from, to, role) in [(0, 1, Role::FwdRx), (1, 0, Role::FwdTx)] {
        let mac = nic.mac(role);
        let slowly = format!("--tx-port {from} --rx-port {to} --dst-mac {mac} --count {COUNT} --rate {RATE}");
        let stream = stream(context, mode, nic, nic, &slowly)?;
        stream.came_back(COUNT, COUNT)?;
        let median = stream.figures["latency_ns"]["p50"].as_u64().context("no latency")?;
        slowest = slowest.max(median / 1000);
    }
    Ok(slowest)
}

/// Share of a CPU that the process uses during [`IDLE`].
fn busy(l2fwd: &L2fwd) -> Result<f64> {
    let since = Instant::now();
    let before = cpu_time(l2fwd)?;
    std::thread::sleep(IDLE);
    Ok((cpu_time(l2fwd)? - before) / since.elapsed().as_secs_f64())
}

/// CPU time of the process in seconds (proc_pid_stat(5): `utime` and `stime`, fields 14 and 15).
fn cpu_time(l2fwd: &L2fwd) -> Result<f64> {
    let stat = read(Path::new("/proc").join(l2fwd.process.pid().to_string()).join("stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let ticks: u64 =
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let hz = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
    Ok(ticks as f64 / hz as f64)
}

/// A port that is restarted while its lcore sleeps wakes the lcore again.
fn continues(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let generator = boot.generator_mode();
    let mut l2fwd = sleeper(mode, nic, "").forwarding(context)?;
    let pktgen = start_steady_stream(context, generator, nic)?;
    l2fwd.await_traffic()?;
    clear_bus_master(&nic.bdf(Role::FwdTx))?;
    l2fwd.await_state(1, "restarting")?;
    l2fwd.await_state(1, "running")?;
    pktgen.stop()?;
    carries(context, generator, nic, nic)?;
    l2fwd.stop_complaining(Signal::SIGTERM)?;
    Ok(())
}
