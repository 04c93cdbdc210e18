//! The first screen: what differs, by how much, and what it costs in instructions.

use maud::{Markup, html};

use super::unbroken;
use crate::compare::{Comparison, Pair, Verdict};
use crate::count;
use crate::findings::headlines;
use crate::report::Report;
use crate::words::{changes, distinct, list, shared_facts, three};

pub(super) fn screen(report: &Report) -> Markup {
    let comparison = &report.timed;
    html! {
        (title(report))
        @if !comparison.problems.is_empty() {
            section.warn {
                strong { "Packet counts do not add up. The rows in this color prove nothing." }
                @for problem in &comparison.problems { p { (problem) } }
            }
        }
        @if !comparison.disturbances.is_empty() {
            section.warn {
                strong { "The machine was disturbed during the measurement. Intervals account for that; medians do not." }
                @for disturbance in &comparison.disturbances { p { (unbroken(disturbance)) } }
            }
        }
        @if !comparison.generator_limits.is_empty() {
            section.warn {
                strong { "The generator, not the forwarder, may be the limit." }
                @for limit in &comparison.generator_limits { p { (unbroken(limit)) } }
            }
        }
        div.answer {
            @if comparison.pairs.iter().any(|pair| pair.verdict != Verdict::NotInterleaved) {
                section { h2 { "Times, mode against mode" } (matrix(comparison)) }
            }
            @if !report.counted.is_empty() {
                section { h2 { "Instructions" } (counted(&report.counted)) }
            }
        }
        (findings(comparison))
    }
}

fn title(report: &Report) -> Markup {
    let comparison = &report.timed;
    let (ran, mapped) = (comparison.rows.iter().map(|r| &r.mode), comparison.maps.iter().map(|m| &m.mode));
    let modes = distinct(ran.chain(mapped));
    let nics = distinct(comparison.rows.iter().map(|row| row.nic.as_str()));
    let facts = shared_facts(&comparison.environment);
    let fact = |key| facts.iter().find(|(k, _)| *k == key).map(|(_, values)| values.join(" and "));
    let named = |name, key| fact(key).map(|value| format!("{name} {value}"));
    let machine = fact("host cpu").or_else(|| fact("cpu"));
    let place =
        [named("Vireo", "vireo"), named("Linux", "kernel"), fact("accelerator"), machine, fact("date")];
    html! {
        h1 { "VFIO modes compared" }
        p.lead { (list(&modes)) @if !nics.is_empty() { " on " (list(&nics)) } }
        p.note { (place.into_iter().flatten().collect::<Vec<_>>().join(" · ")) }
    }
}

/// Renders a row per metric and subject, and a column per pair of modes.
fn matrix(comparison: &Comparison) -> Markup {
    let judged: Vec<&Pair> =
        comparison.pairs.iter().filter(|pair| pair.verdict != Verdict::NotInterleaved).collect();
    let columns = distinct(judged.iter().map(|pair| (&pair.mode, &pair.baseline)));
    let rows = distinct(judged.iter().map(|pair| (pair.metric, &pair.subject)));
    let mut metric = None;
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(of, subject)| {
            let begins = metric.replace(of) != Some(of);
            let cells = columns.iter().map(|column| {
                judged.iter().find(|pair| {
                    (pair.metric, &pair.subject) == (of, subject) && (&pair.mode, &pair.baseline) == *column
                })
            });
            (begins, of, subject, cells.collect::<Vec<_>>())
        })
        .collect();
    html! {
        div.scroll {
            table.matrix {
                thead {
                    tr {
                        th.name { "ratio" } th.name {}
                        @for (mode, baseline) in &columns { th { (mode) " ÷ " (baseline) } }
                    }
                }
                tbody {
                    @for (begins, metric, subject, cells) in &rows {
                        tr.group[*begins] {
                            td.name { @if *begins { (metric.title()) } }
                            td.name { (subject) }
                            @for cell in cells {
                                @if let Some(pair) = cell { (ratio(pair)) } @else { td {} }
                            }
                        }
                    }
                }
            }
        }
        p.legend {
            span { i.better {} "better" } span { i.worse {} "worse" } span { i.same {} "the same" }
            span { i.undecided {} "undecided" }
        }
    }
}

fn ratio(pair: &Pair) -> Markup {
    let class = match pair.verdict {
        Verdict::Differs if (pair.ratio > 1.0) == pair.metric.is_gain() => "better",
        Verdict::Differs => "worse",
        Verdict::Equivalent => "same",
        _ => "undecided",
    };
    html! {
        td class=(class) title=(unbroken(&pair.sentence)) {
            (three(pair.ratio))
            small { @if let Some(interval) = pair.interval { (unbroken(&changes(interval))) } @else { "–" } }
        }
    }
}

/// Renders the counts of the first NIC and, collapsed, those of the others.
fn counted(rows: &[count::Row]) -> Markup {
    let nics = distinct(rows.iter().map(|row| row.nic.as_str()));
    html! {
        @if let Some((first, others)) = nics.split_first() {
            h3 { (first) }
            (counted_on(rows, first))
            @for nic in others {
                details { summary { (nic) } (counted_on(rows, nic)) }
            }
        }
        p.note { (unbroken(count::LEGEND)) }
    }
}

/// Renders a row per step and a column per mode. The first mode's count is the baseline of the others.
fn counted_on(rows: &[count::Row], nic: &str) -> Markup {
    let of_nic: Vec<&count::Row> = rows.iter().filter(|row| row.nic == nic).collect();
    let modes = distinct(of_nic.iter().map(|row| &row.mode));
    html! {
        (lines(&modes, &count::compared(&of_nic, &modes)))
        (calls_on(&of_nic, &modes))
    }
}

/// Renders the calls of each step, collapsed.
fn calls_on(rows: &[&count::Row], modes: &[&String]) -> Markup {
    let parts = count::parts(rows, modes);
    html! {
        @if !parts.is_empty() {
            details {
                summary { "Calls to the kernel" }
                (lines(modes, &parts))
                p.note { (unbroken(count::PARTS_LEGEND)) }
            }
        }
    }
}

fn lines(modes: &[&String], parts: &[count::Part]) -> Markup {
    html! {
        div.scroll {
            table {
                thead { tr { th.name { "step" } @for mode in modes { th { (mode) } } } }
                tbody {
                    @for part in parts {
                        tr.group[part.is_step] {
                            td.name { @if !part.is_step { "\u{a0}\u{a0}" } (part.name) }
                            @for cell in &part.cells { td { (cell) } }
                        }
                    }
                }
            }
        }
    }
}

fn findings(comparison: &Comparison) -> Markup {
    let findings = headlines(comparison);
    html! {
        @if !findings.is_empty() {
            section.findings {
                h2 { "In words" }
                dl {
                    @for (title, sentences) in &findings {
                        dt { (title) }
                        dd { @for sentence in sentences { p { (unbroken(sentence)) } } }
                    }
                }
            }
        }
    }
}
