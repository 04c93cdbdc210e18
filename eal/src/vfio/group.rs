//! Devices opened through their IOMMU group, in a container (modes `container`, `compat` and `noiommu`).

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use vireo_vfio::{Group, IommuType, NOIOMMU_PREFIX, class_and_name};

use super::acquire::{BusDevice, Vfio, group_of};
use super::device::{Held, Open};
use super::fds::GroupFds;
use super::noiommu::{has_iommu, needs_noiommu, no_group};
use super::phases::Phases;
use super::space::{AddressSpace, Container};
use super::{VfioMode, device_nodes, diagnose};
use crate::args::VfToken;
use crate::error::{Error, ErrorKind, Result};
use crate::rlimit;

impl Vfio {
    /// Path of the node that opens containers of `mode`.
    pub(super) fn container_path(&self, mode: VfioMode) -> PathBuf {
        if mode == VfioMode::Compat { self.iommufd_path() } else { self.dev.join("vfio/vfio") }
    }

    /// Number of the device's group, path of its node, and the node's device number if sysfs reports it.
    pub(super) fn group_path(
        &self,
        device: &BusDevice,
        mode: VfioMode,
    ) -> Result<(u32, PathBuf, Option<String>)> {
        let what = || format!("cannot use {} in mode {mode}", device.name);
        let group = group_of(device).map_err(|_| no_group(what()))?;
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

    pub(super) fn open_group(&self, device: &BusDevice, mode: VfioMode) -> Result<GroupFds> {
        let (group, path, number) = self.group_path(device, mode)?;
        let existing = self.existing(self.space_key(device, mode));
        let kept = existing.as_ref().and_then(|space| space.container());
        let container = match kept {
            Some(container) => container.as_fd().try_clone_to_owned().map_err(cannot_duplicate)?,
            None => self.open_container(mode)?,
        };
        let group = match kept.and_then(|container| container.group(group)) {
            Some(file) => file,
            None => {
                let file = self.nodes.open(&path).map_err(|error| match (&number, error.errno()) {
                    (Some(number), Some(Errno::ENOENT)) => device_nodes::absent(error, &path, number),
                    _ => diagnose::group_open(error, device, &self.dev),
                })?;
                if let Some(number) = number {
                    device_nodes::check(&file, &path, &number, &format!("IOMMU group {group}"))?;
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

    /// Checks that descriptors of another process are those of the device's group and of a container of `mode`. Returns
    /// the number of the group.
    pub(super) fn check_group(&self, device: &BusDevice, mode: VfioMode, fds: &GroupFds) -> Result<u32> {
        let what = || format!("cannot adopt {} in mode {mode}", device.name);
        let (group, path, number) = self.group_path(device, mode)?;
        let number = number.ok_or_else(|| {
            let why = format!("the kernel has no node for IOMMU group {group}");
            Error::new(ErrorKind::Unavailable, what(), why)
        })?;
        device_nodes::check(&fds.group, &path, &number, &format!("IOMMU group {group}"))?;
        let container = if mode == VfioMode::Compat { "iommu" } else { "vfio" };
        let found = class_and_name(&fds.container).map_err(|errno| Error::os(what(), errno))?;
        match found.is_some_and(|(class, name)| class == "misc" && name == container) {
            true => Ok(group),
            false => {
                let why = format!("its container is not {}", self.container_path(mode).display());
                Err(Error::new(ErrorKind::Permission, what(), why))
            }
        }
    }

    /// Adds the group to the container of its mode and gets the device from the group. `opening` is released
    /// before the kernel resets the device.
    pub(super) fn complete_group(
        &self,
        device: &BusDevice,
        mode: VfioMode,
        fds: GroupFds,
        opening: MutexGuard<'_, ()>,
        phases: &mut Phases,
    ) -> Result<Open> {
        let what = || format!("cannot use {}", device.name);
        let number = group_of(device).map_err(|_| no_group(what()))?;
        let key = self.space_key(device, mode);
        let GroupFds { container, group } = fds;
        // This keeps the container from being abandoned in the meantime.
        let _held = self.existing(key).and_then(|space| space.container()?.any());
        // SAFETY: `group` is the group's node: `open_group` has opened it as such, or `adopt` has compared
        // its number with the one in sysfs.
        let handle = unsafe { Group::from_fd_unchecked(Arc::clone(&group), number) };
        let status = handle.status()?;
        if !status.is_viable {
            return Err(diagnose::not_viable(device, number));
        }
        let in_container = status.has_container;
        // SAFETY: `container` is a container's node: `DeviceNodes` has opened it as such, or `adopt` has
        // asked the kernel.
        let mut container = Some(unsafe { vireo_vfio::Container::from_fd_unchecked(container) });
        let space = self.space(key, || {
            let fd = container.take().ok_or_else(|| Error::os(what(), Errno::EBADF))?;
            if !in_container {
                set_container(&handle, &fd, mode)?;
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
            set_container(&handle, &shared.fd, mode)?;
        }
        let group = shared.group(number).unwrap_or(group);
        shared.add(number, &group);
        // SAFETY: as above. A group's node can be opened only once, so both files are the same.
        let handle = unsafe { Group::from_fd_unchecked(&*group, number) };
        drop(opening);
        phases.end("bind");
        let token = self.token_of(device).map(VfToken::bytes);
        let device = handle
            .device_fd(&device.name, token.as_ref())
            .map_err(|refused| diagnose::bind(refused.into(), device, &self.dev))?;
        let device = if mode == VfioMode::Noiommu { above_memory(device) } else { device };
        Ok(Open { fd: device, held: Held { group: Some(group), space } })
    }
}

/// Moves the device to a descriptor above all those of packet memory.
///
/// Without an IOMMU nothing pins the pages, so if the process is killed, they must outlive the device's bus
/// mastering. The kernel defers the last close of each file until it has gone through all descriptors, and
/// then starts with the highest (`close_files`, and `task_work_run`, which is last in, first out).
pub(super) fn above_memory(device: OwnedFd) -> OwnedFd {
    const ABOVE: i32 = 512;
    match fcntl(&device, FcntlArg::F_DUPFD_CLOEXEC(ABOVE)) {
        // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
        Err(errno) => {
            tracing::warn!(
                "if this process is killed, its pages may be freed before the NIC stops: {errno}; {}",
                rlimit::more_files(ABOVE as u64)
            );
            device
        }
    }
}

/// Adds `hint` if the node does not exist. Other errors have their own hint.
fn missing(error: Error, hint: &str) -> Error {
    match error.errno() {
        Some(Errno::ENOENT | Errno::ENODEV) => error.with_hint(hint),
        _ => error,
    }
}

fn cannot_duplicate(error: std::io::Error) -> Error {
    Error::io("cannot duplicate a descriptor", &error)
}

fn set_container(group: &Group<Arc<File>>, container: &vireo_vfio::Container, mode: VfioMode) -> Result<()> {
    group.set_container(container).map_err(|refused| match refused.errno() {
        Some(Errno::EPERM) if mode == VfioMode::Noiommu => diagnose::raw_io(refused.into()),
        _ => refused.into(),
    })
}

fn set_iommu(container: &vireo_vfio::Container, mode: VfioMode) -> Result<()> {
    let (iommu, module) = match mode {
        VfioMode::Noiommu => (IommuType::NoIommu, "vfio"),
        VfioMode::Compat => (IommuType::Type1v2, "iommufd"),
        _ => (IommuType::Type1v2, "vfio_iommu_type1"),
    };
    container.set_iommu(iommu).map_err(|refused| match refused.errno() {
        Some(Errno::ENODEV) => Error::from(refused)
            .because("the kernel has no driver for this IOMMU type (CONFIG_VFIO_IOMMU_TYPE1)")
            .with_hint("run: modprobe vfio_iommu_type1, or choose --vfio-mode cdev"),
        Some(Errno::EPERM) => diagnose::unsafe_interrupts(refused.into(), module),
        _ => refused.into(),
    })
}
