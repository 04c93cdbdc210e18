//! Renders the comparison as one self-contained page: style and figures are inside, and nothing is fetched.

mod first;
mod tables;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use plotters::style::RGBColor;
use vireo_eal::Result;

use crate::compare::{Comparison, MapRow, Metric};
use crate::plot;
use crate::report::Report;
use crate::words::{distinct, round, shared_facts};

/// Renders the whole page: the answer, then every sample, then the tables, then the method.
pub(crate) fn page(report: &Report) -> Result<String> {
    let comparison = &report.timed;
    let body = html! {
        (first::screen(report))
        @if !comparison.rows.is_empty() {
            (forwarding(comparison)?)
            (throughput(comparison)?)
            (latency(comparison)?)
            (start(comparison)?)
        }
        @if !comparison.maps.is_empty() { (maps(comparison)?) }
        (method(report))
    };
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "VFIO modes compared" }
                style { (PreEscaped(include_str!("../page.css"))) }
            }
            body { main { (body) } }
        }
    };
    Ok(page.into_string())
}

/// Keeps a number and its percent sign on one line.
fn unbroken(text: &str) -> String {
    text.replace(" %", "\u{a0}%")
}

fn legend<'a>(entries: impl IntoIterator<Item = (&'a str, RGBColor)>) -> Markup {
    html! {
        p.legend {
            @for (name, RGBColor(r, g, b)) in entries {
                span { i style=(format!("background:#{r:02x}{g:02x}{b:02x}")) {} (name) }
            }
        }
    }
}

fn modes_legend<'a>(modes: impl Iterator<Item = &'a str>) -> Markup {
    legend(distinct(modes).into_iter().map(|mode| (mode, plot::color(mode))))
}

fn figure(svg: &str, label: &str, caption: &str) -> Markup {
    // A screen reader reads the label instead of every number in the drawing. The tables have those numbers.
    let opening = html! { svg role="img" aria-label=(label) {} }.into_string();
    let opening = opening.trim_end_matches("></svg>");
    let svg = svg.replacen("<svg ", &format!("{opening} "), 1);
    html! {
        figure {
            (PreEscaped(svg))
            @if !caption.is_empty() { figcaption { (unbroken(caption)) } }
        }
    }
}

fn forwarding(comparison: &Comparison) -> Result<Markup> {
    let rows = &comparison.rows;
    Ok(html! {
        h2 { "Forwarding rate" }
        (modes_legend(rows.iter().map(|row| row.mode.as_str())))
        (figure(
            &plot::forwarding(&comparison.forwarders())?,
            "Forwarding rate by NIC and mode",
            "A point for each round, a bar at their median. Logarithmic scale.",
        ))
        @if comparison.pairs.iter().any(|pair| pair.metric == Metric::ForwardPps) {
            h3 { "Mode against mode" }
            (figure(
                &plot::ratios(comparison, Metric::ForwardPps)?,
                "Ratio of the forwarding rates of every pair of modes",
                &format!(
                    "The ratio's interval, and the margin of ±{} % (shaded). Colored: a difference. Gray: none found. \
                     Hollow: no verdict. Arrow: the interval continues.",
                    round(comparison.family.margin)
                ),
            ))
        }
        (tables::forwarding(comparison))
        (tables::counters(comparison))
    })
}

fn throughput(comparison: &Comparison) -> Result<Markup> {
    Ok(html! {
        @if !comparison.frames().is_empty() {
            h2 { "Throughput" }
            p.note {
                "The highest load of which no more than the stated fraction was lost (RFC 2544), found by trials in each run, to \
                 within 5 %; medians of the rounds. ≥: the generator could not send more in some round, so modes are not \
                 compared."
            }
            @if comparison.pairs.iter().any(|pair| pair.metric == Metric::Throughput) {
                (figure(
                    &plot::ratios(comparison, Metric::Throughput)?,
                    "Ratio of the throughputs of every pair of modes",
                    "",
                ))
            }
            (tables::throughput(comparison))
        }
    })
}

