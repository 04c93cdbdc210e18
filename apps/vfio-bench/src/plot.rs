//! Draws the figures of the page as SVG elements. Colors are plain values, and the page's style sheet remaps
//! the neutral ones for dark screens.

use plotters::coord::Shift;
use plotters::element::{Drawable, PointCollection};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use vireo_eal::{Error, ErrorKind, Result};

use crate::compare::{Comparison, MODES, MapRow, Metric, Pair, Row, Verdict};
use crate::stats::{Interval, median};
use crate::words::{change, rate_unit, three};

const INK: RGBColor = RGBColor(0x1F, 0x29, 0x33);
const MUTED: RGBColor = RGBColor(0x6B, 0x77, 0x85);
const GRID: RGBColor = RGBColor(0xE3, 0xE7, 0xEC);
const BAND: RGBColor = RGBColor(0xEE, 0xF1, 0xF5);
const PAPER: RGBColor = RGBColor(0xFF, 0xFF, 0xFE);

const WIDTH: i32 = 960;
const ROW: i32 = 24;
/// Left edges of the mode names and of the plot itself, in figures with a row per mode.
const NAMES: i32 = 104;
const LEFT: i32 = 262;
const RIGHT: i32 = WIDTH - 86;

/// Phases of a start in order, with their colors.
pub(crate) const PHASES: [(&str, RGBColor); 5] = [
    ("open", RGBColor(0x3D, 0x5A, 0x80)),
    ("bind", RGBColor(0xE0, 0xA4, 0x3A)),
    ("attach", RGBColor(0xC8, 0x55, 0x3D)),
    ("map", RGBColor(0x4F, 0x9D, 0x8C)),
    ("to the first packet", RGBColor(0xA9, 0xB4, 0xC2)),
];

/// Color of a mode, the same in every figure.
pub(crate) fn color(mode: &str) -> RGBColor {
    match MODES.iter().position(|known| *known == mode) {
        Some(0) => RGBColor(0x3D, 0x6F, 0xA8),
        Some(1) => RGBColor(0xDB, 0x7B, 0x2B),
        Some(2) => RGBColor(0x4F, 0x9D, 0x8C),
        Some(3) => RGBColor(0xA8, 0x4B, 0x62),
        Some(4) => RGBColor(0x85, 0x73, 0xB5),
        _ => MUTED,
    }
}

/// Maps values to pixels.
struct Scale {
    from: f64,
    to: f64,
    pixels: (i32, i32),
}

impl Scale {
    fn at(&self, value: f64) -> i32 {
        let share = (value - self.from) / (self.to - self.from);
        self.pixels.0 + (share * f64::from(self.pixels.1 - self.pixels.0)).round() as i32
    }

    /// Returns about `n` round values within the scale, with their names.
    fn ticks(&self, n: f64) -> Vec<(f64, String)> {
        let rough = (self.to - self.from) / n;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let (first, last) = ((self.from / step).ceil() as i64, (self.to / step).floor() as i64);
        (first..=last).map(|i| i as f64 * step).map(|value| (value, short(value))).collect()
    }
}

/// Formats a round number without trailing zeros.
fn short(value: f64) -> String {
    if value >= 1000.0 { three(value) } else { ((value * 1e6).round() / 1e6).to_string() }
}

/// One SVG. Drawing into a string cannot fail, so an error of plotters is kept until the end.
struct Figure<'a> {
    area: DrawingArea<SVGBackend<'a>, Shift>,
    failed: Option<String>,
}

impl<'a> Figure<'a> {
    fn draw<E>(&mut self, element: &E)
    where
        for<'b> &'b E: PointCollection<'b, (i32, i32)>,
        E: Drawable<SVGBackend<'a>>,
    {
        if let Err(error) = self.area.draw(element) {
            self.failed.get_or_insert(error.to_string());
        }
    }

    fn bar(&mut self, x: (i32, i32), y: (i32, i32), color: impl Color) {
        self.draw(&Rectangle::new([(x.0, y.0), (x.1, y.1)], color.filled()));
    }

