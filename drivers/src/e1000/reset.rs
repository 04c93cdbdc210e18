//! Reset, which differs between generations of chips.

use std::time::Duration;

use vireo_bus_pci::Function;
use vireo_eal::Result;
use vireo_eal::mmio::Bar;

use super::E1000;
use super::chip::MacType;
use super::regs::*;
use crate::intel::{Hardware, Reset};

/// Further delay of an 82544 after [`Reset::REST`], before the reload is requested (Linux, `e1000_reset_hw`).
const REST_82544: Duration = Duration::from_micros(10);
/// Time that an 82544 takes to reload its registers from the EEPROM, from CTRL_EXT.EE_RST on (Linux,
/// `e1000_reset_hw`).
const RELOAD_82544: Duration = Duration::from_millis(2);
/// Time that the other 8254x take to reload. They do not report the end of the reload (Linux,
/// `e1000_get_auto_rd_done`).
const RELOAD: Duration = Duration::from_millis(5);
/// Time to set up the 82574's PHY, from the moment that EECD.AUTO_RD is set (Linux, `e1000_reset_hw_82571`).
const PHY_SETUP: Duration = Duration::from_millis(25);

/// Returns the first BAR of I/O ports, or `None` if the firmware assigned it no address. Its number varies,
/// because BAR 0 of PCI-X chips takes two (SDM 4.1).
pub(super) fn io_bar(function: &dyn Function) -> Option<Bar> {
    const BAR0: u16 = 0x10;
    const IS_IO: u32 = 1;
    const TYPE: u32 = 3;
    let at = (1..6_u8).find(|index| {
        let value = function.config32(BAR0 + 4 * u16::from(*index));
        value & TYPE == IS_IO && value & !TYPE != 0
    })?;
    function.bar(at).inspect_err(|error| tracing::debug!("{error}")).ok()
}

impl Reset for E1000 {
    const INTERRUPT_MASKS: &'static [u64] = &[IMC];
    /// A reset must not interrupt firmware that is accessing the PHY (DS 10.2.2, EXTCNF_CTRL).
    const RESET_NEEDS_PHY: bool = true;
    /// SDM 13.4, CTRL.RST.
    const REST: Duration = Duration::from_micros(1);

    fn is_express(&self) -> bool {
        self.mac == MacType::I82574
    }

    fn write_reset(&self, hardware: &Hardware) -> Result<()> {
        let ctrl = hardware.bar.read32(CTRL) | CTRL_RST;
        match &self.io {
            _ if self.mac == MacType::I82545Gm => hardware.bar.write32(CTRL_DUP, ctrl),
            Some(io) => {
                hardware.function.decode_io()?;
                io.write32(IOADDR, STATUS as u32);
                if io.read32(IOADDR) == STATUS as u32 {
                    // SDM 13.2.2.
                    io.write32(IOADDR, CTRL as u32);
                    io.write32(IODATA, ctrl);
                } else {
                    // For QEMU, whose I/O ports have no effect.
                    hardware.bar.write32(CTRL, ctrl);
                }
            }
            // The 82574, and other chips without I/O ports. The latter may accept the write, because they are
            // not bus masters at this point.
            None => hardware.bar.write32(CTRL, ctrl),
        }
        Ok(())
    }

    fn reload(&self, hardware: &Hardware) -> Result<()> {
        let bar = &hardware.bar;
        match self.mac {
            MacType::I82544 => {
                bar.pause(REST_82544);
                bar.write32(CTRL_EXT, bar.read32(CTRL_EXT) | CTRL_EXT_EE_RST);
                bar.pause(RELOAD_82544);
            }
            MacType::I82540 | MacType::I82545 | MacType::I82545Gm => bar.pause(RELOAD),
            MacType::I82574 => {
                // DS 10.2.2, EECD.
                hardware.wait("load the registers of", EECD, |eecd| eecd & EECD_AUTO_RD != 0)?;
                bar.pause(PHY_SETUP);
            }
        }
        Ok(())
    }

    fn settle(&self, hardware: &Hardware) {
        if self.mac.has_management() {
            // On a board with ASF, the firmware would otherwise consume ARP requests (SDM 13.4, MANC).
            hardware.change(MANC, 0, MANC_ARP_EN);
        }
        // For QEMU, whose 82540EM clears CTRL.RST and nothing else.
        for register in [RCTL, TCTL, RDH, RDT, TDH, TDT, RDLEN, TDLEN] {
            hardware.bar.write32(register, 0);
        }
    }
}
