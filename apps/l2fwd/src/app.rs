//! Set-up, run and shutdown of l2fwd, in the order and wording of DPDK's l2fwd.

use std::time::{Duration, Instant};

use serde_json::json;
use vireo_drivers::counters::PortStats;
use vireo_drivers::port::{Nic, Offloads};
use vireo_drivers::ports::OpenPort;
use vireo_eal::{Eal, Error, ErrorKind, Result, ioctl};
use vireo_frame::{App, Config, Counts, Ports, Processes};

use crate::args::Args;
use crate::plan::plan;
use crate::report::{Reporter, announce, counters_json, counters_text, link_text, mac_text};
use crate::rewrite::Rewrite;

/// Runs l2fwd with its parsed arguments.
///
/// # Errors
/// The first failure. The NICs are reset and the memory is released in any case.
pub fn run(app: &App, args: Args) -> Result<()> {
    let processes = Processes::new(&app.eal, args.num_procs, args.proc_id)?;
    let open = app.open_ports()?;
    let routes = plan(&args, open.len(), &app.eal.lcores.ids(), processes)?;
    let own = || routes.iter().filter(|route| processes.polls(route.process));
    let mut polled: Vec<(u32, usize)> = own().map(|route| (route.lcore, route.from)).collect();
    let mut used: Vec<usize> = routes.iter().map(|route| route.from).collect();
    used.sort_unstable();
    used.dedup();
    let style = args.style();
    let mut reporter = Reporter::new(style, used.clone());
    describe(&app.eal, &reporter, &open, &used)?;
    let mac_updating = !args.no_mac_updating;
    reporter.print_text(&format!("MAC updating {}\n", if mac_updating { "enabled" } else { "disabled" }))?;
    if args.portmap.is_none() && !used.len().is_multiple_of(2) {
        reporter.print_text("Notice: odd number of ports in portmask.\n")?;
    }
    for route in own() {
        let queue = if args.queues > 1 { format!(" queue {}", route.pair) } else { String::new() };
        let (lcore, from, to) = (route.lcore, route.from, route.to);
        reporter.print_text(&format!("Lcore {lcore}: RX port {from} TX port {to}{queue}\n"))?;
    }

    check_interrupts(&args, &open, &used)?;
    let before = ioctl::calls();
    let config = Config { port: args.port(), buffers: args.total_num_mbufs, processes, ..Config::default() };
    let mut ports = app.reserve(open, routes, &config)?;
    describe_memory(&app.eal, &reporter, &ports, ioctl::calls() - before)?;
    for number in 0..ports.count() {
        if !used.contains(&number) {
            reporter.print_text(&format!("Skipping disabled port {number}\n"))?;
            continue;
        }
        reporter.print_text(&format!("Initializing port {number}... "))?;
        ports.set_promiscuous(number, args.promiscuous)?;
        ports.start(number)?;
        reporter.print_text("done: \n")?;
        let mac = ports.mac(number)?;
        reporter.print(
            &mac_text(number, mac),
            &json!({ "event": "port", "port": number, "mac": mac.to_string() }),
        )?;
        describe_offloads(&reporter, number, config.port.offloads, &ports)?;
    }
    check_links(app, &reporter, &ports)?;

    if args.record_core_cycles {
        ports.measure_busy_ticks();
    }
    ports.set_tied_lanes(!args.no_tied_lanes);
    if let Some(idle_polls) = args.rx_interrupt {
        ports.sleep_after(idle_polls);
    }
    if let Some(seconds) = args.untie_period {
        ports.untie_every(Duration::from_secs(seconds.into()));
    }
    app.confine()?;
    polled.sort_unstable();
    reporter.forwarding(&app.eal.lcores.ids(), &polled)?;
    let rewrite = |port| match ports.mac(port) {
        Ok(mac) if mac_updating => Rewrite::of(port, mac),
        _ => Rewrite::NONE,
    };
    let rewrites: Vec<Rewrite> = (0..ports.count()).map(rewrite).collect();
    let read =
        |counts: &Counts| used.iter().map(|port| counts.port(*port).read()).collect::<Vec<PortStats>>();
    let (mut last, mut printed) = (Instant::now(), Ok(()));
    ports.forward(
        app,
        |route| rewrites[route.to],
        &|event| announce(style, event),
        |counts| {
            let due = args.period > 0.0 && last.elapsed().as_secs_f64() >= args.period;
            if due && printed.is_ok() {
                last = Instant::now();
                printed = reporter.statistics(&read(counts)).inspect_err(|_| app.stop.set());
            }
        },
    )?;
    reporter.begin_shutdown();
    if let Some(signal) = app.stop.signal() {
        reporter.print(
            &format!("\n\nSignal {signal} received, preparing to exit...\n"),
            &json!({ "event": "signal", "signal": signal }),
        )?;
    }
    reporter.summary(&read(ports.counts()))?;
    let counts = ports.counts();
    if args.record_core_cycles {
        reporter.core_cycles(counts.busy_ticks().unwrap_or(0), &read(counts))?;
    }
    if args.rx_interrupt.is_some() {
        let slept = |id| Some((id, counts.lcore(id)?));
        app.eal
            .lcores
            .ids()
            .into_iter()
            .filter_map(slept)
            .try_for_each(|(id, ticks)| reporter.sleep(id, ticks))?;
    }
    let closed = close(&reporter, &mut ports);
    let mut checked = Ok(());
    for balance in ports.balances() {
        reporter.print_extra(&balance.text(), &json!({ "event": "balance", "balance": balance }))?;
        checked = checked.and(balance.check());
    }
    closed.and(checked).and(printed)?;
    reporter.print("Bye...\n", &json!({ "event": "end" }))
}

