//! Merges recordings of several boots into rows, pairs of modes and a DMA map table.

mod disturbances;
mod pairs;

use std::collections::{BTreeMap, BTreeSet};

use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;

use crate::record::{Ceiling, Environment, Latency, MapTime, Recording, Run, Throughput};
use crate::stats::{Interval, median};
use crate::words::{distinct, list, round};

pub(crate) use pairs::{Family, Metric, Pair, SelfCheck, Verdict};

const NICS: [&str; 3] = ["virtio-net", "e1000", "e1000e"];
const PAGES: [&str; 3] = ["4 KiB", "2 MiB", "1 GiB"];
/// All modes, in table order. In a pair, the earlier mode is the baseline.
pub(crate) const MODES: [&str; 5] = ["container", "cdev", "compat", "noiommu", "noiommu-cdev"];

/// Sort key of a NIC or mode in tables. Unknown names come last, in alphabetical order.
fn place<'a>(known: &[&str], name: &'a str) -> (usize, &'a str) {
    (known.iter().position(|k| *k == name).unwrap_or(known.len()), name)
}

/// Comparison of all recordings.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Comparison {
    /// Environment of each boot. Fields named `boot` are 1-based indices into this list.
    #[serde(skip)]
    pub(crate) environment: Vec<Environment>,
    /// Why each recording ended when it did.
    pub(crate) ends: Vec<String>,
    pub(crate) family: Family,
    pub(crate) rows: Vec<Row>,
    /// Forwarders other than Vireo's, on the same NICs. They are in no pair.
    pub(crate) references: Vec<Row>,
    pub(crate) pairs: Vec<Pair>,
    pub(crate) self_checks: Vec<SelfCheck>,
    pub(crate) maps: Vec<MapRow>,
    pub(crate) null_forwarder: Vec<CeilingRow>,
    /// Sentences about where the generator may have been the limit.
    pub(crate) generator_limits: Vec<String>,
    /// Sentences about what else the machine did. The report writes them next to the comparison.
    #[serde(skip)]
    pub(crate) disturbances: Vec<String>,
    /// Runs whose packet counts do not add up. Empty in a sound comparison.
    pub(crate) problems: Vec<String>,
}

/// Results of one NIC in one mode or with one reference: medians over the rounds, and sums of packet counts.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Row {
    pub(crate) mode: String,
    pub(crate) nic: String,
    pub(crate) boot: usize,
    /// The mode, with its boot if the same mode ran in several boots.
    #[serde(skip)]
    pub(crate) label: String,
    /// Whether the forwarder is a reference and not Vireo's.
    #[serde(skip)]
    pub(crate) reference: bool,
    pub(crate) rounds: usize,
    pub(crate) forward_pps: f64,
    /// Interval of the median rate. Its 95 % confidence applies to this row alone.
    pub(crate) forward_pps_interval: Option<Interval>,
    /// Rate of each round.
    #[serde(skip)]
    pub(crate) forward_samples: Vec<f64>,
    pub(crate) throughput: Vec<ThroughputRow>,
    /// Percentiles over the packets of all rounds together.
    pub(crate) latency_ns: Latency,
    pub(crate) open_ms: f64,
    pub(crate) bind_ms: f64,
    pub(crate) attach_step_ms: f64,
    /// Time to open, bind and attach.
    pub(crate) attach_ms: f64,
    /// Time to map the forwarder's own memory; 0 if the mode maps nothing.
    pub(crate) start_map_ms: f64,
    pub(crate) first_packet_ms: f64,
    pub(crate) doorbells_per_packet: f64,
    /// Counts of the CPU and the IOMMU per packet, by event: medians over the rounds.
    pub(crate) counters_per_packet: BTreeMap<String, f64>,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// Sum of `drops`. Never computed as a difference.
    pub(crate) dropped: u64,
    pub(crate) drops: BTreeMap<String, u64>,
    /// Whether every run of this row received packets and sent = received + dropped, except for frames lost
    /// in throughput trials.
    pub(crate) balanced: bool,
}

impl Row {
    /// Returns whether the packets add up as far as required. References may lose packets without counting
    /// them.
    pub(crate) fn is_sound(&self) -> bool {
        self.balanced || self.reference
    }

    /// Packets lost where no counter sees them: between the NICs during the throughput search, or in a
    /// reference.
    pub(crate) fn uncounted(&self) -> u64 {
        self.sent.saturating_sub(self.received.saturating_add(self.dropped))
    }
}

