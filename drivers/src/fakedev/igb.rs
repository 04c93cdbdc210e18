//! Fake device for `igb`: an 82576 or I350 with queue 0.

mod registers;
mod silicon;

use std::time::Duration;

use vireo_bus_pci::DeviceId;

use self::registers::*;
use self::silicon::Silicon;
use super::ConfigSpace;
pub use super::intel::Faults;
use super::intel::{Fake, Model, RegisterFile};

/// Id of the PCI Express capability.
const CAP_ID_EXPRESS: u8 = 0x10;

/// 82576, which QEMU models.
pub const ID_82576: DeviceId = DeviceId { vendor: 0x8086, device: 0x10C9 };
/// I350.
pub const ID_I350: DeviceId = DeviceId { vendor: 0x8086, device: 0x1521 };

/// Test handle of the device.
pub type FakeIgb = Fake<Igb>;

/// An 82576 or I350.
#[derive(Debug)]
pub struct Igb {
    id: DeviceId,
    silicon: Option<Silicon>,
}

impl Model for Igb {
    const RDBAL: u64 = RDBAL;
    const TDBAL: u64 = TDBAL;
    const RESETS: &'static [u64] = &[CTRL];
    const PHY_NEGOTIATES: bool = false;
    const STATISTICS_OUTLIVE_RESET: bool = false;
    /// Packet type and RSS hash, which replace the buffer's address.
    const WRITTEN_BACK: Option<u64> = Some(0x5EED_5EED_0000_0031);

    fn new(id: DeviceId, silicon: bool) -> Self {
        Self { id, silicon: silicon.then(Silicon::new) }
    }

    fn describe(&self, config: &ConfigSpace) {
        // Device Control 2 is at 28h.
        config.add_capability(CAP_ID_EXPRESS, &[0; 0x28]);
    }

    fn is_silicon(&self) -> bool {
        self.silicon.is_some()
    }

    fn is_hung(&self) -> bool {
        self.silicon.as_ref().is_some_and(|silicon| silicon.hung)
    }

    fn elapse(&mut self, time: Duration) {
        if let Some(silicon) = &mut self.silicon {
            silicon.elapse(time);
        }
    }

    fn begin_reset(&mut self, _registers: &RegisterFile, _bus_master: bool, of_function: bool) {
        match &mut self.silicon {
            Some(silicon) if of_function => *silicon = Silicon::new(),
            Some(silicon) => silicon.reset(),
            None => {}
        }
    }

    fn has_function_reset(&self) -> bool {
        true
    }

    /// Reset values of QEMU's model and the manual, except for PHPM and CTRL_EXT, whose values a driver must
    /// change.
    fn defaults(&self) -> Vec<(u64, u32)> {
        // 64 KiB on the 82576, and the I350's code for 36 KiB (Linux, `e1000_82580_rxpbs_table`).
        let rxpbs = if self.id == ID_I350 { 0 } else { 0x0000_0040 };
        vec![
            (CTRL, 0x0010_0A09),
            (CTRL_EXT, 0x0000_0C00),
            (PHPM, 0x0000_0020),
            (GCR, 0x0005_0000),
            (RXPBS, rxpbs),
            (RXDCTL, QUEUE_ENABLE | 1 << 16),
            (TXDCTL, QUEUE_ENABLE),
            (TCTL, 0xA400_00F8),
        ]
    }

    fn keeps_statistics(&self) -> bool {
        self.silicon.is_none()
    }

    fn status(&self, ctrl: u32) -> u32 {
        let is_master = ctrl & CTRL_GIO_MASTER_DISABLE == 0;
        STATUS_LAN_ID_1 | if is_master { STATUS_GIO_MASTER_ENABLE } else { 0 }
    }

    fn phy_answers(&self, registers: &RegisterFile) -> bool {
        self.silicon.is_none() || registers.get(SW_FW_SYNC) & SYNC_SW_PHY1 != 0
    }

    fn read(
        &mut self,
        offset: u64,
        mut value: u32,
        registers: &mut RegisterFile,
        faults: Faults,
        bus_master: bool,
    ) -> u32 {
        // A queue reads as disabled until the receiver or transmitter is enabled.
        let of_queue = [(RXDCTL, RCTL, RCTL_EN), (TXDCTL, TCTL, TCTL_EN)];
        if let Some((_, control, enabled)) = of_queue.into_iter().find(|(queue, ..)| *queue == offset)
            && (registers.get(control) & enabled == 0 || offset == RXDCTL && faults.never_enabled)
        {
            value &= !QUEUE_ENABLE;
        }
        let ctrl = registers.get(CTRL);
        if let Some(silicon) = &mut self.silicon
            && let Some(other) = silicon.read(offset, value, bus_master, ctrl)
        {
            return other;
        }
        if offset == SWSM {
            registers.set(SWSM, value | SWSM_SMBI);
        }
        value
    }

    fn write(&mut self, offset: u64, value: u32) -> Option<u32> {
        match &mut self.silicon {
            Some(silicon) => silicon.write(offset, value),
            None => Some(value),
        }
    }

    /// Returns the size in SRRCTL, or 0 for descriptors other than advanced ones with one buffer.
    fn buffer_size(&self, registers: &RegisterFile) -> usize {
        let srrctl = registers.get(SRRCTL);
        let receives = registers.get(RXDCTL) & QUEUE_ENABLE != 0 && registers.get(STATUS) & STATUS_LU != 0;
        if receives && srrctl >> 25 & 7 == 1 { (srrctl & 0x7F) as usize * 1024 } else { 0 }
    }

    fn sends(&self, registers: &RegisterFile, _config: &ConfigSpace) -> bool {
        registers.get(TXDCTL) & QUEUE_ENABLE != 0
    }

    fn received(len: usize, is_last: bool) -> u64 {
        (len as u64) << 32 | RXD_DD | if is_last { RXD_EOP } else { 0 }
    }

    fn is_frame(first: u64, last: u64, len: usize) -> bool {
        [first, last].iter().all(|word| word & TXD_KIND == TXD_DATA && word & TXD_IFCS != 0)
            && first >> 46 == len as u64
    }

    fn reported(word: u64) -> u64 {
        word & 0xFFFF_FFFF | TXD_DD
    }

    fn pad(&self, frame: &mut Vec<u8>) {
        if let Some(silicon) = &self.silicon {
            silicon.pad(frame);
        }
    }
}
