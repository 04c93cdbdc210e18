//! `vireo-leave FIRST SECOND MODE`: checks that a closed device is free for other processes at once, and that
//! it can be opened again alongside a device that stayed open.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;

use vireo_bus_pci::{Bus, PciDevice, PciInfo};
use vireo_eal::log::{self, LogColor};
use vireo_eal::mem::{Backing, Region};
use vireo_eal::vfio::{DmaMapping, Vfio, VfioMode};
use vireo_eal::{Error, ErrorKind, Result};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-leave: {error}");
            error.kind().exit_code().into()
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().collect();
    let [_, first, second, mode] = &words[..] else {
        return Err(Error::new(ErrorKind::Usage, "cannot start", "the arguments are not FIRST SECOND MODE"));
    };
    let mode: VfioMode = mode.parse()?;
    log::init(&["warning".parse()?], LogColor::Auto);
    let bus = Bus::default();
    let [first, second] = [bus.find(first.parse()?)?, bus.find(second.parse()?)?];
    let vfio = Vfio::new(None);
    // Opens the device as another process would.
    let elsewhere = |info: &PciInfo| bus.open(info, &Vfio::new(None), mode).map(drop);

    let gone = bus.open(&first, &vfio, mode)?;
    let stays = bus.open(&second, &vfio, mode)?;
    let mapped = map(&stays, mode)?;
    drop(gone);
    elsewhere(&first)?;
    println!("free while the other device is open");

    let back = bus.open(&first, &vfio, mode)?;
    if !Arc::ptr_eq(back.vfio().space(), stays.vfio().space()) {
        return Err(Error::new(ErrorKind::Protocol, "wrong address space", "it is not the other device's"));
    }
    println!("back in the address space of the other device");

    drop((back, stays));
    elsewhere(&first)?;
    elsewhere(&second)?;
    let again = bus.open(&second, &vfio, mode)?;
    let mapped_again = map(&again, mode)?;
    println!("open again after both were closed, while memory was mapped");
    drop((mapped, mapped_again, again));
    Ok(())
}

/// Maps a page for DMA, if the mode has an IOMMU.
fn map(device: &PciDevice, mode: VfioMode) -> Result<Option<DmaMapping>> {
    if !mode.has_iommu() {
        return Ok(None);
    }
    let region = Arc::new(Region::new(4096, Backing::SmallPages)?);
    device.vfio().space().map(&region, None).map(Some)
}
