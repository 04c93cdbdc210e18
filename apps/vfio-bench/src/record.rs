//! Recordings, which `run` writes and `report` reads: one recording per boot.

mod file;

use std::collections::BTreeMap;
use std::fmt;

use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(crate) use file::{Recorder, read};

/// Everything measured in one boot.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Recording {
    /// Environment of the measurements.
    pub(crate) environment: Environment,
    /// Plan of the recording; absent in recordings of Vireo before 0.2, whose rounds had a fixed order.
    #[serde(default)]
    pub(crate) plan: Option<Plan>,
    /// Runs, in the order in which they were made.
    pub(crate) runs: Vec<Run>,
    /// DMA maps and unmaps of a region.
    #[serde(default)]
    pub(crate) maps: Vec<MapTime>,
    /// Rates of the NICs without a forwarder.
    #[serde(default)]
    pub(crate) ceilings: Vec<Ceiling>,
    /// Why the recording ended when it did; absent if the recording is incomplete.
    #[serde(default)]
    pub(crate) end: Option<String>,
}

/// Parameters of a recording.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Plan {
    /// Names of the modes.
    pub(crate) modes: Vec<String>,
    /// Names of the references; empty in recordings of Vireo before 0.2.
    #[serde(default)]
    pub(crate) references: Vec<String>,
    /// Seed of the random order of each round.
    pub(crate) seed: u64,
    /// Minimum number of rounds.
    pub(crate) rounds: u32,
    /// After the minimum, rounds are added until each interval is as narrow as this: 0.05 means 5 % up and
    /// down.
    pub(crate) width: f64,
    /// Seconds after which no more rounds are added, however wide the intervals are.
    pub(crate) limit: f64,
    /// Length of a stream, in seconds.
    pub(crate) stream: f64,
    /// Length of a trial of the throughput search, in seconds.
    #[serde(default)]
    pub(crate) trial: f64,
    /// Frame sizes in bytes. Rate and latency are measured with the first size, throughput with each.
    #[serde(default)]
    pub(crate) frames: Vec<usize>,
    /// Loss at which throughput is stated, as a fraction of the frames sent.
    #[serde(default)]
    pub(crate) loss: f64,
    /// Load at which latency is measured, as a fraction of the rate.
    #[serde(default)]
    pub(crate) load: f64,
    /// Size of the mapped region, in MiB.
    pub(crate) map_mib: u32,
}

/// One stream from a sender directly to the NIC at the other end of its wire.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Ceiling {
    /// `virtio-net`, `e1000` or `e1000e`.
    pub(crate) nic: String,
    /// Number of the round, from 0.
    #[serde(default)]
    pub(crate) round: u32,
    /// Packets received per second.
    pub(crate) pps: f64,
}

/// Facts about machine, kernel and command, in the order in which a reader wants them.
#[derive(Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[schemars(with = "BTreeMap<String, String>")]
pub(crate) struct Environment(pub(crate) Vec<(String, String)>);

impl Environment {
    /// Returns the value of a key, if it was recorded.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// Returns the first fact that shows that `other` is from another machine.
    pub(crate) fn other_machine(&self, other: &Self) -> Option<String> {
        let differs = |key: &&str| self.get(key) != other.get(key);
        let key = ["host cpu", "host cpus", "cpu", "cpus", "accelerator"].into_iter().find(differs)?;
        let value = |of: &Self| of.get(key).unwrap_or("unknown").to_owned();
        Some(format!("{key} {} and {}", value(self), value(other)))
    }
}

impl Serialize for Environment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(k, v)| (k, v)))
    }
}

