//! Output of l2fwd: DPDK's text byte for byte, lines with rates, or JSON for programs.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::json;
use vireo_drivers::counters::PortStats;
use vireo_drivers::port::{Link, MacAddr};
use vireo_eal::clock::Tsc;
use vireo_eal::{Result, program};
use vireo_frame::{Handover, LcoreTicks, RunEvent, Totals};

/// Longest wait, at the end of a run, for an output reader that reads nothing.
const PATIENCE: Duration = Duration::from_secs(3);

/// Maximum number of counters in an event. Such an event is a quarter of what a pipe holds (pipe(7)), so that
/// the pipe has room for one from time to time.
const COUNTERS_PER_EVENT: usize = 512;

/// Form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// Output of DPDK's l2fwd and nothing else, with its table redrawn in place. Everything else goes to the
    /// log, as DPDK's EAL lines do.
    Table,
    /// DPDK's text and more, with a line per port instead of the table.
    Lines,
    /// One JSON object per event.
    Json,
}

impl Style {
    /// Returns the default, which depends on whether standard output is a terminal.
    pub fn of_stdout() -> Self {
        if io::stdout().is_terminal() { Self::Table } else { Self::Lines }
    }
}

/// Prints statistics and events, and keeps the last totals to compute rates.
#[derive(Debug)]
pub struct Reporter {
    style: Style,
    /// Longest wait for a reader that reads nothing; `None` if there is no limit.
    patience: Option<Duration>,
    /// Port numbers, in the order of the counts.
    ports: Vec<usize>,
    last: Vec<Totals>,
    since: Instant,
}

impl Reporter {
    /// Creates a reporter for `ports` (port numbers).
    pub fn new(style: Style, ports: Vec<usize>) -> Self {
        let last = vec![Totals::default(); ports.len()];
        Self { style, patience: None, last, ports, since: Instant::now() }
    }

    /// Starts the end of the run: from now on, a reader that reads nothing delays it by three seconds at
    /// most.
    pub fn begin_shutdown(&mut self) {
        self.patience = Some(PATIENCE);
    }

    fn write(&self, text: &str) -> Result<()> {
        match self.patience {
            Some(patience) => program::print_within(text, patience),
            None => program::print(text),
        }
    }

    /// Prints `text` for people, or `event` for programs.
    ///
    /// # Errors
    /// `Io` when writing to standard output fails.
    pub fn print(&self, text: &str, event: &serde_json::Value) -> Result<()> {
        match self.style {
            Style::Json => self.write(&format!("{event}\n")),
            _ => self.write(text),
        }
    }

    /// Prints text that programs do not need.
    ///
    /// # Errors
    /// As for [`Reporter::print`].
    pub fn print_text(&self, text: &str) -> Result<()> {
        if self.style == Style::Json { Ok(()) } else { self.write(text) }
    }

    /// Prints `text`, which is not in DPDK's output, for people, or `event` for programs.
    ///
    /// # Errors
    /// As for [`Reporter::print`].
    pub fn print_extra(&self, text: &str, event: &serde_json::Value) -> Result<()> {
        if self.style != Style::Table {
            return self.print(text, event);
        }
        text.lines().for_each(|line| tracing::info!("{line}"));
        Ok(())
    }

    /// Reports on which of `lcores` the main loop begins, and which of the lanes (lcore and port, ascending)
    /// each one polls.
    ///
    /// # Errors
    /// As for [`Reporter::print`].
    pub fn forwarding(&self, lcores: &[u32], lanes: &[(u32, usize)]) -> Result<()> {
        let idle = |lcore: &u32| lanes.iter().all(|(other, _)| other != lcore);
        for lcore in lcores {
            if idle(lcore) {
                self.print_extra(
                    &format!("lcore {lcore} has nothing to do\n"),
                    &json!({ "event": "idle", "lcore": lcore }),
                )?;
            } else if self.style == Style::Table {
                tracing::info!("entering main loop on lcore {lcore}");
                let ports = lanes.iter().filter(|(other, _)| other == lcore);
                ports.for_each(|(_, port)| tracing::info!(" -- lcoreid={lcore} portid={port}"));
            }
        }
        match self.style {
            Style::Table => Ok(()),
            _ => self.print("entering main loop\n", &json!({ "event": "forwarding" })),
        }
    }

