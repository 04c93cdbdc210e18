//! Address spaces: what devices can reach. This module has the only branch on how memory is mapped for them.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::errno::Errno;

use super::acquire::lock;
use super::diagnose;
use crate::dma::IovaRanges;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::{self, Access, Accounting, Ioas};
use crate::mem::{Pin, Region, page_size};

/// I/O page tables that some of the process's devices share, or none if the devices use physical addresses.
#[derive(Debug)]
pub struct AddressSpace {
    tables: Tables,
    /// Allowed addresses that no mapping uses.
    free: Mutex<IovaRanges>,
    /// Highest address that every device can use.
    dma_mask: AtomicU64,
    /// Regions whose physical addresses were given to devices without an IOMMU. These devices hold the space
    /// while they are open, and may write to the regions until they are closed.
    kept: Mutex<Vec<Arc<Region>>>,
    /// Mappings that a predecessor made and that this process has not adopted yet: IOVA and length in bytes, in the
    /// order in which they were made.
    inherited: Mutex<VecDeque<(u64, u64)>>,
    /// Whether the mappings belong to another process, which uses the same container or `/dev/iommu`: the predecessor
    /// of this process, or its successor. They stay when their values are dropped here.
    is_lent: AtomicBool,
}

#[derive(Debug)]
enum Tables {
    /// Type1 ioctls on a container, which is `/dev/vfio/vfio` or, in mode `compat`, `/dev/iommu`.
    Type1(Container),
    /// I/O address space of iommufd. `physical` is whether its devices have no IOMMU.
    Ioas { ioas: Arc<Ioas>, physical: bool },
    /// No tables: devices use physical addresses.
    None(Container),
}

/// Container and the groups in it. The devices hold their groups.
#[derive(Debug)]
pub(super) struct Container {
    groups: Mutex<BTreeMap<u32, Weak<File>>>,
    /// Whether `/dev/iommu` stands in for the container.
    iommufd: bool,
    pub(super) fd: vireo_vfio::Container,
}

impl AddressSpace {
    fn of(tables: Tables) -> Self {
        Self {
            tables,
            free: Mutex::new(IovaRanges::all()),
            dma_mask: AtomicU64::new(u64::MAX),
            kept: Mutex::default(),
            inherited: Mutex::default(),
            is_lent: AtomicBool::new(false),
        }
    }

    /// Returns the space of a predecessor, which has made `mappings`. The first maps adopt them, one by one, instead of
    /// asking the kernel. They belong to the predecessor until [`AddressSpace::lend`].
    pub(super) fn inheriting(self, mappings: &[(u64, u64)]) -> Self {
        let inherited = Mutex::new(mappings.iter().copied().collect());
        Self { inherited, is_lent: AtomicBool::new(true), ..self }
    }

    /// Sets whether the mappings belong to another process.
    pub(super) fn lend(&self, is_lent: bool) {
        self.is_lent.store(is_lent, Ordering::Relaxed);
    }

    pub(super) fn type1(container: Container) -> Self {
        Self::of(Tables::Type1(container))
    }

    pub(super) fn none(container: Container) -> Self {
        Self::of(Tables::None(container))
    }

    pub(super) fn iommufd(ioas: Arc<Ioas>, physical: bool) -> Self {
        Self::of(Tables::Ioas { ioas, physical })
    }

