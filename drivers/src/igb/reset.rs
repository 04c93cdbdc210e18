//! The reset (DS 4.2).

use std::time::Duration;

use vireo_eal::Result;

use super::Device;
use super::regs::*;

/// Rest after CTRL.RST, before the chip may be asked anything (DS 4.2.1.6.1).
const REST: Duration = Duration::from_millis(1);
/// Longest wait for the reload from the NVM, and the interval of polls. The driver goes on after it, as Linux does
/// (`igb_get_auto_rd_done`): a chip without an NVM never sets EEC.AUTO_RD, and QEMU's does not either.
const RELOAD: Duration = Duration::from_millis(20);
const RELOAD_STEP: Duration = Duration::from_millis(1);

impl Device {
    /// Ends all DMA and brings the registers to their reset values. Once it succeeds, memory that the device knew can be
    /// used for something else.
    pub(super) fn quiesce(&self) -> Result<()> {
        let (function, bar, hardware) = (&self.function.0, &self.bar, self.hardware());
        function.set_command(false)?;
        hardware.wait("reset", STATUS, |_| true)?;
        self.mask_interrupts();
        bar.write32(RCTL, 0);
        bar.write32(TCTL, 0);
        // Requests that are under way when CTRL.RST comes can hang PCI Express (Linux, `igb_reset_hw_82575`).
        hardware.change(CTRL, CTRL_GIO_MASTER_DISABLE, 0);
        if let Err(error) = hardware.wait("pause", STATUS, |status| status & STATUS_GIO_MASTER_ENABLE == 0) {
            tracing::warn!("{error}");
        }
        hardware.change(CTRL, CTRL_RST, 0);
        bar.pause(REST);
        if let Err(error) = hardware.wait("reset", CTRL, |ctrl| ctrl & CTRL_RST == 0) {
            // The function's own reset takes 100 ms, so it is for a chip that does not answer.
            if !function.reset()? {
                return Err(error);
            }
            function.set_command(false)?;
        }
        self.reload();
        self.mask_interrupts();
        Ok(())
    }

    /// Waits until the registers are loaded from the NVM. What is written before is lost.
    fn reload(&self) {
        let mut left = RELOAD;
        while self.bar.read32(EECD) & EECD_AUTO_RD == 0 && !left.is_zero() {
            self.bar.pause(RELOAD_STEP);
            left = left.saturating_sub(RELOAD_STEP);
        }
    }

    fn mask_interrupts(&self) {
        self.bar.write32(IMC, u32::MAX);
        self.bar.write32(EIMC, u32::MAX);
    }
}