    /// Prints totals, rates since the last totals, and counters. Text for which standard output has no room
    /// is left out, because the lcore that prints also forwards. If the totals are left out, the next rates
    /// span both periods.
    ///
    /// # Errors
    /// As for [`Reporter::print`].
    pub fn statistics(&mut self, now: &[PortStats]) -> Result<()> {
        for (number, piece) in self.pieces(now).iter().enumerate() {
            if !program::print_if_room(piece)? {
                break;
            }
            if number == 0 {
                self.last = totals(now);
                self.since = Instant::now();
            }
        }
        Ok(())
    }

    /// Prints the totals once more, at the end. In the table form they go to the log, because DPDK does not
    /// repeat its table.
    ///
    /// # Errors
    /// As for [`Reporter::print`].
    pub fn summary(&self, now: &[PortStats]) -> Result<()> {
        match self.style {
            Style::Table => self.print_extra(
                &lines(&self.ports, &self.last, now, self.since.elapsed()),
                &serde_json::Value::Null,
            ),
            _ => self.write(&self.pieces(now).concat()),
        }
    }

    /// Returns the parts of a report that can be printed without the rest, totals first.
    fn pieces(&self, now: &[PortStats]) -> Vec<String> {
        let elapsed = self.since.elapsed();
        match self.style {
            Style::Table => vec![table(&self.ports, &totals(now))],
            Style::Lines => vec![lines(&self.ports, &self.last, now, elapsed)],
            Style::Json => json_lines(&self.ports, &self.last, now, elapsed),
        }
    }

    /// Prints the cost of the polls that moved packets, in testpmd's words.
    ///
    /// # Errors
    /// As for [`Reporter::print`].
    pub fn core_cycles(&self, ticks: u64, now: &[PortStats]) -> Result<()> {
        let packets: u64 = now.iter().map(|stats| stats.rx_sum().packets).sum();
        let each = ticks as f64 / packets.max(1) as f64;
        let mhz = Tsc::hz() / 1_000_000;
        self.print_extra(
            &format!("CPU cycles/packet={each:.2} (total cycles={ticks} / total io packets={packets}) at {mhz} MHz Clock\n"),
            &json!({ "event": "core_cycles", "cycles_per_packet": each, "cycles": ticks, "packets": packets, "mhz": mhz }),
        )
    }

    /// Prints how much of its time lcore `id` slept, and how often.
    ///
    /// # Errors
    /// As for [`Reporter::print`].
    pub fn sleep(&self, id: u32, ticks: &LcoreTicks) -> Result<()> {
        let (asleep, sleeps) = (ticks.asleep.get() as f64 / ticks.total().max(1) as f64, ticks.sleeps.get());
        self.print_extra(
            &format!("Lcore {id} slept {:.1} % of the time, {sleeps} times\n", 100.0 * asleep),
            &json!({ "event": "sleep", "lcore": id, "asleep": asleep, "sleeps": sleeps }),
        )
    }
}