    fn line(&mut self, from: (i32, i32), to: (i32, i32), color: impl Color, width: u32) {
        self.draw(&PathElement::new([from, to], color.stroke_width(width)));
    }

    fn dot(&mut self, at: (i32, i32), radius: i32, color: RGBColor, hollow: bool) {
        self.draw(&Circle::new(at, radius, if hollow { PAPER.filled() } else { color.filled() }));
        self.draw(&Circle::new(at, radius, color.stroke_width(if hollow { 2 } else { 1 })));
    }

    fn text(&mut self, at: (i32, i32), text: &str, align: HPos, size: i32, color: RGBColor) {
        // plotters divides sizes by 1.24 when it writes them.
        let style = ("sans-serif", f64::from(size) * 1.24)
            .into_font()
            .color(&color)
            .pos(Pos::new(align, VPos::Center));
        self.draw(&Text::new(text.to_owned(), at, style));
    }

    /// Draws vertical grid lines with their values below.
    fn grid(&mut self, scale: &Scale, ticks: &[(f64, String)], y: (i32, i32), unit: &str) {
        // A digit is about 7 pixels wide. A value that would touch the previous one is left out.
        let half = |name: &str| 7 * name.chars().count() as i32 / 2;
        let mut end = i32::MIN;
        for (value, name) in ticks {
            let x = scale.at(*value);
            self.line((x, y.0), (x, y.1), GRID, 1);
            if x - half(name) > end {
                self.text((x, y.1 + 14), name, HPos::Center, 12, MUTED);
                end = x + half(name) + 4;
            }
        }
        self.text((RIGHT + 14, y.1 + 14), unit, HPos::Left, 12, MUTED);
    }

    /// Draws the names at the left of a row. The name of the group appears only where it changes, with a rule
    /// above.
    fn names(&mut self, y: i32, group: &str, name: &str, at: i32, last: &mut String) {
        if group != last {
            self.text((0, y), group, HPos::Left, 14, INK);
            if !last.is_empty() {
                self.line((0, y - ROW / 2 - 4), (WIDTH, y - ROW / 2 - 4), GRID, 1);
            }
            group.clone_into(last);
        }
        self.text((at, y), name, HPos::Left, 13, INK);
    }
}

fn figure(height: i32, draw: impl FnOnce(&mut Figure<'_>)) -> Result<String> {
    let mut svg = String::new();
    let failed = {
        let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        let mut figure = Figure { area, failed: None };
        draw(&mut figure);
        figure.failed.or(figure.area.present().err().map(|e| e.to_string()))
    };
    failed.map_or(Ok(svg), |why| Err(Error::new(ErrorKind::Protocol, "cannot draw a figure", why)))
}

/// Returns the vertical position of each row, with a gap wherever the group changes, and the total height.
fn layout<T>(rows: &[T], group: impl Fn(&T) -> &str) -> (Vec<i32>, i32) {
    let mut y = ROW / 2;
    let mut places = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        if i > 0 {
            y += if group(row) == group(&rows[i - 1]) { ROW } else { ROW + 8 };
        }
        places.push(y);
    }
    (places, y + ROW / 2 + 2)
}

/// Returns powers of ten, times 1, 2 and 5, from `low` to `high`, as logarithms with names.
fn decades(low: f64, high: f64) -> Vec<(f64, String)> {
    let all = (-9..12).flat_map(|power| [1.0, 2.0, 5.0].map(|times| times * 10f64.powi(power)));
    let inside = all.filter(|value| (low..=high).contains(&value.log10()));
    inside.map(|value| (value.log10(), short(value))).collect()
}

/// Returns a logarithmic scale for positive `values`.
fn logarithmic(values: impl Iterator<Item = f64> + Clone) -> Scale {
    let logs = values.filter(|value| *value > 0.0).map(f64::log10);
    let (low, high) =
        logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), log| (low.min(log), high.max(log)));
    let (low, high) = if low > high { (0.0, 1.0) } else { (low, high.max(low + 0.3)) };
    let edge = (high - low) * 0.04;
    Scale { from: low - edge, to: high + edge, pixels: (LEFT, RIGHT) }
}

