//! Verdicts. Each comes from the code that a program runs when it starts, or from the part of that code that
//! leaves the NIC with its driver. The reasons are the errors of that code, so that programs report the same
//! ones.

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

/// Where NICs and their device nodes are.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) bus: Bus,
    /// Directory that contains `/dev` and `/sys/class`.
    pub(crate) root: PathBuf,
    /// Token, as in l2fwd's `--vfio-vf-token`.
    pub(crate) vf_token: Option<VfToken>,
}

/// A NIC and its verdict in each mode.
#[derive(Debug, Serialize)]
pub(crate) struct Nic {
    pub(crate) address: String,
    pub(crate) id: String,
    /// Vireo's driver for the NIC.
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

/// Why a NIC cannot be used in a mode.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Refusal {
    /// Step at which a start would fail.
    pub(crate) what: String,
    pub(crate) why: String,
    /// What the user should do; `None` if nothing helps.
    pub(crate) hint: Option<String>,
    /// Name of the errno that the kernel returned, if the kernel refused.
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

/// Examines the NICs at `addresses`, or all Ethernet controllers if `addresses` is empty, in each of `modes`.
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

    /// Does what a program does with one NIC when it starts, then releases the NIC.
    fn attempt(&self, info: &PciInfo, mode: VfioMode) -> Result<()> {
        // Opened again for each mode: the kernel gives a device to one owner at a time, and each mode is
        // another owner.
        let vfio = Vfio::new(self.vf_token).with_dev_dir(&self.root);
        let known = |id: DeviceId| driver_of(id).is_some();
        if known(info.id) && !self.bus.is_on_vfio(info) {
            // Faults that binding would not fix come first: the command that binds is the wrong advice for
            // them.
            vfio.preflight(&self.bus.device(info.address), mode, self.bus.has_driver(VFIO_DRIVER))?;
        }
        self.bus.usable(info, known)?;
        let port = ports::open_one(&self.bus, &vfio, info.clone(), mode, &[])?;
        // Memory that l2fwd needs for this port alone, with one queue pair on one lcore.
        let need = Config::default().need(1, 1);
        let region = Region::new(need.bytes(&[&port]), Backing::HugeMemfd)?;
        // Unmapped at once, before the port is closed, as at the end of any program.
        memory::map(region, &need, &[&port]).map(drop)
    }
}