    /// Creates a space without devices, for tests of values that hold a space.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        let fd = null();
        Self::none(Container { groups: Mutex::default(), iommufd: false, fd })
    }

    /// Returns whether the last group has left the container, which has then lost its mappings
    /// (`vfio_container_detach_group`) and accepts no device.
    pub(super) fn has_no_groups(&self) -> bool {
        self.container().is_some_and(|container| !container.iommufd && container.any().is_none())
    }

    pub(super) fn container(&self) -> Option<&Container> {
        match &self.tables {
            Tables::Type1(container) | Tables::None(container) => Some(container),
            Tables::Ioas { .. } => None,
        }
    }

    /// The container or `/dev/iommu` of the space.
    pub(super) fn owner(&self) -> BorrowedFd<'_> {
        match &self.tables {
            Tables::Type1(container) | Tables::None(container) => container.as_fd(),
            Tables::Ioas { ioas, .. } => ioas.iommufd().as_fd(),
        }
    }

    /// The I/O address space of iommufd, in the modes that have one.
    pub fn ioas(&self) -> Option<&Arc<Ioas>> {
        match &self.tables {
            Tables::Ioas { ioas, .. } => Some(ioas),
            _ => None,
        }
    }

    /// Returns whether the devices use physical addresses, so that they can reach all memory.
    pub fn is_physical(&self) -> bool {
        matches!(self.tables, Tables::None(_) | Tables::Ioas { physical: true, .. })
    }

    /// Keeps `region` until the last device is closed.
    pub(crate) fn keep(&self, region: &Arc<Region>) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(region));
    }

    /// Addresses that every attached device can use and that no mapping uses.
    pub fn free_ranges(&self) -> IovaRanges {
        self.lock().clone()
    }

    /// Keeps later mappings at or below `mask`, the highest address that one of the devices can use.
    pub fn set_dma_mask(&self, mask: u64) {
        self.dma_mask.fetch_min(mask, Ordering::Relaxed);
        let mut free = self.lock();
        *free = free.intersection(&IovaRanges::new([0..=mask]));
    }

    /// Highest address that every device can use.
    pub fn dma_mask(&self) -> u64 {
        self.dma_mask.load(Ordering::Relaxed)
    }

    /// Whose limit on locked memory applies to mappings; `None` if the kernel pins nothing.
    fn accounting(&self) -> Option<Accounting> {
        match &self.tables {
            Tables::Type1(container) if container.iommufd => Some(Accounting::PerUser),
            Tables::Type1(_) => Some(Accounting::PerProcess),
            Tables::Ioas { .. } => Some(Accounting::PerUser),
            Tables::None(_) => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, IovaRanges> {
        // The guarded value is replaced as a whole, so a panic elsewhere leaves nothing half updated.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Narrows the free ranges to what the devices attached so far allow. Memory is mapped in CPU pages, so
    /// the IOMMU's pages must not be larger.
    pub(super) fn refresh_ranges(&self) -> Result<()> {
        let (allowed, smallest_page) = match &self.tables {
            Tables::Type1(container) => container.iova_ranges()?,
            Tables::Ioas { ioas, physical: false } => {
                let iovas = ioas.iova_ranges()?;
                (IovaRanges::new(iovas.ranges), iovas.alignment)
            }
            Tables::None(_) | Tables::Ioas { .. } => return Ok(()),
        };
        check_page(smallest_page, page_size() as u64)?;
        let mut free = self.lock();
        *free = free.intersection(&allowed);
        Ok(())
    }

    /// Maps all of `region` for the devices with one call: at `iova` or, if that is `None`, at the first free
    /// addresses. [`DmaMapping::iova`] returns the address. If the devices use physical addresses, Vireo picks
    /// none.
    ///
    /// # Errors
    /// If the kernel refuses. The error says how much locked memory is needed and allowed, if that is the
    /// reason.
    pub fn map(self: &Arc<Self>, region: &Arc<Region>, iova: Option<u64>) -> Result<DmaMapping> {
        self.map_range(region, 0..region.len(), iova, Access::ReadWrite)
    }

    /// Same as [`AddressSpace::map`], but for the bytes `range` of `region` only, and for `access` only. The
    /// ends of `range` are multiples of the CPU's page size. Devices without an IOMMU reach the whole region
    /// in any case.
    ///
    /// # Errors
    /// Same as [`AddressSpace::map`]; `Usage` if the region does not contain these bytes.
    pub fn map_range(
        self: &Arc<Self>,
        region: &Arc<Region>,
        range: Range<usize>,
        iova: Option<u64>,
        access: Access,
    ) -> Result<DmaMapping> {
        region.address_of(&range)?;
        let len = range.len();
        let placed = match iova {
            None if !self.is_physical() => Some(self.place(len, region.page_size())?),
            _ => None,
        };
        let iova = iova.or(placed.as_ref().map(|range| *range.start()));
        let mapped = self.inherited(iova, len as u64).and_then(|inherited| match &self.tables {
            Tables::Type1(container) => {
                let iova = iova.unwrap_or_default();
                let mapped = Mapped::Type1 { iova, len: len as u64, _region: Arc::clone(region) };
                match inherited {
                    Some(_) => Ok(mapped),
                    None => container.map(region, range, iova, access).map(|()| mapped),
                }
            }
            Tables::Ioas { ioas, .. } => match inherited {
                Some(iova) => {
                    let keep = Arc::clone(region);
                    // SAFETY: the predecessor has mapped the pages of this region there. Nobody else unmaps them: each of
                    // its mappings is adopted once, and it leaves them when this process owns them.
                    Ok(Mapped::Ioas(unsafe { ioas.mapping_from(iova, len as u64, keep) }))
                }
                None => ioas.map_range(region, range, iova, access).map(Mapped::Ioas).map_err(Error::from),
            },
            Tables::None(_) => pin(region).map(|pin| Mapped::None { region: Arc::clone(region), _pin: pin }),
        });
        self.mapped(mapped, region).inspect_err(|_| {
            if let Some(range) = placed {
                self.release(range);
            }
        })
    }

    /// Adopts the next mapping of the predecessor, which must have `len` bytes at `iova`, if that is given. Returns its
    /// IOVA; `None` if there is none left.
    fn inherited(&self, iova: Option<u64>, len: u64) -> Result<Option<u64>> {
        match lock(&self.inherited).pop_front() {
            None => Ok(None),
            Some((at, of)) if of == len && iova.is_none_or(|iova| iova == at) => Ok(Some(at)),
            Some((at, of)) => {
                let why = format!("it maps {of} bytes at {at:#x} where these arguments need {len}");
                Err(Error::new(ErrorKind::Busy, "cannot use the ports of the running program", why)
                    .with_hint("give both the same arguments"))
            }
        }
    }

    /// Reserves addresses by Vireo's own policy, so that the choice does not depend on the mode.
    fn place(&self, len: usize, page_size: usize) -> Result<RangeInclusive<u64>> {
        let mut free = self.lock();
        let start = free.fit(len as u64, page_size as u64).ok_or_else(|| {
            Error::new(
                ErrorKind::Unavailable,
                format!("cannot map {} MiB for DMA", len.div_ceil(1 << 20)),
                "the address space has no free range of that size",
            )
        })?;
        let range = start..=start + (len as u64 - 1);
        *free = free.without(&range);
        Ok(range)
    }

    /// Returns addresses to the free ranges, except those that some device cannot use.
    fn release(&self, range: RangeInclusive<u64>) {
        let mut free = self.lock();
        let reachable = IovaRanges::new([0..=self.dma_mask()]);
        *free = IovaRanges::new(free.iter().cloned().chain([range])).intersection(&reachable);
    }

    /// Maps the memory of `source`, a mapping of another space, at the same IOVA and shares its pinned pages
    /// (`IOMMU_IOAS_COPY`). Returns `None` if the two spaces do not belong to the same `/dev/iommu`.
    ///
    /// # Errors
    /// Same as [`AddressSpace::map`].
    pub fn copy(self: &Arc<Self>, source: &DmaMapping, access: Access) -> Result<Option<DmaMapping>> {
        let (Tables::Ioas { ioas, .. }, Some(Mapped::Ioas(source))) = (&self.tables, &source.mapped) else {
            return Ok(None);
        };
        // The predecessor has copied it already; see `map_range`.
        if !lock(&self.inherited).is_empty() {
            return Ok(None);
        }
        if !ioas.iommufd().is_same(source.ioas().iommufd()) {
            return Ok(None);
        }
        let copy = ioas.copy(source, Some(source.iova()), access).map(Mapped::Ioas).map_err(Error::from);
        self.mapped(copy, source.memory()).map(Some)
    }

    fn mapped(self: &Arc<Self>, mapped: Result<Mapped>, region: &Region) -> Result<DmaMapping> {
        let mapped = mapped.map_err(|error| match (error.errno(), self.accounting()) {
            (Some(Errno::ENOMEM), Some(whose)) => diagnose::memlock(error, region.len(), whose),
            (Some(Errno::ENOSPC), Some(Accounting::PerProcess)) => diagnose::entry_limit(error),
            _ => error,
        })?;
        if let Some(range) = mapped.range() {
            let mut free = self.lock();
            *free = free.without(&range);
        }
        Ok(DmaMapping { mapped: Some(mapped), space: Arc::clone(self) })
    }
}

impl Container {
    /// Creates a container with its first group.
    pub(super) fn new(fd: vireo_vfio::Container, iommufd: bool, number: u32, group: &Arc<File>) -> Self {
        Self { groups: Mutex::new([(number, Arc::downgrade(group))].into()), iommufd, fd }
    }

    /// Group `number`, if it is open.
    pub(super) fn group(&self, number: u32) -> Option<Arc<File>> {
        lock(&self.groups).get(&number).and_then(Weak::upgrade)
    }

    /// Any group in the container. While that is held, the container keeps its mappings.
    pub(super) fn any(&self) -> Option<Arc<File>> {
        lock(&self.groups).values().find_map(Weak::upgrade)
    }

    pub(super) fn add(&self, number: u32, group: &Arc<File>) {
        lock(&self.groups).insert(number, Arc::downgrade(group));
    }

    /// Addresses that every attached device can use, and the size in bytes of the smallest page that can be
    /// mapped, or 1 if the kernel does not report it.
    fn iova_ranges(&self) -> Result<(IovaRanges, u64)> {
        let iovas = self.fd.iova_ranges()?;
        Ok((IovaRanges::new(iovas.ranges), iovas.smallest_page))
    }

    /// Maps the bytes `range` of `region`. The caller keeps them until it has unmapped them.
    fn map(&self, region: &Region, range: Range<usize>, iova: u64, access: Access) -> Result<()> {
        // SAFETY: the region has these bytes, as the caller has checked.
        let first = unsafe { region.as_ptr().add(range.start) };
        let bytes = NonNull::slice_from_raw_parts(first, range.len());
        // SAFETY: the caller keeps the region, which devices are expected to write.
        Ok(unsafe { self.fd.map_user(bytes, iova, access) }?)
    }
}

/// Descriptor that stands in for a container.
#[cfg(test)]
pub(super) fn null() -> vireo_vfio::Container {
    let null = File::open("/dev/null").expect("it is everywhere");
    // SAFETY: the null device has no ioctls.
    unsafe { vireo_vfio::Container::from_fd_unchecked(null.into()) }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Region, or a part of one, that the devices of an [`AddressSpace`] can reach. It is unmapped on drop, unless the
/// mapping belongs to another process.
#[derive(Debug)]
pub struct DmaMapping {
    /// Taken only by drop, so that the memory is unmapped before `space` is dropped.
    mapped: Option<Mapped>,
    space: Arc<AddressSpace>,
}

#[derive(Debug)]
enum Mapped {
    Type1 {
        iova: u64,
        len: u64,
        _region: Arc<Region>,
    },
    Ioas(iommufd::Mapping<Arc<Region>>),
    /// DmaMapping without an IOMMU. It pins its pages itself.
    None {
        region: Arc<Region>,
        _pin: Pin,
    },
}

impl Mapped {
    fn range(&self) -> Option<RangeInclusive<u64>> {
        let (iova, len) = match self {
            Self::Type1 { iova, len, .. } => (*iova, *len),
            Self::Ioas(mapping) => (mapping.iova(), mapping.len()),
            Self::None { .. } => return None,
        };
        Some(iova..=iova + (len - 1))
    }
}

impl DmaMapping {
    /// Address space that the memory is mapped in.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// Device addresses of the memory; `None` if nothing is mapped, because the devices have no page tables.
    pub fn iovas(&self) -> Option<RangeInclusive<u64>> {
        self.mapped.as_ref()?.range()
    }

    /// Device address of the first byte; `None` if the devices use physical addresses.
    pub fn iova(&self) -> Option<u64> {
        let range = self.mapped.as_ref()?.range()?;
        (!self.space.is_physical()).then(|| *range.start())
    }

    /// Physical address of each page if the devices use physical addresses; `None` if an IOMMU translates.
    ///
    /// # Errors
    /// `Permission` if the kernel does not reveal the addresses to this process.
    pub fn physical_addresses(&self) -> Result<Option<Vec<u64>>> {
        match &self.mapped {
            Some(Mapped::None { region, .. }) => region.physical_addresses().map(Some),
            Some(Mapped::Ioas(mapping)) if self.space.is_physical() => {
                Ok(Some(mapping.physical_pages(mapping.memory().page_size() as u64)?))
            }
            _ => Ok(None),
        }
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        let Some(mapped) = self.mapped.take() else { return };
        if self.space.is_lent.load(Ordering::Relaxed) {
            if let Mapped::Ioas(mapping) = mapped {
                drop(mapping.leave());
            }
            return;
        }
        let range = mapped.range();
        if let (Mapped::Type1 { iova, len, .. }, Tables::Type1(container)) = (&mapped, &self.space.tables)
            && !self.space.has_no_groups()
        {
            // SAFETY: the range is that of this mapping, which is no longer used.
            match unsafe { container.fd.unmap(*iova, *len) } {
                Ok(unmapped) if unmapped == *len => {}
                Ok(unmapped) => tracing::error!("unmapped {unmapped} of {len} bytes at {iova:#x}"),
                Err(error) => tracing::error!("{error}"),
            }
        }
        drop(mapped);
        if let Some(range) = range {
            self.space.release(range);
        }
    }
}

/// Pins `region`. Without an IOMMU the kernel does not pin it.
fn pin(region: &Region) -> Result<Pin> {
    if region.page_size() > page_size() {
        return Pin::new(region);
    }
    Err(Error::new(
        ErrorKind::Usage,
        "cannot use ordinary pages without an IOMMU",
        "each packet buffer and ring must be contiguous in physical memory",
    )
    .with_hint("leave out --no-huge"))
}

/// Refuses an IOMMU whose `smallest` page is larger than the `cpu`'s.
fn check_page(smallest: u64, cpu: u64) -> Result<()> {
    if smallest <= cpu {
        return Ok(());
    }
    let why = format!(
        "its IOMMU maps pages of at least {} KiB, but the CPU's pages have {} KiB",
        smallest >> 10,
        cpu >> 10
    );
    Err(Error::new(ErrorKind::Unavailable, "cannot map memory for the device", why)
        .with_hint(format!("boot a kernel with pages of {} KiB", smallest >> 10)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_device_decides_where_memory_is_mapped() {
        let fd = null();
        let space = AddressSpace::none(Container { groups: Mutex::default(), iommufd: false, fd });
        assert_eq!(space.free_ranges().fit(4096, 4096), Some(4 << 30));
        space.set_dma_mask(u32::MAX.into());
        space.set_dma_mask(u64::MAX);
        assert_eq!((space.dma_mask(), space.free_ranges().fit(4096, 4096)), (u32::MAX.into(), Some(2 << 20)));
    }

    #[test]
    fn two_threads_are_given_different_places() {
        let space = AddressSpace::for_tests();
        let (one, other) = (space.place(4096, 4096).unwrap(), space.place(4096, 4096).unwrap());
        assert!(one.end() < other.start(), "{one:?} {other:?}");
        space.release(one.clone());
        assert_eq!(space.place(4096, 4096), Ok(one));
        assert!(space.place(0, 4096).is_err());
    }

    #[test]
    fn a_place_that_a_device_does_not_reach_is_not_used_again() {
        let space = AddressSpace::for_tests();
        let high = space.place(4096, 4096).unwrap();
        space.set_dma_mask(u32::MAX.into());
        space.release(high);
        assert_eq!(space.free_ranges().fit(4096, 4096), Some(2 << 20));
    }

    #[test]
    fn what_could_not_be_mapped_is_free_again() {
        let fd = null();
        let container = Container { groups: Mutex::default(), iommufd: false, fd };
        let space = Arc::new(AddressSpace::type1(container));
        let before = space.free_ranges();
        let region = Arc::new(Region::new(4096, crate::mem::Backing::SmallPages).unwrap());
        assert!(space.map(&region, None).is_err());
        assert!(space.map_range(&region, 0..1 << 30, None, Access::Read).is_err());
        assert_eq!(space.free_ranges(), before);
    }

    /// A successor maps what its predecessor has mapped, in the same order, without a call of the kernel, and takes
    /// nothing from it if it fails.
    #[test]
    fn inherited_mappings_are_adopted_in_order_and_left_alone() {
        let fd = null();
        let container = Container { groups: Mutex::default(), iommufd: true, fd };
        let page = page_size() as u64;
        let mappings = [(4 << 30, 2 * page), (8 << 30, page)];
        let space = Arc::new(AddressSpace::type1(container).inheriting(&mappings));
        let region = Arc::new(Region::new(2 * page_size(), crate::mem::Backing::SmallPages).unwrap());
        let first = space.map(&region, None).unwrap();
        assert_eq!(first.iova(), Some(4 << 30));
        // Another length than the predecessor's.
        let other = space.map(&region, Some(8 << 30)).unwrap_err();
        assert_eq!(other.kind(), ErrorKind::Busy);
        // Nothing is left to adopt, so the null device is asked, and it refuses.
        assert!(space.map(&region, None).unwrap_err().errno().is_some());
        let logged = space.free_ranges();
        drop(first);
        assert_eq!(space.free_ranges(), logged, "a mapping of the predecessor was released");
        space.lend(false);
    }

    #[test]
    fn an_iommu_of_larger_pages_than_the_cpus_is_refused() {
        assert_eq!(check_page(4096, 4096), Ok(()));
        assert_eq!(check_page(4096, 65536), Ok(()));
        let error = check_page(65536, 4096).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(
            error.to_string().contains("maps pages of at least 64 KiB, but the CPU's pages have 4 KiB"),
            "{error}"
        );
    }
}
