//! Behavior of the chips that QEMU's models lack: reloads from the NVM, resets that hang, 32-bit addresses.
//! Time passes only while the driver waits ([`Registers::elapse`](vireo_eal::mmio::Registers::elapse)), so
//! that a wait that is too short fails on every machine.

use std::time::Duration;

use vireo_bus_pci::DeviceId;

use super::registers::*;
use crate::fakedev::intel::RegisterFile;

/// Time from CTRL.RST to the end of the reload (SDM 14.3; Linux's e1000_main.c has the same 5 ms).
const RELOAD_PCI: Duration = Duration::from_millis(5);
/// Time from CTRL_EXT.EE_RST to the end of the reload of an 82544.
const RELOAD_82544: Duration = Duration::from_millis(2);
/// Time from CTRL.RST to EECD.AUTO_RD, which the 82574 reports.
const AUTO_READ: Duration = Duration::from_millis(3);
/// Time from EECD.AUTO_RD to a configured PHY, which the 82574 does not report.
const PHY_SETUP: Duration = Duration::from_millis(25);
/// Number of requests for MDIO ownership that the firmware refuses first.
const REFUSALS: u8 = 2;
/// Number of STATUS reads until the last request on PCI Express is done.
const DRAIN: u8 = 2;

/// Chips that behave differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// 82544: reset through I/O space, reload on request, no management.
    I82544,
    /// 82540: reset through I/O space, 32-bit addresses.
    I82540,
    /// 82545EM and 82546EB: like the 82540, but no write may cross 64 KiB (erratum 23).
    I82545,
    /// 82545GM and 82546GB: reset through CTRL_DUP.
    Rev3,
    /// 82574 and 82583, on PCI Express.
    I82574,
}

/// State of a chip in addition to its registers.
#[derive(Debug)]
pub(super) struct Silicon {
    kind: Kind,
    /// Remaining time of a reload, during which writes are lost.
    reload: Option<Duration>,
    /// The registers have not been loaded since the reset (82544).
    blank: bool,
    /// The chip no longer responds.
    pub(super) hung: bool,
    /// A reset interrupted an access of the firmware to the PHY.
    pub(super) phy_lost: bool,
    /// The chip is in a PCI-X slot.
    pub(super) pcix: bool,
    /// Value of IOADDR.
    pub(super) io_address: u32,
    refusals: u8,
    draining: u8,
}

impl Silicon {
    pub(super) fn new(id: DeviceId) -> Self {
        let kind = match id.device {
            0x1008 | 0x100C | 0x100D => Kind::I82544,
            0x100F | 0x1010 | 0x101D => Kind::I82545,
            0x1026 | 0x1079 | 0x1099 | 0x10B5 => Kind::Rev3,
            0x10D3 | 0x10F6 | 0x150C => Kind::I82574,
            _ => Kind::I82540,
        };
        Self {
            kind,
            reload: None,
            blank: false,
            hung: false,
            phy_lost: false,
            pcix: false,
            io_address: 0,
            refusals: REFUSALS,
            draining: DRAIN,
        }
    }

    pub(super) fn is_82574(&self) -> bool {
        self.kind == Kind::I82574
    }

    /// Ignores the address lines that a NIC on conventional PCI does not have.
    pub(super) fn address(&self, address: u64) -> u64 {
        if self.is_82574() || self.pcix { address } else { address & 0xFFFF_FFFF }
    }