/// Highest load with frames of one size whose loss is within a stated limit.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ThroughputRow {
    /// Frame size in bytes, without the frame check sequence.
    pub(crate) frame: usize,
    /// Highest loss at which a load still counts, as a fraction of the frames sent.
    pub(crate) loss: f64,
    /// Median over the rounds, in frames per second.
    pub(crate) pps: f64,
    /// Number of rounds in which the generator could not send more.
    pub(crate) at_least: usize,
}

/// Rate of one kind of NIC without a forwarder. No mode can exceed it on that machine.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CeilingRow {
    pub(crate) nic: String,
    pub(crate) boot: usize,
    pub(crate) rounds: usize,
    pub(crate) pps: f64,
    pub(crate) pps_interval: Option<Interval>,
}

/// DMA map and unmap of a region: medians over the rounds.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct MapRow {
    pub(crate) mode: String,
    pub(crate) boot: usize,
    #[serde(skip)]
    pub(crate) label: String,
    pub(crate) memory: String,
    pub(crate) call: String,
    pub(crate) bytes: u64,
    pub(crate) rounds: usize,
    pub(crate) map_ms_per_gib: f64,
    /// Map and unmap times per GiB of each round.
    #[serde(skip)]
    pub(crate) samples: [Vec<f64>; 2],
    pub(crate) unmap_ms_per_gib: f64,
    pub(crate) map_ioctls: u64,
    /// Vireo's map call ÷ its ioctls alone; `None` if a recording did not time the ioctls.
    pub(crate) map_over_ioctl: Option<f64>,
    pub(crate) unmap_ioctls: u64,
}

impl Comparison {
    /// Merges recordings, one per boot. Modes count as equal if the interval of their ratio lies within
    /// `margin` of 1.
    pub(crate) fn of(recordings: &[Recording], margin: f64) -> Self {
        let (family, pairs, self_checks) = pairs::judge(recordings, margin);
        let null_forwarder = ceiling_rows(recordings);
        let (rows, references) =
            (rows(recordings, |run| !run.is_reference()), rows(recordings, Run::is_reference));
        let end = |recording: &Recording| recording.end.clone().unwrap_or_else(|| "not known".to_owned());
        Self {
            environment: recordings.iter().map(|r| r.environment.clone()).collect(),
            ends: recordings.iter().map(end).collect(),
            family,
            generator_limits: generator_limits(rows.iter().chain(&references), &null_forwarder),
            rows,
            references,
            pairs,
            self_checks,
            maps: map_rows(recordings),
            null_forwarder,
            disturbances: disturbances::of(recordings),
            problems: problems(recordings),
        }
    }

    /// Rows of modes and references together, sorted by NIC.
    pub(crate) fn forwarders(&self) -> Vec<&Row> {
        let mut all: Vec<&Row> = self.rows.iter().chain(&self.references).collect();
        all.sort_by_key(|row| place(&NICS, &row.nic));
        all
    }

    /// Frame sizes of the throughput search, each with its loss limit.
    pub(crate) fn frames(&self) -> Vec<(usize, f64)> {
        distinct(self.rows.iter().flat_map(|row| &row.throughput).map(|found| (found.frame, found.loss)))
    }

    /// Half-width of the widest interval, relative to its ratio: 0.05 is ±5 %. Infinite if a pair has no
    /// interval, `None` if no modes are compared.
    pub(crate) fn widest(&self) -> Option<f64> {
        let reach = |pair: &Pair| {
            pair.interval.map_or(f64::INFINITY, |Interval { low, high }| (high / low).sqrt() - 1.0)
        };
        let unpaired = [Verdict::NotInterleaved, Verdict::Censored];
        let judged = self.pairs.iter().filter(|pair| !unpaired.contains(&pair.verdict));
        judged.map(reach).max_by(f64::total_cmp)
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
            pps: mid(&ceilings, |ceiling| ceiling.pps),
            pps_interval: Interval::of_median(&values(&ceilings, |ceiling| ceiling.pps)),
        })
        .collect()
}

/// A forwarder that reaches this fraction of the rate without a forwarder may be faster than the generator.
const NEAR_CEILING: f64 = 0.9;

