//! Linux's bridge between two NICs, which are on VFIO before and after.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vireo_bus_pci::{Bus, PciInfo};
use vireo_eal::bdf::Bdf;
use vireo_eal::program::note;
use vireo_eal::{Error, ErrorKind, Result};

use crate::run::kind;

const NAME: &str = "vireo-bridge";
/// The kernel's counters of packets that a NIC or its queue lost
/// (`Documentation/ABI/testing/sysfs-class-net-statistics`). They do not contain packets that the queueing
/// discipline drops.
const COUNTERS: [&str; 5] = ["rx_errors", "rx_dropped", "rx_missed_errors", "tx_errors", "tx_dropped"];
/// Longest wait for the counters. The kernel's e1000 driver reads those of its NIC every two seconds.
const COUNTED: Duration = Duration::from_millis(2500);

/// Fails if `ip` is not available.
pub(super) fn check() -> Result<()> {
    ip(&["link", "show"])
}

/// Everything set up so far, in order. Dropping it undoes all of it.
pub(crate) struct Bridge<'a> {
    bus: &'a Bus,
    /// NICs bound to a kernel driver, with the driver that they were bound to before.
    taken: Vec<(Bdf, Option<String>)>,
    /// Whether the bridge exists.
    made: bool,
    /// Original CPU affinity of each interrupt.
    affinities: Vec<(PathBuf, String)>,
    /// sysfs directories of the two interfaces.
    interfaces: Vec<PathBuf>,
    /// Counters at the time from which losses count.
    before: BTreeMap<&'static str, u64>,
}

impl<'a> Bridge<'a> {
    /// Creates a bridge of two NICs whose interrupts `cpu` handles, so that it forwards there. The spanning
    /// tree protocol is off, so a port forwards as soon as its link is up. The bridge makes its ports
    /// promiscuous.
    pub(super) fn start(bus: &'a Bus, inner: &[PciInfo; 2], cpu: usize) -> Result<Self> {
        let mut bridge = Self {
            bus,
            taken: Vec::new(),
            made: false,
            affinities: Vec::new(),
            interfaces: Vec::new(),
            before: BTreeMap::new(),
        };
        for info in inner {
            let old = bus.bind(info.address, driver(info))?;
            bridge.taken.push((info.address, old));
        }
        ip(&["link", "add", NAME, "type", "bridge"])?;
        bridge.made = true;
        ip(&["link", "set", NAME, "up"])?;
        for info in inner {
            bridge.add(info, cpu)?;
        }
        Ok(bridge)
    }

    fn add(&mut self, info: &PciInfo, cpu: usize) -> Result<()> {
        let device = self.bus.device(info.address).sysfs;
        let (name, interface) = interface(&device).ok_or_else(|| {
            let what = format!("cannot add {} to a bridge", info.address);
            Error::new(ErrorKind::Unavailable, what, "its kernel driver created no network interface")
                .with_hint("see why: dmesg | tail")
        })?;
        self.interfaces.push(interface);
        ip(&["link", "set", &name, "master", NAME])?;
        ip(&["link", "set", &name, "up"])?;
        for number in interrupts(&device) {
            let path = PathBuf::from(format!("/proc/irq/{number}/smp_affinity_list"));
            let failed = |error: &std::io::Error| {
                Error::io(format!("cannot move interrupt {number} to cpu {cpu}"), error)
            };
            let before = fs::read_to_string(&path).map_err(|error| failed(&error))?;
            fs::write(&path, cpu.to_string()).map_err(|error| failed(&error))?;
            self.affinities.push((path, before));
        }
        Ok(())
    }

    /// Starts to count losses.
    pub(super) fn begin(&mut self) {
        self.before = self.counters();
    }

