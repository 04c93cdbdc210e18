//! Set-up, run and end of l2fwd, in the order of DPDK's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use serde_json::json;
use vireo_bus_pci::Bus;
use vireo_drivers::port::{Nic, QueueSizes, RxBurst, RxQueue, TxBurst, TxQueue, counters};
use vireo_drivers::ports::{self, OpenPort};
use vireo_eal::dma::{Pool, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Error, ErrorKind, Result};

use crate::args::Args;
use crate::forward::{AnyLane, Lane, PortCounts, ethernet, forward_any};
use crate::plan::{Planned, plan};
use crate::report::{Reporter, Style, Totals, link_text, mac_text};

/// Descriptors of each queue, as in DPDK's l2fwd.
const SIZES: QueueSizes = QueueSizes { rx: 1024, tx: 1024 };
/// The clock is read once in so many rounds of polling.
const ROUNDS_PER_LOOK: u32 = 64;

/// Queues of the started ports, by port number, while no lcore has them.
#[derive(Default)]
struct Queues {
    rx: BTreeMap<usize, RxQueue>,
    tx: BTreeMap<usize, TxQueue>,
}

/// Everything between the arguments and the exit code.
///
/// # Errors
/// With what failed; the NICs are reset and the memory is given back in any case.
pub fn run(eal: &Eal, args: &Args, stop: &StopFlag) -> Result<()> {
    let mut all = ports::open(eal, &Bus::default(), stop)?;
    let planned = plan(args, all.len(), &eal.lcores.ids())?;
    let mut enabled: Vec<usize> = planned.iter().map(|lane| lane.from).collect();
    enabled.sort_unstable();
    let mut reporter = Reporter::new(Style::of_stdout(args.json), enabled.clone());
    describe(eal, &reporter, &all, &enabled)?;
    reporter.chat(&format!("MAC updating {}\n", if args.mac_updating { "enabled" } else { "disabled" }))?;
    for Planned { lcore, from, to } in &planned {
        reporter.chat(&format!("Lcore {lcore}: RX port {from} TX port {to}\n"))?;
    }

    let buffers = ports::buffers_needed(enabled.len(), eal.lcores.ids().len(), SIZES);
    let memory = ports::map(eal.reserve(ports::memory_needed(enabled.len(), buffers, SIZES))?, &all)?;
    let pool = Pool::new(&memory, buffers)?;
    let mut cache = pool.cache();
    let mut queues = Queues::default();
    for &number in &enabled {
        reporter.chat(&format!("Initializing port {number}... "))?;
        let port = &mut all[number].port;
        port.set_promiscuous(args.promiscuous)?;
        let (rx, tx) = port.start(&memory, &mut cache, SIZES)?;
        queues.rx.insert(number, rx);
        queues.tx.insert(number, tx);
        reporter.chat("done: \n")?;
        reporter.say(
            &mac_text(number, port.mac()),
            &json!({ "event": "port", "port": number, "mac": port.mac().to_string() }),
        )?;
    }
    check_links(&reporter, &all, &enabled, stop)?;

    let mut shares: BTreeMap<u32, Vec<AnyLane>> = BTreeMap::new();
    for Planned { lcore, from, to } in planned {
        // A plan has each port once as source and once as destination, so no queue is asked for twice.
        let (Some(rx), Some(tx)) = (queues.rx.remove(&from), queues.tx.remove(&to)) else { continue };
        let ethernet = args.mac_updating.then(|| ethernet(to, all[to].port.mac()));
        shares.entry(lcore).or_default().push(Lane { rx, rx_port: from, tx, tx_port: to, ethernet });
    }
    let counts: Vec<PortCounts> = all.iter().map(|_| PortCounts::default()).collect();
    let totals = || enabled.iter().map(|port| Totals::from(&counts[*port])).collect::<Vec<_>>();
    reporter.say("entering main loop\n", &json!({ "event": "forwarding" }))?;
    let mut last = Instant::now();
    let mut printed = Ok(());
    let busy_ticks = args.record_core_cycles.then(AtomicU64::default);
    let lanes = forward_on_lcores(eal, stop, shares, &pool, &counts, busy_ticks.as_ref(), || {
        let due = args.period.is_some_and(|period| last.elapsed().as_secs_f64() >= period);
        if due && printed.is_ok() {
            last = Instant::now();
            printed = reporter.statistics(&totals()).inspect_err(|_| stop.set());
        }
    })?;
    for lane in lanes {
        queues.rx.insert(lane.rx_port, lane.rx);
        queues.tx.insert(lane.tx_port, lane.tx);
    }
    if let Some(signal) = stop.signal() {
        reporter.chat(&format!("\n\nSignal {signal} received, preparing to exit...\n"))?;
    }
    reporter.summary(&totals())?;
    if let Some(ticks) = busy_ticks {
        reporter.core_cycles(ticks.into_inner(), &totals())?;
    }
    close(&reporter, all, queues, cache, &pool)?;
    printed?;
    reporter.say("Bye...\n", &json!({ "event": "end" }))
}