/// Returns one sentence per NIC on which modes are about as fast as the generator.
fn generator_limits<'a>(rows: impl Iterator<Item = &'a Row> + Clone, ceilings: &[CeilingRow]) -> Vec<String> {
    let limit = |ceiling: &CeilingRow| {
        let near = rows.clone().filter(|row| {
            (row.boot, &row.nic) == (ceiling.boot, &ceiling.nic)
                && row.forward_pps >= NEAR_CEILING * ceiling.pps
        });
        let modes: Vec<&str> = near.map(|row| row.label.as_str()).collect();
        (!modes.is_empty()).then(|| {
            format!(
                "{}: the rate of {} is at least {} % of what the sender and the receiver reach without a forwarder, so they \
                 may be the limit",
                ceiling.nic,
                list(&modes),
                round(NEAR_CEILING)
            )
        })
    };
    ceilings.iter().filter_map(limit).collect()
}

fn per_gib(ms: f64, bytes: u64) -> f64 {
    if bytes == 0 { 0.0 } else { ms * (1u64 << 30) as f64 / bytes as f64 }
}

fn values<T>(of: &[&T], value: impl Fn(&T) -> f64) -> Vec<f64> {
    of.iter().map(|one| value(one)).collect()
}

fn mid<T>(of: &[&T], value: impl Fn(&T) -> f64) -> f64 {
    median(&values(of, value)).unwrap_or(0.0)
}

/// Labels that distinguish modes of several boots.
struct Labels<'a>(BTreeSet<(&'a str, usize)>);

