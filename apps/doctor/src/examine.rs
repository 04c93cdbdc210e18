//! The verdicts. Each is the outcome of what a program's start does, or as much of it as leaves the NIC with its
//! driver; the reasons are the errors of that code, so that no program can say another one.

use std::path::PathBuf;

use serde::Serialize;
use vireo_bus_pci::{Bus, DeviceId, PciInfo, VFIO_DRIVER};
use vireo_drivers::table::driver_of;
use vireo_drivers::{memory, ports};
use vireo_eal::args::VfToken;
use vireo_eal::bdf::Bdf;
use vireo_eal::mem::{Backing, Region};
use vireo_eal::vfio::{Vfio, VfioMode};
use vireo_eal::{Error, Result};
use vireo_frame::Config;

/// Where NICs and their nodes are.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) bus: Bus,
    /// Where `/dev` and `/sys/class` are.
    pub(crate) root: PathBuf,
    /// As `--vfio-vf-token` of l2fwd.
    pub(crate) vf_token: Option<VfToken>,
}

/// A NIC, and what became of it in each mode.
#[derive(Debug, Serialize)]
pub(crate) struct Nic {
    pub(crate) address: String,
    pub(crate) id: String,
    /// Vireo's driver for it.
    pub(crate) driver: Option<&'static str>,
    pub(crate) kernel_driver: Option<String>,
    pub(crate) iommu_group: Option<u32>,
    pub(crate) modes: Vec<Verdict>,
}

/// Whether a NIC can be used in a mode.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) mode: &'static str,
    pub(crate) usable: bool,
    #[serde(flatten)]
    pub(crate) refusal: Option<Refusal>,
}

/// Why not.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Refusal {
    /// What a start would fail at.
    pub(crate) what: String,
    pub(crate) why: String,
    /// What the user should do; none when nothing helps.
    pub(crate) hint: Option<String>,
    /// What the kernel answered, by its name, if it was the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) errno: Option<String>,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self {
            what: error.what().to_owned(),
            why: error.why().to_owned(),
            hint: error.hint().map(str::to_owned),
            errno: error.errno().map(|errno| format!("{errno:?}")),
        }
    }
}

/// The NICs at `addresses`, or all Ethernet controllers, in each of `modes`.
///
/// # Errors
/// When there is no function at one of the addresses, or no PCI bus.
pub(crate) fn examine(host: &Host, addresses: &[Bdf], modes: &[VfioMode]) -> Result<Vec<Nic>> {
    let functions = if addresses.is_empty() {
        host.bus.require()?;
        host.bus.scan()?.into_iter().filter(PciInfo::is_ethernet).collect()
    } else {
        addresses.iter().map(|address| host.bus.find(*address)).collect::<Result<Vec<_>>>()?
    };
    Ok(functions.into_iter().map(|info| host.nic(info, modes)).collect())
}

impl Host {
    fn nic(&self, info: PciInfo, modes: &[VfioMode]) -> Nic {
        let verdict = |mode: &VfioMode| {
            let refusal = self.attempt(&info, *mode).err().map(Refusal::from);
            Verdict { mode: mode.name(), usable: refusal.is_none(), refusal }
        };
        let modes = modes.iter().map(verdict).collect();
        Nic {
            address: info.address.to_string(),
            id: info.id.to_string(),
            driver: driver_of(info.id),
            iommu_group: self.bus.iommu_group(info.address),
            kernel_driver: info.driver,
            modes,
        }
    }

    /// Does what a start does with one NIC, and releases it.
    fn attempt(&self, info: &PciInfo, mode: VfioMode) -> Result<()> {
        // Each time anew: the kernel gives a device to one owner at a time, and modes are other owners.
        let vfio = Vfio::new(self.vf_token).with_dev_dir(&self.root);
        let known = |id: DeviceId| driver_of(id).is_some();
        if known(info.id) && !self.bus.is_on_vfio(info) {
            // Faults that a bind would not fix come first: for them the command that binds is the wrong advice.
            vfio.preflight(&self.bus.device(info.address), mode, self.bus.has_driver(VFIO_DRIVER))?;
        }
        self.bus.usable(info, known)?;
        let port = ports::open_one(&self.bus, &vfio, info.clone(), mode, &[])?;
        // What l2fwd takes for this port alone, with one pair of queues on one lcore.
        let need = Config::default().need(1, 1);
        let region = Region::new(need.bytes(&[&port]), Backing::HugeMemfd)?;
        // Unmapped at once; the port goes after it, as at the end of any program.
        memory::map(region, &need, &[&port]).map(drop)
    }
}