/// What the run stands on: mode of each port and why, IOVA mode, memory.
fn describe(eal: &Eal, reporter: &Reporter, all: &[OpenPort], enabled: &[usize]) -> Result<()> {
    let physical = all.iter().any(OpenPort::is_physical);
    let iova = format!("{:?}", eal.iova_mode(physical)?).to_uppercase();
    for &number in enabled {
        let port = &all[number];
        let report = port.report.as_ref();
        reporter.say(
            &format!("Port {number}: {}\n", port.describe()),
            &json!({
                "event": "open", "port": number, "address": port.name, "description": port.describe(),
                "mode": report.map(|report| report.mode.name()), "why": report.map(|report| &report.why),
            }),
        )?;
    }
    let memory = eal.backing().name();
    let warning = if physical { "; no IOMMU: the NICs can reach all memory of this machine" } else { "" };
    reporter.say(
        &format!("IOVA mode {iova}{warning}\nMemory: {memory}; hugepages: {}\n", Eal::hugepages_line()),
        &json!({ "event": "memory", "iova_mode": iova, "memory": memory }),
    )
}

fn check_links(reporter: &Reporter, all: &[OpenPort], enabled: &[usize], stop: &StopFlag) -> Result<()> {
    reporter.chat("\nChecking link status")?;
    ports::wait_for_links(enabled.iter().map(|port| &all[*port]), stop, || reporter.chat("."))?;
    reporter.chat("done\n")?;
    for &number in enabled {
        let text = link_text(all[number].port.link());
        reporter.say(
            &format!("Port {number} {text}\n"),
            &json!({ "event": "link", "port": number, "link": text }),
        )?;
    }
    Ok(())
}

/// Runs each lcore's lanes until `stop`, and `tick` now and then on the main lcore; gives the lanes back.
fn forward_on_lcores(
    eal: &Eal,
    stop: &StopFlag,
    mut shares: BTreeMap<u32, Vec<AnyLane>>,
    pool: &Arc<Pool>,
    counts: &[PortCounts],
    busy_ticks: Option<&AtomicU64>,
    mut tick: impl FnMut(),
) -> Result<Vec<AnyLane>> {
    let own = shares.remove(&eal.lcores.main_id()).unwrap_or_default();
    std::thread::scope(|scope| {
        let mut workers = Vec::with_capacity(shares.len());
        for (id, share) in shares {
            let worker = eal.lcores.launch_in(scope, id, move |_| {
                forward_any(share, &mut pool.cache(), counts, busy_ticks, stop, || ())
            });
            workers.push(worker.inspect_err(|_| stop.set())?);
        }
        let idle = own.is_empty();
        let mut round = 0_u32;
        let lanes = eal.lcores.run_main(|_| {
            forward_any(own, &mut pool.cache(), counts, busy_ticks, stop, || {
                round = round.wrapping_add(1);
                if idle {
                    // A main lcore without ports only prints: it leaves its core to others.
                    std::thread::sleep(Duration::from_millis(1));
                } else if !round.is_multiple_of(ROUNDS_PER_LOOK) {
                    return;
                }
                tick();
            })
        });
        let mut lanes = lanes.inspect_err(|_| stop.set())?;
        for worker in workers {
            lanes.extend(worker.join()?);
        }
        Ok(lanes)
    })
}

/// Stops every port, says what it counted, and sees that each buffer came back.
fn close(
    reporter: &Reporter,
    all: Vec<OpenPort>,
    mut queues: Queues,
    mut cache: PoolCache,
    pool: &Arc<Pool>,
) -> Result<()> {
    for (number, mut open) in all.into_iter().enumerate() {
        let (Some(rx), Some(tx)) = (queues.rx.remove(&number), queues.tx.remove(&number)) else { continue };
        reporter.chat(&format!("Closing port {number}..."))?;
        let named = counters(rx.stats(), tx.stats(), open.port.device_drops());
        open.port.stop(rx, tx, &mut cache)?;
        reporter.chat(" Done\n")?;
        let counted: Vec<String> = named
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let map: serde_json::Map<_, _> =
            named.into_iter().map(|(name, count)| (name.to_owned(), json!(count))).collect();
        reporter.say(
            &format!(
                "Port {number} counted: {}\n",
                if counted.is_empty() { "nothing".into() } else { counted.join(", ") }
            ),
            &json!({ "event": "counters", "port": number, "counters": map }),
        )?;
    }
    drop(cache);
    match pool.count() - pool.free() {
        0 => Ok(()),
        lost => Err(Error::new(
            ErrorKind::Protocol,
            format!("{lost} of {} packet buffers did not come back", pool.count()),
            "a driver lost them",
        )),
    }
}
