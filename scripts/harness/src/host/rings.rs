//! Programs on shared-memory virtio rings, directly on this machine: no VFIO, NIC, hugepages or root.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::cargo::need;
use crate::case::{Cases, Context};
use crate::guest::takeover::summary;
use crate::l2fwd::{Ended, L2fwd, Start};
use crate::pktgen::Pktgen;
use crate::process::{PATIENCE, Process, await_that};

const FRAMES: u64 = 200_000;
/// Frames, and frames per second, between which an lcore sleeps.
const SLOW_FRAMES: u64 = 5_000;
const SLOW_RATE: u64 = 5_000;
/// Arguments of a stream that flows until pktgen is stopped, at a rate at which rings of 256 descriptors have room for
/// the frames of more than 10 ms. l2fwd on vhost copies some of the frames once.
const STEADY: &str = "--size 60-1514 --rate 20000 --window 200 --duration 1000 --await-path 20";

/// One end of a pair of rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// vhost, which listens.
    Vhost,
    /// virtio-user, which connects.
    VirtioUser,
}

impl End {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Vhost => "vhost",
            Self::VirtioUser => "virtio-user",
        }
    }

    pub(super) fn other(self) -> Self {
        match self {
            Self::Vhost => Self::VirtioUser,
            Self::VirtioUser => Self::Vhost,
        }
    }

    /// EAL arguments for ports at the sockets `0`, `1` and so on in `dir`. DPDK and Vireo take the same ones.
    pub(super) fn devices(self, dir: &Path, ports: usize, devargs: &str) -> String {
        let (driver, key) = match self {
            Self::Vhost => ("net_vhost", "iface"),
            Self::VirtioUser => ("net_virtio_user", "path"),
        };
        let vdevs: Vec<String> = (0..ports)
            .map(|port| {
                format!("--vdev {driver}{port},{key}={}{devargs}", dir.join(port.to_string()).display())
            })
            .collect();
        format!("--no-pci --no-huge {}", vdevs.join(" "))
    }
}

/// Waits until a process listens at each socket in `dir`: 00010000 in `/proc/net/unix`. The file alone is not
/// enough, because a killed process may have left it.
pub(super) fn await_sockets(dir: &Path, ports: usize) -> Result<()> {
    for port in 0..ports {
        let socket = dir.join(port.to_string()).display().to_string();
        await_that(&format!("the socket {socket}"), PATIENCE, || {
            let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
            sockets.lines().any(|line| line.contains(" 00010000 ") && line.ends_with(&socket))
        })?;
    }
    Ok(())
}

/// A `--file-prefix` argument that no other process on this machine has.
pub(super) fn prefix(name: &str) -> String {
    format!("--file-prefix {name}-{}", std::process::id())
}

pub(super) fn cases(cases: &mut Cases) {
    for end in [End::Vhost, End::VirtioUser] {
        let name = format!("pktgen on {}, through l2fwd on {}", end.other().name(), end.name());
        cases.add(name, move |context| through_l2fwd(context, end));
        let name = format!("pktgen on {}, through DPDK's testpmd on {}", end.other().name(), end.name());
        cases.add(name, move |context| through_testpmd(context, end));
        let name = format!("two pairs of queues: l2fwd on {}, testpmd on {}", end.name(), end.other().name());
        cases.add(name, move |context| two_pairs(context, end));
        let name = format!("frames of pktgen on {} wake l2fwd on {}", end.other().name(), end.name());
        cases.add(name, move |context| wakes(context, end));
    }
    for end in [End::Vhost, End::VirtioUser] {
        for (more, sleeping) in [("", ""), ("--rx-interrupt", " that sleeps")] {
            let name = format!("l2fwd --takeover of an l2fwd{sleeping} loses no frame of {}", end.name());
            cases.add(name, move |context| replaced(context, end, more));
        }
    }
    cases.add("l2fwd on vhost connects to each pktgen that listens", as_client);
    let name = "a machine that is paused under traffic goes on without a storm of statistics";
    cases.add(name, paused);
}