/// Draws a point per sample and a bar at their median.
fn samples(
    f: &mut Figure<'_>,
    scale: &Scale,
    y: i32,
    (samples, median): (&[f64], f64),
    ink: RGBColor,
    strength: f64,
) {
    for sample in samples.iter().filter(|sample| **sample > 0.0) {
        f.draw(&Circle::new((scale.at(sample.log10()), y), 3, ink.mix(strength * 0.5).filled()));
    }
    if median > 0.0 {
        let x = scale.at(median.log10());
        f.bar((x - 1, x + 2), (y - 7, y + 7), ink.mix(strength));
    }
    f.text((WIDTH, y), &three(median), HPos::Right, 12, INK);
}

/// Draws the rate of every round, by NIC and mode.
pub(crate) fn forwarding(rows: &[&Row]) -> Result<String> {
    let (unit, name) = rate_unit(rows.iter().map(|row| row.forward_pps).fold(0.0, f64::max));
    let scale = logarithmic(rows.iter().flat_map(|row| &row.forward_samples).map(|pps| pps / unit));
    let (places, bottom) = layout(rows, |row| &row.nic);
    figure(bottom + 28, |f| {
        f.grid(&scale, &decades(scale.from, scale.to), (0, bottom), name);
        let mut last = String::new();
        for (row, y) in rows.iter().zip(&places) {
            f.names(*y, &row.nic, &row.label, NAMES, &mut last);
            let scaled: Vec<f64> = row.forward_samples.iter().map(|pps| pps / unit).collect();
            samples(f, &scale, *y, (&scaled, row.forward_pps / unit), color(&row.mode), 1.0);
        }
    })
}

/// Largest ratio, up and down, that the figure of ratios shows. It keeps the other pairs readable next to one
/// wide interval.
const FARTHEST: f64 = 2.0;

/// Draws the ratio of every pair with its interval, and the margin as a band.
pub(crate) fn ratios(comparison: &Comparison, metric: Metric) -> Result<String> {
    let pairs: Vec<&Pair> = comparison.pairs.iter().filter(|pair| pair.metric == metric).collect();
    let margin = 1.0 + comparison.family.margin;
    let ends = |pair: &Pair| {
        let interval = pair.interval.unwrap_or(Interval { low: pair.ratio, high: pair.ratio });
        [interval.low, pair.ratio, interval.high].map(f64::ln)
    };
    let reach =
        pairs.iter().flat_map(|pair| ends(pair)).fold(margin.ln() * 1.5, |reach, end| reach.max(end.abs()));
    let reach = reach.min(FARTHEST.ln()) * 1.04;
    // Subjects that also name a frame size need more room.
    let longest = pairs.iter().map(|pair| pair.subject.chars().count()).max().unwrap_or(0) as i32;
    let indent = (7 * longest - NAMES + 12).max(0);
    let scale = Scale { from: -reach, to: reach, pixels: (LEFT + 30 + indent, RIGHT) };
    let (places, bottom) = layout(&pairs, |pair| &pair.subject);
    figure(bottom + 28, |f| {
        f.bar((scale.at(-margin.ln()), scale.at(margin.ln())), (0, bottom), BAND);
        let round = [-50, -40, -30, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 30, 50, 75, 100];
        let ticks = round.map(|percent| (f64::from(percent) / 100.0).ln_1p());
        let mut ticks: Vec<f64> = ticks.into_iter().filter(|tick| tick.abs() <= reach).collect();
        // Choose from the middle outward, so that 0 is always shown.
        ticks.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
        let mut shown: Vec<(f64, String)> = Vec::new();
        for tick in ticks {
            if shown.iter().all(|(other, _)| (scale.at(tick) - scale.at(*other)).abs() > 36) {
                shown.push((tick, change(tick.exp())));
            }
        }
        shown.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        f.grid(&scale, &shown, (0, bottom), "%");
        f.line((scale.at(0.0), 0), (scale.at(0.0), bottom), MUTED, 1);
        let mut last = String::new();
        for (pair, y) in pairs.iter().zip(&places) {
            let modes = format!("{} / {}", pair.mode, pair.baseline);
            f.names(*y, &pair.subject, &modes, NAMES + indent, &mut last);
            let ink = if pair.verdict == Verdict::Differs { color_of(comparison, pair) } else { MUTED };
            let [low, ratio, high] = ends(pair);
            let clipped = |end: f64| scale.at(end.clamp(-reach, reach));
            f.line((clipped(low), *y), (clipped(high), *y), ink, 2);
            for (end, to) in [(low, -5), (high, 5)].into_iter().filter(|(end, _)| end.abs() > reach) {
                let tip = clipped(end);
                f.line((tip - to, y - 4), (tip, *y), ink, 2);
                f.line((tip - to, y + 4), (tip, *y), ink, 2);
            }
            if ratio.abs() <= reach {
                let unjudged = matches!(pair.verdict, Verdict::NotInterleaved | Verdict::Censored);
                f.dot((scale.at(ratio), *y), 4, ink, unjudged);
            }
            f.text((WIDTH, *y), &format!("{} %", change(pair.ratio)), HPos::Right, 12, ink);
        }
    })
}

