//! Memory as a device sees it.

use std::collections::HashMap;
use std::sync::Arc;

use super::map::Segment;
use super::memory::DmaMemory;
use super::ring::Word;
use crate::error::Result;
use crate::mem::Region;
use crate::opaque;

/// Memory by device address, as a device reads and writes it. Like an IOMMU, the view refuses addresses
/// without a mapping.
///
/// A device writes at any time, even where the driver uses plain accesses. The view therefore maps the pages
/// at addresses of its own and accesses them by instructions that are opaque to the compiler, as another
/// process would. Words are read and written as a whole and without ordering, as by
/// [`DmaRing`](super::DmaRing).
#[derive(Clone, Debug)]
pub struct DeviceView {
    segments: Arc<[Seen]>,
}

/// A segment, and the lookup of its bytes by device address.
#[derive(Debug)]
struct Seen {
    segment: Arc<Segment>,
    /// Second mapping of the region's pages. `None` under Miri.
    again: Option<Region>,
    /// Page in the region, by the page number of its device address, if pages have addresses of their own. A
    /// search of all pages for each access would take most of an emulated device's time.
    pages: HashMap<u64, usize>,
}

impl Seen {
    fn new(segment: Arc<Segment>) -> Result<Self> {
        let translation = segment.translation();
        let page = |(page, delta): (usize, &u64)| {
            (delta.wrapping_add((page as u64) << translation.page_shift) >> translation.page_shift, page)
        };
        let pages = match translation.is_contiguous() {
            true => HashMap::new(),
            false => translation.deltas.iter().enumerate().map(page).collect(),
        };
        // Miri cannot map files. Without the second mapping, it finds accesses that race with those of the
        // driver.
        let again = if cfg!(miri) { None } else { Some(segment.region().mapped_again()?) };
        Ok(Self { segment, again, pages })
    }

    fn offset(&self, iova: u64, len: usize) -> Option<usize> {
        let translation = self.segment.translation();
        let page_len = self.segment.region().len().min(1 << translation.page_shift);
        let page = match translation.is_contiguous() {
            true => 0,
            false => *self.pages.get(&(iova >> translation.page_shift))?,
        };
        let offset = usize::try_from(iova.wrapping_sub(translation.deltas[page])).ok()?;
        let start = page.checked_mul(page_len)?;
        (offset >= start && offset.checked_add(len)? <= start + page_len).then_some(offset)
    }
}

impl DeviceView {
    /// Creates a view of all segments in the map of `memory`.
    pub(super) fn of(memory: &DmaMemory) -> Result<Self> {
        let segments = memory.memory_map().segments();
        Ok(Self { segments: segments.into_iter().map(Seen::new).collect::<Result<_>>()? })
    }

    /// Returns the address of the `len` bytes at a device address, or `None` if not all of them are mapped.
    fn at(&self, iova: u64, len: usize) -> Option<*mut u8> {
        let (seen, offset) = self.segments.iter().find_map(|seen| Some((seen, seen.offset(iova, len)?)))?;
        let region = seen.again.as_ref().unwrap_or(seen.segment.region());
        // SAFETY: the offset is inside the region's mapping, and the second mapping has the same length.
        Some(unsafe { region.as_ptr().add(offset) }.as_ptr())
    }

    /// Reads one word. Returns `None` if the address is unmapped or misaligned.
    pub fn load<W: Word>(&self, iova: u64) -> Option<W> {
        let at = self.at(iova, size_of::<W>())?.cast::<W>();
        // SAFETY: the word is inside the region, and aligned.
        at.is_aligned().then(|| unsafe { W::peek(at) })
    }

    /// Writes one word. Returns `None` if the address is unmapped or misaligned.
    pub fn store<W: Word>(&self, iova: u64, value: W) -> Option<()> {
        let at = self.at(iova, size_of::<W>())?.cast::<W>();
        // SAFETY: as in `load`. Only this view and its clones access the second mapping.
        at.is_aligned().then(|| unsafe { W::poke(at, value) })
    }

    /// Copies bytes from a device address into `bytes`. Returns `None` if not all of them are mapped.
    pub fn read(&self, iova: u64, bytes: &mut [u8]) -> Option<()> {
        let from = self.at(iova, bytes.len())?;
        // SAFETY: the source is inside the region, and the destination is a slice of the caller. They cannot
        // overlap, because the region hands out no slices.
        unsafe { opaque::read(from, bytes.as_mut_ptr(), bytes.len()) };
        Some(())
    }

