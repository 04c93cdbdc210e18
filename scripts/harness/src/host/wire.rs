//! Linux hosts that talk through the guest: network namespaces of this machine, joined in pairs by l2fwd. The
//! first host is on an e1000e, each other one on a virtio-net. The addresses exist in these namespaces only.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Environment;
use super::cargo::{need, need_guest};
use crate::case::{Cases, Context, skip};
use crate::process::{Process, run, run_for};

/// Time limit for the guest to boot on a busy machine.
const BOOT: Duration = Duration::from_secs(300);

/// How hosts are joined: arguments of l2fwd, and the pairs of hosts that result. l2fwd's ports are the
/// virtio-nets, followed by the e1000e.
struct Wiring {
    l2fwd: &'static str,
    pairs: &'static [(usize, usize)],
    /// Counters that are not 0 once all hosts have talked, by port.
    counters: &'static [(usize, &'static str)],
}

const PLAIN: Wiring = Wiring { l2fwd: "-p 3 -q 2", pairs: &[(0, 1)], counters: &[] };

/// Checksum offload. A host leaves its checksums to its TAP, which passes them on to a virtio-net as they
/// are, partial.
const CHECKSUMS: Wiring = Wiring {
    l2fwd: "-p f -q 4 --portmap (0,3)(1,2) --checksum-offload",
    pairs: &[(0, 1), (2, 3)],
    counters: &[
        (0, "rx_checksum_partial"),
        (3, "tx_checksum_computed"),
        (1, "rx_checksum_partial"),
        (1, "tx_checksum_offloaded"),
        (2, "rx_checksum_partial"),
        (2, "tx_checksum_offloaded"),
    ],
};

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    for (name, wiring) in [
        ("two hosts talk through l2fwd, e1000e to virtio-net: ping and a TCP stream", &PLAIN),
        ("hosts talk through l2fwd with checksum offload: by virtio-net, and to an e1000e", &CHECKSUMS),
    ] {
        let repo = environment.repo.clone();
        cases.add(name, move |context| talk(context, &repo, wiring)).in_place_of_a_guest().limit(900);
    }
}

/// Runs `ip` with these words.
fn ip(context: &Context, words: &str) -> Result<()> {
    run(context, "ip", Command::new("ip").args(words.split(' ')))?
        .expect(0)
        .with_context(|| format!("ip {words}"))?;
    Ok(())
}

fn need_namespaces(context: &Context) -> Result<()> {
    need(&["ip", "ping", "socat"])?;
    if !nix::unistd::Uid::effective().is_root() {
        return skip("network namespaces need root");
    }
    if !Path::new("/dev/net/tun").exists() {
        return skip("there is no /dev/net/tun");
    }
    let probe = Host::new(context, "p", 0);
    let makes = ip(context, &format!("netns add {}", probe.namespace))
        .and_then(|()| ip(context, &format!("-n {} link set lo up", probe.namespace)));
    match makes {
        Ok(()) => Ok(()),
        Err(error) => skip(format!("this machine cannot create network namespaces: {error:#}")),
    }
}

/// A network namespace with a TAP in it.
struct Host {
    namespace: String,
    tap: String,
    address: String,
}

impl Host {
    /// Chooses names only; nothing is created.
    fn new(context: &Context, kind: &str, number: usize) -> Self {
        let id = context.unique();
        Self {
            namespace: format!("vireo-{kind}{number}-{id}"),
            tap: format!("vr{kind}{number}-{id}"),
            address: format!("192.168.77.{}", number + 1),
        }
    }

    fn run_in(&self, line: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).args(line.split(' '));
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for words in [format!("netns del {}", self.namespace), format!("link del {}", self.tap)] {
            // An interface that was never created, or went with its namespace, is not an error.
            let _ = Command::new("ip").args(words.split(' ')).stderr(std::process::Stdio::null()).status();
        }
    }
}

