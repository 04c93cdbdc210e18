//! Finds PCI functions through sysfs (`Documentation/PCI/sysfs-pci.rst`).

use std::fs;
use std::path::{Path, PathBuf};

use vireo_eal::bdf::Bdf;
use vireo_eal::vfio::BusDevice;
use vireo_eal::{Error, ErrorKind, Result};

use crate::DeviceId;

/// The PCI bus as sysfs shows it.
#[derive(Clone, Debug)]
pub struct Bus {
    root: PathBuf,
}

/// Class code of Ethernet controllers (PCI Code and ID Assignment, 1.3), without the programming interface.
const ETHERNET: u32 = 0x0200;

/// A PCI function in sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciInfo {
    /// PCI address of the function.
    pub address: Bdf,
    /// Vendor and device id of the function.
    pub id: DeviceId,
    /// Class code, 24 bits: `0x020000` is an Ethernet controller.
    pub class: u32,
    /// Kernel driver that the function is bound to.
    pub driver: Option<String>,
    /// NUMA node, if the machine has several.
    pub numa_node: Option<u32>,
}

impl PciInfo {
    /// Whether the function is an Ethernet controller.
    pub fn is_ethernet(&self) -> bool {
        self.class >> 8 == ETHERNET
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self::new("/sys/bus/pci")
    }
}

impl Bus {
    /// Creates the bus below `root`, which is `/sys/bus/pci` on a real machine.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn path(&self, address: Bdf) -> PathBuf {
        self.root.join("devices").join(address.to_string())
    }

    /// Returns the function's name and sysfs path for the EAL's VFIO layer.
    pub fn device(&self, address: Bdf) -> BusDevice {
        BusDevice { name: address.to_string(), sysfs: self.path(address) }
    }

    /// Number of the function's IOMMU group, if it is in one.
    pub fn iommu_group(&self, address: Bdf) -> Option<u32> {
        let link = fs::read_link(self.path(address).join("iommu_group")).ok()?;
        link.file_name()?.to_str()?.parse().ok()
    }

    /// Fails if sysfs shows no PCI bus, for callers that must distinguish that from an empty bus.
    ///
    /// # Errors
    /// `Unavailable` when the bus has no `devices` directory.
    pub fn require(&self) -> Result<()> {
        let devices = self.root.join("devices");
        if devices.exists() {
            return Ok(());
        }
        let error = |why: String| Error::new(ErrorKind::Unavailable, "cannot list PCI devices", why);
        // `/sys/bus` has a directory for each bus that the kernel knows.
        match self.root.parent().is_some_and(Path::exists) {
            true => Err(error(format!("{} does not exist: this machine has no PCI bus", devices.display()))),
            false => Err(error(format!("{} does not exist: sysfs is not mounted", devices.display()))
                .with_hint("run: mount -t sysfs sysfs /sys")),
        }
    }

    /// Returns all functions, sorted by address. A machine without PCI has none.
    ///
    /// # Errors
    /// `Io` when sysfs exists but cannot be read.
    pub fn scan(&self) -> Result<Vec<PciInfo>> {
        let devices = self.root.join("devices");
        let entries = match fs::read_dir(&devices) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(format!("cannot read {}", devices.display()), &error)),
        };
        let mut found: Vec<PciInfo> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            // A function may be unplugged between the listing and this lookup.
            .filter_map(|address| self.find(address).ok())
            .collect();
        found.sort_by_key(|info| info.address);
        Ok(found)
    }

    /// Returns the function at `address`.
    ///
    /// # Errors
    /// `Unavailable` when there is no function at `address`.
    pub fn find(&self, address: Bdf) -> Result<PciInfo> {
        let path = self.path(address);
        let text = |file: &str| fs::read_to_string(path.join(file)).ok();
        let hex = |file: &str| {
            let text = text(file)?;
            u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
        };
        let id = hex("vendor").zip(hex("device")).and_then(|(vendor, device)| {
            Some(DeviceId { vendor: vendor.try_into().ok()?, device: device.try_into().ok()? })
        });
        let Some(id) = id else {
            self.require()?;
            let what = format!("cannot find {address}");
            return Err(Error::new(ErrorKind::Unavailable, what, "there is no such PCI device")
                .with_hint("list them: vireo-devbind --status; or: ls /sys/bus/pci/devices"));
        };
        Ok(PciInfo {
            address,
            id,
            class: hex("class").unwrap_or(0),
            driver: fs::read_link(path.join("driver"))
                .ok()
                .and_then(|link| Some(link.file_name()?.to_str()?.to_owned())),
            numa_node: text("numa_node").and_then(|text| text.trim().parse().ok()),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Creates a bus in a directory, with one function per `(address, vendor, device, driver)`.
    pub(crate) fn fake_bus(functions: &[(&str, &str, &str, &str)]) -> (tempfile::TempDir, Bus) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("devices")).unwrap();
        for (address, vendor, device, driver) in functions {
            let path = dir.path().join("devices").join(address);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("vendor"), format!("0x{vendor}\n")).unwrap();
            fs::write(path.join("device"), format!("0x{device}\n")).unwrap();
            fs::write(path.join("class"), "0x020000\n").unwrap();
            fs::write(path.join("numa_node"), "-1\n").unwrap();
            if !driver.is_empty() {
                fs::create_dir_all(dir.path().join("drivers").join(driver)).unwrap();
                symlink(format!("../../drivers/{driver}"), path.join("driver")).unwrap();
            }
        }
        let bus = Bus::new(dir.path());
        (dir, bus)
    }

    #[test]
    fn scans_in_order_and_knows_drivers() {
        let (_dir, bus) =
            fake_bus(&[("0000:00:05.0", "8086", "10d3", "vfio-pci"), ("0000:00:03.0", "1af4", "1041", "")]);
        let found = bus.scan().unwrap();
        assert_eq!(
            found.iter().map(|info| info.address.to_string()).collect::<Vec<_>>(),
            ["0000:00:03.0", "0000:00:05.0"]
        );
        assert_eq!(found[1].driver.as_deref(), Some("vfio-pci"));
        assert_eq!((found[1].id.device, found[0].numa_node), (0x10d3, None));
    }

    #[test]
    fn what_is_not_there_is_an_error_or_nothing() {
        let (_dir, bus) = fake_bus(&[]);
        assert!(bus.scan().unwrap().is_empty());
        let error = bus.find("0000:00:09.0".parse().unwrap()).unwrap_err();
        assert!(error.to_string().starts_with("cannot find 0000:00:09.0"), "{error}");
    }

    #[test]
    fn a_missing_sysfs_is_told_from_an_empty_bus() {
        let (dir, bus) = fake_bus(&[("0000:00:03.0", "8086", "10d3", "")]);
        bus.require().unwrap();
        let address = "0000:00:03.0".parse().unwrap();
        for (root, text) in [
            (dir.path().join("pci"), "this machine has no PCI bus"),
            (dir.path().join("sys/bus/pci"), "sysfs is not mounted; run: mount -t sysfs sysfs /sys"),
        ] {
            let missing = Bus::new(root);
            assert!(missing.scan().unwrap().is_empty());
            for error in [missing.require().unwrap_err(), missing.find(address).unwrap_err()] {
                assert_eq!(error.kind(), ErrorKind::Unavailable);
                assert!(error.to_string().ends_with(text), "{error}");
            }
        }
    }
}
