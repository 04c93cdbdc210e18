//! PHY access. Only the 82574 shares its PHY with firmware (DS 10.2.2, EXTCNF_CTRL).

use std::time::Duration;

use vireo_eal::{ErrorKind, Result};

use super::E1000;
use super::regs::*;
use crate::intel::{Hardware, Phy, Reset};

/// Interval between requests for MDIO ownership, and the number of requests (Linux,
/// `e1000_get_hw_semaphore_82573`).
const MDIO_RETRY: Duration = Duration::from_millis(2);
const MDIO_RETRIES: u32 = 10;

impl Phy for E1000 {
    fn acquire_phy(&self, hardware: &Hardware) -> Result<()> {
        if !self.is_express() {
            return Ok(());
        }
        for _ in 0..MDIO_RETRIES {
            hardware.change(EXTCNF_CTRL, EXTCNF_CTRL_MDIO_SW_OWNERSHIP, 0);
            if hardware.bar.read32(EXTCNF_CTRL) & EXTCNF_CTRL_MDIO_SW_OWNERSHIP != 0 {
                return Ok(());
            }
            hardware.bar.pause(MDIO_RETRY);
        }
        self.release_phy(hardware);
        Err(hardware.error(ErrorKind::Protocol, "access the PHY of", "the firmware does not release it"))
    }

    fn release_phy(&self, hardware: &Hardware) {
        if self.is_express() {
            hardware.change(EXTCNF_CTRL, 0, EXTCNF_CTRL_MDIO_SW_OWNERSHIP);
        }
    }

    /// Powers up the PHY, which then negotiates by itself.
    fn wake_phy(&self, hardware: &Hardware) -> Result<()> {
        match hardware.mdic(MDIC_OP_READ, PHY_CONTROL)? {
            Some(control) if control & PHY_CONTROL_POWER_DOWN != 0 => hardware
                .mdic(MDIC_OP_WRITE | u32::from(control & !PHY_CONTROL_POWER_DOWN), PHY_CONTROL)
                .map(drop),
            _ => Ok(()),
        }
    }
}
