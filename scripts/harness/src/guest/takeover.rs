//! l2fwd that is replaced while it forwards (`--takeover`).

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::machine::{Nic, Role, need_mode};
use super::opens::strace;
use super::traffic::{carries, ports, start_ordered_stream};
use super::{Boot, in_full_if};
use crate::case::{Cases, Context};
use crate::l2fwd::{L2fwd, Start};
use crate::pktgen::Stream;

/// Number of take-overs of a case; with `--full`; and there in the two usual modes.
const TIMES: usize = 3;
const TIMES_IN_FULL: usize = 10;
const TIMES_IN_USUAL_MODES: usize = 100;

pub(super) fn cases(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for &nic in boot.nics() {
        let name = nic.name();
        let case = cases.add(format!("l2fwd --takeover loses no frame of {name}, {mode}"), move |context| {
            moves(context, boot, mode, nic)
        });
        // Each driver in one mode, and one driver in each mode; compat opens as container does.
        case.limit(900).in_full_if(mode != "cdev" && (nic != Nic::E1000e || mode == "compat"));
        if nic == Nic::E1000 {
            // Its driver is the 82574L's.
            case.in_full();
        }
    }
    if mode != "cdev" && mode != "noiommu" {
        return;
    }
    // What goes wrong does so above drivers and modes.
    in_full_if(cases, boot != Boot::Iommu, |cases| failures(cases, boot, mode));
}

fn failures(cases: &mut Cases, boot: Boot, mode: &'static str) {
    let nic = boot.nics()[0];
    cases.add(format!("l2fwd --takeover that is refused leaves the ports, {mode}"), move |context| {
        refusals(context, boot, mode, nic)
    });
    cases.add(format!("l2fwd continues when l2fwd --takeover is late or killed, {mode}"), move |context| {
        continues(context, boot, mode, nic)
    });
    cases.add(
        format!("l2fwd --takeover resets the ports of an l2fwd that is killed, {mode}"),
        move |context| outlives(context, boot, mode, nic),
    );
}

fn forwarder(mode: &str, nic: Nic, takeover: &str) -> Start {
    Start::new(format!("-l 1 {takeover} --vfio-mode {mode} {} -- -p 3 -q 2 -T 0.5", ports(nic, nic)))
}

fn moves(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let mut l2fwd = forwarder(mode, nic, "").forwarding(context)?;
    let pktgen = start_ordered_stream(context, boot.generator_mode(), nic)?;
    l2fwd.await_traffic()?;
    let times = match mode {
        _ if !context.full => TIMES,
        "container" | "cdev" => TIMES_IN_USUAL_MODES,
        _ => TIMES_IN_FULL,
    };
    let mut gaps = Vec::with_capacity(times);
    let successor = forwarder(mode, nic, "--takeover");
    for _ in 0..times {
        let (next, gap) = l2fwd.replace(context, &successor)?;
        gaps.push(gap);
        l2fwd = next;
    }
    // The last one forwards.
    let before = received(&mut l2fwd)?;
    l2fwd.await_statistics("more packets", |port| port["received"].as_u64() > Some(before))?;
    let stream = pktgen.stop()?;
    let sent = stream.figure("sent");
    stream.came_back(sent, sent)?;
    let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
    // Its counters continue those of all its predecessors.
    ensure!(ended.counts(0)?[1] == sent, "port 0 received {:?}, but {sent} were sent", ended.counts(0)?);
    context.note(summary(gaps, &stream));
    Ok(())
}

/// Summary of `gaps`, the times in which nobody polled, in microseconds, and of the stream that passed meanwhile.
pub(crate) fn summary(mut gaps: Vec<f64>, stream: &Stream) -> String {
    gaps.sort_by(f64::total_cmp);
    let at = |index: usize| gaps.get(index).copied().unwrap_or_default();
    let (median, longest) = (at(gaps.len() / 2), at(gaps.len().saturating_sub(1)));
    let round_trip = stream.figures["latency_ns"]["max"].as_f64().unwrap_or_default() / 1e3;
    format!(
        "{} frames, {} take-overs: nobody polled for {median:.0} us (median), at most {longest:.0} us; longest \
         round trip {round_trip:.0} us",
        stream.figure("sent"),
        gaps.len(),
    )
}

