//! Telemetry of programs on shared-memory rings: what clients see, DPDK's own among them, and what they cost.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::Environment;
use super::cargo::need;
use super::rings::{End, Testpmd, await_sockets, need_testpmd};
use crate::case::{Cases, Context, read};
use crate::l2fwd::{L2fwd, Start};
use crate::pktgen::Pktgen;
use crate::process::{PATIENCE, Process, await_that, run};
use crate::telemetry::{Telemetry, socket_of};

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    cases.add("telemetry: l2fwd and pktgen answer while they run", answered);
    cases.add("telemetry: bad clients cost no frame", bad_clients);
    cases.add("telemetry: DPDK's dpdk-telemetry.py", python_client);
    let dashboard = environment.repo.join("docs/grafana.json");
    cases.add("telemetry: DPDK's dpdk-telemetry-exporter.py, and the dashboard", move |context| {
        exporter(context, &dashboard)
    });
    cases.add("telemetry: vireo-top shows l2fwd and pktgen", top);
    cases.add("telemetry: vireo-top shows DPDK's testpmd", top_of_testpmd);
    cases.add("telemetry: vireo-proc-info shows l2fwd", proc_info);
    cases.add("telemetry: vireo-proc-info shows DPDK's testpmd", proc_info_of_testpmd);
    cases.add("telemetry: --no-telemetry and --in-memory create no socket", none);
}

/// l2fwd on vhost ports, with its runtime directories in the case's, and all that it can measure.
fn forwarder(context: &Context, arguments: &str) -> Result<L2fwd> {
    let devices = End::Vhost.devices(&context.dir, 2, "");
    let start = Start::new(format!(
        "-l 1 --file-prefix fwd {arguments} {devices} -- -p 3 -q 2 -T 0 --record-core-cycles"
    ));
    let l2fwd = start.environment("RUNTIME_DIRECTORY", &context.dir).spawn(context)?;
    await_sockets(&context.dir, 2)?;
    Ok(l2fwd)
}

fn generator(context: &Context, arguments: &str) -> Result<Pktgen> {
    let devices = End::VirtioUser.devices(&context.dir, 2, "");
    let arguments =
        format!("-l 0 --file-prefix gen {devices} -- --dst-mac 02:00:00:00:00:99 {arguments} --json");
    let mut command = Command::new(context.program("pktgen"));
    command.args(arguments.split_whitespace()).env("RUNTIME_DIRECTORY", &context.dir);
    Ok(Pktgen(Process::spawn(context, "pktgen", &mut command)?))
}

fn socket(context: &Context, prefix: &str) -> PathBuf {
    socket_of(&context.dir, prefix)
}

fn answered(context: &Context) -> Result<()> {
    let mut l2fwd = forwarder(context, "")?;
    let pktgen = generator(context, "--duration 1000")?;
    l2fwd.await_event("that it forwards", |event| event["event"] == "forwarding")?;
    let of_l2fwd = Telemetry::connect(&socket(context, "fwd"), l2fwd.process.pid())?;
    let of_pktgen = Telemetry::connect(&socket(context, "gen"), pktgen.0.pid())?;
    for (client, in_stats, in_xstats) in
        [(&of_l2fwd, "ipackets", "rx_good_packets"), (&of_pktgen, "opackets", "tx_good_packets")]
    {
        ensure!(client.ask("/ethdev/list")? == serde_json::json!([0, 1]), "not two ports");
        let (mut last, begun) = (0, client.number("/ethdev/stats,0", in_stats)?);
        await_that("packets", PATIENCE, || {
            last = client.number("/ethdev/stats,0", in_stats).unwrap_or_default();
            last > begun + 1000
        })?;
        ensure!(client.number("/ethdev/xstats,0", in_xstats)? >= last, "a counter went back");
    }
    let params = of_l2fwd.ask("/eal/app_params")?;
    ensure!(params[0] == "-p", "{params}");
    pktgen.stop()?;
    let counted = |port: usize| of_l2fwd.number(&format!("/ethdev/stats,{port}"), "ipackets");
    let live = [counted(0)?, counted(1)?];
    let ended = l2fwd.stop_complaining(Signal::SIGINT)?;
    for (port, live) in live.into_iter().enumerate() {
        let [_, received, _] = ended.counts(port)?;
        ensure!(live <= received, "port {port} received {received}, but telemetry said {live}");
    }
    ensure!(!context.path("dpdk/fwd").exists(), "l2fwd left its socket");
    Ok(())
}

