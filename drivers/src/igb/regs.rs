//! Registers and descriptor bits of the 82576 and the I350, under their manuals' names. Those that the older
//! chips also have are in `intel::regs`.
//!
//! Sources are given by chapter. DS is Intel's *82576EB Gigabit Ethernet Controller Datasheet* (320961).
//! Linux's names are those of drivers/net/ethernet/intel/igb.

use crate::intel::registers;
pub use crate::intel::regs::*;

// RW: read and write. Ring registers are those of queue 0.
registers! {
    PHPM       0x00E14 RW "PHY power management"                "Linux, `E1000_82580_PHY_POWER_MGMT`"
    EIMC       0x01528 RW "Extended interrupt mask clear"       "DS 8.8"
    RXPBS      0x02404 RW "RX packet buffer size"               "DS 8.3"
    RLPML      0x05004 RW "Longest frame received, with FCS"     "DS 8.10"
    VT_CTL     0x0581C RW "Virtualization control"              "DS 8.14"
    SWSM       0x05B50 RW "Software semaphore"                  "DS 8.7"
    SW_FW_SYNC 0x05B5C RW "Software-firmware synchronization"   "DS 8.7"
    RDBAL      0x0C000 RW "RX descriptor base address low"      "DS 8.10"
    RDBAH      0x0C004 RW "RX descriptor base address high"     "DS 8.10"
    RDLEN      0x0C008 RW "RX descriptor ring length in bytes"  "DS 8.10"
    SRRCTL     0x0C00C RW "Split and replication RX control"    "DS 8.10"
    RDH        0x0C010 RW "RX descriptor head"                  "DS 8.10"
    RDT        0x0C018 RW "RX descriptor tail"                  "DS 8.10"
    RXDCTL     0x0C028 RW "RX descriptor control"               "DS 8.10"
    TDBAL      0x0E000 RW "TX descriptor base address low"      "DS 8.12"
    TDBAH      0x0E004 RW "TX descriptor base address high"     "DS 8.12"
    TDLEN      0x0E008 RW "TX descriptor ring length in bytes"  "DS 8.12"
    TDH        0x0E010 RW "TX descriptor head"                  "DS 8.12"
    TDT        0x0E018 RW "TX descriptor tail"                  "DS 8.12"
    TXDCTL     0x0E028 RW "TX descriptor control"               "DS 8.12"
}

/// Lowest bit of the function's port number, 0 to 3, which selects the port's semaphore in [`SW_FW_SYNC`].
pub const STATUS_LAN_ID_SHIFT: u32 = 2;
/// Mask of the port number.
pub const STATUS_LAN_ID: u32 = 3;

/// A driver is loaded, so management firmware leaves the link to it. A reset clears this bit.
pub const CTRL_EXT_DRV_LOAD: u32 = 1 << 28;

/// The link is disconnected for the PHY's power management; I350 only.
pub const PHPM_GO_LINKD: u32 = 1 << 5;

/// A driver holds the semaphore. A read that returns 0 takes it.
pub const SWSM_SMBI: u32 = 1 << 0;
/// Software, not firmware, holds the semaphore.
pub const SWSM_SWESMBI: u32 = 1 << 1;

/// Bits with which software acquires the PHY of port 0, 1, 2 or 3.
pub const SW_FW_SYNC_PHY: [u32; 4] = [1 << 1, 1 << 2, 1 << 5, 1 << 6];
/// Distance from a resource's software bit to its firmware bit.
pub const SW_FW_SYNC_FIRMWARE_SHIFT: u32 = 16;

/// Resends a request that received no completion.
pub const GCR_COMPLETION_RESEND: u32 = 1 << 16;
/// Completion timeout; 0 means 500 µs to 1 ms.
pub const GCR_COMPLETION_TIMEOUT: u32 = 0xF << 12;
/// Completion timeout of 10 ms to 200 ms.
pub const GCR_COMPLETION_TIMEOUT_10MS: u32 = 1 << 12;
/// The completion timeout is set in the PCI Express capability's Device Control 2, not in GCR.
pub const GCR_CAP_VER2: u32 = 1 << 18;

/// Mask of the receive FIFO size in KiB; 82576 only.
pub const RXPBS_SIZE: u32 = 0x7F;

/// Packet buffers of 2 KiB.
pub const SRRCTL_BSIZEPACKET_2K: u32 = 2;
/// Packet buffers of 1 KiB.
pub const SRRCTL_BSIZEPACKET_1K: u32 = 1;
/// Advanced descriptors with one buffer. Bit 31, Drop_En, stays 0, so frames that find no descriptor wait in
/// the FIFO.
pub const SRRCTL_DESCTYPE_ADVANCED: u32 = 1 << 25;

/// Enables a queue, in RXDCTL and TXDCTL. Reads as 0 until the receiver or transmitter is enabled too.
pub const QUEUE_ENABLE: u32 = 1 << 25;
/// Descriptor thresholds, in RXDCTL and TXDCTL. The chip fetches descriptors when it has fewer than 8 and the
/// ring has at least 1, and it writes back each descriptor without waiting for others. Linux
/// (`IGB_RX_PTHRESH` and others) delays write-backs for the sake of interrupts.
pub const QUEUE_THRESHOLDS: u32 = 8 | 1 << 8;

/// Descriptor done, in the second word of an advanced receive descriptor that was written back (DS 7.1.5),
/// which has the status and errors in bits 31:0, the length in 47:32 and the VLAN tag in 63:48.
pub const RXD_DD: u64 = 1 << 0;
/// End of packet.
pub const RXD_EOP: u64 = 1 << 1;
/// Errors of the frame itself (Linux, `E1000_RXDEXT_ERR_FRAME_ERR_MASK`). Wrong IP and TCP checksums are left
/// to the packet's recipient.
pub const RXD_ERRORS: u64 = 0x97 << 24;
/// Lowest bit of the length.
pub const RXD_LEN_SHIFT: u32 = 32;

/// Data descriptor type, in the second word of an advanced transmit data descriptor (DS 7.2.2), which has the
/// length in bits 15:0, the type in 23:20, the command in 31:24, the status in 35:32 and the packet length in
/// 63:46.
pub const TXD_DTYP_DATA: u64 = 3 << 20;
/// End of packet.
pub const TXD_EOP: u64 = 1 << 24;
/// Inserts the frame check sequence.
pub const TXD_IFCS: u64 = 1 << 25;
/// Report status.
pub const TXD_RS: u64 = 1 << 27;
/// The descriptor is an advanced one.
pub const TXD_DEXT: u64 = 1 << 29;
/// Descriptor done; written if RS requests it.
pub const TXD_DD: u64 = 1 << 32;
/// Lowest bit of the packet length.
pub const TXD_PAYLEN_SHIFT: u32 = 46;
