//! Regions of a device: registers and config space.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vireo_iommufd::observed;

use crate::{info, sys};

/// Properties of a region (`struct vfio_region_info`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionInfo {
    /// Size in bytes; 0 if the device has no such region.
    pub size: u64,
    /// Offset of the region in the device's file.
    pub file_offset: u64,
    /// Parts of the region that can be mapped, as offsets in the region.
    pub mappable: Vec<Range<u64>>,
}

impl RegionInfo {
    /// Parses a `struct vfio_region_info` and its capabilities. Returns `None` if the structure is truncated.
    pub(crate) fn read(answer: &[u8]) -> Option<Self> {
        let flags = info::u32_at(answer, 4)?;
        let first = if flags & sys::VFIO_REGION_INFO_FLAG_CAPS != 0 { info::u32_at(answer, 12)? } else { 0 };
        let (size, file_offset) = (info::u64_at(answer, 16)?, info::u64_at(answer, 24)?);
        let mut mappable: Vec<_> = std::iter::once(0..size).filter(|all| !all.is_empty()).collect();
        for capability in info::capabilities(answer, first) {
            if u32::from(capability.id) == sys::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
                let count = info::u32_at(capability.body, 0).unwrap_or(0);
                mappable = info::u64_pairs(capability.body, 8, count)
                    .map(|(offset, len)| offset..offset.saturating_add(len).min(size))
                    .filter(|area| !area.is_empty())
                    .collect();
            }
        }
        if flags & sys::VFIO_REGION_INFO_FLAG_MMAP == 0 {
            mappable.clear();
        }
        Some(Self { size, file_offset, mappable })
    }
}

/// A device's open file. Dropping it closes the file and then drops `K`. Closing the file ends the device's
/// DMA, and resets the device if the kernel can. `K` is what the device needs while it is open, such as its
/// group, its address space and the memory mapped there.
#[derive(Debug)]
pub struct DeviceFile<K = ()> {
    file: ManuallyDrop<File>,
    keep: K,
}

impl<K> DeviceFile<K> {
    /// Takes the descriptor of a device. `keep` is what the device needs while it is open.
    ///
    /// # Safety
    /// `fd` must be that of a VFIO device: from [`Group::device_fd`](crate::Group::device_fd), or from a
    /// bound [`Cdev`](crate::Cdev). Another driver may respond to the ioctls of a device by writing arbitrary
    /// data to arbitrary addresses.
    pub unsafe fn new(fd: OwnedFd, keep: K) -> Self {
        Self { file: ManuallyDrop::new(fd.into()), keep }
    }

    /// Returns the `keep` value, which the device needs while it is open.
    pub fn kept(&self) -> &K {
        &self.keep
    }
}

impl<K> AsFd for DeviceFile<K> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl<K> Drop for DeviceFile<K> {
    fn drop(&mut self) {
        let mut is_open = true;
        // Closing the file includes the device's reset, which is most of the cost of releasing a device.
        observed("close", || {
            if std::mem::take(&mut is_open) {
                // SAFETY: `is_open` ensures that the file is dropped once. It is dropped only here, and not
                // used afterwards.
                unsafe { ManuallyDrop::drop(&mut self.file) };
            }
        });
    }
}

/// One region of a device's file, accessed with `pread` and `pwrite`. No access reaches another region.
#[derive(Debug)]
pub struct RegionFile<K = ()> {
    device: Arc<DeviceFile<K>>,
    start: u64,
    size: u64,
}

impl<K> RegionFile<K> {
    /// Creates a handle for the `size` bytes at `start` of the file.
    pub fn new(device: &Arc<DeviceFile<K>>, start: u64, size: u64) -> Self {
        Self { device: Arc::clone(device), start, size }
    }

    /// Returns the size of the region in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the offset in the file of the `len` bytes at `offset` of the region.
    fn at(&self, offset: u64, len: usize) -> io::Result<u64> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.size);
        let at = end.and_then(|_| self.start.checked_add(offset));
        at.ok_or_else(|| io::Error::other(format!("the region has {:#x} bytes", self.size)))
    }

    /// Reads bytes at `offset` of the region into `bytes`.
    ///
    /// # Errors
    /// When the range exceeds the region, or the read fails.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let at = self.at(offset, bytes.len())?;
        self.device.file.read_exact_at(bytes, at)
    }

    /// Writes `bytes` at `offset` of the region.
    ///
    /// # Errors
    /// When the range exceeds the region, or the write fails.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let at = self.at(offset, bytes.len())?;
        self.device.file.write_all_at(bytes, at)
    }
}

/// A mapped part of a region, unmapped on drop. It does not keep the device open.
#[derive(Debug)]
pub struct MappedRange {
    range: Range<u64>,
    address: NonNull<u8>,
}

// SAFETY: the mapping belongs to the process, and safe code gets only its addresses.
unsafe impl Send for MappedRange {}
// SAFETY: as for `Send`.
unsafe impl Sync for MappedRange {}