/// Prints an event. For people, the state of a port is in the log. As with statistics, this does not wait for the
/// reader.
pub fn announce(style: Style, event: RunEvent) {
    let moved = |name, Handover { pid, gap }: Handover| {
        let mut text = event.to_string();
        text[..1].make_ascii_uppercase();
        (text, json!({ "event": name, "pid": pid, "gap_us": gap.as_secs_f64() * 1e6 }))
    };
    let (text, json) = match event {
        RunEvent::Port { port, state } => {
            (String::new(), json!({ "event": "port_state", "port": port, "state": state }))
        }
        RunEvent::TookOver(handover) => moved("took_over", handover),
        RunEvent::HandedOver(handover) => moved("handed_over", handover),
        // In the log for people, as the state of a port.
        RunEvent::Secondary { process, pid, state } => {
            let event = json!({ "event": "secondary", "process": process, "pid": pid, "state": state });
            (String::new(), event)
        }
        RunEvent::Joined { pid } => {
            (format!("Polling queues of process {pid}"), json!({ "event": "joined", "pid": pid }))
        }
    };
    let line = if style == Style::Json { json.to_string() } else { text };
    if !line.is_empty() {
        // The next statistics get the same error, and end the run there.
        let _ = program::print_if_room(&format!("{line}\n"));
    }
}

fn totals(ports: &[PortStats]) -> Vec<Totals> {
    ports.iter().map(Totals::from).collect()
}

/// Formats the counters that are not 0, if there are any.
pub fn counters_text(counters: &[(String, u64)]) -> Option<String> {
    let counted = counters.iter().filter(|(_, count)| *count > 0);
    let counted: Vec<String> = counted.map(|(name, count)| format!("{name} {count}")).collect();
    (!counted.is_empty()).then(|| counted.join(", "))
}

/// Returns the event with the counters of a port by name.
pub fn counters_json(port: usize, counters: &[(String, u64)]) -> serde_json::Value {
    let counters: serde_json::Map<_, _> =
        counters.iter().map(|(name, count)| (name.clone(), json!(count))).collect();
    json!({ "event": "counters", "port": port, "counters": counters })
}

/// Formats DPDK l2fwd's table, byte for byte.
fn table(ports: &[usize], now: &[Totals]) -> String {
    let mut text = "\x1b[2J\x1b[1;1H\nPort statistics ====================================".to_owned();
    for (port, totals) in ports.iter().zip(now) {
        let _ = write!(
            text,
            "\nStatistics for port {port} ------------------------------\
             \nPackets sent: {:>24}\nPackets received: {:>20}\nPackets dropped: {:>21}",
            totals.sent, totals.received, totals.dropped
        );
    }
    let sum = |of: fn(&Totals) -> u64| now.iter().map(of).sum::<u64>();
    let _ = writeln!(
        text,
        "\nAggregate statistics ===============================\
         \nTotal packets sent: {:>18}\nTotal packets received: {:>14}\nTotal packets dropped: {:>15}\
         \n====================================================",
        sum(|totals| totals.sent),
        sum(|totals| totals.received),
        sum(|totals| totals.dropped)
    );
    text
}

/// Returns the packets per second between two counts.
fn rate(last: u64, now: u64, elapsed: Duration) -> f64 {
    now.saturating_sub(last) as f64 / elapsed.as_secs_f64().max(1e-9)
}

/// Formats one line per port, followed by a line for its queues if it has several.
fn lines(ports: &[usize], last: &[Totals], now: &[PortStats], elapsed: Duration) -> String {
    let mut lines = String::new();
    for ((port, last), stats) in ports.iter().zip(last).zip(now) {
        let now = Totals::from(stats);
        let _ = writeln!(
            lines,
            "port {port}: sent {} ({:.0}/s) received {} ({:.0}/s) dropped {}",
            now.sent,
            rate(last.sent, now.sent, elapsed),
            now.received,
            rate(last.received, now.received, elapsed),
            now.dropped
        );
        if stats.has_several_queues() {
            let counted = counters_text(&stats.of_queues());
            lines.extend(counted.map(|counted| format!("port {port}: {counted}\n")));
        }
    }
    lines
}

