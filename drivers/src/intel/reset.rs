//! Reset, after which a chip starts no DMA.

use std::time::Duration;

use vireo_eal::Result;

use super::regs::*;
use super::{Hardware, Phy};

/// Reset of a chip family.
pub trait Reset {
    /// Registers that mask all interrupts when written with all ones.
    const INTERRUPT_MASKS: &'static [u64];
    /// Whether software must own the PHY during the reset.
    const RESET_NEEDS_PHY: bool;
    /// Delay after CTRL.RST, before the next access.
    const REST: Duration;

    /// Whether the chip is on PCI Express.
    fn is_express(&self) -> bool;

    /// Sets CTRL.RST in the chip-specific way that does not hang the chip.
    ///
    /// # Errors
    /// When the kernel refuses a write to config space.
    fn write_reset(&self, hardware: &Hardware) -> Result<()>;

    /// Waits until the registers are loaded from the NVM. Earlier register writes are lost.
    ///
    /// # Errors
    /// `Protocol` when the chip does not finish loading.
    fn reload(&self, hardware: &Hardware) -> Result<()>;

    /// Corrects registers that the reset leaves in an unsuitable state.
    fn settle(&self, _hardware: &Hardware) {}
}

/// Ends all DMA and returns the registers that matter to their reset values. After success, memory that the
/// device could access can be reused.
///
/// # Errors
/// `Unavailable` when the device is gone; `Protocol` when it does not finish its reset.
pub(super) fn quiesce<C: Reset + Phy>(chip: &C, hardware: &Hardware) -> Result<()> {
    let (function, bar) = (&hardware.function, &hardware.bar);
    let mask_interrupts = || C::INTERRUPT_MASKS.iter().for_each(|register| bar.write32(*register, u32::MAX));
    function.set_command(false)?;
    hardware.wait("reset", STATUS, |_| true)?;
    mask_interrupts();
    bar.write32(RCTL, 0);
    bar.write32(TCTL, 0);
    if chip.is_express() {
        // Requests that are outstanding at CTRL.RST can hang PCI Express (DS 10.2.2, CTRL; Linux,
        // `igb_reset_hw_82575`).
        hardware.change(CTRL, CTRL_GIO_MASTER_DISABLE, 0);
        if let Err(error) = hardware.wait("pause", STATUS, |status| status & STATUS_GIO_MASTER_ENABLE == 0) {
            tracing::warn!("{error}");
        }
    }
    let owns_phy = C::RESET_NEEDS_PHY && chip.acquire_phy(hardware).is_ok();
    chip.write_reset(hardware)?;
    bar.pause(C::REST);
    let reset = hardware.wait("reset", CTRL, |ctrl| ctrl & CTRL_RST == 0).and_then(|_| chip.reload(hardware));
    if let Err(error) = reset {
        // A function reset takes 100 ms, so it is the fallback for a chip that does not answer.
        if !function.reset()? {
            return Err(error);
        }
        function.set_command(false)?;
        chip.reload(hardware)?;
    }
    if owns_phy {
        chip.release_phy(hardware);
    }
    mask_interrupts();
    chip.settle(hardware);
    Ok(())
}
