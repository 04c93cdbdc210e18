//! Regions that a program's devices can access, and their device addresses.

use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::iova::IovaRanges;
use super::memory::DmaMemory;
use super::part::{Part, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
use crate::mem::Region;
use crate::vfio::{AddressSpace, DmaMapping};

/// The set of regions that a program's devices can access: its [`Segment`]s.
///
/// The map owns its segments, and each [`DmaMemory`] on a segment owns the map. Memory whose address was
/// written to a ring therefore stays mapped until the last ring, pool and other user of any segment is gone.
/// Then all segments are unmapped everywhere, and their pages return to the kernel.
#[derive(Debug)]
pub struct MemoryMap {
    spaces: Vec<Arc<AddressSpace>>,
    physical: bool,
    segments: Mutex<Vec<Arc<Segment>>>,
}

/// A region with device addresses. Its NUMA node and page size are those of the region.
///
/// The fields drop in this order: the mappings end before the pages return to the kernel.
#[derive(Debug)]
pub struct Segment {
    mappings: Vec<DmaMapping>,
    region: Arc<Region>,
    translation: Translation,
}

/// Translation of offsets in a region to device addresses. With an IOMMU there is one entry. Without an IOMMU
/// there is one entry per page, because Vireo cannot choose physical addresses. Both take the same
/// instructions.
#[derive(Debug)]
pub(super) struct Translation {
    pub(super) page_shift: u32,
    /// Device address minus offset, for each page of `1 << page_shift` bytes.
    pub(super) deltas: Box<[u64]>,
}

impl Translation {
    fn linear(iova: u64) -> Self {
        Self { page_shift: usize::BITS - 1, deltas: Box::new([iova]) }
    }

    pub(super) fn paged(page_size: usize, addresses: &[u64]) -> Self {
        let deltas = addresses.iter().enumerate().map(|(i, a)| a.wrapping_sub((i * page_size) as u64));
        Self { page_shift: page_size.trailing_zeros(), deltas: deltas.collect() }
    }

    /// Returns whether the whole region is contiguous for devices.
    pub(super) fn is_contiguous(&self) -> bool {
        self.deltas.len() == 1
    }

    pub(super) fn iova(&self, offset: usize) -> u64 {
        self.deltas[offset >> self.page_shift].wrapping_add(offset as u64)
    }
}

impl Segment {
    /// Mappings of the region, or of parts of it, in address spaces.
    pub fn mappings(&self) -> &[DmaMapping] {
        &self.mappings
    }

    /// The region that holds the pages.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Device address of the region's first byte, if the whole region is contiguous for devices. `None` if
    /// each page has its own physical address.
    pub fn linear_iova(&self) -> Option<u64> {
        self.translation.is_contiguous().then(|| self.translation.iova(0))
    }

    pub(super) fn translation(&self) -> &Translation {
        &self.translation
    }

    /// Device addresses of the segment, if they are one range.
    fn iovas(&self) -> Option<RangeInclusive<u64>> {
        self.linear_iova().map(|start| start..=start + (self.region.len() as u64 - 1))
    }
}

impl MemoryMap {
    /// Creates a map without segments, for the devices of `spaces`. Virtual devices have no address space.
    ///
    /// # Errors
    /// `Usage` if only some of `spaces` have an IOMMU.
    pub fn new(spaces: &[Arc<AddressSpace>]) -> Result<Arc<Self>> {
        let mut own: Vec<Arc<AddressSpace>> = Vec::new();
        for space in spaces {
            if !own.iter().any(|known| Arc::ptr_eq(known, space)) {
                own.push(Arc::clone(space));
            }
        }
        let physical = is_physical(&own)?;
        Ok(Arc::new(Self { spaces: own, physical, segments: Mutex::default() }))
    }

    /// Creates a map for devices of this process, which have no address space.
    pub fn without_spaces() -> Arc<Self> {
        Arc::new(Self { spaces: Vec::new(), physical: false, segments: Mutex::default() })
    }

    /// Address spaces of the map, without duplicates.
    pub fn spaces(&self) -> &[Arc<AddressSpace>] {
        &self.spaces
    }

    /// Segments of the map, in the order in which they were added.
    pub fn segments(&self) -> Vec<Arc<Segment>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Segment>>> {
        // No panic leaves the list half-changed.
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `region`, even while devices run, and returns one memory per part, in the order of `parts`. Each
    /// part is mapped in the spaces that it names. The rest of the region goes to the first part.
    ///
    /// An address refers to the same byte in every space that maps it. Memory that several spaces of one
    /// `/dev/iommu` map is pinned once. Without an IOMMU, the device addresses are the physical addresses of
    /// the pages. Without any space, the region gets an IOVA that is not mapped anywhere. In these two cases
    /// nothing separates the parts, so they are one memory.
    ///
    /// # Errors
    /// `Unavailable` if no IOVA is free in all spaces, or a device cannot reach the physical address of a
    /// page. `Os` if the region is too small or a map call fails. `Usage` if a part names an address space
    /// that is not in the map.
    pub fn add(self: &Arc<Self>, region: Region, parts: &[Part]) -> Result<Vec<Arc<DmaMemory>>> {
        Ok(self.add_all(vec![(region, parts.to_vec())])?.pop().unwrap_or_default())
    }

    /// Adds several regions, each as [`MemoryMap::add`] does. Regions of one [`Region::adjoining`] call, in
    /// its order, also adjoin in device addresses.
    ///
    /// # Errors
    /// Same as [`MemoryMap::add`].
    pub fn add_all(self: &Arc<Self>, regions: Vec<(Region, Vec<Part>)>) -> Result<Vec<Vec<Arc<DmaMemory>>>> {
        let named = regions.iter().flat_map(|(_, parts)| parts).flat_map(|part| &part.spaces);
        if named.into_iter().any(|space| !self.spaces.iter().any(|own| Arc::ptr_eq(own, space))) {
            let why = "one of its parts is for an address space that is not in the map";
            return Err(Error::new(ErrorKind::Usage, "cannot map memory", why));
        }
        // The lock keeps other callers from choosing addresses at the same time.
        let mut known = self.lock();
        let iovas = match self.physical {
            true => vec![0; regions.len()],
            false => self.place(&known, &regions.iter().map(|(region, _)| region).collect::<Vec<_>>())?,
        };
        let (mut segments, mut memory) = (Vec::new(), Vec::with_capacity(regions.len()));
        for ((region, parts), iova) in regions.into_iter().zip(iovas) {
            let layout = layout(&parts, region.len())?;
            let region = Arc::new(region);
            let (mappings, translation) = match self.physical {
                true => self.pin_physical(&region)?,
                false => (map_parts(&region, iova, &parts, &layout)?, Translation::linear(iova)),
            };
            let segment = Arc::new(Segment { mappings, region, translation });
            memory.push(match self.physical || self.spaces.is_empty() {
                true => vec![DmaMemory::whole(self, &segment); parts.len()],
                false => layout.into_iter().map(|part| DmaMemory::part(self, &segment, part)).collect(),
            });
            segments.push(segment);
        }
        // The map receives all segments or none.
        known.append(&mut segments);
        Ok(memory)
    }

    /// Adds `region` to a map without address spaces, with the next of `addresses` as the device address of
    /// each `page_size` bytes. This mimics a machine without an IOMMU, for tests and instruction counts that
    /// need no VFIO.
    ///
    /// # Panics
    /// Panics if the map has an address space, if `page_size` is not a power of two or is smaller than a page
    /// of the region, if `addresses` do not cover the region exactly, or if an address is not a multiple of
    /// `page_size`.
    pub fn add_at(self: &Arc<Self>, region: Region, page_size: usize, addresses: &[u64]) -> Arc<DmaMemory> {
        assert!(self.spaces.is_empty() && page_size.is_power_of_two() && page_size >= region.page_size());
        assert_eq!(addresses.len() * page_size, region.len());
        assert!(addresses.iter().all(|address| address.is_multiple_of(page_size as u64)));
        let translation = Translation::paged(page_size, addresses);
        let segment = Arc::new(Segment { mappings: Vec::new(), region: Arc::new(region), translation });
        self.lock().push(Arc::clone(&segment));
        DmaMemory::whole(self, &segment)
    }

    /// Chooses device addresses for `regions`, the first that are free in all spaces. Regions that adjoin in
    /// this process get one range.
    fn place(&self, known: &[Arc<Segment>], regions: &[&Region]) -> Result<Vec<u64>> {
        let mut free =
            self.spaces.iter().fold(IovaRanges::all(), |free, space| free.intersection(&space.free_ranges()));
        for iovas in known.iter().filter_map(|segment| segment.iovas()) {
            free = free.without(&iovas);
        }
        let mut found = Vec::with_capacity(regions.len());
        for run in regions.chunk_by(|one, next| one.adjoins(next)) {
            let len = run.iter().map(|region| region.len() as u64).sum();
            let start = fit(&free, len, run[0].page_size() as u64)?;
            free = free.without(&(start..=start + (len - 1)));
            found.extend(run.iter().scan(start, |next, region| {
                *next += region.len() as u64;
                Some(*next - region.len() as u64)
            }));
        }
        Ok(found)
    }

    /// Pins `region` for devices without an IOMMU and looks up the addresses of its pages.
    fn pin_physical(&self, region: &Arc<Region>) -> Result<(Vec<DmaMapping>, Translation)> {
        let mappings =
            self.spaces.iter().map(|space| space.map(region, None)).collect::<Result<Vec<DmaMapping>>>()?;
        let mut addresses = Vec::new();
        for mapping in &mappings {
            addresses = mapping.physical_addresses()?.unwrap_or(addresses);
        }
        let mask = self.spaces.iter().map(|space| space.dma_mask()).min().unwrap_or(u64::MAX);
        check_reach(&addresses, region.page_size(), mask)?;
        self.spaces.iter().for_each(|space| space.keep(region));
        Ok((mappings, Translation::paged(region.page_size(), &addresses)))
    }
}

/// Returns whether the devices of `spaces` use physical addresses.
fn is_physical(spaces: &[Arc<AddressSpace>]) -> Result<bool> {
    let physical = spaces.iter().filter(|space| space.is_physical()).count();
    if physical > 0 && physical < spaces.len() {
        return Err(Error::new(
            ErrorKind::Usage,
            "cannot mix no-IOMMU ports with other modes",
            "NICs without an IOMMU need physical addresses, but the others reach only mapped IOVAs",
        )
        .with_hint("give every port the same kind of --vfio-mode"));
    }
    Ok(physical > 0)
}

/// Checks that devices that emit no address above `mask` reach every page of `page_size` bytes at
/// `addresses`.
fn check_reach(addresses: &[u64], page_size: usize, mask: u64) -> Result<()> {
    let beyond = |address: &&u64| address.checked_add(page_size as u64 - 1).is_none_or(|last| last > mask);
    let Some(beyond) = addresses.iter().find(beyond) else { return Ok(()) };
    let why = format!(
        "a page is at physical address {beyond:#x}, but one of the NICs has only {} address bits",
        u64::BITS - mask.leading_zeros()
    );
    Err(Error::new(ErrorKind::Unavailable, "cannot use this memory without an IOMMU", why)
        .with_hint("boot with an IOMMU (intel_iommu=on or amd_iommu=on), or with mem=3G"))
}

/// Maps each of `parts` of `region` in the spaces that it names. The first byte of `region` is at `iova`.
fn map_parts(
    region: &Arc<Region>,
    iova: u64,
    parts: &[Part],
    layout: &[[Range<usize>; 2]],
) -> Result<Vec<DmaMapping>> {
    let mut mappings = Vec::new();
    for (part, [read_write, read_only]) in parts.iter().zip(layout) {
        for (bytes, access) in [(read_write, Access::ReadWrite), (read_only, Access::Read)] {
            map_everywhere(region, bytes, iova, access, &part.spaces, &mut mappings)?;
        }
    }
    Ok(mappings)
}

/// Maps `bytes` of `region` in each of `spaces`. The first byte of `region` is at `iova`.
fn map_everywhere(
    region: &Arc<Region>,
    bytes: &Range<usize>,
    iova: u64,
    access: Access,
    spaces: &[Arc<AddressSpace>],
    mappings: &mut Vec<DmaMapping>,
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

/// First address with `len` free bytes, aligned to pages of `page_size` bytes.
fn fit(free: &IovaRanges, len: u64, page_size: u64) -> Result<u64> {
    free.fit(len, page_size).ok_or_else(|| {
        let ranges: Vec<String> = free.iter().map(|r| format!("{:#x}-{:#x}", r.start(), r.end())).collect();
        Error::new(
            ErrorKind::Unavailable,
            format!("cannot place {} MiB in the devices' address space", len >> 20),
            format!(
                "the IOMMUs and the NICs' address bits together leave {}",
                if ranges.is_empty() { "nothing".into() } else { ranges.join(", ") }
            ),
        )
        .with_hint("ask for less with -m MB")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{Backing, Placement, page_size};

    fn region(pages: usize) -> Region {
        Region::new(pages * page_size(), Backing::SmallPages).unwrap()
    }

    fn iovas(map: &MemoryMap) -> Vec<u64> {
        map.segments().iter().filter_map(|segment| segment.linear_iova()).collect()
    }

    #[test]
    fn paged_translation_follows_the_pages() {
        let translation = Translation::paged(4096, &[0x9000, 0x3000]);
        assert_eq!([0, 4095, 4096, 5000].map(|o| translation.iova(o)), [0x9000, 0x9fff, 0x3000, 0x3388]);
    }

    #[test]
    fn pages_beyond_the_reach_of_a_nic_are_refused_with_the_reason() {
        let (low, high) = (0xffe0_0000, 0x1_0000_0000);
        check_reach(&[low, high], 2 << 20, u64::MAX).unwrap();
        check_reach(&[low], 2 << 20, u32::MAX.into()).unwrap();
        for addresses in [[low, high], [low + 4096, low]] {
            let error = check_reach(&addresses, 2 << 20, u32::MAX.into()).unwrap_err().to_string();
            assert!(error.contains("only 32 address bits") && error.contains("intel_iommu=on"), "{error}");
        }
    }

    #[test]
    fn each_segment_has_addresses_of_its_own_and_stays_with_the_others() {
        let map = MemoryMap::without_spaces();
        let add = |pages| map.add(region(pages), &[Part::default()]).unwrap().swap_remove(0);
        let [first, second, third] = [add(1), add(600), add(1)];
        let place = |number: u64| (4 << 30) + number * (2 << 20);
        assert_eq!(iovas(&map), [place(0), place(1), place(3)]);
        assert_eq!(third.segment().linear_iova(), Some(place(3)));
        let pages = Arc::downgrade(&first.segment().region);
        drop((map, first, second));
        assert!(pages.upgrade().is_some(), "a ring in the third may hold a buffer of the first");
        drop(third);
        assert!(pages.upgrade().is_none());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri cannot unmap part of a mapping")]
    fn regions_that_adjoin_in_the_process_adjoin_for_devices() {
        let page = page_size();
        let parts = [(None, page), (None, 3 * page), (None, page)];
        let regions = Region::adjoining(&parts, Backing::SmallPages, Placement::Preferred).unwrap();
        let map = MemoryMap::without_spaces();
        let regions = regions.into_iter().map(|region| (region, vec![Part::default()]));
        map.add_all(regions.collect()).unwrap();
        map.add(region(1), &[Part::default()]).unwrap();
        let offsets: Vec<u64> = iovas(&map).iter().map(|iova| iova - (4 << 30)).collect();
        let page = page as u64;
        assert_eq!(offsets, [0, page, 4 * page, 2 << 20]);
    }

    #[test]
    fn a_region_that_is_added_is_refused_where_it_is_too_small_and_leaves_nothing() {
        let map = MemoryMap::without_spaces();
        let part = Part { read_write: 2 * page_size(), ..Part::default() };
        assert_eq!(map.add(region(1), &[part]).unwrap_err().kind(), ErrorKind::Os);
        assert!(map.segments().is_empty());
    }

    #[test]
    fn without_an_iommu_pages_stay_until_the_devices_are_closed() {
        let space = Arc::new(AddressSpace::for_tests());
        let memory = Region::new(2 << 20, Backing::HugeMemfd)
            .and_then(|region| DmaMemory::map(region, &[Arc::clone(&space)]));
        let memory = match memory {
            Ok(memory) => memory,
            Err(error) => return println!("skipped: {error}"),
        };
        let region = Arc::downgrade(&memory.segment().region);
        drop(memory);
        assert!(region.upgrade().is_some());
        drop(space);
        assert!(region.upgrade().is_none());
    }
}
