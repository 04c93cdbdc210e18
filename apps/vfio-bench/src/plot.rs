//! The figures of the page, as SVG elements. Colours are written as plain values; the page's style sheet maps the
//! neutral ones for dark screens.

use plotters::coord::Shift;
use plotters::element::{Drawable, PointCollection};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use vireo_eal::{Error, ErrorKind, Result};

use crate::compare::{Comparison, MODES, MapRow, Metric, Pair, Row, Verdict};
use crate::words::{change, rate_unit, three};

const INK: RGBColor = RGBColor(0x1F, 0x29, 0x33);
const MUTED: RGBColor = RGBColor(0x6B, 0x77, 0x85);
const GRID: RGBColor = RGBColor(0xE3, 0xE7, 0xEC);
const BAND: RGBColor = RGBColor(0xEE, 0xF1, 0xF5);
const PAPER: RGBColor = RGBColor(0xFF, 0xFF, 0xFE);

const WIDTH: i32 = 960;
const ROW: i32 = 24;
/// Left end of names of modes, and of the plot itself, in figures that have a row per mode.
const NAMES: i32 = 104;
const LEFT: i32 = 262;
const RIGHT: i32 = WIDTH - 86;

/// Phases of a start in their order, with their colours.
pub(crate) const PHASES: [(&str, RGBColor); 5] = [
    ("open", RGBColor(0x3D, 0x5A, 0x80)),
    ("bind", RGBColor(0xE0, 0xA4, 0x3A)),
    ("attach", RGBColor(0xC8, 0x55, 0x3D)),
    ("map", RGBColor(0x4F, 0x9D, 0x8C)),
    ("to the first packet", RGBColor(0xA9, 0xB4, 0xC2)),
];

/// Colour of a mode, the same in every figure.
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

    /// About `n` round values within the scale, with their names.
    fn ticks(&self, n: f64) -> Vec<(f64, String)> {
        let rough = (self.to - self.from) / n;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let (first, last) = ((self.from / step).ceil() as i64, (self.to / step).floor() as i64);
        (first..=last).map(|i| i as f64 * step).map(|value| (value, short(value))).collect()
    }
}

/// A round number without idle zeros.
fn short(value: f64) -> String {
    if value >= 1000.0 { three(value) } else { ((value * 1e6).round() / 1e6).to_string() }
}

