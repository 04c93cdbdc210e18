//! Interface that each family of fake controllers implements.

use std::fmt::Debug;
use std::time::Duration;

use vireo_bus_pci::DeviceId;
use vireo_eal::mmio::Bar;

use super::registers::*;
use super::{Fake, Faults};
use crate::fakedev::ConfigSpace;

/// Size of BAR 0 in bytes.
pub(super) const BAR_SIZE: usize = 0x20000;

/// Values of the registers, by offset in BAR 0.
#[derive(Debug)]
pub struct RegisterFile(pub(super) Vec<u32>);

impl RegisterFile {
    pub(crate) fn get(&self, register: u64) -> u32 {
        self.0.get(register as usize / 4).copied().unwrap_or(u32::MAX)
    }

    pub(crate) fn set(&mut self, register: u64, value: u32) {
        if let Some(word) = self.0.get_mut(register as usize / 4) {
            *word = value;
        }
    }
}

/// Family-specific parts of a fake controller, which behaves like QEMU's model or like the chip.
pub trait Model: Debug + Send + Sized + 'static {
    /// First register of the RX ring.
    const RDBAL: u64;
    /// First register of the TX ring.
    const TDBAL: u64;
    /// Registers that begin a reset.
    const RESETS: &'static [u64];
    /// Whether the PHY negotiates without being asked to.
    const PHY_NEGOTIATES: bool;
    /// Whether a statistics register that keeps its count across reads also keeps it across resets.
    const STATISTICS_OUTLIVE_RESET: bool;
    /// Value that replaces the first word of a receive descriptor on completion, if any.
    const WRITTEN_BACK: Option<u64>;

    /// Creates the device with this id after power-on: the chip if `silicon`, else QEMU's model of it.
    fn new(id: DeviceId, silicon: bool) -> Self;
    /// Fills in config space.
    fn describe(&self, config: &ConfigSpace);
    /// Returns a BAR other than BAR 0, or `None` if the device has no such BAR.
    fn bar(_device: &Fake<Self>, _index: u8) -> Option<Bar> {
        None
    }

    /// Whether the device behaves like the chip instead of QEMU's model.
    fn is_silicon(&self) -> bool;
    /// Whether the chip no longer responds.
    fn is_hung(&self) -> bool;
    /// Lets `time` pass.
    fn elapse(&mut self, time: Duration);

    /// Begins a reset of the device or of its function.
    fn begin_reset(&mut self, registers: &RegisterFile, bus_master: bool, of_function: bool);
    /// Whether the function can be reset.
    fn has_function_reset(&self) -> bool;
    /// Registers that are not 0 after a reset, and their values.
    fn defaults(&self) -> Vec<(u64, u32)>;
    /// Whether [`CRCERRS`] to [`MPC`] keep their count across reads.
    fn keeps_statistics(&self) -> bool;

    /// Bits of STATUS other than the link's, while CTRL is `ctrl`.
    fn status(&self, _ctrl: u32) -> u32 {
        0
    }
    /// Whether the PHY can have a link.
    fn phy_works(&self) -> bool {
        true
    }
    /// Whether the PHY responds to software.
    fn phy_answers(&self, registers: &RegisterFile) -> bool;

    /// Returns the result of a read of `offset`, whose register holds `value`.
    fn read(
        &mut self,
        offset: u64,
        value: u32,
        registers: &mut RegisterFile,
        faults: Faults,
        bus_master: bool,
    ) -> u32;
    /// Returns the value that a write of `value` stores at `offset`, or `None` if the write is lost.
    fn write(&mut self, offset: u64, value: u32) -> Option<u32>;

    /// Number of bytes received per buffer; 0 if nothing is received.
    fn buffer_size(&self, registers: &RegisterFile) -> usize;
    /// Whether the device sends.
    fn sends(&self, registers: &RegisterFile, config: &ConfigSpace) -> bool;
    /// Returns `address` as the chip drives it on the bus.
    fn address(&self, address: u64) -> u64 {
        address
    }
    /// Whether the chip survives an access to the ring of `len` bytes at `base`.
    fn may_use(&mut self, _base: u64, _len: u64) -> bool {
        true
    }
    /// Second word of a descriptor into which `len` bytes were received.
    fn received(len: usize, is_last: bool) -> u64;
    /// Whether the link partner accepts a frame of `len` bytes whose first descriptor has the second word
    /// `first` and whose last one has `last`.
    fn is_frame(_first: u64, _last: u64, _len: usize) -> bool {
        true
    }
    /// Second word of a descriptor once its completion is reported. `word` is the value before.
    fn reported(word: u64) -> u64 {
        word | TXD_DD
    }
    /// Pads a short frame as the chip does.
    fn pad(&self, frame: &mut Vec<u8>);
}
