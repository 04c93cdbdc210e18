//! PCI bus of Vireo: which functions there are ([`Bus`]), what they are bound to, and how a driver
//! reaches one ([`Function`], [`PciDevice`]) through whatever VFIO mode the user chose.
#![forbid(unsafe_code)]

mod bind;
mod function;
mod probe;
mod scan;

pub use function::{CAP_ID_EXPRESS, CAP_ID_VENDOR, Capability, DeviceId, Function, capabilities};
pub use probe::{PciDevice, Report, VFIO_DRIVER};
pub use scan::{Bus, PciInfo};
