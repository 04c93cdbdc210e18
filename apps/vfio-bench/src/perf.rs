//! Events that the forwarder's CPU and the IOMMU count during a stream, where they have counters
//! (`perf_event_open(2)`).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use perf_event::events::{Dynamic, Hardware};
use perf_event::{Builder, Counter};

/// Events of the forwarder's thread, excluding the kernel.
const OF_THREAD: [(&str, Hardware); 3] = [
    ("instructions", Hardware::INSTRUCTIONS),
    ("cycles", Hardware::CPU_CYCLES),
    ("cache_misses", Hardware::CACHE_MISSES),
];

/// Events of an IOMMU's PMU, by the prefix of its name (`drivers/iommu/intel/perfmon.c`,
/// `arch/x86/events/amd/iommu.c`). They count all traffic, including that of other devices.
const OF_IOMMU: [(&str, &[&str]); 2] = [
    ("dmar", &["iommu_requests", "iotlb_lookup", "iotlb_hit"]),
    ("amd_iommu_", &["mem_trans_total", "mem_iommu_tlb_pte_hit", "mem_iommu_tlb_pte_mis"]),
];

/// Where the kernel lists its performance monitoring units.
const PMUS: &str = "/sys/bus/event_source/devices";

/// Running counters.
#[derive(Debug, Default)]
pub(crate) struct Counters(Vec<(String, Counter)>);

/// Counts by name, summed over IOMMUs.
pub(crate) type Counts = BTreeMap<String, u64>;

impl Counters {
    /// Starts the counters of the calling thread and of all IOMMUs that this machine has and this process may
    /// read.
    pub(crate) fn begin() -> Self {
        let thread = OF_THREAD.into_iter().map(|(name, event)| (name.to_owned(), of_thread(event)));
        let iommus = iommus(Path::new(PMUS)).into_iter().map(|(pmu, event)| {
            let counter = of_pmu(&pmu, event);
            (event.to_owned(), counter)
        });
        Self(thread.chain(iommus).filter_map(|(name, counter)| Some((name, counter.ok()?))).collect())
    }

    /// Returns the counts so far.
    pub(crate) fn read(&mut self) -> Counts {
        let mut counts = Counts::new();
        for (name, counter) in &mut self.0 {
            if let Ok(count) = counter.read() {
                *counts.entry(name.clone()).or_default() += count;
            }
        }
        counts
    }

    /// Returns the names of the counters, or why there are none, for the environment.
    pub(crate) fn fact() -> String {
        let mut names: Vec<String> = Self::begin().0.into_iter().map(|(name, _)| name).collect();
        names.dedup();
        match (names.as_slice(), of_thread(Hardware::INSTRUCTIONS)) {
            ([], Err(error)) => {
                format!("none ({:?})", Errno::from_raw(error.raw_os_error().unwrap_or_default()))
            }
            _ => names.join(", "),
        }
    }
}

/// Returns what was counted between two readings.
pub(crate) fn between(before: &Counts, after: Counts) -> Counts {
    let since = |(name, count): (String, u64)| {
        let before = before.get(&name).copied().unwrap_or_default();
        (name, count.saturating_sub(before))
    };
    after.into_iter().map(since).collect()
}

fn of_thread(event: Hardware) -> io::Result<Counter> {
    Builder::new(event).enabled(true).build()
}

fn of_pmu(pmu: &str, event: &str) -> io::Result<Counter> {
    let event = Dynamic::builder(pmu)?.event(event)?.build().map_err(io::Error::other)?;
    let mask = fs::read_to_string(Path::new(PMUS).join(pmu).join("cpumask")).unwrap_or_default();
    let cpu = mask.trim().split(['-', ',']).next().and_then(|cpu| cpu.parse().ok()).unwrap_or_default();
    // Such a PMU counts for the whole machine, through one CPU.
    Builder::new(event).any_pid().one_cpu(cpu).include_kernel().include_hv().enabled(true).build()
}

/// Returns every IOMMU's PMU below `pmus`, with each event of its kind.
fn iommus(pmus: &Path) -> Vec<(String, &'static str)> {
    let names = fs::read_dir(pmus).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let events = |name: &str| {
        let kind = OF_IOMMU.into_iter().find(|(prefix, _)| name.starts_with(prefix));
        kind.map_or(&[][..], |(_, events)| events)
    };
    names.into_iter().flat_map(|name| events(&name).iter().map(move |event| (name.clone(), *event))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pmus_of_iommus_are_found() {
        let pmus = tempfile::tempdir().unwrap();
        for name in ["cpu", "dmar1", "dmar0", "amd_iommu_0", "msr"] {
            fs::create_dir(pmus.path().join(name)).unwrap();
        }
        let found = iommus(pmus.path());
        assert_eq!(found.len(), 9);
        assert_eq!(found[0], ("amd_iommu_0".to_owned(), "mem_trans_total"));
        assert_eq!(found[3], ("dmar0".to_owned(), "iommu_requests"));
    }

    #[test]
    fn a_machine_without_counters_says_why_and_one_with_them_counts() {
        let fact = Counters::fact();
        let mut counters = Counters::begin();
        let before = counters.read();
        (0..100_000).for_each(|step| _ = std::hint::black_box(step));
        let counts = between(&before, counters.read());
        match of_thread(Hardware::INSTRUCTIONS) {
            Ok(_) => {
                assert!(counts["instructions"] > 100_000 && fact.starts_with("instructions"), "{counts:?}")
            }
            Err(_) => assert!(counts.is_empty() && fact.starts_with("none (E"), "{counts:?} {fact}"),
        }
    }

    #[test]
    fn a_pmu_that_the_kernel_describes_in_sysfs_counts() {
        // Without such a PMU, or without permission to read it, there is nothing to test.
        let Ok(mut counter) = of_pmu("msr", "tsc") else { return };
        let first = counter.read().unwrap();
        assert!(counter.read().unwrap() > first);
    }
}
