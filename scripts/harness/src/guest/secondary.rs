//! l2fwd in several processes, each of which polls its own queues (`--proc-type secondary`).

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::machine::{Nic, Role, need_mode, rebind_on_drop, removed, unbind};
use super::recover::clear_bus_master;
use super::takeover::received;
use super::traffic::{COUNT, carries, forwarder, ports, start_ordered_stream, start_steady_stream};
use super::{Boot, in_full_if};
use crate::case::{Cases, Context};
use crate::l2fwd::{L2fwd, Start};

/// Number of secondary processes of a case, one after the other; with `--full`; and there where they are killed and the NIC
/// is not reset.
const TIMES: usize = 3;
const TIMES_IN_FULL: usize = 10;
const KILLS_IN_FULL: usize = 100;

/// Arguments of a process: the primary polls the queues from port 1 to port 0, and those of process 0 while that does not
/// run.
const PRIMARY: &str = "--num-procs 2 --proc-id 1";
const SECONDARY: &str = "--num-procs 2 --proc-id 0";

pub(super) fn cases(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for &nic in boot.nics() {
        let name = nic.name();
        let case = |what: &str| format!("{what}, {mode}").replace("NIC", name);
        // Drivers and modes differ in this only as in a take-over, all of whose combinations have a case there.
        let title = case("l2fwd lends queues of NIC to a secondary l2fwd without loss");
        let lends = cases.add(title, move |context| lends(context, boot, mode, nic)).limit(900);
        lends.in_full_if(nic != Nic::VirtioNet || mode != "cdev");
        let title = case("l2fwd takes queues of NIC back from a secondary l2fwd that is killed");
        let dies = cases.add(title, move |context| outlives_secondaries(context, boot, mode, nic)).limit(900);
        dies.in_full_if(match nic {
            Nic::VirtioNet => mode != "cdev" && mode != "noiommu",
            Nic::E1000 => true,
            _ => mode != "cdev",
        });
        // The process finds the fault of an 82574L, and its primary that of a virtio-net device.
        let title = case("NIC is restarted while a secondary l2fwd has queues of it");
        let restarts = cases.add(title, move |context| restarts(context, boot, mode, nic));
        restarts.in_full_if(nic != Nic::E1000e || mode != "cdev");
    }
    if mode != "cdev" && mode != "noiommu" {
        return;
    }
    // What goes wrong does so above drivers and modes.
    in_full_if(cases, boot != Boot::Iommu, |cases| {
        let nic = boot.nics()[0];
        // The primary finds the fault of a virtio-net device; that of another NIC, only the process that does not run.
        if nic == Nic::VirtioNet {
            cases.add(
                format!("a port waits for a secondary l2fwd that does not run, {mode}"),
                move |context| waits(context, boot, mode, nic),
            );
        }
        cases.add(
            format!("a NIC with a secondary l2fwd is given back to the kernel, {mode}"),
            move |context| closes(context, mode, nic),
        );
        cases.add(
            format!("an ordinary user's l2fwd lends queues to a secondary l2fwd, {mode}"),
            move |context| of_nobody(context, boot, mode, nic),
        );
        cases.add(format!("a secondary l2fwd that is refused leaves the queues, {mode}"), move |context| {
            refusals(context, boot, mode, nic)
        });
        cases.add(format!("a secondary l2fwd ends in order after its primary, {mode}"), move |context| {
            outlives_primary(context, boot, mode, nic)
        });
    });
}

fn process(mode: &str, nic: Nic, eal: &str, own: &str) -> Start {
    Start::new(format!("-l 1 {eal} --vfio-mode {mode} {} -- -p 3 -q 2 -T 0.5 {own}", ports(nic, nic)))
}

fn primary(mode: &str, nic: Nic) -> Start {
    process(mode, nic, "", PRIMARY)
}

fn secondary(mode: &str, nic: Nic) -> Start {
    process(mode, nic, "--proc-type secondary", SECONDARY)
}

/// Starts a secondary process, and returns when it polls.
fn joined(context: &Context, start: &Start) -> Result<L2fwd> {
    let mut l2fwd = start.spawn(context)?;
    l2fwd.await_event("that it joined", |event| event["event"] == "joined")?;
    Ok(l2fwd)
}

/// Waits until the primary says that its secondary process is in `state`.
fn await_secondary(primary: &mut L2fwd, state: &str) -> Result<()> {
    primary.await_event(&format!("that the secondary process {state}"), |event| {
        event["event"] == "secondary" && event["process"] == 0 && event["state"] == state
    })
}

