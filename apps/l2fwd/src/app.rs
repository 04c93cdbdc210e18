//! Set-up, run and end of l2fwd, in the order of DPDK's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use vireo_bus_pci::Bus;
use vireo_drivers::port::{Nic, QueueSizes, RxBurst, TxBurst, counters};
use vireo_drivers::ports::{self, OpenPort};
use vireo_eal::dma::{Pool, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Error, ErrorKind, Result};

use crate::args::{Args, destinations};
use crate::forward::{AnyLane, Lane, PortCounts, ethernet, forward_any};
use crate::report::{Reporter, Style, Totals, link_text, mac_text};

/// Descriptors of each queue, as in DPDK's l2fwd.
const SIZES: QueueSizes = QueueSizes { rx: 1024, tx: 1024 };
/// Longest wait for links to come up.
const LINK_WAIT: Duration = Duration::from_secs(9);

/// Everything between the arguments and the exit code.
///
/// # Errors
/// With what failed; the NICs are reset and the memory is given back in any case.
pub fn run(eal: &Eal, args: &Args, stop: &StopFlag) -> Result<()> {
    let mut all = ports::open(eal, &Bus::default())?;
    let enabled = enabled(args.mask, all.len())?;
    let pairs = destinations(&enabled, args.portmap.as_ref())?;
    let lcores: Vec<u32> = std::iter::once(eal.lcores.main_id()).chain(eal.lcores.worker_ids()).collect();
    let mut lcores = {
        let mut ids = lcores;
        ids.sort_unstable();
        ids
    };
    lcores.truncate(pairs.len().div_ceil(args.ports_per_lcore));
    if lcores.len() * args.ports_per_lcore < pairs.len() {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("cannot poll {} ports", pairs.len()),
            format!("{} lcores with {} ports each are too few", lcores.len(), args.ports_per_lcore),
        )
        .mend(format!("give -q {}, or more lcores with -l", pairs.len().div_ceil(lcores.len()))));
    }
    let mut reporter = Reporter::new(Style::of_stdout(args.json), enabled.clone());
    describe(eal, &reporter, &all, &enabled)?;
    reporter.chat(&format!("MAC updating {}\n", if args.mac_updating { "enabled" } else { "disabled" }))?;
    for (i, (from, to)) in pairs.iter().enumerate() {
        reporter
            .chat(&format!("Lcore {}: RX port {from} TX port {to}\n", lcores[i / args.ports_per_lcore]))?;
    }

    let buffers = ports::buffers_needed(enabled.len(), lcores.len(), SIZES);
    let region = eal.reserve(ports::memory_needed(enabled.len(), buffers, SIZES))?;
    let memory = ports::map(region, &all)?;
    let pool = Pool::new(&memory, buffers)?;
    let mut cache = pool.cache();

    let mut rx_queues: Vec<_> = all.iter().map(|_| None).collect();
    let mut tx_queues: Vec<_> = all.iter().map(|_| None).collect();
    for &number in &enabled {
        reporter.chat(&format!("Initializing port {number}... "))?;
        let port = &mut all[number].port;
        port.set_promiscuous(args.promiscuous)?;
        let (rx, tx) = port.start(&memory, &mut cache, SIZES)?;
        (rx_queues[number], tx_queues[number]) = (Some(rx), Some(tx));
        reporter.chat("done: \n")?;
        reporter.say(
            &mac_text(number, port.mac()),
            &json!({ "event": "port", "port": number, "mac": port.mac().to_string() }),
        )?;
    }
    check_links(&reporter, &all, &enabled, stop)?;

    let mut lanes: Vec<AnyLane> = Vec::with_capacity(pairs.len());
    for &(from, to) in &pairs {
        // Every enabled port is in exactly one pair in each role, so each queue is taken once.
        let (Some(rx), Some(tx)) = (rx_queues[from].take(), tx_queues[to].take()) else { continue };
        let source = args.mac_updating.then(|| ethernet(to, all[to].port.mac()));
        lanes.push(Lane { rx, rx_port: from, tx, tx_port: to, ethernet: source });
    }
    let counts: Vec<PortCounts> = all.iter().map(|_| PortCounts::default()).collect();
    let totals = || enabled.iter().map(|port| Totals::from(&counts[*port])).collect::<Vec<_>>();
    let lanes = launch(eal, args, stop, lanes, &lcores, &pool, &counts, &mut reporter, &totals)?;

    if let Some(signal) = stop.signal() {
        reporter.chat(&format!("\n\nSignal {signal} received, preparing to exit...\n"))?;
    }
    reporter.statistics(&totals())?;
    close(&reporter, all, lanes, rx_queues, tx_queues, cache, &pool)?;
    reporter.say("Bye...\n", &json!({ "event": "end" }))
}

/// Numbers of the ports in `mask`.
fn enabled(mask: u64, ports: usize) -> Result<Vec<usize>> {
    let what = format!("cannot use port mask {mask:#x}");
    let last = ports.checked_sub(1).ok_or_else(|| {
        Error::new(ErrorKind::Unavailable, what.clone(), "there are no ports")
            .mend("bind NICs to VFIO: vireo-devbind --status, vireo-devbind --bind vfio-pci ADDRESS")
    })?;
    let enabled: Vec<usize> = (0..64).filter(|port| mask >> port & 1 == 1).collect();
    match enabled.iter().find(|port| **port > last) {
        Some(port) => Err(Error::new(ErrorKind::Usage, what, format!("there is no port {port}")).mend(
            format!("ports are 0 to {last}; for all of them give -p {:x}", u64::MAX >> (63 - last.min(63))),
        )),
        None => Ok(enabled),
    }
}