impl<'de> Deserialize<'de> for Environment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Environment;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Environment, M::Error> {
                let mut facts = Vec::new();
                while let Some(fact) = map.next_entry()? {
                    facts.push(fact);
                }
                Ok(Environment(facts))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// One start, stream and stop of the forwarder on one NIC in one mode.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Run {
    /// `virtio-net`, `e1000` or `e1000e`.
    pub(crate) nic: String,
    /// Name of the VFIO mode, as `--vfio-mode` takes it, or of the reference.
    pub(crate) mode: String,
    /// Number of the round, from 0.
    pub(crate) round: u32,
    /// Kind of run: [`Run::COMPARED`] for the run of each mode; [`Run::TWIN`] for a second run of a mode in
    /// the round, which is compared with the first; [`Run::REFERENCE`] for a forwarder other than Vireo's,
    /// which is compared with nothing.
    pub(crate) pair: String,
    /// Packets forwarded per second.
    pub(crate) forward_pps: f64,
    /// Highest loads at the plan's loss, one per frame size; empty in recordings of Vireo before 0.2.
    #[serde(default)]
    pub(crate) throughput: Vec<Throughput>,
    /// Latency from sender to receiver; without samples if an external generator measures it.
    pub(crate) latency_ns: Latency,
    /// All latency values, each with its count; empty in recordings of Vireo before 0.2.
    #[serde(default)]
    pub(crate) latency_counts: Vec<(u64, u64)>,
    /// Time to open group and container, or cdev and iommufd.
    pub(crate) open_ms: f64,
    /// Time to bind: `VFIO_DEVICE_BIND_IOMMUFD` on a cdev, `VFIO_GROUP_SET_CONTAINER` and `VFIO_SET_IOMMU` in
    /// a group.
    pub(crate) bind_ms: f64,
    /// Time to attach: `VFIO_DEVICE_ATTACH_IOMMUFD_PT` on a cdev, `VFIO_GROUP_GET_DEVICE_FD` in a group.
    pub(crate) attach_ms: f64,
    /// Time to map the forwarder's own memory.
    #[serde(default)]
    pub(crate) start_map_ms: f64,
    /// Time from the start of `open` to the first packet forwarded. It includes the phases above.
    pub(crate) first_packet_ms: f64,
    /// Packets that the generator sent.
    pub(crate) sent: u64,
    /// Packets that returned.
    pub(crate) received: u64,
    /// Doorbell writes of the forwarder: a count, usable where rates are too noisy.
    #[serde(default)]
    pub(crate) doorbells: u64,
    /// Events that the forwarder's CPU and the IOMMU counted while `forward_pps` was measured, by name; empty
    /// if they do not count.
    #[serde(default)]
    pub(crate) counters: BTreeMap<String, u64>,
    /// Packets forwarded while `counters` were counted.
    #[serde(default)]
    pub(crate) counted_packets: u64,
    /// Lost packets by name of the counter, each counted where the packet was lost.
    pub(crate) drops: BTreeMap<String, u64>,
    /// What else the machine did during the run.
    #[serde(default)]
    pub(crate) machine: Option<Machine>,
}

impl Run {
    /// [`Run::pair`] of the run of each mode in each round.
    pub(crate) const COMPARED: &str = "modes";
    /// [`Run::pair`] of the additional run of one mode in each round.
    pub(crate) const TWIN: &str = "A/A";
    /// [`Run::pair`] of a forwarder other than Vireo's.
    pub(crate) const REFERENCE: &str = "reference";

    /// Returns whether the forwarder is not Vireo's.
    pub(crate) fn is_reference(&self) -> bool {
        self.pair == Self::REFERENCE
    }

