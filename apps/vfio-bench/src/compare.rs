//! Recordings of several boots merged: rows, pairs of modes, DMA-map table, noise floor. Serialised, this is
//! `compare.json`.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::record::{Ceiling, Environment, Latency, MapTime, Recording, Run};
use crate::stats::{FEWEST_PAIRS, Interval, median};

const NICS: [&str; 3] = ["virtio-net", "e1000", "e1000e"];
/// Every mode, in the order of the tables; of two modes the earlier is the baseline.
pub(crate) const MODES: [&str; 5] = ["container", "cdev", "compat", "noiommu", "noiommu-cdev"];

/// Place of a NIC or mode in tables; unknown ones come last, by name.
fn place<'a>(known: &[&str], name: &'a str) -> (usize, &'a str) {
    (known.iter().position(|k| *k == name).unwrap_or(known.len()), name)
}

/// The whole comparison.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    /// One per boot; `boot` elsewhere counts from 1.
    pub(crate) environment: Vec<Environment>,
    pub(crate) rows: Vec<Row>,
    pub(crate) pairs: Vec<Pair>,
    pub(crate) maps: Vec<MapRow>,
    pub(crate) null_forwarder: Vec<CeilingRow>,
    pub(crate) noise_floor: Vec<Noise>,
    /// Runs whose packets do not add up; empty in a sound comparison.
    pub(crate) problems: Vec<String>,
}

/// One NIC in one mode: medians over the rounds, sums of the packet counts.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) mode: String,
    pub(crate) nic: String,
    pub(crate) boot: usize,
    /// The mode, and the boot where the same mode ran in several.
    #[serde(skip)]
    pub(crate) label: String,
    pub(crate) rounds: usize,
    pub(crate) forward_pps: f64,
    pub(crate) forward_pps_interval: Interval,
    /// `max` is the largest of all rounds, `count` their sum.
    pub(crate) latency_ns: Latency,
    pub(crate) open_ms: f64,
    pub(crate) bind_ms: f64,
    pub(crate) attach_step_ms: f64,
    /// Open, bind and attach together.
    pub(crate) attach_ms: f64,
    /// Of the forwarder's own memory; the figures per GiB are of a region by itself.
    pub(crate) start_map_ms: f64,
    /// 0 where the mode maps nothing.
    pub(crate) map_ms_per_gib: f64,
    pub(crate) map_bytes: u64,
    pub(crate) map_ioctls: u64,
    pub(crate) unmap_ms_per_gib: f64,
    pub(crate) first_packet_ms: f64,
    pub(crate) doorbells_per_packet: f64,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// Sum of `drops`, never a difference.
    pub(crate) dropped: u64,
    pub(crate) drops: BTreeMap<String, u64>,
    /// Whether sent = received + dropped, and received > 0, in every single run of this row.
    pub(crate) balanced: bool,
}

/// What pairs of modes are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Metric {
    ForwardPps,
    LatencyP50,
    Attach,
    Map,
    FirstPacket,
    Doorbells,
}

impl Metric {
    pub(crate) const ALL: [Self; 6] =
        [Self::ForwardPps, Self::LatencyP50, Self::Doorbells, Self::Attach, Self::Map, Self::FirstPacket];

    /// The value of one run; `None` where the mode has nothing to measure.
    fn of(self, run: &Run) -> Option<f64> {
        let value = match self {
            Self::ForwardPps => run.forward_pps,
            Self::LatencyP50 => run.latency_ns.p50 as f64,
            Self::Attach => run.acquire_ms(),
            Self::Map => per_gib(run.map_ms, run.map_bytes),
            Self::FirstPacket => run.first_packet_ms,
            Self::Doorbells => run.doorbells_per_packet(),
        };
        (value > 0.0 && value.is_finite()).then_some(value)
    }
}

/// What may be said of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The interval excludes 1 and the median lies beyond the noise floor.
    Differs,
    NoDifference,
    TooFewPairs,
    /// Too few A/A runs on this NIC in this boot.
    NoNoiseFloor,
    /// From different boots, or from rounds that have nothing in common.
    NotInterleaved,
}

/// `mode` against `baseline` on one NIC.
#[derive(Debug, Serialize)]
pub(crate) struct Pair {
    pub(crate) nic: String,
    /// Labels, as [`Row::label`].
    pub(crate) baseline: String,
    pub(crate) mode: String,
    /// Of baseline and mode.
    pub(crate) boots: [usize; 2],
    pub(crate) metric: Metric,
    /// Number of paired ratios; 0 when not interleaved.
    pub(crate) pairs: usize,
    /// mode ÷ baseline.
    pub(crate) ratio: Interval,
    /// Noise floor that the median had to pass.
    pub(crate) noise: Option<f64>,
    pub(crate) verdict: Verdict,
    pub(crate) sentence: String,
}

