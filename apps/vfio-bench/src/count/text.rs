//! Formats counts as text: one table per NIC, one column per mode.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::{Call, Row};
use crate::table::wrap;
use crate::words::{distinct, thousands, three};

/// Legend of the cells.
pub(crate) const LEGEND: &str = "Thousands of instructions of the thread, in user space and in the kernel; map and unmap per \
    GiB; start, first packet (start included) and forward are of a forwarder between two NICs, forward in single \
    instructions per packet. Medians of rounds. In parentheses: the ratio to the first mode. ~ the quartiles of the rounds \
    differ by more than 0.1 %. + M: millions of instructions that would have fit into the time that the thread waited.";

/// Legend of the cells of [`parts`].
pub(crate) const PARTS_LEGEND: &str = "Calls to VFIO and iommufd in these steps, in the same units: ioctls by name, open of a \
    device node, close of a device; N× if a step makes N of them. Calls below 1 % of the step in every mode are summed. \
    Outside: Vireo's own code, other system calls (sysfs, config space, memory), page faults and interrupts.";

/// Fraction of a step below which a call has no line of its own.
const SMALL: f64 = 0.01;

/// Formats one table per NIC.
pub(crate) fn text(rows: &[Row]) -> String {
    let mut text = wrap("", LEGEND);
    for nic in distinct(rows.iter().map(|row| &row.nic)) {
        let of_nic: Vec<&Row> = rows.iter().filter(|row| row.nic == *nic).collect();
        let modes = distinct(of_nic.iter().map(|row| &row.mode));
        let _ = write!(text, "\n{nic}\n{}", table(&modes, &compared(&of_nic, &modes)));
    }
    text
}

/// Formats one table of calls per NIC, for the NICs whose calls were counted.
pub(crate) fn parts_text(rows: &[Row]) -> String {
    let rows: Vec<&Row> = rows.iter().filter(|row| !row.calls.is_empty()).collect();
    let mut text = String::new();
    for nic in distinct(rows.iter().map(|row| &row.nic)) {
        let of_nic: Vec<&Row> = rows.iter().copied().filter(|row| row.nic == *nic).collect();
        let modes = distinct(of_nic.iter().map(|row| &row.mode));
        let _ = write!(text, "\n{nic}, calls\n{}", table(&modes, &parts(&of_nic, &modes)));
    }
    if text.is_empty() { text } else { format!("\n{}{text}", wrap("", PARTS_LEGEND)) }
}

fn table(modes: &[&String], lines: &[Part]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["step"].into_iter().chain(modes.iter().map(|mode| mode.as_str())));
    for Part { name, is_step, cells } in lines {
        let indent = if *is_step { "" } else { "  " };
        table.add_row([format!("{indent}{name}")].iter().chain(cells));
    }
    for (number, column) in table.column_iter_mut().enumerate() {
        if number == 0 {
            column.set_padding((0, 1));
        } else {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Returns the lines of each step of one NIC: the counts with their ratios to the first mode and, below them,
/// the waiting if there was any.
pub(crate) fn compared(rows: &[&Row], modes: &[&String]) -> Vec<Part> {
    let of_step = |(step, memory, rows): (&str, &str, Vec<Option<&Row>>)| {
        let first = rows.first().copied().flatten();
        let line = |name: &str, is_step, of_row: &dyn Fn(&Row) -> String| line(name, is_step, &rows, of_row);
        let counts = line(format!("{step} {memory}").trim_end(), true, &|row| cell(row, first));
        let waiting = line("waiting", false, &|row| waited(row, row.waiting));
        let has_waited = waiting.cells.iter().any(|cell| !cell.is_empty());
        [counts].into_iter().chain(has_waited.then_some(waiting))
    };
    steps(rows, modes).into_iter().flat_map(of_step).collect()
}

/// Each step of `rows`: its name, its memory, and its row in each of `modes`.
fn steps<'a>(rows: &[&'a Row], modes: &[&String]) -> Vec<(&'a str, &'a str, Vec<Option<&'a Row>>)> {
    let named = |row: &'a Row| (row.step.as_str(), row.memory.as_deref().unwrap_or_default());
    let of_step = |step: (&'a str, &'a str)| {
        let of_mode =
            |mode: &&String| rows.iter().copied().find(|row| row.mode == **mode && named(row) == step);
        (step.0, step.1, modes.iter().map(of_mode).collect())
    };
    distinct(rows.iter().map(|row| named(row))).into_iter().map(of_step).collect()
}

