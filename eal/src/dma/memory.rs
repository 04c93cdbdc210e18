//! A region with device addresses.

use std::collections::HashMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use super::iova::IovaRanges;
use super::ring::Word;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
use crate::mem::{OnNode, Region, page_size};
use crate::opaque;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::vfio::{AddressSpace, Mapping};

#[cfg(test)]
#[cfg(loom)]
mod models;

/// Memory of one region with device addresses: all of it, or the part that some of the devices share.
///
/// Devices are reset before it is unmapped, because every ring and pool that a device was told of holds an `Arc`
/// of this.
#[derive(Debug)]
pub struct DmaMemory {
    shared: Arc<Shared>,
    read_write: Arena,
    /// What devices only read; none where that makes no difference to them.
    read_only: Option<Arena>,
    /// NUMA nodes that its pages were asked of.
    nodes: Vec<OnNode>,
}

/// Memory that outlives its owners. In a list rather than forgotten, so that leak checkers reach it.
static KEPT: Mutex<Vec<Arc<DmaMemory>>> = Mutex::new(Vec::new());

/// What all parts of a region share. Fields drop in this order: the mappings end before the pages go back to
/// the kernel.
#[derive(Debug)]
struct Shared {
    _mappings: Vec<Mapping>,
    region: Arc<Region>,
    translation: Translation,
}

/// Bytes of the region that are given out from the first to the last.
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

/// What a part of a region is for, and which devices reach it.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Bytes that devices read and write.
    pub read_write: usize,
    /// Bytes that devices only read.
    pub read_only: usize,
    /// The address spaces that map it.
    pub spaces: Vec<Arc<AddressSpace>>,
    /// NUMA nodes, and for how many bytes each, from the part's first byte on. Where a part has any, all of its numbers of
    /// bytes, and `bytes()` of all parts, are multiples of the region's page size.
    pub nodes: Vec<(u32, usize)>,
}

impl Part {
    /// Bytes of a region that it takes.
    pub fn bytes(&self) -> usize {
        self.sizes().into_iter().sum()
    }

    fn sizes(&self) -> [usize; 2] {
        // Parts may begin on any page of the CPU, also inside a hugepage: the kernel allows no finer mapping, and
        // `AddressSpace` refuses an IOMMU that allows only coarser ones.
        [self.read_write, self.read_only].map(|len| len.next_multiple_of(page_size()))
    }
}

/// Where the nodes of `part` lie, whose first byte is at `start`.
fn nodes_from(start: usize, part: &Part) -> impl Iterator<Item = OnNode> {
    part.nodes.iter().filter(|(_, bytes)| *bytes > 0).scan(start, |next, (node, bytes)| {
        *next += bytes;
        Some(OnNode { node: *node, bytes: *next - bytes..*next })
    })
}

/// The nodes of `parts`, in a region of `len` bytes that [`DmaMemory::map_parts`] will be given.
///
/// # Errors
/// `Os` when the region would be too small.
pub fn nodes_of(parts: &[Part], len: usize) -> Result<Vec<OnNode>> {
    let layout = layout(parts, len)?;
    let starts = layout.iter().map(|[read_write, _]| read_write.start);
    Ok(starts.zip(parts).flat_map(|(start, part)| nodes_from(start, part)).collect())
}

