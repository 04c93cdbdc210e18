//! Where a recording was made.

use std::fs;
use std::path::Path;

use vireo_eal::{Eal, Error, Result};

use crate::record::Environment;

pub(crate) fn environment(rounds: u32) -> Result<Environment> {
    let uname =
        nix::sys::utsname::uname().map_err(|errno| Error::os("cannot read the kernel's name", errno))?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let groups = fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    let physical = fs::read_dir("/dev/vfio").is_ok_and(|entries| {
        entries.flatten().any(|e| e.file_name().to_string_lossy().starts_with("noiommu-"))
    });
    let iommu = if physical || groups == 0 { "none".to_owned() } else { iommu_name() };
    let lab = |name: &str| std::env::var(format!("VIREO_LAB_{name}")).ok();
    let now = fs::read_to_string("/sys/class/rtc/rtc0/date").ok();
    let facts = [
        (
            "vireo",
            Some(format!(
                "{}{}",
                env!("CARGO_PKG_VERSION"),
                lab("COMMIT").map(|c| format!(" ({c})")).unwrap_or_default()
            )),
        ),
        ("dpdk", lab("DPDK")),
        ("kernel", Some(uname.release().to_string_lossy().into_owned())),
        ("cpu", cpu.map(str::to_owned)),
        ("cpus", std::thread::available_parallelism().ok().map(|n| n.to_string())),
        ("iommu", Some(iommu)),
        ("hugepages", Some(Eal::hugepages_line())),
        ("accelerator", lab("ACCEL")),
        ("qemu", lab("QEMU")),
        ("host cpu", lab("HOST_CPU")),
        ("host cpus", lab("HOST_CPUS")),
        ("date", lab("DATE").or_else(|| now.map(|date| date.trim().to_owned()))),
        ("rounds", Some(rounds.to_string())),
        ("command", lab("COMMAND").or_else(|| Some(std::env::args().collect::<Vec<_>>().join(" ")))),
    ];
    Ok(Environment(facts.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()))
}

/// Names of the IOMMUs, such as `dmar0`.
fn iommu_name() -> String {
    let names: Vec<String> = fs::read_dir(Path::new("/sys/class/iommu"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if names.is_empty() { "present".into() } else { names.join(", ") }
}
