//! What mapping and unmapping a region takes.

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

/// How memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// By address: `VFIO_IOMMU_MAP_DMA` or `IOMMU_IOAS_MAP`.
    Map,
    /// By file: `IOMMU_IOAS_MAP_FILE`.
    MapFile,
    /// By address, with 4 KiB pages in the I/O page table only: `IOMMU_OPTION_HUGE_PAGES` = 0.
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

/// Maps and unmaps a region while the device is attached; none where the mode maps nothing.
fn time_map(space: &Arc<AddressSpace>, region: &Arc<Region>, call: Call) -> Result<Option<MapTime>> {
    if space.is_physical() && space.ioas().is_none() {
        return Ok(None);
    }
    let iova = if space.is_physical() { None } else { space.free_ranges().fit(region.len() as u64) };
    if let (Call::MapSmall, Some(ioas)) = (call, space.ioas()) {
        ioas.set_huge_pages(false)?;
    }
    // By the clock of `ioctl::time`: where the kernel's is slow to read, as in an emulator, the difference of the two
    // would be its cost.
    let elapsed = |since: u64| Duration::from_nanos(Tsc::to_nanos(Tsc::now().saturating_sub(since)));
    let (before, in_kernel, since) = (ioctl::calls(), ioctl::time(), Tsc::now());
    let mapping: Box<dyn std::fmt::Debug> = match (call, space.ioas()) {
        (Call::MapFile, Some(ioas)) => match ioas.map_file(region, iova, Access::ReadWrite) {
            Ok(mapping) => Box::new(mapping),
            Err(error) if error.errno() == Some(nix::errno::Errno::ENOTTY) => return Ok(None),
            Err(error) => return Err(error),
        },
        (Call::MapFile | Call::MapSmall, None) => return Ok(None),
        (Call::Map | Call::MapSmall, _) => Box::new(space.map(region, iova)?),
    };
    let (mapped, map_ioctls) = (elapsed(since), ioctl::calls() - before);
    let in_kernel = ioctl::time().saturating_sub(in_kernel);
    let (before, since) = (ioctl::calls(), Tsc::now());
    drop(mapping);
    let (unmapped, unmap_ioctls) = (elapsed(since), ioctl::calls() - before);
    Ok(Some(MapTime {
        mode: String::new(),
        memory: String::new(),
        call: call.name().to_owned(),
        bytes: region.len() as u64,
        round: 0,
        map_ms: mapped.as_secs_f64() * 1e3,
        map_ioctl_ms: in_kernel.as_secs_f64() * 1e3,
        unmap_ms: unmapped.as_secs_f64() * 1e3,
        map_ioctls,
        unmap_ioctls,
    }))
}

/// The DMA-map table of one mode: page sizes and calls, one NIC attached.
pub(crate) fn map_times(
    bus: &Bus,
    info: &PciInfo,
    mode: VfioMode,
    regions: &[(&'static str, Arc<Region>)],
    round: u32,
) -> Result<Vec<MapTime>> {
    let vfio = Vfio::new(None);
    let device = bus.open(info, &vfio, mode)?;
    let times = map_table(device.vfio().space(), regions)?;
    Ok(times.into_iter().map(|time| MapTime { mode: mode.name().to_owned(), round, ..time }).collect())
}

/// A region of `bytes` for each size of page that this machine has, with its name.
pub(crate) fn regions(bytes: usize) -> Result<Vec<(&'static str, Arc<Region>)>> {
    let mut regions = vec![("4 KiB", Backing::SmallPages), ("2 MiB", Backing::HugeMemfd)];
    if hugepages(Path::new("/sys")).iter().any(|pages| pages.page_size == 1 << 30 && pages.free > 0) {
        regions.push(("1 GiB", Backing::GiantMemfd));
    }
    regions.into_iter().map(|(name, backing)| Ok((name, Arc::new(Region::new(bytes, backing)?)))).collect()
}

/// Each call on each of `regions`. The last row changes the address space for good.
pub(crate) fn map_table(
    space: &Arc<AddressSpace>,
    regions: &[(&'static str, Arc<Region>)],
) -> Result<Vec<MapTime>> {
    let by_size = regions.iter().flat_map(|region| [Call::Map, Call::MapFile].map(|call| (region, call)));
    let large = regions.iter().filter(|(_, region)| region.page_size() == 2 << 20);
    let mut times = Vec::new();
    for ((memory, region), call) in by_size.chain(large.map(|region| (region, Call::MapSmall))) {
        if let Some(time) = time_map(space, region, call)? {
            times.push(MapTime { memory: (*memory).to_owned(), ..time });
        }
    }
    Ok(times)
}
