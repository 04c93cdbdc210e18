//! Fake device for `e1000`: an 82540EM or 82574L, and in silicon mode also other chips.

mod registers;
mod silicon;

use std::sync::Arc;
use std::time::Duration;

use vireo_bus_pci::DeviceId;
use vireo_eal::mmio::{Bar, DoorbellPage, Registers};

use self::registers::*;
use self::silicon::Silicon;
use super::ConfigSpace;
use super::intel::{Fake, Model, RegisterFile};
pub use super::intel::{Faults, PAUSE_ADDRESS};

/// Buffer size in bytes for RCTL.BSIZE 0. Each of the values 1, 2 and 3 halves the size of the previous one.
const BSIZE: usize = 2048;
/// BAR of the I/O ports IOADDR and IODATA (SDM 13.2.2), and its size in bytes.
const IO_BAR: u8 = 1;
const IO_SIZE: usize = 8;
const IOADDR: u64 = 0;
/// Id of the PCI Express capability, the offset of its Link Control, and the bits there that enable ASPM (PCI
/// Express 4.0, 7.5.3.7).
const CAP_ID_EXPRESS: u8 = 0x10;
const LINK_CONTROL: u16 = 0x10;
const ASPM: u8 = 3;

/// 82540EM, without function reset.
pub const ID_82540EM: DeviceId = DeviceId { vendor: 0x8086, device: 0x100E };
/// 82574L, with function reset.
pub const ID_82574L: DeviceId = DeviceId { vendor: 0x8086, device: 0x10D3 };
/// 82545EM, like the 82540EM but for PCI-X.
pub const ID_82545EM: DeviceId = DeviceId { vendor: 0x8086, device: 0x100F };
/// 82544GC, the oldest chip.
pub const ID_82544GC: DeviceId = DeviceId { vendor: 0x8086, device: 0x100C };
/// 82545GM, the second generation of the 82545.
pub const ID_82545GM: DeviceId = DeviceId { vendor: 0x8086, device: 0x1026 };

/// Test handle of the device.
pub type FakeE1000 = Fake<E1000>;

/// An 8254x or 82574.
#[derive(Debug)]
pub struct E1000 {
    id: DeviceId,
    silicon: Option<Silicon>,
    /// Value of PBA before CTRL.RST, which does not change it.
    pba: Option<u32>,
}

impl FakeE1000 {
    /// Puts the chip in a PCI-X slot, where it uses 64-bit addresses. Has an effect only in silicon mode.
    pub fn set_pcix(&self) {
        self.with_model(|model| {
            if let Some(silicon) = &mut model.silicon {
                silicon.pcix = true;
            }
        });
    }
}

impl Model for E1000 {
    const RDBAL: u64 = RDBAL;
    const TDBAL: u64 = TDBAL;
    const RESETS: &'static [u64] = &[CTRL, CTRL_DUP];
    const PHY_NEGOTIATES: bool = true;
    const STATISTICS_OUTLIVE_RESET: bool = true;
    const WRITTEN_BACK: Option<u64> = None;

    fn new(id: DeviceId, silicon: bool) -> Self {
        Self { id, silicon: silicon.then(|| Silicon::new(id)), pba: None }
    }

    fn describe(&self, config: &ConfigSpace) {
        if self.id == ID_82574L {
            // Link Control is at 10h. The bytes before it do not matter here.
            let mut body = [0; 0x12];
            body[usize::from(LINK_CONTROL) - 2] = ASPM;
            config.add_capability(CAP_ID_EXPRESS, &body);
        }
        config.set_bar(IO_BAR, 0xC001);
    }