fn generator(context: &Context, end: End, arguments: &str) -> Result<Pktgen> {
    let devices = end.devices(&context.dir, 2, "");
    Pktgen::spawn(
        context,
        &format!("-l 0 {} {devices} -- --dst-mac 02:00:00:00:00:99 {arguments}", prefix("rings-gen")),
    )
}

/// Starts the end that listens, waits for its sockets, and starts the other end.
fn in_order<A, B>(
    context: &Context,
    ports: usize,
    end: End,
    forwarder: impl FnOnce() -> Result<A>,
    generator: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    match end {
        End::Vhost => {
            let forwarder = forwarder()?;
            await_sockets(&context.dir, ports)?;
            Ok((forwarder, generator()?))
        }
        End::VirtioUser => {
            let generator = generator()?;
            await_sockets(&context.dir, ports)?;
            Ok((forwarder()?, generator))
        }
    }
}

/// Replaces l2fwd again and again while frames pass.
fn replaced(context: &Context, end: End, more: &str) -> Result<()> {
    let fwd = |takeover: &str| {
        let devices = end.devices(&context.dir, 2, "");
        Start::new(format!("-l 1 {takeover} {} {devices} -- -p 3 -q 2 -T 0.2 {more}", prefix("rings-fwd")))
    };
    let start = || fwd("").spawn(context);
    let (mut l2fwd, pktgen) = in_order(context, 2, end, start, || generator(context, end.other(), STEADY))?;
    l2fwd.await_traffic()?;
    let (mut gaps, mut files) = (Vec::new(), Vec::new());
    for _ in 0..if context.full { 100 } else { 5 } {
        let (next, gap) = l2fwd.replace(context, &fwd("--takeover"))?;
        gaps.push(gap);
        l2fwd = next;
        files.push(std::fs::read_dir(format!("/proc/{}/fd", l2fwd.process.pid()))?.count());
    }
    ensure!(files.iter().all(|count| *count == files[0]), "the numbers of open files are {files:?}");
    l2fwd.await_traffic()?;
    let stream = pktgen.stop()?;
    let sent = stream.figure("sent");
    stream.came_back(sent, sent)?;
    l2fwd.end(Signal::SIGINT)?;
    context.note(summary(gaps, &stream));
    no_socket_left(context)
}

fn no_socket_left(context: &Context) -> Result<()> {
    ensure!(!context.path("0").exists() && !context.path("1").exists(), "a socket was left behind");
    Ok(())
}

/// Sends frames through l2fwd, checks that all `count` come back once and in order, and ends l2fwd.
fn forwarded(context: &Context, end: End, start: &Start, generate: &str, count: u64) -> Result<Ended> {
    let generate = || generator(context, end.other(), generate);
    let (l2fwd, pktgen) = in_order(context, 2, end, || start.spawn(context), generate)?;
    pktgen.wait(PATIENCE)?.came_back(count, count)?;
    // A vhost port logs when a frontend connects and disconnects.
    l2fwd.stop_complaining(Signal::SIGINT)
}

/// Checks that each frame comes back from l2fwd once and in order. l2fwd on vhost copies short frames twice and long ones
/// once.
fn through_l2fwd(context: &Context, end: End) -> Result<()> {
    let start = Start::new(format!(
        "-l 1 {} {} -- -p 3 -q 2 -T 0",
        prefix("rings-fwd"),
        end.devices(&context.dir, 2, "")
    ));
    for size in ["60", "60-1514", "1514"] {
        let generate = format!("--count {FRAMES} --size {size} --expect-dst 02:00:00:00:00:01");
        forwarded(context, end, &start, &generate, FRAMES).with_context(|| format!("{size} bytes"))?;
    }
    no_socket_left(context)
}