/// One mode against itself.
#[derive(Debug, Serialize)]
pub(crate) struct Noise {
    pub(crate) boot: usize,
    pub(crate) nic: String,
    pub(crate) metric: Metric,
    pub(crate) pairs: usize,
    pub(crate) ratio: Interval,
    /// Farther end of the interval from 1: 0.021 reads "±2.1 %".
    pub(crate) floor: f64,
}

/// Rate of one kind of NIC without a forwarder: no mode can pass it on that machine.
#[derive(Debug, Serialize)]
pub(crate) struct CeilingRow {
    pub(crate) nic: String,
    pub(crate) boot: usize,
    pub(crate) rounds: usize,
    pub(crate) pps: Interval,
}

/// DMA map and unmap of a region, medians over the rounds.
#[derive(Debug, Serialize)]
pub(crate) struct MapRow {
    pub(crate) mode: String,
    pub(crate) boot: usize,
    #[serde(skip)]
    pub(crate) label: String,
    pub(crate) memory: String,
    pub(crate) call: String,
    pub(crate) bytes: u64,
    pub(crate) rounds: usize,
    pub(crate) map_ms_per_gib: Interval,
    pub(crate) unmap_ms_per_gib: Interval,
    pub(crate) map_ioctls: u64,
    /// Our map call ÷ its bare ioctls; none in recordings that did not time them.
    pub(crate) map_over_ioctl: Option<Interval>,
    pub(crate) unmap_ioctls: u64,
}

impl Comparison {
    /// Merges recordings, one per boot.
    pub(crate) fn of(recordings: &[Recording]) -> Self {
        let noise_floor = noise_floor(recordings);
        let rows = rows(recordings);
        Self {
            environment: recordings.iter().map(|r| r.environment.clone()).collect(),
            pairs: pairs(recordings, &rows, &noise_floor),
            maps: map_rows(recordings),
            null_forwarder: ceiling_rows(recordings),
            problems: problems(recordings),
            rows,
            noise_floor,
        }
    }
}

fn ceiling_rows(recordings: &[Recording]) -> Vec<CeilingRow> {
    let mut groups: BTreeMap<_, Vec<&Ceiling>> = BTreeMap::new();
    for (boot, recording) in numbered(recordings) {
        for ceiling in &recording.ceilings {
            groups.entry((place(&NICS, &ceiling.nic), boot)).or_default().push(ceiling);
        }
    }
    groups
        .into_iter()
        .map(|(((_, nic), boot), ceilings)| CeilingRow {
            nic: nic.to_owned(),
            boot,
            rounds: ceilings.len(),
            pps: interval(&ceilings, |ceiling| ceiling.pps),
        })
        .collect()
}

fn per_gib(ms: f64, bytes: u64) -> f64 {
    if bytes == 0 { 0.0 } else { ms * (1u64 << 30) as f64 / bytes as f64 }
}

fn mid<T>(runs: &[&T], value: impl Fn(&T) -> f64) -> f64 {
    median(&runs.iter().map(|r| value(r)).collect::<Vec<_>>()).unwrap_or(0.0)
}

fn interval<T>(runs: &[&T], value: impl Fn(&T) -> f64) -> Interval {
    let values: Vec<f64> = runs.iter().map(|r| value(r)).collect();
    Interval::of(&values).unwrap_or(Interval { median: 0.0, low: 0.0, high: 0.0 })
}

/// The mode, with its boot where `all`, the modes with their boots, have it in several.
fn label(mode: &str, boot: usize, all: &[(&str, usize)]) -> String {
    let several = all.iter().any(|(m, b)| *m == mode && *b != boot);
    if several { format!("{mode} (boot {boot})") } else { mode.to_owned() }
}

fn numbered(recordings: &[Recording]) -> impl Iterator<Item = (usize, &Recording)> {
    (1..).zip(recordings)
}

fn rows(recordings: &[Recording]) -> Vec<Row> {
    let mut groups: BTreeMap<_, Vec<&Run>> = BTreeMap::new();
    for (boot, recording) in numbered(recordings) {
        for run in &recording.runs {
            let key = (place(&NICS, &run.nic), place(&MODES, &run.mode), boot);
            groups.entry(key).or_default().push(run);
        }
    }
    let all: Vec<_> = groups.keys().map(|(_, mode, boot)| (mode.1, *boot)).collect();
    groups.iter().map(|((_, mode, boot), runs)| row(runs, *boot, label(mode.1, *boot, &all))).collect()
}

