//! PHY access, shared with firmware and the chip's other ports (DS 4.5 and 8.7).

use std::time::Duration;

use vireo_eal::{ErrorKind, Result};

use super::Igb;
use super::regs::*;
use crate::intel::{Hardware, Phy};

/// Interval between attempts to take the semaphore, and the number of attempts. Linux
/// (`igb_get_hw_semaphore`) tries for longer.
const SEMAPHORE_RETRY: Duration = Duration::from_micros(50);
const SEMAPHORE_RETRIES: u32 = 2000;
/// Interval between checks whether the PHY is free, and the number of checks (Linux,
/// `igb_acquire_swfw_sync_82575`).
const PHY_RETRY: Duration = Duration::from_millis(5);
const PHY_RETRIES: u32 = 200;

/// Polls SWSM until `done` returns true. Returns false after a tenth of a second.
fn poll_semaphore(hardware: &Hardware, done: impl Fn(u32) -> bool) -> bool {
    (0..SEMAPHORE_RETRIES).any(|_| {
        done(hardware.bar.read32(SWSM)) || {
            hardware.bar.pause(SEMAPHORE_RETRY);
            false
        }
    })
}

/// Takes the semaphore that guards SW_FW_SYNC against other drivers and firmware. Returns whether that
/// succeeded.
fn lock(hardware: &Hardware) -> bool {
    let taken = poll_semaphore(hardware, |swsm| swsm & SWSM_SMBI == 0)
        && poll_semaphore(hardware, |swsm| {
            hardware.bar.write32(SWSM, swsm | SWSM_SWESMBI);
            hardware.bar.read32(SWSM) & SWSM_SWESMBI != 0
        });
    if !taken {
        unlock(hardware);
    }
    taken
}

/// Releases the semaphore. [`lock`] also calls this when it fails after a tenth of a second: a killed process
/// may have left the semaphore taken, and no owner needs it that long (DPDK's igb, `igb_reset_swfw_lock`).
fn unlock(hardware: &Hardware) {
    hardware.change(SWSM, 0, SWSM_SMBI | SWSM_SWESMBI);
}

/// Returns the bit with which software acquires this port's PHY.
fn phy_bit(hardware: &Hardware) -> u32 {
    let port = hardware.bar.read32(STATUS) >> STATUS_LAN_ID_SHIFT & STATUS_LAN_ID;
    SW_FW_SYNC_PHY[port as usize]
}

impl Phy for Igb {
    fn acquire_phy(&self, hardware: &Hardware) -> Result<()> {
        let bit = phy_bit(hardware);
        for _ in 0..PHY_RETRIES {
            if !lock(hardware) {
                break;
            }
            let used = hardware.bar.read32(SW_FW_SYNC);
            let free = used & (bit | bit << SW_FW_SYNC_FIRMWARE_SHIFT) == 0;
            if free {
                hardware.bar.write32(SW_FW_SYNC, used | bit);
            }
            unlock(hardware);
            if free {
                return Ok(());
            }
            hardware.bar.pause(PHY_RETRY);
        }
        Err(hardware.error(ErrorKind::Protocol, "access the PHY of", "the firmware does not release it"))
    }

    /// Releases the PHY even if the semaphore cannot be taken.
    fn release_phy(&self, hardware: &Hardware) {
        let bit = phy_bit(hardware);
        let _ = lock(hardware);
        hardware.change(SW_FW_SYNC, 0, bit);
        unlock(hardware);
    }

    /// Powers up the PHY, and restarts auto-negotiation unless it is complete, in which case STATUS.LU
    /// follows. QEMU's PHY does not negotiate by itself after a reset.
    fn wake_phy(&self, hardware: &Hardware) -> Result<()> {
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
}
