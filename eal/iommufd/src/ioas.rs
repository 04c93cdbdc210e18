//! I/O address spaces.

use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;

use crate::error::{Error, Operation, Result};
use crate::object::Object;
use crate::{DeviceId, Hwpt, HwptOptions, Iommufd, Mapping, sys};

/// Access that devices have to a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read access only.
    Read,
    /// Write access only.
    Write,
    /// Read and write access.
    ReadWrite,
}

impl Access {
    /// Returns the flags of a mapping, including the one for a fixed address if there is an `iova`.
    fn flags(self, iova: Option<u64>) -> u32 {
        const READ: u32 = sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
        const WRITE: u32 = sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
        let access = match self {
            Self::Read => READ,
            Self::Write => WRITE,
            Self::ReadWrite => READ | WRITE,
        };
        access | if iova.is_some() { sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA } else { 0 }
    }
}

/// Memory that a device may read and write at any time, until the value is dropped.
///
/// # Safety
/// While the value is alive, `address` and `len` do not change, and the `len` bytes at `address` stay mapped
/// in this process and belong to the value. References into these bytes exist only as references to types
/// whose contents may change at any time, such as atomics.
#[allow(clippy::len_without_is_empty)]
pub unsafe trait Memory {
    /// Returns the address of the first byte.
    fn address(&self) -> NonNull<u8>;

    /// Returns the length in bytes.
    fn len(&self) -> usize;
}

/// IOVAs that can be mapped, as reported by [`Ioas::iova_ranges`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Iovas {
    /// Ranges that every attached device can use.
    pub ranges: Vec<RangeInclusive<u64>>,
    /// Alignment in bytes that both ends of a mapping must have.
    pub alignment: u64,
}

/// I/O address space: the memory that attached devices can access. It is destroyed on drop.
#[derive(Debug)]
pub struct Ioas(Object);

impl Ioas {
    pub(crate) fn new(iommufd: &Iommufd, id: u32) -> Self {
        Self(Object::new(iommufd, id, "I/O address space"))
    }

    pub(crate) fn foreign(iommufd: &Iommufd, id: u32) -> Self {
        Self(Object::foreign(iommufd, id, "I/O address space"))
    }

    /// Returns the object id, by which devices are attached.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Returns the iommufd that the object belongs to.
    pub fn iommufd(&self) -> &Iommufd {
        self.0.iommufd()
    }