/// Line of a table.
pub(crate) struct Part {
    /// The step with its memory, or the part of the step that the line describes.
    pub(crate) name: String,
    pub(crate) is_step: bool,
    /// One cell per mode.
    pub(crate) cells: Vec<String>,
}

fn line(name: &str, is_step: bool, rows: &[Option<&Row>], of_row: &dyn Fn(&Row) -> String) -> Part {
    let cells = rows.iter().map(|row| row.map_or_else(String::new, of_row)).collect();
    Part { name: name.to_owned(), is_step, cells }
}

/// Returns a line for each step of one NIC, followed by lines for its calls.
pub(crate) fn parts(rows: &[&Row], modes: &[&String]) -> Vec<Part> {
    let with_calls: Vec<&Row> = rows.iter().copied().filter(|row| !row.calls.is_empty()).collect();
    let of_step = |(step, memory, rows): (&str, &str, Vec<Option<&Row>>)| {
        let line = |name: &str, is_step, of_row: &dyn Fn(&Row) -> String| line(name, is_step, &rows, of_row);
        let is_small = |row: &Row, call: &Call| {
            ((call.instructions + call.waiting) as f64) < SMALL * (row.instructions + row.waiting) as f64
        };
        let all = || rows.iter().flatten().flat_map(|row| row.calls.iter().map(move |call| (*row, call)));
        let large = distinct(all().filter(|(row, call)| !is_small(row, call)).map(|(_, call)| &call.name));
        let mut lines = vec![line(format!("{step} {memory}").trim_end(), true, &|row| {
            cell(row, None) + &and_waited(row, row.waiting)
        })];
        for name in &large {
            lines.push(line(name, false, &|row| {
                sum(row, row.calls.iter().filter(|call| call.name == **name))
            }));
        }
        if all().any(|(_, call)| !large.contains(&&call.name)) {
            lines.push(line("other calls", false, &|row| {
                sum(row, row.calls.iter().filter(|call| !large.contains(&&call.name)))
            }));
        }
        lines.push(line("outside", false, &outside));
        lines
    };
    steps(&with_calls, modes).into_iter().flat_map(of_step).collect()
}

/// Formats the sum of `calls` of `row` as one cell.
fn sum<'a>(row: &Row, calls: impl Iterator<Item = &'a Call> + Clone) -> String {
    let of = |value: fn(&Call) -> u64| calls.clone().map(value).sum::<u64>();
    match of(|call| call.calls) {
        0 => String::new(),
        count => {
            let count = if count > 1 { format!("{count}× ") } else { String::new() };
            format!("{count}{}", amount(row, of(|call| call.instructions), of(|call| call.waiting)))
        }
    }
}

/// Formats what `row` spends outside of calls. Rounds that count calls wait slightly longer or shorter than
/// the other rounds, so the subtraction saturates.
fn outside(row: &Row) -> String {
    let in_calls = |value: fn(&Call) -> u64| row.calls.iter().map(value).sum::<u64>();
    let instructions = row.instructions.saturating_sub(in_calls(|call| call.instructions));
    amount(row, instructions, row.waiting.saturating_sub(in_calls(|call| call.waiting)))
}

/// Instructions per GiB, per packet, or per step.
pub(crate) fn cost(row: &Row) -> f64 {
    row.instructions as f64 * scale(row)
}

fn scale(row: &Row) -> f64 {
    let parts = row.packets.unwrap_or(1) as f64;
    row.bytes.map_or(1.0, |bytes| (1_u64 << 30) as f64 / bytes as f64) / parts
}

fn kilo(count: f64) -> String {
    let count = count / 1e3;
    if count < 99.95 { format!("{count:.1}") } else { thousands(count.round() as u64) }
}

/// Formats `instructions` of `row`, and `waiting`, the instructions that would have fit into the waiting.
fn amount(row: &Row, instructions: u64, waiting: u64) -> String {
    kilo(instructions as f64 * scale(row)) + &and_waited(row, waiting)
}

/// Formats, in millions, the instructions that would have fit into the waiting of `row`; empty if they are
/// negligible.
fn waited(row: &Row, waiting: u64) -> String {
    if row.packets.is_none() && waiting * 1000 > row.instructions {
        format!("+{}M", kilo(waiting as f64 / 1e3))
    } else {
        String::new()
    }
}

