//! Modes against each other: which pairs there are, their ratios, and what may be said of them.
//!
//! All claims of a report are one family: each interval is as wide as it takes for all of them together to hold with
//! [`CONFIDENCE`]. A mode is also compared with itself, in the same rounds; where that finds a difference on a NIC,
//! nothing is claimed of that metric there.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use super::{Labels, MODES, NICS, PAGES, numbered, per_gib, place};
use crate::record::{MapTime, Recording, Run};
use crate::stats::{CONFIDENCE, Interval, fewest_pairs, median, ratio};

/// What pairs of modes are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Metric {
    ForwardPps,
    LatencyP50,
    Doorbells,
    Attach,
    FirstPacket,
    Map,
    Unmap,
}

impl Metric {
    /// Of the forwarder on a NIC.
    pub(crate) const OF_RUNS: [Self; 5] =
        [Self::ForwardPps, Self::LatencyP50, Self::Doorbells, Self::Attach, Self::FirstPacket];
    /// Of a region of memory.
    pub(crate) const OF_MAPS: [Self; 2] = [Self::Map, Self::Unmap];

    /// The value of one run; `None` where there is nothing to measure.
    fn of_run(self, run: &Run) -> Option<f64> {
        positive(match self {
            Self::ForwardPps => run.forward_pps,
            Self::LatencyP50 => run.latency_ns.p50 as f64,
            Self::Attach => run.acquire_ms(),
            Self::FirstPacket => run.first_packet_ms,
            Self::Doorbells => run.doorbells_per_packet(),
            Self::Map | Self::Unmap => return None,
        })
    }

    fn of_map(self, map: &MapTime) -> Option<f64> {
        positive(per_gib(if self == Self::Map { map.map_ms } else { map.unmap_ms }, map.bytes))
    }
}

fn positive(value: f64) -> Option<f64> {
    (value > 0.0 && value.is_finite()).then_some(value)
}

/// What may be said of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The interval excludes 1.
    Differs,
    /// The interval holds 1 and lies within the margin.
    Equivalent,
    /// The interval holds 1 and reaches beyond the margin.
    Undecided,
    TooFewRounds,
    /// A mode differs from itself.
    NotComparable,
    /// From different boots, or from rounds that have nothing in common.
    NotInterleaved,
}

/// `mode` against `baseline`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Pair {
    /// The NIC, or the memory and the call.
    pub(crate) subject: String,
    /// Labels, as [`super::Row::label`].
    pub(crate) baseline: String,
    pub(crate) mode: String,
    /// Of baseline and mode.
    pub(crate) boots: [usize; 2],
    pub(crate) metric: Metric,
    /// Number of paired ratios; 0 when not interleaved.
    pub(crate) rounds: usize,
    /// mode ÷ baseline.
    pub(crate) ratio: f64,
    pub(crate) interval: Option<Interval>,
    pub(crate) verdict: Verdict,
    pub(crate) sentence: String,
}

/// One mode against itself: what a report without any difference to find would say.
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

/// What the claims of a report rest on.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct Family {
    /// Number of comparisons.
    pub(crate) comparisons: usize,
    /// Probability that all intervals hold.
    pub(crate) confidence: f64,
    /// Rounds without which none of them has an interval.
    pub(crate) fewest_rounds: usize,
    /// An interval within this part of 1, up and down, is called the same.
    pub(crate) margin: f64,
}

impl Family {
    fn of(comparisons: usize, margin: f64) -> Self {
        let family = Self { comparisons, confidence: CONFIDENCE, fewest_rounds: 0, margin };
        Self { fewest_rounds: fewest_pairs(family.alpha()), ..family }
    }

    /// How often one interval may fail.
    fn alpha(&self) -> f64 {
        (1.0 - self.confidence) / self.comparisons.max(1) as f64
    }
}

/// Values of one mode by round.
type Rounds = BTreeMap<u32, Vec<f64>>;

/// Values of every mode, by what was measured.
type Values<'a> = BTreeMap<(Metric, (usize, &'a str), &'a str), BTreeMap<((usize, &'a str), usize), Rounds>>;

