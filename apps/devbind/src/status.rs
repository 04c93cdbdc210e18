//! The list of Ethernet controllers, as a table and as JSON.

use comfy_table::{Table, presets};
use serde::Serialize;
use vireo_bus_pci::PciInfo;
use vireo_drivers::table::driver_of;
use vireo_eal::{Error, ErrorKind, Result};

use crate::host::Host;
use crate::pci_ids::PciIds;

/// One Ethernet controller.
#[derive(Debug, Serialize)]
pub(crate) struct Nic {
    pub(crate) address: String,
    pub(crate) id: String,
    /// Name of the device, if a `pci.ids` is installed.
    pub(crate) name: Option<String>,
    /// Kernel driver.
    pub(crate) driver: Option<String>,
    /// Kernel driver before the first change.
    pub(crate) recorded: Option<String>,
    pub(crate) iommu_group: Option<u32>,
    pub(crate) numa_node: Option<u32>,
    /// Vireo's driver for the device.
    pub(crate) vireo: Option<&'static str>,
    pub(crate) interfaces: Vec<String>,
    /// Whether this machine's traffic, a bond, a bridge or another network namespace needs the NIC.
    pub(crate) active: bool,
    /// Whether the NIC's interface is in another network namespace.
    pub(crate) other_namespace: bool,
}

/// Returns the Ethernet controllers, sorted by address.
pub(crate) fn list(host: &Host) -> Result<Vec<Nic>> {
    host.bus.require()?;
    let names = PciIds::read(&host.pci_ids);
    let ethernet = host.bus.scan()?.into_iter().filter(PciInfo::is_ethernet);
    ethernet
        .map(|info| {
            let interfaces = host.interfaces(info.address);
            let other_namespace = host.is_in_other_namespace(info.address);
            Ok(Nic {
                address: info.address.to_string(),
                id: info.id.to_string(),
                name: names.name(info.id),
                recorded: host.recorded(info.address)?,
                iommu_group: host.bus.iommu_group(info.address),
                numa_node: info.numa_node,
                vireo: driver_of(info.id),
                active: other_namespace || interfaces.iter().any(|interface| interface.need.is_some()),
                other_namespace,
                interfaces: interfaces.into_iter().map(|interface| interface.name).collect(),
                driver: info.driver,
            })
        })
        .collect()
}

/// Formats the list as a table for people.
pub(crate) fn table(nics: &[Nic]) -> String {
    if nics.is_empty() {
        return "no Ethernet controllers on the PCI bus".to_owned();
    }
    let number = |n: Option<u32>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let is_named = nics.iter().any(|nic| nic.name.is_some());
    let mut header = vec!["ADDRESS", "ID", "DRIVER", "VIREO", "GROUP", "NUMA", "INTERFACE"];
    header.extend(is_named.then_some("DEVICE"));
    table.set_header(header);
    for nic in nics {
        let mut interface = nic.interfaces.clone();
        interface.extend(nic.other_namespace.then(|| "(in another network namespace)".to_owned()));
        interface.extend((nic.active && !nic.other_namespace).then(|| "(active)".to_owned()));
        let was = |driver: &String| format!("(was {})", if driver.is_empty() { "unbound" } else { driver });
        interface.extend(nic.recorded.as_ref().map(was));
        let mut row = vec![
            nic.address.clone(),
            nic.id.clone(),
            nic.driver.clone().unwrap_or_else(|| "-".to_owned()),
            nic.vireo.unwrap_or("-").to_owned(),
            number(nic.iommu_group),
            number(nic.numa_node),
            interface.join(" "),
        ];
        row.extend(is_named.then(|| nic.name.clone().unwrap_or_default()));
        table.add_row(row);
    }
    // The first column needs no left margin, and the last none on the right.
    table.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Formats the list as JSON for programs.
pub(crate) fn json(nics: &[Nic]) -> Result<String> {
    serde_json::to_string_pretty(nics)
        .map_err(|error| Error::new(ErrorKind::Protocol, "cannot encode the list", error.to_string()))
}
