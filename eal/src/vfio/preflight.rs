//! Checks of a mode before the device is bound to VFIO's driver.

use super::VfioMode;
use super::acquire::{BusDevice, Vfio, group_of};
use super::noiommu::{has_iommu, needs_noiommu, no_group, noiommu_allowed};
use crate::error::{ErrorKind, Result};

impl Vfio {
    /// Checks whether `device` can be used in `mode` after it is bound to VFIO's driver, as far as that is
    /// known while it is bound to another driver, or to none. `loaded` is whether the kernel has VFIO's
    /// driver; if not, what that driver provides is not checked. Opens no device, and no node except
    /// `/dev/vfio/vfio` or `/dev/iommu`. Missing permission to open that node is not an error: permissions
    /// are checked after the bind.
    ///
    /// # Errors
    /// Same as [`Vfio::acquire`] or, if the kernel would refuse the bind, the error of the bind.
    pub fn preflight(&self, device: &BusDevice, mode: VfioMode, loaded: bool) -> Result<()> {
        self.preflight_where(device, mode, loaded, noiommu_allowed())
    }

    fn preflight_where(
        &self,
        device: &BusDevice,
        mode: VfioMode,
        loaded: bool,
        noiommu: Option<bool>,
    ) -> Result<()> {
        let what = || format!("cannot use {} in mode {mode}", device.name);
        // A group without an IOMMU is created by the bind, so a group that exists now has an IOMMU.
        match (group_of(device).is_ok(), mode.has_iommu()) {
            (true, false) => return Err(has_iommu(what())),
            // Every kernel has `noiommu`. Whether it has `noiommu-cdev` is known only after the bind.
            (false, true) if noiommu == Some(true) => return Err(needs_noiommu(what(), VfioMode::Noiommu)),
            (false, true) => return Err(no_group(what())),
            (false, false) if noiommu == Some(false) || (loaded && noiommu.is_none()) => {
                return Err(no_group(what()));
            }
            (true, true) | (false, false) => {}
        }
        let shared = match mode {
            VfioMode::Cdev | VfioMode::NoiommuCdev => self.nodes.iommufd(&self.iommufd_path()).map(drop),
            VfioMode::Container | VfioMode::Noiommu if !loaded => return Ok(()),
            _ => self.open_container(mode).map(drop),
        };
        shared.or_else(|error| if error.kind() == ErrorKind::Permission { Ok(()) } else { Err(error) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn machine(group: bool) -> (tempfile::TempDir, Vfio, BusDevice) {
        let root = tempfile::tempdir().unwrap();
        let device = BusDevice { name: "0000:00:0d.0".into(), sysfs: root.path().join("device") };
        fs::create_dir_all(&device.sysfs).unwrap();
        fs::create_dir_all(root.path().join("dev/vfio")).unwrap();
        if group {
            symlink("/sys/kernel/iommu_groups/3", device.sysfs.join("iommu_group")).unwrap();
        }
        let vfio = Vfio::new(None).with_dev_dir(root.path());
        (root, vfio, device)
    }

    #[test]
    fn the_iommu_decides_which_modes_there_are() {
        let (root, vfio, device) = machine(true);
        fs::write(root.path().join("dev/vfio/vfio"), "").unwrap();
        let refusal = |mode| vfio.preflight(&device, mode, true).unwrap_err().to_string();
        assert!(vfio.preflight(&device, VfioMode::Container, true).is_ok());
        assert!(refusal(VfioMode::Noiommu).ends_with("use --vfio-mode cdev or container"));
        assert!(refusal(VfioMode::NoiommuCdev).contains("the device has an IOMMU"));

        let (root, vfio, device) = machine(false);
        fs::write(root.path().join("dev/vfio/vfio"), "").unwrap();
        let refusal =
            |mode, noiommu| vfio.preflight_where(&device, mode, true, noiommu).unwrap_err().to_string();
        for noiommu in [Some(false), None] {
            for mode in [VfioMode::Container, VfioMode::Cdev, VfioMode::Compat, VfioMode::Noiommu] {
                assert!(refusal(mode, noiommu).contains("it is in no IOMMU group"), "{mode}");
            }
        }
        assert!(refusal(VfioMode::Cdev, Some(true)).ends_with("--vfio-mode noiommu"));
        assert!(vfio.preflight_where(&device, VfioMode::Noiommu, true, Some(true)).is_ok());
        // It is unknown whether a module that is not loaded has the switch.
        assert!(vfio.preflight_where(&device, VfioMode::Noiommu, false, None).is_ok());
    }

    #[test]
    fn what_the_kernel_lacks_is_named() {
        let (_root, vfio, device) = machine(true);
        let refusal = |mode| vfio.preflight(&device, mode, true).unwrap_err().to_string();
        assert!(refusal(VfioMode::Container).ends_with("run: modprobe vfio-pci"));
        for mode in [VfioMode::Cdev, VfioMode::Compat] {
            assert!(refusal(mode).contains("modprobe iommufd, or choose --vfio-mode container"), "{mode}");
        }
        // A driver that is not loaded is loaded by the command that binds the device.
        assert!(vfio.preflight(&device, VfioMode::Container, false).is_ok());
    }
}