/// Checks that each of a stream's frames comes back while clients flood, disappear, send garbage, and do not
/// read. Only the start of a stream may lose frames, before l2fwd has both peers.
fn bad_clients(context: &Context) -> Result<()> {
    let mut l2fwd = forwarder(context, "")?;
    let pktgen =
        generator(context, &format!("--count 3000000 --window 96 --await-path {}", PATIENCE.as_secs() / 2))?;
    l2fwd.await_event("that it forwards", |event| event["event"] == "forwarding")?;
    let (path, pid) = (socket(context, "fwd"), l2fwd.process.pid());
    let has_ended = AtomicBool::new(false);
    let stream = std::thread::scope(|scope| {
        let bad = scope.spawn(|| {
            let lazy: Vec<Telemetry> = (0..3).map(|_| Telemetry::silent(&path)).collect::<Result<_>>()?;
            let mut round = 0_u32;
            while !has_ended.load(Ordering::Relaxed) || round < 1000 {
                for client in &lazy {
                    client.send(b"/ethdev/xstats,0");
                }
                let hasty = Telemetry::silent(&path)?;
                let garbage: Vec<u8> = (0..round % 5000).map(|byte| (byte * round) as u8).collect();
                hasty.send(&garbage);
                round += 1;
            }
            anyhow::Ok(round)
        });
        let stream = pktgen.wait(PATIENCE);
        has_ended.store(true, Ordering::Relaxed);
        let rounds = bad.join().map_err(|_| anyhow::anyhow!("the clients panicked"))??;
        context.note(format!("{rounds} connections"));
        stream
    })?;
    stream.came_back(3_000_000, 3_000_000)?;
    // Places are free again as soon as the thread has seen that the others are gone.
    let mut good = None;
    await_that("a place", PATIENCE, || {
        good = Telemetry::connect(&path, pid).ok();
        good.is_some()
    })?;
    let live = good.context("no client")?.number("/ethdev/stats,0", "ipackets")?;
    let [_, received, _] = l2fwd.stop_complaining(Signal::SIGINT)?.counts(0)?;
    ensure!(live == received && live >= 3_000_000, "received {received}, but telemetry said {live}");
    Ok(())
}

fn python_client(context: &Context) -> Result<()> {
    need(&["python3", "dpdk-telemetry.py"])?;
    let mut l2fwd = forwarder(context, "")?;
    let pktgen = generator(context, "--duration 1000")?;
    l2fwd.await_event("that it forwards", |event| event["event"] == "forwarding")?;
    let requests = [
        "/ethdev/list",
        "/ethdev/info,0",
        "/ethdev/link_status,1",
        "/eal/lcore/info,1",
        "/help,/ethdev/stats",
    ];
    let client = |arguments: &str, requests: &str| {
        let script = format!("printf '{requests}' | dpdk-telemetry.py {arguments}");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).env("RUNTIME_DIRECTORY", &context.dir);
        run(context, "client", &mut command)?.expect(0)
    };
    let listed = client("-l", "")?.stdout;
    ensure!(listed.contains("fwd") && listed.contains("gen"), "listed: {listed}");
    let said = client("-f fwd", &format!("{}\\n", requests.join("\\n")))?.stdout;
    let answers: Vec<Value> =
        said.lines().map(serde_json::from_str).collect::<Result<_, _>>().with_context(|| said.clone())?;
    ensure!(answers.len() == requests.len(), "{said}");
    for (request, answer) in requests.iter().zip(&answers) {
        let (name, _) = request.split_once(',').unwrap_or((request, ""));
        ensure!(!answer[name].is_null(), "{request}: {answer}");
    }
    pktgen.stop()?;
    l2fwd.stop_complaining(Signal::SIGINT)?;
    Ok(())
}

