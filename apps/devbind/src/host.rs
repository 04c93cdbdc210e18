//! What is done to NICs: the old driver is recorded first, so that every change can be undone.

use std::fs::{self, DirBuilder};
use std::net::Ipv6Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use vireo_bus_pci::{Bus, PciInfo};
use vireo_eal::bdf::Bdf;
use vireo_eal::{Error, ErrorKind, Result};

const VFIO_DRIVER: &str = "vfio-pci";
/// Drivers that leave an IOMMU group usable for VFIO (`Documentation/driver-api/vfio.rst`).
const HARMLESS: [&str; 2] = ["pcieport", "pci-stub"];
/// `RTF_REJECT`, `RTF_ANYCAST` and `RTF_LOCAL` (`linux/ipv6_route.h`): routes to nowhere and to this machine.
const NOT_OUT: u32 = 0x0200 | 0x0010_0000 | 0x8000_0000;

/// The machine: its PCI bus and the other places that are read and written here.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) bus: Bus,
    /// `/dev/vfio`.
    pub(crate) vfio: PathBuf,
    /// `/proc`.
    pub(crate) proc: PathBuf,
    /// One file for each address whose driver was changed, with the driver's name; empty for none. Not a
    /// directory of an EAL program, which would be removed with all in it.
    pub(crate) records: PathBuf,
}

impl Host {
    /// This machine.
    pub(crate) fn new() -> Self {
        let run = std::env::var_os("RUNTIME_DIRECTORY").filter(|dir| !dir.is_empty());
        Self {
            bus: Bus::default(),
            vfio: "/dev/vfio".into(),
            proc: "/proc".into(),
            records: run.map_or_else(|| "/run".into(), PathBuf::from).join("vireo-devbind"),
        }
    }

    /// Gives `addresses` to `driver`, or to none; all of them or, when one fails, none.
    pub(crate) fn change(&self, addresses: &[Bdf], driver: Option<&str>, force: bool) -> Result<()> {
        let wanted: Vec<_> = addresses.iter().map(|address| (*address, driver.map(str::to_owned))).collect();
        self.rebind(&wanted, force)
    }

    /// Gives `addresses` to the drivers that were recorded, and forgets the records.
    pub(crate) fn restore(&self, addresses: &[Bdf], force: bool) -> Result<()> {
        let recorded = |address: &Bdf| {
            let driver = self.recorded(*address)?.ok_or_else(|| {
                let what = format!("cannot restore the driver of {address}");
                Error::new(ErrorKind::Unavailable, what, "none is recorded")
                    .mend(format!("name it: vireo-devbind --bind DRIVER {address}"))
            })?;
            Ok((*address, Some(driver).filter(|driver| !driver.is_empty())))
        };
        let wanted = addresses.iter().map(recorded).collect::<Result<Vec<_>>>()?;
        self.rebind(&wanted, force)
    }

    fn rebind(&self, wanted: &[(Bdf, Option<String>)], force: bool) -> Result<()> {
        for (address, driver) in wanted {
            let info = self.bus.find(*address)?;
            if info.driver != *driver {
                self.check_idle(&info, force)?;
            }
        }
        let mut done = Vec::new();
        for (address, driver) in wanted {
            match self.bind(*address, driver.as_deref()) {
                Ok(old) => done.push((*address, old)),
                Err(error) => {
                    for (address, old) in done.iter().rev() {
                        if let Err(error) = self.bind(*address, old.as_deref()) {
                            tracing::error!("{error}");
                        }
                    }
                    return Err(error);
                }
            }
        }
        for (address, driver) in wanted {
            if driver.as_deref() == Some(VFIO_DRIVER) {
                self.warn_of_group(*address);
            }
        }
        Ok(())
    }

    /// Binds one function and keeps the record right: it names the driver before the first change, and is
    /// gone when that driver has the function again.
    fn bind(&self, address: Bdf, driver: Option<&str>) -> Result<Option<String>> {
        let old = self.bus.find(address)?.driver;
        let recorded = self.recorded(address)?;
        if recorded.is_none() && old.as_deref() != driver {
            // Before the change: a process that is killed in the middle leaves a way back.
            self.record(address, old.as_deref())?;
        }
        let bound = self.bus.bind(address, driver);
        let now = if bound.is_ok() { driver } else { old.as_deref() };
        let first = recorded.as_deref().or(old.as_deref()).unwrap_or("");
        if now.unwrap_or("") == first {
            self.forget(address)?;
        }
        bound
    }

    /// Refuses a NIC that carries this machine's traffic, and one that a process has open: the kernel would
    /// wait for that process without end.
    fn check_idle(&self, info: &PciInfo, force: bool) -> Result<()> {
        let what = || format!("cannot take {} from {}", info.address, info.driver.as_deref().unwrap_or("-"));
        let active = self.interfaces(info.address).into_iter().find_map(|(name, why)| Some((name, why?)));
        if let Some((name, why)) = active.filter(|_| !force) {
            return Err(Error::new(ErrorKind::Busy, what(), why)
                .mend(format!("run: ip link set {name} down; or, if nobody needs it: --force")));
        }
        if self.bus.is_on_vfio(info)
            && let Some((pid, name)) = self.holder(info.address)
        {
            return Err(Error::new(ErrorKind::Busy, what(), format!("in use by pid {pid} ({name})"))
                .mend(format!("stop it: kill {pid}")));
        }
        Ok(())
    }