/// Returns an event with the totals of all ports, then one event per port with its counters, or several
/// events if the port has many queues.
fn json_lines(ports: &[usize], last: &[Totals], now: &[PortStats], elapsed: Duration) -> Vec<String> {
    let statistics = statistics_json(ports, last, now, elapsed);
    let counters = ports.iter().zip(now).flat_map(|(port, stats)| {
        let named = stats.named();
        let events = named.chunks(COUNTERS_PER_EVENT).map(|part| counters_json(*port, part));
        events.collect::<Vec<_>>()
    });
    [statistics].into_iter().chain(counters).map(|event| format!("{event}\n")).collect()
}

fn statistics_json(
    ports: &[usize],
    last: &[Totals],
    now: &[PortStats],
    elapsed: Duration,
) -> serde_json::Value {
    let ports: Vec<_> = ports
        .iter()
        .zip(last)
        .zip(now)
        .map(|((port, last), stats)| {
            let now = Totals::from(stats);
            json!({
                "port": port, "sent": now.sent, "received": now.received, "dropped": now.dropped,
                "sent_pps": rate(last.sent, now.sent, elapsed).round(),
                "received_pps": rate(last.received, now.received, elapsed).round(),
            })
        })
        .collect();
    json!({ "event": "statistics", "ports": ports })
}

/// Formats `link` in DPDK's words (`rte_eth_link_to_str`), such as `Link up at 1 Gbps FDX Autoneg`.
pub fn link_text(link: Link) -> String {
    if !link.up {
        return "Link down".into();
    }
    let speed = match link.speed {
        Some(0) => "None".into(),
        Some(speed) if speed >= 1000 => format!("{} Gbps", f64::from(speed) / 1000.0),
        Some(speed) => format!("{speed} Mbps"),
        None => "Unknown".into(),
    };
    let duplex = if link.full_duplex { "FDX" } else { "HDX" };
    format!("Link up at {speed} {duplex} {}", if link.autoneg { "Autoneg" } else { "Fixed" })
}

/// Formats a MAC address in DPDK's words, such as `Port 0, MAC address: 52:54:00:00:00:01`.
pub fn mac_text(port: usize, mac: MacAddr) -> String {
    format!("Port {port}, MAC address: {mac}\n\n")
}

#[cfg(test)]
mod tests {
    use vireo_drivers::counters::QueueStats;
    use vireo_drivers::fakedev::virtio::{Behaviour, VirtioNet, feature};
    use vireo_drivers::port::{Nic, PortConfig, RxBurst, TxBurst};
    use vireo_drivers::virtio;
    use vireo_eal::dma::{Burst, DmaMemory, Pool};
    use vireo_eal::mem::{Backing, Region};

    use super::*;

    fn totals(sent: u64, received: u64, dropped: u64) -> Totals {
        Totals { sent, received, dropped, consumed: 0 }
    }

    #[test]
    fn the_table_is_dpdks() {
        let now = [totals(12, 34, 5), totals(30, 12, 0)];
        let expected = concat!(
            "\x1b[2J\x1b[1;1H",
            "\nPort statistics ====================================",
            "\nStatistics for port 0 ------------------------------",
            "\nPackets sent:                       12",
            "\nPackets received:                   34",
            "\nPackets dropped:                     5",
            "\nStatistics for port 3 ------------------------------",
            "\nPackets sent:                       30",
            "\nPackets received:                   12",
            "\nPackets dropped:                     0",
            "\nAggregate statistics ===============================",
            "\nTotal packets sent:                 42",
            "\nTotal packets received:             46",
            "\nTotal packets dropped:               5",
            "\n====================================================\n",
        );
        assert_eq!(table(&[0, 3], &now), expected);
    }