/// Checks the series that the exporter serves to Prometheus, and that they are those which the Grafana dashboard shows.
fn exporter(context: &Context, dashboard: &Path) -> Result<()> {
    need(&["python3", "dpdk-telemetry-exporter.py"])?;
    let mut l2fwd = forwarder(context, "")?;
    let pktgen = generator(context, "--duration 1000")?;
    l2fwd.await_event("that it forwards", |event| event["event"] == "forwarding")?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut command = Command::new("dpdk-telemetry-exporter.py");
    command.args(["-o", &format!("openmetrics://127.0.0.1:{port}"), "-s"]).arg(socket(context, "fwd"));
    let _exporter = Process::spawn(context, "exporter", &mut command)?;
    let mut page = String::new();
    await_that("the exporter's page", PATIENCE, || {
        page.clear();
        let Ok(mut http) = TcpStream::connect(("127.0.0.1", port)) else { return false };
        http.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok() && http.read_to_string(&mut page).is_ok()
    })?;
    for series in ["dpdk_counters_rx_packets{port=\"net_vhost0\"}", "dpdk_memory_total_bytes"] {
        let line = page.lines().find_map(|line| line.strip_prefix(series)).with_context(|| page.clone())?;
        ensure!(line.trim().parse::<u64>().is_ok_and(|value| value > 0), "{series}{line}");
    }
    let served = names(&page);
    let expressions: Value = serde_json::from_str(&read(dashboard)?)?;
    let panels = expressions["panels"].to_string();
    let shown = names(&panels);
    ensure!(shown == served, "the dashboard shows {shown:?}, and the exporter serves {served:?}");
    pktgen.stop()?;
    l2fwd.stop_complaining(Signal::SIGINT)?;
    Ok(())
}

/// Names of the exporter's series in `text`.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("dpdk_")).collect()
}

/// What vireo-top shows of the processes whose runtime directories are in the case's.
fn shown(context: &Context) -> Result<Vec<Value>> {
    let mut command = Command::new(context.program("top"));
    command.args(["--once", "--json", "--interval", "0.5"]).env("RUNTIME_DIRECTORY", &context.dir);
    let mut view: Value = serde_json::from_str(&run(context, "top", &mut command)?.expect(0)?.stdout)?;
    match view["processes"].take() {
        Value::Array(processes) => Ok(processes),
        other => bail!("no processes: {other}"),
    }
}

fn top(context: &Context) -> Result<()> {
    let mut l2fwd = forwarder(context, "")?;
    let pktgen = generator(context, "--duration 1000")?;
    l2fwd.await_event("that it forwards", |event| event["event"] == "forwarding")?;
    // Both answer.
    for (prefix, pid) in [("fwd", l2fwd.process.pid()), ("gen", pktgen.0.pid())] {
        Telemetry::connect(&socket(context, prefix), pid)?;
    }
    let processes = shown(context)?;
    let [forwarding, generating] = &processes[..] else { bail!("{processes:?}") };
    ensure!(
        forwarding["program"] == "vireo-l2fwd" && forwarding["pid"] == l2fwd.process.pid(),
        "{forwarding}"
    );
    ensure!(generating["program"] == "vireo-pktgen" && generating["pid"] == pktgen.0.pid(), "{generating}");
    for rate in [
        &forwarding["ports"][0]["rx_pps"],
        &forwarding["ports"][1]["tx_pps"],
        &generating["ports"][0]["tx_pps"],
    ] {
        ensure!(rate.as_f64().is_some_and(|rate| rate > 0.0), "{processes:?}");
    }
    pktgen.stop()?;
    l2fwd.stop_complaining(Signal::SIGINT)?;
    let ended = run(
        context,
        "top",
        Command::new(context.program("top")).arg("--once").env("RUNTIME_DIRECTORY", &context.dir),
    )?
    .expect(69)?;
    ensure!(
        ended.stderr.lines().count() == 1 && ended.stderr.contains("nothing to show"),
        "{}",
        ended.stderr
    );
    Ok(())
}

/// testpmd that forwards between two ports without a peer.
fn testpmd(context: &Context) -> Result<Process> {
    need_testpmd()?;
    let arguments = "--no-huge -m 256 --no-pci -l 0,1 --vdev net_null0 --vdev net_null1 -- --auto-start \
                     --no-lsc-interrupt --total-num-mbufs=16384";
    let Testpmd { process: testpmd, .. } = Testpmd::spawn(context, arguments)?;
    while !testpmd.line(PATIENCE)?.context("testpmd ended")?.contains("io packet forwarding") {}
    Ok(testpmd)
}