impl MappedRange {
    /// Maps `range` of the region that begins at `file_offset` of the device's file.
    pub(crate) fn new(file: BorrowedFd<'_>, file_offset: u64, range: Range<u64>) -> nix::Result<Self> {
        let len = range.end.checked_sub(range.start).and_then(|len| usize::try_from(len).ok());
        let len = len.and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        let offset = file_offset.checked_add(range.start).and_then(|offset| i64::try_from(offset).ok());
        let offset = offset.ok_or(Errno::EOVERFLOW)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so the new mapping overlaps no existing one.
        let address = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { range, address: address.cast() })
    }

    /// Returns the range of bytes in the region.
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// Returns the address of `size` bytes at `offset` of the region, if this part contains them and `offset`
    /// is a multiple of `size`. The address is valid while the value is alive. A device responds to each
    /// access, so use only accesses that the compiler can neither remove nor split.
    pub fn pointer(&self, offset: u64, size: usize) -> Option<NonNull<u8>> {
        let inside = offset >= self.range.start
            && offset.checked_add(size as u64).is_some_and(|end| end <= self.range.end)
            && offset.is_multiple_of(size as u64);
        // SAFETY: the offset is inside the mapping, as checked above.
        inside.then(|| unsafe { self.address.add((offset - self.range.start) as usize) })
    }
}

impl Drop for MappedRange {
    fn drop(&mut self) {
        let len = (self.range.end - self.range.start) as usize;
        // SAFETY: this value owns the mapping, and users of its addresses keep this value alive.
        if let Err(errno) = unsafe { munmap(self.address.cast(), len) } {
            tracing::error!("cannot unmap a region: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn the_parts_that_may_be_mapped_are_within_the_region() {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        // argsz, flags, index, offset of the capabilities, then size and offset in the file.
        let head = |flags| words(&[0, flags, 0, 32, 0x4000, 0, 0, 0x100]);
        let (sparse, msix) =
            (sys::VFIO_REGION_INFO_CAP_SPARSE_MMAP | 1 << 16, sys::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE);
        let areas = [0x1000, 0, 0x1000, 0, 0x3000, 0, u32::MAX, u32::MAX, 0x9000, 0, 1, 0];
        let chain = [words(&[sparse, 96, 3, 0]), words(&areas), words(&[msix, 0])].concat();
        let read = |flags| RegionInfo::read(&[head(flags), chain.clone()].concat());
        let plain = RegionInfo { size: 0x4000, file_offset: 0x100 << 32, mappable: vec![] };
        assert_eq!(read(0), Some(plain));
        let (caps, mmap) = (sys::VFIO_REGION_INFO_FLAG_CAPS, sys::VFIO_REGION_INFO_FLAG_MMAP);
        assert_eq!(read(mmap).unwrap().mappable.first(), Some(&(0..0x4000)));
        assert_eq!(read(caps | mmap).unwrap().mappable, [0x1000..0x2000, 0x3000..0x4000]);
        assert_eq!(read(caps).unwrap().mappable, []);
        assert_eq!(RegionInfo::read(&head(caps)[..28]), None);
    }

    #[test]
    fn no_offset_reaches_another_region() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 64], 0).unwrap();
        // SAFETY: nothing here calls an ioctl.
        let device = Arc::new(unsafe { DeviceFile::new(file.try_clone().unwrap().into(), ()) });
        let region = RegionFile::new(&device, 16, 8);
        for offset in [5, 8, 32, u64::MAX - 15, u64::MAX - 3, u64::MAX] {
            assert!(region.read(offset, &mut [0; 4]).is_err(), "{offset:#x}");
            assert!(region.write(offset, &[0; 4]).is_err());
        }
        region.write(4, &[0; 4]).unwrap();
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == 7).count(), 60);
        assert_eq!(bytes[20..24], [0; 4]);
    }

    #[test]
    fn a_mapped_part_gives_addresses_of_its_own_bytes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        file.write_all_at(&[9; 8], 0x3008).unwrap();
        let part = MappedRange::new(file.as_fd(), 0x2000, 0x1000..0x2000).unwrap();
        let address = part.pointer(0x1008, 8).unwrap();
        // SAFETY: the address is of eight bytes of the file.
        assert_eq!(unsafe { address.cast::<[u8; 8]>().read() }, [9; 8]);
        for (offset, size) in [(0x1004, 8), (0xff8, 8), (0x1ffe, 4), (0x2000, 1), (u64::MAX - 7, 8)] {
            assert_eq!(part.pointer(offset, size), None, "{offset:#x}");
        }
        assert!(MappedRange::new(file.as_fd(), 0, 5..5).is_err());
        assert!(MappedRange::new(file.as_fd(), u64::MAX, 1..2).is_err());
    }

    #[test]
    fn what_a_device_needs_outlives_its_file() {
        struct Kept<'a>(&'a AtomicBool);
        impl Drop for Kept<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let (ours, mut other_end) = std::os::unix::net::UnixStream::pair().unwrap();
        let gone = AtomicBool::new(false);
        // SAFETY: nothing here calls an ioctl.
        let device = Arc::new(unsafe { DeviceFile::new(ours.into(), Kept(&gone)) });
        let region = RegionFile::new(&device, 0, 8);
        drop(device);
        assert!(!gone.load(Ordering::Relaxed));
        drop(region);
        assert!(gone.load(Ordering::Relaxed));
        assert_eq!(io::Read::read(&mut other_end, &mut [0]).unwrap(), 0);
    }
}