fn and_waited(row: &Row, waiting: u64) -> String {
    match waited(row, waiting) {
        text if text.is_empty() => text,
        text => format!(" {text}"),
    }
}

fn cell(row: &Row, first: Option<&Row>) -> String {
    if row.packets.is_some() {
        return format!("{:.1} each", cost(row));
    }
    let unsure = if row.spread * 1000 > row.instructions { "~" } else { "" };
    let ratio = match first {
        Some(first) if first.mode != row.mode && first.instructions > 0 => {
            format!(" ({})", three(cost(row) / cost(first)))
        }
        _ => String::new(),
    };
    format!("{unsure}{}{ratio}", kilo(cost(row)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::WIDTH;

    #[test]
    fn a_column_for_each_mode_and_ratios_to_the_first() {
        let row = |mode: &str, step: &str, memory: Option<&str>, (instructions, spread, waiting)| Row {
            nic: "e1000e".into(),
            mode: mode.into(),
            step: step.into(),
            memory: memory.map(str::to_owned),
            bytes: memory.map(|_| 128 << 20),
            packets: (step == "forward").then_some(32),
            instructions,
            spread,
            waiting,
            rounds: Vec::new(),
            calls: Vec::new(),
        };
        let memory = Some("2 MiB, map");
        let rows = [
            row("container", "open", None, (80_000, 79, 0)),
            row("container", "map", memory, (7_090_000, 0, 0)),
            row("cdev", "open", None, (199_000, 5000, 49_000_000)),
            row("cdev", "map", memory, (3_729_000, 0, 0)),
            row("cdev", "map", Some("2 MiB, map-file"), (3_700_000, 0, 0)),
            row("cdev", "forward", None, (2010, 0, 0)),
        ];
        let text = text(&rows);
        let lines: Vec<&str> =
            text.lines().skip_while(|line| !line.is_empty()).skip(1).map(str::trim).collect();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(
            lines.into_iter().map(words).collect::<Vec<_>>(),
            [
                "e1000e",
                "step container cdev",
                "open 80.0 ~199 (2.49)",
                "waiting +49.0M",
                "map 2 MiB, map 56,720 29,832 (0.53)",
                "map 2 MiB, map-file 29,600",
                "forward 62.8 each",
            ]
        );
    }

    #[test]
    fn calls_stand_below_their_step_and_add_up_to_it() {
        let call = |name: &str, calls, instructions, waiting| Call {
            name: name.into(),
            calls,
            instructions,
            waiting,
        };
        let row = |mode: &str, step: &str, (instructions, waiting), calls| Row {
            nic: "e1000e".into(),
            mode: mode.into(),
            step: step.into(),
            memory: None,
            bytes: None,
            packets: None,
            instructions,
            spread: 0,
            waiting,
            rounds: Vec::new(),
            calls,
        };
        let rows = [
            row(
                "container",
                "bind",
                (70_000, 0),
                vec![
                    call("VFIO_GROUP_GET_STATUS", 2, 500, 0),
                    call("VFIO_GET_API_VERSION", 1, 100, 0),
                    call("VFIO_SET_IOMMU", 1, 60_000, 0),
                ],
            ),
            row(
                "cdev",
                "bind",
                (1_000_000, 24_000_000),
                vec![call("VFIO_DEVICE_BIND_IOMMUFD", 2, 990_000, 23_999_000)],
            ),
            row("cdev", "forward", (1, 0), Vec::new()),
        ];
        let text = parts_text(&rows);
        let lines: Vec<String> = text
            .lines()
            .skip_while(|line| !line.ends_with(", calls"))
            .skip(1)
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            lines,
            [
                "step container cdev",
                "bind 70.0 1,000 +24.0M",
                "VFIO_SET_IOMMU 60.0",
                "VFIO_DEVICE_BIND_IOMMUFD 2× 990 +24.0M",
                "other calls 3× 0.6",
                "outside 9.4 10.0",
            ]
        );
        assert_eq!(parts_text(&rows[2..]), "");
    }

    #[derive(serde::Deserialize)]
    struct Counted {
        counted: Vec<Row>,
    }

    /// Uses the committed counts, which have every step, mode and page size.
    #[test]
    fn no_table_is_wider_than_the_text_around_it() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/counted-6.12.json");
        let Counted { counted } = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let text = text(&counted) + &parts_text(&counted);
        assert!(text.lines().count() > 100);
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{} columns: {line}", line.chars().count());
        }
    }
}