/// What the run stands on: mode of each port and why, IOVA mode, memory.
fn describe(eal: &Eal, reporter: &Reporter, all: &[OpenPort], enabled: &[usize]) -> Result<()> {
    let physical = all.iter().any(OpenPort::is_physical);
    let iova = format!("{:?}", eal.iova_mode(physical)?).to_uppercase();
    for &number in enabled {
        let port = &all[number];
        reporter.say(
            &format!("Port {number}: {}\n", port.describe()),
            &json!({
                "event": "open", "port": number, "address": port.info.address.to_string(),
                "mode": port.report.mode.name(), "why": port.report.why,
            }),
        )?;
    }
    let memory = eal.backing().name();
    let unsafe_note = if physical { "; no IOMMU: the NICs can reach all memory of this machine" } else { "" };
    reporter.say(
        &format!("IOVA mode {iova}{unsafe_note}\nMemory: {memory}; hugepages: {}\n", Eal::hugepages_line()),
        &json!({ "event": "memory", "iova_mode": iova, "memory": memory }),
    )
}

fn check_links(reporter: &Reporter, all: &[OpenPort], enabled: &[usize], stop: &StopFlag) -> Result<()> {
    reporter.chat("\nChecking link status")?;
    let since = Instant::now();
    while !stop.is_set()
        && since.elapsed() < LINK_WAIT
        && !enabled.iter().all(|port| all[*port].port.link().up)
    {
        reporter.chat(".")?;
        // Links have no interrupt here yet, so their state is polled.
        std::thread::sleep(Duration::from_millis(100));
    }
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

/// Runs the lanes on their lcores until `stop`; gives them back.
#[allow(clippy::too_many_arguments)]
fn launch(
    eal: &Eal,
    args: &Args,
    stop: &StopFlag,
    lanes: Vec<AnyLane>,
    lcores: &[u32],
    pool: &Arc<Pool>,
    counts: &[PortCounts],
    reporter: &mut Reporter,
    totals: &dyn Fn() -> Vec<Totals>,
) -> Result<Vec<AnyLane>> {
    let mut shares: Vec<(u32, Vec<AnyLane>)> = lcores.iter().map(|id| (*id, Vec::new())).collect();
    for (i, lane) in lanes.into_iter().enumerate() {
        shares[i / args.ports_per_lcore].1.push(lane);
    }
    let main = eal.lcores.main_id();
    let mut main_share = Vec::new();
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (id, share) in shares {
            if id == main {
                main_share = share;
                continue;
            }
            let worker = eal.lcores.launch_in(scope, id, move |_| {
                let mut cache = pool.cache();
                forward_any(share, &mut cache, counts, stop, || ())
            });
            match worker {
                Ok(worker) => workers.push(worker),
                Err(error) => {
                    stop.set();
                    return Err(error);
                }
            }
        }
        reporter.chat("entering main loop\n")?;
        reporter.say("", &json!({ "event": "forwarding" }))?;
        let mut failed = Ok(());
        let mut next = args.period.map(|period| (Duration::from_secs_f64(period), Instant::now()));
        let mut rounds = 0_u32;
        let lanes = eal.lcores.run_main(|_| {
            let mut cache = pool.cache();
            let idle = main_share.is_empty();
            forward_any(main_share, &mut cache, counts, stop, || {
                rounds = rounds.wrapping_add(1);
                if idle {
                    // Nothing to poll: wait for the stop flag without a core of its own.
                    std::thread::sleep(Duration::from_millis(1));
                } else if !rounds.is_multiple_of(ROUNDS_PER_LOOK) {
                    return;
                }
                let Some((period, last)) = &mut next else { return };
                if last.elapsed() >= *period {
                    *last = Instant::now();
                    if let Err(error) = reporter.statistics(&totals()) {
                        failed = Err(error);
                        stop.set();
                    }
                }
            })
        });
        if lanes.is_err() {
            stop.set();
        }
        let mut lanes = lanes?;
        for worker in workers {
            lanes.extend(worker.join()?);
        }
        failed.map(|()| lanes)
    })
}

/// The clock is read once in so many rounds of polling.
const ROUNDS_PER_LOOK: u32 = 64;

/// Stops every port and sees that each buffer came back.
fn close(
    reporter: &Reporter,
    mut all: Vec<OpenPort>,
    lanes: Vec<AnyLane>,
    mut rx_queues: Vec<Option<vireo_drivers::port::RxQueue>>,
    mut tx_queues: Vec<Option<vireo_drivers::port::TxQueue>>,
    mut cache: PoolCache,
    pool: &Arc<Pool>,
) -> Result<()> {
    for lane in lanes {
        rx_queues[lane.rx_port] = Some(lane.rx);
        tx_queues[lane.tx_port] = Some(lane.tx);
    }
    for (number, open) in all.iter_mut().enumerate() {
        let (Some(rx), Some(tx)) = (rx_queues[number].take(), tx_queues[number].take()) else { continue };
        reporter.chat(&format!("Closing port {number}..."))?;
        let named = counters(rx.stats(), tx.stats(), open.port.device_drops());
        open.port.stop(rx, tx, &mut cache)?;
        reporter.chat(" Done\n")?;
        let text: Vec<String> = named
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let map: serde_json::Map<_, _> =
            named.into_iter().map(|(name, count)| (name.to_owned(), json!(count))).collect();
        reporter.say(
            &format!(
                "Port {number} counted: {}\n",
                if text.is_empty() { "nothing".into() } else { text.join(", ") }
            ),
            &json!({ "event": "counters", "port": number, "counters": map }),
        )?;
    }
    drop(cache);
    let lost = pool.count() - pool.free();
    if lost > 0 {
        return Err(Error::new(
            ErrorKind::Protocol,
            format!("{lost} of {} packet buffers did not come back", pool.count()),
            "a driver lost them",
        ));
    }
    Ok(())
}