    /// Copies `bytes` to a device address. Returns `None` if not all of the target is mapped.
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Option<()> {
        let to = self.at(iova, bytes.len())?;
        // SAFETY: as in `read`, in the other direction. Only this view and its clones access the second
        // mapping.
        unsafe { opaque::write(bytes.as_ptr(), to, bytes.len()) };
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::mem::Backing;

    fn small() -> Region {
        Region::new(4096, Backing::SmallPages).unwrap()
    }

    fn memory_at(iova: u64) -> Arc<DmaMemory> {
        DmaMemory::with_addresses(small(), 4096, &[iova])
    }

    #[test]
    fn pages_are_where_their_addresses_say() {
        let region = Region::new(4 * 4096, Backing::SmallPages).unwrap();
        let memory = DmaMemory::with_addresses(region, 8192, &[0x40_0000, 0x10_0000]);
        assert_eq!([0, 8191, 8192].map(|offset| memory.iova(offset)), [0x40_0000, 0x40_1fff, 0x10_0000]);
        let view = memory.device_view().unwrap();
        assert_eq!(view.store(0x10_0008, 7_u32), Some(()));
        // SAFETY: the word is inside the region, and nothing else writes there.
        assert_eq!(unsafe { memory.pointer(8200, 4).cast::<u32>().read() }, 7);
        assert_eq!(view.load::<u32>(0x10_2000), None);
        assert_eq!(view.load::<u32>(0x40_2000), None);
    }

    #[test]
    fn devices_that_write_the_same_bytes_do_not_race() {
        let memory = DmaMemory::map(Region::new(4096, Backing::SmallPages).unwrap(), &[]).unwrap();
        let (view, base) = (memory.device_view().unwrap(), memory.iova(0));
        let write = |fill: u8| {
            for len in [3, 60, 200] {
                view.write(base, &vec![fill; len]).unwrap();
                let mut bytes = vec![0; len];
                view.read(base, &mut bytes).unwrap();
                assert!(bytes.iter().all(|byte| matches!(byte, 1 | 2)), "{bytes:?}");
            }
        };
        std::thread::scope(|scope| {
            [1, 2].map(|fill| scope.spawn(move || write(fill))).map(|thread| thread.join().unwrap())
        });
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri cannot map files")]
    fn a_device_has_the_pages_at_addresses_of_its_own() {
        let memory = DmaMemory::map(Region::new(1, Backing::SmallPages).unwrap(), &[]).unwrap();
        let view = memory.device_view().unwrap();
        assert_ne!(view.at(memory.iova(0), 1), Some(memory.pointer(0, 1).as_ptr()));
        let Ok(region) = Region::new(1, Backing::HugeAnonymous) else {
            return println!("skipped: no hugepage");
        };
        let error = DmaMemory::map(region, &[]).unwrap().device_view().unwrap_err();
        assert!(
            error.kind() == ErrorKind::Unavailable && error.to_string().contains("--in-memory"),
            "{error}"
        );
    }

    #[test]
    fn device_view_refuses_what_is_not_mapped() {
        let memory = DmaMemory::map(Region::new(4096, Backing::SmallPages).unwrap(), &[]).unwrap();
        let view = memory.device_view().unwrap();
        let base = memory.iova(0);
        assert_eq!(view.write(base + 4094, &[1, 2]), Some(()));
        assert_eq!(view.write(base + 4095, &[1, 2]), None);
        assert_eq!(view.load::<u32>(base - 4), None);
        assert_eq!(view.load::<u32>(base + 2), None);
        assert_eq!(view.load::<u16>(base + 4094), Some(0x0201));
    }

    #[test]
    fn a_device_sees_all_segments_at_their_addresses() {
        let first = memory_at(0x40_0000);
        let _second = first.memory_map().add_at(small(), 4096, &[0x10_0000]);
        let view = first.device_view().unwrap();
        assert_eq!((view.store(0x40_0008, 7_u32), view.store(0x10_0008, 8_u32)), (Some(()), Some(())));
        assert_eq!((view.load(0x40_0008), view.load(0x10_0008)), (Some(7_u32), Some(8_u32)));
        assert_eq!(view.load::<u32>(0x10_1000), None);
        // A view does not see segments that are added after it was created.
        let _third = first.memory_map().add_at(small(), 4096, &[0x20_0000]);
        assert_eq!(view.load::<u32>(0x20_0000), None);
        assert_eq!(first.device_view().unwrap().load(0x20_0000), Some(0_u32));
    }
}