    fn bar(device: &FakeE1000, index: u8) -> Option<Bar> {
        let ports = || Bar::emulated(Arc::new(Ports(device.clone())), DoorbellPage::new(IO_SIZE));
        (index == IO_BAR).then(ports)
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

    fn begin_reset(&mut self, registers: &RegisterFile, bus_master: bool, of_function: bool) {
        self.pba = (!of_function).then(|| registers.get(PBA));
        if let Some(silicon) = &mut self.silicon {
            silicon.reset(registers.get(EXTCNF_CTRL) & EXTCNF_SW_OWNS_MDIO != 0, bus_master);
        }
    }

    fn has_function_reset(&self) -> bool {
        self.id == ID_82574L
    }

    /// Reset values of QEMU's models, and those that the NVM sets on a chip.
    fn defaults(&self) -> Vec<(u64, u32)> {
        let of_chip = self.silicon.as_ref().map_or(&[][..], Silicon::defaults);
        let pba = self.pba.unwrap_or(if self.id == ID_82574L { 0x0014_0014 } else { 0x0010_0030 });
        [&[(EECD, EECD_AUTO_RD), (PBA, pba)], of_chip].concat()
    }

    /// True for QEMU's 8254x.
    fn keeps_statistics(&self) -> bool {
        self.silicon.is_none() && self.id != ID_82574L
    }

    fn phy_works(&self) -> bool {
        self.silicon.as_ref().is_none_or(|silicon| !silicon.phy_lost)
    }

    fn phy_answers(&self, registers: &RegisterFile) -> bool {
        let shares = self.silicon.as_ref().is_some_and(Silicon::is_82574);
        !shares || registers.get(EXTCNF_CTRL) & EXTCNF_SW_OWNS_MDIO != 0
    }

    fn read(
        &mut self,
        offset: u64,
        value: u32,
        registers: &mut RegisterFile,
        _faults: Faults,
        bus_master: bool,
    ) -> u32 {
        let Some(silicon) = &mut self.silicon else { return value };
        silicon
            .read(offset, bus_master, registers.get(CTRL))
            .unwrap_or_else(|| if offset == STATUS { value | silicon.status() } else { value })
    }

    fn write(&mut self, offset: u64, value: u32) -> Option<u32> {
        let is_taken = self.silicon.as_mut().is_none_or(|silicon| silicon.takes(offset, value));
        is_taken.then_some(value)
    }

    fn buffer_size(&self, registers: &RegisterFile) -> usize {
        BSIZE >> ((registers.get(RCTL) & RCTL_BSIZE) >> RCTL_BSIZE.trailing_zeros())
    }

    fn sends(&self, registers: &RegisterFile, config: &ConfigSpace) -> bool {
        let mut aspm = [0];
        if self.id == ID_82574L {
            // It is the only capability, so it directly follows the header.
            config.read(0x40 + LINK_CONTROL, &mut aspm);
        }
        let aspm = aspm[0] & ASPM != 0;
        self.silicon.as_ref().is_none_or(|silicon| silicon.keeps_completions(registers, aspm))
    }

    fn address(&self, address: u64) -> u64 {
        self.silicon.as_ref().map_or(address, |silicon| silicon.address(address))
    }

    fn may_use(&mut self, base: u64, len: u64) -> bool {
        self.silicon.as_mut().is_none_or(|silicon| silicon.may_use(base, len))
    }

    fn received(len: usize, is_last: bool) -> u64 {
        len as u64 | RXD_DD | if is_last { RXD_EOP } else { 0 }
    }

    fn pad(&self, frame: &mut Vec<u8>) {
        if let Some(silicon) = &self.silicon {
            silicon.pad(frame);
        }
    }
}

/// I/O ports of the device. Those of QEMU's models have no effect.
struct Ports(FakeE1000);

impl Registers for Ports {
    fn read(&self, offset: u64, _size: usize) -> u64 {
        let named = self.0.with_model(|model| model.silicon.as_ref().map(|silicon| silicon.io_address));
        let answers = offset == IOADDR && self.0.config().io_enabled();
        named.filter(|_| answers).map_or(0, u64::from)
    }

    fn write(&self, offset: u64, _size: usize, value: u64) {
        if !self.0.config().io_enabled() {
            return;
        }
        let resets = self.0.with_model(|model| {
            let Some(silicon) = &mut model.silicon else { return false };
            if offset == IOADDR {
                silicon.io_address = value as u32;
                return false;
            }
            silicon.is_io_reset(value as u32)
        });
        if resets {
            self.0.reset_all(false);
        }
    }
}