fn talk(context: &Context, repo: &Path, wiring: &Wiring) -> Result<()> {
    need_namespaces(context)?;
    need_guest(repo)?;
    let hosts: Vec<Host> =
        (0..2 * wiring.pairs.len()).map(|number| Host::new(context, "h", number)).collect();
    for Host { namespace, tap, .. } in &hosts {
        ip(context, &format!("netns add {namespace}"))?;
        ip(context, &format!("tuntap add {tap} mode tap"))?;
        ip(context, &format!("link set {tap} up"))?;
    }
    let taps: Vec<&str> = hosts.iter().map(|host| host.tap.as_str()).collect();
    let mut lab = Command::new(repo.join("scripts/lab"));
    lab.args(["run", "--timeout", "0", "--nics", &format!("tap:{}", taps.join(",")), "--"]);
    lab.args(format!("l2fwd -l 1 -- {} -P -T 1 --no-mac-updating --json", wiring.l2fwd).split(' '));
    let guest = Process::spawn(context, "lab", &mut lab)?.gracefully();
    await_event(&guest, BOOT, |event| event["event"] == "forwarding").context("l2fwd in the guest")?;
    // The TAPs move to their namespaces once QEMU has opened them, because QEMU itself stays outside.
    for Host { namespace, tap, address } in &hosts {
        ip(context, &format!("link set {tap} netns {namespace}"))?;
        ip(context, &format!("-n {namespace} address add {address}/24 dev {tap}"))?;
        ip(context, &format!("-n {namespace} link set lo up"))?;
        ip(context, &format!("-n {namespace} link set {tap} up"))?;
    }
    for (one, other) in wiring.pairs {
        exchange(context, &hosts[*one], &hosts[*other])?;
    }
    let mut missing: BTreeSet<_> = wiring.counters.iter().collect();
    await_event(&guest, Duration::from_secs(60), |event| {
        missing.retain(|(port, name)| {
            event["port"] != *port || event["counters"][name].as_u64().is_none_or(|count| count == 0)
        });
        missing.is_empty()
    })
    .with_context(|| format!("counters that stay 0, by port: {missing:?}"))
}

/// Sends pings from one host to the other, and a stream in each direction.
fn exchange(context: &Context, one: &Host, other: &Host) -> Result<()> {
    let ping = one.run_in(&format!("ping -c 20 -i 0.2 -w 30 {}", other.address));
    run_for(context, "ping", &mut { ping }, Duration::from_secs(60))?.expect(0).context("ping")?;
    stream(context, one, other)?;
    stream(context, other, one)
}

/// Sends 4 MiB from one host to the other by TCP.
fn stream(context: &Context, from: &Host, to: &Host) -> Result<()> {
    let (sent, received) =
        (context.path(&format!("sent-{}", from.tap)), context.path(&format!("received-{}", to.tap)));
    let random = "head -c 4M /dev/urandom >".to_owned() + &sent.display().to_string();
    run(context, "random", Command::new("sh").args(["-c", &random]))?.expect(0)?;
    let listen = format!("socat -u TCP-LISTEN:7777,reuseaddr CREATE:{}", received.display());
    let mut listener = Process::spawn(context, "listener", &mut to.run_in(&listen))?;
    let send = format!("socat -u FILE:{} TCP:{}:7777,retry=100,interval=0.1", sent.display(), to.address);
    run_for(context, "sender", &mut from.run_in(&send), Duration::from_secs(60))?
        .expect(0)
        .context("the sender")?;
    ensure!(listener.wait(Duration::from_secs(60))? == 0, "the receiver failed");
    ensure!(std::fs::read(sent)? == std::fs::read(received)?, "the received data differs from the sent data");
    Ok(())
}

/// Reads the events of l2fwd up to the first one for which `is_it` is true.
fn await_event(guest: &Process, limit: Duration, mut is_it: impl FnMut(&Value) -> bool) -> Result<()> {
    let until = Instant::now() + limit;
    while let Some(line) = guest.line(until.saturating_duration_since(Instant::now()))? {
        let event: Value = serde_json::from_str(&line).with_context(|| format!("l2fwd printed '{line}'"))?;
        if is_it(&event) {
            return Ok(());
        }
    }
    bail!("l2fwd ended without the expected event")
}
