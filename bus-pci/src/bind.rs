//! Binding of functions to kernel drivers through `driver_override`
//! (`Documentation/ABI/testing/sysfs-bus-pci`).

use std::fs;
use std::path::Path;

use vireo_eal::args::quoted;
use vireo_eal::bdf::Bdf;
use vireo_eal::vfio::no_group;
use vireo_eal::{Error, ErrorKind, Result};

use crate::Bus;
use crate::probe::VFIO_DRIVER;

impl Bus {
    /// Binds `address` to `driver`, or to no driver, and returns the previous driver. If the new driver
    /// refuses the function, the previous driver is restored.
    ///
    /// # Errors
    /// `Unavailable` when the function or the driver does not exist, `Usage` when `driver` is not a valid
    /// driver name, `Permission` without root.
    pub fn bind(&self, address: Bdf, driver: Option<&str>) -> Result<Option<String>> {
        let old = self.find(address)?.driver;
        if old.as_deref() == driver {
            return Ok(old);
        }
        // The name becomes part of a path, a line of sysfs, and a word of a command that the user is told to
        // run.
        let is_name = |driver: &str| {
            !driver.is_empty() && driver.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        };
        if let Some(driver) = driver.filter(|driver| !is_name(driver)) {
            let what = format!("cannot bind {address} to {}", quoted(driver));
            return Err(Error::new(ErrorKind::Usage, what, "no driver can have that name")
                .with_hint("list the drivers: ls /sys/bus/pci/drivers"));
        }
        if let Some(driver) = driver
            && !self.has_driver(driver)
        {
            let what = format!("cannot bind {address} to {driver}");
            return Err(Error::new(ErrorKind::Unavailable, what, "the kernel has no such driver loaded")
                .with_hint(format!("run: modprobe {driver}")));
        }
        self.rebind(address, driver).inspect_err(|_| {
            if let Err(error) = self.rebind(address, old.as_deref()) {
                tracing::error!("{error}");
            }
        })?;
        Ok(old)
    }

    /// Whether the kernel has `driver`, built in or loaded.
    pub fn has_driver(&self, driver: &str) -> bool {
        self.root().join("drivers").join(driver).exists()
    }

    fn rebind(&self, address: Bdf, driver: Option<&str>) -> Result<()> {
        let device = self.path(address);
        let what = || format!("cannot bind {address} to {}", driver.unwrap_or("no driver"));
        if device.join("driver").exists() {
            write(&device.join("driver/unbind"), &address.to_string())?;
        }
        let Some(driver) = driver else { return Ok(()) };
        let driver_override = device.join("driver_override");
        write(&driver_override, driver)?;
        let probed = write(&self.root().join("drivers_probe"), &address.to_string());
        // The override is for this probe only. If it stayed, it would keep every other driver from binding.
        write(&driver_override, "\n")?;
        probed?;
        match self.find(address)?.driver {
            Some(bound) if bound == driver => Ok(()),
            // VFIO requires an IOMMU group for every device (`vfio_group_find_or_alloc` of the kernel).
            _ if driver == VFIO_DRIVER && !device.join("iommu_group").exists() => Err(no_group(what())),
            _ => Err(Error::new(ErrorKind::Unavailable, what(), "the driver did not bind to it")
                .with_hint("see why: dmesg | tail")),
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| {
        let error = Error::io(format!("cannot write {}", path.display()), &error);
        if error.kind() == ErrorKind::Permission { error.with_hint("run as root") } else { error }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::tests::fake_bus;

    fn with_files(dir: &Path, address: &str, drivers: &[&str]) {
        for driver in drivers {
            fs::create_dir_all(dir.join("drivers").join(driver)).unwrap();
        }
        for file in ["drivers_probe", &format!("devices/{address}/driver_override")] {
            fs::write(dir.join(file), "").unwrap();
        }
    }

    #[test]
    fn a_missing_driver_names_modprobe_and_changes_nothing() {
        let (dir, bus) = fake_bus(&[("0000:00:03.0", "8086", "100e", "e1000")]);
        with_files(dir.path(), "0000:00:03.0", &["e1000"]);
        let error = bus.bind("0000:00:03.0".parse().unwrap(), Some("vfio-pci")).unwrap_err();
        assert!(error.to_string().ends_with("run: modprobe vfio-pci"), "{error}");
        assert_eq!(bus.scan().unwrap()[0].driver.as_deref(), Some("e1000"));
    }

    #[test]
    fn what_is_no_name_of_a_driver_changes_nothing() {
        let (dir, bus) = fake_bus(&[("0000:00:03.0", "8086", "100e", "e1000")]);
        with_files(dir.path(), "0000:00:03.0", &["e1000"]);
        for driver in ["", ".", "..", "../devices", "e1000\nx", "x; reboot"] {
            let error = bus.bind("0000:00:03.0".parse().unwrap(), Some(driver)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
        }
        assert_eq!(bus.scan().unwrap()[0].driver.as_deref(), Some("e1000"));
        assert_eq!(fs::read_to_string(dir.path().join("devices/0000:00:03.0/driver_override")).unwrap(), "");
    }

    #[test]
    fn a_driver_that_refuses_leaves_no_override() {
        let (dir, bus) = fake_bus(&[("0000:00:03.0", "8086", "100e", "e1000")]);
        with_files(dir.path(), "0000:00:03.0", &["e1000", "vfio-pci"]);
        let address = "0000:00:03.0".parse().unwrap();
        let error = bus.bind(address, Some("vfio-pci")).unwrap_err();
        assert!(error.to_string().contains("it is in no IOMMU group"), "{error}");
        fs::create_dir(bus.path(address).join("iommu_group")).unwrap();
        let error = bus.bind(address, Some("vfio-pci")).unwrap_err();
        assert!(error.to_string().contains("did not bind to it"), "{error}");
        let left = fs::read_to_string(dir.path().join("devices/0000:00:03.0/driver_override")).unwrap();
        assert_eq!(left, "\n");
    }

    #[test]
    fn a_function_that_is_bound_already_is_left_alone() {
        let (_dir, bus) = fake_bus(&[("0000:00:03.0", "8086", "100e", "vfio-pci")]);
        let address = "0000:00:03.0".parse().unwrap();
        assert_eq!(bus.bind(address, Some("vfio-pci")).unwrap().as_deref(), Some("vfio-pci"));
    }
}
