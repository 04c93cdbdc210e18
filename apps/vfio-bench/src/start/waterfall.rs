//! The phases as text: one bar per phase, which starts where the previous one ends.

use std::fmt::Write as _;

use super::phases::{Recording, Row, TOTAL};
use crate::record::Environment;
use crate::table;
use crate::words::three;

/// Width in columns of the longest start.
const BAR: usize = 30;

/// Formats all recordings.
pub(super) fn text(recordings: &[Recording]) -> String {
    let of_devices = recordings.iter().filter(|recording| recording.rows.iter().any(|row| row.nic.is_some()));
    let boots: Vec<_> = of_devices.map(|recording| without_command(&recording.environment)).collect();
    let rows: Vec<&Row> = recordings.iter().flat_map(|recording| &recording.rows).collect();
    let (of_devices, of_eal): (Vec<&Row>, Vec<&Row>) = rows.into_iter().partition(|row| row.nic.is_some());
    let mut text = String::new();
    if !of_devices.is_empty() {
        let _ = writeln!(text, "Environment\n{}", table::environment(&boots));
    }
    let (counted, timed): (Vec<&Row>, Vec<&Row>) = of_devices.into_iter().partition(|row| row.counted);
    text += &waterfalls(
        "on a clock that counts instructions\n(median over rounds; 1 ms: a million instructions, or a wait)",
        &counted,
    );
    text += &waterfalls("(median over rounds, in ms)", &timed);
    if !of_eal.is_empty() {
        text += &eal(&of_eal);
    }
    let mut failures = recordings.iter().flat_map(|recording| &recording.failures).peekable();
    if failures.peek().is_some() {
        text += "\nStarts that failed\n";
        failures.for_each(|failure| text += &format!("  {failure}\n"));
    }
    text
}

/// Formats all starts of one kind.
fn waterfalls(how: &str, rows: &[&Row]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut text = format!("From the start of the process to the first forwarded packet {how}\n");
    let mut blocks: Vec<&[&Row]> = rows.chunk_by(|a, b| (&a.nic, &a.mode) == (&b.nic, &b.mode)).collect();
    // Keep the modes of one NIC together, whichever boot they are from.
    blocks.sort_by(|a, b| b[0].nic.cmp(&a[0].nic));
    for block in &blocks {
        let same_nic = rows.iter().filter(|row| row.nic == block[0].nic && row.phase == TOTAL);
        let longest = same_nic.flat_map(|row| [row.ms, row.dpdk_ms.unwrap_or(0.0)]).fold(0.0, f64::max);
        text += &waterfall(block, longest);
    }
    text + "\n"
}

/// Removes the command, which is long. Readers who need it find it in the JSON output.
fn without_command(environment: &Environment) -> Environment {
    Environment(environment.0.iter().filter(|(key, _)| key != "command").cloned().collect())
}

/// Formats one NIC in one mode. A bar of `longest` milliseconds has the full width.
fn waterfall(rows: &[&Row], longest: f64) -> String {
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    let dpdk = rows.iter().any(|row| row.dpdk_ms.is_some());
    let heading = format!("{}, {}", name(&rows[0].nic), name(&rows[0].mode));
    let mut text = format!("\n{heading:<23} {:<BAR$}{}", "Vireo", if dpdk { "            DPDK" } else { "" });
    text = text.trim_end().to_owned() + "\n";
    let (mut begin, mut dpdk_begin) = (0.0, 0.0);
    for row in rows {
        if row.phase == TOTAL {
            (begin, dpdk_begin) = (0.0, 0.0);
        }
        let ours = bar(begin, row.ms, longest);
        let theirs = row.dpdk_ms.map(|ms| format!("{:>9}   {}", three(ms), bar(dpdk_begin, ms, longest)));
        let line =
            format!("  {:<12}{:>7}   {ours:<BAR$}{}", row.phase, three(row.ms), theirs.unwrap_or_default());
        let _ = writeln!(text, "{}", line.trim_end());
        begin += row.ms;
        dpdk_begin += row.dpdk_ms.unwrap_or(0.0);
    }
    let total = rows.iter().find(|row| row.phase == TOTAL);
    if let Some(ratio) = total.and_then(|row| Some(row.ms / row.dpdk_ms?)) {
        let _ = writeln!(text, "  {:<12}{ratio:>7.2}", "× DPDK");
    }
    text
}

/// Returns a bar of `ms` that starts at `begin`. A bar shorter than a column is a thin line.
fn bar(begin: f64, ms: f64, longest: f64) -> String {
    let column = |ms: f64| ((ms / longest.max(f64::MIN_POSITIVE) * BAR as f64).round() as usize).min(BAR);
    let (from, to) = (column(begin), column(begin + ms));
    if from == to {
        return " ".repeat(from.min(BAR - 1)) + "▏";
    }
    " ".repeat(from) + &"█".repeat(to - from)
}

fn eal(rows: &[&Row]) -> String {
    let mut text = format!(
        "The EAL's start without devices, on the host (median, in ms)\n  {:<34}{:>9}{:>9}{:>16}\n",
        "", "Vireo", "DPDK", "Vireo / DPDK"
    );
    for row in rows {
        let ratio = row.dpdk_ms.map(|dpdk| format!("{:.4}", row.ms / dpdk));
        let dpdk = row.dpdk_ms.map(three);
        let _ = writeln!(
            text,
            "  {:<34}{:>9}{:>9}{:>16}",
            row.phase,
            three(row.ms),
            dpdk.unwrap_or_default(),
            ratio.unwrap_or_default()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(nic: Option<&str>, mode: &str, phase: &str, ms: f64, dpdk_ms: Option<f64>) -> Row {
        let (nic, mode) = (nic.map(str::to_owned), Some(mode.to_owned()));
        Row { nic, mode, phase: phase.into(), ms, dpdk_ms, counted: false }
    }

    #[test]
    fn each_bar_starts_where_the_one_before_ends() {
        let nic = Some("e1000e");
        let rows = vec![
            row(nic, "container", "eal", 0.1, Some(15.0)),
            row(nic, "container", "devices", 10.0, Some(15.0)),
            row(nic, "container", TOTAL, 10.1, Some(30.0)),
            row(nic, "cdev", "eal", 3.0, None),
            Row { counted: true, ..row(nic, "container", TOTAL, 1.0, Some(10.0)) },
            row(None, "none", "eal init, shared", 0.1, Some(20.0)),
        ];
        let environment =
            Environment(vec![("cpu".into(), "fast".into()), ("command".into(), "start run".into())]);
        let text = text(&[Recording {
            environment,
            rows,
            failures: vec!["round 2: e1000e cdev Vireo: no frame".into()],
        }]);
        let (counted, table) = text.split_once("in ms)\n").unwrap();
        assert!(
            counted.contains("or a wait)\n\ne1000e, container ") && counted.contains("× DPDK         0.10\n"),
            "{text}"
        );
        let expected = "
e1000e, container       Vireo                                     DPDK
  eal            0.10   ▏                                  15.0   ███████████████
  devices        10.0   ██████████                         15.0                  ███████████████
  total          10.1   ██████████                         30.0   ██████████████████████████████
  × DPDK         0.34

e1000e, cdev            Vireo
  eal            3.00   ███

The EAL's start without devices, on the host (median, in ms)
                                        Vireo     DPDK    Vireo / DPDK
  eal init, shared                       0.10     20.0          0.0050

Starts that failed
  round 2: e1000e cdev Vireo: no frame
";
        assert_eq!(table, expected, "{table}");
        assert!(text.starts_with("Environment\n  cpu  fast\n\n"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100 && line.trim_end() == line), "{text}");
    }
}
