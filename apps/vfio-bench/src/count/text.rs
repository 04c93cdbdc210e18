//! The counts as text: a table for each NIC, a column for each mode.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::Row;
use crate::table::wrap;
use crate::words::{distinct, thousands, three};

/// What the cells mean.
pub(crate) const LEGEND: &str = "Thousands of instructions of the thread, ours and the kernel's; map and unmap per GiB; \
    start and forward are of a forwarder between two NICs, forward in single instructions per packet. In brackets: the ratio \
    to the first mode. ~ the quartiles of the rounds differ by more than 0.1 %. + instructions that would have fitted into \
    the time in which the thread waited.";

/// A table for each NIC.
pub(crate) fn text(rows: &[Row]) -> String {
    let mut text = wrap("", LEGEND);
    for nic in distinct(rows.iter().map(|row| &row.nic)) {
        let of_nic: Vec<&Row> = rows.iter().filter(|row| row.nic == *nic).collect();
        let _ = write!(text, "\n{nic}\n{}", table(&of_nic));
    }
    text
}

fn table(rows: &[&Row]) -> String {
    let modes = distinct(rows.iter().map(|row| &row.mode));
    let mut table = Table::new();
    let heads = ["step", "memory"].into_iter().chain(modes.iter().map(|mode| mode.as_str()));
    table.load_style(presets::NOTHING).set_header(heads);
    for (step, memory, cells) in cells(rows, &modes) {
        table.add_row([step.to_owned(), memory.to_owned()].into_iter().chain(cells));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Each step of the rows of one NIC, its memory, and a cell for each of `modes`.
pub(crate) fn cells<'a>(rows: &[&'a Row], modes: &[&String]) -> Vec<(&'a str, &'a str, Vec<String>)> {
    let steps =
        distinct(rows.iter().map(|row| (row.step.as_str(), row.memory.as_deref().unwrap_or_default())));
    let of_step = |(step, memory): (&'a str, &'a str)| {
        let of_mode = |mode: &&String| {
            let fits = |row: &&&Row| {
                row.mode == **mode && row.step == step && row.memory.as_deref().unwrap_or_default() == memory
            };
            rows.iter().copied().find(|row| fits(&row))
        };
        let first = modes.first().and_then(of_mode);
        let cells = modes.iter().map(|mode| of_mode(mode).map_or_else(String::new, |row| cell(row, first)));
        (step, memory, cells.collect())
    };
    steps.into_iter().map(of_step).collect()
}

/// What a GiB takes, or a packet, or the step.
pub(crate) fn cost(row: &Row) -> f64 {
    let parts = row.packets.unwrap_or(1) as f64;
    row.bytes.map_or(1.0, |bytes| (1_u64 << 30) as f64 / bytes as f64) * row.instructions as f64 / parts
}

fn cell(row: &Row, first: Option<&Row>) -> String {
    let kilo = |count: f64| {
        let count = count / 1e3;
        if count < 99.95 { format!("{count:.1}") } else { thousands(count.round() as u64) }
    };
    if row.packets.is_some() {
        return format!("{:.1} each", cost(row));
    }
    let unsure = if row.spread * 1000 > row.instructions { "~" } else { "" };
    let waiting = if row.waiting * 1000 > row.instructions {
        format!(" +{}", kilo(row.waiting as f64))
    } else {
        String::new()
    };
    let ratio = match first {
        Some(first) if first.mode != row.mode && first.instructions > 0 => {
            format!(" ({})", three(cost(row) / cost(first)))
        }
        _ => String::new(),
    };
    format!("{unsure}{}{waiting}{ratio}", kilo(cost(row)))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            in_ioctls: None,
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
                "step memory container cdev",
                "open 80.0 ~199 +49,000 (2.49)",
                "map 2 MiB, map 56,720 29,832 (0.53)",
                "map 2 MiB, map-file 29,600",
                "forward 62.8 each",
            ]
        );
    }
}