    #[test]
    fn lines_have_rates_and_no_escapes() {
        let last = [totals(100, 0, 0)];
        let tx = QueueStats { packets: 300, dropped: 1, ..QueueStats::default() };
        let rx = |packets| QueueStats { packets, ..QueueStats::default() };
        let mut now = PortStats { rx: vec![rx(50)], tx: vec![tx], ..PortStats::default() };
        let text = |now: &PortStats| lines(&[1], &last, std::slice::from_ref(now), Duration::from_secs(2));
        assert_eq!(text(&now), "port 1: sent 300 (100/s) received 50 (25/s) dropped 1\n");
        now.rx.push(rx(20));
        assert_eq!(
            text(&now),
            "port 1: sent 300 (100/s) received 70 (35/s) dropped 1\n\
             port 1: rx_q0_packets 50, rx_q1_packets 20, tx_q0_packets 300, tx_q0_dropped 1\n"
        );
    }

    /// Returns the counters of a port with two queue pairs, through which frames have passed.
    fn port_of_two_pairs() -> PortStats {
        let config = PortConfig::with_descriptors(64, 64).with_pairs(2);
        let features = Behaviour::default().features | feature::MQ;
        let nic = VirtioNet::new(Behaviour { pairs: 2, features, ..Behaviour::default() });
        let region = Region::new(Pool::bytes(512) + (1 << 20), Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        nic.attach(memory.device_view().unwrap());
        let mut cache = Pool::new(&memory, 512).unwrap().cache();
        let mut device = virtio::Device::probe(nic.function()).unwrap();
        let mut queues = device.start(&config, &memory, &mut cache).unwrap();
        for (pair, (rx, tx)) in (0..).zip(queues.rx.iter_mut().zip(&mut queues.tx)) {
            for _ in 0..10 + pair {
                assert!(nic.receive_on(pair, &[7; 64]));
            }
            let mut burst = Burst::new();
            rx.rx_burst(&mut cache, &mut burst);
            tx.tx_burst(&mut cache, &mut burst);
        }
        let stats = device.counters().read();
        device.stop(queues, &mut cache).unwrap();
        stats
    }

    #[test]
    fn the_sum_over_queues_in_json_is_the_ports() {
        let stats = port_of_two_pairs();
        let text = json_lines(&[3], &[totals(0, 0, 0)], &[stats], Duration::from_secs(1));
        let events: Vec<serde_json::Value> =
            text.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            (events.len(), &events[0]["event"], &events[1]["port"]),
            (2, &json!("statistics"), &json!(3))
        );
        let counters = events[1]["counters"].as_object().unwrap();
        let count = |name: &str| counters[name].as_u64().unwrap();
        assert_eq!([count("rx_q0_packets"), count("rx_q1_packets"), count("rx_packets")], [10, 11, 21]);
        assert_eq!([count("tx_q0_bytes"), count("tx_q1_bytes"), count("tx_bytes")], [640, 704, 1344]);
        assert_eq!(events[0]["ports"][0]["received"], 21);
        for name in counters.keys().filter(|name| !name.contains("_q")) {
            let (direction, rest) = name.split_once('_').unwrap();
            let queues = [0, 1].map(|queue| count(&format!("{direction}_q{queue}_{rest}")));
            assert_eq!(count(name), queues.iter().sum::<u64>(), "{name}");
        }
    }

    #[test]
    fn links_read_like_dpdks() {
        let link = Link { up: true, speed: Some(1000), full_duplex: true, autoneg: true };
        assert_eq!(link_text(Link { up: false, ..link }), "Link down");
        for (speed, text) in [
            (None, "Unknown"),
            (Some(0), "None"),
            (Some(10), "10 Mbps"),
            (Some(100), "100 Mbps"),
            (Some(1000), "1 Gbps"),
            (Some(2500), "2.5 Gbps"),
            (Some(5000), "5 Gbps"),
            (Some(56_000), "56 Gbps"),
            (Some(400_000), "400 Gbps"),
        ] {
            assert_eq!(link_text(Link { speed, ..link }), format!("Link up at {text} FDX Autoneg"));
        }
        let fixed = Link { full_duplex: false, autoneg: false, ..link };
        assert_eq!(link_text(fixed), "Link up at 1 Gbps HDX Fixed");
    }
}
