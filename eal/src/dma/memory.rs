//! A region with device addresses.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::iova::IovaRanges;
use super::ring::Word;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::Region;
use crate::vfio::{AddressSpace, Mapping};

/// One region, mapped for every device that will use it at one device address.
///
/// Fields drop in this order: the mappings end before the pages go back to the kernel. Devices are reset
/// before either, because every ring and pool that a device was told of holds an `Arc` of this.
#[derive(Debug)]
pub struct DmaMemory {
    mappings: Vec<Mapping>,
    region: Arc<Region>,
    translation: Translation,
    allocated: AtomicUsize,
}

/// Offset in the region to device address. With an IOMMU there is one entry; without one there is an entry
/// for each page, because physical addresses are not ours to choose. Both take the same instructions.
#[derive(Debug)]
pub(super) struct Translation {
    page_shift: u32,
    /// Device address minus offset, for each page of `1 << page_shift` bytes.
    deltas: Box<[u64]>,
}

impl Translation {
    fn linear(iova: u64) -> Self {
        Self { page_shift: usize::BITS - 1, deltas: Box::new([iova]) }
    }

    pub(super) fn paged(page_size: usize, addresses: &[u64]) -> Self {
        let deltas = addresses.iter().enumerate().map(|(i, a)| a.wrapping_sub((i * page_size) as u64));
        Self { page_shift: page_size.trailing_zeros(), deltas: deltas.collect() }
    }

    /// Whether the whole region is contiguous for the device.
    pub(super) fn is_contiguous(&self) -> bool {
        self.deltas.len() == 1
    }

    pub(super) fn iova(&self, offset: usize) -> u64 {
        self.deltas[offset >> self.page_shift].wrapping_add(offset as u64)
    }
}

