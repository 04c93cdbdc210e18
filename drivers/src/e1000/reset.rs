//! The reset, which each generation of chips wants in its own way.

use std::time::Duration;

use vireo_bus_pci::Function;
use vireo_eal::Result;
use vireo_eal::mmio::Bar;

use super::Device;
use super::chip::Chip;
use super::regs::*;

/// Rest after CTRL.RST, before the next access (SDM 13.4, CTRL.RST).
const REST: Duration = Duration::from_micros(1);
/// The 82544 wants more of it before the reload is asked for (Linux, `e1000_reset_hw`).
const REST_82544: Duration = Duration::from_micros(10);
/// Reload of an 82544's registers from the EEPROM, from CTRL_EXT.EE_RST on (Linux, `e1000_reset_hw`).
const RELOAD_82544: Duration = Duration::from_millis(2);
/// Reload of the other 8254x, which tell nobody when it ends (Linux, `e1000_get_auto_rd_done`).
const RELOAD: Duration = Duration::from_millis(5);
/// Set-up of the 82574's PHY, which begins where EECD.AUTO_RD is set (Linux, `e1000_reset_hw_82571`).
const PHY_SETUP: Duration = Duration::from_millis(25);

/// First BAR of I/O ports; none where the firmware gave it no address. Its number differs: BAR 0 of PCI-X chips
/// takes two (SDM 4.1).
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

impl Device {
    /// Ends all DMA and brings the registers that matter to their reset values. Once it succeeds, memory that
    /// the device knew can be used for something else.
    pub(super) fn quiesce(&self) -> Result<()> {
        let (function, bar) = (&self.function.0, &self.bar);
        function.set_command(false)?;
        self.hardware().wait("reset", STATUS, |_| true)?;
        bar.write32(IMC, u32::MAX);
        bar.write32(RCTL, 0);
        bar.write32(TCTL, 0);
        if self.chip.is_82574() {
            // Requests that are under way when CTRL.RST comes can hang PCI Express (DS 10.2.2, CTRL).
            bar.write32(CTRL, bar.read32(CTRL) | CTRL_GIO_MASTER_DISABLE);
            if let Err(error) =
                self.hardware().wait("pause", STATUS, |status| status & STATUS_GIO_MASTER_ENABLE == 0)
            {
                tracing::warn!("{error}");
            }
        }
        // The reset must not interrupt firmware that talks to the PHY (DS 10.2.2, EXTCNF_CTRL).
        let mdio = self.own_mdio();
        self.write_reset()?;
        bar.pause(REST);
        let reset =
            self.hardware().wait("reset", CTRL, |ctrl| ctrl & CTRL_RST == 0).and_then(|_| self.reload());
        if let Err(error) = reset {
            // The function's own reset takes 100 ms, so it is for a chip that does not answer.
            if !function.reset()? {
                return Err(error);
            }
            function.set_command(false)?;
            self.reload()?;
        }
        if mdio.is_ok() {
            self.disown_mdio();
        }
        bar.write32(IMC, u32::MAX);
        if self.chip.has_management() {
            // On a board with ASF the firmware would keep ARP requests to itself (SDM 13.4, MANC).
            bar.write32(MANC, bar.read32(MANC) & !MANC_ARP_EN);
        }
        // For QEMU, whose 82540EM clears CTRL.RST and nothing else.
        for register in [RCTL, TCTL, RDH, RDT, TDH, TDT, RDLEN, TDLEN] {
            bar.write32(register, 0);
        }
        Ok(())
    }

    fn write_reset(&self) -> Result<()> {
        let ctrl = self.bar.read32(CTRL) | CTRL_RST;
        match &self.io {
            _ if self.chip == Chip::I82545Gm => self.bar.write32(CTRL_DUP, ctrl),
            Some(io) => {
                self.function.0.decode_io()?;
                io.write32(IOADDR, STATUS as u32);
                if io.read32(IOADDR) == STATUS as u32 {
                    // SDM 13.2.2.
                    io.write32(IOADDR, CTRL as u32);
                    io.write32(IODATA, ctrl);
                } else {
                    // For QEMU, whose I/O ports lead nowhere.
                    self.bar.write32(CTRL, ctrl);
                }
            }
            // The 82574; and others without I/O ports, which are no masters of the bus now and may take it.
            None => self.bar.write32(CTRL, ctrl),
        }
        Ok(())
    }

    /// Waits until the registers are loaded from the NVM. What is written before is lost.
    fn reload(&self) -> Result<()> {
        let bar = &self.bar;
        match self.chip {
            Chip::I82544 => {
                bar.pause(REST_82544);
                bar.write32(CTRL_EXT, bar.read32(CTRL_EXT) | CTRL_EXT_EE_RST);
                bar.pause(RELOAD_82544);
            }
            Chip::I82540 | Chip::I82545 | Chip::I82545Gm => bar.pause(RELOAD),
            Chip::I82574 => {
                // DS 10.2.2, EECD.
                self.hardware().wait("load the registers of", EECD, |eecd| eecd & EECD_AUTO_RD != 0)?;
                bar.pause(PHY_SETUP);
            }
        }
        Ok(())
    }
}
