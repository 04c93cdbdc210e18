//! A guest with two virtio-net devices that l2fwd's net_vhost on this machine serves. QEMU is the frontend.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Environment;
use super::cargo::need_guest;
use super::rings::{End, await_sockets, prefix};
use crate::case::{Cases, Context};
use crate::guest::takeover::summary;
use crate::l2fwd::Start;
use crate::pktgen::Pktgen;
use crate::process::Process;

const FRAMES: u64 = 20_000;
/// Time limit for the guest to boot and the frames to pass, on a busy machine.
const GUEST: Duration = Duration::from_secs(300);
/// Memory of the guest in KiB, which QEMU shares with l2fwd.
const MEMORY: u32 = 1 << 20;

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    let repo = environment.repo.clone();
    cases
        .add("pktgen on a guest's virtio-net, through l2fwd on vhost", move |context| {
            circle(context, &repo, 0)
        })
        .in_place_of_a_guest()
        .limit(900);
    let repo = environment.repo.clone();
    cases
        .add("l2fwd --takeover of an l2fwd on vhost loses no frame of a guest", move |context| {
            circle(context, &repo, if context.full { 20 } else { 3 })
        })
        .in_place_of_a_guest()
        .limit(900);
}

fn qemu(lab: &mut Command, words: [&str; 2]) {
    for word in words {
        lab.args(["--qemu-arg", word]);
    }
}

/// Gives a guest `kib` KiB of memory that vhost-user backends can map, and none of the lab's NICs. QEMU
/// passes backends no IOTLB, so the guest cannot have an IOMMU.
pub(super) fn share_memory(lab: &mut Command, kib: u32) {
    lab.args(["--no-iommu", "--nics", "none"]);
    qemu(lab, ["-m", &format!("{kib}K")]);
    qemu(lab, ["-object", &format!("memory-backend-memfd,id=ram,size={kib}K,share=on")]);
    qemu(lab, ["-machine", "memory-backend=ram"]);
}

/// Gives the guest a virtio-net in `slot`, which the backend at `socket` serves. `properties` must begin with
/// a comma.
pub(super) fn add_nic(lab: &mut Command, slot: usize, socket: &Path, properties: &str) {
    qemu(lab, ["-chardev", &format!("socket,id=v{slot},path={}", socket.display())]);
    qemu(lab, ["-netdev", &format!("vhost-user,id=n{slot},chardev=v{slot}")]);
    // No MSI-X, in which QEMU 7.2 under TCG crashes with any vhost backend.
    let nic = "virtio-net-pci,disable-legacy=on,vectors=0,romfile=";
    qemu(
        lab,
        ["-device", &format!("{nic},netdev=n{slot},addr=0x{slot},mac=52:54:00:00:00:0{slot}{properties}")],
    );
}

/// Lets a guest send frames to itself through l2fwd, which is replaced `times` times meanwhile.
fn circle(context: &Context, repo: &Path, times: u64) -> Result<()> {
    need_guest(repo)?;
    let fwd = |takeover: &str| {
        let devices = End::Vhost.devices(&context.dir, 2, "");
        Start::new(format!("-l 1 {takeover} {} {devices} -- -p 3 -q 2 -T 0.2", prefix("vhost")))
    };
    let mut l2fwd = fwd("").spawn(context)?;
    await_sockets(&context.dir, 2)?;
    let frames = FRAMES * (1 + times);
    let mut lab = Command::new(repo.join("scripts/lab"));
    lab.args(["run", "--timeout", "0"]);
    share_memory(&mut lab, MEMORY);
    for port in 0..2 {
        add_nic(&mut lab, port + 4, &context.path(&port.to_string()), "");
    }
    let pktgen = format!(
        "pktgen -l 1 --vfio-mode noiommu -a 00:04.0 -a 00:05.0 -- --count {frames} --size 60-1514 \
         --dst-mac 02:00:00:00:00:99 --expect-dst 02:00:00:00:00:01 --json"
    );
    lab.arg("--").args(pktgen.split_whitespace());
    let pktgen = Pktgen(Process::spawn(context, "lab", &mut lab)?.gracefully());
    let mut gaps = Vec::new();
    for _ in 0..times {
        l2fwd.await_traffic()?;
        let (next, gap) = l2fwd.replace(context, &fwd("--takeover"))?;
        gaps.push(gap);
        l2fwd = next;
    }
    let stream = pktgen.wait(GUEST)?;
    stream.came_back(frames, frames)?;
    if times > 0 {
        context.note(summary(gaps, &stream));
    }
    ensure!(stream.complete, "pktgen exited with 1");
    l2fwd.stop_complaining(nix::sys::signal::Signal::SIGINT)?;
    Ok(())
}