/// Where each of `parts` lies in a region of `len` bytes: first what devices write, then what they only read.
fn layout(parts: &[Part], len: usize) -> Result<Vec<[Range<usize>; 2]>> {
    let need = parts.iter().map(Part::bytes).sum();
    let mut rest = len.checked_sub(need).ok_or_else(|| too_small("map memory for the ports", need, len))?;
    let mut next = 0;
    let mut take = |len| {
        next += len;
        next - len..next
    };
    Ok(parts
        .iter()
        .map(|part| {
            let [read_write, read_only] = part.sizes();
            [take(read_write + std::mem::take(&mut rest)), take(read_only)]
        })
        .collect())
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
    /// `Unavailable` when no IOVA is allowed everywhere, when a device does not reach a page's physical address, or
    /// when spaces with and without IOMMU are mixed; `Os` when a map call is refused.
    pub fn map(region: Region, spaces: &[Arc<AddressSpace>]) -> Result<Arc<Self>> {
        if !spaces.is_empty() && !is_physical(spaces)? {
            let part = Part { read_write: region.len(), spaces: spaces.to_vec(), ..Part::default() };
            return Self::map_parts(region, &[part]).map(|mut parts| parts.swap_remove(0));
        }
        let region = Arc::new(region);
        let mappings =
            spaces.iter().map(|space| space.map(&region, None)).collect::<Result<Vec<Mapping>>>()?;
        let mut physical = None;
        for mapping in &mappings {
            physical = mapping.physical_addresses()?.or(physical);
        }
        let translation = match physical {
            Some(addresses) => {
                let mask = spaces.iter().map(|space| space.dma_mask()).min().unwrap_or(u64::MAX);
                check_reach(&addresses, region.page_size(), mask)?;
                spaces.iter().for_each(|space| space.keep(&region));
                Translation::paged(region.page_size(), &addresses)
            }
            None => Translation::linear(fit(spaces, region.len() as u64)?),
        };
        Ok(Self::whole(mappings, region, translation))
    }

    fn whole(mappings: Vec<Mapping>, region: Arc<Region>, translation: Translation) -> Arc<Self> {
        let read_write = Arena::new(0..region.len());
        Arc::new(Self {
            shared: Arc::new(Shared { _mappings: mappings, region, translation }),
            read_write,
            read_only: None,
            nodes: Vec::new(),
        })
    }

    /// Maps each of `parts` of `region` in the spaces that it names, and gives them in that order. An address
    /// means the same byte in every space, or none; what several spaces of one `/dev/iommu` map is pinned once.
    /// What is left of the region goes to the first part. One memory for all of them when nothing tells them apart:
    /// there are no spaces, or they are without IOMMU, and there are no NUMA nodes.
    ///
    /// # Errors
    /// As for [`DmaMemory::map`]; `Os` when the region is too small.
    pub fn map_parts(region: Region, parts: &[Part]) -> Result<Vec<Arc<Self>>> {
        let mut spaces: Vec<Arc<AddressSpace>> = Vec::new();
        for space in parts.iter().flat_map(|part| &part.spaces) {
            if !spaces.iter().any(|known| Arc::ptr_eq(known, space)) {
                spaces.push(Arc::clone(space));
            }
        }
        let layout = layout(parts, region.len())?;
        if spaces.is_empty() || is_physical(&spaces)? {
            let whole = Self::map(region, &spaces)?;
            if parts.iter().all(|part| part.nodes.is_empty()) {
                return Ok(vec![whole; parts.len()]);
            }
            return Ok(Self::divided(&whole.shared, parts, layout));
        }
        let region = Arc::new(region);
        let iova = fit(&spaces, region.len() as u64)?;
        let mut mappings = Vec::new();
        for (part, [read_write, read_only]) in parts.iter().zip(&layout) {
            for (bytes, access) in [(read_write, Access::ReadWrite), (read_only, Access::Read)] {
                map_everywhere(&region, bytes, iova, access, &part.spaces, &mut mappings)?;
            }
        }
        let translation = Translation::linear(iova);
        let shared = Arc::new(Shared { _mappings: mappings, region, translation });
        Ok(Self::divided(&shared, parts, layout))
    }

    fn divided(shared: &Arc<Shared>, parts: &[Part], layout: Vec<[Range<usize>; 2]>) -> Vec<Arc<Self>> {
        let memory = parts.iter().zip(layout).map(|(part, [read_write, read_only])| {
            let nodes = nodes_from(read_write.start, part).collect();
            let read_only = Some(read_only).filter(|bytes| !bytes.is_empty()).map(Arena::new);
            Arc::new(Self {
                shared: Arc::clone(shared),
                read_write: Arena::new(read_write),
                read_only,
                nodes,
            })
        });
        memory.collect()
    }

    /// `region` for devices of this process that see each `page_size` bytes of it at the next of `addresses`:
    /// as without an IOMMU, for tests and counts that need no VFIO.
    ///
    /// # Panics
    /// When `page_size` is no power of two or less than a page, as many pages are not the region, or an address is no
    /// multiple of it.
    pub fn with_addresses(region: Region, page_size: usize, addresses: &[u64]) -> Arc<Self> {
        assert!(page_size.is_power_of_two() && page_size >= region.page_size());
        assert_eq!(addresses.len() * page_size, region.len());
        assert!(addresses.iter().all(|address| address.is_multiple_of(page_size as u64)));
        let translation = Translation::paged(page_size, addresses);
        Self::whole(Vec::new(), Arc::new(region), translation)
    }

    /// Keeps the memory mapped and reserved until the process ends, because a device that could not be reset may still
    /// write to it.
    pub fn keep(self: Arc<Self>) {
        // After a panic of another keeper the list is still whole.
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// The pages.
    pub fn region(&self) -> &Region {
        &self.shared.region
    }

    /// Device address of the region's first byte when the rest follows in order; none where each page has a
    /// physical address of its own.
    pub fn linear_iova(&self) -> Option<u64> {
        let translation = self.translation();
        translation.is_contiguous().then(|| translation.iova(0))
    }

    /// NUMA nodes that its pages were asked of; none where nobody asked.
    pub(super) fn nodes(&self) -> &[OnNode] {
        &self.nodes
    }

    fn arena(&self, access: Access) -> &Arena {
        match access {
            Access::Read => self.read_only.as_ref().unwrap_or(&self.read_write),
            Access::Write | Access::ReadWrite => &self.read_write,
        }
    }

    /// Takes `len` bytes that are contiguous for the device and whose device address is a multiple of
    /// `align`, for devices that need no more than `access`; gives their offset. They are never given back:
    /// rings and pools live as long as the memory.
    pub(super) fn allocate(&self, len: usize, align: usize, access: Access) -> Result<usize> {
        let arena = self.arena(access);
        let what = || format!("cannot take {} KiB of DMA memory", len.div_ceil(1024));
        let page_shift = self.translation().page_shift;
        let page = 1_usize << page_shift;
        if len > page {
            return Err(Error::new(
                ErrorKind::Os,
                what(),
                format!("without an IOMMU at most one page of {} KiB is contiguous", page >> 10),
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
                Error::new(ErrorKind::Os, what(), format!("all {} KiB are used", arena.bytes.len() >> 10))
                    .with_hint("ask for more with -m MB")
            })
    }

    /// Takes whole buffers of `size` bytes until `count` of them are there; gives the offset of the first.
    /// `size` divides the page size, so no buffer crosses a page.
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
            .map_err(|next| too_small(&format!("take {count} packet buffers"), need, arena.bytes.end - next))
    }

    pub(super) fn iova(&self, offset: usize) -> u64 {
        self.translation().iova(offset)
    }

    pub(super) fn translation(&self) -> &Translation {
        &self.shared.translation
    }

    /// First byte of `len` bytes at `offset`.
    ///
    /// # Panics
    /// When they are not inside the region.
    pub(super) fn pointer(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.shared.region.len()));
        // SAFETY: the offset is inside the region's mapping, as just checked.
        unsafe { self.shared.region.as_ptr().add(offset) }
    }

    /// The memory as a device sees it, for device halves in tests. It is mapped a second time for that.
    ///
    /// # Errors
    /// `Unavailable` when the region has no file; `Os` when the map call is refused.
    pub fn device_view(self: &Arc<Self>) -> Result<DeviceView> {
        let translation = self.translation();
        let page = |(page, delta): (usize, &u64)| {
            (delta.wrapping_add((page as u64) << translation.page_shift) >> translation.page_shift, page)
        };
        let pages = match translation.is_contiguous() {
            true => HashMap::new(),
            false => translation.deltas.iter().enumerate().map(page).collect(),
        };
        // Miri has no file to map. It finds accesses that race with those of the driver.
        let again = if cfg!(miri) { None } else { Some(Arc::new(self.region().mapped_again()?)) };
        Ok(DeviceView { memory: Arc::clone(self), again, pages: Arc::new(pages) })
    }
}

