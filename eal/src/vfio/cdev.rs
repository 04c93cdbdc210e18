//! Devices opened through their own character device and iommufd (modes `cdev` and `noiommu-cdev`).

use std::fs;
use std::path::PathBuf;

use nix::errno::Errno;
use vireo_vfio::{Cdev, NOIOMMU_PREFIX};

use super::acquire::{BusDevice, Refusal, Vfio, cdev_name, group_of, lock};
use super::device::{Held, Open};
use super::fds::CdevFds;
use super::noiommu::{has_iommu, needs_noiommu};
use super::phases::Phases;
use super::space::AddressSpace;
use super::{VfioMode, device_nodes, diagnose};
use crate::args::VfToken;
use crate::error::{Error, ErrorKind, Result};

impl Vfio {
    /// Device number and path of the device's own node.
    pub(super) fn cdev_path(&self, device: &BusDevice, mode: VfioMode) -> Result<(String, PathBuf)> {
        let what = || format!("cannot use {} in mode {mode}", device.name);
        let name = cdev_name(device).ok_or_else(|| self.no_cdev(device, mode))?;
        match (name.starts_with(NOIOMMU_PREFIX), mode) {
            (true, VfioMode::Cdev) => return Err(needs_noiommu(what(), VfioMode::NoiommuCdev)),
            (false, VfioMode::NoiommuCdev) => return Err(has_iommu(what())),
            _ => {}
        }
        let number = fs::read_to_string(device.sysfs.join("vfio-dev").join(&name).join("dev"))
            .map_err(|error| Error::io(format!("cannot read the device number of {name}"), &error))?;
        let (number, dir) = (number.trim().to_owned(), self.dev.join("vfio/devices"));
        let path = self.nodes.find(&dir, &name, Some(&number)).unwrap_or_else(|| dir.join(&name));
        Ok((number, path))
    }

    pub(super) fn open_cdev(&self, device: &BusDevice, mode: VfioMode) -> Result<CdevFds> {
        let (number, path) = self.cdev_path(device, mode)?;
        let iommufd = {
            let mut kept = lock(&self.iommufd);
            match kept.upgrade() {
                Some(iommufd) => iommufd,
                None => {
                    let iommufd = self.nodes.iommufd(&self.iommufd_path())?;
                    *kept = iommufd.downgrade();
                    iommufd
                }
            }
        };
        let file = self.nodes.open(&path).map_err(|error| match error.errno() {
            Some(Errno::ENOENT) => device_nodes::absent(error, &path, &number),
            _ => error,
        })?;
        device_nodes::check(&file, &path, &number, &device.name)?;
        Ok(CdevFds { iommufd, device: file.into() })
    }

    fn no_cdev(&self, device: &BusDevice, mode: VfioMode) -> Error {
        let what = format!("cannot use {} in mode {mode}", device.name);
        let without_iommu =
            group_of(device).is_ok_and(|group| self.group_node(NOIOMMU_PREFIX, group).is_some());
        let (why, hint) = match (mode, without_iommu) {
            (VfioMode::Cdev, true) => return needs_noiommu(what, VfioMode::Noiommu),
            (_, true) => ("this kernel has no VFIO cdev for devices without an IOMMU (7.3 has)", "noiommu"),
            (_, false) => ("the kernel has no VFIO cdev for it (CONFIG_VFIO_DEVICE_CDEV, 6.6)", "container"),
        };
        Error::new(ErrorKind::Unavailable, what, why).with_hint(format!("use --vfio-mode {hint}"))
    }

    /// Binds the device, allocates an IOAS and attaches the device to it. In this order, a map that fails is
    /// reported by the map call.
    pub(super) fn complete_cdev(
        &self,
        device: &BusDevice,
        mode: VfioMode,
        fds: CdevFds,
        phases: &mut Phases,
    ) -> std::result::Result<Open, Refusal> {
        let CdevFds { iommufd, device: fd } = fds;
        let key = self.space_key(device, mode);
        let check = |space: &AddressSpace| match space.ioas() {
            Some(ioas) if !ioas.iommufd().is_same(&iommufd) => Err(Error::new(
                ErrorKind::Usage,
                format!("cannot bind {} to iommufd", device.name),
                "its /dev/iommu is not the one that the earlier ports use",
            )
            .with_hint("pass the same open /dev/iommu with each device")),
            _ => Ok(()),
        };
        self.existing(key).map_or(Ok(()), |space| check(&space))?;
        // SAFETY: `fd` is the device's node: `open_cdev` or `adopt` has compared its number with the one in
        // sysfs.
        let cdev = unsafe { Cdev::from_fd_unchecked(fd, &device.name) };
        let token = self.token_of(device).map(VfToken::bytes);
        cdev.bind(&iommufd, token.as_ref()).map_err(|refused| match refused {
            vireo_vfio::Error::TokenUnsupported { .. } => Refusal {
                error: Error::from(refused).with_hint("use --vfio-mode container"),
                retry_in_container: true,
            },
            refused => diagnose::bind_cdev(refused.into(), device, &self.dev).into(),
        })?;
        phases.end("bind");
        let space = self
            .space(key, || Ok(AddressSpace::iommufd(iommufd.ioas_alloc()?, mode == VfioMode::NoiommuCdev)))?;
        // Another thread may have created the space in the meantime, and the id below would be that of
        // another object.
        check(&space)?;
        let id = space.ioas().map_or(0, |ioas| ioas.id());
        cdev.attach(id).map_err(|refused| {
            let retry_in_container = refused.errno() == Some(Errno::EINVAL);
            Refusal { error: diagnose::attach(refused.into(), device), retry_in_container }
        })?;
        Ok(Open { fd: cdev.into_fd(), held: Held { group: None, space } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Before kernel 7.3, a device without an IOMMU has an entry below `vfio-dev` that has no device number.
    #[test]
    fn a_cdev_without_number_is_none() {
        let root = tempfile::tempdir().unwrap();
        let device = BusDevice { name: "0000:00:0d.0".into(), sysfs: root.path().join("device") };
        std::fs::create_dir_all(device.sysfs.join("vfio-dev/vfio9")).unwrap();
        symlink("/sys/kernel/iommu_groups/3", device.sysfs.join("iommu_group")).unwrap();
        let vfio = Vfio::new(None).with_dev_dir(root.path());
        let refusal = |mode| vfio.open_cdev(&device, mode).unwrap_err().to_string();

        assert!(refusal(VfioMode::Cdev).ends_with("use --vfio-mode container"));
        std::fs::create_dir_all(root.path().join("dev/vfio/noiommu-3")).unwrap();
        assert!(refusal(VfioMode::Cdev).ends_with("--vfio-mode noiommu"));
        let newer = refusal(VfioMode::NoiommuCdev);
        assert!(newer.contains("(7.3 has)") && newer.ends_with("use --vfio-mode noiommu"), "{newer}");
    }
}
