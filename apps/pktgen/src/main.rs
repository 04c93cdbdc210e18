//! `vireo-pktgen [EAL ARGUMENTS] -- --dst-mac MAC …`
#![forbid(unsafe_code)]

use std::process::ExitCode;

use serde_json::json;
use vireo_bus_pci::Bus;
use vireo_drivers::memory::{self, MemoryNeed};
use vireo_drivers::port::{Nic, QueueSizes, RxBurst, TxBurst, counters};
use vireo_drivers::ports::{self, OpenPort};
use vireo_drivers::table::Drivers;
use vireo_eal::args::{self as eal_args, Outcome as Parsed, Program};
use vireo_eal::dma::Pool;
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Result, program};
use vireo_pktgen::args::{self, Args};
use vireo_pktgen::generator::{self, Expect, Outcome, Stream};

/// What a port counted, by name.
type Counters = Vec<(&'static str, u64)>;

const SIZES: QueueSizes = QueueSizes { rx: 1024, tx: 1024 };
/// Buffers of frames to send: a full ring, a burst and a full cache, rounded up.
const SEND_ONLY: u32 = 2048;

fn main() -> ExitCode {
    program::exit_code("vireo-pktgen", run())
}

fn run() -> Result<ExitCode> {
    let usage = args::usage();
    let drivers = Drivers::default();
    let (device_keys, vdev_keys) = (drivers.device_keys(), drivers.vdev_keys());
    let program = Program { usage: &usage, device_keys: &device_keys, vdev_keys: &vdev_keys };
    let parsed = match eal_args::parse(std::env::args_os(), &program)? {
        Parsed::Print(text) => {
            program::print(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
        Parsed::Run(parsed) => parsed,
    };
    let args: Args = eal_args::parse_app(parsed.app)?;
    let stop = StopFlag::on_signals()?;
    let eal = Eal::init(parsed.eal)?;
    let (outcome, counted) = generate(&eal, &drivers, &args, &stop)?;
    print(&args, &outcome, &counted)?;
    Ok(if outcome.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the stream; gives what came of it, and what each port counted by name.
fn generate(eal: &Eal, drivers: &Drivers, args: &Args, stop: &StopFlag) -> Result<(Outcome, Vec<Counters>)> {
    let mut all = ports::open(eal, drivers, &Bus::default(), stop)?;
    args::check_port(args.tx_port, all.len())?;
    args::check_port(args.rx_port, all.len())?;
    eal.iova_mode(all.iter().any(OpenPort::is_physical))?;
    let buffers = ports::buffers_needed(all.len(), 1, SIZES);
    // Frames to send have buffers of their own, which no device can write to.
    let need = MemoryNeed { buffers: buffers - SEND_ONLY, send_only: SEND_ONLY, sizes: SIZES, pairs: 1 };
    let opened: Vec<&OpenPort> = all.iter().collect();
    let memory = memory::reserve(eal, &need, &opened)?;
    let mut cache = Pool::new(&memory.buffers, need.buffers)?.cache();
    let mut to_send = Pool::send_only(&memory.buffers, need.send_only)?.cache();

    let mut queues = Vec::with_capacity(all.len());
    for (number, open) in all.iter_mut().enumerate() {
        // A forwarder gives frames an address of its own choice.
        if let Err(error) = open.port.set_promiscuous(number == args.rx_port) {
            // Some clouds' NICs cannot; what is sent to their own address comes back all the same.
            program::note(&format!("vireo-pktgen: {error}"));
        }
        queues.push(open.port.start(memory.of(open), &mut cache, SIZES)?);
    }
    ports::wait_for_links(all.iter(), stop, || Ok(()))?;
    ports::confine(eal)?;
    let stream = Stream {
        run: std::process::id(),
        earlier: 0..0,
        destination: args.dst_mac,
        source: all[args.tx_port].port.mac(),
        expect: Some(Expect { destination: args.expect_dst, source: args.expect_src }),
        sizes: args.size.clone(),
        rate: args.rate,
        window: args.window,
        end: args.end(),
        patience: generator::PATIENCE,
    };
    let (mut rx_queues, mut tx_queues): (Vec<_>, Vec<_>) = queues.into_iter().unzip();
    let (tx, rx) = (&mut tx_queues[args.tx_port], &mut rx_queues[args.rx_port]);
    let outcome = eal.lcores.run_main(|_| {
        if let Some(patience) = args.await_path {
            generator::await_path(&stream, patience, (tx, &mut to_send), (rx, &mut cache), stop)?;
        }
        generator::run(&stream, (tx, &mut to_send), (rx, &mut cache), stop)
    })??;
    let mut counted = Vec::with_capacity(all.len());
    for ((open, rx), tx) in all.iter_mut().zip(rx_queues).zip(tx_queues) {
        let stats = (rx.stats(), tx.stats());
        open.port.stop_pairs(vec![(rx, tx)], &mut cache, Some(&mut to_send))?;
        let mut named = counters(stats.0, stats.1, open.port.device_drops());
        named.extend(open.port.leftover().named());
        counted.push(named);
    }
    Ok((outcome, counted))
}

fn print(args: &Args, outcome: &Outcome, counted: &[Counters]) -> Result<()> {
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
        for (port, counters) in counted.iter().enumerate() {
            let named = counters.iter().filter(|(_, count)| *count > 0);
            let named: Vec<String> = named.map(|(name, count)| format!("{name} {count}")).collect();
            text += &format!("\nport {port} counted: {}", named.join(", "));
        }
        text
    };
    program::print(&(text + "\n"))
}

fn as_json(counters: &Counters) -> serde_json::Value {
    counters
        .iter()
        .map(|(name, count)| ((*name).to_owned(), json!(count)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
