//! Rates between two samples of each process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::sample::{Port, Sample};

/// What is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct View {
    pub(crate) processes: Vec<ProcessView>,
}

/// Rates of a process.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ProcessView {
    pub(crate) socket: PathBuf,
    pub(crate) pid: u64,
    pub(crate) program: String,
    pub(crate) version: String,
    /// Time between the samples.
    pub(crate) seconds: f64,
    pub(crate) ports: Vec<PortView>,
    pub(crate) lcores: Vec<LcoreView>,
}

/// Rates of a port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct PortView {
    pub(crate) port: u64,
    pub(crate) name: String,
    pub(crate) mode: Option<String>,
    /// Absent if the process does not tell it.
    pub(crate) link_up: Option<bool>,
    pub(crate) link_mbits: Option<u64>,
    pub(crate) rx_pps: f64,
    pub(crate) tx_pps: f64,
    /// Bits per second, without FCS, preamble and gap.
    pub(crate) rx_bps: f64,
    pub(crate) tx_bps: f64,
    pub(crate) drops: Vec<DropView>,
}

/// A counter of lost packets.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct DropView {
    pub(crate) name: String,
    pub(crate) total: u64,
    pub(crate) per_second: f64,
}

/// Use of an lcore.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LcoreView {
    pub(crate) lcore: u64,
    pub(crate) cpus: Vec<u64>,
    /// Part of the time in polls that moved packets. Absent if the process does not measure it.
    pub(crate) busy: Option<f64>,
}

impl View {
    /// Compares the samples of the processes that are in both.
    pub(crate) fn between(before: &BTreeMap<PathBuf, Sample>, now: &BTreeMap<PathBuf, Sample>) -> Self {
        let both = now.iter().filter_map(|(socket, now)| Some((socket, before.get(socket)?, now)));
        // A socket may have gone over to another process.
        let same = both.filter(|(_, before, now)| before.pid == now.pid);
        Self {
            processes: same.map(|(socket, before, now)| ProcessView::between(socket, before, now)).collect(),
        }
    }
}

impl ProcessView {
    fn between(socket: &Path, before: &Sample, now: &Sample) -> Self {
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let ports = now.ports.iter().map(|(number, port)| {
            let new = Port::default();
            PortView::between(*number, before.ports.get(number).unwrap_or(&new), port, seconds)
        });
        let lcores = now.lcores.iter().map(|(number, lcore)| {
            let ticks = before.lcores.get(number).and_then(|before| before.ticks).zip(lcore.ticks);
            let busy = ticks.map(|(before, now)| {
                let of = |now: u64, before: u64| now.saturating_sub(before) as f64;
                (of(now.1, before.1) / of(now.0, before.0).max(1.0)).min(1.0)
            });
            LcoreView { lcore: *number, cpus: lcore.cpus.clone(), busy }
        });
        Self {
            socket: socket.to_owned(),
            pid: now.pid,
            program: program(now.pid),
            version: now.version.clone(),
            seconds,
            ports: ports.collect(),
            lcores: lcores.collect(),
        }
    }
}

