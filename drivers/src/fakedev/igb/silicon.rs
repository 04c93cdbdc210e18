//! Behavior of the chips that QEMU's model lacks: a delay after the reset, reloads from the NVM, firmware
//! that shares the PHY. Time passes only while the driver waits
//! ([`Registers::elapse`](vireo_eal::mmio::Registers::elapse)), so that a wait that is too short fails on
//! every machine.

use std::time::Duration;

use super::registers::*;

/// Time from CTRL.RST to the first access that the chip survives (DS 4.2.1.6.1).
const REST: Duration = Duration::from_millis(1);
/// Time from CTRL.RST to EEC.AUTO_RD.
const RELOAD: Duration = Duration::from_millis(4);
/// Number of STATUS reads until the last request on PCI Express is done.
const DRAIN: u8 = 2;
/// Number of attempts to set SWESMBI that firmware refuses first, and number of SW_FW_SYNC reads during which
/// it uses the PHY.
const REFUSALS: u8 = 2;

/// State of a chip in addition to its registers.
#[derive(Debug)]
pub(super) struct Silicon {
    /// Time since the reset, until the reload ends.
    reset: Option<Duration>,
    /// The chip no longer responds.
    pub(super) hung: bool,
    draining: u8,
    refusals: [u8; 2],
}

impl Silicon {
    pub(super) fn new() -> Self {
        Self { reset: None, hung: false, draining: DRAIN, refusals: [REFUSALS; 2] }
    }

    /// Begins a reset.
    pub(super) fn reset(&mut self) {
        self.hung |= self.draining > 0;
        *self = Self { reset: Some(Duration::ZERO), hung: self.hung, draining: 0, ..Self::new() };
    }

    pub(super) fn elapse(&mut self, time: Duration) {
        self.reset = self.reset.map(|since| since + time).filter(|since| *since < RELOAD);
    }

    /// Returns the result of a read of `offset` where it differs from the register's value, which is `value`.
    pub(super) fn read(&mut self, offset: u64, value: u32, bus_master: bool, ctrl: u32) -> Option<u32> {
        self.hung |= self.reset.is_some_and(|since| since < REST);
        if self.hung {
            return Some(u32::MAX);
        }
        match offset {
            EEC if self.reset.is_none() => Some(value | EEC_AUTO_RD),
            RAL0 | RAH0 | MDIC if self.reset.is_some() => Some(0x5EAD_BEEF),
            STATUS => {
                if ctrl & CTRL_GIO_MASTER_DISABLE != 0 {
                    self.draining = self.draining.saturating_sub(1);
                } else if bus_master {
                    self.draining = DRAIN;
                }
                let draining = if self.draining > 0 { STATUS_GIO_MASTER_ENABLE } else { 0 };
                Some(value & !STATUS_GIO_MASTER_ENABLE | draining)
            }
            SW_FW_SYNC if self.refusals[1] > 0 => {
                self.refusals[1] -= 1;
                Some(value | SYNC_FW_PHY1)
            }
            _ => None,
        }
    }

    /// Returns the value that a write of `value` stores at `offset`, or `None` while the registers are being
    /// loaded.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Option<u32> {
        self.hung |= self.reset.is_some_and(|since| since < REST);
        if self.hung || self.reset.is_some() {
            return None;
        }
        match offset {
            SWSM if value & SWSM_SWESMBI != 0 && self.refusals[0] > 0 => {
                self.refusals[0] -= 1;
                Some(value & !SWSM_SWESMBI)
            }
            // Software cannot set the firmware's bit. Firmware is done with the PHY after a while.
            SW_FW_SYNC => Some(value & !SYNC_FW_PHY1),
            _ => Some(value),
        }
    }

    /// Pads a short frame of 17 bytes or more.
    pub(super) fn pad(&self, frame: &mut Vec<u8>) {
        if (17..60).contains(&frame.len()) {
            frame.resize(60, 0);
        }
    }
}