fn too_small(what: &str, need: usize, left: usize) -> Error {
    let why = format!("{} KiB are needed and {} KiB are left", need >> 10, left >> 10);
    Error::new(ErrorKind::Os, format!("cannot {what}"), why).with_hint("ask for more with -m MB")
}

/// Whether devices of `spaces` use physical addresses.
fn is_physical(spaces: &[Arc<AddressSpace>]) -> Result<bool> {
    let physical = spaces.iter().filter(|space| space.is_physical()).count();
    if physical > 0 && physical < spaces.len() {
        return Err(Error::new(
            ErrorKind::Usage,
            "cannot mix no-IOMMU ports with other modes",
            "a NIC without IOMMU needs physical addresses, the others reach only mapped IOVAs",
        )
        .with_hint("give every port the same kind of --vfio-mode"));
    }
    Ok(physical > 0)
}

/// Whether devices that give out no address above `mask` reach every page of `page_size` bytes at `addresses`.
fn check_reach(addresses: &[u64], page_size: usize, mask: u64) -> Result<()> {
    let beyond = |address: &&u64| address.checked_add(page_size as u64 - 1).is_none_or(|last| last > mask);
    let Some(beyond) = addresses.iter().find(beyond) else { return Ok(()) };
    let why = format!(
        "a page is at the physical address {beyond:#x}, and a NIC among them has {} address bits",
        u64::BITS - mask.leading_zeros()
    );
    Err(Error::new(ErrorKind::Unavailable, "cannot use this memory without an IOMMU", why)
        .with_hint("boot with an IOMMU (intel_iommu=on or amd_iommu=on), or with mem=3G"))
}