impl DmaMemory {
    /// Maps `region` in each of `spaces`, at one IOVA that all of them allow, or finds its physical addresses
    /// when the devices have no IOMMU. With no space at all (virtual devices) it gets an IOVA that nobody maps.
    ///
    /// # Errors
    /// `Unavailable` when no IOVA is allowed everywhere or when spaces with and without IOMMU are mixed;
    /// `Os` when a map call is refused.
    pub fn map(region: Region, spaces: &[Arc<AddressSpace>]) -> Result<Arc<Self>> {
        let region = Arc::new(region);
        let iova = if spaces.iter().any(|space| space.is_physical()) {
            if !spaces.iter().all(|space| space.is_physical()) {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "cannot mix no-IOMMU ports with other modes",
                    "a NIC without IOMMU needs physical addresses, the others reach only mapped IOVAs",
                )
                .mend("give every port the same kind of --vfio-mode"));
            }
            None
        } else {
            Some(fit(spaces, region.len() as u64)?)
        };
        let mut mappings = Vec::with_capacity(spaces.len());
        let mut physical = None;
        for space in spaces {
            let mapping = space.map(&region, iova)?;
            physical = mapping.physical_addresses()?.or(physical);
            mappings.push(mapping);
        }
        let translation = match (iova, physical) {
            (Some(iova), _) => Translation::linear(iova),
            (None, Some(addresses)) => Translation::paged(region.page_size(), &addresses),
            (None, None) => Translation::linear(0),
        };
        Ok(Arc::new(Self { mappings, region, translation, allocated: AtomicUsize::new(0) }))
    }

    /// `region` for devices of this process that see each `page_size` bytes of it at the next of `addresses`:
    /// as without an IOMMU, for tests and counts that need no VFIO.
    ///
    /// # Panics
    /// When `page_size` is no power of two or less than a page, or as many pages are not the region.
    pub fn with_addresses(region: Region, page_size: usize, addresses: &[u64]) -> Arc<Self> {
        assert!(page_size.is_power_of_two() && page_size >= region.page_size());
        assert_eq!(addresses.len() * page_size, region.len());
        let translation = Translation::paged(page_size, addresses);
        let (mappings, region) = (Vec::new(), Arc::new(region));
        Arc::new(Self { mappings, region, translation, allocated: AtomicUsize::new(0) })
    }

    /// The pages.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Device address of the region's first byte when the rest follows in order; none where each page has a
    /// physical address of its own.
    pub fn linear_iova(&self) -> Option<u64> {
        self.translation.is_contiguous().then(|| self.translation.iova(0))
    }

    /// The mappings, one for each address space.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Takes `len` bytes that are contiguous for the device and whose device address is a multiple of
    /// `align`; gives their offset. They are never given back: rings and pools live as long as the memory.
    pub(super) fn allocate(&self, len: usize, align: usize) -> Result<usize> {
        let what = || format!("cannot take {} KiB of DMA memory", len.div_ceil(1024));
        let page = 1_usize << self.translation.page_shift;
        if len > page {
            return Err(Error::new(
                ErrorKind::Os,
                what(),
                format!("without an IOMMU at most one page of {} KiB is contiguous", page >> 10),
            )
            .mend("run with hugepages: sysctl vm.nr_hugepages=64"));
        }
        let place = |allocated: usize| {
            let mut start = allocated.checked_next_multiple_of(align)?;
            if start >> self.translation.page_shift != (start + len - 1) >> self.translation.page_shift {
                start = start.checked_next_multiple_of(page)?;
            }
            let end = start.checked_add(len)?;
            (end <= self.region.len()).then_some((start, end))
        };
        self.allocated
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |allocated| {
                place(allocated).map(|(_, end)| end)
            })
            .ok()
            .and_then(place)
            .map(|(start, _)| start)
            .ok_or_else(|| {
                Error::new(ErrorKind::Os, what(), format!("all {} MiB are used", self.region.len() >> 20))
                    .mend("ask for more with -m MB")
            })
    }

    /// Takes whole buffers of `size` bytes until `count` of them are there; gives the offset of the first.
    /// `size` divides the page size, so no buffer crosses a page.
    pub(super) fn allocate_buffers(&self, count: usize, size: usize) -> Result<usize> {
        let need = count.saturating_mul(size);
        self.allocated
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |allocated| {
                let end = allocated.checked_next_multiple_of(size)?.checked_add(need)?;
                (end <= self.region.len()).then_some(end)
            })
            .map(|allocated| allocated.next_multiple_of(size))
            .map_err(|allocated| {
                Error::new(
                    ErrorKind::Os,
                    format!("cannot take {count} packet buffers"),
                    format!(
                        "{} KiB are needed and {} KiB are left",
                        need >> 10,
                        (self.region.len() - allocated) >> 10
                    ),
                )
                .mend("ask for more with -m MB")
            })
    }

    pub(super) fn iova(&self, offset: usize) -> u64 {
        self.translation.iova(offset)
    }

    pub(super) fn translation(&self) -> &Translation {
        &self.translation
    }

    /// First byte of `len` bytes at `offset`.
    ///
    /// # Panics
    /// When they are not inside the region.
    pub(super) fn pointer(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.region.len()));
        // SAFETY: the offset is inside the region's mapping, as just checked.
        unsafe { self.region.as_ptr().add(offset) }
    }

    /// The memory as a device sees it, for device halves in tests.
    pub fn device_view(self: &Arc<Self>) -> DeviceView {
        DeviceView { memory: Arc::clone(self) }
    }
}

/// First IOVA that is free in all spaces.
fn fit(spaces: &[Arc<AddressSpace>], len: u64) -> Result<u64> {
    let free = spaces.iter().fold(IovaRanges::all(), |free, space| free.intersection(&space.free_ranges()));
    free.fit(len).ok_or_else(|| {
        let ranges: Vec<String> = free.iter().map(|r| format!("{:#x}-{:#x}", r.start(), r.end())).collect();
        Error::new(
            ErrorKind::Unavailable,
            format!("cannot place {} MiB in the devices' address space", len >> 20),
            format!(
                "the IOMMUs allow together {}",
                if ranges.is_empty() { "nothing".into() } else { ranges.join(", ") }
            ),
        )
        .mend("ask for less with -m MB")
    })
}

