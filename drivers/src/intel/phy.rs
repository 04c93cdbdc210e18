//! PHY access, and the flow control negotiated with the link partner.

use vireo_eal::Result;

use super::Hardware;
use super::regs::*;
use crate::port::{FCS, STANDARD_FRAME};

/// Time for which the link partner pauses, in units of 512 bit times. XON ends the pause early (Linux,
/// `E1000_FC_PAUSE_TIME`).
const PAUSE_TIME: u32 = 0x0680;

/// Access to a chip's PHY, which firmware may use too.
pub trait Phy {
    /// Acquires the PHY from the firmware.
    ///
    /// # Errors
    /// `Protocol` when the firmware does not release the PHY.
    fn acquire_phy(&self, hardware: &Hardware) -> Result<()>;

    /// Releases the PHY to the firmware.
    fn release_phy(&self, hardware: &Hardware);

    /// Wakes a PHY that the kernel driver put to sleep, so that it negotiates. The caller must own the PHY.
    ///
    /// # Errors
    /// `Protocol` when the PHY does not answer.
    fn wake_phy(&self, hardware: &Hardware) -> Result<()>;
}

/// Wakes the PHY unless the link is up.
///
/// # Errors
/// The same as [`Phy::acquire_phy`] and [`Phy::wake_phy`], and `Unavailable` when the device is gone.
pub(super) fn wake(chip: &impl Phy, hardware: &Hardware) -> Result<()> {
    if hardware.wait("start", STATUS, |_| true)? & STATUS_LU != 0 {
        return Ok(());
    }
    chip.acquire_phy(hardware)?;
    let woken = chip.wake_phy(hardware);
    chip.release_phy(hardware);
    woken
}

/// Sets flow control for a link that has come up. `status` is the value of STATUS.
pub(super) fn follow_link(chip: &impl Phy, hardware: &Hardware, status: u32) {
    let agreed = negotiated(chip, hardware, status).unwrap_or_else(|error| {
        tracing::warn!("{error}; it runs without flow control");
        (false, false)
    });
    hardware.set_flow_control(agreed);
}

/// Returns whether PAUSE frames are obeyed and sent, as negotiated. Both are false on a half-duplex link.
fn negotiated(chip: &impl Phy, hardware: &Hardware, status: u32) -> Result<(bool, bool)> {
    if status & STATUS_FD == 0 {
        return Ok((false, false));
    }
    chip.acquire_phy(hardware)?;
    let agreed = hardware.agreed_flow_control();
    chip.release_phy(hardware);
    agreed
}

/// Returns FCRTL and FCRTH (SDM 13.4, DS 10.2.2, 82576 8.5) for a receive FIFO of `kib` KiB, which the chip
/// compares in steps of `step` bytes. XOFF is sent when the FIFO is nine tenths full, or earlier if needed to
/// leave room for one more frame of `max_frame` bytes. Zeros disable XOFF.
fn watermarks(kib: u32, step: u32, max_frame: usize) -> [u32; 2] {
    let headroom = (max_frame.max(STANDARD_FRAME) + FCS).next_multiple_of(8) as u32;
    let bytes = kib.saturating_mul(1024);
    let high = (bytes / 10 * 9).min(bytes.saturating_sub(headroom)).min(0xFFFF) & !(step - 1);
    match high.checked_sub(step) {
        Some(low) if low > 0 => [low | FCRTL_XONE, high],
        _ => [0, 0],
    }
}

/// Returns whether PAUSE frames are obeyed and sent, given what both ends advertise (IEEE 802.3, table
/// 28B-3).
fn resolve(own: u16, partner: u16) -> (bool, bool) {
    let bits = |ability: u16| (ability & PHY_PAUSE != 0, ability & PHY_ASM_DIR != 0);
    match (bits(own), bits(partner)) {
        ((true, _), (true, _)) => (true, true),
        ((true, true), (false, true)) => (true, false),
        ((false, true), (true, true)) => (false, true),
        _ => (false, false),
    }
}