/// Name of a process; empty if it is in another PID namespace or has ended.
fn program(pid: u64) -> String {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let path = command.split(|byte| *byte == 0).next().unwrap_or_default();
    Path::new(&*String::from_utf8_lossy(path)).file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl PortView {
    fn between(number: u64, before: &Port, now: &Port, seconds: f64) -> Self {
        // Counters that were reset count from 0.
        let rate = |before: u64, now: u64| now.checked_sub(before).unwrap_or(now) as f64 / seconds.max(1e-9);
        let drops = now.drops.iter().map(|(name, total)| DropView {
            name: name.clone(),
            total: *total,
            per_second: rate(before.drops.get(name).copied().unwrap_or(0), *total),
        });
        Self {
            port: number,
            name: now.name.clone(),
            mode: now.mode.clone(),
            link_up: now.link.map(|(up, _)| up),
            link_mbits: now.link.and_then(|(_, speed)| speed),
            rx_pps: rate(before.rx_packets, now.rx_packets),
            tx_pps: rate(before.tx_packets, now.tx_packets),
            rx_bps: 8.0 * rate(before.rx_bytes, now.rx_bytes),
            tx_bps: 8.0 * rate(before.tx_bytes, now.tx_bytes),
            drops: drops.collect(),
        }
    }

    /// Link as people read it.
    pub(crate) fn link(&self) -> String {
        match (self.link_up, self.link_mbits) {
            (None, _) => "-".into(),
            (Some(false), _) => "down".into(),
            (Some(true), None) => "up".into(),
            (Some(true), Some(mbits)) if mbits >= 1000 && mbits % 1000 == 0 => {
                format!("{} Gbit/s", mbits / 1000)
            }
            (Some(true), Some(mbits)) => format!("{mbits} Mbit/s"),
        }
    }

    /// Lost packets as people read them: by name, those of this interval first.
    pub(crate) fn losses(&self) -> String {
        let mut drops: Vec<&DropView> = self.drops.iter().collect();
        drops.sort_by(|a, b| b.per_second.total_cmp(&a.per_second));
        let text = drops.iter().map(|drop| match drop.per_second {
            0.0 => format!("{} {}", drop.name, drop.total),
            rate => format!("{} {} (+{}/s)", drop.name, drop.total, short(rate)),
        });
        text.collect::<Vec<_>>().join(", ")
    }
}

/// A number with three digits and a unit.
pub(crate) fn short(number: f64) -> String {
    let units = ["", " k", " M", " G", " T"];
    let (mut number, mut unit) = (number, 0);
    // What would round to 1000 has the next unit.
    while number >= 999.5 && unit + 1 < units.len() {
        number /= 1000.0;
        unit += 1;
    }
    let digits = match number {
        _ if unit == 0 => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{number:.digits$}{}", units[unit])
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;
    use vireo_eal::Result;

    use super::*;

    /// A sample of a process with a port that has received `packets`, and an lcore with `ticks`.
    fn sample(at: Instant, pid: u64, packets: u64, ticks: (u64, u64)) -> Sample {
        let ask = |request: &str| -> Result<serde_json::Value> {
            Ok(match request {
                "/ethdev/list" => json!([3]),
                "/ethdev/info,3" => json!({ "name": "0000:03:00.0" }),
                "/ethdev/link_status,3" => {
                    json!({ "status": "UP", "speed": 10_000, "duplex": "full-duplex" })
                }
                "/ethdev/stats,3" => json!({ "ipackets": packets, "ibytes": 60 * packets, "opackets": 7 }),
                "/ethdev/xstats,3,hide_zero=true" => {
                    json!({ "rx_good_packets": packets, "rx_missed_errors": packets / 10, "tx_errors": 4 })
                }
                "/eal/lcore/list" => json!([1]),
                "/eal/lcore/info,1" => {
                    json!({ "cpuset": [1], "total_cycles": ticks.0, "busy_cycles": ticks.1 })
                }
                _ => json!(null),
            })
        };
        Sample { at, ..Sample::take(pid, "DPDK 25.11.0".to_owned(), ask).unwrap() }
    }

    pub(crate) fn view() -> View {
        let begun = Instant::now();
        let of = |sample| BTreeMap::from([(PathBuf::from("/run/dpdk/rte/dpdk_telemetry.v2"), sample)]);
        let now = begun + Duration::from_secs(2);
        View::between(
            &of(sample(begun, u64::MAX, 1000, (100, 10))),
            &of(sample(now, u64::MAX, 2_001_000, (300, 60))),
        )
    }

    #[test]
    fn rates_are_differences_over_time() {
        let view = view();
        let [process] = &view.processes[..] else { panic!("{view:?}") };
        let [port] = &process.ports[..] else { panic!("{process:?}") };
        assert_eq!((port.rx_pps, port.tx_pps, port.rx_bps), (1e6, 0.0, 480e6));
        assert_eq!((port.link(), port.mode.as_deref()), ("10 Gbit/s".into(), None));
        assert_eq!(port.losses(), "rx_missed_errors 200100 (+100 k/s), tx_errors 4");
        assert_eq!(process.lcores[0].busy, Some(0.25));
    }

    #[test]
    fn a_process_that_began_again_is_not_compared_with_the_last_one() {
        let now = Instant::now();
        let of = |sample| BTreeMap::from([(PathBuf::from("socket"), sample)]);
        let before = of(sample(now, 1, 1000, (100, 10)));
        assert_eq!(View::between(&before, &of(sample(now, 2, 10, (1, 1)))), View::default());
        // The same process whose counters were reset, at the same time.
        let view = View::between(&before, &of(sample(now, 1, 10, (1, 1))));
        assert!(view.processes[0].ports[0].rx_pps > 0.0 && view.processes[0].lcores[0].busy == Some(0.0));
    }

    #[test]
    fn numbers_have_three_digits() {
        let numbers = [0.0, 7.0, 999.4, 999.6, 1234.0, 12_345.0, 999_499.0, 999_500.0, 14_880_952.0, 1e15];
        let texts = ["0", "7", "999", "1.00 k", "1.23 k", "12.3 k", "999 k", "1.00 M", "14.9 M", "1000 T"];
        assert_eq!(numbers.map(short), texts);
    }
}
