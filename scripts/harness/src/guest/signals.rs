//! Signals: a clean end for those that can be caught; after SIGKILL, a machine on which the next start works.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::Boot;
use super::machine::{Nic, Role, hugepages, need_mode};
use super::traffic::{forwards_after_kill, ports, start_steady_stream, under_traffic};
use crate::case::{Cases, Context};
use crate::l2fwd::Start;

/// Time after the first signal from which another one counts as a second (`StopFlag::SIGNAL_GRACE`).
const SIGNAL_GRACE: Duration = Duration::from_millis(300);

pub(super) fn end_in_order(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        cases.add(format!("{signal} under traffic ends in order, {mode}"), move |context| {
            let (l2fwd, pktgen) = under_traffic(context, mode, boot.generator_mode(), Nic::VirtioNet)?;
            let ended = l2fwd.stop_by(signal)?;
            let ([_, received, _], [sent, _, dropped]) = (ended.counts(0)?, ended.counts(1)?);
            ensure!(
                received > 0 && received == sent + dropped,
                "received {received}, sent {sent}, dropped {dropped}"
            );
            pktgen.stop()?;
            Ok(())
        });
    }
    cases.add(format!("a second signal ends it at once, {mode}"), move |context| {
        let nic = Nic::E1000e;
        let (mut l2fwd, pktgen) = under_traffic(context, mode, boot.generator_mode(), nic)?;
        l2fwd.process.signal(Signal::SIGINT)?;
        l2fwd.await_event("which signal arrived", |event| event["event"] == "signal")?;
        // While it is stopped, l2fwd cannot finish before the second signal counts as one.
        l2fwd.process.signal(Signal::SIGSTOP)?;
        std::thread::sleep(2 * SIGNAL_GRACE);
        l2fwd.process.signal(Signal::SIGTERM)?;
        let ended = l2fwd.end(Signal::SIGCONT)?;
        ensure!(ended.code == 130, "l2fwd exited with {}", ended.code);
        pktgen.stop()?;
        forwards_after_kill(context, mode, boot.generator_mode(), (nic, nic))
    });
    // timeout(1) signals a program and then its group.
    cases.add(format!("two signals at once are one, {mode}"), move |context| {
        let (l2fwd, pktgen) = under_traffic(context, mode, boot.generator_mode(), Nic::E1000e)?;
        for signal in [Signal::SIGSTOP, Signal::SIGINT, Signal::SIGTERM] {
            l2fwd.process.signal(signal)?;
        }
        l2fwd.stop_by(Signal::SIGCONT)?;
        pktgen.stop()?;
        Ok(())
    });
}

/// Adds cases for each kind of NIC: SIGKILL under traffic, and the next start works.
pub(super) fn survive_kill(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for &nic in boot.nics() {
        let case = cases
            .add(format!("SIGKILL under traffic, then {} works, {mode}", nic.name()), move |context| {
                need_mode(mode)?;
                let (l2fwd, pktgen) = under_traffic(context, mode, boot.generator_mode(), nic)?;
                l2fwd.kill()?;
                pktgen.stop()?;
                forwards_after_kill(context, mode, boot.generator_mode(), (nic, nic))
            })
            // One driver in each mode, and the other one in one mode of each boot.
            .in_full_if(nic == Nic::E1000 || nic == Nic::E1000e && !matches!(mode, "cdev" | "noiommu"));
        if nic == Nic::VirtioNet {
            case.on_both_kernels();
        }
    }
}

