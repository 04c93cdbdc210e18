//! Two Linux hosts talk through the guest: network namespaces of this machine, joined by l2fwd between an e1000e and a
//! virtio-net. The addresses exist in these namespaces only.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use scopeguard::guard;
use serde_json::Value;

use super::Environment;
use super::cargo::need;
use crate::case::{Cases, Context, skip};
use crate::process::{Process, run, run_for};

/// For the guest to boot on a busy machine.
const BOOT: Duration = Duration::from_secs(300);

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    let repo = environment.repo.clone();
    cases
        .add("two hosts talk through l2fwd, e1000e to virtio-net: ping and a TCP stream", move |context| {
            talk(context, &repo)
        })
        .limit(900);
}

/// `ip`, with its words.
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
    let probe = format!("vireo-probe-{}", std::process::id());
    if ip(context, &format!("netns add {probe}")).is_err() {
        return skip("this machine makes no network namespaces");
    }
    ip(context, &format!("netns del {probe}"))
}

fn talk(context: &Context, repo: &Path) -> Result<()> {
    need_namespaces(context)?;
    let id = std::process::id();
    let (hosts, taps) =
        ([format!("vireo-a-{id}"), format!("vireo-b-{id}")], [format!("vra{id}"), format!("vrb{id}")]);
    let _namespaces = guard((hosts.clone(), taps.clone()), |(hosts, taps)| {
        for words in hosts
            .map(|host| format!("netns del {host}"))
            .into_iter()
            .chain(taps.map(|tap| format!("link del {tap}")))
        {
            // What was not made, or went with its namespace, is not there.
            let _ = Command::new("ip").args(words.split(' ')).stderr(std::process::Stdio::null()).status();
        }
    });
    for (host, tap) in hosts.iter().zip(&taps) {
        ip(context, &format!("netns add {host}"))?;
        ip(context, &format!("tuntap add {tap} mode tap"))?;
        ip(context, &format!("link set {tap} up"))?;
    }
    let mut lab = Command::new(repo.join("scripts/lab"));
    lab.args(["run", "--timeout", "0", "--nics", &format!("tap:{},{}", taps[0], taps[1]), "--"]);
    lab.args("l2fwd -l 1 -- -p 3 -q 2 -P -T 0 --no-mac-updating --json".split(' '));
    let guest = Process::spawn(context, "lab", &mut lab)?.gracefully();
    await_forwarding(&guest)?;
    // The TAPs go to their namespaces when QEMU has them open, because QEMU itself stays outside.
    for (number, (host, tap)) in hosts.iter().zip(&taps).enumerate() {
        ip(context, &format!("link set {tap} netns {host}"))?;
        ip(context, &format!("-n {host} address add 192.168.77.{}/24 dev {tap}", number + 1))?;
        ip(context, &format!("-n {host} link set lo up"))?;
        ip(context, &format!("-n {host} link set {tap} up"))?;
    }
    let on = |host: &str, line: &str| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", host]).args(line.split(' '));
        command
    };
    let ping = on(&hosts[0], "ping -c 20 -i 0.2 -w 30 192.168.77.2");
    run_for(context, "ping", &mut { ping }, Duration::from_secs(60))?.expect(0).context("ping")?;

    let (sent, received) = (context.path("sent"), context.path("received"));
    let random = "head -c 4M /dev/urandom >".to_owned() + &sent.display().to_string();
    run(context, "random", Command::new("sh").args(["-c", &random]))?.expect(0)?;
    let listen = format!("socat -u TCP-LISTEN:7777,reuseaddr CREATE:{}", received.display());
    let mut listener = Process::spawn(context, "listener", &mut on(&hosts[1], &listen))?;
    let send = format!("socat -u FILE:{} TCP:192.168.77.2:7777,retry=100,interval=0.1", sent.display());
    run_for(context, "sender", &mut on(&hosts[0], &send), Duration::from_secs(60))?
        .expect(0)
        .context("the sender")?;
    ensure!(listener.wait(Duration::from_secs(60))? == 0, "the receiver failed");
    ensure!(std::fs::read(sent)? == std::fs::read(received)?, "what came is not what was sent");
    Ok(())
}

fn await_forwarding(guest: &Process) -> Result<()> {
    let until = Instant::now() + BOOT;
    while let Some(line) = guest.line(until.saturating_duration_since(Instant::now()))? {
        let event: Value = serde_json::from_str(&line).with_context(|| format!("l2fwd printed '{line}'"))?;
        if event["event"] == "forwarding" {
            return Ok(());
        }
    }
    bail!("l2fwd did not start in the guest")
}
