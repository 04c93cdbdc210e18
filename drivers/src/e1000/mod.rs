//! Driver for Intel 8254x and 82574 Gigabit Ethernet controllers. One driver covers both because both support
//! legacy descriptors.
//!
//! | chip | id | QEMU | reset |
//! |---|---|---|---|
//! | 82540, 82544, 82545, 82546 with copper | 8086:100e and others | `e1000` | CTRL.RST, in I/O space or CTRL_DUP |
//! | 82574, 82583 | 8086:10d3, 10f6, 150c | `e1000e` | CTRL.RST, or else a function reset |
//!
//! The driver does not read the EEPROM: the chip loads the station address into its registers. The driver
//! does not renegotiate a link, so a link that is up stays up. Every wait ends after a second. Code that
//! exists only for QEMU's models says so in a comment.

mod chip;
mod desc;
mod phy;
pub mod regs;
mod reset;
#[cfg(test)]
mod tests;

use vireo_bus_pci::{CAP_ID_EXPRESS, DeviceId, Function, capabilities};
use vireo_eal::dma::MAX_FRAME;
use vireo_eal::mmio::Bar;
use vireo_eal::{ErrorKind, Result};

use self::chip::{IDS, MacType};
use self::desc::Legacy;
use self::regs::*;
use crate::intel::{self, Chip, Hardware, Reset, RingRegisters};
use crate::port::PortConfig;

/// Offset of Link Control in the PCI Express capability, and its bits for ASPM L0s and L1 (PCI Express 4.0,
/// 7.5.3.7).
const LINK_CONTROL: u16 = 0x10;
const LINK_CONTROL_ASPM: u16 = 3;
/// Granularity of FCRTL and FCRTH in bytes.
const WATERMARK_STEP: u32 = 8;

/// Longest frame of an 82574 in bytes, with its VLAN tag but without the check sequence, which Linux's
/// `DEFAULT_JUMBO` includes.
const MAX_FRAME_82574: usize = 9230;
/// Upper limit in bytes of a frame's overhead in a FIFO: its check sequence in the receive FIFO, its
/// descriptor in the transmit FIFO (Linux, `e1000_reset`).
const FIFO_OVERHEAD: usize = 20;
/// Granularity in KiB of the FIFO sizes of an 8254x (SDM 13.4, PBA). An 82574 accepts any size.
const FIFO_STEP: u32 = 8;

/// Port of an 8254x or 82574.
pub type Device = intel::Device<E1000>;
/// Receive queue of a port.
pub type RxQueue = intel::RxQueue<Legacy>;
/// Transmit queue of a port.
pub type TxQueue = intel::TxQueue<Legacy>;

/// An 8254x or 82574.
#[derive(Debug)]
pub struct E1000 {
    mac: MacType,
    /// BAR of the I/O ports, on chips that are reset through them.
    io: Option<Bar>,
}

impl Chip for E1000 {
    type Format = Legacy;

    const NAME: &'static str = "e1000";
    const IDS: &'static [(DeviceId, &'static str)] = IDS;
    const RX: RingRegisters =
        RingRegisters { base_low: RDBAL, base_high: RDBAH, len: RDLEN, head: RDH, tail: RDT };
    const TX: RingRegisters =
        RingRegisters { base_low: TDBAL, base_high: TDBAH, len: TDLEN, head: TDH, tail: TDT };

    fn of(function: &dyn Function) -> Option<Self> {
        let mac = MacType::of(function.id())?;
        let io = mac.resets_through_io().then(|| reset::io_bar(function)).flatten();
        Some(Self { mac, io })
    }

    /// Aligns a ring to its size, so that it crosses no 64 KiB boundary, at which the first 82545 and 82546
    /// fail (erratum 23; Linux, `e1000_check_64k_bound`). Packet buffers are aligned the same way.
    fn ring_alignment(len: usize) -> usize {
        len
    }

    fn prepare(&self, hardware: &Hardware) -> Result<u64> {
        let dma_mask = self.reach(hardware)?;
        if self.is_express() {
            self.disable_aspm(&*hardware.function)?;
        }
        Ok(dma_mask)
    }

    /// Limits the 8254x to `MAX_FRAME`, although they send up to 16288 bytes (SDM 3.3.3).
    fn max_frame(&self) -> usize {
        if self.is_express() { MAX_FRAME_82574 } else { MAX_FRAME }
    }

    /// Sizes the receive FIFO for one frame and the transmit FIFO for two (Linux, `e1000_reset`). The chip
    /// applies a new PBA at the next CTRL.RST, which does not change PBA. Linux and DPDK write PBA only
    /// before a reset.
    fn make_room(&self, hardware: &Hardware, max_frame: usize) -> bool {
        let pba = hardware.bar.read32(PBA);
        let (rx, tx) = (pba & PBA_RXA, pba >> PBA_TXA_SHIFT);
        let [least, wanted] =
            [1, 2].map(|frames| (frames * (max_frame + FIFO_OVERHEAD)).div_ceil(1024) as u32);
        if rx >= least && tx >= wanted {
            return false;
        }
        let tx = wanted.next_multiple_of(FIFO_STEP).min((rx + tx).saturating_sub(least));
        let rx = (pba & PBA_RXA) + (pba >> PBA_TXA_SHIFT) - tx;
        hardware.bar.write32(PBA, tx << PBA_TXA_SHIFT | rx);
        true
    }

    fn set_up(&self, hardware: &Hardware, config: &PortConfig) -> Result<()> {
        let bar = &hardware.bar;
        hardware.clear_multicast_table();
        bar.write32(RXCSUM, 0);
        bar.write32(TIPG, TIPG_COPPER);
        let mut cleared = CTRL_FRCSPD | CTRL_FRCDPX | CTRL_VME | CTRL_RFCE | CTRL_TFCE;
        if self.is_express() {
            cleared |= CTRL_GIO_MASTER_DISABLE | CTRL_82574_CLEAR;
            Self::set_up_82574(hardware);
        }
        hardware.change(CTRL, CTRL_SLU, cleared);
        hardware.prepare_flow_control(bar.read32(PBA) & PBA_RXA, WATERMARK_STEP, config.max_frame);
        Ok(())
    }

    fn enable(&self, hardware: &Hardware, rctl: u32) -> Result<()> {
        let mulr = if self.is_express() { TCTL_MULR } else { 0 };
        hardware.bar.write32(TCTL, TCTL_EN | TCTL_PSP | TCTL_COLLISION | mulr);
        hardware.bar.write32(RCTL, rctl);
        Ok(())
    }
}