    /// Returns what the kernel counted as lost, after it has counted `lost` packets or has had the time to.
    pub(super) fn losses_when(&self, lost: u64) -> BTreeMap<String, u64> {
        let deadline = Instant::now() + COUNTED;
        loop {
            let now = self.counters().into_iter();
            let losses: BTreeMap<String, u64> = now
                .map(|(name, count)| {
                    let before = self.before.get(name).copied().unwrap_or_default();
                    (format!("bridge_{name}"), count.saturating_sub(before))
                })
                .collect();
            if losses.values().sum::<u64>() >= lost || Instant::now() >= deadline {
                return losses;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Sums over both interfaces.
    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let value = |interface: &PathBuf, name: &str| {
            let text = fs::read_to_string(interface.join("statistics").join(name)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        let sum = |name| self.interfaces.iter().filter_map(|interface| value(interface, name)).sum();
        COUNTERS.map(|name| (name, sum(name))).into()
    }
}

impl Drop for Bridge<'_> {
    fn drop(&mut self) {
        for (path, before) in &self.affinities {
            // Another device may share an interrupt line. An interrupt of the NIC alone may no longer exist,
            // so errors are ignored.
            let _ = fs::write(path, before.trim());
        }
        let unmade = if self.made { ip(&["link", "del", NAME]) } else { Ok(()) };
        let given =
            self.taken.iter().map(|(address, driver)| self.bus.bind(*address, driver.as_deref()).map(|_| ()));
        for error in [unmade].into_iter().chain(given).filter_map(Result::err) {
            note(&format!("vireo-vfio-bench: {error}"));
        }
    }
}

/// Returns the kernel driver for a NIC that Vireo knows.
fn driver(info: &PciInfo) -> Option<&'static str> {
    kind(info).map(|kind| if kind == "virtio-net" { "virtio-pci" } else { kind })
}

/// Returns the network interface of a function: its name and its sysfs directory. Virtio interfaces are one
/// level deeper.
fn interface(device: &Path) -> Option<(String, PathBuf)> {
    let virtio = fs::read_dir(device).ok()?.flatten();
    let virtio = virtio.filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"));
    let mut directories = virtio.map(|entry| entry.path()).chain([device.to_owned()]);
    directories.find_map(|directory| {
        let entry = fs::read_dir(directory.join("net")).ok()?.flatten().next()?;
        Some((entry.file_name().into_string().ok()?, entry.path()))
    })
}

/// Returns the numbers of a function's interrupts: the message-signaled ones or, if it has none, its
/// interrupt line.
fn interrupts(device: &Path) -> Vec<String> {
    let messages = fs::read_dir(device.join("msi_irqs")).into_iter().flatten().flatten();
    let messages: Vec<String> = messages.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    if !messages.is_empty() {
        return messages;
    }
    let line = fs::read_to_string(device.join("irq")).unwrap_or_default();
    Some(line.trim().to_owned()).filter(|line| !line.is_empty() && line != "0").into_iter().collect()
}

/// Runs `ip` of busybox or iproute2.
fn ip(words: &[&str]) -> Result<()> {
    let what = || format!("cannot run ip {}", words.join(" "));
    let output = Command::new("ip")
        .args(words)
        .output()
        .map_err(|error| Error::io(what(), &error).with_hint("install it: apt-get install iproute2"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let error = Error::new(
        ErrorKind::Unavailable,
        what(),
        said.trim().lines().next().unwrap_or("it failed").to_owned(),
    );
    Err(match words {
        ["link", "add", ..] if Path::new("/sys/class/net").join(NAME).exists() => {
            error.with_hint(format!("remove the remains of an earlier run: ip link del {NAME}"))
        }
        ["link", "add", ..] => error.with_hint("the kernel needs CONFIG_BRIDGE: modprobe bridge"),
        _ => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Returns a bus with one NIC, which is bound to `driver`.
    fn bus(driver: &str) -> (tempfile::TempDir, Bus, Bdf) {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("devices/0000:00:0d.0");
        fs::create_dir_all(&device).unwrap();
        for (name, value) in [("vendor", "0x8086"), ("device", "0x10d3"), ("class", "0x020000")] {
            fs::write(device.join(name), value).unwrap();
        }
        symlink(format!("../../drivers/{driver}"), device.join("driver")).unwrap();
        for driver in ["e1000e", "vfio-pci"] {
            fs::create_dir_all(dir.path().join("drivers").join(driver)).unwrap();
        }
        let bus = Bus::new(dir.path());
        let address = bus.scan().unwrap()[0].address;
        (dir, bus, address)
    }

    #[test]
    fn dropped_it_gives_the_nics_and_interrupts_back() {
        let (dir, bus, address) = bus("e1000e");
        let affinity = dir.path().join("smp_affinity_list");
        fs::write(&affinity, "1").unwrap();
        drop(Bridge {
            bus: &bus,
            taken: vec![(address, Some("vfio-pci".to_owned()))],
            made: false,
            affinities: vec![(affinity.clone(), "0-1\n".to_owned())],
            interfaces: Vec::new(),
            before: BTreeMap::new(),
        });
        assert_eq!(fs::read_to_string(affinity).unwrap(), "0-1");
        assert_eq!(fs::read_to_string(dir.path().join("drivers_probe")).unwrap(), address.to_string());
        assert_eq!(
            fs::read_to_string(dir.path().join("devices/0000:00:0d.0/driver_override")).unwrap(),
            "\n"
        );
    }

    #[test]
    fn interfaces_and_interrupts_are_found_where_drivers_have_them() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!((interface(dir.path()), interrupts(dir.path())), (None, vec![]));
        fs::write(dir.path().join("irq"), "0\n").unwrap();
        assert!(interrupts(dir.path()).is_empty());
        fs::write(dir.path().join("irq"), "11\n").unwrap();
        assert_eq!(interrupts(dir.path()), ["11"]);
        fs::create_dir_all(dir.path().join("msi_irqs")).unwrap();
        fs::write(dir.path().join("msi_irqs/27"), "msix\n").unwrap();
        assert_eq!(interrupts(dir.path()), ["27"]);
        let of_virtio = dir.path().join("virtio3/net/eth1");
        fs::create_dir_all(&of_virtio).unwrap();
        assert_eq!(interface(dir.path()), Some(("eth1".to_owned(), of_virtio)));
    }

    #[test]
    fn losses_are_what_was_counted_since_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("statistics")).unwrap();
        let count = |count: &str| fs::write(dir.path().join("statistics/rx_missed_errors"), count).unwrap();
        let (_sysfs, bus, _) = bus("vfio-pci");
        count("5\n");
        let mut bridge = Bridge {
            bus: &bus,
            taken: Vec::new(),
            made: false,
            affinities: Vec::new(),
            interfaces: vec![dir.path().to_owned()],
            before: BTreeMap::new(),
        };
        bridge.begin();
        count("12\n");
        let losses = bridge.losses_when(7);
        assert_eq!(losses.len(), COUNTERS.len());
        assert_eq!((losses["bridge_rx_missed_errors"], losses.values().sum::<u64>()), (7, 7));
    }
}
