//! What a process's telemetry says at one time.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::Value;
use vireo_eal::{Error, ErrorKind, Result};
use vireo_top::client::printable;

/// State of a process.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) at: Instant,
    pub(crate) pid: u64,
    /// Program and version, as the process calls itself.
    pub(crate) version: String,
    pub(crate) ports: BTreeMap<u64, Port>,
    pub(crate) lcores: BTreeMap<u64, Lcore>,
}

/// State of a port.
#[derive(Clone, Debug, Default)]
pub(crate) struct Port {
    pub(crate) name: String,
    /// VFIO mode. Only Vireo's processes tell it.
    pub(crate) mode: Option<String>,
    /// Whether the link is up, and its speed in Mbit/s.
    pub(crate) link: Option<(bool, Option<u64>)>,
    pub(crate) rx_packets: u64,
    pub(crate) tx_packets: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    /// Counters of packets that were lost, by name; those that are not 0.
    pub(crate) drops: BTreeMap<String, u64>,
}

/// State of an lcore.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lcore {
    pub(crate) cpus: Vec<u64>,
    /// Ticks of the TSC: in all, and in polls that moved packets. Absent if the process does not measure them.
    pub(crate) ticks: Option<(u64, u64)>,
}

/// Speed of a port that does not tell it (`RTE_ETH_SPEED_NUM_UNKNOWN`).
const UNKNOWN: u64 = u32::MAX as u64;

impl Sample {
    /// Takes a sample of the process `pid`, which calls itself `version`, with `ask`, which returns the value of an answer.
    ///
    /// # Errors
    /// Those of `ask`; `Protocol` if the process lists no ports and no lcores.
    pub(crate) fn take(pid: u64, version: String, ask: impl Fn(&str) -> Result<Value>) -> Result<Self> {
        let listed = |request: &str| -> Result<Option<Vec<u64>>> {
            Ok(ask(request)?.as_array().map(|list| list.iter().filter_map(Value::as_u64).collect()))
        };
        let (ports, lcores) = (listed("/ethdev/list")?, listed("/eal/lcore/list")?);
        if ports.is_none() && lcores.is_none() {
            let why = "it is not the telemetry socket of a process with ports";
            return Err(Error::new(ErrorKind::Protocol, "cannot read its telemetry", why));
        }
        let mut sample =
            Self { at: Instant::now(), pid, version, ports: BTreeMap::new(), lcores: BTreeMap::new() };
        for number in ports.unwrap_or_default() {
            sample.ports.insert(number, Port::take(number, &ask)?);
        }
        for number in lcores.unwrap_or_default() {
            sample.lcores.insert(number, Lcore::take(number, &ask)?);
        }
        Ok(sample)
    }
}

impl Port {
    fn take(number: u64, ask: impl Fn(&str) -> Result<Value>) -> Result<Self> {
        let of = |endpoint: &str| ask(&format!("{endpoint},{number}"));
        let (info, link, stats) = (of("/ethdev/info")?, of("/ethdev/link_status")?, of("/ethdev/stats")?);
        let xstats = ask(&format!("/ethdev/xstats,{number},hide_zero=true"))?;
        let vfio = of("/vfio/info")?;
        let count = |name: &str| stats[name].as_u64().unwrap_or_default();
        // A driver without extended counters has the basic ones.
        let counters = xstats.as_object().filter(|all| !all.is_empty()).or(stats.as_object());
        let lost = counters.into_iter().flatten().filter(|(name, _)| is_loss(name));
        let lost =
            lost.filter_map(|(name, count)| Some((printable(&name.as_str().into())?, count.as_u64()?)));
        let speed = link["speed"].as_u64().filter(|speed| *speed != UNKNOWN);
        Ok(Self {
            name: printable(&info["name"]).unwrap_or_default(),
            mode: printable(&vfio["mode"]),
            link: link["status"].as_str().map(|status| (status.eq_ignore_ascii_case("up"), speed)),
            rx_packets: count("ipackets"),
            tx_packets: count("opackets"),
            rx_bytes: count("ibytes"),
            tx_bytes: count("obytes"),
            drops: lost.filter(|(_, count)| *count > 0).collect(),
        })
    }
}

/// Whether a port's counter counts lost packets. Those of single queues are in the port's.
fn is_loss(name: &str) -> bool {
    let of_queue = name.split('_').any(|word| {
        word.strip_prefix('q')
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    });
    let words = ["drop", "miss", "error", "nombuf", "allocation", "discard"];
    !of_queue && words.iter().any(|word| name.contains(word))
}

impl Lcore {
    fn take(number: u64, ask: impl Fn(&str) -> Result<Value>) -> Result<Self> {
        let info = ask(&format!("/eal/lcore/info,{number}"))?;
        let cpus = info["cpuset"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        let ticks = info["total_cycles"].as_u64().zip(info["busy_cycles"].as_u64());
        Ok(Self { cpus, ticks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_told_by_their_names() {
        for name in
            ["rx_missed_errors", "tx_dropped", "rx_mbuf_allocation_errors", "imissed", "rx_nombuf", "oerrors"]
        {
            assert!(is_loss(name), "{name}");
        }
        for name in ["rx_good_packets", "rx_q0_errors", "tx_q12_dropped", "restarts", "q_errors_of_q0_errors"]
        {
            assert!(!is_loss(name), "{name}");
        }
    }
}
