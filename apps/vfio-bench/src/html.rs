//! The comparison as one page that needs nothing else: style and figures are inside, nothing is fetched.

use std::fmt::Write;

use plotters::style::RGBColor;
use vireo_eal::Result;

use crate::compare::{Comparison, MapRow, Metric, Pair, Verdict};
use crate::findings::headlines;
use crate::plot;
use crate::stats::FEWEST_PAIRS;
use crate::words::{change, distinct, list, percent, rate_unit, shared_facts, size, thousands, three};

/// The whole page.
pub(crate) fn page(comparison: &Comparison) -> Result<String> {
    let mut body = head(comparison);
    if !comparison.rows.is_empty() {
        body += &forwarding(comparison)?;
        body += &latency(comparison)?;
        body += &start(comparison)?;
    }
    body += &maps(comparison)?;
    body += &pairs(comparison);
    body += &method(comparison);
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>VFIO modes compared</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        include_str!("page.css")
    ))
}

/// Text for the page; a number stays on a line with its sign of per cent.
fn escape(text: &str) -> String {
    let text = text.replace(" %", "\u{a0}%");
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn head(comparison: &Comparison) -> String {
    let (ran, mapped) = (comparison.rows.iter().map(|r| &r.mode), comparison.maps.iter().map(|m| &m.mode));
    let modes = distinct(ran.chain(mapped));
    let nics = distinct(comparison.rows.iter().map(|r| r.nic.as_str()));
    let facts = shared_facts(&comparison.environment);
    let fact = |key| facts.iter().find(|(k, _)| *k == key).map(|(_, values)| values.join(" and "));
    let named = |name, key| fact(key).map(|value| format!("{name} {value}"));
    let machine = fact("host cpu").or_else(|| fact("cpu"));
    let place =
        [named("Vireo", "vireo"), named("Linux", "kernel"), fact("accelerator"), machine, fact("date")];
    let place = place.into_iter().flatten().collect::<Vec<_>>().join(" · ");
    let mut out = format!(
        "<h1>VFIO modes compared</h1>\n<p class=\"lead\">{}{}</p>\n<p class=\"note\">{}</p>\n",
        escape(&list(&modes)),
        if nics.is_empty() { String::new() } else { format!(" on {}", escape(&list(&nics))) },
        escape(&place)
    );
    if !comparison.problems.is_empty() {
        out += "<section class=\"warn\">\n<strong>Packets do not add up. The rows in this colour prove nothing.</strong>\n";
        for problem in &comparison.problems {
            let _ = writeln!(out, "<p>{}</p>", escape(problem));
        }
        out += "</section>\n";
    }
    let findings = headlines(comparison);
    if !findings.is_empty() {
        out += "<section class=\"findings\">\n<h2>What was found</h2>\n<dl>\n";
        for (title, sentences) in findings {
            let sentences: String = sentences.iter().map(|s| format!("<p>{}</p>", escape(s))).collect();
            let _ = writeln!(out, "<dt>{title}</dt><dd>{sentences}</dd>");
        }
        out += "</dl>\n</section>\n";
    }
    out
}

fn legend<'a>(entries: impl IntoIterator<Item = (&'a str, RGBColor)>) -> String {
    let mut out = String::from("<p class=\"legend\">");
    for (name, RGBColor(r, g, b)) in entries {
        let _ =
            write!(out, "<span><i style=\"background:#{r:02x}{g:02x}{b:02x}\"></i>{}</span>", escape(name));
    }
    out + "</p>\n"
}

fn modes_legend<'a>(modes: impl Iterator<Item = &'a str>) -> String {
    legend(distinct(modes).into_iter().map(|mode| (mode, plot::color(mode))))
}

fn figure(svg: &str, label: &str, caption: &str) -> String {
    // A screen reader says the label instead of every number of the drawing; the tables hold those.
    let svg = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", escape(label)), 1);
    let caption = if caption.is_empty() {
        String::new()
    } else {
        format!("<figcaption>{}</figcaption>\n", escape(caption))
    };
    format!("<figure>\n{svg}{caption}</figure>\n")
}