fn lends(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let mut primary = primary(mode, nic).forwarding(context)?;
    let secondary = secondary(mode, nic);
    let l2fwd = joined(context, &secondary)?;
    carries(context, boot.generator_mode(), nic, nic)?;
    l2fwd.stop()?;
    await_secondary(&mut primary, "left")?;
    let pktgen = start_ordered_stream(context, boot.generator_mode(), nic)?;
    for _ in 0..if context.full { TIMES_IN_FULL } else { TIMES } {
        let mut l2fwd = joined(context, &secondary)?;
        l2fwd.await_traffic()?;
        // Only the secondary process receives on port 0 now, and the primary counts that, too.
        let before = received(&mut primary)?;
        primary.await_statistics("what the secondary process counts", |port| {
            port["port"] == 0 && port["received"].as_u64() > Some(before)
        })?;
        let ended = l2fwd.stop()?;
        ensure!(ended.counts(0)?[1] > 0, "the secondary process counted nothing");
        await_secondary(&mut primary, "left")?;
    }
    let stream = pktgen.stop()?;
    let sent = stream.figure("sent");
    stream.came_back(sent, sent)?;
    let ended = primary.stop_talking()?;
    // Those of the secondary processes are among its counts.
    let counted = ended.counts(0)?[1];
    ensure!(counted >= sent, "port 0 received {counted} packets, but {sent} were sent in the end");
    context.note(format!("{sent} frames"));
    Ok(())
}

fn outlives_secondaries(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let mut primary = primary(mode, nic).forwarding(context)?;
    let pktgen = start_steady_stream(context, boot.generator_mode(), nic)?;
    primary.await_traffic()?;
    let secondary = secondary(mode, nic);
    let is_reset = matches!(nic, Nic::E1000 | Nic::E1000e);
    let times = match (context.full, is_reset) {
        (false, _) => TIMES,
        (true, true) => TIMES_IN_FULL,
        (true, false) => KILLS_IN_FULL,
    };
    for number in 0..times {
        let mut l2fwd = joined(context, &secondary)?;
        if number % 2 == 0 {
            l2fwd.await_traffic()?;
        }
        // At another instruction each time.
        sleep(Duration::from_micros(number as u64 * 7919 % 20_000));
        l2fwd.kill()?;
        await_secondary(&mut primary, "died")?;
    }
    let stream = pktgen.stop()?;
    stream.intact()?;
    carries(context, boot.generator_mode(), nic, nic)?;
    // It finds every packet buffer, or exits with another code.
    let ended = primary.stop_complaining(Signal::SIGINT)?;
    // A queue of an 82540EM or 82574L stops only with the NIC.
    let resets = if is_reset { times as u64 } else { 0 };
    for port in 0..2 {
        let restarts = ended.counter(port, "restarts")?;
        ensure!(restarts == resets, "port {port} was restarted {restarts} times, not {resets}");
    }
    let (sent, received) = (stream.figure("sent"), stream.figure("received"));
    context.note(format!("{times} killed; {sent} frames sent, {} lost", sent.saturating_sub(received)));
    Ok(())
}

/// The NIC that the secondary process sends on may do no DMA.
fn restarts(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let mut primary = primary(mode, nic).forwarding(context)?;
    let mut l2fwd = joined(context, &secondary(mode, nic))?;
    let pktgen = start_steady_stream(context, boot.generator_mode(), nic)?;
    l2fwd.await_traffic()?;
    clear_bus_master(&nic.bdf(Role::FwdTx))?;
    primary.await_state(1, "restarting")?;
    primary.await_state(1, "running")?;
    await_secondary(&mut primary, "polls")?;
    pktgen.stop()?;
    carries(context, boot.generator_mode(), nic, nic)?;
    let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
    ensure!(ended.counts(0)?[1] > COUNT, "the secondary process polled no queue after the restart");
    primary.stop_complaining(Signal::SIGINT)?;
    Ok(())
}

/// A port that must restart waits for a secondary process that does not run.
fn waits(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let mut primary = primary(mode, nic).forwarding(context)?;
    let l2fwd = joined(context, &secondary(mode, nic))?;
    l2fwd.process.signal(Signal::SIGSTOP)?;
    clear_bus_master(&nic.bdf(Role::FwdTx))?;
    while !primary.process.stderr()?.contains("does not return its queues; end it: kill ") {
        primary.await_statistics("statistics", |_| true)?;
    }
    l2fwd.process.signal(Signal::SIGCONT)?;
    primary.await_state(1, "running")?;
    await_secondary(&mut primary, "polls")?;
    carries(context, boot.generator_mode(), nic, nic)?;
    l2fwd.stop_complaining(Signal::SIGINT)?;
    primary.stop_complaining(Signal::SIGINT)?;
    Ok(())
}