fn latency(comparison: &Comparison) -> Result<Markup> {
    Ok(html! {
        h2 { "Latency" }
        (figure(
            &plot::latency(&comparison.forwarders())?,
            "Latency percentiles by NIC and mode",
            "Over the packets of all rounds, from left to right: median (large), p99, p99.9, and maximum (hollow). \
             Logarithmic scale.",
        ))
        (tables::latency(comparison))
    })
}

fn start(comparison: &Comparison) -> Result<Markup> {
    Ok(html! {
        h2 { "Start-up" }
        (legend(plot::PHASES))
        (figure(
            &plot::start(&comparison.rows)?,
            "Phases of the start by NIC and mode",
            "From opening the device to the first packet forwarded; medians of the rounds. A bar that ends in a gap is cut off.",
        ))
        (tables::start(comparison))
    })
}

fn maps(comparison: &Comparison) -> Result<Markup> {
    let figures = comparison.maps.chunk_by(|a, b| a.memory == b.memory).map(|of_memory| {
        let rows: Vec<&MapRow> = of_memory.iter().collect();
        let title = format!("{} pages", of_memory[0].memory);
        let svg = plot::maps(&rows)?;
        Ok(html! { h3 { (title) } (figure(&svg, &format!("DMA map and unmap time, {title}"), "")) })
    });
    let figures = figures.collect::<Result<Vec<_>>>()?;
    Ok(html! {
        h2 { "DMA map and unmap" }
        p.note {
            "Milliseconds to map one GiB of memory for DMA and to unmap it, without traffic: a point for each round, a bar \
             at their median. Upper row: map. Lower, paler row: unmap. Logarithmic scale."
        }
        (modes_legend(comparison.maps.iter().map(|map| map.mode.as_str())))
        @for figure in figures { (figure) }
        (tables::maps(comparison))
    })
}

fn method(report: &Report) -> Markup {
    let comparison = &report.timed;
    let family = &comparison.family;
    let boots = report.environment.len();
    let commands = distinct(report.environment.iter().filter_map(|boot| boot.get("command")));
    html! {
        h2 { "Method" }
        p {
            "Each round runs every mode once, and one of them twice, in an order drawn at random. A pair of modes is \
             compared within rounds; the estimate of their ratio is the Hodges-Lehmann estimate of its logarithm, and the \
             interval is that of Wilcoxon's signed-rank test. Between modes that do not differ, the random order makes a round \
             favor either with the same probability, whatever the machine does meanwhile. Rounds are added until every interval is narrow enough or the time is up."
        }
        @if family.comparisons > 0 {
            p {
                (unbroken(&format!(
                    "All {} intervals hold together with {} % confidence, so a report on modes that do not differ \
                     claims a difference at most once in {:.0} reports. Modes are called the same if the whole interval is \
                     within ±{} %.",
                    family.comparisons,
                    round(family.confidence),
                    1.0 / (1.0 - family.confidence),
                    round(family.margin)
                )))
            }
        }
        @for (boot, end) in (1..).zip(&comparison.ends) { p { (unbroken(&format!("Boot {boot} ended {end}."))) } }
        p {
            "Modes that need a boot of their own cannot take turns with the others, so their numbers have no verdict. Every \
             packet is accounted for: sent = received + dropped, where dropped is the sum of named counters, never a \
             difference. Only the throughput search loses frames between the NICs, where no NIC counts them: they are listed \
             as not counted, and are never more than its trials lost."
        }
        @if !comparison.self_checks.is_empty() {
            h3 { "Each mode against itself" }
            p.note { "The same intervals for the mode that ran twice in a round: all should contain 0." }
            (tables::self_checks(comparison))
        }
        h2 { "Environment" }
        div.scroll {
            table.facts {
                @if boots > 1 { tr { th {} @for boot in 1..=boots { th.name { "boot " (boot) } } } }
                @for (key, values) in shared_facts(&report.environment) {
                    tr {
                        td { (key) }
                        @for value in &values {
                            @if values.len() < boots { td colspan=(boots) { (value) } } @else { td { (value) } }
                        }
                    }
                }
            }
        }
        @if !commands.is_empty() {
            h2 { "Reproduce" }
            pre { (commands.join("\n")) }
        }
    }
}
