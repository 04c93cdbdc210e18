//! The way to the PHY, which firmware and the chip's other ports use too (DS 4.5 and 8.7).

use std::time::Duration;

use vireo_eal::{ErrorKind, Result};

use super::Device;
use super::chip::Chip;
use super::regs::*;

/// Between two tries for the semaphore, and their number. Linux (`igb_get_hw_semaphore`) tries for longer.
const SEMAPHORE_RETRY: Duration = Duration::from_micros(50);
const SEMAPHORE_RETRIES: u32 = 2000;
/// Between two looks at whether others are done with the PHY, and their number (Linux, `igb_acquire_swfw_sync_82575`).
const PHY_RETRY: Duration = Duration::from_millis(5);
const PHY_RETRIES: u32 = 200;

impl Device {
    /// Polls SWSM until `done`; false if it is not after a tenth of a second.
    fn poll_semaphore(&self, done: impl Fn(u32) -> bool) -> bool {
        (0..SEMAPHORE_RETRIES).any(|_| {
            done(self.bar.read32(SWSM)) || {
                self.bar.pause(SEMAPHORE_RETRY);
                false
            }
        })
    }

    /// Takes the semaphore that guards SW_FW_SYNC, from other drivers and from firmware.
    fn lock(&self) -> bool {
        let taken = self.poll_semaphore(|swsm| swsm & SWSM_SMBI == 0)
            && self.poll_semaphore(|swsm| {
                self.bar.write32(SWSM, swsm | SWSM_SWESMBI);
                self.bar.read32(SWSM) & SWSM_SWESMBI != 0
            });
        if !taken {
            self.unlock();
        }
        taken
    }

    /// Releases the semaphore. [`Device::lock`] also does where it fails, after a tenth of a second: a killed process may have
    /// left the semaphore taken, and no owner needs it for so long (DPDK's igb, `igb_reset_swfw_lock`).
    fn unlock(&self) {
        self.hardware().change(SWSM, 0, SWSM_SMBI | SWSM_SWESMBI);
    }

    /// Bit of this port's PHY for software.
    fn phy_bit(&self) -> u32 {
        let port = self.bar.read32(STATUS) >> STATUS_LAN_ID_SHIFT & STATUS_LAN_ID;
        SW_FW_SYNC_PHY[port as usize]
    }

    /// Makes firmware leave the PHY alone.
    ///
    /// # Errors
    /// `Protocol` when the firmware does not give it away.
    fn own_phy(&self) -> Result<()> {
        let bit = self.phy_bit();
        for _ in 0..PHY_RETRIES {
            if !self.lock() {
                break;
            }
            let used = self.bar.read32(SW_FW_SYNC);
            let free = used & (bit | bit << SW_FW_SYNC_FIRMWARE_SHIFT) == 0;
            if free {
                self.bar.write32(SW_FW_SYNC, used | bit);
            }
            self.unlock();
            if free {
                return Ok(());
            }
            self.bar.pause(PHY_RETRY);
        }
        Err(self.error(ErrorKind::Protocol, "reach the PHY of", "the firmware does not give it away"))
    }

    /// Gives the PHY back to firmware and the other ports, also where the semaphore cannot be taken.
    pub(super) fn disown_phy(&self) {
        let bit = self.phy_bit();
        let _ = self.lock();
        self.hardware().change(SW_FW_SYNC, 0, bit);
        self.unlock();
    }

    /// Wakes a PHY that the kernel's driver put to sleep, and has it negotiate where it has not; a link that is up stays up.
    pub(super) fn wake_phy(&self) -> Result<()> {
        let hardware = self.hardware();
        if self.chip == Chip::I350 {
            // Linux, `igb_setup_copper_link_82575`.
            hardware.change(PHPM, 0, PHPM_GO_LINKD);
        }
        if hardware.wait("start", STATUS, |_| true)? & STATUS_LU != 0 {
            return Ok(());
        }
        self.own_phy()?;
        let woken = self.negotiate();
        self.disown_phy();
        woken
    }

    /// Restarts the negotiation unless it is complete, in which case STATUS.LU follows. QEMU's PHY does not negotiate by itself
    /// after a reset.
    fn negotiate(&self) -> Result<()> {
        let hardware = self.hardware();
        let read = |register| hardware.mdic(MDIC_OP_READ, register);
        let (Some(control), Some(status)) = (read(PHY_CONTROL)?, read(PHY_STATUS)?) else { return Ok(()) };
        let sleeps = control & PHY_CONTROL_POWER_DOWN != 0;
        let negotiates = control & PHY_CONTROL_AUTONEG != 0;
        let begins = negotiates && (sleeps || status & PHY_STATUS_AUTONEG_COMPLETE == 0);
        if sleeps || begins {
            let restart = if begins { PHY_CONTROL_RESTART_AUTONEG } else { 0 };
            let control = control & !PHY_CONTROL_POWER_DOWN | restart;
            hardware.mdic(MDIC_OP_WRITE | u32::from(control), PHY_CONTROL)?;
        }
        Ok(())
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
        self.own_phy()?;
        let agreed = self.hardware().agreed_flow_control();
        self.disown_phy();
        agreed
    }
}
