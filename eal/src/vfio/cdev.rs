//! A device by its own character device and iommufd (modes `cdev` and `noiommu-cdev`).

use std::fs;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio as uapi;

use super::acquire::{
    NOIOMMU_PREFIX, Node, Phases, Refusal, Vfio, cdev_name, group_of, has_iommu, lock, needs_noiommu,
};
use super::fds::CdevFds;
use super::space::AddressSpace;
use super::{VfioMode, diagnose, nodes, sys};
use crate::args::VfToken;
use crate::error::{Error, ErrorKind, Result};
use crate::ioctl::counted;
use crate::iommufd::Iommufd;
use crate::mmio::DeviceFile;

impl Vfio {
    /// Number and path of the device's own node.
    pub(super) fn cdev_path(&self, node: &Node, mode: VfioMode) -> Result<(String, PathBuf)> {
        let what = || format!("cannot use {} in mode {mode}", node.name);
        let name = cdev_name(node).ok_or_else(|| self.no_cdev(node, mode))?;
        match (name.starts_with(NOIOMMU_PREFIX), mode) {
            (true, VfioMode::Cdev) => return Err(needs_noiommu(what(), VfioMode::NoiommuCdev)),
            (false, VfioMode::NoiommuCdev) => return Err(has_iommu(what())),
            _ => {}
        }
        let number = fs::read_to_string(node.sysfs.join("vfio-dev").join(&name).join("dev"))
            .map_err(|error| Error::io(format!("cannot read the device number of {name}"), &error))?;
        let (number, dir) = (number.trim().to_owned(), self.dev.join("vfio/devices"));
        let path = self.nodes.find(&dir, &name, Some(&number)).unwrap_or_else(|| dir.join(&name));
        Ok((number, path))
    }

    pub(super) fn open_cdev(&self, node: &Node, mode: VfioMode) -> Result<CdevFds> {
        let (number, path) = self.cdev_path(node, mode)?;
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
        let device = self.nodes.open(&path).map_err(|error| match error.errno() {
            Some(Errno::ENOENT) => nodes::absent(error, &path, &number),
            _ => error,
        })?;
        nodes::check(&device, &path, &number, &node.name)?;
        Ok(CdevFds { iommufd, device: device.into() })
    }

    fn no_cdev(&self, node: &Node, mode: VfioMode) -> Error {
        let what = format!("cannot use {} in mode {mode}", node.name);
        let without_iommu =
            group_of(node).is_ok_and(|group| self.group_node(NOIOMMU_PREFIX, group).is_some());
        let (why, hint) = match (mode, without_iommu) {
            (VfioMode::Cdev, true) => return needs_noiommu(what, VfioMode::Noiommu),
            (_, true) => ("this kernel gives devices without IOMMU no VFIO cdev (7.3)", "noiommu"),
            (_, false) => ("the kernel gives it no VFIO cdev (CONFIG_VFIO_DEVICE_CDEV, 6.6)", "container"),
        };
        Error::new(ErrorKind::Unavailable, what, why).with_hint(format!("use --vfio-mode {hint}"))
    }

    /// Bind, allocate, attach: the order in which a map fails where it is made.
    pub(super) fn complete_cdev(
        &self,
        node: &Node,
        mode: VfioMode,
        fds: CdevFds,
        phases: &mut Phases,
    ) -> std::result::Result<DeviceFile, Refusal> {
        let CdevFds { iommufd, device } = fds;
        let key = self.space_key(node, mode);
        let check = |space: &AddressSpace| match space.ioas() {
            Some(ioas) if !ioas.iommufd().is_same(&iommufd) => Err(Error::new(
                ErrorKind::Usage,
                format!("cannot bind {} to iommufd", node.name),
                "its /dev/iommu is not the one that the ports before it have",
            )
            .with_hint("pass the same open /dev/iommu with each device")),
            _ => Ok(()),
        };
        self.existing(key).map_or(Ok(()), |space| check(&space))?;
        bind(self.token_of(node), |token| bind_iommufd(&device, &iommufd, token)).map_err(|refused| {
            let error = Error::os(format!("cannot bind {} to iommufd", node.name), refused.errno());
            match refused {
                Refused::TokenUnknown => Refusal {
                    error: error
                        .because("this kernel takes no VF token for a cdev (6.17 does)")
                        .with_hint("use --vfio-mode container"),
                    container_may: true,
                },
                Refused::For(_) => diagnose::bind_cdev(error, node, &self.dev).into(),
            }
        })?;
        phases.end("bind");
        let space = self
            .space(key, || Ok(AddressSpace::iommufd(iommufd.ioas_alloc()?, mode == VfioMode::NoiommuCdev)))?;
        // Another thread may have made it meanwhile, and the id below would be of something else.
        check(&space)?;
        let mut attach = uapi::vfio_device_attach_iommufd_pt {
            argsz: size_of::<uapi::vfio_device_attach_iommufd_pt>() as u32,
            flags: 0,
            pt_id: space.ioas().map_or(0, |ioas| ioas.id()),
            pasid: 0,
        };
        // SAFETY: the structure is complete.
        counted("VFIO_DEVICE_ATTACH_IOMMUFD_PT", || unsafe {
            sys::attach_iommufd_pt(device.as_raw_fd(), &mut attach)
        })
        .map_err(|errno| {
            let error = Error::os(format!("cannot attach {} to its address space", node.name), errno);
            Refusal { error: diagnose::attach(error, node), container_may: errno == Errno::EINVAL }
        })?;
        Ok(DeviceFile { file: ManuallyDrop::new(device.into()), _group: None, space })
    }
}