    /// The function's network interfaces, and why each carries this machine's traffic, if it does: it is up, and
    /// it or one above it has routes.
    pub(crate) fn interfaces(&self, address: Bdf) -> Vec<(String, Option<String>)> {
        let device = self.bus.node(address).sysfs;
        let routed = self.routed();
        // Those of virtio are one level deeper.
        let deeper = names(&device).into_iter().filter(|name| name.starts_with("virtio"));
        let dirs = deeper.map(|name| device.join(name)).chain([device.clone()]);
        let found = dirs
            .map(|dir| dir.join("net"))
            .flat_map(|net| names(&net).into_iter().map(move |name| (net.join(&name), name)));
        found
            .map(|(dir, name)| {
                let why = traffic(dir, &name, &routed);
                (name, why)
            })
            .collect()
    }

    /// Interfaces with routes in IPv4's main table or in IPv6's, but for those routes that every interface has.
    fn routed(&self) -> Vec<String> {
        let read = |table| fs::read_to_string(self.proc.join("net").join(table)).unwrap_or_default();
        let (v4, v6) = (read("route"), read("ipv6_route"));
        let v4 = v4.lines().filter_map(|line| line.split_whitespace().next());
        v4.chain(v6.lines().filter_map(routed_v6)).map(str::to_owned).collect()
    }

    /// VFIO takes a group only when no driver of the kernel has a part of it.
    fn warn_of_group(&self, address: Bdf) {
        for name in names(&self.bus.node(address).sysfs.join("iommu_group/devices")) {
            let Some(info) = name.parse().ok().and_then(|other| self.bus.find(other).ok()) else { continue };
            if self.bus.is_on_vfio(&info) {
                continue;
            }
            if let Some(driver) = info.driver.filter(|driver| !HARMLESS.contains(&driver.as_str())) {
                tracing::warn!(
                    "{address} shares its IOMMU group with {name} ({driver}), so VFIO refuses both; \
                     run: vireo-devbind --bind {VFIO_DRIVER} {name}"
                );
            }
        }
    }

    /// Process that has the function's VFIO group or character device open.
    fn holder(&self, address: Bdf) -> Option<(u32, String)> {
        let cdevs = names(&self.bus.node(address).sysfs.join("vfio-dev"));
        let groups =
            self.bus.iommu_group(address).into_iter().flat_map(|n| [n.to_string(), format!("noiommu-{n}")]);
        let paths: Vec<PathBuf> = cdevs
            .into_iter()
            .map(|name| self.vfio.join("devices").join(name))
            .chain(groups.map(|name| self.vfio.join(name)))
            .collect();
        names(&self.proc).into_iter().find_map(|pid| {
            let fds = self.proc.join(&pid).join("fd");
            let holds = |fd: &String| fs::read_link(fds.join(fd)).is_ok_and(|target| paths.contains(&target));
            let number = pid.parse().ok().filter(|_| names(&fds).iter().any(holds))?;
            let name = fs::read_to_string(self.proc.join(&pid).join("comm")).unwrap_or_default();
            Some((number, name.trim().to_owned()))
        })
    }

    fn record_path(&self, address: Bdf) -> PathBuf {
        self.records.join(address.to_string())
    }

    /// The recorded driver of `address`; empty when it had none.
    pub(crate) fn recorded(&self, address: Bdf) -> Result<Option<String>> {
        let path = self.record_path(address);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), &error)),
        }
    }

    fn record(&self, address: Bdf, driver: Option<&str>) -> Result<()> {
        let path = self.record_path(address);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.records)
            .and_then(|()| fs::write(&path, format!("{}\n", driver.unwrap_or(""))))
            .map_err(|error| {
                let error = Error::io(format!("cannot write {}", path.display()), &error);
                if error.kind() == ErrorKind::Permission { error.mend("run as root") } else { error }
            })
    }

    fn forget(&self, address: Bdf) -> Result<()> {
        let path = self.record_path(address);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {}", path.display()), &error))
            }
            _ => Ok(()),
        }
    }
}

/// Why interface `name`, whose directory is `dir`, carries this machine's traffic, if it does.
fn traffic(dir: PathBuf, name: &str, routed: &[String]) -> Option<String> {
    let state = fs::read_to_string(dir.join("operstate")).unwrap_or_default();
    // A driver that does not tell leaves "unknown" while it is up (`Documentation/networking/operstates.rst`).
    if !matches!(state.trim(), "up" | "unknown") {
        return None;
    }
    let top = stack(dir, name).into_iter().find(|top| routed.contains(top))?;
    let carries = if top == name { String::new() } else { format!("carries {top}, which ") };
    Some(format!("{name} is up and {carries}has routes"))
}

/// Interface of a line of `/proc/net/ipv6_route`, if packets leave by it that are for more than its link.
fn routed_v6(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    let destination = Ipv6Addr::from(u128::from_str_radix(words.next()?, 16).ok()?);
    let interface = words.next_back()?;
    let flags = u32::from_str_radix(words.next_back()?, 16).ok()?;
    let of_link = destination.is_unicast_link_local() || destination.is_multicast();
    (!of_link && flags & NOT_OUT == 0).then_some(interface)
}

/// Interface `name`, whose directory is `dir`, and all above it: its bridge or bond, its VLANs, and theirs in turn.
fn stack(dir: PathBuf, name: &str) -> Vec<String> {
    let mut found = vec![name.to_owned()];
    let mut left = vec![dir];
    while let Some(dir) = left.pop() {
        // The link `master` has one of these beside it.
        for link in names(&dir) {
            let Some(upper) = link.strip_prefix("upper_") else { continue };
            if !found.iter().any(|known| known == upper) {
                found.push(upper.to_owned());
                left.push(dir.join(&link));
            }
        }
    }
    found
}

/// Names in a directory; none when there is no such directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