/// Every comparison that the recordings allow, judged, and each mode's with itself.
pub(super) fn judge(recordings: &[Recording], margin: f64) -> (Family, Vec<Pair>, Vec<SelfCheck>) {
    let values = values(recordings);
    let mut compared: Vec<(Pair, Vec<f64>)> = Vec::new();
    for ((metric, (_, subject), call), modes) in &values {
        let labels = Labels::of(modes.keys().map(|((_, mode), boot)| (*mode, *boot)));
        for (at, (a, of_a)) in modes.iter().enumerate() {
            for (b, of_b) in modes.iter().skip(at + 1).filter(|(b, _)| b.0 != a.0) {
                let meets = |mode, boot| modes.contains_key(&(mode, boot));
                // Two modes that met in one boot need no comparison across boots.
                if a.1 != b.1 && (meets(a.0, b.1) || meets(b.0, a.1)) {
                    continue;
                }
                let logs = if a.1 == b.1 { paired(of_a, of_b) } else { Vec::new() };
                let pair = Pair {
                    subject: if call.is_empty() {
                        (*subject).to_owned()
                    } else {
                        format!("{subject} pages, {call}")
                    },
                    baseline: labels.label(a.0.1, a.1),
                    mode: labels.label(b.0.1, b.1),
                    boots: [a.1, b.1],
                    metric: *metric,
                    rounds: logs.len(),
                    ratio: middle(of_b) / middle(of_a),
                    interval: None,
                    verdict: Verdict::NotInterleaved,
                    sentence: String::new(),
                };
                compared.push((pair, logs));
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

fn values(recordings: &[Recording]) -> Values<'_> {
    let mut values = Values::new();
    for (boot, recording) in numbered(recordings) {
        for run in recording.runs.iter().filter(|run| run.pair != Run::TWIN) {
            for metric in Metric::OF_RUNS {
                let Some(value) = metric.of_run(run) else { continue };
                let modes = values.entry((metric, place(&NICS, &run.nic), "")).or_default();
                let rounds = modes.entry((place(&MODES, &run.mode), boot)).or_default();
                rounds.entry(run.round).or_default().push(value);
            }
        }
        for map in &recording.maps {
            for metric in Metric::OF_MAPS {
                let Some(value) = metric.of_map(map) else { continue };
                let modes =
                    values.entry((metric, place(&PAGES, &map.memory), map.call.as_str())).or_default();
                let rounds = modes.entry((place(&MODES, &map.mode), boot)).or_default();
                rounds.entry(map.round).or_default().push(value);
            }
        }
    }
    values
}

/// Logarithms of b ÷ a, a value for each round in which both ran. In old recordings a mode ran twice in a round.
fn paired(a: &Rounds, b: &Rounds) -> Vec<f64> {
    let mean = |values: &[f64]| values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64;
    a.iter().filter_map(|(round, a)| Some(mean(b.get(round)?) - mean(a))).collect()
}

fn middle(rounds: &Rounds) -> f64 {
    median(&rounds.values().flatten().copied().collect::<Vec<_>>()).unwrap_or(f64::NAN)
}

/// Runs of a mode in a round, and its twins.
type Sides<'a> = [Vec<&'a Run>; 2];

/// The twin of each round against the run whose twin it is; in old recordings, two twins against each other.
fn self_checks(recordings: &[Recording], family: &Family) -> Vec<SelfCheck> {
    let mut checks = Vec::new();
    for (boot, recording) in numbered(recordings) {
        let mut groups: BTreeMap<_, BTreeMap<(u32, &str), Sides<'_>>> = BTreeMap::new();
        for run in &recording.runs {
            let rounds = groups.entry(place(&NICS, &run.nic)).or_default();
            let sides = rounds.entry((run.round, &run.mode)).or_default();
            sides[usize::from(run.pair == Run::TWIN)].push(run);
        }
        for ((_, nic), rounds) in &groups {
            for metric in Metric::OF_RUNS {
                let logs = rounds.values().filter_map(|[runs, twins]| {
                    let (first, second) = match twins.as_slice() {
                        [twin] => (runs.first()?, twin),
                        [first, second] => (first, second),
                        _ => return None,
                    };
                    Some((metric.of_run(second)? / metric.of_run(first)?).ln())
                });
                let logs: Vec<f64> = logs.collect();
                if logs.is_empty() {
                    continue;
                }
                let (ratio, interval) = ratio(&logs, family.alpha());
                let (subject, rounds) = ((*nic).to_owned(), logs.len());
                checks.push(SelfCheck { boot, subject, metric, rounds, ratio, interval });
            }
        }
    }
    checks
}