/// A row's class, then its cells, of which the first `names` are text.
fn table(heads: &[&str], names: usize, rows: impl Iterator<Item = (&'static str, Vec<String>)>) -> String {
    let class = |i| if i < names { " class=\"name\"" } else { "" };
    let mut out = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
    for (i, head) in heads.iter().enumerate() {
        let _ = write!(out, "<th{}>{head}</th>", class(i));
    }
    out += "</tr></thead>\n<tbody>\n";
    for (kind, cells) in rows {
        let _ =
            write!(out, "<tr{}>", if kind.is_empty() { String::new() } else { format!(" class=\"{kind}\"") });
        for (i, cell) in cells.iter().enumerate() {
            let _ = write!(out, "<td{}>{cell}</td>", class(i));
        }
        out += "</tr>\n";
    }
    out + "</tbody>\n</table></div>\n"
}

/// Class of a row, from whether it begins a group and whether its packets add up.
fn kind(begins: bool, balanced: bool) -> &'static str {
    match (begins, balanced) {
        (true, true) => "group",
        (true, false) => "group bad",
        (false, true) => "",
        (false, false) => "bad",
    }
}

fn forwarding(comparison: &Comparison) -> Result<String> {
    let rows = &comparison.rows;
    let (unit, name) = rate_unit(rows.iter().map(|r| r.forward_pps).fold(0.0, f64::max));
    let mut out = format!(
        "<h2>Forwarding rate</h2>\n{}{}",
        modes_legend(rows.iter().map(|r| r.mode.as_str())),
        figure(
            &plot::forwarding(rows)?,
            "Forwarding rate by NIC and mode",
            "Median over the rounds; the whisker is its 95 % interval."
        )
    );
    if comparison.pairs.iter().any(|p| p.metric == Metric::ForwardPps) {
        out += "<h3>The same, mode against mode</h3>\n";
        out += &figure(
            &plot::differences(comparison)?,
            "Difference of forwarding rates of every pair of modes",
            "Median of the ratios of paired runs with its 95 % interval, against the noise floor (shaded). \
             In colour: a difference beyond noise. Grey: none seen. Hollow: not interleaved, no verdict.",
        );
    }
    let mut nic = "";
    let cells = rows.iter().map(|r| {
        let begins = nic != r.nic;
        nic = &r.nic;
        let ends = r.forward_pps_interval;
        let cells = vec![
            if begins { escape(&r.nic) } else { String::new() },
            escape(&r.label),
            three(r.forward_pps / unit),
            format!("{} – {}", three(ends.low / unit), three(ends.high / unit)),
            three(r.doorbells_per_packet),
            thousands(r.sent),
            thousands(r.received),
            thousands(r.dropped),
            lost(r),
            r.rounds.to_string(),
        ];
        (kind(begins, r.balanced), cells)
    });
    let heads = [
        "NIC",
        "mode",
        name,
        "95 % interval",
        "doorbells per packet",
        "sent",
        "received",
        "dropped",
        "counted as",
        "runs",
    ];
    out += &table(&heads, 2, cells);
    if !comparison.null_forwarder.is_empty() {
        let cells = comparison.null_forwarder.iter().map(|ceiling| {
            let pps = ceiling.pps;
            let interval = format!("{} – {}", three(pps.low / unit), three(pps.high / unit));
            let boot = format!("boot {}", ceiling.boot);
            (kind(false, true), vec![escape(&ceiling.nic), boot, three(pps.median / unit), interval])
        });
        out += "<h3>Null forwarder</h3>\n<p class=\"note\">From the sender straight to the NIC at the end of its \
                wire: what the devices themselves can do, with half of a forwarded packet's hops.</p>\n";
        out += &table(&["NIC", "boot", name, "95 % interval"], 2, cells);
    }
    Ok(out)
}

fn lost(row: &crate::compare::Row) -> String {
    let counted = row.drops.iter().filter(|(_, n)| **n > 0);
    escape(&counted.map(|(name, n)| format!("{name} {}", thousands(*n))).collect::<Vec<_>>().join(", "))
}

