//! A device by its IOMMU group, in a container (modes `container`, `compat` and `noiommu`).

use std::ffi::CString;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use vfio_bindings::bindings::vfio as uapi;

use super::acquire::{NOIOMMU_PREFIX, Node, Phases, Vfio, group_of, has_iommu, needs_noiommu, no_group};
use super::fds::GroupFds;
use super::space::{AddressSpace, Container};
use super::{VfioMode, diagnose, nodes, sys};
use crate::error::{Error, ErrorKind, Result};
use crate::ioctl::counted;
use crate::mmio::DeviceFile;
use crate::rlimit;

impl Vfio {
    /// Node of the containers of `mode`.
    pub(super) fn container_path(&self, mode: VfioMode) -> PathBuf {
        if mode == VfioMode::Compat { self.iommufd_path() } else { self.dev.join("vfio/vfio") }
    }

    /// Number of the device's group, its node, and the node's device number if the kernel tells.
    pub(super) fn group_path(&self, node: &Node, mode: VfioMode) -> Result<(u32, PathBuf, Option<String>)> {
        let what = || format!("cannot use {} in mode {mode}", node.name);
        let group = group_of(node).map_err(|_| no_group(what()))?;
        let (wanted, other) = match mode {
            VfioMode::Noiommu => (NOIOMMU_PREFIX, ""),
            _ => ("", NOIOMMU_PREFIX),
        };
        let name = format!("{wanted}{group}");
        let path = match self.group_node(wanted, group) {
            Some(path) => path,
            None if self.group_node(other, group).is_none() => self.dev.join("vfio").join(&name),
            None if mode == VfioMode::Noiommu => return Err(has_iommu(what())),
            None => return Err(needs_noiommu(what(), VfioMode::Noiommu)),
        };
        Ok((group, path, self.group_number(&name)))
    }

    pub(super) fn open_group(&self, node: &Node, mode: VfioMode) -> Result<GroupFds> {
        let (group, path, number) = self.group_path(node, mode)?;
        let existing = self.existing(self.space_key(node, mode));
        let kept = existing.as_ref().and_then(|space| space.container());
        let container = match kept {
            Some(container) => container.fd.try_clone().map_err(cannot_duplicate)?,
            None => self.open_container(mode)?,
        };
        let group = match kept.and_then(|container| container.group(group)) {
            Some(file) => file,
            None => {
                let file = self.nodes.open(&path).map_err(|error| match (&number, error.errno()) {
                    (Some(number), Some(Errno::ENOENT)) => nodes::absent(error, &path, number),
                    _ => diagnose::group_open(error, node, &self.dev),
                })?;
                if let Some(number) = number {
                    nodes::check(&file, &path, &number, &format!("IOMMU group {group}"))?;
                }
                Arc::new(file)
            }
        };
        Ok(GroupFds { container, group })
    }

    pub(super) fn open_container(&self, mode: VfioMode) -> Result<OwnedFd> {
        let module = match mode {
            VfioMode::Compat => "run: modprobe iommufd, or choose --vfio-mode container",
            _ => "run: modprobe vfio-pci",
        };
        let file = self.nodes.open(&self.container_path(mode)).map_err(|error| missing(error, module))?;
        Ok(file.into())
    }

    /// Puts the group into the container of its mode and takes the device out of the group. `opening` is
    /// released before the kernel resets the device.
    pub(super) fn complete_group(
        &self,
        node: &Node,
        mode: VfioMode,
        fds: GroupFds,
        opening: MutexGuard<'_, ()>,
        phases: &mut Phases,
    ) -> Result<DeviceFile> {
        let what = || format!("cannot use {}", node.name);
        let number = group_of(node).map_err(|_| no_group(what()))?;
        let key = self.space_key(node, mode);
        let GroupFds { container, group } = fds;
        // Nobody abandons the container meanwhile.
        let _held = self.existing(key).and_then(|space| space.container()?.any());
        let in_container = status(&group, number, node)? & uapi::VFIO_GROUP_FLAGS_CONTAINER_SET != 0;
        let mut container = Some(container);
        let space = self.space(key, || {
            let fd = container.take().ok_or_else(|| Error::os(what(), Errno::EBADF))?;
            if !in_container {
                set_container(&group, number, &fd, mode)?;
                set_iommu(&fd, mode)?;
            }
            let container = Container::new(fd, mode == VfioMode::Compat, number, &group);
            Ok(match mode {
                VfioMode::Noiommu => AddressSpace::none(container),
                _ => AddressSpace::type1(container),
            })
        })?;
        let Some(shared) = space.container() else {
            return Err(Error::new(ErrorKind::Usage, what(), "its mode has no container"));
        };
        let joins = container.is_some();
        if joins && !in_container {
            set_container(&group, number, &shared.fd, mode)?;
        }
        let group = shared.group(number).unwrap_or(group);
        shared.add(number, &group);
        drop(opening);
        phases.end("bind");
        let device = self.device_fd(node, &group)?;
        let device = if mode == VfioMode::Noiommu { above_memory(device) } else { device };
        Ok(DeviceFile { file: ManuallyDrop::new(device.into()), _group: Some(group), space })
    }

