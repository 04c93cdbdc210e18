//! What a family of controllers states about itself; [`Device`](super::Device) does the rest.

use std::fmt::Debug;

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::Result;

use super::{Format, Hardware, Phy, Reset};
use crate::port::PortConfig;

/// Offsets of a ring's registers.
#[derive(Clone, Copy, Debug)]
pub struct RingRegisters {
    /// Device address of the ring: low 32 bits.
    pub(crate) base_low: u64,
    /// Device address of the ring: high 32 bits.
    pub(crate) base_high: u64,
    /// Size of the ring in bytes.
    pub(crate) len: u64,
    /// The next descriptor that the device uses.
    pub(crate) head: u64,
    /// The first descriptor that the device may not use.
    pub(crate) tail: u64,
}

/// A chip of a family, with what its driver has to do in the family's own way.
pub trait Chip: Reset + Phy + Debug + Send + Sized + 'static {
    /// Its descriptors.
    type Format: Format;

    /// The driver's name, for messages.
    const NAME: &'static str;
    /// Devices of the family, with Intel's names.
    const IDS: &'static [(DeviceId, &'static str)];
    /// Registers of the RX ring.
    const RX: RingRegisters;
    /// Registers of the TX ring.
    const TX: RingRegisters;

    /// The chip behind `function`; none where it is none of [`Chip::IDS`].
    fn of(function: &dyn Function) -> Option<Self>;

    /// Alignment in bytes of a ring of `len` bytes.
    fn ring_alignment(len: usize) -> usize;

    /// Does what a probe has to do after its reset. Returns the highest address that the chip puts out.
    ///
    /// # Errors
    /// `Unavailable` when the chip cannot work where it is.
    fn prepare(&self, hardware: &Hardware) -> Result<u64>;

    /// Longest frame in bytes, without frame check sequence.
    fn max_frame(&self) -> usize;

    /// Sees that both FIFOs have room for frames of `max_frame` bytes. Returns whether that takes a reset.
    fn make_room(&self, _hardware: &Hardware, _max_frame: usize) -> bool {
        false
    }

    /// Writes what the chip must know before it may start, except its rings.
    ///
    /// # Errors
    /// When the kernel refuses a write to config space.
    fn set_up(&self, hardware: &Hardware, config: &PortConfig) -> Result<()>;

    /// Enables the transmitter, and the receiver by writing `rctl` to RCTL.
    ///
    /// # Errors
    /// `Protocol` when the chip does not confirm it.
    fn enable(&self, hardware: &Hardware, rctl: u32) -> Result<()>;
}

/// Declares `IDS`, and `of`, which finds the variant of an enum for a device id, from rows of device id, variant and name.
macro_rules! chips {
    ($type:ident: $($device:literal $chip:ident $name:literal)*) => {
        /// Devices that this driver knows, with Intel's names.
        pub(super) const IDS: &[(vireo_bus_pci::DeviceId, &str)] = &[
            $((vireo_bus_pci::DeviceId { vendor: 0x8086, device: $device }, concat!("Intel ", $name))),*
        ];

        impl $type {
            pub(super) fn of(id: vireo_bus_pci::DeviceId) -> Option<Self> {
                match (id.vendor, id.device) {
                    $((0x8086, $device) => Some(Self::$chip),)*
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use chips;
