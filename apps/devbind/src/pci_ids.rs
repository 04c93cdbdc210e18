//! Names of PCI devices, from the system's `pci.ids` (<https://pci-ids.ucw.cz>).

use std::fs;
use std::path::PathBuf;

use vireo_bus_pci::DeviceId;

/// Text of the database; empty if none is installed.
#[derive(Debug)]
pub(crate) struct PciIds(String);

impl PciIds {
    /// Reads the first of `files` that exists.
    pub(crate) fn read(files: &[PathBuf]) -> Self {
        let text = files.iter().find_map(|file| fs::read(file).ok()).unwrap_or_default();
        Self(String::from_utf8_lossy(&text).into_owned())
    }

    /// Returns the name of the device, without the vendor's name.
    pub(crate) fn name(&self, id: DeviceId) -> Option<String> {
        let (vendor, device) = (format!("{:04x}  ", id.vendor), format!("\t{:04x}  ", id.device));
        let devices = self.0.lines().skip_while(|line| !line.starts_with(&vendor)).skip(1);
        // A vendor's devices are indented by one tab, a device's subsystems by two.
        let mut devices = devices.take_while(|line| line.starts_with(['\t', '#']));
        Some(devices.find_map(|line| line.strip_prefix(&device))?.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_its_vendors() {
        let text = "# comment\n1af4  Red Hat, Inc.\n\t1041  Virtio 1.0 network device\n8086  Intel Corporation\n\
                    # inside\n\t100e  82540EM Gigabit Ethernet Controller\n\t\t8086 001e  PRO/1000 MT\n\
                    \t10d3  82574L Gigabit Network Connection\nC 02  Network controller\n\t00  Ethernet controller\n";
        let ids = PciIds(text.to_owned());
        for (vendor, device, name) in [
            (0x8086, 0x10d3, Some("82574L Gigabit Network Connection")),
            (0x1af4, 0x1041, Some("Virtio 1.0 network device")),
            (0x1af4, 0x10d3, None),
            (0x8086, 0x8086, None),
            (0x1234, 0x10d3, None),
        ] {
            assert_eq!(ids.name(DeviceId { vendor, device }).as_deref(), name);
        }
        assert_eq!(
            PciIds::read(&["/nonexistent".into()]).name(DeviceId { vendor: 0x8086, device: 0x10d3 }),
            None
        );
    }
}
