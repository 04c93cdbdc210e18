//! Set-up, run and end of l2fwd, in the order of DPDK's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use serde_json::json;
use vireo_bus_pci::Bus;
use vireo_drivers::memory::{self, MemoryNeed, PortMemory};
use vireo_drivers::port::{Nic, QueueSizes, counters};
use vireo_drivers::ports::{self, OpenPort};
use vireo_drivers::table::Drivers;
use vireo_eal::dma::{Pool, PoolCache};
use vireo_eal::ioctl;
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Error, ErrorKind, Result};

use crate::args::Args;
use crate::balance::Balance;
use crate::control::{Managed, Queues};
use crate::forward::{PairCounts, ethernet};
use crate::launch::{Share, Shared, forward_on_lcores};
use crate::plan::{Planned, plan};
use crate::report::{Reporter, Style, Totals, announce, link_text, mac_text};

/// Descriptors of each queue, as in DPDK's l2fwd.
pub const SIZES: QueueSizes = QueueSizes { rx: 1024, tx: 1024 };

/// Everything between the arguments and the exit code.
///
/// # Errors
/// With what failed; the NICs are reset and the memory is given back in any case.
pub fn run(eal: &Eal, drivers: &Drivers, args: &Args, stop: &StopFlag) -> Result<()> {
    let mut all = ports::open(eal, drivers, &Bus::default(), stop)?;
    let planned = plan(args, all.len(), &eal.lcores.ids())?;
    let mut enabled: Vec<usize> = planned.iter().map(|lane| lane.from).collect();
    enabled.sort_unstable();
    enabled.dedup();
    let style = args.output.unwrap_or_else(Style::of_stdout);
    let mut reporter = Reporter::new(style, enabled.clone());
    describe(eal, &reporter, &all, &enabled)?;
    reporter.chat(&format!("MAC updating {}\n", if args.mac_updating { "enabled" } else { "disabled" }))?;
    if args.portmap.is_none() && !enabled.len().is_multiple_of(2) {
        reporter.chat("Notice: odd number of ports in portmask.\n")?;
    }
    for Planned { lcore, from, to, pair } in &planned {
        let queue = if args.queues > 1 { format!(" queue {pair}") } else { String::new() };
        reporter.chat(&format!("Lcore {lcore}: RX port {from} TX port {to}{queue}\n"))?;
    }

    let pairs = enabled.len() * usize::from(args.queues);
    // Whatever is received here may be sent, so devices read and write every buffer.
    let needed = ports::buffers_needed(pairs, eal.lcores.ids().len(), SIZES);
    let buffers = args.buffers.unwrap_or(needed);
    let opened: Vec<_> = enabled.iter().map(|port| &all[*port]).collect();
    let memory = map(eal, &reporter, buffers, args.queues, &opened)?;
    let served = planned.iter().flat_map(|lane| [lane.from, lane.to].map(|port| (lane.lcore, &all[port])));
    memory::warn_of_distance(&eal.lcores, &memory, served);
    let pool = Pool::new(&memory.buffers, buffers)?;
    let cache = pool.cache();
    let mut queues = Queues::new(args.queues.into());
    for (number, open) in all.iter_mut().enumerate() {
        if !enabled.contains(&number) {
            reporter.chat(&format!("Skipping disabled port {number}\n"))?;
            continue;
        }
        reporter.chat(&format!("Initializing port {number}... "))?;
        let (rings, mut near) = (memory.of(open), pool.cache_near(memory.node_of(open)));
        let port = &mut open.port;
        port.set_promiscuous(args.promiscuous)?;
        queues.put_port(number, port.start_pairs(rings, &mut near, SIZES, args.queues)?);
        reporter.chat("done: \n")?;
        reporter.say(
            &mac_text(number, port.mac()),
            &json!({ "event": "port", "port": number, "mac": port.mac().to_string() }),
        )?;
    }
    check_links(&reporter, &all, &enabled, stop)?;

    let routes: BTreeSet<(usize, usize)> = planned.iter().map(|lane| (lane.from, lane.to)).collect();
    let mut polled: Vec<(u32, usize)> = planned.iter().map(|lane| (lane.lcore, lane.from)).collect();
    polled.sort_unstable();
    let mut shares: BTreeMap<u32, Share> = BTreeMap::new();
    for Planned { lcore, from, to, pair } in planned {
        let ethernet = args.mac_updating.then(|| ethernet(to, all[to].port.mac()));
        let number = |port| queues.numbers(port).start + pair;
        // A plan has each pair once as source and once as destination, so no queue is asked for twice.
        let Some(lane) = queues.join(number(from), number(to), ethernet) else { continue };
        let share = shares.entry(lcore).or_default();
        share.node = share.node.or(memory.node_of(&all[from]));
        share.lanes.push(lane);
    }
    let mut all: Vec<Managed> = all.into_iter().map(Managed::new).collect();
    let counts: Vec<PairCounts> =
        (0..queues.numbers(all.len()).start).map(|_| PairCounts::default()).collect();
    let numbers: Vec<_> = enabled.iter().map(|port| queues.numbers(*port)).collect();
    let totals = || numbers.iter().map(|pairs| Totals::of(&counts[pairs.clone()])).collect::<Vec<_>>();
    ports::confine(eal)?;
    reporter.forwarding(&eal.lcores.ids(), &polled)?;
    let mut last = Instant::now();
    let mut printed = Ok(());
    let busy_ticks = args.record_core_cycles.then(AtomicU64::default);
    let shared = Shared {
        lcores: &eal.lcores,
        stop,
        memory: &memory,
        pool: &pool,
        sizes: SIZES,
        pairs: args.queues,
        counts: &counts,
        busy_ticks: busy_ticks.as_ref(),
    };
    let announce = |port, state| announce(style, port, state);
    let queues = forward_on_lcores(shared, &mut all, &enabled, shares, &announce, || {
        let due = args.period.is_some_and(|period| last.elapsed().as_secs_f64() >= period);
        if due && printed.is_ok() {
            last = Instant::now();
            printed = reporter.statistics(&totals()).inspect_err(|_| stop.set());
        }
    })?;
    if let Some(signal) = stop.signal() {
        reporter.say(
            &format!("\n\nSignal {signal} received, preparing to exit...\n"),
            &json!({ "event": "signal", "signal": signal }),
        )?;
    }
    reporter.summary(&totals())?;
    if let Some(ticks) = busy_ticks {
        reporter.core_cycles(ticks.into_inner(), &totals())?;
    }
    let closed = close(&reporter, &mut all, &enabled, queues, cache, &pool);
    let of_port: BTreeMap<usize, Totals> = enabled.iter().copied().zip(totals()).collect();
    let mut checked = Ok(());
    for (from, to) in routes {
        let balance = Balance::of(from, to, &all, |port| of_port.get(&port).copied().unwrap_or_default());
        reporter.note(&balance.text(), &json!({ "event": "balance", "balance": balance }))?;
        checked = checked.and(balance.check());
    }
    closed.and(checked).and(printed)?;
    reporter.say("Bye...\n", &json!({ "event": "end" }))
}

