//! Properties of the machine that all its NICs share.

use std::fs;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::unistd::geteuid;
use serde::Serialize;
use vireo_eal::vfio::{LiveUpdate, noiommu_allowed};
use vireo_eal::{Eal, Error, Result};

/// The machine, and the user who runs the doctor.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    /// Kernel release.
    pub(crate) kernel: String,
    /// Names in sysfs of the IOMMUs that are on.
    pub(crate) iommu: Vec<String>,
    pub(crate) hugepages: String,
    /// Memory that may be locked, in KiB; `None` if there is no limit.
    pub(crate) memlock_kib: Option<u64>,
    /// Whether VFIO allows devices without an IOMMU; `None` if VFIO has no such switch or is not loaded.
    pub(crate) noiommu_allowed: Option<bool>,
    /// What the kernel keeps when it replaces itself by kexec.
    pub(crate) live_update: LiveUpdate,
    pub(crate) uid: u32,
}

impl Machine {
    /// Reads the machine whose `/sys` and `/proc` are below `root`.
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let release = root.join("proc/sys/kernel/osrelease");
        let (memlock, _) = getrlimit(Resource::RLIMIT_MEMLOCK)
            .map_err(|errno| Error::os("cannot read RLIMIT_MEMLOCK", errno))?;
        let mut iommu: Vec<String> = fs::read_dir(root.join("sys/class/iommu"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        iommu.sort();
        Ok(Self {
            kernel: fs::read_to_string(&release)
                .map_err(|error| Error::io(format!("cannot read {}", release.display()), &error))?
                .trim()
                .to_owned(),
            iommu,
            hugepages: Eal::hugepages_line(),
            memlock_kib: (memlock != RLIM_INFINITY).then_some(memlock / 1024),
            noiommu_allowed: noiommu_allowed(),
            live_update: LiveUpdate::of(root),
            uid: geteuid().as_raw(),
        })
    }

    /// Formats one line per property.
    pub(crate) fn text(&self) -> String {
        let iommu = match self.iommu.as_slice() {
            [] => "off or not present".to_owned(),
            names => {
                format!("on ({})", names.iter().map(|name| of_vendor(name)).collect::<Vec<_>>().join(", "))
            }
        };
        let noiommu = match self.noiommu_allowed {
            Some(true) => "allowed",
            Some(false) => "not allowed",
            None => "not supported by this kernel, or VFIO is not loaded",
        };
        let live_update = match self.live_update {
            LiveUpdate::Off => "off, or not supported by this kernel",
            LiveUpdate::NoDevices => "on; keeps no devices of vfio-pci",
            LiveUpdate::Cdevs => "on; keeps devices that are open in mode cdev, and resets them",
        };
        let memlock = self.memlock_kib.map_or_else(|| "unlimited".to_owned(), |kib| format!("{kib} KiB"));
        let mut text = String::new();
        for (name, value) in [
            ("kernel", self.kernel.as_str()),
            ("IOMMU", &iommu),
            ("no-IOMMU mode", noiommu),
            ("live update", live_update),
            ("hugepages", &self.hugepages),
            ("RLIMIT_MEMLOCK", &memlock),
            ("user", &format!("uid {}", self.uid)),
        ] {
            text += &format!("{name:<16}{value}\n");
        }
        text
    }
}

/// Returns `name` with the kind of IOMMU, if the kernel's name for it implies the vendor.
fn of_vendor(name: &str) -> String {
    match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "dmar" => format!("{name}, Intel VT-d"),
        "ivhd" => format!("{name}, AMD-Vi"),
        _ => name.to_owned(),
    }
}
