//! The way to the PHY, and what it and its partner agreed on.

use std::time::Duration;

use vireo_eal::{ErrorKind, Result};

use super::Device;
use super::regs::*;

/// Between two requests for MDIO ownership, and their number (Linux, `e1000_get_hw_semaphore_82573`).
const MDIO_RETRY: Duration = Duration::from_millis(2);
const MDIO_RETRIES: u32 = 10;

impl Device {
    /// Makes firmware leave the PHY alone; only the 82574 has it to share (DS 10.2.2, EXTCNF_CTRL).
    ///
    /// # Errors
    /// `Protocol` when the firmware does not give the PHY away.
    pub(super) fn own_mdio(&self) -> Result<()> {
        if !self.chip.is_82574() {
            return Ok(());
        }
        for _ in 0..MDIO_RETRIES {
            let old = self.bar.read32(EXTCNF_CTRL);
            self.bar.write32(EXTCNF_CTRL, old | EXTCNF_CTRL_MDIO_SW_OWNERSHIP);
            if self.bar.read32(EXTCNF_CTRL) & EXTCNF_CTRL_MDIO_SW_OWNERSHIP != 0 {
                return Ok(());
            }
            self.bar.pause(MDIO_RETRY);
        }
        self.disown_mdio();
        Err(self.hardware().error(
            ErrorKind::Protocol,
            "reach the PHY of",
            "the firmware does not give it away",
        ))
    }

    /// Gives the PHY back to the firmware.
    pub(super) fn disown_mdio(&self) {
        if self.chip.is_82574() {
            let old = self.bar.read32(EXTCNF_CTRL);
            self.bar.write32(EXTCNF_CTRL, old & !EXTCNF_CTRL_MDIO_SW_OWNERSHIP);
        }
    }

    /// Wakes a PHY that the kernel's driver put to sleep; it then negotiates by itself.
    pub(super) fn wake_phy(&self) -> Result<()> {
        if self.hardware().wait("start", STATUS, |_| true)? & STATUS_LU != 0 {
            return Ok(());
        }
        self.own_mdio()?;
        let hardware = self.hardware();
        let woken = hardware.mdic(MDIC_OP_READ, PHY_CONTROL).and_then(|control| match control {
            Some(control) if control & PHY_CONTROL_POWER_DOWN != 0 => hardware
                .mdic(MDIC_OP_WRITE | u32::from(control & !PHY_CONTROL_POWER_DOWN), PHY_CONTROL)
                .map(drop),
            _ => Ok(()),
        });
        self.disown_mdio();
        woken
    }

    /// Sets flow control for a link that has come up.
    pub(super) fn follow_link(&self, status: u32) {
        let agreed = self.negotiated(status).unwrap_or_else(|error| {
            tracing::warn!("{error}; it runs without flow control");
            (false, false)
        });
        self.hardware().set_flow_control(agreed);
    }

    /// What the ends of the link agreed on; nothing for one direction at a time.
    fn negotiated(&self, status: u32) -> Result<(bool, bool)> {
        if status & STATUS_FD == 0 {
            return Ok((false, false));
        }
        self.own_mdio()?;
        let agreed = self.hardware().agreed_flow_control();
        self.disown_mdio();
        agreed
    }
}