/// Checks that an lcore that sleeps at the first poll without a frame forwards each frame, alone and under load.
fn wakes(context: &Context, end: End) -> Result<()> {
    let devices = end.devices(&context.dir, 2, "");
    let start =
        Start::new(format!("-l 1 {} {devices} -- -p 3 -q 2 -T 0 --rx-interrupt 1", prefix("rings-fwd")));
    for (count, rate) in [(SLOW_FRAMES, format!("--rate {SLOW_RATE}")), (FRAMES, String::new())] {
        let generate = format!("--await-path 20 --count {count} {rate}");
        let ended = forwarded(context, end, &start, &generate, count)?;
        let sleep = ended.event("sleep")?;
        let sleeps = sleep["sleeps"].as_u64().unwrap_or_default();
        ensure!(count == FRAMES || sleeps >= SLOW_FRAMES / 2, "{sleep}");
    }
    no_socket_left(context)
}

/// Checks that vhost ports in client mode connect to a pktgen that starts later, and again to a second one:
/// the ports look for its sockets.
fn as_client(context: &Context) -> Result<()> {
    let devices = End::Vhost.devices(&context.dir, 2, ",client=1");
    let l2fwd =
        Start::new(format!("-l 1 {} {devices} -- -p 3 -q 2 -T 0", prefix("rings-fwd"))).spawn(context)?;
    let devices = End::VirtioUser.devices(&context.dir, 2, ",server=1");
    let arguments = format!(
        "-l 0 {} {devices} -- --dst-mac 02:00:00:00:00:99 --count {FRAMES} --expect-dst 02:00:00:00:00:01 \
         --await-path {}",
        prefix("rings-gen"),
        PATIENCE.as_secs() / 2
    );
    for _ in 0..2 {
        Pktgen::spawn(context, &arguments)?.wait(PATIENCE)?.came_back(FRAMES, FRAMES)?;
    }
    l2fwd.stop_complaining(Signal::SIGINT)?;
    no_socket_left(context)
}

/// A running testpmd, which ends when a key is pressed or its input ends.
pub(super) struct Testpmd {
    pub(super) process: Process,
    keys: PathBuf,
}

impl Testpmd {
    /// Starts testpmd, with its runtime directory in the case's, because it leaves that behind.
    pub(super) fn spawn(context: &Context, arguments: &str) -> Result<Self> {
        let keys = context.path("keys");
        mkfifo(&keys, Mode::S_IRWXU)?;
        // testpmd itself holds both ends of the pipe, so that its input does not end.
        let line = format!("exec stdbuf -oL dpdk-testpmd --log-level=error {arguments} <>{}", keys.display());
        let mut command = Command::new("sh");
        command.args(["-c", &line]).env("RUNTIME_DIRECTORY", &context.dir);
        let process = Process::spawn(context, "testpmd", &mut command)?;
        Ok(Self { process, keys })
    }

    fn press_key(&self) -> Result<()> {
        Ok(OpenOptions::new().write(true).open(&self.keys)?.write_all(b"\n")?)
    }
}

pub(super) fn need_testpmd() -> Result<()> {
    need(&["dpdk-testpmd", "stdbuf"])
}

/// Checks that each frame comes back from testpmd once and in order. By default, testpmd discards what
/// arrives before it forwards (`--no-flush-rx`). DPDK's virtio driver discards what arrives before its start
/// is complete, so pktgen waits for a first frame.
fn through_testpmd(context: &Context, end: End) -> Result<()> {
    need_testpmd()?;
    let arguments = format!(
        "--lcores 0@1,1@1 -m 256 {} {} -- --auto-start --no-flush-rx --forward-mode=io --nb-cores=1 \
         --total-num-mbufs=4096 --no-mlockall",
        prefix("rings-fwd"),
        end.devices(&context.dir, 2, "")
    );
    let generate =
        format!("--count {FRAMES} --expect-dst 02:00:00:00:00:99 --await-path {}", PATIENCE.as_secs() / 2);
    let (mut testpmd, pktgen) = in_order(
        context,
        2,
        end,
        || Testpmd::spawn(context, &arguments),
        || generator(context, end.other(), &generate),
    )?;
    let stream = pktgen.wait(PATIENCE)?;
    stream.came_back(FRAMES, FRAMES)?;
    testpmd.press_key()?;
    // testpmd writes to its peer's socket when it ends, and dies of SIGPIPE if the peer is gone.
    testpmd.process.wait(PATIENCE)?;
    no_socket_left(context)
}