pub(super) fn survive_kills(cases: &mut Cases, boot: Boot, mode: &'static str) {
    survive_kill(cases, boot, mode);
    cases.add(format!("SIGKILL at each step of the start, {mode}"), move |context| {
        need_mode(mode)?;
        let start = Start::new(format!(
            "-l 1 --vfio-mode {mode} {} -- -p 3 -q 2 -T 0",
            ports(Nic::E1000, Nic::E1000e)
        ));
        // The event after which l2fwd is killed identifies the step.
        for (event, port) in [
            ("open", Some(0)),
            ("memory", None),
            ("port", Some(0)),
            ("port", Some(1)),
            ("link", Some(0)),
            ("forwarding", None),
        ] {
            let mut l2fwd = start.spawn(context)?;
            l2fwd.await_event(event, |said| {
                said["event"] == event && port.is_none_or(|port: usize| said["port"] == port)
            })?;
            l2fwd.kill()?;
        }
        forwards_after_kill(context, mode, boot.generator_mode(), (Nic::E1000, Nic::E1000e))
    });
    cases
        .add(format!("SIGKILL under traffic and restart, again and again, {mode}"), move |context| {
            need_mode(mode)?;
            killed_again_and_again(context, boot, mode)
        })
        .in_full_if(!matches!(mode, "cdev" | "noiommu"))
        .limit(1800);
}

/// Kills l2fwd under continuous traffic again and again; each time the next start works.
fn killed_again_and_again(context: &Context, boot: Boot, mode: &str) -> Result<()> {
    let nic = Nic::E1000e;
    let rounds = if context.full { 50 } else { 5 };
    let start = Start::new(format!(
        "-l 1 --vfio-mode {mode} -a {} -a {} -- -p 3 -q 2 -T 0.02",
        nic.bdf(Role::FwdRx),
        nic.bdf(Role::FwdTx)
    ))
    .patience(Duration::from_secs(60));
    let pktgen = start_steady_stream(context, boot.generator_mode(), nic)?;
    let mut l2fwd = start.forwarding(context)?;
    l2fwd.await_traffic()?;
    l2fwd.stop()?;
    let free = hugepages("free_hugepages")?;
    let mut killed = None;
    for round in 1..=rounds {
        let mut l2fwd = start.forwarding(context)?;
        ensure!(
            killed.is_none() || l2fwd.recovered_from(killed)?,
            "round {round}: l2fwd did not report that it recovered"
        );
        l2fwd.await_traffic()?;
        killed = Some(l2fwd.process.pid());
        l2fwd.kill()?;
        ensure!(hugepages("free_hugepages")? == free, "round {round}: hugepages were not released");
    }
    pktgen.stop()?;
    forwards_after_kill(context, mode, boot.generator_mode(), (nic, nic))?;
    context.note(format!("{rounds} of {rounds} restarts worked immediately"));
    Ok(())
}

/// Adds cases without an IOMMU, where a descriptor pins the pages of a killed process. The kernel closes the
/// highest descriptor first, so that must be the NIC's.
pub(super) fn memory_outlives_the_nic(cases: &mut Cases) {
    for (name, arguments) in
        [("", ""), (", --in-memory", "--in-memory"), (", --huge-dir", "--huge-dir /dev/hugepages")]
    {
        cases.add(format!("the memory outlives the NIC{name}"), move |context| {
            let nic = Nic::E1000e.bdf(Role::FwdRx);
            let l2fwd = Start::new(format!("-l 1 --vfio-mode noiommu -a {nic} {arguments} -- -p 1 -T 0"))
                .forwarding(context)?;
            let (mut device, mut memory, mut pin) = (0, 0, 0);
            for fd in std::fs::read_dir(format!("/proc/{}/fd", l2fwd.process.pid()))? {
                let fd = fd?;
                let number: i32 = fd.file_name().to_string_lossy().parse()?;
                // A descriptor that was closed in the meantime has no target.
                let target = std::fs::read_link(fd.path()).unwrap_or_default().to_string_lossy().into_owned();
                if target.contains("vfio-device") {
                    device = device.max(number);
                } else if target.contains("memfd:") || target.starts_with("/dev/hugepages/") {
                    memory = memory.max(number);
                } else if target.starts_with("pipe:") && number > 2 {
                    pin = pin.max(number);
                }
            }
            let ended = l2fwd.stop()?;
            let iova = &ended.event("memory")?["iova_mode"];
            ensure!(iova == "PA", "the IOVA mode is {iova}");
            ensure!(memory > 0, "its memory is not a file");
            ensure!(pin > 0, "its memory is not pinned");
            ensure!(
                device > memory.max(pin),
                "the NIC is descriptor {device}, its memory {memory} and {pin}"
            );
            Ok(())
        });
    }
}
