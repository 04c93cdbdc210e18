//! Comparison of modes in pairs: which pairs exist, their ratios, and the verdicts.
//!
//! All claims of a report form one family: each interval is wide enough for all of them to hold together with
//! probability [`CONFIDENCE`]. Each mode is also compared with itself, in the same rounds. If that shows a
//! difference on a NIC, the report claims nothing about that metric there.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use super::{Labels, MODES, NICS, PAGES, numbered, per_gib, place};
use crate::record::{MapTime, Recording, Run, Throughput};
use crate::stats::{CONFIDENCE, Interval, fewest_pairs, median, ratio};

/// Quantity by which modes are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Metric {
    ForwardPps,
    Throughput,
    LatencyP50,
    Doorbells,
    Attach,
    FirstPacket,
    Map,
    Unmap,
}

impl Metric {
    /// Metrics of a forwarder on a NIC.
    pub(crate) const OF_RUNS: [Self; 6] = [
        Self::ForwardPps,
        Self::Throughput,
        Self::LatencyP50,
        Self::Doorbells,
        Self::Attach,
        Self::FirstPacket,
    ];
    /// Metrics of mapping a region of memory.
    pub(crate) const OF_MAPS: [Self; 2] = [Self::Map, Self::Unmap];

    /// Values of this metric in one run, each with its subject; empty if there is nothing to measure.
    fn of_run(self, run: &Run) -> Vec<(Subject, Value)> {
        let subject = |detail, name| Subject { metric: self, place: place(&NICS, &run.nic).0, detail, name };
        let one = |value: f64| {
            let value = positive(value).map(Value::Measured);
            value.map(|value| (subject(0, run.nic.clone()), value)).into_iter().collect()
        };
        match self {
            Self::ForwardPps => one(run.forward_pps),
            Self::Throughput => {
                let of_frame = |found: &Throughput| {
                    let name = format!("{} with {}-byte frames", run.nic, found.frame);
                    let value = positive(found.pps).filter(|_| !found.at_least);
                    (subject(found.frame, name), value.map_or(Value::Censored(found.pps), Value::Measured))
                };
                run.throughput.iter().map(of_frame).collect()
            }
            Self::LatencyP50 => one(run.latency_ns.p50 as f64),
            Self::Attach => one(run.acquire_ms()),
            Self::FirstPacket => one(run.first_packet_ms),
            Self::Doorbells => one(run.doorbells_per_packet()),
            Self::Map | Self::Unmap => Vec::new(),
        }
    }

    fn of_map(self, map: &MapTime) -> Option<(Subject, Value)> {
        let value = positive(per_gib(if self == Self::Map { map.map_ms } else { map.unmap_ms }, map.bytes))?;
        let name = format!("{} pages, {}", map.memory, map.call);
        let subject = Subject { metric: self, place: place(&PAGES, &map.memory).0, detail: 0, name };
        Some((subject, Value::Measured(value)))
    }
}

/// Subject on which modes are compared. Sorts in report order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Subject {
    metric: Metric,
    /// Sort position of the NIC or the page size.
    place: usize,
    /// Frame size in bytes if the metric depends on it, otherwise 0.
    detail: usize,
    name: String,
}

/// Value of one run.
#[derive(Clone, Copy, Debug)]
enum Value {
    Measured(f64),
    /// A value beyond what could be measured, for example above the load that the generator can offer.
    Censored(f64),
}

fn positive(value: f64) -> Option<f64> {
    (value > 0.0 && value.is_finite()).then_some(value)
}

/// Verdict on a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The interval excludes 1.
    Differs,
    /// The interval contains 1 and lies within the margin.
    Equivalent,
    /// The interval contains 1 and reaches beyond the margin.
    Undecided,
    TooFewRounds,
    /// On this subject, a mode also differs from itself.
    NotComparable,
    /// In at least one round a value was beyond what could be measured. Comparing only the other rounds would
    /// favor the mode that was out of range in its best rounds.
    Censored,
    /// The modes ran in different boots or share no round.
    NotInterleaved,
}

