//! Tables of the page.

use maud::{Markup, html};

use super::unbroken;
use crate::compare::{Comparison, Row};
use crate::stats::Interval;
use crate::words::{self, changes, distinct, rate_unit, size, thousands, three};

/// Cells of a table row, whether the row begins a group, and whether it is sound. In `table`, the first
/// `names` cells are text.
struct Line {
    begins: bool,
    sound: bool,
    cells: Vec<String>,
}

fn table(heads: &[&str], names: usize, lines: &[Line]) -> Markup {
    let name = |at: usize| (at < names).then_some("name");
    html! {
        div.scroll {
            table {
                thead { tr { @for (at, head) in heads.iter().enumerate() { th class=[name(at)] { (head) } } } }
                tbody {
                    @for line in lines {
                        tr.group[line.begins].bad[!line.sound] {
                            @for (at, cell) in line.cells.iter().enumerate() {
                                td class=[name(at)] { (unbroken(cell)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Returns a line per row of the comparison: the NIC where it changes, the mode, and `cells`.
fn by_row<'a>(rows: impl IntoIterator<Item = &'a Row>, cells: impl Fn(&Row) -> Vec<String>) -> Vec<Line> {
    let mut nic = "";
    let line = |row: &Row, begins: bool| {
        let mut all = vec![if begins { row.nic.clone() } else { String::new() }, row.label.clone()];
        all.extend(cells(row));
        Line { begins, sound: row.is_sound(), cells: all }
    };
    let mut lines = Vec::new();
    for row in rows {
        lines.push(line(row, nic != row.nic));
        nic = &row.nic;
    }
    lines
}

fn ends(interval: Option<Interval>, unit: f64) -> String {
    interval
        .map_or("–".to_owned(), |ends| format!("{} – {}", three(ends.low / unit), three(ends.high / unit)))
}

pub(super) fn forwarding(comparison: &Comparison) -> Markup {
    let rows = comparison.forwarders();
    let (unit, name) = rate_unit(rows.iter().map(|r| r.forward_pps).fold(0.0, f64::max));
    let lines = by_row(rows, |r| {
        vec![
            three(r.forward_pps / unit),
            ends(r.forward_pps_interval, unit),
            words::doorbells(r),
            thousands(r.sent),
            thousands(r.received),
            thousands(r.dropped),
            words::lost(r),
            r.rounds.to_string(),
        ]
    });
    let heads = [
        "NIC",
        "mode",
        name,
        "95 % interval of the median",
        "doorbells per packet",
        "sent",
        "received",
        "dropped",
        "counted as",
        "rounds",
    ];
    let ceilings: Vec<Line> = (comparison.null_forwarder.iter())
        .map(|ceiling| Line {
            begins: false,
            sound: true,
            cells: vec![
                ceiling.nic.clone(),
                format!("boot {}", ceiling.boot),
                three(ceiling.pps / unit),
                ends(ceiling.pps_interval, unit),
            ],
        })
        .collect();
    html! {
        (table(&heads, 2, &lines))
        @for said in comparison.describe_references() { p.note { (unbroken(&said)) } }
        @if !ceilings.is_empty() {
            h3 { "Null forwarder" }
            p.note {
                "From the sender directly to the NIC at the end of its wire: what the devices themselves can do, with half \
                 of a forwarded packet's hops."
            }
            (table(&["NIC", "boot", name, "95 % interval of the median"], 2, &ceilings))
        }
    }
}

pub(super) fn latency(comparison: &Comparison) -> Markup {
    let lines = by_row(comparison.forwarders(), |row| {
        let l = row.latency_ns;
        let mut cells: Vec<String> = [l.p50, l.p99, l.p999, l.max].map(|ns| three(ns as f64 / 1e3)).into();
        cells.push(thousands(l.count));
        cells
    });
    table(&["NIC", "mode", "p50 µs", "p99 µs", "p99.9 µs", "max µs", "packets"], 2, &lines)
}

pub(super) fn start(comparison: &Comparison) -> Markup {
    let step = |ms: f64| if ms == 0.0 { "–".to_owned() } else { three(ms) };
    let lines = by_row(&comparison.rows, |r| {
        [r.open_ms, r.bind_ms, r.attach_step_ms, r.start_map_ms, r.first_packet_ms].map(step).into()
    });
    table(&["NIC", "mode", "open ms", "bind ms", "attach ms", "map ms", "first packet ms"], 2, &lines)
}

pub(super) fn maps(comparison: &Comparison) -> Markup {
    let mut group = ("", "");
    let mut lines = Vec::new();
    for map in &comparison.maps {
        let begins = group != (map.memory.as_str(), map.call.as_str());
        group = (&map.memory, &map.call);
        let name = |text: &str| if begins { text.to_owned() } else { String::new() };
        let mut cells = vec![name(&map.memory), name(&map.call), map.label.clone()];
        let times = [map.map_ms_per_gib, map.unmap_ms_per_gib];
        for ((time, samples), ioctls) in
            times.iter().zip(&map.samples).zip([map.map_ioctls, map.unmap_ioctls])
        {
            cells.extend([three(*time), ends(Interval::of_median(samples), 1.0), thousands(ioctls)]);
        }
        cells.extend([size(map.bytes), map.rounds.to_string()]);
        lines.push(Line { begins, sound: true, cells });
    }
    let heads = [
        "pages",
        "call",
        "mode",
        "map ms per GiB",
        "95 % interval of the median",
        "ioctls",
        "unmap ms per GiB",
        "95 % interval of the median",
        "ioctls",
        "region",
        "rounds",
    ];
    table(&heads, 3, &lines)
}

pub(super) fn throughput(comparison: &Comparison) -> Markup {
    let frames = comparison.frames();
    let rows = comparison.forwarders();
    let all = rows.iter().flat_map(|row| &row.throughput);
    let (unit, name) = rate_unit(all.map(|found| found.pps).fold(0.0, f64::max));
    let lines = by_row(rows, |row| {
        let cell = |(frame, loss): &(usize, f64)| {
            let found = row.throughput.iter().find(|found| (found.frame, found.loss) == (*frame, *loss));
            found.map_or("–".to_owned(), |found| words::throughput(found, unit))
        };
        frames.iter().map(cell).collect()
    });
    let heads: Vec<String> = ["NIC".to_owned(), "mode".to_owned()]
        .into_iter()
        .chain(frames.iter().map(|(frame, loss)| {
            format!("{name}, {frame}-byte frames, up to {} % lost", words::round(*loss))
        }))
        .collect();
    table(&heads.iter().map(String::as_str).collect::<Vec<_>>(), 2, &lines)
}

/// Renders the counters per packet; empty if no machine has counters.
pub(super) fn counters(comparison: &Comparison) -> Markup {
    let rows = &comparison.rows;
    let events: Vec<&String> = distinct(rows.iter().flat_map(|row| row.counters_per_packet.keys()));
    let lines = by_row(rows, |row| {
        let cell = |event: &&String| {
            row.counters_per_packet.get(*event).map_or("–".to_owned(), |count| three(*count))
        };
        events.iter().map(cell).collect()
    });
    let heads: Vec<&str> =
        ["NIC", "mode"].into_iter().chain(events.iter().map(|event| event.as_str())).collect();
    html! {
        @if !events.is_empty() {
            h3 { "Counters per packet" }
            p.note {
                "Of the forwarder's CPU in user space and of the IOMMU, at the forwarding rate, idle polls included; medians \
                 of the rounds. An IOMMU also counts what other devices do."
            }
            (table(&heads, 2, &lines))
        }
    }
}

pub(super) fn self_checks(comparison: &Comparison) -> Markup {
    let mut metric = None;
    let lines: Vec<Line> = (comparison.self_checks.iter())
        .map(|check| {
            let begins = metric.replace(check.metric) != Some(check.metric);
            let cells = vec![
                if begins { check.metric.title().to_owned() } else { String::new() },
                check.subject.clone(),
                check.boot.to_string(),
                check.interval.map_or("–".to_owned(), changes),
                check.rounds.to_string(),
            ];
            Line { begins, sound: true, cells }
        })
        .collect();
    table(&["metric", "NIC", "boot", "interval", "rounds"], 2, &lines)
}
