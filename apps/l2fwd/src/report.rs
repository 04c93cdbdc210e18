//! What l2fwd prints: DPDK's text byte for byte, lines with rates, or JSON for programs.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::json;
use vireo_drivers::port::{Link, MacAddr};
use vireo_eal::clock::Tsc;
use vireo_eal::{Result, program};
use vireo_frame::{PortState, Totals};

/// How the output looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// What DPDK's l2fwd prints and nothing else, with its table redrawn in place. The rest goes to the log, as DPDK's
    /// EAL lines do.
    Table,
    /// DPDK's text and more, with a line for each port in the place of the table.
    Lines,
    /// A JSON object for each event.
    Json,
}

impl Style {
    /// The default: by what standard output is.
    pub fn of_stdout() -> Self {
        if io::stdout().is_terminal() { Self::Table } else { Self::Lines }
    }
}

/// Prints statistics and events; remembers the last totals, for the rates.
#[derive(Debug)]
pub struct Reporter {
    style: Style,
    /// Port numbers, in the order of the counts.
    ports: Vec<usize>,
    last: Vec<Totals>,
    since: Instant,
}

impl Reporter {
    /// A reporter for `ports` (port numbers).
    pub fn new(style: Style, ports: Vec<usize>) -> Self {
        Self { style, last: vec![Totals::default(); ports.len()], ports, since: Instant::now() }
    }

    /// Prints `text` to people, or `event` to programs.
    ///
    /// # Errors
    /// `Io` when standard output does not take it.
    pub fn say(&self, text: &str, event: &serde_json::Value) -> Result<()> {
        match self.style {
            Style::Json => program::print(&format!("{event}\n")),
            _ => program::print(text),
        }
    }

    /// Prints text that programs do not need.
    ///
    /// # Errors
    /// As for [`Reporter::say`].
    pub fn chat(&self, text: &str) -> Result<()> {
        if self.style == Style::Json { Ok(()) } else { program::print(text) }
    }

    /// Prints `text` of ours, which DPDK does not have, to people, or `event` to programs.
    ///
    /// # Errors
    /// As for [`Reporter::say`].
    pub fn note(&self, text: &str, event: &serde_json::Value) -> Result<()> {
        if self.style != Style::Table {
            return self.say(text, event);
        }
        text.lines().for_each(|line| tracing::info!("{line}"));
        Ok(())
    }

    /// Says on which of `lcores` the main loop begins, and which of the lanes (lcore and port, ascending) each polls.
    ///
    /// # Errors
    /// As for [`Reporter::say`].
    pub fn forwarding(&self, lcores: &[u32], lanes: &[(u32, usize)]) -> Result<()> {
        let idle = |lcore: &u32| lanes.iter().all(|(other, _)| other != lcore);
        for lcore in lcores {
            if idle(lcore) {
                self.note(
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
            _ => self.say("entering main loop\n", &json!({ "event": "forwarding" })),
        }
    }

    /// Prints totals, and rates since the last time; nothing while the reader stands still, because the lcore that
    /// prints also forwards.
    ///
    /// # Errors
    /// As for [`Reporter::say`].
    pub fn statistics(&mut self, now: &[Totals]) -> Result<()> {
        if !program::is_output_ready() {
            return Ok(());
        }
        let elapsed = self.since.elapsed();
        let text = match self.style {
            Style::Table => table(&self.ports, now),
            Style::Lines => lines(&self.ports, &self.last, now, elapsed),
            Style::Json => format!("{}\n", statistics_json(&self.ports, &self.last, now, elapsed)),
        };
        self.last = now.to_vec();
        self.since = Instant::now();
        program::print(&text)
    }

    /// Prints totals once more, at the end; with the table, which DPDK does not repeat, to the log.
    ///
    /// # Errors
    /// As for [`Reporter::say`].
    pub fn summary(&mut self, now: &[Totals]) -> Result<()> {
        match self.style {
            Style::Table => self
                .note(&lines(&self.ports, &self.last, now, self.since.elapsed()), &serde_json::Value::Null),
            _ => self.statistics(now),
        }
    }

    /// Prints what the polls that moved packets took, in testpmd's words.
    ///
    /// # Errors
    /// As for [`Reporter::say`].
    pub fn core_cycles(&self, ticks: u64, now: &[Totals]) -> Result<()> {
        let packets: u64 = now.iter().map(|totals| totals.received).sum();
        let each = ticks as f64 / packets.max(1) as f64;
        let mhz = Tsc::hz() / 1_000_000;
        self.note(
            &format!("CPU cycles/packet={each:.2} (total cycles={ticks} / total io packets={packets}) at {mhz} MHz Clock\n"),
            &json!({ "event": "core_cycles", "cycles_per_packet": each, "cycles": ticks, "packets": packets, "mhz": mhz }),
        )
    }
}

/// Prints what became of a port, to programs: the log has it for people. As with statistics, nobody waits for a reader that
/// stands still.
pub fn announce(style: Style, port: usize, state: PortState) {
    if style == Style::Json && program::is_output_ready() {
        // The next statistics find the same output, and end the run.
        let _ =
            program::print(&format!("{}\n", json!({ "event": "port_state", "port": port, "state": state })));
    }
}

/// DPDK l2fwd's table, byte for byte.
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

/// Packets per second between two counts.
fn rate(last: u64, now: u64, elapsed: Duration) -> f64 {
    now.saturating_sub(last) as f64 / elapsed.as_secs_f64().max(1e-9)
}

fn lines(ports: &[usize], last: &[Totals], now: &[Totals], elapsed: Duration) -> String {
    let mut text = String::new();
    for ((port, last), now) in ports.iter().zip(last).zip(now) {
        let _ = writeln!(
            text,
            "port {port}: sent {} ({:.0}/s) received {} ({:.0}/s) dropped {}",
            now.sent,
            rate(last.sent, now.sent, elapsed),
            now.received,
            rate(last.received, now.received, elapsed),
            now.dropped
        );
    }
    text
}

fn statistics_json(ports: &[usize], last: &[Totals], now: &[Totals], elapsed: Duration) -> serde_json::Value {
    let ports: Vec<_> = ports
        .iter()
        .zip(last)
        .zip(now)
        .map(|((port, last), now)| {
            json!({
                "port": port, "sent": now.sent, "received": now.received, "dropped": now.dropped,
                "sent_pps": rate(last.sent, now.sent, elapsed).round(),
                "received_pps": rate(last.received, now.received, elapsed).round(),
            })
        })
        .collect();
    json!({ "event": "statistics", "ports": ports })
}

/// `Link up at 1 Gbps FDX Autoneg`, in DPDK's words (`rte_eth_link_to_str`).
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

/// `Port 0, MAC address: 52:54:00:00:00:01`, in DPDK's words.
pub fn mac_text(port: usize, mac: MacAddr) -> String {
    format!("Port {port}, MAC address: {mac}\n\n")
}

#[cfg(test)]
mod tests {
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
        let now = [totals(300, 50, 1)];
        assert_eq!(
            lines(&[1], &last, &now, Duration::from_secs(2)),
            "port 1: sent 300 (100/s) received 50 (25/s) dropped 1\n"
        );
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