fn latency(comparison: &Comparison) -> Result<String> {
    let rows = &comparison.rows;
    let mut nic = "";
    let cells = rows.iter().map(|r| {
        let begins = nic != r.nic;
        nic = &r.nic;
        let l = r.latency_ns;
        let mut cells = vec![if begins { escape(&r.nic) } else { String::new() }, escape(&r.label)];
        cells.extend([l.p50, l.p99, l.p999, l.max].map(|ns| three(ns as f64 / 1e3)));
        cells.push(thousands(l.count));
        (kind(begins, r.balanced), cells)
    });
    let heads = ["NIC", "mode", "p50 µs", "p99 µs", "p99.9 µs", "max µs", "samples"];
    Ok(format!(
        "<h2>Latency</h2>\n{}{}",
        figure(
            &plot::latency(rows)?,
            "Latency percentiles by NIC and mode",
            "From left to right in each row: median (large), p99, p99.9, and the largest of all rounds (hollow). \
             Logarithmic scale."
        ),
        table(&heads, 2, cells)
    ))
}

fn start(comparison: &Comparison) -> Result<String> {
    let rows = &comparison.rows;
    let step = |ms: f64| if ms == 0.0 { "–".to_owned() } else { three(ms) };
    let mut nic = "";
    let cells = rows.iter().map(|r| {
        let begins = nic != r.nic;
        nic = &r.nic;
        let mapped = |text: String| if r.map_bytes == 0 { "–".to_owned() } else { text };
        let mut cells = vec![if begins { escape(&r.nic) } else { String::new() }, escape(&r.label)];
        cells.extend([r.open_ms, r.bind_ms, r.attach_step_ms, r.start_map_ms].map(step));
        cells.extend([three(r.first_packet_ms), mapped(size(r.map_bytes)), mapped(thousands(r.map_ioctls))]);
        cells.extend([r.map_ms_per_gib, r.unmap_ms_per_gib].map(|ms| mapped(three(ms))));
        (kind(begins, r.balanced), cells)
    });
    let heads = [
        "NIC",
        "mode",
        "open ms",
        "bind ms",
        "attach ms",
        "map ms",
        "first packet ms",
        "region",
        "map ioctls",
        "map ms per GiB",
        "unmap ms per GiB",
    ];
    Ok(format!(
        "<h2>Start-up</h2>\n{}{}{}",
        legend(plot::PHASES),
        figure(
            &plot::start(rows)?,
            "Phases of the start by NIC and mode",
            "From opening the device to the first packet forwarded; medians over the rounds. The last columns \
             of the table are of a region that is mapped and unmapped by itself."
        ),
        table(&heads, 2, cells)
    ))
}

fn maps(comparison: &Comparison) -> Result<String> {
    if comparison.maps.is_empty() {
        return Ok(String::new());
    }
    let mut out = format!(
        "<h2>DMA map and unmap</h2>\n<p class=\"note\">Milliseconds to give one GiB of memory to the I/O page tables and \
         to take it back, without traffic. Upper bar: map. Lower, paler bar: unmap. Thin line: 95 % interval of the median.</p>\n{}",
        modes_legend(comparison.maps.iter().map(|m| m.mode.as_str()))
    );
    for of_memory in comparison.maps.chunk_by(|a, b| a.memory == b.memory) {
        let rows: Vec<&MapRow> = of_memory.iter().collect();
        let title = format!("{} pages", of_memory[0].memory);
        let _ = writeln!(out, "<h3>{}</h3>", escape(&title));
        out += &figure(&plot::maps(&rows)?, &format!("DMA map and unmap time, {title}"), "");
    }
    let mut group = ("", "");
    let cells = comparison.maps.iter().map(|m| {
        let begins = group != (m.memory.as_str(), m.call.as_str());
        group = (&m.memory, &m.call);
        let name = |text: &str| if begins { escape(text) } else { String::new() };
        let mut cells = vec![name(&m.memory), name(&m.call), escape(&m.label)];
        for (time, ioctls) in [(m.map_ms_per_gib, m.map_ioctls), (m.unmap_ms_per_gib, m.unmap_ioctls)] {
            let ends = format!("{} – {}", three(time.low), three(time.high));
            cells.extend([three(time.median), ends, thousands(ioctls)]);
        }
        cells.extend([size(m.bytes), m.rounds.to_string()]);
        (kind(begins, true), cells)
    });
    let heads = [
        "pages",
        "call",
        "mode",
        "map ms per GiB",
        "95 % interval",
        "ioctls",
        "unmap ms per GiB",
        "95 % interval",
        "ioctls",
        "region",
        "runs",
    ];
    out += &table(&heads, 3, cells);
    Ok(out)
}

