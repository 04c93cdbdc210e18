//! Registers and bits as the device half knows them: written down from the manual and QEMU's model a second time, so that a
//! wrong constant of the driver shows in its tests.
//!
//! DS is Intel's *82576EB Gigabit Ethernet Controller Datasheet* (320961).

// DS 8.2 to 8.8: general registers, semaphores, interrupts.
pub(super) const CTRL: u64 = 0x0000;
pub(super) const STATUS: u64 = 0x0008;
pub(super) const EEC: u64 = 0x0010;
pub(super) const CTRL_EXT: u64 = 0x0018;
pub(super) const MDIC: u64 = 0x0020;
pub(super) const FCAL: u64 = 0x0028;
pub(super) const FCAH: u64 = 0x002C;
pub(super) const FCT: u64 = 0x0030;
pub(super) const PHPM: u64 = 0x0E14;
pub(super) const RXPBS: u64 = 0x2404;
pub(super) const GCR: u64 = 0x5B00;
pub(super) const SWSM: u64 = 0x5B50;
pub(super) const SW_FW_SYNC: u64 = 0x5B5C;
// DS 8.10 and 8.12: receive and transmit; queue 0.
pub(super) const RCTL: u64 = 0x0100;
pub(super) const TCTL: u64 = 0x0400;
pub(super) const RAL0: u64 = 0x5400;
pub(super) const RAH0: u64 = 0x5404;
pub(super) const RDBAL: u64 = 0xC000;
pub(super) const RDBAH: u64 = 0xC004;
pub(super) const RDLEN: u64 = 0xC008;
pub(super) const SRRCTL: u64 = 0xC00C;
pub(super) const RDH: u64 = 0xC010;
pub(super) const RDT: u64 = 0xC018;
pub(super) const RXDCTL: u64 = 0xC028;
pub(super) const TDH: u64 = 0xE010;
pub(super) const TDT: u64 = 0xE018;
pub(super) const TXDCTL: u64 = 0xE028;
// DS 8.19: statistics.
pub(super) const CRCERRS: u64 = 0x4000;
pub(super) const MPC: u64 = 0x4010;

pub(super) const CTRL_GIO_MASTER_DISABLE: u32 = 0x0000_0004;
pub(super) const CTRL_RST: u32 = 0x0400_0000;
pub(super) const CTRL_RFCE: u32 = 0x0800_0000;
pub(super) const STATUS_FD: u32 = 0x0000_0001;
pub(super) const STATUS_LU: u32 = 0x0000_0002;
pub(super) const STATUS_LAN_ID_1: u32 = 0x0000_0004;
pub(super) const STATUS_SPEED_1000: u32 = 0x0000_0080;
pub(super) const STATUS_GIO_MASTER_ENABLE: u32 = 0x0008_0000;
pub(super) const EEC_AUTO_RD: u32 = 0x0000_0200;
pub(super) const RCTL_EN: u32 = 0x0000_0002;
pub(super) const RCTL_MPE: u32 = 0x0000_0010;
pub(super) const RCTL_DPF: u32 = 0x0040_0000;
pub(super) const RCTL_PMCF: u32 = 0x0080_0000;
pub(super) const TCTL_EN: u32 = 0x0000_0002;
pub(super) const TCTL_PSP: u32 = 0x0000_0008;
pub(super) const QUEUE_ENABLE: u32 = 0x0200_0000;
pub(super) const RAH_AV: u32 = 0x8000_0000;
pub(super) const SWSM_SMBI: u32 = 0x0000_0001;
pub(super) const SWSM_SWESMBI: u32 = 0x0000_0002;
/// Port 1's PHY, for software and for firmware.
pub(super) const SYNC_SW_PHY1: u32 = 0x0000_0004;
pub(super) const SYNC_FW_PHY1: u32 = 0x0004_0000;

pub(super) const MDIC_OP_WRITE: u32 = 0x0400_0000;
pub(super) const MDIC_OP_READ: u32 = 0x0800_0000;
pub(super) const MDIC_READY: u32 = 0x1000_0000;
pub(super) const MDIC_ERROR: u32 = 0x4000_0000;

// IEEE 802.3, 22.2.4: PHY registers 0 and 1.
pub(super) const PHY_RESTART: u16 = 0x0200;
pub(super) const PHY_POWER_DOWN: u16 = 0x0800;
pub(super) const PHY_AUTONEG: u16 = 0x1000;
pub(super) const PHY_AUTONEG_COMPLETE: u16 = 0x0020;

// DS 7.1.5 and 7.2.2: second words of advanced descriptors.
pub(super) const RXD_DD: u64 = 0x0000_0000_0000_0001;
pub(super) const RXD_EOP: u64 = 0x0000_0000_0000_0002;
/// DTYP and DEXT of a data descriptor.
pub(super) const TXD_KIND: u64 = 0x0000_0000_20F0_0000;
pub(super) const TXD_DATA: u64 = 0x0000_0000_2030_0000;
pub(super) const TXD_EOP: u64 = 0x0000_0000_0100_0000;
pub(super) const TXD_IFCS: u64 = 0x0000_0000_0200_0000;
pub(super) const TXD_RS: u64 = 0x0000_0000_0800_0000;
pub(super) const TXD_DD: u64 = 0x0000_0001_0000_0000;
