//! PCI bus of Vireo: finds functions and binds them to drivers ([`Bus`]), and gives a driver access to a
//! function ([`Function`], [`PciDevice`]) through the VFIO mode that the user chose.
#![forbid(unsafe_code)]

mod bind;
mod function;
mod probe;
mod scan;

pub use function::{
    CAP_ID_EXPRESS, CAP_ID_VENDOR, Capability, DeviceId, Function, Interrupt, InterruptRecord, capabilities,
};
pub use probe::{PciDevice, Report, VFIO_DRIVER};
pub use scan::{Bus, PciInfo};