/// One SVG; drawing into a string cannot fail, so an error of plotters is kept for the end.
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
        // plotters writes its sizes divided by 1.24.
        let style = ("sans-serif", f64::from(size) * 1.24)
            .into_font()
            .color(&color)
            .pos(Pos::new(align, VPos::Center));
        self.draw(&Text::new(text.to_owned(), at, style));
    }

    /// Vertical grid lines with their values beneath.
    fn grid(&mut self, scale: &Scale, ticks: &[(f64, String)], y: (i32, i32), unit: &str) {
        for (value, name) in ticks {
            let x = scale.at(*value);
            self.line((x, y.0), (x, y.1), GRID, 1);
            self.text((x, y.1 + 14), name, HPos::Center, 12, MUTED);
        }
        self.text((RIGHT + 14, y.1 + 14), unit, HPos::Left, 12, MUTED);
    }

    /// Names at the left of a row; the group's only where it changes, with a rule above.
    fn names(&mut self, y: i32, group: &str, name: &str, last: &mut String) {
        if group != last {
            self.text((0, y), group, HPos::Left, 14, INK);
            if !last.is_empty() {
                self.line((0, y - ROW / 2 - 4), (WIDTH, y - ROW / 2 - 4), GRID, 1);
            }
            group.clone_into(last);
        }
        self.text((NAMES, y), name, HPos::Left, 13, INK);
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

/// Height of row `i` in a figure of rows, with a gap wherever the group changes.
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

/// Bars per NIC and mode, with the interval of the median.
pub(crate) fn forwarding(rows: &[Row]) -> Result<String> {
    let top = rows.iter().map(|r| r.forward_pps_interval.high).fold(0.0, f64::max);
    let (unit, name) = rate_unit(top);
    let scale = Scale { from: 0.0, to: top * 1.08 / unit, pixels: (300, 8) };
    let nics: Vec<&[Row]> = rows.chunk_by(|a, b| a.nic == b.nic).collect();
    let left = 56;
    figure(334, |f| {
        for (tick, name) in scale.ticks(5.0) {
            f.line((left, scale.at(tick)), (WIDTH, scale.at(tick)), GRID, 1);
            f.text((left - 10, scale.at(tick)), &name, HPos::Right, 12, MUTED);
        }
        f.text((0, 14), name, HPos::Left, 12, MUTED);
        let room = (WIDTH - left) / nics.len().max(1) as i32;
        for (i, of_nic) in (0..).zip(&nics) {
            let middle = left + room * i + room / 2;
            let step = (room - 40).min(74 * of_nic.len() as i32) / of_nic.len() as i32;
            let start = middle - step * of_nic.len() as i32 / 2;
            f.text((middle, 320), &of_nic[0].nic, HPos::Center, 14, INK);
            for (j, row) in (0..).zip(of_nic.iter()) {
                let x = (start + step * j + 4, start + step * (j + 1) - 4);
                let y = |pps: f64| scale.at(pps / unit);
                f.bar(x, (y(row.forward_pps), scale.at(0.0)), color(&row.mode));
                let (middle, ends) = ((x.0 + x.1) / 2, row.forward_pps_interval);
                f.line((middle, y(ends.low)), (middle, y(ends.high)), INK, 1);
                for end in [ends.low, ends.high] {
                    f.line((middle - 4, y(end)), (middle + 4, y(end)), INK, 1);
                }
                f.text((middle, y(ends.high) - 10), &three(row.forward_pps / unit), HPos::Center, 12, INK);
            }
        }
        f.line((left, scale.at(0.0)), (WIDTH, scale.at(0.0)), MUTED, 1);
    })
}

/// Ratio of forwarding rates of every pair, its interval, and the noise floor as a band.
pub(crate) fn differences(comparison: &Comparison) -> Result<String> {
    let pairs: Vec<&Pair> = comparison.pairs.iter().filter(|p| p.metric == Metric::ForwardPps).collect();
    let reach = |p: &&Pair| p.ratio.reach().max(p.noise.unwrap_or(0.0));
    let widest = pairs.iter().map(reach).fold(0.005, f64::max) * 1.08;
    let from = if widest < 1.0 { 1.0 - widest } else { 0.0 };
    let scale = Scale { from, to: 1.0 + widest, pixels: (LEFT + 30, RIGHT) };
    let (places, bottom) = layout(&pairs, |p| &p.nic);
    figure(bottom + 28, |f| {
        for (p, y) in pairs.iter().zip(&places) {
            if let Some(noise) = p.noise {
                f.bar((scale.at(1.0 - noise), scale.at(1.0 + noise)), (y - ROW / 2, y + ROW / 2), BAND);
            }
        }
        let percents =
            Scale { from: (scale.from - 1.0) * 100.0, to: (scale.to - 1.0) * 100.0, pixels: scale.pixels };
        let signed = |(t, name): (f64, String)| match t {
            t if t > 0.0 => (t, format!("+{name}")),
            t => (t, name.replace('-', "−")),
        };
        let ticks: Vec<_> = percents.ticks(12.0).into_iter().map(signed).collect();
        f.grid(&percents, &ticks, (0, bottom), "%");
        f.line((scale.at(1.0), 0), (scale.at(1.0), bottom), MUTED, 1);
        let mut last = String::new();
        for (p, y) in pairs.iter().zip(&places) {
            f.names(*y, &p.nic, &format!("{} / {}", p.mode, p.baseline), &mut last);
            let ink = if p.verdict == Verdict::Differs { color_of(comparison, p) } else { MUTED };
            f.line((scale.at(p.ratio.low), *y), (scale.at(p.ratio.high), *y), ink, 2);
            f.dot((scale.at(p.ratio.median), *y), 4, ink, p.verdict == Verdict::NotInterleaved);
            f.text((WIDTH, *y), &format!("{} %", change(p.ratio.median)), HPos::Right, 12, ink);
        }
    })
}

fn color_of(comparison: &Comparison, pair: &Pair) -> RGBColor {
    let row = comparison.rows.iter().find(|row| row.label == pair.mode);
    color(row.map_or("", |row| &row.mode))
}

/// p50, p99, p99.9 and the largest latency, on a logarithmic scale.
pub(crate) fn latency(rows: &[Row]) -> Result<String> {
    let us = |ns: u64| (ns.max(1) as f64 / 1e3).log10();
    let low = rows.iter().map(|r| us(r.latency_ns.p50)).fold(f64::INFINITY, f64::min);
    let high = rows.iter().map(|r| us(r.latency_ns.max)).fold(low + 0.5, f64::max);
    let scale = Scale { from: low - 0.1, to: high + 0.1, pixels: (LEFT, RIGHT) };
    let decades = (-3..8).flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d)));
    let inside = decades.filter(|t| (scale.from..=scale.to).contains(&t.log10()));
    let ticks: Vec<(f64, String)> = inside.map(|t| (t.log10(), short(t))).collect();
    let (places, bottom) = layout(rows, |r| &r.nic);
    figure(bottom + 28, |f| {
        f.grid(&scale, &ticks, (0, bottom), "µs");
        let mut last = String::new();
        for (row, y) in rows.iter().zip(&places) {
            f.names(*y, &row.nic, &row.label, &mut last);
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

/// Phases of the start, end to end.
pub(crate) fn start(rows: &[Row]) -> Result<String> {
    let longest = rows.iter().map(|r| r.first_packet_ms).fold(1e-3, f64::max);
    let scale = Scale { from: 0.0, to: longest, pixels: (LEFT, RIGHT) };
    let ticks = scale.ticks(6.0);
    let (places, bottom) = layout(rows, |r| &r.nic);
    figure(bottom + 28, |f| {
        f.grid(&scale, &ticks, (0, bottom), "ms");
        let mut last = String::new();
        for (row, y) in rows.iter().zip(&places) {
            f.names(*y, &row.nic, &row.label, &mut last);
            let mut done = 0.0;
            let steps = [row.open_ms, row.bind_ms, row.attach_step_ms, row.start_map_ms];
            let rest = (row.first_packet_ms - steps.iter().sum::<f64>()).max(0.0);
            for (ms, (_, ink)) in steps.into_iter().chain([rest]).zip(PHASES) {
                f.bar((scale.at(done), scale.at(done + ms)), (y - 8, y + 8), ink);
                done += ms;
            }
            let total = format!("{} ms", three(row.first_packet_ms));
            f.text((scale.at(done) + 8, *y), &total, HPos::Left, 12, INK);
        }
    })
}

/// Map above unmap for every mode and call; all rows are of one page size.
pub(crate) fn maps(rows: &[&MapRow]) -> Result<String> {
    let longest =
        rows.iter().map(|r| r.map_ms_per_gib.high.max(r.unmap_ms_per_gib.high)).fold(1e-6, f64::max);
    let scale = Scale { from: 0.0, to: longest, pixels: (LEFT, RIGHT) };
    let ticks = scale.ticks(6.0);
    let height = 2 * ROW - 10;
    let bottom = rows.len() as i32 * height + 4;
    figure(bottom + 28, |f| {
        f.grid(&scale, &ticks, (0, bottom), "ms/GiB");
        for (top, row) in (0..).step_by(height as usize).zip(rows) {
            f.text((0, top + height / 2), &row.call, HPos::Left, 13, INK);
            f.text((NAMES, top + height / 2), &row.label, HPos::Left, 13, INK);
            let ink = color(&row.mode);
            for (y, time, strength) in
                [(top + 5, row.map_ms_per_gib, 1.0), (top + 20, row.unmap_ms_per_gib, 0.45)]
            {
                f.bar((LEFT, scale.at(time.median)), (y, y + 13), ink.mix(strength));
                f.line((scale.at(time.low), y + 6), (scale.at(time.high), y + 6), INK, 1);
                f.text((scale.at(time.high) + 8, y + 6), &three(time.median), HPos::Left, 12, INK);
            }
        }
    })
}
