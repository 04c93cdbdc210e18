//! What `run` writes and `report` reads: one recording per boot.

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
    /// Where it was measured.
    pub(crate) environment: Environment,
    /// How; none in recordings of Vireo before 0.2, whose rounds had a fixed order.
    #[serde(default)]
    pub(crate) plan: Option<Plan>,
    /// In the order in which they were run.
    pub(crate) runs: Vec<Run>,
    /// DMA map and unmap of a region.
    #[serde(default)]
    pub(crate) maps: Vec<MapTime>,
    /// What the NICs do without a forwarder.
    #[serde(default)]
    pub(crate) ceilings: Vec<Ceiling>,
    /// Why it ended after the rounds that it has; none if it did not end in order.
    #[serde(default)]
    pub(crate) end: Option<String>,
}

/// What a recording was asked to do.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Plan {
    /// Names of the modes.
    pub(crate) modes: Vec<String>,
    /// Names of the references; none in recordings of Vireo before 0.2.
    #[serde(default)]
    pub(crate) references: Vec<String>,
    /// The order of each round is drawn from it.
    pub(crate) seed: u64,
    /// Rounds at least.
    pub(crate) rounds: u32,
    /// After these, rounds are added until each interval is as narrow as this: 0.05 reads "5 % up and down".
    pub(crate) width: f64,
    /// Or until the recording has taken so many seconds.
    pub(crate) limit: f64,
    /// Length of a stream, in seconds.
    pub(crate) stream: f64,
    /// Length of a trial of the search for the throughput, in seconds.
    #[serde(default)]
    pub(crate) trial: f64,
    /// Bytes of the frames; rate and latency are of the first size, the throughput of each.
    #[serde(default)]
    pub(crate) frames: Vec<usize>,
    /// Loss at which the throughput is stated, as a part of the frames sent.
    #[serde(default)]
    pub(crate) loss: f64,
    /// Load at which latency is measured, as a part of the rate.
    #[serde(default)]
    pub(crate) load: f64,
    /// Size of the region that is mapped, in MiB.
    pub(crate) map_mib: u32,
}

/// One stream from a sender straight to the NIC that its wire ends at.
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
    /// Value of a key, if it was recorded.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The first fact that tells that `other` is of another machine.
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
    /// [`Run::COMPARED`]; [`Run::TWIN`] for a second run of a mode in the round, which is compared with the first; or
    /// [`Run::REFERENCE`] for a forwarder that is not Vireo's, which is compared with nothing.
    pub(crate) pair: String,
    /// Packets forwarded per second.
    pub(crate) forward_pps: f64,
    /// Highest loads at the plan's loss, one for each size of frame; none in recordings of Vireo before 0.2.
    #[serde(default)]
    pub(crate) throughput: Vec<Throughput>,
    /// Latency from sender to receiver; without values where an external generator measures it.
    pub(crate) latency_ns: Latency,
    /// All of its values, each with its count; none in recordings of Vireo before 0.2.
    #[serde(default)]
    pub(crate) latency_counts: Vec<(u64, u64)>,
    /// Opening group and container, or cdev and iommufd.
    pub(crate) open_ms: f64,
    /// `VFIO_DEVICE_BIND_IOMMUFD`; 0 where the mode has no such step.
    pub(crate) bind_ms: f64,
    /// Attaching to the I/O page table; 0 where the mode has none.
    pub(crate) attach_ms: f64,
    /// Mapping the forwarder's own memory.
    #[serde(default)]
    pub(crate) start_map_ms: f64,
    /// From the start of `open` to the first packet forwarded: the phases above are part of it.
    pub(crate) first_packet_ms: f64,
    /// Packets that the generator sent.
    pub(crate) sent: u64,
    /// Packets that came back.
    pub(crate) received: u64,
    /// Doorbell writes of the forwarder: a count, where rates drown in noise.
    #[serde(default)]
    pub(crate) doorbells: u64,
    /// What the forwarder's CPU and the IOMMU counted while `forward_pps` was measured, by event; none where they do not count.
    #[serde(default)]
    pub(crate) counters: BTreeMap<String, u64>,
    /// Packets forwarded meanwhile.
    #[serde(default)]
    pub(crate) counted_packets: u64,
    /// Counters of lost packets by name, each counted where the packet was lost.
    pub(crate) drops: BTreeMap<String, u64>,
    /// What the machine did besides.
    #[serde(default)]
    pub(crate) machine: Option<Machine>,
}

