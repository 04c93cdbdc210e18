//! Devices without an IOMMU: what VFIO allows, and what the user can do.

use std::fs;
use std::path::Path;

use super::VfioMode;
use crate::error::{Error, ErrorKind};

/// Returns how to turn the IOMMU on, in a virtual machine or outside. Linux uses AMD's IOMMU wherever the
/// firmware offers it.
pub fn iommu_on() -> &'static str {
    iommu_on_of(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn iommu_on_of(cpuinfo: &str) -> &'static str {
    let mut flags =
        cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default().split_whitespace();
    match flags.any(|flag| flag == "hypervisor") {
        true => {
            "give this virtual machine an IOMMU (in QEMU: -device intel-iommu; in a cloud, use a bare-metal instance)"
        }
        false => "turn on VT-d or AMD-Vi in the firmware, and on Intel boot with intel_iommu=on",
    }
}

/// Returns the error for `what` if the device is not, or no longer, in an IOMMU group, which VFIO requires.
pub fn no_group(what: String) -> Error {
    let error = Error::new(ErrorKind::Unavailable, what, "it is in no IOMMU group, so the IOMMU is off");
    let switch = match noiommu_allowed() {
        Some(false) => "echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        None if !Path::new("/sys/module/vfio").exists() => "modprobe vfio enable_unsafe_noiommu_mode=1",
        _ => return error.with_hint(iommu_on()),
    };
    error.with_hint(format!(
        "{}; or, unsafe: {switch}, bind the device again, and use --vfio-mode noiommu",
        iommu_on()
    ))
}

/// Returns whether VFIO accepts devices without an IOMMU; `None` if it has no such switch or is not loaded.
pub fn noiommu_allowed() -> Option<bool> {
    let switch = fs::read_to_string("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode").ok()?;
    Some(switch.trim() != "N")
}

pub(super) fn needs_noiommu(what: String, mode: VfioMode) -> Error {
    Error::new(ErrorKind::Unavailable, what, "the device has no IOMMU")
        .with_hint(format!("{}; or accept that the NIC can reach all memory: --vfio-mode {mode}", iommu_on()))
}

pub(super) fn has_iommu(what: String) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        what,
        "the device has an IOMMU, so the kernel offers no mode without one",
    )
    .with_hint("use --vfio-mode cdev or container")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_machine_is_told_how_it_gets_an_iommu() {
        let cpu = "processor\t: 0\nflags\t\t: fpu vme hypervisor lahf_lm\n";
        assert!(iommu_on_of(cpu).contains("-device intel-iommu"));
        for host in ["", "flags\t\t: fpu vme\n", "model name\t: hypervisor\nflags\t\t: fpu\n"] {
            assert!(iommu_on_of(host).contains("in the firmware"));
        }
    }
}