/// What the run stands on: mode of each port and why, IOVA mode, memory.
fn describe(eal: &Eal, reporter: &Reporter, all: &[OpenPort], enabled: &[usize]) -> Result<()> {
    let physical = all.iter().any(OpenPort::is_physical);
    let iova = format!("{:?}", eal.iova_mode(physical)?).to_uppercase();
    for &number in enabled {
        let port = &all[number];
        let report = port.report.as_ref();
        reporter.note(
            &format!("Port {number}: {}\n", port.describe()),
            &json!({
                "event": "open", "port": number, "address": port.name, "description": port.describe(),
                "mode": report.map(|report| report.mode.name()), "why": report.map(|report| &report.why),
            }),
        )?;
    }
    let memory = eal.backing().name();
    let warning = if physical { "; no IOMMU: the NICs can reach all memory of this machine" } else { "" };
    reporter.note(
        &format!("IOVA mode {iova}{warning}\nMemory: {memory}; hugepages: {}\n", Eal::hugepages_line()),
        &json!({ "event": "memory", "iova_mode": iova, "memory": memory }),
    )
}

/// Memory for `buffers` packet buffers and the rings of `ports`; says what it took when they are isolated.
fn map(eal: &Eal, reporter: &Reporter, buffers: u32, pairs: u16, ports: &[&OpenPort]) -> Result<PortMemory> {
    let need = MemoryNeed { buffers, send_only: 0, sizes: SIZES, pairs };
    let before = ioctl::calls();
    let memory = memory::reserve(eal, &need, ports)?;
    if !memory.nodes.is_empty() {
        let text = memory.nodes.iter().map(|(node, bytes)| format!(" {} MiB on node {node}", bytes >> 20));
        let nodes = memory.nodes.iter().map(|(node, bytes)| json!({ "node": node, "mib": bytes >> 20 }));
        reporter.note(
            &format!("NUMA:{}\n", text.collect::<Vec<_>>().join(",")),
            &json!({ "event": "numa", "nodes": nodes.collect::<Vec<_>>() }),
        )?;
    }
    if eal.args.isolate_ports {
        let (spaces, calls) = (memory.spaces, ioctl::calls() - before);
        reporter.note(
            &format!("Isolated: {} ports in {spaces} address spaces, {calls} map calls\n", ports.len()),
            &json!({ "event": "isolation", "ports": ports.len(), "spaces": spaces, "map_calls": calls }),
        )?;
    }
    Ok(memory)
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

/// Stops every port, says what it counted, and sees that each buffer came back.
fn close(
    reporter: &Reporter,
    all: &mut [Managed],
    enabled: &[usize],
    mut queues: Queues,
    mut cache: PoolCache,
    pool: &Arc<Pool>,
) -> Result<()> {
    for &number in enabled {
        let managed = &mut all[number];
        reporter.chat(&format!("Closing port {number}..."))?;
        managed.stop(queues.take_port(number), &mut cache);
        reporter.chat(if managed.unconfirmed.is_none() { " Done\n" } else { " it does not stop\n" })?;
        let drops = managed.drops.iter().map(|(name, count)| (*name, *count)).collect();
        let mut named = counters(managed.rx, managed.tx, drops);
        named.extend(managed.leftover.named());
        named.extend([("restarts", managed.restarts), ("link_changes", managed.link_changes)]);
        managed.open = None;
        let counted: Vec<String> = named
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let map: serde_json::Map<_, _> =
            named.into_iter().map(|(name, count)| (name.to_owned(), json!(count))).collect();
        reporter.note(
            &format!(
                "Port {number} counted: {}\n",
                if counted.is_empty() { "nothing".into() } else { counted.join(", ") }
            ),
            &json!({ "event": "counters", "port": number, "counters": map }),
        )?;
    }
    drop(cache);
    if let Some(error) = all.iter_mut().find_map(|managed| managed.unconfirmed.take()) {
        return Err(error);
    }
    match pool.count() - pool.available() {
        0 => Ok(()),
        lost => Err(Error::new(
            ErrorKind::Protocol,
            format!("{lost} of {} packet buffers did not come back", pool.count()),
            "a driver lost them",
        )),
    }
}