impl Hardware {
    /// Performs `operation` on PHY register `register`. Returns the register's value, or `None` if the
    /// operation failed.
    pub(crate) fn mdic(&self, operation: u32, register: u32) -> Result<Option<u16>> {
        self.bar.write32(MDIC, operation | register << MDIC_REG_SHIFT | MDIC_PHY);
        let mdic = self.wait("access the PHY of", MDIC, |mdic| mdic & (MDIC_READY | MDIC_ERROR) != 0)?;
        Ok((mdic & MDIC_ERROR == 0).then_some(mdic as u16))
    }

    /// Returns whether PAUSE frames are obeyed and sent, as both ends negotiated. Both are false if
    /// negotiation did not complete. The caller must own the PHY.
    fn agreed_flow_control(&self) -> Result<(bool, bool)> {
        let mut values = [0; 3];
        for (value, register) in values.iter_mut().zip([PHY_STATUS, PHY_ADVERTISED, PHY_PARTNER]) {
            *value = self.mdic(MDIC_OP_READ, register)?.unwrap_or(0);
        }
        let [status, own, partner] = values;
        Ok(if status & PHY_STATUS_AUTONEG_COMPLETE != 0 { resolve(own, partner) } else { (false, false) })
    }

    /// Makes the chip recognize PAUSE frames, so that they are never received like others, and sets the
    /// watermarks at which it sends them (SDM 13.4, DS 10.2.2, 82576 8.5). The receive FIFO has `kib` KiB and
    /// is compared in steps of `step` bytes. Frames have up to `max_frame` bytes. Once there is a link, CTRL
    /// selects whether the chip obeys and sends PAUSE frames.
    pub(crate) fn prepare_flow_control(&self, kib: u32, step: u32, max_frame: usize) {
        let (bar, [low, high]) = (&self.bar, watermarks(kib, step, max_frame));
        bar.write32(FCAL, FLOW_CONTROL_ADDRESS_LOW);
        bar.write32(FCAH, FLOW_CONTROL_ADDRESS_HIGH);
        bar.write32(FCT, FLOW_CONTROL_TYPE);
        bar.write32(FCTTV, PAUSE_TIME);
        bar.write32(FCRTL, low);
        bar.write32(FCRTH, high);
    }

    /// Sets CTRL.RFCE and CTRL.TFCE: whether the chip obeys and sends PAUSE frames.
    fn set_flow_control(&self, (obeys, sends): (bool, bool)) {
        let flags = if obeys { CTRL_RFCE } else { 0 } | if sends { CTRL_TFCE } else { 0 };
        let old = self.bar.read32(CTRL);
        // All ones mean that the device is gone.
        if old != u32::MAX {
            self.bar.write32(CTRL, old & !(CTRL_RFCE | CTRL_TFCE) | flags);
        }
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
        assert_eq!(watermarks(20, 8, 1514), [0x47F8 | FCRTL_XONE, 0x4800]);
        assert_eq!(watermarks(48, 8, 1514), [0xACC0 | FCRTL_XONE, 0xACC8]);
        assert_eq!(watermarks(64, 16, 1514), [0xE650 | FCRTL_XONE, 0xE660]);
        // 21 KiB minus a frame of 9018 bytes.
        assert_eq!(watermarks(21, 8, 9014), [0x30B8 | FCRTL_XONE, 0x30C0]);
        assert_eq!([watermarks(0, 8, 1514), watermarks(1, 8, 1514)], [[0, 0]; 2]);
        for (kib, step) in (2..256).flat_map(|kib| [(kib, 8), (kib, 16)]) {
            for (max_frame, on_wire) in [(1514, 1522), (9724, 9728)] {
                let [low, high] = watermarks(kib, step, max_frame);
                assert!(high == 0 || high + on_wire <= kib * 1024 && low & !FCRTL_XONE < high, "{kib}");
                assert!(high % step == 0 && high <= 0xFFFF && (high > 0 || on_wire > 1522), "{kib}");
            }
        }
    }
}
