//! VFIO: how a process acquires a device ([`Vfio::acquire`]), what the device can reach ([`AddressSpace`]),
//! and the device itself ([`Device`]), which is the same in every [`VfioMode`]. The crate `vireo-vfio` wraps
//! the kernel's interface. This module decides how to open a device, what devices share, and what to tell the
//! user.
//!
//! Modes differ in two places only: `Vfio::acquire` branches on how the descriptors are opened,
//! [`AddressSpace`] on how memory is mapped.

mod acquire;
mod cdev;
mod device;
pub mod device_nodes;
mod diagnose;
mod fds;
mod group;
mod handover;
pub(crate) mod listen;
mod live_update;
pub mod mode;
mod noiommu;
mod phases;
mod preflight;
mod space;

pub use acquire::{Acquired, BusDevice, Vfio};
pub(crate) use device::Held;
#[cfg(test)]
pub(crate) use device::fake_file;
pub use device::{ConfigSpace, Device};
pub use device_nodes::{DeviceNodes, FdSource};
pub use diagnose::holder;
pub use fds::{CdevFds, DeviceFds, GroupFds};
pub use handover::DeviceRecord;
pub use live_update::LiveUpdate;
pub use mode::VfioMode;
pub use noiommu::{iommu_on, no_group, noiommu_allowed};
pub use phases::Phase;
pub use space::{AddressSpace, DmaMapping};
pub use vireo_vfio::{Irq, IrqInfo, Request};

#[cfg(fuzzing)]
pub use vireo_vfio::read_info;
