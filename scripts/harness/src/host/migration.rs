//! A guest that migrates from one QEMU on this machine to another while frames pass. Each QEMU is connected
//! to a vhost port of the same l2fwd, which returns every frame on the port on which it arrived. The guest
//! numbers and checks the frames.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::Environment;
use super::cargo::need_guest;
use super::rings::{End, await_sockets, prefix};
use super::vhost::{add_nic, share_memory};
use crate::agent::PORT;
use crate::boot::tail;
use crate::case::{Cases, Context};
use crate::guest::echo::Counts;
use crate::l2fwd::{L2fwd, Start};
use crate::process::{Process, await_that};
use crate::qmp::Qmp;

/// Number of frames that pass before, during and after the migration. It is several times the size of a ring,
/// so that each buffer of the ring is written in each of these phases.
const FRAMES: u64 = 5000;
/// Time limit for a guest to boot, or for the frames to pass, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// Memory of the guest in KiB. It must not be a multiple of 64 pages: with such memory, QEMU 7.2 under TCG
/// misses what the guest itself writes while it migrates.
const MEMORY: u32 = (512 << 10) + 8;
/// Properties of the guest's NIC. In rings of this size, there is a page of used elements to which only the
/// port writes.
const NIC: &str = ",rx_queue_size=1024,tx_queue_size=1024";

/// Step of the migration: how QEMU copies memory, and for how long.
struct Step {
    /// Bandwidth in bytes per second.
    bandwidth: u64,
    /// Milliseconds for which the guest may stop. QEMU stops the guest as soon as it can copy the rest in
    /// this time.
    downtime: u64,
    /// Pass over the guest's memory at which the next step begins.
    passes: u64,
}

/// The first pass takes seconds, during which frames pass. The last passes are as short as possible, because
/// what the guest itself writes during a pass hides a missing mark. If the guest writes faster than QEMU
/// copies, the last step lets it stop for long.
const STEPS: [Step; 3] = [
    Step { bandwidth: 16 << 20, downtime: 1, passes: 3 },
    Step { bandwidth: 1 << 40, downtime: 1, passes: 50 },
    Step { bandwidth: 1 << 40, downtime: 10_000, passes: u64::MAX },
];

/// Ports of l2fwd for the two QEMUs.
const SOURCE: usize = 0;
const DESTINATION: usize = 1;

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    let repo = environment.repo.clone();
    cases
        .add("a guest on vhost migrates under traffic", move |context| {
            need_guest(&repo)?;
            migrates(context, &repo).inspect_err(|_| {
                for port in [SOURCE, DESTINATION] {
                    let said = tail(&directory(context, port).join("console.log"), 20);
                    said.lines().for_each(|line| context.note(format!("console {port}: {line}")));
                }
            })
        })
        .in_full()
        .limit(1800);
}

/// Directory of the sockets of the QEMU at `port`.
fn directory(context: &Context, port: usize) -> PathBuf {
    context.path(&format!("qemu{port}"))
}

/// A QEMU that runs the guest, or waits for it.
struct Machine {
    lab: Process,
    qemu: Qmp,
    /// Host end of a port of the guest.
    guest: UnixStream,
}

impl Machine {
    /// Starts QEMU. The guest arrives through the socket `incoming` if there is one, else it boots.
    fn start(context: &Context, repo: &Path, port: usize, incoming: Option<&Path>) -> Result<Self> {
        let dir = directory(context, port);
        std::fs::create_dir(&dir)?;
        let mut lab = Command::new(repo.join("scripts/lab"));
        lab.args(["run", "--timeout", "0", "--no-bind", "--cpus", "1", "--hugepages", "0", "--harness"])
            .arg(&dir);
        share_memory(&mut lab, MEMORY);
        add_nic(&mut lab, 4, &context.path(&port.to_string()), NIC);
        if let Some(socket) = incoming {
            let uri = format!("unix:{}", socket.display());
            lab.args(["--qemu-arg", "-incoming", "--qemu-arg", &uri]);
        }
        lab.args(["--", "sh", "-c", "ip link set eth0 up && exec vireo-harness echo eth0"]);
        let mut lab = Process::spawn(context, "lab", &mut lab)?.gracefully();
        let mut monitor = None;
        // QEMU creates this socket last.
        await_that("QEMU", PATIENCE, || {
            monitor = UnixStream::connect(dir.join("monitor")).ok();
            monitor.is_some() || lab.has_ended()
        })?;
        let qemu = Qmp::new(monitor.context("the lab started no QEMU")?)?;
        Ok(Self { lab, qemu, guest: UnixStream::connect(dir.join(PORT))? })
    }
}