impl Run {
    /// [`Run::pair`] of the run of each mode in each round.
    pub(crate) const COMPARED: &str = "modes";
    /// [`Run::pair`] of the one that is more.
    pub(crate) const TWIN: &str = "A/A";
    /// [`Run::pair`] of a forwarder that is not Vireo's.
    pub(crate) const REFERENCE: &str = "reference";

    /// Whether the forwarder was not Vireo's.
    pub(crate) fn is_reference(&self) -> bool {
        self.pair == Self::REFERENCE
    }

    /// Sum of the named counters.
    pub(crate) fn dropped(&self) -> u64 {
        self.drops.values().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Doorbell writes of the forwarder for each packet that came back; 0 where none did.
    pub(crate) fn doorbells_per_packet(&self) -> f64 {
        if self.received == 0 { 0.0 } else { self.doorbells as f64 / self.received as f64 }
    }

    /// Time until the process owns the device. Modes divide it differently: the reset on opening falls into
    /// `bind` on a cdev and into `attach` in a group, so only the whole is compared.
    pub(crate) fn acquire_ms(&self) -> f64 {
        self.open_ms + self.bind_ms + self.attach_ms
    }

    /// Frames of the search for the throughput that did not come back in time. Such a stream has no window, so that some are
    /// lost between the NICs, in a switch or in QEMU's queue of 10,000 frames, where no counter of a NIC sees them.
    fn lost_in_trials(&self) -> u64 {
        let trials = self.throughput.iter().flat_map(|found| &found.trials);
        trials.map(|trial| trial.sent.saturating_sub(trial.received)).sum()
    }

    /// What is wrong with the packet counts, if anything.
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

/// Highest load of which no more than a stated part was lost.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Throughput {
    /// Bytes of a frame without frame check sequence.
    pub(crate) frame: usize,
    /// Frames sent per second; 0 if every load lost more.
    pub(crate) pps: f64,
    /// Whether the generator could not send more, so that the throughput may be higher.
    pub(crate) at_least: bool,
    /// In the order in which they were tried.
    pub(crate) trials: Vec<Trial>,
}

/// A load that was offered for some time.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Trial {
    /// Frames that were to be sent per second.
    pub(crate) load: f64,
    /// Frames sent per second.
    pub(crate) pps: f64,
    /// Frames sent.
    pub(crate) sent: u64,
    /// Frames that came back in time.
    pub(crate) received: u64,
}

impl Trial {
    /// Part of the frames that did not come back.
    pub(crate) fn loss(&self) -> f64 {
        if self.sent == 0 { 0.0 } else { 1.0 - self.received as f64 / self.sent as f64 }
    }
}

/// How much of itself the machine gave to a run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Machine {
    /// Steps per microsecond of a loop of additions, just before the run.
    pub(crate) speed: f64,
    /// Time that a hypervisor gave to others (`steal` of `/proc/stat`), in milliseconds, on all CPUs.
    pub(crate) steal_ms: f64,
    /// Time in which some thread waited for a CPU (`/proc/pressure/cpu`), in milliseconds.
    pub(crate) pressure_ms: f64,
    /// How often a thread of this process lost its CPU to another.
    pub(crate) preemptions: u64,
}

/// Percentiles of one run's latency, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct Latency {
    /// Median.
    pub(crate) p50: u64,
    /// 99 %.
    pub(crate) p99: u64,
    /// 99.9 %.
    pub(crate) p999: u64,
    /// Largest.
    pub(crate) max: u64,
    /// Samples behind them.
    pub(crate) count: u64,
}

impl From<&Histogram<u64>> for Latency {
    fn from(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: histogram.max(), count: histogram.len() }
    }
}

/// One map and unmap of a region of memory, without a NIC's traffic.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub(crate) struct MapTime {
    /// Name of the VFIO mode.
    pub(crate) mode: String,
    /// Page size of the memory: `4 KiB`, `2 MiB`.
    pub(crate) memory: String,
    /// `map` or `map-file`.
    pub(crate) call: String,
    /// Size of the region.
    pub(crate) bytes: u64,
    /// Number of the round, from 0.
    pub(crate) round: u32,
    /// Mapping all of it.
    pub(crate) map_ms: f64,
    /// The ioctls' part of that.
    #[serde(default)]
    pub(crate) map_ioctl_ms: f64,
    /// Unmapping all of it.
    pub(crate) unmap_ms: f64,
    /// Calls that the mapping took.
    pub(crate) map_ioctls: u64,
    /// Calls that the unmapping took.
    pub(crate) unmap_ioctls: u64,
}
