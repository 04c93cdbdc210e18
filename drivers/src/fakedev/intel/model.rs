//! What the device half of a family of controllers states about itself.

use std::fmt::Debug;
use std::time::Duration;

use vireo_bus_pci::DeviceId;
use vireo_eal::mmio::Bar;

use super::registers::*;
use super::{Fake, Faults};
use crate::fakedev::ConfigSpace;

/// Size of BAR 0 in bytes.
pub(super) const BAR_SIZE: usize = 0x20000;

/// What the registers hold, by their offsets in BAR 0.
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

/// A controller as QEMU models it or as the chip is, beside what all families do alike.
pub trait Model: Debug + Send + Sized + 'static {
    /// First register of the RX ring.
    const RDBAL: u64;
    /// First register of the TX ring.
    const TDBAL: u64;
    /// Registers that begin a reset.
    const RESETS: &'static [u64];
    /// Whether the PHY negotiates without being asked to.
    const PHY_NEGOTIATES: bool;
    /// Whether a statistics register that keeps its count at a read also keeps it over a reset.
    const STATISTICS_OUTLIVE_RESET: bool;
    /// What becomes of a descriptor's first word when it is received into, if anything does.
    const WRITTEN_BACK: Option<u64>;

    /// The device with this id after power-on: the chip, or QEMU's model of it.
    fn new(id: DeviceId, silicon: bool) -> Self;
    /// Fills in config space.
    fn describe(&self, config: &ConfigSpace);
    /// BARs beside BAR 0.
    fn bar(_device: &Fake<Self>, _index: u8) -> Option<Bar> {
        None
    }

    /// Whether it behaves as the chip does.
    fn is_silicon(&self) -> bool;
    /// Whether the chip answers nothing any more.
    fn is_hung(&self) -> bool;
    /// Time passes.
    fn elapse(&mut self, time: Duration);

    /// Begins a reset of the device or of its function.
    fn begin_reset(&mut self, registers: &RegisterFile, bus_master: bool, of_function: bool);
    /// Whether the function can be reset.
    fn has_function_reset(&self) -> bool;
    /// Registers behind a reset that are not 0.
    fn defaults(&self) -> Vec<(u64, u32)>;
    /// Whether [`CRCERRS`] to [`MPC`] keep their count at a read.
    fn keeps_statistics(&self) -> bool;

    /// Bits of STATUS beside the link's, while CTRL is `ctrl`.
    fn status(&self, _ctrl: u32) -> u32 {
        0
    }
    /// Whether the PHY can have a link.
    fn phy_works(&self) -> bool {
        true
    }
    /// Whether the PHY answers software.
    fn phy_answers(&self, registers: &RegisterFile) -> bool;

    /// What a read of `offset`, which holds `value`, gives.
    fn read(
        &mut self,
        offset: u64,
        value: u32,
        registers: &mut RegisterFile,
        faults: Faults,
        bus_master: bool,
    ) -> u32;
    /// What the register at `offset` takes of `value`; none where the write is lost.
    fn write(&mut self, offset: u64, value: u32) -> Option<u32>;

    /// Size in bytes of what is received into one buffer; 0 when nothing is received.
    fn buffer_size(&self, registers: &RegisterFile) -> usize;
    /// Whether it sends.
    fn sends(&self, registers: &RegisterFile, config: &ConfigSpace) -> bool;
    /// `address` as the chip puts it out.
    fn address(&self, address: u64) -> u64 {
        address
    }
    /// Whether the chip survives an access to the ring of `len` bytes at `base`.
    fn may_use(&mut self, _base: u64, _len: u64) -> bool {
        true
    }
    /// Second word of a descriptor that `len` bytes were received into.
    fn received(len: usize, is_last: bool) -> u64;
    /// Whether a partner takes a frame of `len` bytes whose first descriptor says `first` and whose last one `last`.
    fn is_frame(_first: u64, _last: u64, _len: usize) -> bool {
        true
    }
    /// Second word of a descriptor that said `word` and is reported.
    fn reported(word: u64) -> u64 {
        word | TXD_DD
    }
    /// Pads a short frame as the chip does.
    fn pad(&self, frame: &mut Vec<u8>);
}
