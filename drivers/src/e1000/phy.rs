//! The way to the PHY, and what it and its partner agreed on.

use std::time::Duration;

use vireo_eal::{ErrorKind, Result};

use super::Device;
use super::regs::*;

/// Between two requests for MDIO ownership, and their number (Linux, `e1000_get_hw_semaphore_82573`).
const MDIO_RETRY: Duration = Duration::from_millis(2);
const MDIO_RETRIES: u32 = 10;

/// Frames that the FIFO has room for above the high watermark: one of 1522 bytes, in steps of 8.
const HEADROOM: u32 = 1528;
/// Bytes between the watermarks.
const HYSTERESIS: u32 = 8;
/// Time that the partner pauses, in units of 512 bit times; XON ends it before (Linux, `E1000_FC_PAUSE_TIME`).
const PAUSE_TIME: u32 = 0x0680;

/// FCRTL and FCRTH (SDM 13.4, DS 10.2.2) for a receive FIFO of `kib`: XOFF is sent at nine tenths of it, and while
/// there is room for one more frame. Zeroes send none.
fn watermarks(kib: u32) -> [u32; 2] {
    let bytes = kib * 1024;
    let high = (bytes / 10 * 9).min(bytes.saturating_sub(HEADROOM)) & FCRTH_RTH;
    match high.checked_sub(HYSTERESIS) {
        Some(low) if low > 0 => [low | FCRTL_XONE, high],
        _ => [0, 0],
    }
}

/// Whether PAUSE frames are obeyed and sent, by what both ends advertise (IEEE 802.3, table 28B-3).
fn resolve(own: u16, partner: u16) -> (bool, bool) {
    let bits = |ability: u16| (ability & PHY_PAUSE != 0, ability & PHY_ASM_DIR != 0);
    match (bits(own), bits(partner)) {
        ((true, _), (true, _)) => (true, true),
        ((true, true), (false, true)) => (true, false),
        ((false, true), (true, true)) => (false, true),
        _ => (false, false),
    }
}

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
        Err(self.error(ErrorKind::Protocol, "reach the PHY of", "the firmware does not give it away"))
    }

    /// Gives the PHY back to the firmware.
    pub(super) fn disown_mdio(&self) {
        if self.chip.is_82574() {
            let old = self.bar.read32(EXTCNF_CTRL);
            self.bar.write32(EXTCNF_CTRL, old & !EXTCNF_CTRL_MDIO_SW_OWNERSHIP);
        }
    }

    /// Does `operation` with PHY register `register`; gives what was read, or none where the PHY refused.
    fn mdic(&self, operation: u32, register: u32) -> Result<Option<u16>> {
        self.bar.write32(MDIC, operation | register << MDIC_REG_SHIFT | MDIC_PHY);
        let mdic = self.wait("reach the PHY of", MDIC, |mdic| mdic & (MDIC_READY | MDIC_ERROR) != 0)?;
        Ok((mdic & MDIC_ERROR == 0).then_some(mdic as u16))
    }

    /// Wakes a PHY that the kernel's driver put to sleep; it then negotiates by itself.
    pub(super) fn wake_phy(&self) -> Result<()> {
        if self.wait("start", STATUS, |_| true)? & STATUS_LU != 0 {
            return Ok(());
        }
        self.own_mdio()?;
        let woken = self.mdic(MDIC_OP_READ, PHY_CONTROL).and_then(|control| match control {
            Some(control) if control & PHY_CONTROL_POWER_DOWN != 0 => {
                self.mdic(MDIC_OP_WRITE | u32::from(control & !PHY_CONTROL_POWER_DOWN), PHY_CONTROL).map(drop)
            }
            _ => Ok(()),
        });
        self.disown_mdio();
        woken
    }

    /// Writes what makes the chip know PAUSE frames, so that they are never received as others are, and when to
    /// send some (SDM 13.4, DS 10.2.2). Whether it obeys and sends them is CTRL's, once there is a link.
    pub(super) fn prepare_flow_control(&self) {
        let bar = &self.bar;
        bar.write32(FCAL, FLOW_CONTROL_ADDRESS_LOW);
        bar.write32(FCAH, FLOW_CONTROL_ADDRESS_HIGH);
        bar.write32(FCT, FLOW_CONTROL_TYPE);
        bar.write32(FCTTV, PAUSE_TIME);
        let [low, high] = watermarks(bar.read32(PBA) & PBA_RXA);
        bar.write32(FCRTL, low);
        bar.write32(FCRTH, high);
    }

    /// Sets CTRL.RFCE and TFCE for a link that has come up.
    pub(super) fn follow_link(&self, status: u32) {
        let (obeys, sends) = self.negotiated(status).unwrap_or_else(|error| {
            tracing::warn!("{error}; it runs without flow control");
            (false, false)
        });
        let flags = if obeys { CTRL_RFCE } else { 0 } | if sends { CTRL_TFCE } else { 0 };
        let old = self.bar.read32(CTRL);
        // All ones: the device is gone.
        if old != u32::MAX {
            self.bar.write32(CTRL, old & !(CTRL_RFCE | CTRL_TFCE) | flags);
        }
    }

    /// What the ends of the link agreed on; nothing where they did not negotiate, or for one direction at a time.
    fn negotiated(&self, status: u32) -> Result<(bool, bool)> {
        if status & STATUS_FD == 0 {
            return Ok((false, false));
        }
        self.own_mdio()?;
        let read = || -> Result<[u16; 3]> {
            let mut values = [0; 3];
            for (value, register) in values.iter_mut().zip([PHY_STATUS, PHY_ADVERTISED, PHY_PARTNER]) {
                *value = self.mdic(MDIC_OP_READ, register)?.unwrap_or(0);
            }
            Ok(values)
        };
        let values = read();
        self.disown_mdio();
        let [status, own, partner] = values?;
        Ok(if status & PHY_STATUS_AUTONEG_COMPLETE != 0 { resolve(own, partner) } else { (false, false) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_is_resolved_as_the_standard_has_it() {
        let (none, pause, both, asm) = (0, PHY_PAUSE, PHY_PAUSE | PHY_ASM_DIR, PHY_ASM_DIR);
        for (own, partner, wanted) in [
            (none, both, (false, false)),
            (asm, pause, (false, false)),
            (asm, both, (false, true)),
            (pause, asm, (false, false)),
            (pause, pause, (true, true)),
            (both, pause, (true, true)),
            (both, none, (false, false)),
            (both, asm, (true, false)),
        ] {
            assert_eq!(resolve(own, partner), wanted, "{own:#x} {partner:#x}");
        }
    }

    #[test]
    fn watermarks_leave_room_for_a_frame() {
        assert_eq!(watermarks(20), [0x47F8 | FCRTL_XONE, 0x4800]);
        assert_eq!(watermarks(48), [0xACC0 | FCRTL_XONE, 0xACC8]);
        assert_eq!([watermarks(0), watermarks(1)], [[0, 0]; 2]);
        for kib in 2..64 {
            let [low, high] = watermarks(kib);
            assert!(high + 1522 <= kib * 1024 && low & !FCRTL_XONE < high && high % 8 == 0, "{kib}");
        }
    }
}
