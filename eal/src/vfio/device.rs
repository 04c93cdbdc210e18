//! A device that the kernel handed over: regions, config space, interrupts and reset, the same in every mode.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio as uapi;

use super::space::AddressSpace;
use super::{info, sys};
use crate::error::{Error, ErrorKind, Result};
use crate::ioctl::counted;
use crate::mmio::{Bar, DeviceFile, MappedRange, RegionFile};

/// A VFIO device. Closing it makes the kernel disable its DMA and reset it where it can, so drop it before
/// the memory that it was given. It closes when this, its config space and its BARs with their doorbells have all
/// gone, and leaves its container or address space, which goes last.
#[derive(Debug)]
pub struct Device {
    pub(super) name: String,
    pub(super) open: Arc<DeviceFile>,
    flags: u32,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Region {
    flags: u32,
    size: u64,
    file_offset: u64,
    /// Parts that may be mapped when not all may.
    sparse: Option<Vec<Range<u64>>>,
}

impl Region {
    /// Reads a `struct vfio_region_info` and its capabilities; none when it is cut short.
    pub(super) fn read(answer: &[u8]) -> Option<Self> {
        let flags = info::u32_at(answer, 4)?;
        let first = if flags & uapi::VFIO_REGION_INFO_FLAG_CAPS != 0 { info::u32_at(answer, 12)? } else { 0 };
        let (size, file_offset) = (info::u64_at(answer, 16)?, info::u64_at(answer, 24)?);
        let mut region = Self { flags, size, file_offset, sparse: None };
        for capability in info::capabilities(answer, first) {
            if u32::from(capability.id) == uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
                let count = info::u32_at(capability.body, 0).unwrap_or(0);
                let areas = info::u64_pairs(capability.body, 8, count)
                    .map(|(offset, size)| offset..offset.saturating_add(size).min(region.size))
                    .filter(|area| !area.is_empty());
                region.sparse = Some(areas.collect());
            }
        }
        Some(region)
    }
}

impl Device {
    pub(super) fn new(name: String, open: DeviceFile) -> Result<Self> {
        let mut device_info = uapi::vfio_device_info {
            argsz: size_of::<uapi::vfio_device_info>() as u32,
            flags: 0,
            num_regions: 0,
            num_irqs: 0,
            cap_offset: 0,
            pad: 0,
        };
        // SAFETY: the structure is complete; the kernel writes at most `argsz` bytes.
        counted("VFIO_DEVICE_GET_INFO", || unsafe {
            sys::device_get_info(open.file.as_raw_fd(), &mut device_info)
        })
        .map_err(|errno| Error::os(format!("cannot examine {name}"), errno))?;
        Ok(Self { name, open: Arc::new(open), flags: device_info.flags })
    }

    /// Name on its bus.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the device can reach.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.open.space
    }

    fn region(&self, index: u32) -> Result<Region> {
        let fail = |errno| Error::os(format!("cannot examine region {index} of {}", self.name), errno);
        let answer = info::query(
            size_of::<uapi::vfio_region_info>(),
            |words| {
                words[1] = if cfg!(target_endian = "little") { index.into() } else { u64::from(index) << 32 }
            },
            |at| {
                // SAFETY: `query` gives a buffer of at least the structure's size, 8-byte aligned, with `argsz`
                // set to its length.
                counted("VFIO_DEVICE_GET_REGION_INFO", || unsafe {
                    sys::device_get_region_info(self.open.file.as_raw_fd(), at.cast())
                })
                .map(drop)
            },
        )
        .map_err(fail)?;
        Region::read(&answer).ok_or_else(|| fail(Errno::EPROTO))
    }

    /// Base address register `index` (0 to 5) of a PCI device, mapped where the kernel allows it.
    ///
    /// # Errors
    /// `Unavailable` when the device has no such BAR.
    pub fn bar(&self, index: u8) -> Result<Bar> {
        let what = || format!("cannot map BAR {index} of {}", self.name);
        if u32::from(index) > uapi::VFIO_PCI_BAR5_REGION_INDEX {
            return Err(Error::new(ErrorKind::Unavailable, what(), "there are BARs 0 to 5 only"));
        }
        let region = self.region(index.into())?;
        if region.size == 0 {
            return Err(Error::new(ErrorKind::Unavailable, what(), "the device has no such BAR"));
        }
        let parts = if region.flags & uapi::VFIO_REGION_INFO_FLAG_MMAP == 0 {
            Vec::new()
        } else {
            region.sparse.unwrap_or_else(|| std::iter::once(0..region.size).collect())
        };
        let mapped = parts
            .into_iter()
            .map(|part| MappedRange::new(&self.open.file, region.file_offset, part))
            .collect::<nix::Result<Vec<_>>>()
            .map_err(|errno| Error::os(what(), errno))?;
        Ok(Bar::device(mapped, RegionFile::new(&self.open, region.file_offset, region.size)))
    }

    /// The device's PCI config space.
    ///
    /// # Errors
    /// When the kernel gives none, because it is no PCI device.
    pub fn config_space(&self) -> Result<ConfigSpace> {
        let what = || format!("cannot reach the config space of {}", self.name);
        if self.flags & uapi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(Error::new(ErrorKind::Unavailable, what(), "it is no PCI device"));
        }
        let region = self.region(uapi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        Ok(ConfigSpace(RegionFile::new(&self.open, region.file_offset, region.size)))
    }

    /// Resets the device (`VFIO_DEVICE_RESET`); false when it has no reset of its own.
    ///
    /// # Errors
    /// When the kernel tried and failed.
    pub fn reset(&self) -> Result<bool> {
        if self.flags & uapi::VFIO_DEVICE_FLAGS_RESET == 0 {
            return Ok(false);
        }
        // SAFETY: this ioctl has no argument.
        match counted("VFIO_DEVICE_RESET", || unsafe { sys::device_reset(self.open.file.as_raw_fd()) }) {
            Ok(_) => Ok(true),
            Err(Errno::EINVAL | Errno::ENOTTY) => Ok(false),
            Err(errno) => Err(Error::os(format!("cannot reset {}", self.name), errno)),
        }
    }
}

