//! Registers and bits that only the 82576 and the I350 have, from the manual and QEMU's model.
//!
//! DS is Intel's *82576EB Gigabit Ethernet Controller Datasheet* (320961).

pub(super) use crate::fakedev::intel::registers::*;

// DS 8.2 to 8.8: general registers, semaphores.
pub(super) const EEC: u64 = 0x0010;
pub(super) const PHPM: u64 = 0x0E14;
pub(super) const RXPBS: u64 = 0x2404;
pub(super) const SWSM: u64 = 0x5B50;
pub(super) const SW_FW_SYNC: u64 = 0x5B5C;
// DS 8.10 and 8.12: receive and transmit; queue 0.
pub(super) const RDBAL: u64 = 0xC000;
pub(super) const SRRCTL: u64 = 0xC00C;
pub(super) const RXDCTL: u64 = 0xC028;
pub(super) const TDBAL: u64 = 0xE000;
pub(super) const TXDCTL: u64 = 0xE028;

pub(super) const STATUS_LAN_ID_1: u32 = 0x0000_0004;
pub(super) const EEC_AUTO_RD: u32 = 0x0000_0200;
pub(super) const QUEUE_ENABLE: u32 = 0x0200_0000;
pub(super) const SWSM_SMBI: u32 = 0x0000_0001;
pub(super) const SWSM_SWESMBI: u32 = 0x0000_0002;
/// Bits with which software and firmware acquire port 1's PHY.
pub(super) const SYNC_SW_PHY1: u32 = 0x0000_0004;
pub(super) const SYNC_FW_PHY1: u32 = 0x0004_0000;

// DS 7.1.5 and 7.2.2: second word of an advanced descriptor.
pub(super) const RXD_DD: u64 = 0x0000_0000_0000_0001;
pub(super) const RXD_EOP: u64 = 0x0000_0000_0000_0002;
/// Mask of DTYP and DEXT, and their value in a data descriptor.
pub(super) const TXD_KIND: u64 = 0x0000_0000_20F0_0000;
pub(super) const TXD_DATA: u64 = 0x0000_0000_2030_0000;