fn color_of(comparison: &Comparison, pair: &Pair) -> RGBColor {
    let row = comparison.rows.iter().find(|row| row.label == pair.mode);
    color(row.map_or("", |row| &row.mode))
}

/// Draws p50, p99, p99.9 and the largest latency, on a logarithmic scale.
pub(crate) fn latency(rows: &[&Row]) -> Result<String> {
    let us = |ns: u64| (ns.max(1) as f64 / 1e3).log10();
    let low = rows.iter().map(|r| us(r.latency_ns.p50)).fold(f64::INFINITY, f64::min);
    let high = rows.iter().map(|r| us(r.latency_ns.max)).fold(low + 0.5, f64::max);
    let scale = Scale { from: low - 0.1, to: high + 0.1, pixels: (LEFT, RIGHT) };
    let ticks = decades(scale.from, scale.to);
    let (places, bottom) = layout(rows, |r| &r.nic);
    figure(bottom + 28, |f| {
        f.grid(&scale, &ticks, (0, bottom), "µs");
        let mut last = String::new();
        for (row, y) in rows.iter().zip(&places) {
            f.names(*y, &row.nic, &row.label, NAMES, &mut last);
            let (l, ink) = (row.latency_ns, color(&row.mode));
            f.line((scale.at(us(l.p50)), *y), (scale.at(us(l.max)), *y), ink.mix(0.45), 2);
            for (ns, radius, hollow) in
                [(l.max, 4, true), (l.p999, 3, false), (l.p99, 4, false), (l.p50, 6, false)]
            {
                f.dot((scale.at(us(ns)), *y), radius, ink, hollow);
            }
        }
    })
}

/// Draws the phases of the start, end to end.
pub(crate) fn start(rows: &[Row]) -> Result<String> {
    // Limit the scale, so that one slow row does not squeeze the others.
    let all: Vec<f64> = rows.iter().map(|row| row.first_packet_ms).collect();
    let longest = all.iter().copied().fold(1e-3, f64::max).min(3.0 * median(&all).unwrap_or(1.0).max(1e-3));
    let scale = Scale { from: 0.0, to: longest, pixels: (LEFT, RIGHT - 60) };
    let ticks = scale.ticks(6.0);
    let (places, bottom) = layout(rows, |r| &r.nic);
    figure(bottom + 28, |f| {
        f.grid(&scale, &ticks, (0, bottom), "ms");
        let mut last = String::new();
        for (row, y) in rows.iter().zip(&places) {
            f.names(*y, &row.nic, &row.label, NAMES, &mut last);
            let mut done = 0.0;
            let steps = [row.open_ms, row.bind_ms, row.attach_step_ms, row.start_map_ms];
            let rest = (row.first_packet_ms - steps.iter().sum::<f64>()).max(0.0);
            for (ms, (_, ink)) in steps.into_iter().chain([rest]).zip(PHASES) {
                let [from, to] = [done, done + ms].map(|end| scale.at(end.min(longest)));
                f.bar((from, to), (y - 8, y + 8), ink);
                done += ms;
            }
            if done > longest {
                f.bar((scale.at(longest) - 10, scale.at(longest) - 6), (y - 8, y + 8), PAPER);
                done = longest;
            }
            let total = format!("{} ms", three(row.first_packet_ms));
            f.text((scale.at(done) + 8, *y), &total, HPos::Left, 12, INK);
        }
    })
}

