//! Environment in which a recording was made.

use std::fs;
use std::path::Path;

use vireo_eal::{Eal, Error, Result};

use crate::record::Environment;

pub(crate) fn environment(rounds: u32) -> Result<Environment> {
    let uname =
        nix::sys::utsname::uname().map_err(|errno| Error::os("cannot read the kernel's name", errno))?;
    let [cpuinfo, cmdline] = ["/proc/cpuinfo", "/proc/cmdline"].map(|path| text(Path::new(path)));
    let lab = |name: &str| std::env::var(format!("VIREO_LAB_{name}")).ok();
    let commit = lab("COMMIT").map(|commit| format!(" ({commit})")).unwrap_or_default();
    let facts = [
        ("vireo", Some(format!("{}{commit}", env!("CARGO_PKG_VERSION")))),
        ("rustc", Some(env!("VIREO_RUSTC").to_owned())),
        ("dpdk", lab("DPDK")),
        ("kernel", Some(uname.release().to_string_lossy().into_owned())),
        ("kernel build", Some(uname.version().to_string_lossy().into_owned())),
        ("kernel configuration", lab("KERNEL_CONFIG")),
        ("kernel command line", cmdline),
        ("cpu", cpu_fact(cpuinfo.as_deref(), "model name")),
        ("microcode", cpu_fact(cpuinfo.as_deref(), "microcode")),
        ("cpus", std::thread::available_parallelism().ok().map(|n| n.to_string())),
        ("iommu", Some(iommu())),
        ("hugepages", Some(Eal::hugepages_line())),
    ];
    let machine = machine(Path::new("/sys"));
    let now = text(Path::new("/sys/class/rtc/rtc0/date"));
    let others = [
        ("accelerator", lab("ACCEL")),
        ("qemu", lab("QEMU")),
        ("host cpu", lab("HOST_CPU")),
        ("host cpus", lab("HOST_CPUS")),
        ("date", lab("DATE").or(now)),
        ("rounds", Some(rounds.to_string())),
        ("command", lab("COMMAND").or_else(|| Some(std::env::args().collect::<Vec<_>>().join(" ")))),
    ];
    let facts = facts.into_iter().chain(machine).chain(others);
    Ok(Environment(facts.filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()))
}

/// Settings that change a CPU's speed, from `sysfs` (`Documentation/ABI/testing/sysfs-devices-system-cpu`).
fn machine(sysfs: &Path) -> [(&'static str, Option<String>); 5] {
    let cpu = sysfs.join("devices/system/cpu");
    let smt = text(&cpu.join("smt/active")).map(|active| if active == "1" { "on" } else { "off" }.to_owned());
    [
        ("smt", smt),
        ("numa nodes", text(&sysfs.join("devices/system/node/online"))),
        ("isolated cpus", text(&cpu.join("isolated"))),
        ("governor", text(&cpu.join("cpu0/cpufreq/scaling_governor"))),
        ("mitigations", mitigations(&cpu.join("vulnerabilities"))),
    ]
}

/// Names of the vulnerabilities that the kernel mitigates, and of those that it does not.
fn mitigations(directory: &Path) -> Option<String> {
    let mut found: Vec<(String, String)> = fs::read_dir(directory)
        .ok()?
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, text(&entry.path())?)))
        .collect();
    found.sort();
    let named = |state: &str| {
        let names = found.iter().filter(|(_, value)| value.starts_with(state)).map(|(name, _)| name.as_str());
        let names: Vec<&str> = names.collect();
        if names.is_empty() { "none".to_owned() } else { names.join(" ") }
    };
    Some(format!("{}; vulnerable: {}", named("Mitigation"), named("Vulnerable")))
}

/// Contents of a one-line file; `None` if it is empty or unreadable.
fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Value of a key of `/proc/cpuinfo` for the first CPU.
fn cpu_fact(cpuinfo: Option<&str>, key: &str) -> Option<String> {
    let value = |line: &str| Some(line.strip_prefix(key)?.split_once(": ")?.1.to_owned());
    cpuinfo?.lines().find_map(value)
}

/// Names of the IOMMUs, such as `dmar0`.
fn iommu() -> String {
    let groups = fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    let physical = fs::read_dir("/dev/vfio").is_ok_and(|entries| {
        entries.flatten().any(|e| e.file_name().to_string_lossy().starts_with("noiommu-"))
    });
    if physical || groups == 0 {
        return "none".to_owned();
    }
    let names: Vec<String> = fs::read_dir("/sys/class/iommu")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if names.is_empty() { "present".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_a_cpus_speed_is_read() {
        let sysfs = tempfile::tempdir().unwrap();
        let none = machine(sysfs.path());
        assert!(none.iter().all(|(_, value)| value.is_none()), "{none:?}");
        for (path, value) in [
            ("cpu/smt/active", "1\n"),
            ("cpu/isolated", "\n"),
            ("cpu/cpu0/cpufreq/scaling_governor", "performance\n"),
            ("cpu/vulnerabilities/spectre_v2", "Mitigation: Retpolines\n"),
            ("cpu/vulnerabilities/mds", "Vulnerable\n"),
            ("cpu/vulnerabilities/l1tf", "Not affected\n"),
            ("node/online", "0-1\n"),
        ] {
            let path = sysfs.path().join("devices/system").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            machine(sysfs.path()),
            [
                ("smt", some("on")),
                ("numa nodes", some("0-1")),
                ("isolated cpus", None),
                ("governor", some("performance")),
                ("mitigations", some("spectre_v2; vulnerable: mds")),
            ]
        );
        assert_eq!(cpu_fact(Some("processor\t: 0\nmodel name\t: A 1\n"), "model name"), some("A 1"));
    }
}
