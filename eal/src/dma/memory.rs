//! Memory with device addresses, and its allocation.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use super::map::{MemoryMap, Segment, Translation};
use super::part::Part;
use super::view::DeviceView;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
use crate::mem::Region;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::vfio::AddressSpace;

#[cfg(test)]
#[cfg(loom)]
mod models;

/// Memory of one [`Segment`] with device addresses: all of it, or the part that some of the devices share.
///
/// Devices are reset before the memory is unmapped, because every ring and pool that a device uses holds an
/// `Arc` of the memory.
#[derive(Debug)]
pub struct DmaMemory {
    segment: Arc<Segment>,
    read_write: Arena,
    /// Bytes that devices only read. `None` if `read_write` has all bytes, because the difference does not
    /// matter to the devices.
    read_only: Option<Arena>,
    /// Keeps the other segments alive, because rings in this memory hold buffers of other segments.
    map: Arc<MemoryMap>,
}

/// Memory that outlives its owners. It is kept in a list rather than leaked, so that leak checkers can reach
/// it.
static KEPT: Mutex<Vec<Arc<DmaMemory>>> = Mutex::new(Vec::new());

/// Bytes of the region that are allocated from first to last.
#[derive(Debug)]
struct Arena {
    next: AtomicUsize,
    bytes: Range<usize>,
}

impl Arena {
    fn new(bytes: Range<usize>) -> Self {
        Self { next: AtomicUsize::new(bytes.start), bytes }
    }
}

impl DmaMemory {
    /// Maps `region` in each of `spaces`, in a map of its own. See [`MemoryMap::add`].
    ///
    /// # Errors
    /// Same as [`MemoryMap::new`] and [`MemoryMap::add`].
    pub fn map(region: Region, spaces: &[Arc<AddressSpace>]) -> Result<Arc<Self>> {
        let part = Part { read_write: region.len(), spaces: spaces.to_vec(), ..Part::default() };
        Ok(MemoryMap::new(spaces)?.add(region, &[part])?.swap_remove(0))
    }

    /// Adds `region` to a map of its own at the device addresses `addresses`. See [`MemoryMap::add_at`].
    ///
    /// # Panics
    /// Same as [`MemoryMap::add_at`].
    pub fn with_addresses(region: Region, page_size: usize, addresses: &[u64]) -> Arc<Self> {
        MemoryMap::without_spaces().add_at(region, page_size, addresses)
    }

    /// All of `segment`, which is in `map`.
    pub(super) fn whole(map: &Arc<MemoryMap>, segment: &Arc<Segment>) -> Arc<Self> {
        Self::part(map, segment, [0..segment.region().len(), 0..0])
    }

    /// Bytes of `segment`, which is in `map`: those that devices write, and those that they only read.
    pub(super) fn part(
        map: &Arc<MemoryMap>,
        segment: &Arc<Segment>,
        [read_write, read_only]: [Range<usize>; 2],
    ) -> Arc<Self> {
        Arc::new(Self {
            segment: Arc::clone(segment),
            read_write: Arena::new(read_write),
            read_only: Some(read_only).filter(|bytes| !bytes.is_empty()).map(Arena::new),
            map: Arc::clone(map),
        })
    }