    /// Sum of the named counters.
    pub(crate) fn dropped(&self) -> u64 {
        self.drops.values().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Doorbell writes of the forwarder per packet that returned; 0 if none returned.
    pub(crate) fn doorbells_per_packet(&self) -> f64 {
        if self.received == 0 { 0.0 } else { self.doorbells as f64 / self.received as f64 }
    }

    /// Time until the process owns the device. Modes divide it differently: the reset on opening is part of
    /// `bind` on a cdev and of `attach` in a group. Therefore only the sum is compared.
    pub(crate) fn acquire_ms(&self) -> f64 {
        self.open_ms + self.bind_ms + self.attach_ms
    }

    /// Frames of the throughput search that did not return in time. Its streams have no window, so some
    /// frames are lost between the NICs, in a switch or in QEMU's queue of 10,000 frames, where no NIC counts
    /// them.
    fn lost_in_trials(&self) -> u64 {
        let trials = self.throughput.iter().flat_map(|found| &found.trials);
        trials.map(|trial| trial.sent.saturating_sub(trial.received)).sum()
    }

    /// Returns what is wrong with the packet counts, if anything.
    pub(crate) fn imbalance(&self) -> Option<String> {
        let accounted = self.received.saturating_add(self.dropped());
        let names = self.drops.iter().map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join(", ");
        let counts = format!(
            "sent {}, received {}, dropped {}{}",
            self.sent,
            self.received,
            self.dropped(),
            if names.is_empty() { String::new() } else { format!(" ({names})") }
        );
        match self.sent.abs_diff(accounted) {
            0 if self.received > 0 => None,
            0 => Some(format!("{counts}: nothing was received")),
            n if self.sent > accounted && n <= self.lost_in_trials() => None,
            n if self.sent > accounted => Some(format!("{counts}: {n} unaccounted for")),
            n => Some(format!("{counts}: {n} too many")),
        }
    }
}

/// Highest load of which no more than a stated fraction was lost.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Throughput {
    /// Frame size in bytes, without the frame check sequence.
    pub(crate) frame: usize,
    /// Frames sent per second; 0 if every load lost more.
    pub(crate) pps: f64,
    /// Whether the generator could not send more, so that the throughput may be higher.
    pub(crate) at_least: bool,
    /// Trials, in the order in which they were made.
    pub(crate) trials: Vec<Trial>,
}

/// A load offered for some time.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Trial {
    /// Frames to be sent per second.
    pub(crate) load: f64,
    /// Frames sent per second.
    pub(crate) pps: f64,
    /// Frames sent.
    pub(crate) sent: u64,
    /// Frames that returned in time.
    pub(crate) received: u64,
}

impl Trial {
    /// Fraction of the frames that did not return.
    pub(crate) fn loss(&self) -> f64 {
        if self.sent == 0 { 0.0 } else { 1.0 - self.received as f64 / self.sent as f64 }
    }
}

/// How much CPU time and speed the machine gave to a run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Machine {
    /// Steps per microsecond of a loop of additions, just before the run.
    pub(crate) speed: f64,
    /// Time that a hypervisor gave to others (`steal` of `/proc/stat`), in milliseconds, over all CPUs.
    pub(crate) steal_ms: f64,
    /// Time in which at least one thread waited for a CPU (`/proc/pressure/cpu`), in milliseconds.
    pub(crate) pressure_ms: f64,
    /// Number of times that a thread of this process lost its CPU to another thread.
    pub(crate) preemptions: u64,
}

/// Percentiles of one run's latency, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Latency {
    /// Median.
    pub(crate) p50: u64,
    /// 99th percentile.
    pub(crate) p99: u64,
    /// 99.9th percentile.
    pub(crate) p999: u64,
    /// Largest value.
    pub(crate) max: u64,
    /// Number of samples.
    pub(crate) count: u64,
}

impl From<&Histogram<u64>> for Latency {
    fn from(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: histogram.max(), count: histogram.len() }
    }
}

/// One map and unmap of a region of memory, without traffic.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct MapTime {
    /// Name of the VFIO mode.
    pub(crate) mode: String,
    /// Page size of the memory: `4 KiB`, `2 MiB` or `1 GiB`.
    pub(crate) memory: String,
    /// Name of the call: `map`, `map-file` or `map, huge pages off`.
    pub(crate) call: String,
    /// Size of the region in bytes.
    pub(crate) bytes: u64,
    /// Number of the round, from 0.
    pub(crate) round: u32,
    /// Time to map the whole region.
    pub(crate) map_ms: f64,
    /// Part of `map_ms` that was spent in ioctls.
    #[serde(default)]
    pub(crate) map_ioctl_ms: f64,
    /// Time to unmap the whole region.
    pub(crate) unmap_ms: f64,
    /// Number of ioctls to map the region.
    pub(crate) map_ioctls: u64,
    /// Number of ioctls to unmap the region.
    pub(crate) unmap_ioctls: u64,
}