    fn device_fd(&self, node: &Node, group: &File) -> Result<OwnedFd> {
        let what = || format!("cannot open {} in its group", node.name);
        let name = match self.token_of(node) {
            Some(token) => format!("{} vf_token={token}", node.name),
            None => node.name.clone(),
        };
        let name = CString::new(name)
            .map_err(|_| Error::new(ErrorKind::Usage, what(), "the name has a NUL byte in it"))?;
        // SAFETY: the argument is a string that ends in NUL and lives for the call.
        let fd = counted("VFIO_GROUP_GET_DEVICE_FD", || unsafe {
            sys::group_get_device_fd(group.as_raw_fd(), name.as_ptr())
        })
        .map_err(|errno| diagnose::bind(Error::os(what(), errno), node, &self.dev))?;
        // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The same device at a descriptor above all those of packet memory.
///
/// Without an IOMMU nothing pins the pages, so when the process is killed they must outlive the device's bus
/// mastering. The kernel puts off the last close of each file until all descriptors are gone through, and then
/// begins with the highest (`close_files`, and `task_work_run`, which is last in, first out).
fn above_memory(device: OwnedFd) -> OwnedFd {
    const ABOVE: i32 = 512;
    match fcntl(&device, FcntlArg::F_DUPFD_CLOEXEC(ABOVE)) {
        // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
        Err(errno) => {
            tracing::warn!(
                "pages may go before the NIC stops if this process is killed: {errno}; {}",
                rlimit::more_files(ABOVE as u64)
            );
            device
        }
    }
}

/// `hint` is for a node that is not there; another error has its own.
fn missing(error: Error, hint: &str) -> Error {
    match error.errno() {
        Some(Errno::ENOENT | Errno::ENODEV) => error.with_hint(hint),
        _ => error,
    }
}

fn cannot_duplicate(error: std::io::Error) -> Error {
    Error::io("cannot duplicate a descriptor", &error)
}

/// Flags of a group that can be used.
fn status(group: &File, number: u32, node: &Node) -> Result<u32> {
    let mut status = uapi::vfio_group_status { argsz: size_of::<uapi::vfio_group_status>() as u32, flags: 0 };
    // SAFETY: the structure is complete.
    counted("VFIO_GROUP_GET_STATUS", || unsafe { sys::group_get_status(group.as_raw_fd(), &mut status) })
        .map_err(|errno| Error::os(format!("cannot read the state of IOMMU group {number}"), errno))?;
    if status.flags & uapi::VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(diagnose::not_viable(node, number));
    }
    Ok(status.flags)
}

fn set_container(group: &File, number: u32, container: &OwnedFd, mode: VfioMode) -> Result<()> {
    // SAFETY: the argument is a descriptor that is open for the call.
    counted("VFIO_GROUP_SET_CONTAINER", || unsafe {
        sys::group_set_container(group.as_raw_fd(), &container.as_raw_fd())
    })
    .map(drop)
    .map_err(|errno| {
        let error = Error::os(format!("cannot put IOMMU group {number} into its container"), errno);
        if errno == Errno::EPERM && mode == VfioMode::Noiommu { diagnose::raw_io(error) } else { error }
    })
}

fn set_iommu(container: &OwnedFd, mode: VfioMode) -> Result<()> {
    let (iommu, module) = match mode {
        VfioMode::Noiommu => (uapi::VFIO_NOIOMMU_IOMMU, "vfio"),
        VfioMode::Compat => (uapi::VFIO_TYPE1v2_IOMMU, "iommufd"),
        _ => (uapi::VFIO_TYPE1v2_IOMMU, "vfio_iommu_type1"),
    };
    let what = "cannot give the container an IOMMU";
    // SAFETY: this ioctl has no argument.
    let version = counted("VFIO_GET_API_VERSION", || unsafe { sys::get_api_version(container.as_raw_fd()) })
        .map_err(|errno| Error::os(what, errno))?;
    if version != uapi::VFIO_API_VERSION as i32 {
        return Err(Error::new(
            ErrorKind::Unavailable,
            what,
            format!("the kernel speaks VFIO API {version}, not 0"),
        ));
    }
    // SAFETY: the argument is an integer.
    counted("VFIO_SET_IOMMU", || unsafe { sys::set_iommu(container.as_raw_fd(), iommu as i32) })
        .map(drop)
        .map_err(|errno| {
            let error = Error::os(what, errno);
            match errno {
                Errno::ENODEV => error
                    .because("the kernel has no driver for this IOMMU type (CONFIG_VFIO_IOMMU_TYPE1)")
                    .with_hint("run: modprobe vfio_iommu_type1, or choose --vfio-mode cdev"),
                Errno::EPERM => diagnose::unsafe_interrupts(error, module),
                _ => error,
            }
        })
}
