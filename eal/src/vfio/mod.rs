//! VFIO: how a process gets a device ([`Vfio::acquire`]), what the device can reach ([`AddressSpace`]),
//! and the device itself ([`Device`]), which is the same in every [`VfioMode`].
//!
//! Modes differ in two places only: `Vfio::acquire` has the one branch on how the descriptors are
//! opened, [`AddressSpace`] the one on how memory is mapped.

mod acquire;
mod cdev;
mod device;
mod diagnose;
mod fds;
mod group;
mod info;
mod irq;
pub(crate) mod listen;
pub mod mode;
pub mod nodes;
mod preflight;
mod space;
mod sys;

pub use acquire::{Acquired, Node, Phase, Vfio, iommu_on, no_group, noiommu_allowed};
pub use device::{ConfigSpace, Device};
pub use diagnose::holder;
pub use fds::{CdevFds, DeviceFds, GroupFds};
pub use irq::{Irq, IrqInfo, Request};
pub use mode::VfioMode;
pub use nodes::{FdSource, Nodes};
pub use space::{AddressSpace, Mapping};

/// Reads `answer` as each of the kernel's answers that has a chain of capabilities: what the fuzz target calls.
#[cfg(fuzzing)]
pub fn read_info(answer: &[u8]) {
    let _ = (device::Region::read(answer), info::iova_ranges(answer));
}