fn bind_iommufd(device: &OwnedFd, iommufd: &Iommufd, token: Option<&[u8; 16]>) -> nix::Result<()> {
    let mut bind = uapi::vfio_device_bind_iommufd {
        argsz: size_of::<uapi::vfio_device_bind_iommufd>() as u32,
        flags: if token.is_some() { uapi::VFIO_DEVICE_BIND_FLAG_TOKEN } else { 0 },
        iommufd: iommufd.as_fd().as_raw_fd(),
        out_devid: 0,
        token_uuid_ptr: token.map_or(0, |token| token.as_ptr() as u64),
    };
    // SAFETY: the structure is complete; the token's 16 bytes are borrowed until after the call.
    counted("VFIO_DEVICE_BIND_IOMMUFD", || unsafe { sys::bind_iommufd(device.as_raw_fd(), &mut bind) })
        .map(drop)
}

/// How a bind failed.
#[derive(Debug, PartialEq, Eq)]
enum Refused {
    /// The device wants a token, and the kernel takes none here.
    TokenUnknown,
    For(Errno),
}

impl Refused {
    fn errno(&self) -> Errno {
        match self {
            Self::TokenUnknown => Errno::EACCES,
            Self::For(errno) => *errno,
        }
    }
}

/// Calls `ioctl` with the token, and without it if the kernel does not know the flag, as before 6.17: it may be that the
/// device needs none.
fn bind(
    token: Option<VfToken>,
    mut ioctl: impl FnMut(Option<&[u8; 16]>) -> nix::Result<()>,
) -> std::result::Result<(), Refused> {
    let bytes = token.map(VfToken::bytes);
    match (ioctl(bytes.as_ref()), &bytes) {
        (Err(Errno::EINVAL), Some(_)) => ioctl(None).map_err(|errno| match errno {
            Errno::EACCES => Refused::TokenUnknown,
            errno => Refused::For(errno),
        }),
        (result, _) => result.map_err(Refused::For),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_kernel_that_takes_no_token_is_asked_without() {
        let token: VfToken = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3".parse().unwrap();
        // What a kernel answers to a bind with a token, and without.
        let kernel = |with, without| {
            bind(
                Some(token),
                |token| if token.is_some_and(|bytes| bytes[0] == 0xbd) { with } else { without },
            )
        };
        assert_eq!(kernel(Ok(()), Err(Errno::EACCES)), Ok(()));
        assert_eq!(kernel(Err(Errno::EINVAL), Ok(())), Ok(()));
        assert_eq!(kernel(Err(Errno::EINVAL), Err(Errno::EACCES)), Err(Refused::TokenUnknown));
        assert_eq!(kernel(Err(Errno::EINVAL), Err(Errno::EINVAL)), Err(Refused::For(Errno::EINVAL)));
        assert_eq!(kernel(Err(Errno::EACCES), Ok(())), Err(Refused::For(Errno::EACCES)));
        assert_eq!(bind(None, |_| Err(Errno::EINVAL)), Err(Refused::For(Errno::EINVAL)));
    }

    /// Before kernel 7.3 a device without IOMMU has an entry below `vfio-dev`, which has no number.
    #[test]
    fn a_cdev_without_number_is_none() {
        let root = tempfile::tempdir().unwrap();
        let node = Node { name: "0000:00:0d.0".into(), sysfs: root.path().join("device") };
        std::fs::create_dir_all(node.sysfs.join("vfio-dev/vfio9")).unwrap();
        symlink("/sys/kernel/iommu_groups/3", node.sysfs.join("iommu_group")).unwrap();
        let vfio = Vfio::new(None).with_dev_dir(root.path());
        let refusal = |mode| vfio.open_cdev(&node, mode).unwrap_err().to_string();

        assert!(refusal(VfioMode::Cdev).ends_with("use --vfio-mode container"));
        std::fs::create_dir_all(root.path().join("dev/vfio/noiommu-3")).unwrap();
        assert!(refusal(VfioMode::Cdev).ends_with("--vfio-mode noiommu"));
        let newer = refusal(VfioMode::NoiommuCdev);
        assert!(newer.contains("(7.3)") && newer.ends_with("use --vfio-mode noiommu"), "{newer}");
    }
}