fn await_frames(l2fwd: &mut L2fwd, port: usize, frames: u64) -> Result<()> {
    l2fwd.await_statistics("that it received frames", |counts| {
        counts["port"] == port && counts["received"].as_u64().is_some_and(|count| count >= frames)
    })
}

/// Tests a port with two pairs of queues. The frames that testpmd sends first on each pair circulate until it
/// ends. It then prints what it received on each queue.
fn two_pairs(context: &Context, end: End) -> Result<()> {
    need_testpmd()?;
    let start = Start::new(format!(
        "--lcores 0@0,1@0 {} {} -- -p 1 --queues 2 -T 0.1",
        prefix("rings-fwd"),
        end.devices(&context.dir, 1, ",queues=2")
    ));
    let arguments = format!(
        "--lcores 0@1,1@1 -m 256 {} {} -- --auto-start --tx-first --no-flush-rx --forward-mode=io --nb-cores=1 --rxq=2 \
         --txq=2 --total-num-mbufs=8192 --no-mlockall",
        prefix("rings-gen"),
        end.other().devices(&context.dir, 1, ",queues=2")
    );
    let (mut l2fwd, mut testpmd) =
        in_order(context, 1, end, || start.spawn(context), || Testpmd::spawn(context, &arguments))?;
    await_frames(&mut l2fwd, 0, 10_000)?;
    testpmd.press_key()?;
    testpmd.process.wait(PATIENCE)?;
    l2fwd.stop_complaining(Signal::SIGINT)?;
    let said = testpmd.process.stdout()?;
    for queue in [0, 1] {
        let (_, counts) =
            said.split_once(&format!("RX Port= 0/Queue= {queue}")).context("testpmd counted nothing")?;
        let received = counts.split_whitespace().skip_while(|word| *word != "RX-packets:").nth(1);
        ensure!(received.is_some_and(|count| count != "0"), "testpmd received nothing on queue {queue}");
    }
    Ok(())
}

/// Stops l2fwd, for which time then jumps as on a machine that was suspended. A program that catches up would
/// print a table for each of the 50 periods that it missed. The pause is shorter than pktgen's wait for a
/// frame.
fn paused(context: &Context) -> Result<()> {
    let devices = End::Vhost.devices(&context.dir, 2, "");
    let mut l2fwd =
        Start::new(format!("-l 1 {} {devices} -- -p 3 -q 2 -T 0.02", prefix("rings-fwd"))).spawn(context)?;
    await_sockets(&context.dir, 2)?;
    let pktgen = generator(context, End::VirtioUser, &format!("--duration {}", PATIENCE.as_secs()))?;
    await_frames(&mut l2fwd, 0, 10_000)?;
    l2fwd.process.signal(Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_secs(1));
    let tables =
        |l2fwd: &L2fwd| Ok::<_, anyhow::Error>(l2fwd.process.stdout()?.matches("\"statistics\"").count());
    let before = tables(&l2fwd)?;
    l2fwd.process.signal(Signal::SIGCONT)?;
    await_that("further statistics", PATIENCE, || tables(&l2fwd).is_ok_and(|now| now >= before + 3))?;
    pktgen.stop()?.expect_in_order()?;
    // How long these took depends on the machine; a storm would have come before the first of them.
    let after = tables(&l2fwd)? - before;
    l2fwd.stop_complaining(Signal::SIGINT)?;
    ensure!(after < 40, "{after} tables after the pause");
    Ok(())
}