/// Comparison of `mode` with `baseline`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Pair {
    /// NIC, or page size and map call.
    pub(crate) subject: String,
    /// Label of the baseline. `mode` is a label as well, both in the form of [`super::Row::label`].
    pub(crate) baseline: String,
    pub(crate) mode: String,
    /// Boots of baseline and mode.
    pub(crate) boots: [usize; 2],
    pub(crate) metric: Metric,
    /// Number of paired ratios; 0 if the modes are not interleaved.
    pub(crate) rounds: usize,
    /// mode ÷ baseline.
    pub(crate) ratio: f64,
    pub(crate) interval: Option<Interval>,
    pub(crate) verdict: Verdict,
    pub(crate) sentence: String,
}

/// Comparison of one mode with itself: what a report claims when there is no difference to find.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SelfCheck {
    pub(crate) boot: usize,
    pub(crate) subject: String,
    pub(crate) metric: Metric,
    pub(crate) rounds: usize,
    pub(crate) ratio: f64,
    pub(crate) interval: Option<Interval>,
}

impl SelfCheck {
    fn fails(&self) -> bool {
        self.interval.is_some_and(|interval| interval.excludes_one())
    }
}

/// Basis of the claims of a report.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct Family {
    /// Number of comparisons.
    pub(crate) comparisons: usize,
    /// Probability that all intervals hold together.
    pub(crate) confidence: f64,
    /// Number of rounds below which no comparison has an interval.
    pub(crate) fewest_rounds: usize,
    /// Modes count as equal if their interval lies between 1 ÷ (1 + margin) and 1 + margin.
    pub(crate) margin: f64,
}

impl Family {
    fn of(comparisons: usize, margin: f64) -> Self {
        let family = Self { comparisons, confidence: CONFIDENCE, fewest_rounds: 0, margin };
        Self { fewest_rounds: fewest_pairs(family.alpha()), ..family }
    }

    /// Probability with which a single interval may fail.
    fn alpha(&self) -> f64 {
        (1.0 - self.confidence) / self.comparisons.max(1) as f64
    }
}

/// Values of one mode, by round.
#[derive(Debug, Default)]
struct Rounds {
    values: BTreeMap<u32, Vec<f64>>,
    censored: bool,
}

impl Rounds {
    fn add(&mut self, round: u32, value: Value) {
        let (Value::Measured(number) | Value::Censored(number)) = value;
        self.censored |= matches!(value, Value::Censored(_));
        self.values.entry(round).or_default().push(number);
    }

    fn middle(&self) -> f64 {
        median(&self.values.values().flatten().copied().collect::<Vec<_>>()).unwrap_or(f64::NAN)
    }
}

/// A mode with its sort position, and its boot.
type Mode<'a> = ((usize, &'a str), usize);

/// Judges every comparison that the recordings allow, and compares each mode with itself.
pub(super) fn judge(recordings: &[Recording], margin: f64) -> (Family, Vec<Pair>, Vec<SelfCheck>) {
    let values = values(recordings);
    let mut compared: Vec<(Pair, Vec<f64>)> = Vec::new();
    for (subject, modes) in &values {
        let labels = Labels::of(modes.keys().map(|((_, mode), boot)| (*mode, *boot)));
        for (at, (a, of_a)) in modes.iter().enumerate() {
            for (b, of_b) in modes.iter().skip(at + 1).filter(|(b, _)| b.0 != a.0) {
                let meets = |mode, boot| modes.contains_key(&(mode, boot));
                // Modes that ran together in one boot need no comparison across boots.
                if a.1 != b.1 && (meets(a.0, b.1) || meets(b.0, a.1)) {
                    continue;
                }
                let logs = if a.1 == b.1 { paired(of_a, of_b) } else { Vec::new() };
                let censored = !logs.is_empty() && (of_a.censored || of_b.censored);
                let pair = Pair {
                    subject: subject.name.clone(),
                    baseline: labels.label(a.0.1, a.1),
                    mode: labels.label(b.0.1, b.1),
                    boots: [a.1, b.1],
                    metric: subject.metric,
                    rounds: logs.len(),
                    ratio: of_b.middle() / of_a.middle(),
                    interval: None,
                    verdict: if censored { Verdict::Censored } else { Verdict::NotInterleaved },
                    sentence: String::new(),
                };
                compared.push((pair, if censored { Vec::new() } else { logs }));
            }
        }
    }
    let family = Family::of(compared.iter().filter(|(_, logs)| !logs.is_empty()).count(), margin);
    let checks = self_checks(recordings, &family);
    let pairs = compared.into_iter().map(|(pair, logs)| judged(pair, &logs, &family, &checks));
    (family, pairs.collect(), checks)
}

