//! Driver for Intel 82576 and I350 Gigabit Ethernet controllers. It uses advanced descriptors and one of the
//! eight or more queue pairs.
//!
//! | chip | id | QEMU | reset |
//! |---|---|---|---|
//! | 82576 with copper | 8086:10c9, 10e8, 150a, 1526 | `igb`, since 8.0 | CTRL.RST, or else a function reset |
//! | I350 with copper | 8086:1521 | | the same |
//!
//! The driver does not read the EEPROM: the chip loads the station address into its registers. A link that is
//! up stays up. RSS, VMDq and SR-IOV are off. Frames are standard Ethernet frames of up to 1518 bytes, or
//! 1522 with a VLAN tag, unless the port is started for longer ones. Every wait ends after a second. Code
//! that exists only for QEMU's model says so in a comment.

mod chip;
mod desc;
mod phy;
pub mod regs;
mod reset;
#[cfg(test)]
mod tests;

use vireo_bus_pci::{CAP_ID_EXPRESS, DeviceId, Function, capabilities};
use vireo_eal::Result;
use vireo_eal::dma::MAX_FRAME;

use self::chip::{IDS, MacType};
use self::desc::Advanced;
use self::regs::*;
use crate::intel::{self, Chip, Hardware, Phy, QueueControl, RingRegisters};
use crate::port::{FCS, PortConfig};

/// Alignment in bytes of a ring's address and size (DS 8.10, RDBAL and RDLEN).
const ALIGN: usize = 128;
/// Granularity of FCRTL and FCRTH in bytes.
const WATERMARK_STEP: u32 = 16;
/// Offset of Device Control 2 in the PCI Express capability, and its value for a completion timeout of 16 ms
/// to 55 ms (PCI Express 4.0, 7.5.3.16).
const DEVICE_CONTROL_2: u16 = 0x28;
const COMPLETION_TIMEOUT_16MS: u16 = 5;

/// Port of an 82576 or I350.
pub type Device = intel::Device<Igb>;
/// Receive queue of a port.
pub type RxQueue = intel::RxQueue<Advanced>;
/// Transmit queue of a port.
pub type TxQueue = intel::TxQueue<Advanced>;

/// An 82576 or I350.
#[derive(Debug)]
pub struct Igb {
    mac: MacType,
}

impl Chip for Igb {
    type Format = Advanced;

    const NAME: &'static str = "igb";
    const IDS: &'static [(DeviceId, &'static str)] = IDS;
    const RX: RingRegisters =
        RingRegisters { base_low: RDBAL, base_high: RDBAH, len: RDLEN, head: RDH, tail: RDT };
    const TX: RingRegisters =
        RingRegisters { base_low: TDBAL, base_high: TDBAH, len: TDLEN, head: TDH, tail: TDT };

    /// DS 4.5.9.2 and 4.5.10.2.
    const QUEUE_CONTROL: Option<QueueControl> =
        Some(QueueControl { rx: RXDCTL, tx: TXDCTL, enable: QUEUE_ENABLE });

    fn of(function: &dyn Function) -> Option<Self> {
        Some(Self { mac: MacType::of(function.id())? })
    }

    fn ring_alignment(_len: usize) -> usize {
        ALIGN
    }

    fn prepare(&self, hardware: &Hardware) -> Result<u64> {
        // A killed process may have left the PHY acquired. No other process is allowed to use this port.
        self.release_phy(hardware);
        Ok(u64::MAX)
    }

    /// Limits frames to 9728 bytes including the check sequence (Linux, `MAX_JUMBO_FRAME_SIZE`). The FIFOs
    /// have room for such a frame at their default sizes.
    fn max_frame(&self) -> usize {
        MAX_FRAME
    }

    fn set_up(&self, hardware: &Hardware, config: &PortConfig) -> Result<()> {
        let bar = &hardware.bar;
        let size = if config.is_scattered() { SRRCTL_BSIZEPACKET_1K } else { SRRCTL_BSIZEPACKET_2K };
        bar.write32(SRRCTL, size | SRRCTL_DESCTYPE_ADVANCED);
        // Has an effect only if RCTL.LPE is set.
        bar.write32(RLPML, (config.max_frame + FCS) as u32);
        bar.write32(RXDCTL, QUEUE_THRESHOLDS | QUEUE_ENABLE);
        bar.write32(TXDCTL, QUEUE_THRESHOLDS | QUEUE_ENABLE);
        hardware.clear_multicast_table();
        // Without RSS and VMDq, queue 0 receives everything.
        bar.write32(MRQC, 0);
        bar.write32(VT_CTL, 0);
        bar.write32(RXCSUM, 0);
        if self.mac == MacType::I82576 {
            Self::lengthen_completion_timeout(hardware)?;
        }
        let cleared = CTRL_FRCSPD | CTRL_FRCDPX | CTRL_VME | CTRL_RFCE | CTRL_TFCE | CTRL_GIO_MASTER_DISABLE;
        hardware.change(CTRL, CTRL_SLU, cleared);
        hardware.change(CTRL_EXT, CTRL_EXT_DRV_LOAD, 0);
        let fifo = self.mac.fifo_kib(bar.read32(RXPBS));
        hardware.prepare_flow_control(fifo, WATERMARK_STEP, config.max_frame);
        if self.mac == MacType::I350 {
            // Linux, `igb_setup_copper_link_82575`.
            hardware.change(PHPM, 0, PHPM_GO_LINKD);
        }
        Ok(())
    }

    /// Enables the transmitter and the receiver, and waits until the chip confirms that its queues are
    /// enabled.
    fn enable(&self, hardware: &Hardware, rctl: u32) -> Result<()> {
        hardware.change(TCTL, TCTL_EN | TCTL_PSP, 0);
        hardware.bar.write32(RCTL, rctl);
        for queue in [RXDCTL, TXDCTL] {
            hardware.wait("start", queue, |control| control & QUEUE_ENABLE != 0)?;
        }
        Ok(())
    }
}

impl Igb {
    /// Replaces the chip's completion timeout of a millisecond by the one that PCI Express recommends, and
    /// disables resending, which would endlessly repeat a request that the IOMMU rejects (Linux,
    /// `igb_set_pcie_completion_timeout`).
    fn lengthen_completion_timeout(hardware: &Hardware) -> Result<()> {
        let gcr = hardware.bar.read32(GCR);
        let mut wanted = gcr & !GCR_COMPLETION_RESEND;
        if gcr & GCR_COMPLETION_TIMEOUT == 0 {
            if gcr & GCR_CAP_VER2 == 0 {
                wanted |= GCR_COMPLETION_TIMEOUT_10MS;
            } else {
                let function = &hardware.function;
                let express = capabilities(&**function)?.into_iter().find(|found| found.id == CAP_ID_EXPRESS);
                if let Some(control) = express.map(|found| found.offset + DEVICE_CONTROL_2) {
                    let value = function.config16(control) | COMPLETION_TIMEOUT_16MS;
                    function.write_config(control, &value.to_le_bytes())?;
                }
            }
        }
        hardware.bar.write32(GCR, wanted);
        Ok(())
    }
}
