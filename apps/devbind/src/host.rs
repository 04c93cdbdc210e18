//! Driver changes of NICs. The old driver is recorded first, so that every change can be undone.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use vireo_bus_pci::Bus;
use vireo_eal::bdf::Bdf;
use vireo_eal::{Error, ErrorKind, Result};

pub(crate) const VFIO_DRIVER: &str = "vfio-pci";
/// Drivers that leave an IOMMU group usable for VFIO (`Documentation/driver-api/vfio.rst`).
const HARMLESS: [&str; 2] = ["pcieport", "pci-stub"];

/// The machine: its PCI bus and the other paths that devbind reads and writes.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) bus: Bus,
    /// `/dev/vfio`.
    pub(crate) vfio: PathBuf,
    /// `/proc`.
    pub(crate) proc: PathBuf,
    /// Module parameter that allows VFIO's no-IOMMU mode.
    pub(crate) noiommu: PathBuf,
    /// Paths where distributions keep the database of PCI device names; the first that exists is read.
    pub(crate) pci_ids: Vec<PathBuf>,
    /// Directory with one file per address whose driver was changed. The file has the driver's name, or is
    /// empty if there was none. Not the runtime directory of an EAL program, which would be removed with all
    /// its contents.
    pub(crate) records: PathBuf,
}

impl Host {
    /// Returns the machine that devbind runs on.
    pub(crate) fn new() -> Self {
        let run = std::env::var_os("RUNTIME_DIRECTORY").filter(|dir| !dir.is_empty());
        Self {
            bus: Bus::default(),
            vfio: "/dev/vfio".into(),
            proc: "/proc".into(),
            noiommu: "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode".into(),
            pci_ids: vec!["/usr/share/misc/pci.ids".into(), "/usr/share/hwdata/pci.ids".into()],
            records: run.map_or_else(|| "/run".into(), PathBuf::from).join("vireo-devbind"),
        }
    }

    /// Binds `addresses` to `driver`, or unbinds them if it is `None`. If one of them fails, none is changed.
    pub(crate) fn change(&self, addresses: &[Bdf], driver: Option<&str>, force: bool) -> Result<()> {
        let wanted: Vec<_> = addresses.iter().map(|address| (*address, driver.map(str::to_owned))).collect();
        self.rebind(&wanted, force)
    }

    /// Allows VFIO's no-IOMMU mode if one of `addresses` needs it, then does the same as [`Host::change`].
    /// The mode stays allowed only if the change succeeds.
    pub(crate) fn change_without_iommu(&self, addresses: &[Bdf], driver: &str, force: bool) -> Result<()> {
        if addresses.iter().all(|address| self.bus.iommu_group(*address).is_some()) {
            tracing::warn!("--noiommu-mode has no effect: the NICs have an IOMMU");
            return self.change(addresses, Some(driver), force);
        }
        let before = fs::read_to_string(&self.noiommu).map_err(|error| self.no_switch(&error))?;
        self.set_noiommu("1")?;
        self.change(addresses, Some(driver), force).inspect_err(|_| {
            if let Err(error) = self.set_noiommu(before.trim()) {
                tracing::error!("{error}");
            }
        })
    }

    fn set_noiommu(&self, value: &str) -> Result<()> {
        fs::write(&self.noiommu, value).map_err(|error| self.no_switch(&error))
    }

    fn no_switch(&self, error: &std::io::Error) -> Error {
        let error =
            Error::io(format!("cannot set VFIO's no-IOMMU mode in {}", self.noiommu.display()), error);
        match error.kind() {
            ErrorKind::Unavailable => error
                .because("VFIO is not loaded, or this kernel has no CONFIG_VFIO_NOIOMMU")
                .with_hint("run: modprobe vfio-pci"),
            ErrorKind::Permission => error.with_hint("run as root"),
            _ => error,
        }
    }

    /// Binds `addresses` to the drivers that were recorded, and deletes the records.
    pub(crate) fn restore(&self, addresses: &[Bdf], force: bool) -> Result<()> {
        let recorded = |address: &Bdf| {
            let driver = self.recorded(*address)?.ok_or_else(|| {
                let what = format!("cannot restore the driver of {address}");
                Error::new(ErrorKind::Unavailable, what, "no driver is recorded")
                    .with_hint(format!("choose one: vireo-devbind --bind DRIVER {address}"))
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

    /// Binds one function and keeps its record correct. The record names the driver before the first change,
    /// and is deleted when that driver has the function again.
    fn bind(&self, address: Bdf, driver: Option<&str>) -> Result<Option<String>> {
        let old = self.bus.find(address)?.driver;
        let recorded = self.recorded(address)?;
        if recorded.is_none() && old.as_deref() != driver {
            // Recorded before the change, so that it can be undone if the process is killed halfway.
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

    /// Warns of other functions in the IOMMU group of `address` that have a kernel driver, because VFIO then
    /// refuses the group.
    fn warn_of_group(&self, address: Bdf) {
        for name in names(&self.bus.device(address).sysfs.join("iommu_group/devices")) {
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

    fn record_path(&self, address: Bdf) -> PathBuf {
        self.records.join(address.to_string())
    }

    /// Returns the recorded driver of `address`; an empty name if it had none.
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
                if error.kind() == ErrorKind::Permission { error.with_hint("run as root") } else { error }
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

/// Returns the names in a directory; none if the directory does not exist.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