/// Maps `bytes` of `region`, whose first byte is at `iova`, in each of `spaces`.
fn map_everywhere(
    region: &Arc<Region>,
    bytes: &Range<usize>,
    iova: u64,
    access: Access,
    spaces: &[Arc<AddressSpace>],
    mappings: &mut Vec<Mapping>,
) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let known = mappings.len();
    for space in spaces {
        let mut copy = None;
        for source in &mappings[known..] {
            copy = space.copy(source, access)?;
            if copy.is_some() {
                break;
            }
        }
        mappings.push(match copy {
            Some(copy) => copy,
            None => space.map_range(region, bytes.clone(), Some(iova + bytes.start as u64), access)?,
        });
    }
    Ok(())
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
                "the IOMMUs and the address bits of the NICs allow together {}",
                if ranges.is_empty() { "nothing".into() } else { ranges.join(", ") }
            ),
        )
        .with_hint("ask for less with -m MB")
    })
}

/// Memory by device address, as a device reads and writes it. What no mapping covers is refused, like an
/// IOMMU would.
///
/// A device writes whenever it wants, also where the driver has plain access. So the view has the pages at addresses of its
/// own and accesses them by instructions that the compiler does not look into, as another process would. Words are read and
/// written whole and without order, as by [`DmaRing`](super::DmaRing).
#[derive(Clone, Debug)]
pub struct DeviceView {
    memory: Arc<DmaMemory>,
    /// The region's pages once more; none under Miri.
    again: Option<Arc<Region>>,
    /// Page in the region by the number of its device address, where pages have addresses of their own: a search of all
    /// pages for each access would take most of the time of whoever plays a device.
    pages: Arc<HashMap<u64, usize>>,
}

impl DeviceView {
    fn offset(&self, iova: u64, len: usize) -> Option<usize> {
        let translation = self.memory.translation();
        let page_len = self.memory.region().len().min(1 << translation.page_shift);
        let page = match translation.is_contiguous() {
            true => 0,
            false => *self.pages.get(&(iova >> translation.page_shift))?,
        };
        let offset = usize::try_from(iova.wrapping_sub(translation.deltas[page])).ok()?;
        let start = page.checked_mul(page_len)?;
        (offset >= start && offset.checked_add(len)? <= start + page_len).then_some(offset)
    }

    /// Where the `len` bytes at a device address are; none when not all of them are mapped.
    fn at(&self, iova: u64, len: usize) -> Option<*mut u8> {
        let region = self.again.as_deref().unwrap_or(self.memory.region());
        // SAFETY: the offset is inside the region's mapping, and both mappings have its length.
        Some(unsafe { region.as_ptr().add(self.offset(iova, len)?) }.as_ptr())
    }

    /// Reads one word; none when the address is unmapped or odd.
    pub fn load<W: Word>(&self, iova: u64) -> Option<W> {
        let at = self.at(iova, size_of::<W>())?.cast::<W>();
        // SAFETY: the word is inside the region, and aligned.
        at.is_aligned().then(|| unsafe { W::peek(at) })
    }