/// Memory by device address, as a device reads and writes it. What no mapping covers is refused, like an
/// IOMMU would.
#[derive(Clone, Debug)]
pub struct DeviceView {
    memory: Arc<DmaMemory>,
}

impl DeviceView {
    fn offset(&self, iova: u64, len: usize) -> Option<usize> {
        let translation = self.memory.translation();
        let page_len = self.memory.region.len().min(1 << translation.page_shift);
        translation.deltas.iter().enumerate().find_map(|(page, delta)| {
            let offset = usize::try_from(iova.wrapping_sub(*delta)).ok()?;
            let start = page.checked_mul(page_len)?;
            (offset >= start && offset.checked_add(len)? <= start + page_len).then_some(offset)
        })
    }

    /// Reads one word; none when the address is unmapped or odd.
    pub fn load<W: Word>(&self, iova: u64) -> Option<W> {
        let offset = self.offset(iova, size_of::<W>()).filter(|o| o.is_multiple_of(align_of::<W>()))?;
        // SAFETY: `offset` is inside the region with room for the word, and aligned.
        Some(unsafe { W::load(self.memory.pointer(offset, size_of::<W>()).as_ptr().cast()) })
    }

    /// Writes one word; none when the address is unmapped or odd.
    pub fn store<W: Word>(&self, iova: u64, value: W) -> Option<()> {
        let offset = self.offset(iova, size_of::<W>()).filter(|o| o.is_multiple_of(align_of::<W>()))?;
        // SAFETY: as in `load`.
        unsafe { W::store(self.memory.pointer(offset, size_of::<W>()).as_ptr().cast(), value) };
        Some(())
    }

    /// Copies memory out; none when not all of it is mapped.
    pub fn read(&self, iova: u64, bytes: &mut [u8]) -> Option<()> {
        let from = self.memory.pointer(self.offset(iova, bytes.len())?, bytes.len());
        // SAFETY: the source is inside the region, the destination is a slice of the caller's, and the two
        // cannot overlap because the region hands out no slices.
        unsafe { from.as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Some(())
    }

    /// Copies `bytes` in; none when not all of the target is mapped.
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Option<()> {
        let to = self.memory.pointer(self.offset(iova, bytes.len())?, bytes.len());
        // SAFETY: as in `read`, the other way.
        unsafe { to.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Backing;

    #[test]
    fn paged_translation_follows_the_pages() {
        let translation = Translation::paged(4096, &[0x9000, 0x3000]);
        assert_eq!([0, 4095, 4096, 5000].map(|o| translation.iova(o)), [0x9000, 0x9fff, 0x3000, 0x3388]);
    }

    #[test]
    fn pages_are_where_their_addresses_say() {
        let region = Region::new(4 * 4096, Backing::SmallPages).unwrap();
        let memory = DmaMemory::with_addresses(region, 8192, &[0x40_0000, 0x10_0000]);
        assert_eq!([0, 8191, 8192].map(|offset| memory.iova(offset)), [0x40_0000, 0x40_1fff, 0x10_0000]);
        let view = memory.device_view();
        assert_eq!(view.store(0x10_0008, 7_u32), Some(()));
        // SAFETY: the word is inside the region, and nothing else writes there.
        assert_eq!(unsafe { memory.pointer(8200, 4).cast::<u32>().read() }, 7);
        assert_eq!(view.load::<u32>(0x10_2000), None);
        assert_eq!(view.load::<u32>(0x40_2000), None);
    }

    #[test]
    fn device_view_refuses_what_is_not_mapped() {
        let memory = DmaMemory::map(Region::new(4096, Backing::SmallPages).unwrap(), &[]).unwrap();
        let view = memory.device_view();
        let base = memory.iova(0);
        assert_eq!(view.write(base + 4094, &[1, 2]), Some(()));
        assert_eq!(view.write(base + 4095, &[1, 2]), None);
        assert_eq!(view.load::<u32>(base - 4), None);
        assert_eq!(view.load::<u32>(base + 2), None);
        assert_eq!(view.load::<u16>(base + 4094), Some(0x0201));
    }
}