/// Checks that every port has the interrupts that `--rx-interrupt` needs.
fn check_interrupts(args: &Args, open: &[OpenPort], used: &[usize]) -> Result<()> {
    let has_none = |number: &&usize| !open[**number].port.capabilities().rx_interrupts;
    match used.iter().find(has_none).filter(|_| args.rx_interrupt.is_some()) {
        None => Ok(()),
        Some(number) => {
            let why = format!("port {number} ({}) has no interrupts", open[*number].name);
            let error = Error::new(ErrorKind::Usage, "cannot use --rx-interrupt", why);
            Err(error.with_hint("leave it out, so that lcores poll"))
        }
    }
}

/// Prints the mode of each port and the reason for it, the IOVA mode, and the memory.
fn describe(eal: &Eal, reporter: &Reporter, open: &[OpenPort], used: &[usize]) -> Result<()> {
    let physical = open.iter().any(OpenPort::is_physical);
    let iova = format!("{:?}", eal.iova_mode(physical)?).to_uppercase();
    for &number in used {
        let port = &open[number];
        let report = port.report.as_ref();
        reporter.print_extra(
            &format!("Port {number}: {}\n", port.describe()),
            &json!({
                "event": "open", "port": number, "address": port.name, "description": port.describe(),
                "mode": report.map(|report| report.mode.name()), "why": report.map(|report| &report.why),
            }),
        )?;
    }
    let memory = eal.backing().name();
    let warning = if physical { "; no IOMMU: the NICs can reach all memory of this machine" } else { "" };
    reporter.print_extra(
        &format!("IOVA mode {iova}{warning}\nMemory: {memory}; hugepages: {}\n", Eal::hugepages_line()),
        &json!({ "event": "memory", "iova_mode": iova, "memory": memory }),
    )
}

/// Prints the memory of each NUMA node, if there are several, and, if the ports are isolated, the number of
/// address spaces and map calls.
fn describe_memory(eal: &Eal, reporter: &Reporter, ports: &Ports, calls: u64) -> Result<()> {
    let memory = ports.memory();
    let nodes = memory.nodes();
    if !nodes.is_empty() {
        let text = nodes.iter().map(|(node, bytes)| format!(" {} MiB on node {node}", bytes >> 20));
        let nodes = nodes.iter().map(|(node, bytes)| json!({ "node": node, "mib": bytes >> 20 }));
        reporter.print_extra(
            &format!("NUMA:{}\n", text.collect::<Vec<_>>().join(",")),
            &json!({ "event": "numa", "nodes": nodes.collect::<Vec<_>>() }),
        )?;
    }
    if eal.args.isolate_ports {
        let (spaces, used) = (memory.spaces(), ports.used().count());
        reporter.print_extra(
            &format!("Isolated: {used} ports in {spaces} address spaces, {calls} map calls\n"),
            &json!({ "event": "isolation", "ports": used, "spaces": spaces, "map_calls": calls }),
        )?;
    }
    Ok(())
}

/// Prints which of the requested offloads the device of a port supports.
fn describe_offloads(reporter: &Reporter, number: usize, asked: Offloads, ports: &Ports) -> Result<()> {
    let Some(open) = ports.get(number).filter(|_| !asked.is_empty()) else { return Ok(()) };
    let offloads: Vec<_> = (asked & open.port.capabilities().offloads).names().collect();
    let text = if offloads.is_empty() { "none".to_owned() } else { offloads.join(", ") };
    reporter.print_extra(
        &format!("Port {number} offloads: {text}\n"),
        &json!({ "event": "offloads", "port": number, "offloads": offloads }),
    )
}

fn check_links(app: &App, reporter: &Reporter, ports: &Ports) -> Result<()> {
    reporter.print_text("\nChecking link status")?;
    ports.wait_for_links(&app.stop, || reporter.print_text("."))?;
    reporter.print_text("done\n")?;
    for number in ports.used() {
        let Some(open) = ports.get(number) else { continue };
        let text = link_text(open.port.link());
        reporter.print(
            &format!("Port {number} {text}\n"),
            &json!({ "event": "link", "port": number, "link": text }),
        )?;
    }
    Ok(())
}

/// Stops and closes every port that is this process's, prints its counters, and checks that every buffer was
/// returned.
fn close(reporter: &Reporter, ports: &mut Ports) -> Result<()> {
    for number in ports.used().collect::<Vec<_>>() {
        let is_ours = ports.is_owner();
        if is_ours {
            reporter.print_text(&format!("Closing port {number}..."))?;
        }
        let closed = ports.close(number);
        if is_ours {
            reporter.print_text(if closed.is_confirmed {
                " Done\n"
            } else {
                " the device did not stop\n"
            })?;
        }
        let of_port = [("restarts", closed.restarts), ("link_changes", closed.link_changes)];
        let of_port = of_port.map(|(name, count)| (name.to_owned(), count));
        let text = [closed.stats.summary(), of_port.to_vec()].concat();
        let all = [closed.stats.named(), of_port.to_vec()].concat();
        reporter.print_extra(
            &format!("Port {number} counted: {}\n", counters_text(&text).unwrap_or("nothing".into())),
            &counters_json(number, &all),
        )?;
    }
    ports.check_buffers()
}