    /// Registers that the NVM sets: some bits contradict the errata, and ASF's ARP filter is on.
    pub(super) fn defaults(&self) -> &'static [(u64, u32)] {
        match self.kind {
            Kind::I82544 => &[(CTRL, 0x0000_0941)],
            Kind::I82574 => {
                &[(CTRL, 0x2010_0241), (CTRL_EXT, 0x0080_0000), (TARC0, 0x0800_0403), (MANC, MANC_ARP_EN)]
            }
            _ => &[(CTRL, 0x0000_0A41), (MANC, MANC_ARP_EN)],
        }
    }

    /// Begins a reset, which the driver requests with or without MDIO ownership.
    pub(super) fn reset(&mut self, owns_mdio: bool, bus_master: bool) {
        self.hung |= self.is_82574() && bus_master && self.draining > 0;
        self.phy_lost |= self.is_82574() && !owns_mdio;
        self.refusals = REFUSALS;
        self.draining = DRAIN;
        self.blank = self.kind == Kind::I82544;
        self.reload = match self.kind {
            Kind::I82544 => None,
            Kind::I82574 => Some(AUTO_READ + PHY_SETUP),
            _ => Some(RELOAD_PCI),
        };
    }

    pub(super) fn elapse(&mut self, time: Duration) {
        self.reload = self.reload.and_then(|left| left.checked_sub(time)).filter(|left| !left.is_zero());
    }

    /// Returns the result of a read of `offset` where it differs from the register's value.
    pub(super) fn read(&mut self, offset: u64, bus_master: bool, ctrl: u32) -> Option<u32> {
        if self.hung {
            return Some(u32::MAX);
        }
        let loading = self.reload.is_some() || self.blank;
        match offset {
            EECD if self.is_82574() && self.reload.is_some_and(|left| left > PHY_SETUP) => Some(0),
            CTRL if loading => Some(self.defaults()[0].1),
            RAL0 | RAH0 | MDIC if loading => Some(0xDEAD_BEEF),
            STATUS if self.is_82574() => {
                if ctrl & CTRL_GIO_MASTER_DISABLE != 0 {
                    self.draining = self.draining.saturating_sub(1);
                } else {
                    self.draining = if bus_master { DRAIN } else { 0 };
                }
                None
            }
            _ => None,
        }
    }

    /// Chip-specific bits of STATUS.
    pub(super) fn status(&self) -> u32 {
        match self.kind {
            Kind::I82574 if self.draining > 0 => STATUS_GIO_MASTER_ENABLE,
            _ if self.pcix => STATUS_PCIX_MODE,
            _ => 0,
        }
    }

    /// Whether the register at `offset` accepts a write through memory space.
    pub(super) fn takes(&mut self, offset: u64, value: u32) -> bool {
        let resets = value & CTRL_RST != 0;
        match (offset, self.kind) {
            _ if self.hung => false,
            (CTRL, Kind::I82574) | (CTRL_DUP, Kind::Rev3) if resets => true,
            // The other chips do not acknowledge the write (e1000_hw.c of Linux, e1000_reset_hw).
            (CTRL, _) if resets => {
                self.hung = true;
                false
            }
            (CTRL_EXT, Kind::I82544) if value & CTRL_EXT_EE_RST != 0 => {
                self.blank = false;
                self.reload = Some(RELOAD_82544);
                true
            }
            // Firmware releases the PHY after a while.
            (EXTCNF_CTRL, _) if value & EXTCNF_SW_OWNS_MDIO != 0 && self.refusals > 0 => {
                self.refusals -= 1;
                false
            }
            _ => self.reload.is_none() && !self.blank,
        }
    }

    /// Whether a write of `value` through I/O space, to the register that IOADDR selects, resets the chip.
    pub(super) fn is_io_reset(&self, value: u32) -> bool {
        let by_io = matches!(self.kind, Kind::I82544 | Kind::I82540 | Kind::I82545);
        !self.hung && by_io && u64::from(self.io_address) == CTRL && value & CTRL_RST != 0
    }

    /// Whether the chip survives an access to the ring of `len` bytes at `base`.
    pub(super) fn may_use(&mut self, base: u64, len: u64) -> bool {
        let crosses = base >> 16 != (base + len.max(1) - 1) >> 16;
        self.hung |= self.kind == Kind::I82545 && crosses;
        !self.hung
    }

    /// Whether no setting makes the 82574 lose completions on PCI Express, after which the ring stays full
    /// (82574 specification update; e1000e's 82571.c in Linux).
    pub(super) fn keeps_completions(&self, registers: &RegisterFile, aspm: bool) -> bool {
        let bits = |offset, set: u32, clear: u32| registers.get(offset) & (set | clear) == set;
        !self.is_82574()
            || !aspm
                && bits(GCR, 1 << 22, 0)
                && bits(GCR2, 1, 0)
                && bits(CTRL_EXT, 1 << 22, 1 << 23)
                && bits(CTRL, 0, 1 << 29)
                && bits(TARC0, 1 << 26, 0xF << 27)
    }

    /// Pads a short frame as the chip does: an 8254x with the previous contents of the FIFO, an 82574 with
    /// zeros and from 17 bytes on (DS 10.2.6, TCTL.PSP).
    pub(super) fn pad(&self, frame: &mut Vec<u8>) {
        let fill = if self.is_82574() { 0 } else { 0xA5 };
        if (17..60).contains(&frame.len()) {
            frame.resize(60, fill);
        }
    }
}
