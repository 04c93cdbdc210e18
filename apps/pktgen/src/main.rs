//! `vireo-pktgen [EAL ARGUMENTS] -- --dst-mac MAC …`
#![forbid(unsafe_code)]

use std::process::ExitCode;

use serde_json::json;
use vireo_drivers::counters::PortStats;
use vireo_drivers::port::{PortConfig, Queues};
use vireo_drivers::table::Drivers;
use vireo_eal::{Result, program};
use vireo_frame::{App, Config, Route};
use vireo_pktgen::args::{self, Args};
use vireo_pktgen::generator::{self, Expect, Outcome, Stream};

/// Buffers for frames to send: a full ring, a burst and a full cache, rounded up.
const SEND_ONLY: u32 = 2048;

fn main() -> ExitCode {
    vireo_frame::main(Drivers::default(), run)
}

fn run(app: &App, args: Args) -> Result<ExitCode> {
    let (outcome, counted) = generate(app, &args)?;
    print(&args, &outcome, &counted)?;
    Ok(if outcome.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the stream. Returns its outcome and the counters of each port.
fn generate(app: &App, args: &Args) -> Result<(Outcome, Vec<PortStats>)> {
    let open = app.open_ports()?;
    args::check_port(args.tx_port, open.len())?;
    args::check_port(args.rx_port, open.len())?;
    let lcore = app.eal.lcores.main_id();
    let routes =
        (0..open.len()).map(|port| Route { lcore, from: port, to: port, pair: 0, process: 0 }).collect();
    // Frames to send have buffers of their own, which no device can write to.
    let port = PortConfig::default();
    let port = port.with_max_frame(port.max_frame.max(*args.size.end()));
    let mut ports = app.reserve(open, routes, &Config { port, send_only: SEND_ONLY, ..Config::default() })?;
    for number in 0..ports.count() {
        // The receiving port is promiscuous, because the forwarder chooses the destination address of the
        // frames.
        if let Err(error) = ports.set_promiscuous(number, number == args.rx_port) {
            // NICs of some clouds cannot be promiscuous. Frames sent to their own address still come back.
            program::note(&format!("vireo-pktgen: {error}"));
        }
        ports.start(number)?;
    }
    ports.wait_for_links(&app.stop, || Ok(()))?;
    app.confine()?;
    let telemetry = ports.serve_telemetry(app);
    let stream = Stream {
        run: std::process::id(),
        earlier: 0..0,
        destination: args.dst_mac,
        source: ports.mac(args.tx_port)?,
        expect: Some(Expect { destination: args.expect_dst, source: args.expect_src }),
        sizes: args.size.clone(),
        rate: args.rate,
        window: args.window,
        end: args.end(),
        patience: generator::PATIENCE,
    };
    let (mut cache, mut to_send) = (ports.cache(), ports.send_only()?);
    let queues = (0..ports.count()).filter_map(|number| ports.take_queues(number)?.into_pair());
    let (mut rx_queues, mut tx_queues): (Vec<_>, Vec<_>) = queues.unzip();
    let (tx, rx) = (&mut tx_queues[args.tx_port], &mut rx_queues[args.rx_port]);
    let outcome = app.eal.lcores.run_main(|_| {
        if let Some(patience) = args.await_path {
            generator::await_path(&stream, patience, (tx, &mut to_send), (rx, &mut cache), &app.stop)?;
        }
        generator::run(&stream, (tx, &mut to_send), (rx, &mut cache), &app.stop)
    })??;
    drop(telemetry);
    let mut counted = Vec::with_capacity(ports.count());
    for (number, (rx, tx)) in rx_queues.into_iter().zip(tx_queues).enumerate() {
        ports.put_queues(number, Queues::pair(rx, tx));
        counted.push(ports.stop(number).stats);
    }
    drop((cache, to_send));
    ports.check_buffers()?;
    Ok((outcome, counted))
}

fn print(args: &Args, outcome: &Outcome, counted: &[PortStats]) -> Result<()> {
    let at = |quantile| outcome.latency.value_at_quantile(quantile);
    let text = if args.json {
        let latency = json!({
            "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": outcome.latency.max(),
        });
        json!({
            "sent": outcome.sent, "received": outcome.received, "lost": outcome.sent - outcome.received,
            "duplicates": outcome.duplicates, "reordered": outcome.reordered,
            "wrong_address": outcome.wrong_address, "corrupt": outcome.corrupt, "strays": outcome.strays,
            "seconds": outcome.elapsed.as_secs_f64(), "pps": outcome.rate(), "latency_ns": latency,
            "counters": counted.iter().map(as_json).collect::<Vec<_>>(),
        })
        .to_string()
    } else {
        let mut text = format!(
            "sent {} received {} lost {} duplicates {} reordered {} wrong address {} corrupt {} strays {}\n\
             {:.0} pps over {:.3} s; latency p50 {} p99 {} p99.9 {} max {} ns",
            outcome.sent,
            outcome.received,
            outcome.sent - outcome.received,
            outcome.duplicates,
            outcome.reordered,
            outcome.wrong_address,
            outcome.corrupt,
            outcome.strays,
            outcome.rate(),
            outcome.elapsed.as_secs_f64(),
            at(0.5),
            at(0.99),
            at(0.999),
            outcome.latency.max()
        );
        for (port, stats) in counted.iter().enumerate() {
            let named = stats.summary().into_iter().filter(|(_, count)| *count > 0);
            let named: Vec<String> = named.map(|(name, count)| format!("{name} {count}")).collect();
            text += &format!("\nport {port} counted: {}", named.join(", "));
        }
        text
    };
    program::print(&(text + "\n"))
}

fn as_json(stats: &PortStats) -> serde_json::Value {
    let named = stats.named().into_iter().map(|(name, count)| (name, json!(count)));
    named.collect::<serde_json::Map<_, _>>().into()
}
