//! Reset (DS 4.2).

use std::time::Duration;

use vireo_eal::Result;

use super::Igb;
use super::regs::*;
use crate::intel::{Hardware, Reset};

/// Longest wait for the reload from the NVM, and the polling interval. The driver then continues, as Linux
/// does (`igb_get_auto_rd_done`), because a chip without an NVM never sets EEC.AUTO_RD, and neither does
/// QEMU's model.
const RELOAD: Duration = Duration::from_millis(20);
const RELOAD_STEP: Duration = Duration::from_millis(1);

impl Reset for Igb {
    const INTERRUPT_MASKS: &'static [u64] = &[IMC, EIMC];
    const RESET_NEEDS_PHY: bool = false;
    /// DS 4.2.1.6.1.
    const REST: Duration = Duration::from_millis(1);

    fn is_express(&self) -> bool {
        true
    }

    fn write_reset(&self, hardware: &Hardware) -> Result<()> {
        hardware.change(CTRL, CTRL_RST, 0);
        Ok(())
    }

    fn reload(&self, hardware: &Hardware) -> Result<()> {
        let mut left = RELOAD;
        while hardware.bar.read32(EECD) & EECD_AUTO_RD == 0 && !left.is_zero() {
            hardware.bar.pause(RELOAD_STEP);
            left = left.saturating_sub(RELOAD_STEP);
        }
        Ok(())
    }
}
