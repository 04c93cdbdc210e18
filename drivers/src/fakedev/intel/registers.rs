//! Registers and bits that the controllers have in common, for the fake devices. They are transcribed from
//! the manuals a second time, so that a wrong constant in a driver fails its tests.
//!
//! SDM is Intel's *PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual* (317453), DS
//! the *82574 GbE Controller Family Datasheet*, 82576 the *82576EB Gigabit Ethernet Controller Datasheet*
//! (320961).

// SDM 13.4, DS 10.2.2 and 82576 8.2 to 8.5: general registers.
pub(crate) const CTRL: u64 = 0x0000;
pub(crate) const STATUS: u64 = 0x0008;
pub(crate) const CTRL_EXT: u64 = 0x0018;
pub(crate) const MDIC: u64 = 0x0020;
pub(crate) const FCAL: u64 = 0x0028;
pub(crate) const FCAH: u64 = 0x002C;
pub(crate) const FCT: u64 = 0x0030;
// SDM 13.4, DS 10.2.4, 82576 8.8: interrupts.
pub(crate) const ICR: u64 = 0x00C0;
pub(crate) const IMS: u64 = 0x00D0;
pub(crate) const IMC: u64 = 0x00D8;
// SDM 13.4, DS 10.2.5 and 10.2.6, 82576 8.10 and 8.12: receive and transmit.
pub(crate) const RCTL: u64 = 0x0100;
pub(crate) const TCTL: u64 = 0x0400;
// SDM 13.7, DS 10.2.7, 82576 8.19: statistics.
pub(crate) const CRCERRS: u64 = 0x4000;
pub(crate) const MPC: u64 = 0x4010;
// SDM 13.5, DS 10.2.5, 82576 8.10: receive address; SDM 13.4, DS 10.2.8: management; DS 10.2.2, 82576 8.6: PCI Express.
pub(crate) const RAL0: u64 = 0x5400;
pub(crate) const RAH0: u64 = 0x5404;
pub(crate) const MANC: u64 = 0x5820;
pub(crate) const GCR: u64 = 0x5B00;

// Ring registers, relative to the low base address register.
pub(crate) const BASE_HIGH: u64 = 0x04;
pub(crate) const LEN: u64 = 0x08;
pub(crate) const HEAD: u64 = 0x10;
pub(crate) const TAIL: u64 = 0x18;

pub(crate) const CTRL_GIO_MASTER_DISABLE: u32 = 0x0000_0004;
pub(crate) const CTRL_RST: u32 = 0x0400_0000;
pub(crate) const CTRL_RFCE: u32 = 0x0800_0000;
pub(crate) const STATUS_FD: u32 = 0x0000_0001;
pub(crate) const STATUS_LU: u32 = 0x0000_0002;
pub(crate) const STATUS_SPEED_1000: u32 = 0x0000_0080;
pub(crate) const STATUS_GIO_MASTER_ENABLE: u32 = 0x0008_0000;
pub(crate) const RCTL_EN: u32 = 0x0000_0002;
pub(crate) const RCTL_BSIZE: u32 = 0x0003_0000;
pub(crate) const RCTL_MPE: u32 = 0x0000_0010;
pub(crate) const RCTL_DPF: u32 = 0x0040_0000;
pub(crate) const RCTL_PMCF: u32 = 0x0080_0000;
pub(crate) const ICR_LSC: u32 = 1 << 2;
pub(crate) const ICR_RXT0: u32 = 0x0000_0080;
pub(crate) const TCTL_EN: u32 = 0x0000_0002;
pub(crate) const TCTL_PSP: u32 = 0x0000_0008;
pub(crate) const RAH_AV: u32 = 0x8000_0000;
pub(crate) const MANC_ARP_EN: u32 = 0x0000_2000;

pub(crate) const MDIC_OP_WRITE: u32 = 0x0400_0000;
pub(crate) const MDIC_OP_READ: u32 = 0x0800_0000;
pub(crate) const MDIC_READY: u32 = 0x1000_0000;
pub(crate) const MDIC_ERROR: u32 = 0x4000_0000;

// IEEE 802.3, 22.2.4: PHY registers 0 and 1.
pub(crate) const PHY_RESTART: u16 = 0x0200;
pub(crate) const PHY_POWER_DOWN: u16 = 0x0800;
pub(crate) const PHY_AUTONEG: u16 = 0x1000;
pub(crate) const PHY_AUTONEG_COMPLETE: u16 = 0x0020;

// SDM 3.3.3, 82576 7.2.2: second word of a transmit descriptor.
pub(crate) const TXD_EOP: u64 = 0x0000_0000_0100_0000;
pub(crate) const TXD_IFCS: u64 = 0x0000_0000_0200_0000;
pub(crate) const TXD_RS: u64 = 0x0000_0000_0800_0000;
pub(crate) const TXD_DD: u64 = 0x0000_0001_0000_0000;