/// The kernel waits for every process that has the device open.
fn closes(context: &Context, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let bdf = nic.bdf(Role::FwdTx);
    let mut primary = primary(mode, nic).forwarding(context)?;
    let l2fwd = joined(context, &secondary(mode, nic))?;
    let _again = rebind_on_drop(bdf.clone());
    unbind(&bdf)?;
    primary.await_state(1, "closed")?;
    ensure!(l2fwd.wait()?.code == 0, "the secondary process did not end in order");
    primary.stop_complaining(Signal::SIGINT)?;
    Ok(())
}

/// Both processes give up root.
fn of_nobody(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let _runtime = removed("/var/run/vireo/fwd");
    let mut primary = process(mode, nic, "--user nobody", PRIMARY).forwarding(context)?;
    let secondary = process(mode, nic, "--user nobody --proc-type secondary", SECONDARY);
    let l2fwd = joined(context, &secondary)?;
    carries(context, boot.generator_mode(), nic, nic)?;
    l2fwd.kill()?;
    await_secondary(&mut primary, "died")?;
    let l2fwd = joined(context, &secondary)?;
    carries(context, boot.generator_mode(), nic, nic)?;
    l2fwd.stop()?;
    primary.stop_complaining(Signal::SIGINT)?;
    Ok(())
}

fn refusals(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let refused = |start: &Start, code, why| start.refused(context, code, why);
    let second = |own: &str| process(mode, nic, "--proc-type secondary", own);
    refused(&second(SECONDARY), 69, "start vireo-l2fwd without --proc-type secondary if none runs")?;
    let alone = process(mode, nic, "", "").forwarding(context)?;
    refused(&second(SECONDARY), 75, "it was started without --num-procs")?;
    alone.stop_complaining(Signal::SIGINT)?;
    let primary = primary(mode, nic).forwarding(context)?;
    refused(&second(""), 64, "give --num-procs and --proc-id")?;
    refused(
        &second("--num-procs 2 --proc-id 2"),
        64,
        "there are 2 processes (--num-procs), numbered from 0",
    )?;
    refused(&second("--num-procs 2 --proc-id 1"), 75, "process 1 (--proc-id) is the primary")?;
    refused(&second("--num-procs 1 --proc-id 0"), 64, "a secondary process polls a part of the queues")?;
    refused(&process(mode, nic, "--takeover", PRIMARY), 75, "it shares its ports with other processes")?;
    let l2fwd = joined(context, &secondary(mode, nic))?;
    refused(&second(SECONDARY), 75, "polls the queues of process 0 already")?;
    carries(context, boot.generator_mode(), nic, nic)?;
    l2fwd.stop()?;
    // One that is killed before it polls changes nothing.
    for step in ["open", "memory", "port", "link"] {
        let mut next = secondary(mode, nic).spawn(context)?;
        next.await_event(step, |event| event["event"] == step)?;
        next.kill()?;
    }
    // With `auto`, the second process is the secondary.
    let auto = joined(context, &process(mode, nic, "--proc-type auto", SECONDARY))?;
    auto.stop()?;
    carries(context, boot.generator_mode(), nic, nic)?;
    primary.stop_complaining(Signal::SIGINT)?;
    Ok(())
}

fn outlives_primary(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let first = primary(mode, nic).forwarding(context)?;
    let l2fwd = joined(context, &secondary(mode, nic))?;
    carries(context, boot.generator_mode(), nic, nic)?;
    first.stop_talking()?;
    let ended = l2fwd.wait()?;
    ensure!(ended.code == 0 && !ended.warns(), "exit code {}: {}", ended.code, ended.stderr);
    let second = primary(mode, nic).forwarding(context)?;
    let l2fwd = joined(context, &secondary(mode, nic))?;
    second.kill()?;
    let ended = l2fwd.wait()?;
    ensure!(
        ended.code == 69
            && ended.stderr.contains("has ended")
            && ended.stderr.trim_end().lines().count() == 1,
        "exit code {}: {}",
        ended.code,
        ended.stderr
    );
    forwarder(mode, nic, nic).forwarding(context)?.stop()?;
    Ok(())
}