fn pairs(comparison: &Comparison) -> String {
    if comparison.pairs.is_empty() {
        return String::new();
    }
    let mut nic = "";
    let groups =
        comparison.pairs.chunk_by(|a, b| (&a.nic, &a.baseline, &a.mode) == (&b.nic, &b.baseline, &b.mode));
    let cells = groups.map(|group| {
        let first = &group[0];
        let begins = nic != first.nic;
        nic = &first.nic;
        let mut cells = vec![if begins { escape(nic) } else { String::new() }];
        cells.push(escape(&format!("{} / {}", first.mode, first.baseline)));
        cells.extend(Metric::ALL.map(|m| group.iter().find(|p| p.metric == m).map_or("–".to_owned(), pair)));
        cells.push(if first.pairs == 0 { "not interleaved".to_owned() } else { first.pairs.to_string() });
        (kind(begins, true), cells)
    });
    let mut heads = vec!["NIC", "modes"];
    heads.extend(Metric::ALL.map(Metric::noun));
    heads.push("pairs");
    format!(
        "<h2>Every pair of modes</h2>\n<p class=\"note\">Change in per cent from the second mode to the first, with its \
         95 % interval. Bold: a difference beyond noise.</p>\n{}",
        table(&heads, 2, cells)
    )
}

fn pair(pair: &Pair) -> String {
    let ratio = pair.ratio;
    let median = change(ratio.median);
    let median = if pair.verdict == Verdict::Differs { format!("<strong>{median}</strong>") } else { median };
    format!("{median}<small>{} … {}</small>", change(ratio.low), change(ratio.high))
}

fn method(comparison: &Comparison) -> String {
    let mut out = format!(
        "<h2>Method</h2>\n<p>Modes take turns (A B B A) in the same boot, so that drift hits them alike. Each run of one \
         mode is compared with the run of the other in the same round; what is given is the median of these ratios with a \
         bootstrap 95 % interval, and it takes {FEWEST_PAIRS} pairs to give one.</p>\n<p>First, one mode runs against itself \
         (A/A). The farther end of that interval is the noise floor. A difference counts only if its interval excludes \
         zero and its median exceeds the noise floor; “no difference seen” is a result. Modes that need a boot of their \
         own cannot take turns with the others: their numbers stand here without a verdict.</p>\n<p>Every packet is accounted \
         for: sent = received + dropped, where dropped is the sum of counters with names, never a difference.</p>\n"
    );
    if !comparison.noise_floor.is_empty() {
        out += "<h3>Noise floor, ± %</h3>\n";
        let groups = comparison.noise_floor.chunk_by(|a, b| (a.boot, &a.nic) == (b.boot, &b.nic));
        let cells = groups.map(|group| {
            let mut cells = vec![escape(&group[0].nic), group[0].boot.to_string()];
            let floor =
                |m| group.iter().find(|n| n.metric == m).map_or("–".to_owned(), |n| percent(n.floor));
            cells.extend(Metric::ALL.map(floor));
            cells.push(group[0].pairs.to_string());
            ("", cells)
        });
        let mut heads = vec!["NIC", "boot"];
        heads.extend(Metric::ALL.map(Metric::noun));
        heads.push("A/A pairs");
        out += &table(&heads, 1, cells);
    }
    out += "<h2>Environment</h2>\n<div class=\"scroll\"><table class=\"facts\">\n";
    let boots = comparison.environment.len();
    if boots > 1 {
        let heads: String = (1..=boots).map(|boot| format!("<th class=\"name\">boot {boot}</th>")).collect();
        let _ = writeln!(out, "<tr><th></th>{heads}</tr>");
    }
    for (key, values) in shared_facts(&comparison.environment) {
        let span = if values.len() < boots { format!(" colspan=\"{boots}\"") } else { String::new() };
        let values: String = values.iter().map(|v| format!("<td{span}>{}</td>", escape(v))).collect();
        let _ = writeln!(out, "<tr><td>{}</td>{values}</tr>", escape(key));
    }
    out += "</table></div>\n";
    let commands = distinct(comparison.environment.iter().filter_map(|e| e.get("command")));
    if !commands.is_empty() {
        let _ = writeln!(out, "<h2>Reproduce</h2>\n<pre>{}</pre>", escape(&commands.join("\n")));
    }
    out
}