impl<'a> Labels<'a> {
    fn of(modes: impl Iterator<Item = (&'a str, usize)>) -> Self {
        Self(modes.collect())
    }

    /// Returns the mode, with its boot if the mode also ran in another boot.
    fn label(&self, mode: &str, boot: usize) -> String {
        let several = self.0.iter().any(|(m, b)| *m == mode && *b != boot);
        if several { format!("{mode} (boot {boot})") } else { mode.to_owned() }
    }
}

fn numbered(recordings: &[Recording]) -> impl Iterator<Item = (usize, &Recording)> {
    (1..).zip(recordings)
}

fn rows(recordings: &[Recording], wanted: impl Fn(&Run) -> bool) -> Vec<Row> {
    let mut groups: BTreeMap<_, Vec<&Run>> = BTreeMap::new();
    for (boot, recording) in numbered(recordings) {
        for run in recording.runs.iter().filter(|run| wanted(run)) {
            let key = (place(&NICS, &run.nic), place(&MODES, &run.mode), boot);
            groups.entry(key).or_default().push(run);
        }
    }
    let labels = Labels::of(groups.keys().map(|(_, mode, boot)| (mode.1, *boot)));
    let plan = |boot: usize| recordings[boot - 1].plan.as_ref();
    let row = |((_, mode, boot), runs): (&(_, (usize, &str), usize), &Vec<&Run>)| {
        row(runs, *boot, labels.label(mode.1, *boot), plan(*boot).map_or(0.0, |plan| plan.loss))
    };
    groups.iter().map(row).collect()
}

fn row(all: &[&Run], boot: usize, label: String, loss: f64) -> Row {
    let compared: Vec<&Run> = all.iter().copied().filter(|run| run.pair != Run::TWIN).collect();
    let runs = if compared.is_empty() { all } else { &compared };
    let sum = |value: fn(&Run) -> u64| runs.iter().fold(0u64, |sum, run| sum.saturating_add(value(run)));
    let mut drops = BTreeMap::<String, u64>::new();
    for (name, n) in runs.iter().flat_map(|run| &run.drops) {
        let total = drops.entry(name.clone()).or_default();
        *total = total.saturating_add(*n);
    }
    let forward = values(runs, |r| r.forward_pps);
    Row {
        mode: runs[0].mode.clone(),
        nic: runs[0].nic.clone(),
        boot,
        label,
        reference: runs[0].is_reference(),
        rounds: runs.len(),
        forward_pps: median(&forward).unwrap_or(0.0),
        forward_pps_interval: Interval::of_median(&forward),
        forward_samples: forward,
        throughput: throughput_rows(runs, loss),
        latency_ns: merged(runs).unwrap_or_else(|| Latency {
            p50: mid(runs, |r| r.latency_ns.p50 as f64) as u64,
            p99: mid(runs, |r| r.latency_ns.p99 as f64) as u64,
            p999: mid(runs, |r| r.latency_ns.p999 as f64) as u64,
            max: runs.iter().map(|run| run.latency_ns.max).max().unwrap_or(0),
            count: sum(|r| r.latency_ns.count),
        }),
        open_ms: mid(runs, |r| r.open_ms),
        bind_ms: mid(runs, |r| r.bind_ms),
        attach_step_ms: mid(runs, |r| r.attach_ms),
        attach_ms: mid(runs, Run::acquire_ms),
        start_map_ms: mid(runs, |r| r.start_map_ms),
        first_packet_ms: mid(runs, |r| r.first_packet_ms),
        doorbells_per_packet: mid(runs, Run::doorbells_per_packet),
        counters_per_packet: counters(runs),
        sent: sum(|r| r.sent),
        received: sum(|r| r.received),
        dropped: sum(Run::dropped),
        drops,
        balanced: all.iter().all(|run| run.imbalance().is_none()),
    }
}

fn counters(runs: &[&Run]) -> BTreeMap<String, f64> {
    let names: BTreeSet<&String> = runs.iter().flat_map(|run| run.counters.keys()).collect();
    let per_packet = |run: &Run, name| {
        run.counters.get(name).copied().unwrap_or_default() as f64 / run.counted_packets.max(1) as f64
    };
    names.into_iter().map(|name| (name.clone(), mid(runs, |run| per_packet(run, name)))).collect()
}

fn throughput_rows(runs: &[&Run], loss: f64) -> Vec<ThroughputRow> {
    let mut frames: BTreeMap<usize, Vec<&Throughput>> = BTreeMap::new();
    for found in runs.iter().flat_map(|run| &run.throughput) {
        frames.entry(found.frame).or_default().push(found);
    }
    let row = |(frame, found): (usize, Vec<&Throughput>)| ThroughputRow {
        frame,
        loss,
        pps: mid(&found, |found| found.pps),
        at_least: found.iter().filter(|found| found.at_least).count(),
    };
    frames.into_iter().map(row).collect()
}

/// Percentiles over the packets of all `runs` together; `None` if a run has no histogram.
fn merged(runs: &[&Run]) -> Option<Latency> {
    let mut all = Histogram::<u64>::new(3).ok()?;
    for run in runs {
        if run.latency_counts.is_empty() {
            return None;
        }
        for (value, count) in &run.latency_counts {
            all.record_n(*value, *count).ok()?;
        }
    }
    Some(Latency::from(&all))
}

fn problems(recordings: &[Recording]) -> Vec<String> {
    let runs = numbered(recordings).flat_map(|(boot, r)| r.runs.iter().map(move |run| (boot, run)));
    // A reference that does not count its losses does not invalidate the comparison.
    runs.filter(|(_, run)| !run.is_reference())
        .filter_map(|(boot, run)| {
            let Run { nic, mode, round, pair, .. } = run;
            Some(format!("{nic}, {mode}, boot {boot}, {pair}, round {round}: {}", run.imbalance()?))
        })
        .collect()
}

fn map_rows(recordings: &[Recording]) -> Vec<MapRow> {
    let mut groups: BTreeMap<_, Vec<&MapTime>> = BTreeMap::new();
    for (boot, recording) in numbered(recordings) {
        for map in &recording.maps {
            let memory = place(&PAGES, &map.memory);
            let key = (memory, &map.call, place(&MODES, &map.mode), boot, map.bytes);
            groups.entry(key).or_default().push(map);
        }
    }
    let labels = Labels::of(groups.keys().map(|key| (key.2.1, key.3)));
    let row = |maps: &[&MapTime], boot| {
        let samples =
            [values(maps, |m| per_gib(m.map_ms, m.bytes)), values(maps, |m| per_gib(m.unmap_ms, m.bytes))];
        let [map_ms_per_gib, unmap_ms_per_gib] = [0, 1].map(|at| median(&samples[at]).unwrap_or(0.0));
        MapRow {
            mode: maps[0].mode.clone(),
            boot,
            label: labels.label(&maps[0].mode, boot),
            memory: maps[0].memory.clone(),
            call: maps[0].call.clone(),
            bytes: maps[0].bytes,
            rounds: maps.len(),
            map_ms_per_gib,
            samples,
            unmap_ms_per_gib,
            map_ioctls: maps.iter().map(|m| m.map_ioctls).max().unwrap_or(0),
            map_over_ioctl: (maps.iter().all(|m| m.map_ioctl_ms > 0.0))
                .then(|| mid(maps, |m| m.map_ms / m.map_ioctl_ms)),
            unmap_ioctls: maps.iter().map(|m| m.unmap_ioctls).max().unwrap_or(0),
        }
    };
    groups.iter().map(|(key, maps)| row(maps, key.3)).collect()
}
