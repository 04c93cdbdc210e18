//! The comparison for a terminal or a pipe: at most 100 columns, no colors, no cursor movement.

use std::fmt::Write;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::compare::{Comparison, Row};
use crate::count;
use crate::findings::headlines;
use crate::record::Environment;
use crate::report::Report;
use crate::stats::Interval;
use crate::words::{self, changes, rate_unit, round, shared_facts, size, thousands, three};

/// Width of text and tables, in columns.
pub(crate) const WIDTH: usize = 100;

/// Formats the whole report as text. `lines` draws rules around the tables, which only a terminal wants.
pub(crate) fn text(report: &Report, lines: bool) -> String {
    let comparison = &report.timed;
    let mut out = String::new();
    let mut section = |title: &str, body: String| {
        if !body.trim().is_empty() {
            let _ = write!(out, "{}{title}\n{body}", if out.is_empty() { "" } else { "\n" });
        }
    };
    section("Environment", environment(&comparison.environment));
    if !report.counted.is_empty() {
        section("Counted", count::text(&report.counted));
    }
    section("THE MACHINE WAS DISTURBED", bullets("  ! ", &comparison.disturbances));
    section("THE GENERATOR MAY BE THE LIMIT", bullets("  ! ", &comparison.generator_limits));
    for (title, sentences) in headlines(comparison) {
        section(title, bullets("  ", &sentences));
    }
    section("What these claims rest on", basis(comparison));
    section(
        "Forwarding and latency (medians of rounds; latency and packets of all rounds; doorbells per packet)",
        forwarding(comparison, lines),
    );
    section(
        "References (not compared; * counts its losses incorrectly)",
        bullets("  ", &comparison.describe_references()),
    );
    section("Throughput (highest load at the stated loss; medians of rounds)", throughput(comparison, lines));
    section(
        "Counters per packet of CPU and IOMMU (at the forwarding rate, with idle polls; medians of rounds)",
        counters(comparison, lines),
    );
    section(
        "Null forwarder (sender directly to the NIC at the end of its wire: the devices' own ceiling)",
        ceilings(comparison, lines),
    );
    section("Start-up (medians of rounds)", start(comparison, lines));
    section("DMA map and unmap (medians of rounds)", maps(comparison, lines));
    section("Each mode against itself (intervals that should all contain 0)", self_checks(comparison, lines));
    section("Lost packets by counter", drops(comparison));
    section("PACKET COUNTS DO NOT ADD UP", bullets("  ! ", &comparison.problems));
    out
}

fn bullets(head: &str, sentences: &[String]) -> String {
    sentences.iter().map(|sentence| wrap(head, sentence)).collect()
}

fn basis(comparison: &Comparison) -> String {
    let family = &comparison.family;
    if family.comparisons == 0 {
        return String::new();
    }
    let mut said = wrap(
        "  ",
        &format!(
            "All {} intervals hold together with {} % confidence. Modes are called the same if their interval is within \
             ±{} %.",
            family.comparisons,
            round(family.confidence),
            round(family.margin)
        ),
    );
    for (boot, end) in (1..).zip(&comparison.ends) {
        said += &wrap("  ", &format!("Recording of boot {boot} ended: {end}."));
    }
    said
}

/// Aligns the first `names` columns left, and the numbers in the others right.
pub(crate) fn table<const N: usize>(
    heads: [&str; N],
    names: usize,
    rows: Vec<[String; N]>,
    lines: bool,
) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(WIDTH as u16).set_header(heads).add_rows(rows);
    for column in table.column_iter_mut().skip(names) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    if lines {
        let rule = "─".repeat(text.iter().map(|line| line.chars().count()).max().unwrap_or(0));
        text.insert(heads.iter().map(|head| head.lines().count()).max().unwrap_or(1), rule.clone());
        text.insert(0, rule.clone());
        text.push(rule);
    }
    text.join("\n") + "\n"
}

/// Returns the name only where it changes, so that groups are easy to see.
fn once(name: &str, last: &mut String) -> String {
    if name == last {
        return String::new();
    }
    name.clone_into(last);
    last.clone()
}

fn mark(row: &Row) -> String {
    let sign = match (row.balanced, row.reference) {
        (true, _) => "",
        (false, true) => " *",
        (false, false) => " !",
    };
    format!("{}{sign}", row.label)
}

fn forwarding(comparison: &Comparison, lines: bool) -> String {
    let rows = comparison.forwarders();
    let (scale, unit) = rate_unit(rows.iter().map(|r| r.forward_pps).fold(0.0, f64::max));
    let us = |ns: u64| three(ns as f64 / 1e3);
    let mut last = String::new();
    let rows = rows.into_iter().map(|row| {
        let l = row.latency_ns;
        [
            once(&row.nic, &mut last),
            mark(row),
            three(row.forward_pps / scale),
            us(l.p50),
            us(l.p99),
            us(l.p999),
            us(l.max),
            words::doorbells(row),
            thousands(row.sent),
            thousands(row.received),
            thousands(row.dropped),
        ]
    });
    let heads = [
        "NIC",
        "mode",
        unit,
        "p50\nµs",
        "p99\nµs",
        "p99.9\nµs",
        "max\nµs",
        "door-\nbells",
        "sent",
        "received",
        "dropped",
    ];
    table(heads, 2, rows.collect(), lines)
}

