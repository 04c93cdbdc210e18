//! What is done to NICs: the old driver is recorded first, so that every change can be undone.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use vireo_bus_pci::{Bus, PciInfo};
use vireo_eal::bdf::Bdf;
use vireo_eal::{Error, ErrorKind, Result};

const VFIO_DRIVER: &str = "vfio-pci";
/// Drivers that leave an IOMMU group usable for VFIO (`Documentation/driver-api/vfio.rst`).
const HARMLESS: [&str; 3] = [VFIO_DRIVER, "pcieport", "pci-stub"];

/// The machine: its PCI bus and the other places that are read and written here.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) bus: Bus,
    /// `/dev/vfio`.
    pub(crate) vfio: PathBuf,
    /// `/proc`.
    pub(crate) proc: PathBuf,
    /// `/sys/module`.
    pub(crate) modules: PathBuf,
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
            modules: "/sys/module".into(),
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
        let bound = self.bus.bind(address, driver).map_err(|error| self.explain(error, address, driver));
        let now = if bound.is_ok() { driver } else { old.as_deref() };
        let first = recorded.as_deref().or(old.as_deref()).unwrap_or("");
        if now.unwrap_or("") == first {
            self.forget(address)?;
        }
        bound
    }

    fn explain(&self, error: Error, address: Bdf, driver: Option<&str>) -> Error {
        let switch = self.modules.join("vfio/parameters/enable_unsafe_noiommu_mode");
        let off = fs::read_to_string(&switch).is_ok_and(|text| text.trim() == "N");
        if driver != Some(VFIO_DRIVER) || self.bus.iommu_group(address).is_some() || !off {
            return error;
        }
        error.because("it is in no IOMMU group, so the IOMMU is off").mend(format!(
            "boot with intel_iommu=on or amd_iommu=on; or, unsafe: echo 1 > {}",
            switch.display()
        ))
    }

    /// Refuses a NIC that carries this machine's traffic, and one that a process has open: the kernel would
    /// wait for that process without end.
    fn check_idle(&self, info: &PciInfo, force: bool) -> Result<()> {
        let what = || format!("cannot take {} from {}", info.address, info.driver.as_deref().unwrap_or("-"));
        let active = self.interfaces(info.address).into_iter().find(|(_, active)| *active);
        if let Some((name, _)) = active.filter(|_| !force) {
            return Err(Error::new(ErrorKind::Busy, what(), format!("{name} is up and has routes"))
                .mend(format!("run: ip link set {name} down; or, if nobody needs it: --force")));
        }
        if info.driver.as_deref() == Some(VFIO_DRIVER)
            && let Some((pid, name)) = self.holder(info.address)
        {
            return Err(Error::new(ErrorKind::Busy, what(), format!("in use by pid {pid} ({name})"))
                .mend(format!("stop it: kill {pid}")));
        }
        Ok(())
    }

    /// The function's network interfaces, and whether each is up and in the main routing table.
    pub(crate) fn interfaces(&self, address: Bdf) -> Vec<(String, bool)> {
        let device = self.bus.node(address).sysfs;
        let routes = fs::read_to_string(self.proc.join("net/route")).unwrap_or_default();
        let routed: Vec<&str> = routes.lines().filter_map(|line| line.split_whitespace().next()).collect();
        // Those of virtio are one level deeper.
        let deeper = names(&device).into_iter().filter(|name| name.starts_with("virtio"));
        let dirs: Vec<PathBuf> = deeper.map(|name| device.join(name)).chain([device.clone()]).collect();
        let of = |dir: &PathBuf| {
            let net = dir.join("net");
            names(&net).into_iter().map(move |name| {
                let state = fs::read_to_string(net.join(&name).join("operstate")).unwrap_or_default();
                (name, state.trim() == "up")
            })
        };
        let found = dirs.iter().flat_map(of);
        found
            .map(|(name, up)| {
                let active = up && routed.contains(&name.as_str());
                (name, active)
            })
            .collect()
    }

    /// VFIO takes a group only when no driver of the kernel has a part of it.
    fn warn_of_group(&self, address: Bdf) {
        for name in names(&self.bus.node(address).sysfs.join("iommu_group/devices")) {
            let Some(info) = name.parse().ok().and_then(|other| self.bus.find(other).ok()) else { continue };
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

/// Names in a directory; none when there is no such directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
