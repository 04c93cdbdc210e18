//! The answers as text, in the form of `dpdk-proc-info` where that has one.

use std::fmt::Write as _;

use serde_json::Value;
use vireo_top::client::printable;

const BORDER: &str = "########################";

/// Formats everything that was found.
pub(crate) fn text(found: &Value) -> String {
    let mut text = String::new();
    for port in list(&found["ports"]) {
        let number = port["port"].as_u64().unwrap_or_default();
        if let Some(info) = port["info"].as_object() {
            let _ = writeln!(text, "\n  {BORDER} port {number} {BORDER}");
            fields(&mut text, info.iter().filter(|(name, _)| *name != "port_id"));
            fields(&mut text, port["link"].as_object().into_iter().flatten());
            fields(
                &mut text,
                port["vfio"].as_object().into_iter().flatten().filter(|(name, _)| {
                    // The phases of the start are for the time that they took.
                    *name == "mode" || *name == "why"
                }),
            );
        }
        if port["stats"].is_object() {
            stats(&mut text, number, &port["stats"]);
        }
        if let Some(counters) = port["xstats"].as_object() {
            let _ = writeln!(text, "###### NIC extended statistics for port {number:<2} #########");
            let _ = writeln!(text, "{BORDER}############################");
            for (name, count) in counters {
                let _ = writeln!(text, "{}: {count}", printable(&name.as_str().into()).unwrap_or_default());
            }
            let _ = writeln!(text, "{BORDER}############################");
        }
    }
    for (kind, name) in [("mempools", "mempool"), ("rings", "ring"), ("memzones", "memory")] {
        for (number, info) in list(&found[kind]).enumerate() {
            let _ = writeln!(text, "\n  {BORDER} {name} {number} {BORDER}");
            fields(&mut text, info.as_object().into_iter().flatten());
        }
    }
    text
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn fields<'a>(text: &mut String, fields: impl Iterator<Item = (&'a String, &'a Value)>) {
    for (name, value) in fields {
        let name = printable(&name.as_str().into()).unwrap_or_default();
        let _ = writeln!(text, "  {name}: {}", printable(value).unwrap_or_else(|| value.to_string()));
    }
}

/// Formats the statistics of a port as `dpdk-proc-info --stats` does.
fn stats(text: &mut String, number: u64, stats: &Value) {
    let count = |name: &str| stats[name].as_u64().unwrap_or_default();
    let _ = writeln!(text, "\n  {BORDER} NIC statistics for port {number:<2} {BORDER}");
    let [packets, errors, bytes] = ["ipackets", "ierrors", "ibytes"].map(count);
    let _ = writeln!(text, "  RX-packets: {packets:<10}  RX-errors:  {errors:<10}  RX-bytes:  {bytes:<10}");
    let _ = writeln!(text, "  RX-nombuf:  {:<10}", count("rx_nombuf"));
    let [packets, errors, bytes] = ["opackets", "oerrors", "obytes"].map(count);
    let _ = writeln!(text, "  TX-packets: {packets:<10}  TX-errors:  {errors:<10}  TX-bytes:  {bytes:<10}");
    let of = |name: &str, queue: usize| stats[name][queue].as_u64().unwrap_or_default();
    for queue in 0..list(&stats["q_ipackets"]).count() {
        let [packets, errors, bytes] = ["q_ipackets", "q_errors", "q_ibytes"].map(|name| of(name, queue));
        let _ = writeln!(
            text,
            "  Stats reg {queue:2} RX-packets: {packets:<10}  RX-errors: {errors:<10}  RX-bytes: {bytes:<10}"
        );
    }
    for queue in 0..list(&stats["q_opackets"]).count() {
        let [packets, bytes] = ["q_opackets", "q_obytes"].map(|name| of(name, queue));
        let _ = writeln!(text, "  Stats reg {queue:2} TX-packets: {packets:<10}  TX-bytes: {bytes:<10}");
    }
    let _ = writeln!(text, "  {BORDER}############################{BORDER}");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn statistics_look_as_in_dpdk() {
        let found = json!({ "ports": [{ "port": 1, "stats": {
            "ipackets": 7, "ierrors": 1, "ibytes": 420, "rx_nombuf": 0, "opackets": 6, "oerrors": 0, "obytes": 360,
            "q_ipackets": [7], "q_ibytes": [420], "q_errors": [1], "q_opackets": [6], "q_obytes": [360],
        } }] });
        let text = text(&found);
        assert!(text.starts_with(
            "\n  ######################## NIC statistics for port 1  ########################\n"
        ));
        assert!(
            text.contains("  RX-packets: 7           RX-errors:  1           RX-bytes:  420       \n"),
            "{text}"
        );
        assert!(text.contains("  Stats reg  0 TX-packets: 6           TX-bytes: 360       \n"), "{text}");
    }

    #[test]
    fn what_a_program_says_cannot_control_the_terminal() {
        let found =
            json!({ "ports": [{ "port": 0, "info": { "name": "a\u{1b}[2J" }, "xstats": { "b\u{7}": 1 } }] });
        assert!(!text(&found).chars().any(|c| c.is_control() && c != '\n'));
    }
}