fn throughput(comparison: &Comparison, lines: bool) -> String {
    let frames = comparison.frames();
    let forwarders = comparison.forwarders();
    let all = forwarders.iter().flat_map(|row| &row.throughput);
    let (scale, unit) = rate_unit(all.map(|found| found.pps).fold(0.0, f64::max));
    let (mut last, mut rows) = (String::new(), Vec::new());
    for row in forwarders {
        for (frame, loss) in &frames {
            let found = row.throughput.iter().find(|found| (found.frame, found.loss) == (*frame, *loss));
            if let Some(found) = found {
                rows.push([
                    once(&row.nic, &mut last),
                    row.label.clone(),
                    format!("{frame} B"),
                    words::throughput(found, scale),
                    format!("{} %", round(*loss)),
                ]);
            }
        }
    }
    table(["NIC", "mode", "frame", unit, "loss up to"], 2, rows, lines)
}

fn counters(comparison: &Comparison, lines: bool) -> String {
    let (mut nic, mut mode) = (String::new(), String::new());
    let mut rows = Vec::new();
    for row in &comparison.rows {
        for (event, count) in &row.counters_per_packet {
            let name = once(&row.nic, &mut nic);
            if !name.is_empty() {
                mode.clear();
            }
            rows.push([name, once(&row.label, &mut mode), event.clone(), three(*count)]);
        }
    }
    table(["NIC", "mode", "event", "per packet"], 3, rows, lines)
}

fn ceilings(comparison: &Comparison, lines: bool) -> String {
    let (scale, unit) = rate_unit(comparison.null_forwarder.iter().map(|c| c.pps).fold(0.0, f64::max));
    let mut last = String::new();
    let rows = comparison.null_forwarder.iter().map(|ceiling| {
        let ends = |ends: Interval| format!("{} to {}", three(ends.low / scale), three(ends.high / scale));
        [
            once(&ceiling.nic, &mut last),
            ceiling.boot.to_string(),
            three(ceiling.pps / scale),
            ceiling.pps_interval.map_or("–".to_owned(), ends),
        ]
    });
    table(["NIC", "boot", unit, "95 % interval"], 1, rows.collect(), lines)
}

fn start(comparison: &Comparison, lines: bool) -> String {
    let mut last = String::new();
    let rows = comparison.rows.iter().map(|row| {
        let step = |ms: f64| if ms == 0.0 { "–".to_owned() } else { three(ms) };
        [
            once(&row.nic, &mut last),
            row.label.clone(),
            step(row.open_ms),
            step(row.bind_ms),
            step(row.attach_step_ms),
            step(row.start_map_ms),
            three(row.first_packet_ms),
        ]
    });
    let heads = ["NIC", "mode", "open ms", "bind ms", "attach ms", "map ms", "first packet ms"];
    table(heads, 2, rows.collect(), lines)
}

fn maps(comparison: &Comparison, lines: bool) -> String {
    let (mut memory, mut call) = (String::new(), String::new());
    let rows = comparison.maps.iter().map(|row| {
        let page = once(&row.memory, &mut memory);
        if !page.is_empty() {
            call.clear();
        }
        [
            page,
            once(&row.call, &mut call),
            row.label.clone(),
            three(row.map_ms_per_gib),
            thousands(row.map_ioctls),
            row.map_over_ioctl.map_or("–".to_owned(), |ratio| format!("{ratio:.4}")),
            three(row.unmap_ms_per_gib),
            thousands(row.unmap_ioctls),
            size(row.bytes),
            row.rounds.to_string(),
        ]
    });
    let heads = [
        "pages",
        "call",
        "mode",
        "map ms\nper GiB",
        "map\nioctls",
        "map ÷\nioctl",
        "unmap ms\nper GiB",
        "unmap\nioctls",
        "region",
        "rounds",
    ];
    table(heads, 3, rows.collect(), lines)
}

fn drops(comparison: &Comparison) -> String {
    let lost = comparison.forwarders().into_iter().map(|row| (row, words::lost(row)));
    lost.filter(|(_, lost)| !lost.is_empty())
        .map(|(row, lost)| wrap("  ", &format!("{}, {}: {lost}", row.nic, row.label)))
        .collect()
}

fn self_checks(comparison: &Comparison, lines: bool) -> String {
    let mut last = String::new();
    let rows = comparison.self_checks.iter().map(|check| {
        [
            once(check.metric.title(), &mut last),
            check.subject.clone(),
            check.boot.to_string(),
            check.interval.map_or("–".to_owned(), changes),
            check.rounds.to_string(),
        ]
    });
    table(["metric", "NIC", "boot", "interval", "rounds"], 2, rows.collect(), lines)
}

/// Formats the facts of all boots, one line per value.
pub(crate) fn environment(boots: &[Environment]) -> String {
    let facts = shared_facts(boots);
    let width = facts.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
    let lines = facts.into_iter().flat_map(|(key, values)| {
        let several = values.len() > 1;
        (1..).zip(values).map(move |(boot, value)| {
            let (key, boot) = (
                if boot == 1 { key } else { "" },
                if several { format!("boot {boot}: ") } else { String::new() },
            );
            wrap(&format!("  {key:width$}  "), &format!("{boot}{value}"))
        })
    });
    lines.collect()
}

/// Wraps `text` into lines of at most [`WIDTH`] columns. The first line begins with `head`, and the others
/// are indented to match.
pub(crate) fn wrap(head: &str, text: &str) -> String {
    let indent = head.chars().count();
    let (mut out, mut column) = (head.to_owned(), indent);
    // Keep a number and its percent sign on one line.
    let text = text.replace(" %", "\u{a0}%");
    for (i, word) in text.split(' ').enumerate() {
        let length = word.chars().count();
        if i > 0 && column + 1 + length > WIDTH {
            out += &format!("\n{:indent$}", "");
            column = indent;
        } else if i > 0 {
            out.push(' ');
            column += 1;
        }
        out += &word.replace('\u{a0}', " ");
        column += length;
    }
    out.push('\n');
    out
}