/// PCI config space of a [`Device`], by `pread` and `pwrite` on its descriptor.
#[derive(Debug)]
pub struct ConfigSpace(RegionFile);

impl ConfigSpace {
    /// Reads at `offset`. What lies beyond the end, or does not answer, reads as all ones.
    pub fn read(&self, offset: u16, bytes: &mut [u8]) {
        if self.0.read(offset.into(), bytes).is_err() {
            bytes.fill(0xff);
        }
    }

    /// Writes at `offset`.
    ///
    /// # Errors
    /// When the kernel refuses, or not all of it is within config space.
    pub fn write(&self, offset: u16, bytes: &[u8]) -> Result<()> {
        self.0
            .write(offset.into(), bytes)
            .map_err(|error| Error::io(format!("cannot write config space at {offset:#x}"), &error))
    }
}

#[cfg(test)]
mod tests {
    use std::mem::ManuallyDrop;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn config_space_ends_where_it_ends() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 64], 0).unwrap();
        let space = Arc::new(AddressSpace::nowhere());
        let open =
            Arc::new(DeviceFile { file: ManuallyDrop::new(file.try_clone().unwrap()), _group: None, space });
        let config = ConfigSpace(RegionFile::new(&open, 16, 32));
        let mut bytes = [0; 4];
        config.read(28, &mut bytes);
        assert_eq!(bytes, [7; 4]);
        for offset in [29, 32, u16::MAX] {
            config.read(offset, &mut bytes);
            assert_eq!(bytes, [0xff; 4]);
            assert!(config.write(offset, &[0; 4]).is_err());
        }
        config.write(28, &[0; 4]).unwrap();
        let mut all = [0; 64];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte == 7).count(), 60);
    }

    #[test]
    fn the_parts_that_may_be_mapped_are_within_the_region() {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        // argsz, flags, index, offset of the capabilities; size and offset in the file.
        let head = |flags| words(&[0, flags, 0, 32, 0x4000, 0, 0, 0x100]);
        let (sparse, msix) =
            (uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP | 1 << 16, uapi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE);
        let areas = [0x1000, 0, 0x1000, 0, 0x3000, 0, u32::MAX, u32::MAX, 0x9000, 0, 1, 0];
        let chain = [words(&[sparse, 96, 3, 0]), words(&areas), words(&[msix, 0])].concat();
        let read = |flags| Region::read(&[head(flags), chain.clone()].concat());
        let plain = Region { flags: 0, size: 0x4000, file_offset: 0x100 << 32, sparse: None };
        assert_eq!(read(0), Some(plain));
        let flags = uapi::VFIO_REGION_INFO_FLAG_CAPS;
        let region = read(flags).unwrap();
        assert_eq!(region.sparse, Some(vec![0x1000..0x2000, 0x3000..0x4000]));
        assert_eq!(Region::read(&head(flags)[..28]), None);
    }
}