    /// Reads the IOVA ranges that can be mapped. Each attached device may narrow them.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn iova_ranges(&self) -> Result<Iovas> {
        let mut ranges: Vec<sys::iommu_iova_range> = Vec::new();
        loop {
            let mut query = sys::iommu_ioas_iova_ranges {
                ioas_id: self.id(),
                num_iovas: ranges.len() as u32,
                allowed_iovas: ranges.as_mut_ptr() as u64,
                ..Default::default()
            };
            // SAFETY: the kernel writes at most `num_iovas` ranges, which is the length of the vector at that address.
            match unsafe { self.iommufd().call(&mut query) } {
                Ok(()) => {
                    ranges.truncate(query.num_iovas as usize);
                    let ranges = ranges.iter().map(|range| range.start..=range.last).collect();
                    return Ok(Iovas { ranges, alignment: query.out_iova_alignment });
                }
                Err(Errno::EMSGSIZE) if query.num_iovas as usize > ranges.len() => {
                    ranges.resize(query.num_iovas as usize, Default::default());
                }
                Err(errno) => return Err(Operation::ReadIovaRanges.failed(errno)),
            }
        }
    }

    /// Keeps `ranges` usable: the kernel refuses to attach a device that cannot use them, instead of
    /// narrowing the usable ranges. Each call replaces the ranges of the previous call.
    ///
    /// # Errors
    /// `EADDRINUSE` when a device that is already attached cannot use the ranges.
    pub fn allow_iovas(&self, ranges: &[RangeInclusive<u64>]) -> Result<()> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|range| sys::iommu_iova_range { start: *range.start(), last: *range.end() })
            .collect();
        let mut allow = sys::iommu_ioas_allow_iovas {
            ioas_id: self.id(),
            num_iovas: ranges.len() as u32,
            allowed_iovas: ranges.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel reads `num_iovas` ranges, which is the length of the vector at that address.
        unsafe { self.iommufd().call(&mut allow) }.map_err(|errno| Operation::AllowIovas.failed(errno))
    }

    /// Sets whether the IOMMU may use huge pages for future mappings (`IOMMU_OPTION_HUGE_PAGES`).
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn set_huge_pages(&self, on: bool) -> Result<()> {
        let option = sys::iommufd_option_IOMMU_OPTION_HUGE_PAGES;
        self.iommufd().set_option(option, self.id(), u64::from(on))
    }

    /// Returns whether the IOMMU may use huge pages.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn huge_pages(&self) -> Result<bool> {
        self.iommufd().option(sys::iommufd_option_IOMMU_OPTION_HUGE_PAGES, self.id()).map(|value| value != 0)
    }

    /// Maps all of `memory` with one ioctl (`IOMMU_IOAS_MAP`), at `iova` or, if `None`, where the kernel chooses.
    ///
    /// # Errors
    /// `EEXIST` when the range overlaps an existing mapping, `ENOMEM` at the limit of locked memory, `EINVAL`
    /// or `EADDRINUSE` outside of the usable ranges.
    pub fn map<M: Memory + ?Sized>(
        self: &Arc<Self>,
        memory: &Arc<M>,
        iova: Option<u64>,
        access: Access,
    ) -> Result<Mapping<Arc<M>>> {
        self.map_range(memory, 0..memory.len(), iova, access)
    }

    /// Maps the bytes `range` of `memory` with one ioctl. The ends of the range must be multiples of
    /// [`Iovas::alignment`], and may be inside a hugepage.
    ///
    /// # Errors
    /// As for [`Ioas::map`]; [`Error::Argument`] when the range is empty or exceeds the memory.
    pub fn map_range<M: Memory + ?Sized>(
        self: &Arc<Self>,
        memory: &Arc<M>,
        range: Range<usize>,
        iova: Option<u64>,
        access: Access,
    ) -> Result<Mapping<Arc<M>>> {
        if range.start >= range.end || range.end > memory.len() {
            let operation = Operation::Map { len: range.len() as u64, iova };
            return Err(Error::Argument { operation, why: "the range is empty or exceeds the memory" });
        }
        // SAFETY: the bytes are inside the memory, as checked above.
        let first = unsafe { memory.address().add(range.start) };
        let bytes = NonNull::slice_from_raw_parts(first, range.len());
        // SAFETY: the mapping keeps `memory` alive, and `Memory` allows a device to access its bytes until it
        // is dropped.
        unsafe { self.map_user(bytes, Arc::clone(memory), iova, access) }
    }

    /// Maps `memory` of this process with one ioctl (`IOMMU_IOAS_MAP`). `keep` is dropped after the memory is
    /// unmapped. It is the owner of the memory, or `()` if the caller manages the memory in another way.
    ///
    /// # Safety
    /// `memory` must stay mapped in this process until the mapping and every [copy](Ioas::copy) of it have
    /// been unmapped. Until then, nothing may rely on its contents: devices may read it at any time, and
    /// write it if `access` permits. If an unmap fails, the memory must never be freed.
    ///
    /// # Errors
    /// As for [`Ioas::map`].
    pub unsafe fn map_user<K>(
        self: &Arc<Self>,
        memory: NonNull<[u8]>,
        keep: K,
        iova: Option<u64>,
        access: Access,
    ) -> Result<Mapping<K>> {
        let len = memory.len() as u64;
        let mut map = sys::iommu_ioas_map {
            flags: access.flags(iova),
            ioas_id: self.id(),
            user_va: memory.as_ptr().cast::<u8>() as u64,
            length: len,
            iova: iova.unwrap_or(0),
            ..Default::default()
        };
        // SAFETY: the caller keeps the memory mapped in this process until the mapping is unmapped.
        unsafe { self.iommufd().call(&mut map) }
            .map_err(|errno| Operation::Map { len, iova }.failed(errno))?;
        Ok(Mapping::new(self, map.iova, len, keep))
    }

    /// Returns a mapping that another process made in this address space, such as the process that passed the
    /// descriptor. Dropping the value unmaps it.
    ///
    /// # Safety
    /// As for [`Ioas::map_user`], where `keep` owns the memory that is mapped. Nothing else may unmap the `len` bytes at
    /// `iova`.
    pub unsafe fn mapping_from<K>(self: &Arc<Self>, iova: u64, len: u64, keep: K) -> Mapping<K> {
        Mapping::new(self, iova, len, keep)
    }

    /// Maps the bytes `range` of a file (`IOMMU_IOAS_MAP_FILE`, Linux 6.13). The file is a memfd or is on
    /// hugetlbfs. The kernel holds the pages, and [`Iommufd::change_process`] supports such mappings.
    ///
    /// # Errors
    /// As for [`Ioas::map`]; `ENOTTY` on kernels before 6.13.
    pub fn map_file(
        self: &Arc<Self>,
        file: BorrowedFd<'_>,
        range: Range<u64>,
        iova: Option<u64>,
        access: Access,
    ) -> Result<Mapping> {
        let len = range.end.saturating_sub(range.start);
        let mut map = sys::iommu_ioas_map_file {
            flags: access.flags(iova),
            ioas_id: self.id(),
            fd: file.as_raw_fd(),
            start: range.start,
            length: len,
            iova: iova.unwrap_or(0),
            ..Default::default()
        };
        // SAFETY: the argument has no addresses of this process, and the kernel holds the file's pages.
        unsafe { self.iommufd().call(&mut map) }
            .map_err(|errno| Operation::MapFile { len, iova }.failed(errno))?;
        Ok(Mapping::new(self, map.iova, len, ()))
    }

    /// Maps the memory of `source` in this address space, sharing its pinned pages (`IOMMU_IOAS_COPY`).
    ///
    /// # Errors
    /// As for [`Ioas::map`]; [`Error::OtherIommufd`] when the two address spaces belong to different open files.
    pub fn copy<K: Clone>(
        self: &Arc<Self>,
        source: &Mapping<K>,
        iova: Option<u64>,
        access: Access,
    ) -> Result<Mapping<K>> {
        let operation = Operation::Copy { len: source.len(), iova };
        if !self.iommufd().is_same(source.ioas().iommufd()) {
            return Err(Error::OtherIommufd { operation });
        }
        let mut copy = sys::iommu_ioas_copy {
            flags: access.flags(iova),
            dst_ioas_id: self.id(),
            src_ioas_id: source.ioas().id(),
            length: source.len(),
            dst_iova: iova.unwrap_or(0),
            src_iova: source.iova(),
            ..Default::default()
        };
        // SAFETY: the argument has no addresses of this process, and the copy keeps the same owner as the source.
        unsafe { self.iommufd().call(&mut copy) }.map_err(|errno| operation.failed(errno))?;
        Ok(Mapping::new(self, copy.dst_iova, source.len(), source.memory().clone()))
    }

    /// Unmaps all mappings within the `len` bytes at `iova` (`IOMMU_IOAS_UNMAP`), and returns the number of
    /// unmapped bytes. An `iova` of `0` with a `len` of `u64::MAX` unmaps everything. A [`Mapping`] unmaps
    /// itself: this function is for mappings of other processes and for forgotten mappings.
    ///
    /// # Safety
    /// No [`Mapping`] in the range may be used afterwards. To keep it from being dropped, pass it to
    /// [`std::mem::forget`].
    ///
    /// # Errors
    /// `ENOENT` when nothing is mapped in the range, or when the range covers only part of a mapping.
    pub unsafe fn unmap(&self, iova: u64, len: u64) -> Result<u64> {
        let mut unmap = sys::iommu_ioas_unmap { ioas_id: self.id(), iova, length: len, ..Default::default() };
        // SAFETY: the argument has no addresses of this process.
        unsafe { self.iommufd().call(&mut unmap) }
            .map_err(|errno| Operation::Unmap { len, iova }.failed(errno))?;
        Ok(unmap.length)
    }

    /// Allocates a page table for the IOMMU of `device`, with the mappings of this address space (`IOMMU_HWPT_ALLOC`).
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the IOMMU does not support `options`.
    pub fn hwpt_alloc(self: &Arc<Self>, device: DeviceId, options: &HwptOptions<'_>) -> Result<Arc<Hwpt>> {
        Hwpt::of_ioas(self, device, options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{mock_kernel, read, write};
    use std::cell::{Cell, RefCell};
    use std::os::fd::AsFd;
    use std::rc::Rc;

    #[derive(Debug)]
    struct Page(Box<[std::sync::atomic::AtomicU8; 4096]>);
    // SAFETY: the box owns the bytes, which are atomics.
    unsafe impl Memory for Page {
        fn address(&self) -> NonNull<u8> {
            NonNull::from(&*self.0).cast()
        }
        fn len(&self) -> usize {
            4096
        }
    }

    fn page() -> Arc<Page> {
        Arc::new(Page(Box::new([const { std::sync::atomic::AtomicU8::new(0) }; 4096])))
    }

    /// Returns an iommufd with a stand-in kernel, and a log of its ioctls. The kernel numbers objects from 1,
    /// and maps memory without an IOVA at 16 MiB.
    fn plain() -> (Iommufd, Rc<RefCell<Vec<String>>>) {
        let (log, mut id) = (Rc::<RefCell<Vec<String>>>::default(), 0);
        let seen = Rc::clone(&log);
        let iommufd = mock_kernel(move |name, bytes| {
            let asked = match name {
                "IOMMU_IOAS_ALLOC" => {
                    id += 1;
                    write(bytes, &sys::iommu_ioas_alloc { out_ioas_id: id, ..read(bytes) });
                    format!("alloc {id}")
                }
                "IOMMU_IOAS_MAP" => {
                    let mut map: sys::iommu_ioas_map = read(bytes);
                    assert_eq!(map.size, 40);
                    let asked =
                        format!("map {} {:#b} {:#x} {}", map.ioas_id, map.flags, map.iova, map.length);
                    if map.flags & 1 == 0 {
                        map.iova = 16 << 20;
                    }
                    write(bytes, &map);
                    asked
                }
                "IOMMU_IOAS_MAP_FILE" => {
                    let map: sys::iommu_ioas_map_file = read(bytes);
                    format!(
                        "file {} {:#b} {:#x} {}+{}",
                        map.ioas_id, map.flags, map.iova, map.start, map.length
                    )
                }
                "IOMMU_IOAS_COPY" => {
                    let copy: sys::iommu_ioas_copy = read(bytes);
                    let (from, to) = (copy.src_ioas_id, copy.dst_ioas_id);
                    format!("copy {from}:{:#x} {to}:{:#x} {:#b}", copy.src_iova, copy.dst_iova, copy.flags)
                }
                "IOMMU_IOAS_UNMAP" => {
                    let unmap: sys::iommu_ioas_unmap = read(bytes);
                    format!("unmap {} {:#x} {}", unmap.ioas_id, unmap.iova, unmap.length)
                }
                "IOMMU_DESTROY" => format!("destroy {}", read::<sys::iommu_destroy>(bytes).id),
                other => other.into(),
            };
            seen.borrow_mut().push(asked);
            Ok(())
        });
        (iommufd, log)
    }

    #[test]
    fn mappings_are_unmapped_before_their_space_and_their_memory_go() {
        let (iommufd, log) = plain();
        let (first, second) = (iommufd.ioas_alloc().unwrap(), iommufd.ioas_alloc().unwrap());
        let memory = page();
        let mapping = first.map(&memory, None, Access::ReadWrite).unwrap();
        assert_eq!((mapping.iova(), mapping.len()), (16 << 20, 4096));
        let part = second.map_range(&memory, 1024..2048, Some(0x1000), Access::Write).unwrap();
        let copy = second.copy(&mapping, Some(0x2000), Access::Read).unwrap();
        let file = tempfile::tempfile().unwrap();
        drop(second.map_file(file.as_fd(), 4096..12288, Some(0x9000), Access::Read).unwrap());
        assert_eq!(Arc::strong_count(&memory), 4);
        drop((first, second, copy, part));
        assert_eq!(Arc::strong_count(&mapping.unmap().unwrap()), 2);
        assert_eq!(Arc::strong_count(&memory), 1);
        let wanted = [
            "alloc 1",
            "alloc 2",
            "map 1 0b110 0x0 4096",
            "map 2 0b11 0x1000 1024",
            "copy 1:0x1000000 2:0x2000 0b101",
            "file 2 0b101 0x9000 4096+8192",
            "unmap 2 0x9000 8192",
            "unmap 2 0x2000 4096",
            "unmap 2 0x1000 1024",
            "destroy 2",
            "unmap 1 0x1000000 4096",
            "destroy 1",
        ];
        assert_eq!(*log.borrow(), wanted);
    }

    #[test]
    fn memory_without_such_bytes_and_spaces_of_another_file_are_refused() {
        let (iommufd, log) = plain();
        let ioas = iommufd.ioas_alloc().unwrap();
        for range in [4096..4097, 0..4097, 7..7] {
            let error = ioas.map_range(&page(), range, None, Access::Read).unwrap_err();
            assert!(matches!(error, Error::Argument { .. }), "{error}");
        }
        let mapping = ioas.map(&page(), Some(0), Access::Read).unwrap();
        let other = plain().0;
        let error = other.ioas_alloc().unwrap().copy(&mapping, None, Access::Read).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot map 1 MiB for DMA: the source belongs to another open /dev/iommu"
        );
        assert_eq!(*log.borrow(), ["alloc 1", "map 1 0b101 0x0 4096"]);
    }

    #[derive(Debug)]
    struct Owner<'a>(&'a Cell<u32>);
    impl Drop for Owner<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }

    #[test]
    fn what_could_not_be_unmapped_keeps_its_memory() {
        let (refuse, dropped) = (Rc::new(Cell::new(true)), Cell::new(0));
        let refuses = Rc::clone(&refuse);
        let iommufd = mock_kernel(move |name, _| match name {
            "IOMMU_IOAS_UNMAP" if refuses.get() => Err(Errno::EBUSY),
            _ => Ok(()),
        });
        let ioas = iommufd.ioas_alloc().unwrap();
        let page = NonNull::slice_from_raw_parts(NonNull::dangling(), 4096);
        // SAFETY: the test answers the ioctls, so no device accesses the memory.
        let map = || unsafe { ioas.map_user(page, Owner(&dropped), Some(0x1000), Access::Read) }.unwrap();
        drop(map());
        let error = map().unmap().map(drop).unwrap_err();
        assert_eq!(error.to_string(), "cannot unmap 4096 bytes at 0x1000: EBUSY (Device or resource busy)");
        assert_eq!(dropped.get(), 0);
        refuse.set(false);
        drop(map());
        assert_eq!(dropped.get(), 1);
        let owner = map().unmap().unwrap();
        assert_eq!(dropped.get(), 1);
        drop(owner);
        assert_eq!(dropped.get(), 2);
    }

    #[test]
    fn ranges_are_read_however_many_there_are() {
        let all = [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)];
        let iommufd = mock_kernel(move |name, bytes| {
            if name != "IOMMU_IOAS_IOVA_RANGES" {
                return Ok(());
            }
            let mut query: sys::iommu_ioas_iova_ranges = read(bytes);
            let room = query.num_iovas as usize;
            (query.num_iovas, query.out_iova_alignment) = (2, 4096);
            write(bytes, &query);
            if room < 2 {
                return Err(Errno::EMSGSIZE);
            }
            // SAFETY: the argument states that there is room for `num_iovas` ranges.
            let ranges = unsafe {
                std::slice::from_raw_parts_mut(query.allowed_iovas as *mut sys::iommu_iova_range, room)
            };
            for (range, (start, last)) in ranges.iter_mut().zip(all) {
                *range = sys::iommu_iova_range { start, last };
            }
            Ok(())
        });
        let iovas = iommufd.ioas_alloc().unwrap().iova_ranges().unwrap();
        assert_eq!(iovas, Iovas { ranges: all.map(|(start, last)| start..=last).into(), alignment: 4096 });
    }

    #[test]
    fn allowed_ranges_and_the_option_reach_the_kernel() {
        let iommufd = mock_kernel(|name, bytes| {
            match name {
                "IOMMU_IOAS_ALLOW_IOVAS" => {
                    let allow: sys::iommu_ioas_allow_iovas = read(bytes);
                    assert_eq!((allow.size, allow.ioas_id, allow.num_iovas), (24, 9, 1));
                    // SAFETY: the argument states that there is one range.
                    let range = unsafe { *(allow.allowed_iovas as *const sys::iommu_iova_range) };
                    assert_eq!((range.start, range.last), (0x1000, 0x1fff));
                }
                "IOMMU_OPTION" => {
                    let option: sys::iommu_option = read(bytes);
                    assert_eq!((option.option_id, option.object_id), (1, 9));
                    write(bytes, &sys::iommu_option { val64: 1, ..option });
                }
                other => panic!("{other}"),
            }
            Ok(())
        });
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { iommufd.ioas_from_id(9) };
        ioas.allow_iovas(&[0x1000..=0x1fff]).unwrap();
        ioas.set_huge_pages(false).unwrap();
        assert_eq!(ioas.huge_pages(), Ok(true));
    }
}
