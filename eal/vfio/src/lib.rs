//! Typed interface to Linux's VFIO: a process opens a device, defines the memory that the device can access,
//! and uses the device's registers and interrupts.
//!
//! The crate wraps the kernel's interface and nothing more. How to open a device, and what to report if a
//! device does not open, are left to the program (in Vireo, to `vireo-eal`).
//!
//! | Mode | Opened with | Memory that the device can access |
//! |---|---|---|
//! | container | [`Container::open`], [`Group`] | memory mapped in the container |
//! | container on iommufd | [`Container::open_at`] with `/dev/iommu`, [`Group`] | memory mapped in the container |
//! | character device | [`Iommufd`], [`Cdev`] | memory mapped in an [`Ioas`](vireo_iommufd::Ioas) |
//! | group, no IOMMU | [`Container::open`], [`Group`] of `noiommu-N`, [`IommuType::NoIommu`] | all memory |
//! | character device, no IOMMU (Linux 7.3) | [`Iommufd`], [`Cdev`] of `noiommu-vfioN` | all memory; mappings are pinned |
//!
//! Each mode results in a [`Device`], which keeps alive the objects that the mode needs.
//!
//! ```no_run
//! use std::sync::Arc;
//! use vireo_vfio::{Cdev, Container, Group, IommuType, Iommufd};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let name = "0000:00:04.0";
//! let sysfs = std::path::Path::new("/sys/bus/pci/devices").join(name);
//!
//! // By its own node:
//! let ioas = Iommufd::open()?.ioas_alloc()?;
//! let node = vireo_vfio::cdev_of(&sysfs).ok_or("no VFIO device")?;
//! let cdev = Cdev::open(format!("/dev/vfio/devices/{node}").as_ref(), name)?;
//! cdev.bind(ioas.iommufd(), None)?;
//! cdev.attach(ioas.id())?;
//! let device = cdev.into_device(ioas)?;
//! println!("BAR 0 has {} bytes", device.region(0)?.size);
//! drop(device);
//!
//! // By its group:
//! let group = vireo_vfio::group_of(&sysfs)?;
//! let group = Group::open(format!("/dev/vfio/{group}").as_ref())?;
//! let container = Arc::new(Container::open()?);
//! group.set_container(&container)?;
//! container.set_iommu(IommuType::Type1v2)?;
//! let device = group.device(name, None, container)?;
//! device.reset()?;
//! # Ok(())
//! # }
//! ```
//!
//! The crate reads no command line and no environment variables. Calls can be
//! [observed](vireo_iommufd::observe), together with those of `vireo-iommufd`.

mod cdev;
mod container;
mod device;
mod device_node;
mod error;
mod group;
mod info;
mod irq;
#[cfg(test)]
mod kernel;
mod mapping;
mod region;
mod sys;

pub use cdev::Cdev;
pub use container::{Container, IommuType, Iovas, PATH};
pub use device::{Device, PCI_CONFIG_REGION};
pub use device_node::{NOIOMMU_PREFIX, cdev_of, class_and_name, group_of};
pub use error::{Error, Operation, Result};
pub use group::{Group, GroupStatus};
pub use irq::{Irq, IrqInfo, Request};
pub use mapping::Mapping;
pub use region::{DeviceFile, MappedRange, RegionFile, RegionInfo};

pub use nix::errno::Errno;
pub use vireo_iommufd::{Access, DeviceId, Iommufd, Memory};

/// Parses `answer` as each kernel structure that has a chain of capabilities, for fuzzing.
#[cfg(fuzzing)]
pub fn read_info(answer: &[u8]) {
    let _ = (RegionInfo::read(answer), info::iova_ranges(answer), info::smallest_page(answer));
}
