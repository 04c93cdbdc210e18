//! VFIO devices: regions, interrupts and reset, regardless of how the device was opened.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use crate::error::{Operation, Result};
use crate::region::{DeviceFile, MappedRange, RegionFile, RegionInfo};
use crate::{info, sys};

/// Region index of PCI config space. BARs are regions 0 to 5.
pub const PCI_CONFIG_REGION: u32 = sys::VFIO_PCI_CONFIG_REGION_INDEX;

/// A VFIO device. When the device and its [`RegionFile`]s have been dropped, the device is closed, and then
/// `K` is dropped.
#[derive(Debug)]
pub struct Device<K = ()> {
    pub(crate) name: String,
    file: Arc<DeviceFile<K>>,
    flags: u32,
}

impl<K> Device<K> {
    /// Takes the descriptor of the device with this `name` on its bus. `keep` is what the device needs while
    /// it is open.
    ///
    /// # Safety
    /// As for [`DeviceFile::new`].
    ///
    /// # Errors
    /// When `VFIO_DEVICE_GET_INFO` fails.
    pub unsafe fn new(name: String, fd: OwnedFd, keep: K) -> Result<Self> {
        // SAFETY: the caller upholds the contract of `DeviceFile::new`.
        let file = unsafe { DeviceFile::new(fd, keep) };
        let mut device_info = sys::vfio_device_info {
            argsz: size_of::<sys::vfio_device_info>() as u32,
            flags: 0,
            num_regions: 0,
            num_irqs: 0,
            cap_offset: 0,
            pad: 0,
        };
        // SAFETY: the structure is complete; the kernel writes at most `argsz` bytes.
        unsafe { sys::call(file.as_fd(), sys::VFIO_DEVICE_GET_INFO, &mut device_info) }
            .map_err(|errno| Operation::DeviceInfo(name.clone()).failed(errno))?;
        Ok(Self { name, file: Arc::new(file), flags: device_info.flags })
    }

    /// Returns the name of the device on its bus.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether the device is a PCI device.
    pub fn is_pci(&self) -> bool {
        self.flags & sys::VFIO_DEVICE_FLAGS_PCI != 0
    }

    /// Returns the `keep` value, which the device needs while it is open.
    pub fn kept(&self) -> &K {
        self.file.kept()
    }

    /// Reads the properties of region `index` (`VFIO_DEVICE_GET_REGION_INFO`).
    ///
    /// # Errors
    /// `EINVAL` when the device's bus has no such region.
    pub fn region(&self, index: u32) -> Result<RegionInfo> {
        let fail = |errno| Operation::RegionInfo { device: self.name.clone(), index }.failed(errno);
        let answer = info::query(
            size_of::<sys::vfio_region_info>(),
            |words| {
                words[1] = if cfg!(target_endian = "little") { index.into() } else { u64::from(index) << 32 }
            },
            // SAFETY: `query` passes an 8-byte aligned buffer of at least the structure's size, with `argsz`
            // set to its length.
            |at| unsafe { sys::ioctl(self.as_fd(), sys::VFIO_DEVICE_GET_REGION_INFO, at.cast()) }.map(drop),
        )
        .map_err(fail)?;
        RegionInfo::read(&answer).ok_or_else(|| fail(Errno::EPROTO))
    }

    /// Returns a handle to access a region with `pread` and `pwrite`.
    pub fn region_file(&self, region: &RegionInfo) -> RegionFile<K> {
        RegionFile::new(&self.file, region.file_offset, region.size)
    }

    /// Maps the mappable parts of region `index`.
    ///
    /// # Errors
    /// When a part cannot be mapped.
    pub fn map_region(&self, index: u32, region: &RegionInfo) -> Result<Vec<MappedRange>> {
        let map = |part| MappedRange::new(self.as_fd(), region.file_offset, part);
        let fail = |errno| Operation::MapRegion { device: self.name.clone(), index }.failed(errno);
        region.mappable.iter().cloned().map(map).collect::<nix::Result<_>>().map_err(fail)
    }

    /// Resets the device (`VFIO_DEVICE_RESET`). Returns false if the device has no reset of its own.
    ///
    /// # Errors
    /// When the reset fails.
    pub fn reset(&self) -> Result<bool> {
        if self.flags & sys::VFIO_DEVICE_FLAGS_RESET == 0 {
            return Ok(false);
        }
        // SAFETY: this ioctl has no argument.
        match unsafe { sys::ioctl(self.as_fd(), sys::VFIO_DEVICE_RESET, std::ptr::null_mut()) } {
            Ok(_) => Ok(true),
            Err(Errno::EINVAL | Errno::ENOTTY) => Ok(false),
            Err(errno) => Err(Operation::Reset(self.name.clone()).failed(errno)),
        }
    }
}