fn judged(mut pair: Pair, logs: &[f64], family: &Family, checks: &[SelfCheck]) -> Pair {
    if !logs.is_empty() {
        (pair.ratio, pair.interval) = ratio(logs, family.alpha());
        let unsound = |check: &SelfCheck| {
            check.fails()
                && (check.boot, check.metric) == (pair.boots[0], pair.metric)
                && check.subject == pair.subject
        };
        pair.verdict = match pair.interval {
            None => Verdict::TooFewRounds,
            Some(_) if checks.iter().any(unsound) => Verdict::NotComparable,
            Some(interval) if interval.excludes_one() => Verdict::Differs,
            Some(interval) if interval.is_within(family.margin) => Verdict::Equivalent,
            Some(_) => Verdict::Undecided,
        };
    }
    pair.sentence = crate::words::sentence(&pair, family);
    pair
}

fn values(recordings: &[Recording]) -> BTreeMap<Subject, BTreeMap<Mode<'_>, Rounds>> {
    let mut values = BTreeMap::<Subject, BTreeMap<Mode<'_>, Rounds>>::new();
    for (boot, recording) in numbered(recordings) {
        let mut add = |(subject, value), mode, round| {
            let modes = values.entry(subject).or_default();
            modes.entry((place(&MODES, mode), boot)).or_default().add(round, value);
        };
        for run in recording.runs.iter().filter(|run| run.pair != Run::TWIN && !run.is_reference()) {
            let found = Metric::OF_RUNS.into_iter().flat_map(|metric| metric.of_run(run));
            found.for_each(|found| add(found, &run.mode, run.round));
        }
        for map in &recording.maps {
            let found = Metric::OF_MAPS.into_iter().filter_map(|metric| metric.of_map(map));
            found.for_each(|found| add(found, &map.mode, map.round));
        }
    }
    values
}

/// Logarithms of b ÷ a, one per round in which both ran. In recordings of Vireo before 0.2 a mode ran twice
/// per round.
fn paired(a: &Rounds, b: &Rounds) -> Vec<f64> {
    let mean = |values: &[f64]| values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64;
    a.values.iter().filter_map(|(round, a)| Some(mean(b.values.get(round)?) - mean(a))).collect()
}

/// Compares the twin of each round with the run that it repeats; in recordings of Vireo before 0.2, two twins
/// with each other.
fn self_checks(recordings: &[Recording], family: &Family) -> Vec<SelfCheck> {
    let mut checks = Vec::new();
    for (boot, recording) in numbered(recordings) {
        // The run and its twin, by round and mode.
        let mut subjects = BTreeMap::<Subject, BTreeMap<(u32, &str), [Vec<Value>; 2]>>::new();
        for run in recording.runs.iter().filter(|run| !run.is_reference()) {
            for (subject, value) in Metric::OF_RUNS.into_iter().flat_map(|metric| metric.of_run(run)) {
                let sides = subjects.entry(subject).or_default().entry((run.round, &run.mode)).or_default();
                sides[usize::from(run.pair == Run::TWIN)].push(value);
            }
        }
        for (Subject { metric, name, .. }, rounds) in subjects {
            let twins = rounds.values().filter_map(|[runs, twins]| match twins.as_slice() {
                [twin] => Some((*runs.first()?, *twin)),
                [first, second] => Some((*first, *second)),
                _ => None,
            });
            let logs: Option<Vec<f64>> = twins
                .map(|twins| match twins {
                    (Value::Measured(first), Value::Measured(second)) => Some((second / first).ln()),
                    _ => None,
                })
                .collect();
            if let Some(logs) = logs.filter(|logs| !logs.is_empty()) {
                let (ratio, interval) = ratio(&logs, family.alpha());
                checks.push(SelfCheck { boot, subject: name, metric, rounds: logs.len(), ratio, interval });
            }
        }
    }
    checks
}