fn top_of_testpmd(context: &Context) -> Result<()> {
    let _testpmd = testpmd(context)?;
    let processes = shown(context)?;
    let [process] = &processes[..] else { bail!("{processes:?}") };
    let is_dpdk = process["version"].as_str().is_some_and(|version| version.starts_with("DPDK"));
    ensure!(is_dpdk && process["ports"][1]["name"] == "net_null1", "{process}");
    ensure!(process["ports"][1]["rx_pps"].as_f64().is_some_and(|rate| rate > 0.0), "{process}");
    Ok(())
}

/// What vireo-proc-info finds of the program `prefix`.
fn info(context: &Context, prefix: &str, arguments: &str) -> Result<crate::process::Ended> {
    let mut command = Command::new(context.program("proc-info"));
    command.args(["--file-prefix", prefix, "--"]).args(arguments.split_whitespace());
    run(context, "proc-info", command.env("RUNTIME_DIRECTORY", &context.dir))
}

fn proc_info(context: &Context) -> Result<()> {
    let mut l2fwd = forwarder(context, "")?;
    let pktgen = generator(context, "--count 2000")?;
    l2fwd.await_event("that it forwards", |event| event["event"] == "forwarding")?;
    let sent = pktgen.wait(PATIENCE)?.figure("sent");
    let found =
        info(context, "fwd", "-p 2 --stats --xstats --show-port --show-mempool --show-ring -m --json")?
            .expect(0)?;
    let found: Value = serde_json::from_str(&found.stdout)?;
    let [port] = found["ports"].as_array().map_or(&[][..], Vec::as_slice) else { bail!("{found}") };
    ensure!(port["port"] == 1 && port["stats"]["opackets"] == sent, "{port}");
    ensure!(port["xstats"]["tx_good_packets"] == sent && port["link"]["status"] == "UP", "{port}");
    ensure!(found["mempools"][0]["name"] == "packets" && found["memzones"][0]["Length"].is_u64(), "{found}");
    ensure!(found["rings"].as_array().is_some_and(Vec::is_empty), "{found}");
    let text = info(context, "fwd", "-p 0x1 --stats --xstats-name rx_good_packets")?.expect(0)?.stdout;
    for line in [format!("  RX-packets: {sent:<10}  RX-errors:  0"), format!("\nrx_good_packets: {sent}\n")] {
        ensure!(text.contains(&line), "{text}");
    }
    for (arguments, code, why) in [
        ("", 64, "no argument says what to show"),
        ("--stats-reset", 64, "compare the counts of two times"),
        ("--stats -p 8", 69, "the program has none of these ports"),
        ("--xstats-name nope", 64, "there is no counter of that name; list them: --xstats"),
        ("--show-mempool=nope", 64, "the program has none of that name; list them: leave out the name"),
    ] {
        let ended = info(context, "fwd", arguments)?.expect(code)?;
        ensure!(ended.stderr.lines().count() == 1 && ended.stderr.contains(why), "{}", ended.stderr);
    }
    l2fwd.stop_complaining(Signal::SIGINT)?;
    let ended = info(context, "fwd", "--stats")?.expect(69)?;
    ensure!(ended.stderr.contains("no process of Vireo or DPDK with --file-prefix fwd"), "{}", ended.stderr);
    Ok(())
}

fn proc_info_of_testpmd(context: &Context) -> Result<()> {
    let _testpmd = testpmd(context)?;
    let received = || -> Result<Option<u64>> {
        let mut command = Command::new(context.program("proc-info"));
        let command = command.args(["--", "--stats", "--json"]).env("RUNTIME_DIRECTORY", &context.dir);
        let found: Value = serde_json::from_str(&run(context, "proc-info", command)?.expect(0)?.stdout)?;
        Ok(found["ports"][1]["stats"]["ipackets"].as_u64())
    };
    received()?.context("no counters of port 1")?;
    // It may not have polled that port yet.
    await_that("packets on port 1", PATIENCE, || received().is_ok_and(|packets| packets > Some(0)))
}

fn none(context: &Context) -> Result<()> {
    for option in ["--no-telemetry", "--in-memory"] {
        let l2fwd = forwarder(context, option)?;
        ensure!(!Path::new(&socket(context, "fwd")).exists(), "{option} has a socket");
        l2fwd.stop_complaining(Signal::SIGINT)?;
    }
    Ok(())
}