    /// Writes one word; none when the address is unmapped or odd.
    pub fn store<W: Word>(&self, iova: u64, value: W) -> Option<()> {
        let at = self.at(iova, size_of::<W>())?.cast::<W>();
        // SAFETY: as in `load`; what is mapped a second time is accessed by this view's copies only.
        at.is_aligned().then(|| unsafe { W::poke(at, value) })
    }

    /// Copies memory out; none when not all of it is mapped.
    pub fn read(&self, iova: u64, bytes: &mut [u8]) -> Option<()> {
        let from = self.at(iova, bytes.len())?;
        // SAFETY: the source is inside the region, the destination is a slice of the caller's, and the two
        // cannot overlap because the region hands out no slices.
        unsafe { opaque::read(from, bytes.as_mut_ptr(), bytes.len()) };
        Some(())
    }

    /// Copies `bytes` in; none when not all of the target is mapped.
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Option<()> {
        let to = self.at(iova, bytes.len())?;
        // SAFETY: as in `read`, the other way; what is mapped a second time is accessed by this view's copies only.
        unsafe { opaque::write(bytes.as_ptr(), to, bytes.len()) };
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
    fn parts_lie_behind_each_other_and_the_first_gets_the_rest() {
        let part = |read_write, read_only| Part { read_write, read_only, ..Part::default() };
        let page = page_size();
        let parts = [part(2 * page + 1, 1), part(0, 0), part(page, page + 1)];
        assert_eq!(parts.iter().map(Part::bytes).sum::<usize>(), 7 * page);
        let pages = |range: &Range<usize>| [range.start, range.end].map(|at| at / page);
        let found: Vec<_> = layout(&parts, 9 * page).unwrap().iter().flatten().map(pages).collect();
        assert_eq!(found, [[0, 5], [5, 6], [6, 6], [6, 6], [6, 7], [7, 9]]);
        let [need, left] = [7, 6].map(|pages| (pages * page) >> 10);
        let error = layout(&parts, 6 * page).unwrap_err().to_string();
        assert!(error.contains(&format!("{need} KiB are needed and {left} KiB")), "{error}");
    }

    #[test]
    fn pages_beyond_the_reach_of_a_nic_are_refused_with_the_reason() {
        let (low, high) = (0xffe0_0000, 0x1_0000_0000);
        check_reach(&[low, high], 2 << 20, u64::MAX).unwrap();
        check_reach(&[low], 2 << 20, u32::MAX.into()).unwrap();
        for addresses in [[low, high], [low + 4096, low]] {
            let error = check_reach(&addresses, 2 << 20, u32::MAX.into()).unwrap_err().to_string();
            assert!(error.contains("32 address bits") && error.contains("intel_iommu=on"), "{error}");
        }
    }

    #[test]
    fn without_an_iommu_parts_are_one_memory() {
        let region = Region::new(8 * 4096, Backing::SmallPages).unwrap();
        let part = Part { read_write: 4096, read_only: 4096, ..Part::default() };
        let parts = DmaMemory::map_parts(region, &[part.clone(), part]).unwrap();
        assert!(Arc::ptr_eq(&parts[0], &parts[1]));
        assert_eq!(parts[1].allocate(8, 8, Access::Read).unwrap(), 0);
        assert_eq!(parts[0].allocate(8, 8, Access::ReadWrite).unwrap(), 8);
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
    fn without_an_iommu_pages_stay_until_the_devices_are_closed() {
        let space = Arc::new(AddressSpace::nowhere());
        let memory = Region::new(2 << 20, Backing::HugeMemfd)
            .and_then(|region| DmaMemory::map(region, &[Arc::clone(&space)]));
        let memory = match memory {
            Ok(memory) => memory,
            Err(error) => return println!("skipped: {error}"),
        };
        let region = Arc::downgrade(&memory.shared.region);
        drop(memory);
        assert!(region.upgrade().is_some());
        drop(space);
        assert!(region.upgrade().is_none());
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
    #[cfg_attr(miri, ignore = "Miri maps no file")]
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
}