/// Waits until l2fwd has sent `frames` more frames to the guest on `port`.
fn await_frames(l2fwd: &mut L2fwd, port: usize, frames: u64) -> Result<()> {
    let sent = |counts: &Value| counts["sent"].as_u64().unwrap_or_default();
    let before = l2fwd.latest_statistics().and_then(|ports| ports.get(port)).map_or(0, sent);
    l2fwd.await_statistics(&format!("that port {port} sent {frames} frames more"), |counts| {
        counts["port"] == port && sent(counts) >= before + frames
    })
}

fn migrates(context: &Context, repo: &Path) -> Result<()> {
    let ports = End::Vhost.devices(&context.dir, 2, "");
    let echo = "-p 3 -q 2 -T 0.1 --portmap (0,0)(1,1) --no-mac-updating";
    let mut l2fwd = Start::new(format!("-l 1 {} {ports} -- {echo}", prefix("migration")))
        .patience(PATIENCE)
        .spawn(context)?;
    await_sockets(&context.dir, 2)?;
    let mut source = Machine::start(context, repo, SOURCE, None)?;
    let way = context.path("way");
    let mut destination = Machine::start(context, repo, DESTINATION, Some(&way))?;
    await_frames(&mut l2fwd, SOURCE, FRAMES)?;

    let qemu = &mut source.qemu;
    let events = json!([{ "capability": "events", "state": true }]);
    qemu.execute("migrate-set-capabilities", json!({ "capabilities": events }))?;
    let way = json!({ "uri": format!("unix:{}", way.display()) });
    let is_over =
        |event: &Value| ["completed", "failed"].iter().any(|status| event["data"]["status"] == *status);
    let mut event = Value::Null;
    for step in STEPS {
        let terms = json!({ "max-bandwidth": step.bandwidth, "downtime-limit": step.downtime });
        qemu.execute("migrate-set-parameters", terms)?;
        if event.is_null() {
            qemu.execute("migrate", way.clone())?;
            await_frames(&mut l2fwd, SOURCE, FRAMES)?;
        }
        event = qemu.await_event(&format!("pass {}", step.passes), PATIENCE, |event| {
            is_over(event) || event["data"]["pass"].as_u64().is_some_and(|pass| pass >= step.passes)
        })?;
        if is_over(&event) {
            break;
        }
    }
    if event["data"]["status"] == "failed" {
        bail!("the migration failed: {}", qemu.execute("query-migrate", json!({}))?);
    }
    destination.qemu.await_event("that the guest runs", PATIENCE, |event| event["event"] == "RESUME")?;

    await_frames(&mut l2fwd, DESTINATION, FRAMES)?;
    let state = qemu.execute("query-migrate", json!({}))?;
    drop(source);
    destination.guest.write_all(b"\n")?;
    let said = destination.lab.line(PATIENCE)?.context("the guest counted nothing")?;
    let counts: Counts = serde_json::from_str(&said)?;
    ensure!(destination.lab.wait(PATIENCE)? == 0, "the guest did not end cleanly");
    let forwarded = l2fwd.stop_complaining(Signal::SIGINT)?;
    let lost: u64 = counts.lost.iter().map(|lost| lost.end - lost.start).sum();
    context.note(format!(
        "{} frames, {lost} lost; {} passes in {} ms, down for {} ms",
        counts.sent, state["ram"]["dirty-sync-count"], state["total-time"], state["downtime"]
    ));
    let [before, after] = [forwarded.counts(SOURCE)?, forwarded.counts(DESTINATION)?];
    judge(&counts, before, after).with_context(|| format!("{counts:?}; l2fwd: {before:?}, {after:?}"))
}

/// Checks that each frame came back once, except those for which l2fwd found no ring when the guest stopped.
/// `before` and `after` are the numbers of frames that l2fwd sent, received and dropped at the source's and
/// the destination's port.
fn judge(counts: &Counts, before: [u64; 3], after: [u64; 3]) -> Result<()> {
    let [sent, received, dropped] = [0, 1, 2].map(|at| before[at] + after[at]);
    let lost: u64 = counts.lost.iter().map(|lost| lost.end - lost.start).sum();
    ensure!((counts.corrupt, counts.repeated) == (0, 0), "frames arrived that were not sent");
    ensure!(counts.next == counts.sent, "the last frames did not come back");
    ensure!(counts.lost.len() <= 1, "frames were lost at more than one point in time");
    ensure!(received == counts.sent, "not every frame reached l2fwd exactly once");
    ensure!(sent + lost == counts.sent, "not every frame that l2fwd sent reached the guest exactly once");
    ensure!(lost == dropped, "{lost} frames were lost, but l2fwd dropped {dropped}");
    Ok(())
}
