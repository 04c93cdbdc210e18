//! The list of Ethernet controllers, as a table and as JSON.

use comfy_table::{Table, presets};
use serde::Serialize;
use vireo_bus_pci::PciInfo;
use vireo_drivers::ports::driver_of;
use vireo_eal::{Error, ErrorKind, Result};

use crate::host::Host;

/// One Ethernet controller.
#[derive(Debug, Serialize)]
pub(crate) struct Nic {
    pub(crate) address: String,
    pub(crate) id: String,
    /// Kernel driver.
    pub(crate) driver: Option<String>,
    /// The kernel driver before the first change.
    pub(crate) recorded: Option<String>,
    pub(crate) iommu_group: Option<u32>,
    pub(crate) numa_node: Option<u32>,
    /// Vireo's driver for it.
    pub(crate) vireo: Option<&'static str>,
    pub(crate) interfaces: Vec<String>,
    /// Whether it carries this machine's traffic.
    pub(crate) active: bool,
}

/// The Ethernet controllers, by address.
pub(crate) fn list(host: &Host) -> Result<Vec<Nic>> {
    let ethernet = host.bus.scan()?.into_iter().filter(PciInfo::is_ethernet);
    ethernet
        .map(|info| {
            let interfaces = host.interfaces(info.address);
            Ok(Nic {
                address: info.address.to_string(),
                id: info.id.to_string(),
                recorded: host.recorded(info.address)?,
                iommu_group: host.bus.iommu_group(info.address),
                numa_node: info.numa_node,
                vireo: driver_of(info.id),
                active: interfaces.iter().any(|(_, why)| why.is_some()),
                interfaces: interfaces.into_iter().map(|(name, _)| name).collect(),
                driver: info.driver,
            })
        })
        .collect()
}

/// The list for people.
pub(crate) fn table(nics: &[Nic]) -> String {
    if nics.is_empty() {
        return "no Ethernet controllers on the PCI bus".to_owned();
    }
    let number = |n: Option<u32>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["ADDRESS", "ID", "DRIVER", "VIREO", "GROUP", "NUMA", "INTERFACE"]);
    for nic in nics {
        let mut interface = nic.interfaces.clone();
        interface.extend(nic.active.then(|| "(active)".to_owned()));
        let was = |driver: &String| format!("(was {})", if driver.is_empty() { "unbound" } else { driver });
        interface.extend(nic.recorded.as_ref().map(was));
        table.add_row([
            nic.address.clone(),
            nic.id.clone(),
            nic.driver.clone().unwrap_or_else(|| "-".to_owned()),
            nic.vireo.unwrap_or("-").to_owned(),
            number(nic.iommu_group),
            number(nic.numa_node),
            interface.join(" "),
        ]);
    }
    // The first column needs no margin and the last none at its end.
    table.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().join("\n")
}

/// The list for programs.
pub(crate) fn json(nics: &[Nic]) -> Result<String> {
    serde_json::to_string_pretty(nics)
        .map_err(|error| Error::new(ErrorKind::Protocol, "cannot encode the list", error.to_string()))
}
