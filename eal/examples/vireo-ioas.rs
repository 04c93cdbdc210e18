//! Uses I/O page tables without VFIO and without a device: maps one region into two address spaces.
//!
//! A consumer other than VFIO (vDPA, memory shared by several devices) starts this way and attaches its
//! devices to the IOAS ids.

use std::sync::Arc;

use vireo_eal::Result;
use vireo_eal::iommufd::{Access, Iommufd};
use vireo_eal::mem::{Backing, Region};

fn run() -> Result<()> {
    let iommufd = Iommufd::open()?;
    let (first, second) = (iommufd.ioas_alloc()?, iommufd.ioas_alloc()?);
    let iovas = first.iova_ranges()?;
    for range in &iovas.ranges {
        println!(
            "ioas {}: {:#x}-{:#x} usable, in steps of {}",
            first.id(),
            range.start(),
            range.end(),
            iovas.alignment
        );
    }
    second.allow_iovas(&[0..=(1 << 39) - 1])?;

    let region = Arc::new(Region::new(2 << 20, Backing::SmallPages)?);
    let mapping = first.map(&region, Some(4 << 30), Access::ReadWrite)?;
    let copy = second.copy(&mapping, None, Access::Read)?;
    println!("ioas {}: 2 MiB at {:#x}", first.id(), mapping.iova());
    println!("ioas {}: the same pages, read-only, at {:#x}", second.id(), copy.iova());

    drop(mapping);
    if let Some(file) = region.fd() {
        match first.map_file(file, 0..region.len() as u64, Some(4 << 30), Access::ReadWrite) {
            Ok(mapping) => println!("ioas {}: by file at {:#x}", first.id(), mapping.iova()),
            Err(error) => println!("{error}"),
        }
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-ioas: {error}");
            error.kind().exit_code().into()
        }
    }
}