    /// Keeps the memory and everything else in its map mapped and reserved until the process ends, because a
    /// device that could not be reset may still write to it.
    pub fn keep(self: Arc<Self>) {
        // The list is intact even if another caller panicked.
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// Map that contains the segment.
    pub fn memory_map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// Segment that contains the memory.
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Region that holds the pages.
    pub fn region(&self) -> &Region {
        self.segment.region()
    }

    /// Device address of the segment's first byte, if it is contiguous for devices. See
    /// [`Segment::linear_iova`].
    pub fn linear_iova(&self) -> Option<u64> {
        self.segment.linear_iova()
    }

    fn arena(&self, access: Access) -> &Arena {
        match access {
            Access::Read => self.read_only.as_ref().unwrap_or(&self.read_write),
            Access::Write | Access::ReadWrite => &self.read_write,
        }
    }

    /// Allocates `len` bytes that are contiguous for the device and whose device address is a multiple of
    /// `align`, for devices that need no more than `access`. Returns their offset. The bytes are never freed,
    /// because rings and pools live as long as the memory.
    pub(super) fn allocate(&self, len: usize, align: usize, access: Access) -> Result<usize> {
        let arena = self.arena(access);
        let what = || format!("cannot allocate {} KiB of DMA memory", len.div_ceil(1024));
        let page_shift = self.translation().page_shift;
        let page = 1_usize << page_shift;
        if len > page {
            return Err(Error::new(
                ErrorKind::Os,
                what(),
                format!("without an IOMMU, at most one page of {} KiB is contiguous", page >> 10),
            )
            .with_hint("use larger pages: leave --no-huge out, or ask for smaller rings"));
        }
        let place = |allocated: usize| {
            let mut start = allocated.checked_next_multiple_of(align)?;
            if start >> page_shift != (start + len - 1) >> page_shift {
                start = start.checked_next_multiple_of(page)?;
            }
            let end = start.checked_add(len)?;
            (end <= arena.bytes.end).then_some((start, end))
        };
        arena
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |allocated| {
                place(allocated).map(|(_, end)| end)
            })
            .ok()
            .and_then(place)
            .map(|(start, _)| start)
            .ok_or_else(|| {
                Error::new(ErrorKind::Os, what(), format!("all {} KiB are in use", arena.bytes.len() >> 10))
                    .with_hint("ask for more with -m MB")
            })
    }

    /// Allocates `count` adjacent buffers of `size` bytes. Returns the offset of the first. `size` divides
    /// the page size, so no buffer crosses a page.
    pub(super) fn allocate_buffers(&self, count: usize, size: usize, access: Access) -> Result<usize> {
        let need = count.saturating_mul(size);
        let arena = self.arena(access);
        arena
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |allocated| {
                let end = allocated.checked_next_multiple_of(size)?.checked_add(need)?;
                (end <= arena.bytes.end).then_some(end)
            })
            .map(|allocated| allocated.next_multiple_of(size))
            .map_err(|next| {
                too_small(&format!("allocate {count} packet buffers"), need, arena.bytes.end - next)
            })
    }

    pub(super) fn iova(&self, offset: usize) -> u64 {
        self.translation().iova(offset)
    }

    pub(super) fn translation(&self) -> &Translation {
        self.segment.translation()
    }

    /// Address of the first of `len` bytes at `offset`.
    ///
    /// # Panics
    /// Panics if the bytes are not inside the region.
    pub(super) fn pointer(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.region().len()));
        // SAFETY: the offset is inside the region's mapping, as just checked.
        unsafe { self.region().as_ptr().add(offset) }
    }

    /// Returns the memory as a device sees it, with everything that is in its map by now. Used by emulated
    /// devices in tests. The view maps the memory a second time.
    ///
    /// # Errors
    /// `Unavailable` if a region has no file, `Os` if the map call fails.
    pub fn device_view(&self) -> Result<DeviceView> {
        DeviceView::of(self)
    }
}

pub(super) fn too_small(what: &str, need: usize, left: usize) -> Error {
    let why = format!("{} KiB are needed and {} KiB are left", need >> 10, left >> 10);
    Error::new(ErrorKind::Os, format!("cannot {what}"), why).with_hint("ask for more with -m MB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Backing;

    #[test]
    fn without_an_iommu_parts_are_one_memory() {
        let region = Region::new(8 * 4096, Backing::SmallPages).unwrap();
        let part = Part { read_write: 4096, read_only: 4096, ..Part::default() };
        let parts = MemoryMap::without_spaces().add(region, &[part.clone(), part]).unwrap();
        assert!(Arc::ptr_eq(&parts[0], &parts[1]));
        assert_eq!(parts[1].allocate(8, 8, Access::Read).unwrap(), 0);
        assert_eq!(parts[0].allocate(8, 8, Access::ReadWrite).unwrap(), 8);
    }
}
