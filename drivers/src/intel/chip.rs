//! Interface that each controller family implements. [`Device`](super::Device) contains the
//! family-independent code.

use std::fmt::Debug;

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::Result;

use super::{Format, Hardware, Phy, Reset};
use crate::port::PortConfig;

/// Register offsets of a descriptor ring.
#[derive(Clone, Copy, Debug)]
pub struct RingRegisters {
    /// Low 32 bits of the ring's device address.
    pub(crate) base_low: u64,
    /// High 32 bits of the ring's device address.
    pub(crate) base_high: u64,
    /// Size of the ring in bytes.
    pub(crate) len: u64,
    /// Next descriptor that the device uses.
    pub(crate) head: u64,
    /// First descriptor that the device may not use.
    pub(crate) tail: u64,
}

/// Registers that enable and disable single queues while the device runs.
#[derive(Clone, Copy, Debug)]
pub struct QueueControl {
    /// Of the RX queue.
    pub(crate) rx: u64,
    /// Of the TX queue.
    pub(crate) tx: u64,
    /// Bit that enables the queue. It reads as 0 once the device does not access the ring any more.
    pub(crate) enable: u32,
}

/// A chip of a controller family, with the family-specific parts of the driver.
pub trait Chip: Reset + Phy + Debug + Send + Sized + 'static {
    /// Descriptor format.
    type Format: Format;

    /// Driver name, for messages.
    const NAME: &'static str;
    /// Device ids of the family, with Intel's product names.
    const IDS: &'static [(DeviceId, &'static str)];
    /// Registers of the RX ring.
    const RX: RingRegisters;
    /// Registers of the TX ring.
    const TX: RingRegisters;

    /// How to disable a queue, if the datasheet says so; otherwise, only a reset stops the device's accesses to a ring.
    const QUEUE_CONTROL: Option<QueueControl> = None;

    /// Returns the chip behind `function`, or `None` if its id is not in [`Chip::IDS`].
    fn of(function: &dyn Function) -> Option<Self>;

    /// Alignment in bytes of a ring of `len` bytes.
    fn ring_alignment(len: usize) -> usize;

    /// Completes a probe after the reset. Returns the highest device address that the chip can use.
    ///
    /// # Errors
    /// `Unavailable` when the chip cannot work in its slot.
    fn prepare(&self, hardware: &Hardware) -> Result<u64>;

    /// Longest supported frame in bytes, without the frame check sequence.
    fn max_frame(&self) -> usize;

    /// Makes room in both FIFOs for frames of `max_frame` bytes. Returns whether a reset is needed to apply
    /// the change.
    fn make_room(&self, _hardware: &Hardware, _max_frame: usize) -> bool {
        false
    }

    /// Configures the chip, except its rings, before a start.
    ///
    /// # Errors
    /// When the kernel refuses a write to config space.
    fn set_up(&self, hardware: &Hardware, config: &PortConfig) -> Result<()>;

    /// Enables the transmitter, and the receiver by writing `rctl` to RCTL.
    ///
    /// # Errors
    /// `Protocol` when the chip does not confirm that its queues are enabled.
    fn enable(&self, hardware: &Hardware, rctl: u32) -> Result<()>;
}

/// Declares `IDS`, and `of`, which maps a device id to a variant of the enum, from rows of device id, variant
/// and name.
macro_rules! chips {
    ($type:ident: $($device:literal $chip:ident $name:literal)*) => {
        /// Supported devices, with Intel's product names.
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