impl E1000 {
    /// Returns the highest device address that the chip can use. On conventional PCI only 32 address lines of
    /// the 8254x work: Linux saw transmitters hang with more (e1000_main.c, `e1000_probe`).
    ///
    /// # Errors
    /// `Unavailable` for an 82544 on PCI-X, which hangs on some buffer end addresses that Vireo may use
    /// (82544 specification update; Linux, `pcix_82544`).
    fn reach(&self, hardware: &Hardware) -> Result<u64> {
        let pcix = !self.is_express() && hardware.bar.read32(STATUS) & STATUS_PCIX_MODE != 0;
        if pcix && self.mac == MacType::I82544 {
            let why = "it is in a PCI-X slot, where an 82544 hangs; move it to a conventional PCI slot";
            return Err(hardware.error(ErrorKind::Unavailable, "use", why));
        }
        Ok(if pcix || self.is_express() { u64::MAX } else { u32::MAX.into() })
    }

    /// Applies the settings that only the 82574 needs.
    fn set_up_82574(hardware: &Hardware) {
        let bar = &hardware.bar;
        // Legacy descriptors and one queue, whatever the previous driver chose (DS 10.2.5).
        bar.write32(RFCTL, 0);
        bar.write32(MRQC, 0);
        // Bits that the manual reserves but the errata require. `regs` gives the source of each.
        let change = |register, set, clear| hardware.change(register, set, clear);
        change(TXDCTL, TXDCTL_COUNT_DESC, 0);
        change(TARC0, TARC0_82574_SET, TARC0_82574_CLEAR);
        change(CTRL_EXT, CTRL_EXT_82574_SET, CTRL_EXT_82574_CLEAR);
        change(GCR, GCR_82574_SET, 0);
        change(GCR2, GCR2_82574_SET, 0);
    }

    /// Disables ASPM, with which the 82574 loses completions and then stops sending (82574 specification
    /// update; Linux, `FLAG2_DISABLE_ASPM_L0S` and `_L1`). VFIO rejects writes to Link Control, so root may
    /// have to disable ASPM.
    fn disable_aspm(&self, function: &dyn Function) -> Result<()> {
        let express = capabilities(function)?.into_iter().find(|found| found.id == CAP_ID_EXPRESS);
        let Some(control) = express.map(|found| found.offset + LINK_CONTROL) else { return Ok(()) };
        let old = function.config16(control);
        if old & LINK_CONTROL_ASPM == 0 {
            return Ok(());
        }
        function.write_config(control, &(old & !LINK_CONTROL_ASPM).to_le_bytes())?;
        if function.config16(control) & LINK_CONTROL_ASPM != 0 {
            let address = function.address();
            tracing::warn!(
                "{address} may stop sending: ASPM is on, which makes an 82574 lose completions; run: echo 0 | tee \
                 /sys/bus/pci/devices/{address}/link/l*_aspm"
            );
        }
        Ok(())
    }
}