impl<K> AsFd for Device<K> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Irq;
    use crate::kernel::{at, mock_kernel};
    use std::cell::RefCell;
    use std::fs::File;
    use std::rc::Rc;

    /// Returns a device with a 16 KiB region, 3 MSI-X vectors and no MSI, whose reset returns `reset`.
    fn device(reset: nix::Result<i32>) -> (Device, Rc<RefCell<Vec<Vec<u32>>>>) {
        let log = Rc::<RefCell<Vec<Vec<u32>>>>::default();
        let seen = Rc::clone(&log);
        let fd = mock_kernel(move |name, argument| {
            match name {
                "VFIO_DEVICE_GET_INFO" => {
                    let info: &mut sys::vfio_device_info = at(argument);
                    info.flags = sys::VFIO_DEVICE_FLAGS_PCI | sys::VFIO_DEVICE_FLAGS_RESET;
                }
                "VFIO_DEVICE_GET_REGION_INFO" => {
                    let info: &mut sys::vfio_region_info = at(argument);
                    if info.index > 8 {
                        return Err(Errno::EINVAL);
                    }
                    (info.size, info.offset) = (0x4000, u64::from(info.index) << 40);
                }
                "VFIO_DEVICE_GET_IRQ_INFO" => {
                    let info: &mut sys::vfio_irq_info = at(argument);
                    info.count = if info.index == sys::VFIO_PCI_MSIX_IRQ_INDEX { 3 } else { 0 };
                    info.flags = sys::VFIO_IRQ_INFO_EVENTFD;
                }
                "VFIO_DEVICE_SET_IRQS" => {
                    let words = *at::<u32>(argument) as usize / 4;
                    // SAFETY: the first word is the length in bytes.
                    let set = unsafe { std::slice::from_raw_parts(argument.cast::<u32>(), words) }.to_vec();
                    let refused = set[2] == sys::VFIO_PCI_MSI_IRQ_INDEX && set[4] == 0;
                    seen.borrow_mut().push(set);
                    return if refused { Err(Errno::EINVAL) } else { Ok(0) };
                }
                _ => return reset,
            }
            Ok(0)
        });
        // SAFETY: the test answers the ioctls, so the descriptor never reaches a driver.
        (unsafe { Device::new("0000:00:04.0".into(), fd, ()) }.unwrap(), log)
    }

    #[test]
    fn regions_are_asked_for_by_their_index() {
        let (device, _) = device(Ok(0));
        assert!(device.is_pci());
        let region = device.region(PCI_CONFIG_REGION).unwrap();
        assert_eq!((region.size, region.file_offset, region.mappable.len()), (0x4000, 7 << 40, 0));
        assert!(device.map_region(7, &region).unwrap().is_empty());
        assert_eq!(device.region_file(&region).size(), 0x4000);
        let error = device.region(9).unwrap_err();
        assert_eq!(error.what(), "cannot examine region 9 of 0000:00:04.0");
    }

    #[test]
    fn a_device_without_a_reset_is_no_error() {
        assert_eq!(device(Ok(0)).0.reset(), Ok(true));
        assert_eq!(device(Err(Errno::ENOTTY)).0.reset(), Ok(false));
        assert_eq!(device(Err(Errno::EIO)).0.reset().unwrap_err().what(), "cannot reset 0000:00:04.0");
    }

    #[test]
    fn interrupts_are_set_as_words_with_their_descriptors() {
        use std::os::fd::AsRawFd;
        let (device, log) = device(Ok(0));
        let info = device.irq_info(Irq::Msix).unwrap();
        assert_eq!((info.count, info.eventfd, info.automasked), (3, true, false));
        let null = File::open("/dev/null").unwrap();
        let fd = null.as_raw_fd() as u32;
        // EINVAL from disabling MSI, which is not enabled, is not an error.
        device.enable_irq(Irq::Msi, &[null.as_fd(), null.as_fd()]).unwrap();
        device.unmask(Irq::Intx).unwrap();
        device.trigger(Irq::Error).unwrap();
        assert!(device.disable_irq(Irq::Msi).is_err());
        let request = device.watch_release_request().unwrap();
        assert!(!request.take());
        let log = log.borrow();
        // argsz, flags, index, start, count, then descriptors.
        let (none, eventfd) = (sys::VFIO_IRQ_SET_DATA_NONE, sys::VFIO_IRQ_SET_DATA_EVENTFD);
        let (trigger, unmask) = (sys::VFIO_IRQ_SET_ACTION_TRIGGER, sys::VFIO_IRQ_SET_ACTION_UNMASK);
        assert_eq!(log[0], [20, none | trigger, 1, 0, 0]);
        assert_eq!(log[1], [28, eventfd | trigger, 1, 0, 2, fd, fd]);
        assert_eq!(log[2], [20, none | unmask, 0, 0, 1]);
        assert_eq!(log[3], [20, none | trigger, 3, 0, 1]);
        assert_eq!(log[5][..5], [24, eventfd | trigger, 4, 0, 1]);
    }
}