fn row(all: &[&Run], boot: usize, label: String) -> Row {
    // The A/A runs of one mode come first, in another state of the machine: they would shift its medians alone.
    let compared: Vec<&Run> = all.iter().copied().filter(|run| run.pair != Run::NOISE).collect();
    let runs = if compared.is_empty() { all } else { &compared };
    let sum = |value: fn(&Run) -> u64| runs.iter().fold(0u64, |sum, run| sum.saturating_add(value(run)));
    let largest = |value: fn(&Run) -> u64| runs.iter().map(|run| value(run)).max().unwrap_or(0);
    let mut drops = BTreeMap::<String, u64>::new();
    for (name, n) in runs.iter().flat_map(|run| &run.drops) {
        let total = drops.entry(name.clone()).or_default();
        *total = total.saturating_add(*n);
    }
    let forward = interval(runs, |r| r.forward_pps);
    Row {
        mode: runs[0].mode.clone(),
        nic: runs[0].nic.clone(),
        boot,
        label,
        rounds: runs.len(),
        forward_pps: forward.median,
        forward_pps_interval: forward,
        latency_ns: Latency {
            p50: mid(runs, |r| r.latency_ns.p50 as f64) as u64,
            p99: mid(runs, |r| r.latency_ns.p99 as f64) as u64,
            p999: mid(runs, |r| r.latency_ns.p999 as f64) as u64,
            max: largest(|r| r.latency_ns.max),
            count: sum(|r| r.latency_ns.count),
        },
        open_ms: mid(runs, |r| r.open_ms),
        bind_ms: mid(runs, |r| r.bind_ms),
        attach_step_ms: mid(runs, |r| r.attach_ms),
        attach_ms: mid(runs, Run::acquire_ms),
        start_map_ms: mid(runs, |r| r.start_map_ms),
        map_ms_per_gib: mid(runs, |r| per_gib(r.map_ms, r.map_bytes)),
        map_bytes: largest(|r| r.map_bytes),
        map_ioctls: largest(|r| r.map_ioctls),
        unmap_ms_per_gib: mid(runs, |r| per_gib(r.unmap_ms, r.map_bytes)),
        first_packet_ms: mid(runs, |r| r.first_packet_ms),
        doorbells_per_packet: mid(runs, Run::doorbells_per_packet),
        sent: sum(|r| r.sent),
        received: sum(|r| r.received),
        dropped: sum(Run::dropped),
        drops,
        balanced: all.iter().all(|run| run.imbalance().is_none()),
    }
}

fn problems(recordings: &[Recording]) -> Vec<String> {
    let runs = numbered(recordings).flat_map(|(boot, r)| r.runs.iter().map(move |run| (boot, run)));
    runs.filter_map(|(boot, run)| {
        let Run { nic, mode, round, pair, .. } = run;
        Some(format!("{nic}, {mode}, boot {boot}, {pair}, round {round}: {}", run.imbalance()?))
    })
    .collect()
}

fn noise_floor(recordings: &[Recording]) -> Vec<Noise> {
    let mut floors = Vec::new();
    for (boot, recording) in numbered(recordings) {
        let mut groups: BTreeMap<_, BTreeMap<(&str, u32), Vec<&Run>>> = BTreeMap::new();
        for run in recording.runs.iter().filter(|run| run.pair == Run::NOISE) {
            let rounds = groups.entry(place(&NICS, &run.nic)).or_default();
            rounds.entry((&run.mode, run.round)).or_default().push(run);
        }
        for ((_, nic), rounds) in &groups {
            for metric in Metric::ALL {
                let couples = rounds.values().flat_map(|runs| runs.chunks_exact(2)).enumerate();
                // Every second one is turned round, as in A B B A, so that drift cancels here as it does there.
                let ratios: Vec<f64> = couples
                    .filter_map(|(i, couple)| {
                        let (first, second) = (metric.of(couple[0])?, metric.of(couple[1])?);
                        Some(if i % 2 == 0 { second / first } else { first / second })
                    })
                    .collect();
                let Some(ratio) = Interval::of(&ratios) else { continue };
                let (nic, floor) = ((*nic).to_owned(), ratio.reach());
                floors.push(Noise { boot, nic, metric, pairs: ratios.len(), ratio, floor });
            }
        }
    }
    floors
}

fn pairs(recordings: &[Recording], rows: &[Row], noise: &[Noise]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (i, a) in rows.iter().enumerate() {
        for b in rows[i + 1..].iter().filter(|b| b.nic == a.nic && b.mode != a.mode) {
            let meets = |x: &Row, y: &Row| {
                rows.iter().any(|r| r.nic == x.nic && r.mode == y.mode && r.boot == x.boot)
            };
            // Two modes that met in one boot need no comparison across boots.
            if a.boot != b.boot && (meets(a, b) || meets(b, a)) {
                continue;
            }
            pairs.extend(Metric::ALL.iter().filter_map(|metric| pair(recordings, a, b, *metric, noise)));
        }
    }
    pairs
}

