//! A NIC that stops working, loses its link, or is requested back by the kernel while l2fwd forwards.

use std::process::Command;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use scopeguard::guard;

use super::Boot;
use super::machine::{Nic, Role, device, monitor, rebind_on_drop};
use super::traffic::{carries, under_steady_traffic, under_traffic};
use crate::case::{Cases, Context, read, write};
use crate::process::run;

pub(super) fn cases(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for &nic in boot.nics() {
        // How a driver recovers does not depend on the mode.
        let is_long = nic == Nic::E1000 || mode != "cdev";
        cases
            .add(format!("{} that may do no DMA is restarted, {mode}", nic.name()), move |context| {
                let (mut l2fwd, pktgen) = under_steady_traffic(context, mode, boot.generator_mode(), nic)?;
                clear_bus_master(&nic.bdf(Role::FwdTx))?;
                l2fwd.await_state(1, "restarting")?;
                l2fwd.await_state(1, "running")?;
                pktgen.stop()?;
                carries(context, boot.generator_mode(), nic, nic)?;
                let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
                ensure!(ended.counter(1, "restarts")? == 1, "port 1 did not count its restart");
                Ok(())
            })
            .in_full_if(is_long);
        cases
            .add(
                format!("{} is given back to the kernel under traffic, {mode}", nic.name()),
                move |context| {
                    let bdf = nic.bdf(Role::FwdTx);
                    let (mut l2fwd, pktgen) = under_traffic(context, mode, boot.generator_mode(), nic)?;
                    let _again = rebind_on_drop(bdf.clone());
                    let _found = guard((), |()| {
                        let _ = write("/sys/bus/pci/rescan", "1");
                    });
                    // The write returns when the NIC is released; a scan of the bus finds it again.
                    let remove = format!("echo 1 >{}", device(&bdf).join("remove").display());
                    run(context, "remove", Command::new("sh").args(["-c", &remove]))?.expect(0)?;
                    ensure!(!device(&bdf).exists(), "{bdf} is still there");
                    l2fwd.await_state(1, "closed")?;
                    pktgen.stop()?;
                    l2fwd.stop_complaining(Signal::SIGINT)?;
                    Ok(())
                },
            )
            .in_full_if(nic == Nic::E1000);
        cases
            .add(
                format!("the link of {} goes and comes back under traffic, {mode}", nic.name()),
                move |context| flap(context, boot, mode, nic, 3),
            )
            .in_full_if(is_long);
        if mode == "cdev" {
            // The 82540EM receives nothing for a second after each change of its link.
            let times = if nic == Nic::E1000 { 50 } else { 500 };
            cases
                .add(
                    format!("the link of {} goes and comes back {times} times under traffic", nic.name()),
                    move |context| flap(context, boot, mode, nic, times),
                )
                .in_full()
                .limit(1800);
        }
    }
}

/// Takes the link of l2fwd's sending port down and up `times` times.
fn flap(context: &Context, boot: Boot, mode: &'static str, nic: Nic, times: u64) -> Result<()> {
    let (mut l2fwd, pktgen) = under_traffic(context, mode, boot.generator_mode(), nic)?;
    let before = interrupts_of(&nic.bdf(Role::FwdTx))?;
    for _ in 0..times {
        let up = pull(nic, Role::FwdTx)?;
        l2fwd.await_state(1, "link_down")?;
        drop(up);
        l2fwd.await_state(1, "link_up")?;
    }
    let interrupts = interrupts_of(&nic.bdf(Role::FwdTx))? - before;
    ensure!(interrupts >= 2 * times, "of {} changes, the NIC reported {interrupts}", 2 * times);
    pktgen.stop()?;
    carries(context, boot.generator_mode(), nic, nic)?;
    let changes = l2fwd.stop_complaining(Signal::SIGINT)?.counter(1, "link_changes")?;
    ensure!(changes == 2 * times, "port 1 counted {changes} link changes, not {}", 2 * times);
    Ok(())
}

/// Number of interrupts that vfio-pci has taken from a NIC since it was opened (proc_interrupts(5)). The name of each
/// vector ends with the NIC's address in brackets.
fn interrupts_of(bdf: &str) -> Result<u64> {
    let name = format!("({bdf})");
    let all = read("/proc/interrupts")?;
    let of_nic = all.lines().filter(|line| line.contains("vfio") && line.contains(&name));
    let counts =
        of_nic.flat_map(|line| line.split_whitespace().skip(1).map_while(|count| count.parse::<u64>().ok()));
    Ok(counts.sum())
}

/// Clears the bus-master bit. The NIC then completes nothing, like one that hangs.
pub(crate) fn clear_bus_master(bdf: &str) -> Result<()> {
    let config = std::fs::OpenOptions::new().write(true).open(device(bdf).join("config"))?;
    std::os::unix::fs::FileExt::write_all_at(&config, &[3, 0], 4)?;
    Ok(())
}

/// Takes a NIC's link down until the guard is dropped. QEMU's name for the NIC's end of the wire contains the
/// slot.
pub(crate) fn pull(nic: Nic, role: Role) -> Result<impl Drop> {
    let end = format!("n{:02x}", nic.slot(role));
    monitor(&format!("set_link {end} off"))?;
    Ok(guard(end, |end| {
        let _ = monitor(&format!("set_link {end} on"));
    }))
}
