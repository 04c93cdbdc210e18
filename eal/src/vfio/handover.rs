//! Devices that a predecessor passes to this process while they run: nothing is opened, bound, attached or mapped.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};

use super::acquire::{Acquired, BusDevice, Vfio, lock};
use super::device::{Held, Open};
use super::fds::GroupFds;
use super::group::above_memory;
use super::phases::Phases;
use super::space::{AddressSpace, Container};
use super::{Device, VfioMode, device_nodes};
use crate::dma::MemoryMap;
use crate::error::{Error, ErrorKind, Result};
use crate::handover::{Fds, ReceivedFds};
use crate::iommufd::Iommufd;

/// A device in use, as another process needs it. Descriptors are numbers in [`Fds`].
#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
pub struct DeviceRecord {
    mode: VfioMode,
    device: u32,
    /// IOMMU group, in the modes that have one.
    group: Option<u32>,
    /// Container or `/dev/iommu`.
    owner: u32,
    /// Id of the I/O address space, in the modes that have one.
    ioas: Option<u32>,
    /// IOVA and length in bytes of each mapping of the address space, in the order in which they were made.
    mappings: Vec<(u64, u64)>,
}

impl DeviceRecord {
    /// Describes `device`, which was acquired in `mode` and reaches the memory in `map`.
    pub fn of<'a>(device: &'a Device, mode: VfioMode, map: &MemoryMap, fds: &mut Fds<'a>) -> Self {
        let Held { group, space } = device.held();
        let segments = map.segments();
        let mappings = segments.iter().flat_map(|segment| segment.mappings());
        let own = mappings.filter(|mapping| Arc::ptr_eq(mapping.space(), space));
        let ranges = own.filter_map(|mapping| mapping.iovas());
        Self {
            mode,
            device: fds.add(device.as_fd()),
            group: group.as_ref().map(|group| fds.add(group.as_fd())),
            owner: fds.add(space.owner()),
            ioas: space.ioas().map(|ioas| ioas.id()),
            mappings: ranges.map(|range| (*range.start(), range.end() - range.start() + 1)).collect(),
        }
    }

    /// Mode in which the device was acquired.
    pub fn mode(&self) -> VfioMode {
        self.mode
    }
}

impl Vfio {
    /// Takes over `device`, which another process uses and describes as `record`, with its descriptors. The first maps
    /// in its address space adopt the other process's mappings.
    ///
    /// # Errors
    /// `Protocol` if the record contradicts its mode; `Unavailable` or `Permission` if a descriptor belongs to
    /// something else.
    pub fn take_over(
        &self,
        device: &BusDevice,
        record: &DeviceRecord,
        fds: &ReceivedFds,
    ) -> Result<Acquired> {
        let DeviceRecord { mode, group, ioas, ref mappings, .. } = *record;
        let what = || format!("cannot take over {} in mode {mode}", device.name);
        let contradiction =
            || Error::new(ErrorKind::Protocol, what(), "the record does not fit the mode of the device");
        let key = self.space_key(device, mode);
        let (fd, owner) = (fds.get(record.device)?, fds.get(record.owner)?);
        let open = match mode {
            VfioMode::Cdev | VfioMode::NoiommuCdev => {
                let (number, path) = self.cdev_path(device, mode)?;
                device_nodes::check(&fd, &path, &number, &device.name)?;
                let (iommufd, id) = (self.shared_iommufd(owner)?, ioas.ok_or_else(contradiction)?);
                let physical = mode == VfioMode::NoiommuCdev;
                let space = self.space(key, || {
                    // SAFETY: the predecessor destroys and unmaps nothing, and this is the only value for this id: all
                    // ports of the key share the space.
                    let ioas = unsafe { iommufd.ioas_from_id(id) };
                    Ok(AddressSpace::iommufd(ioas, physical).inheriting(mappings))
                })?;
                Open { fd, held: Held { group: None, space } }
            }
            _ => {
                let group = fds.get(group.ok_or_else(contradiction)?)?;
                let group = GroupFds { container: owner, group: Arc::new(group.into()) };
                let number = self.check_group(device, mode, &group)?;
                check_device(&fd, device)?;
                let GroupFds { container, group } = group;
                let space = self.space(key, || {
                    // SAFETY: `check_group` has asked the kernel.
                    let fd = unsafe { vireo_vfio::Container::from_fd_unchecked(container) };
                    let container = Container::new(fd, mode == VfioMode::Compat, number, &group);
                    Ok(match mode {
                        VfioMode::Noiommu => AddressSpace::none(container),
                        _ => AddressSpace::type1(container).inheriting(mappings),
                    })
                })?;
                let shared = space.container().ok_or_else(contradiction)?;
                let group = shared.group(number).unwrap_or(group);
                shared.add(number, &group);
                let fd = if mode == VfioMode::Noiommu { above_memory(fd) } else { fd };
                Open { fd, held: Held { group: Some(group), space } }
            }
        };
        Self::finish(
            device,
            mode,
            "as in the program that this one takes over".to_owned(),
            open,
            Phases::start(),
        )
    }

    /// Sets whether the mappings of all address spaces belong to another process: to the predecessor of this process, or
    /// to its successor.
    pub(crate) fn lend(&self, is_lent: bool) {
        lock(&self.spaces).values().filter_map(Weak::upgrade).for_each(|space| space.lend(is_lent));
    }

    /// Returns the process's `/dev/iommu`, which is `fd` if there is none yet.
    fn shared_iommufd(&self, fd: OwnedFd) -> Result<Iommufd> {
        let mut kept = lock(&self.iommufd);
        if let Some(iommufd) = kept.upgrade() {
            return Ok(iommufd);
        }
        let iommufd = Iommufd::from_fd(fd)?;
        *kept = iommufd.downgrade();
        Ok(iommufd)
    }
}

/// Checks that `fd` is a device that came from a group: only VFIO creates files of this name
/// (`vfio_device_open_file`).
fn check_device(fd: &OwnedFd, device: &BusDevice) -> Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    match link {
        Ok(target) if target.as_os_str() == "anon_inode:[vfio-device]" => Ok(()),
        _ => {
            let what = format!("cannot take over {}", device.name);
            Err(Error::new(ErrorKind::Permission, what, "its descriptor is not that of a VFIO device"))
        }
    }
}