/// Packets that port 0 has received.
pub(super) fn received(l2fwd: &mut L2fwd) -> Result<u64> {
    let mut count = 0;
    while count == 0 {
        l2fwd.await_event("statistics", |event| event["event"] == "statistics")?;
        let of_port = |ports: &Vec<Value>| ports.iter().find(|port| port["port"] == 0)?["received"].as_u64();
        count = l2fwd.latest_statistics().and_then(of_port).unwrap_or(0);
    }
    Ok(count)
}

fn refusals(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let refused = |start: Start, code, why| start.refused(context, code, why);
    refused(
        forwarder(mode, nic, "--takeover"),
        69,
        "there is no such socket; start vireo-l2fwd without --takeover",
    )?;
    let l2fwd = forwarder(mode, nic, "").forwarding(context)?;
    let other = |arguments: &str| Start::new(format!("-l 1 --takeover --vfio-mode {mode} {arguments}"));
    let both = ports(nic, nic);
    refused(other(&format!("-a {} -- -p 1 -T 0", nic.bdf(Role::FwdRx))), 75, "give both the same arguments")?;
    refused(other(&format!("{both} -- -p 3 -q 2 -T 0 -P")), 75, "receives only its own frames")?;
    refused(
        other(&format!("{both} -- -p 3 -q 2 -T 0 --total-num-mbufs 30000")),
        75,
        "its packet memory has another size",
    )?;
    refused(
        other(&format!("{both} -- -p 3 -q 2 -T 0 --max-pkt-len 1600")),
        75,
        "give both the same arguments",
    )?;
    // A successor that is killed before it has taken over changes nothing.
    for step in ["open", "memory", "port", "link"] {
        let mut next = forwarder(mode, nic, "--takeover").spawn(context)?;
        next.await_event(step, |event| event["event"] == step)?;
        next.kill()?;
    }
    // Of two at once, the first one gets the ports.
    let mut first = forwarder(mode, nic, "--takeover").spawn(context)?;
    first.await_event("its ports", |event| event["event"] == "open")?;
    first.process.signal(Signal::SIGSTOP)?;
    refused(forwarder(mode, nic, "--takeover"), 75, "is taking it over already")?;
    first.process.signal(Signal::SIGCONT)?;
    first.await_event("that it took over", |event| event["event"] == "took_over")?;
    ensure!(l2fwd.wait()?.code == 0, "the predecessor failed");
    carries(context, boot.generator_mode(), nic, nic)?;
    first.stop()?;
    Ok(())
}

/// The successor fails when no process polls: it has all queues, and is about to say so in the second message of its
/// control thread.
fn continues(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let l2fwd = forwarder(mode, nic, "").forwarding(context)?;
    let fails = |fault: &str| {
        let strace = strace(context, "sendmsg");
        let fault = ["-e".to_owned(), format!("inject=sendmsg:{fault}:when=2")];
        forwarder(mode, nic, "--takeover").under(strace.into_iter().chain(fault)).spawn(context)?.wait()
    };
    let late = fails("delay_enter=1500000")?;
    ensure!(
        late.code == 75 && late.stderr.contains("it waited no longer, and continues"),
        "exit code {}: {}",
        late.code,
        late.stderr
    );
    carries(context, boot.generator_mode(), nic, nic)?;
    let killed = fails("error=EPIPE:signal=KILL")?;
    ensure!(killed.code == 128 + Signal::SIGKILL as i32, "exit code {}: {}", killed.code, killed.stderr);
    carries(context, boot.generator_mode(), nic, nic)?;
    let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
    ensure!(
        ended.stderr.matches("this process continues").count() == 2,
        "the predecessor did not continue twice: {}",
        ended.stderr
    );
    Ok(())
}

fn outlives(context: &Context, boot: Boot, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let l2fwd = forwarder(mode, nic, "").forwarding(context)?;
    let mut next = forwarder(mode, nic, "--takeover").spawn(context)?;
    next.await_event("its ports", |event| event["event"] == "open")?;
    l2fwd.kill()?;
    for port in 0..2 {
        next.await_state(port, "running")?;
    }
    carries(context, boot.generator_mode(), nic, nic)?;
    let ended = next.stop_complaining(Signal::SIGINT)?;
    ensure!(
        ended.stderr.contains("has ended; its ports are reset"),
        "the successor did not say that it reset the ports"
    );
    Ok(())
}
