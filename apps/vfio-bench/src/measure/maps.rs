//! Times mapping and unmapping a region.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vireo_bus_pci::{Bus, PciInfo};
use vireo_eal::clock::Tsc;
use vireo_eal::iommufd::Access;
use vireo_eal::mem::{Backing, Region, hugepages};
use vireo_eal::vfio::{AddressSpace, Vfio, VfioMode};
use vireo_eal::{Result, ioctl};

use crate::record::MapTime;

/// Call that maps memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// Maps by address: `VFIO_IOMMU_MAP_DMA` or `IOMMU_IOAS_MAP`.
    Map,
    /// Maps by file: `IOMMU_IOAS_MAP_FILE`.
    MapFile,
    /// Maps by address, with only 4 KiB pages in the I/O page table: `IOMMU_OPTION_HUGE_PAGES` = 0.
    MapSmall,
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::MapFile => "map-file",
            Self::MapSmall => "map, huge pages off",
        }
    }
}

/// A prepared mapping, for which only the call itself remains.
pub(crate) struct Map<'a> {
    space: &'a Arc<AddressSpace>,
    region: &'a Arc<Region>,
    /// Page size of the region.
    memory: &'static str,
    call: Call,
    iova: Option<u64>,
}

impl<'a> Map<'a> {
    /// Returns `None` if the mode maps nothing or does not have this call.
    fn prepare(
        space: &'a Arc<AddressSpace>,
        (memory, region): &'a (&'static str, Arc<Region>),
        call: Call,
    ) -> Result<Option<Self>> {
        let iova = match (call, space.ioas()) {
            (Call::MapFile | Call::MapSmall, None) => return Ok(None),
            (Call::MapFile, Some(_)) if region.fd().is_none() => return Ok(None),
            (Call::Map, None) if space.is_physical() => return Ok(None),
            _ if space.is_physical() => None,
            _ => space.free_ranges().fit(region.len() as u64, region.page_size() as u64),
        };
        if let (Call::MapSmall, Some(ioas)) = (call, space.ioas()) {
            ioas.set_huge_pages(false)?;
        }
        Ok(Some(Self { space, region, memory, call, iova }))
    }

    /// Makes the call. Returns `None` if the kernel does not have it. Dropping the returned value unmaps.
    pub(crate) fn make(&self) -> Result<Option<Box<dyn std::fmt::Debug>>> {
        Ok(Some(match (self.call, self.space.ioas(), self.region.fd()) {
            (Call::MapFile, Some(ioas), Some(file)) => {
                match ioas.map_file(file, 0..self.bytes(), self.iova, Access::ReadWrite) {
                    Ok(mapping) => Box::new(mapping),
                    Err(error) if error.errno() == Some(nix::errno::Errno::ENOTTY) => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            }
            _ => Box::new(self.space.map(self.region, self.iova)?),
        }))
    }

    /// Size of the region in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.region.len() as u64
    }

    /// Page size and call, such as `2 MiB, map-file`.
    pub(crate) fn name(&self) -> String {
        format!("{}, {}", self.memory, self.call.name())
    }
}

/// Times mapping and unmapping a region while the device is attached. Returns `None` if the kernel does not
/// have the call.
fn time_map(map: &Map) -> Result<Option<MapTime>> {
    // Use the clock of `ioctl::time`. If the kernel's clock is slow to read, as in an emulator, the
    // difference between the two times would be the cost of reading it.
    let elapsed = |since: u64| Duration::from_nanos(Tsc::to_nanos(Tsc::now().saturating_sub(since)));
    let (before, in_kernel, since) = (ioctl::calls(), ioctl::time(), Tsc::now());
    let Some(mapping) = map.make()? else { return Ok(None) };
    let (mapped, map_ioctls) = (elapsed(since), ioctl::calls() - before);
    let in_kernel = ioctl::time().saturating_sub(in_kernel);
    let (before, since) = (ioctl::calls(), Tsc::now());
    drop(mapping);
    let (unmapped, unmap_ioctls) = (elapsed(since), ioctl::calls() - before);
    Ok(Some(MapTime {
        mode: String::new(),
        memory: map.memory.to_owned(),
        call: map.call.name().to_owned(),
        bytes: map.bytes(),
        round: 0,
        map_ms: mapped.as_secs_f64() * 1e3,
        map_ioctl_ms: in_kernel.as_secs_f64() * 1e3,
        unmap_ms: unmapped.as_secs_f64() * 1e3,
        map_ioctls,
        unmap_ioctls,
    }))
}

/// Times the maps of one mode, by page size and call, with one NIC attached.
pub(crate) fn map_times(
    bus: &Bus,
    info: &PciInfo,
    mode: VfioMode,
    regions: &[(&'static str, Arc<Region>)],
    round: u32,
) -> Result<Vec<MapTime>> {
    let vfio = Vfio::new(None);
    let device = bus.open(info, &vfio, mode)?;
    let mut times = Vec::new();
    each_map(device.vfio().space(), regions, |map| {
        times.extend(time_map(map)?.map(|time| MapTime { mode: mode.name().to_owned(), round, ..time }));
        Ok(())
    })?;
    Ok(times)
}

/// Returns a region of `bytes` for each page size that this machine has, with the name of the page size.
pub(crate) fn regions(bytes: usize) -> Result<Vec<(&'static str, Arc<Region>)>> {
    let mut regions = vec![("4 KiB", Backing::SmallPages), ("2 MiB", Backing::HugeMemfd)];
    if hugepages(Path::new("/sys")).iter().any(|pages| pages.page_size == 1 << 30 && pages.free > 0) {
        regions.push(("1 GiB", Backing::GiantMemfd));
    }
    regions.into_iter().map(|(name, backing)| Ok((name, Arc::new(Region::new(bytes, backing)?)))).collect()
}

/// Passes each call on each of `regions` to `measure`. The last call changes the address space permanently.
pub(crate) fn each_map(
    space: &Arc<AddressSpace>,
    regions: &[(&'static str, Arc<Region>)],
    mut measure: impl FnMut(&Map) -> Result<()>,
) -> Result<()> {
    let by_size = regions.iter().flat_map(|region| [Call::Map, Call::MapFile].map(|call| (region, call)));
    let large = regions.iter().filter(|(_, region)| region.page_size() == 2 << 20);
    for (region, call) in by_size.chain(large.map(|region| (region, Call::MapSmall))) {
        if let Some(map) = Map::prepare(space, region, call)? {
            measure(&map)?;
        }
    }
    Ok(())
}