/// Draws map above unmap for every mode and call. All rows have the same page size.
pub(crate) fn maps(rows: &[&MapRow]) -> Result<String> {
    let scale = logarithmic(rows.iter().flat_map(|row| row.samples.iter().flatten()).copied());
    let height = 2 * ROW - 10;
    let bottom = rows.len() as i32 * height + 4;
    figure(bottom + 28, |f| {
        f.grid(&scale, &decades(scale.from, scale.to), (0, bottom), "ms/GiB");
        for (top, row) in (0..).step_by(height as usize).zip(rows) {
            f.text((0, top + height / 2), &row.call, HPos::Left, 13, INK);
            f.text((NAMES, top + height / 2), &row.label, HPos::Left, 13, INK);
            let ink = color(&row.mode);
            let times = [row.map_ms_per_gib, row.unmap_ms_per_gib];
            for (((y, time), of), strength) in
                [top + 10, top + 27].into_iter().zip(times).zip(&row.samples).zip([1.0, 0.55])
            {
                samples(f, &scale, y, (of, time), ink, strength);
            }
        }
    })
}

/// A bar of [`costs`].
pub(crate) struct Bar {
    /// Name of the group, drawn next to its first bar.
    pub(crate) group: String,
    pub(crate) name: String,
    pub(crate) value: f64,
    /// Text next to the bar.
    pub(crate) text: String,
}

/// Draws instructions per packet above instructions per mapped GiB, on a background of its own, because the
/// page that shows the figure may be dark.
pub(crate) fn costs(packets: &[Bar], maps: &[Bar]) -> Result<String> {
    const TOP: i32 = 34;
    const STEP: i32 = 26;
    let panels = [
        ("Instructions per forwarded packet, 32 per poll", packets),
        ("Million instructions to map a GiB for DMA, 2 MiB pages", maps),
    ];
    let height = |bars: &[Bar]| TOP + STEP * bars.len() as i32 + 18;
    figure(panels.iter().map(|(_, bars)| height(bars)).sum::<i32>() + 8, |f| {
        f.bar((0, WIDTH), (0, 4096), PAPER);
        let mut top = 8;
        for (title, bars) in panels {
            let longest = bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
            let scale = Scale { from: 0.0, to: longest, pixels: (LEFT, RIGHT - 40) };
            f.text((16, top + 14), title, HPos::Left, 16, INK);
            let mut last = "";
            for (y, bar) in (top + TOP + STEP / 2..).step_by(STEP as usize).zip(bars) {
                if last != bar.group {
                    f.text((16, y), &bar.group, HPos::Left, 14, INK);
                }
                last = &bar.group;
                f.text((NAMES + 16, y), &bar.name, HPos::Left, 14, INK);
                // Vireo and the modes have their colors. DPDK, their reference, is gray.
                let ink = if bar.name == "Vireo" { color(MODES[2]) } else { color(&bar.name) };
                f.bar((LEFT, scale.at(bar.value)), (y - 9, y + 9), ink);
                f.text((scale.at(bar.value) + 8, y), &bar.text, HPos::Left, 14, INK);
            }
            top += height(bars);
        }
    })
}