fn pair(recordings: &[Recording], a: &Row, b: &Row, metric: Metric, noise: &[Noise]) -> Option<Pair> {
    let runs_of = |row: &Row| {
        let (nic, mode) = (row.nic.clone(), row.mode.clone());
        let runs = recordings[row.boot - 1].runs.iter();
        runs.filter(move |run| run.nic == nic && run.mode == mode && run.pair != Run::NOISE)
    };
    let ratios = if a.boot == b.boot { paired_ratios(runs_of(a), runs_of(b), metric) } else { Vec::new() };
    let enough =
        |n: &&Noise| n.boot == a.boot && n.nic == a.nic && n.metric == metric && n.pairs >= FEWEST_PAIRS;
    let floor = noise.iter().find(enough).map(|n| n.floor);
    let ratio = Interval::of(&ratios).or_else(|| {
        let values = |row| runs_of(row).filter_map(|run| metric.of(run)).collect::<Vec<_>>();
        Interval::of_unpaired(&values(a), &values(b))
    })?;
    let verdict = match floor {
        _ if ratios.is_empty() => Verdict::NotInterleaved,
        _ if ratios.len() < FEWEST_PAIRS => Verdict::TooFewPairs,
        None => Verdict::NoNoiseFloor,
        Some(floor) if ratio.excludes_one() && (ratio.median - 1.0).abs() > floor => Verdict::Differs,
        Some(_) => Verdict::NoDifference,
    };
    let mut pair = Pair {
        nic: a.nic.clone(),
        baseline: a.label.clone(),
        mode: b.label.clone(),
        boots: [a.boot, b.boot],
        metric,
        pairs: ratios.len(),
        ratio,
        noise: floor.filter(|_| verdict != Verdict::NotInterleaved),
        verdict,
        sentence: String::new(),
    };
    pair.sentence = crate::words::sentence(&pair);
    Some(pair)
}

/// Ratios b ÷ a of runs of the same comparison and round: in A B B A the first A with the first B, then the
/// second A with the second B.
fn paired_ratios<'a>(
    a: impl Iterator<Item = &'a Run>,
    b: impl Iterator<Item = &'a Run>,
    metric: Metric,
) -> Vec<f64> {
    let mut rounds: BTreeMap<(&str, u32), [Vec<Option<f64>>; 2]> = BTreeMap::new();
    for (side, run) in a.map(|run| (0, run)).chain(b.map(|run| (1, run))) {
        rounds.entry((&run.pair, run.round)).or_default()[side].push(metric.of(run));
    }
    let couples = rounds.values().flat_map(|[a, b]| a.iter().zip(b));
    couples.filter_map(|(a, b)| Some((*b)? / (*a)?)).collect()
}

fn map_rows(recordings: &[Recording]) -> Vec<MapRow> {
    let mut groups: BTreeMap<_, Vec<&MapTime>> = BTreeMap::new();
    for (boot, recording) in numbered(recordings) {
        for map in &recording.maps {
            let memory = place(&["4 KiB", "2 MiB", "1 GiB"], &map.memory);
            let key = (memory, &map.call, place(&MODES, &map.mode), boot, map.bytes);
            groups.entry(key).or_default().push(map);
        }
    }
    let all: Vec<_> = groups.keys().map(|key| (key.2.1, key.3)).collect();
    let row = |maps: &[&MapTime], boot| MapRow {
        mode: maps[0].mode.clone(),
        boot,
        label: label(&maps[0].mode, boot, &all),
        memory: maps[0].memory.clone(),
        call: maps[0].call.clone(),
        bytes: maps[0].bytes,
        rounds: maps.len(),
        map_ms_per_gib: interval(maps, |m| per_gib(m.map_ms, m.bytes)),
        unmap_ms_per_gib: interval(maps, |m| per_gib(m.unmap_ms, m.bytes)),
        map_ioctls: maps.iter().map(|m| m.map_ioctls).max().unwrap_or(0),
        map_over_ioctl: (maps.iter().all(|m| m.map_ioctl_ms > 0.0))
            .then(|| interval(maps, |m| m.map_ms / m.map_ioctl_ms)),
        unmap_ioctls: maps.iter().map(|m| m.unmap_ioctls).max().unwrap_or(0),
    };
    groups.iter().map(|(key, maps)| row(maps, key.3)).collect()
}
