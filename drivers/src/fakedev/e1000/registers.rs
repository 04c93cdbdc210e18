//! Registers and bits as the device half knows them: written down from the manuals a second time, so that a wrong
//! constant of the driver shows in its tests.
//!
//! SDM is Intel's *PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual* (317453), DS the
//! *82574 GbE Controller Family Datasheet*.

// SDM 13.4 and DS 10.2.2: general registers.
pub(super) const CTRL: u64 = 0x0000;
pub(super) const CTRL_DUP: u64 = 0x0004;
pub(super) const STATUS: u64 = 0x0008;
pub(super) const EECD: u64 = 0x0010;
pub(super) const CTRL_EXT: u64 = 0x0018;
pub(super) const MDIC: u64 = 0x0020;
pub(super) const FCAL: u64 = 0x0028;
pub(super) const FCAH: u64 = 0x002C;
pub(super) const FCT: u64 = 0x0030;
pub(super) const EXTCNF_CTRL: u64 = 0x0F00;
pub(super) const PBA: u64 = 0x1000;
// SDM 13.4 and DS 10.2.5 and 10.2.6: receive and transmit.
pub(super) const RCTL: u64 = 0x0100;
pub(super) const TCTL: u64 = 0x0400;
pub(super) const RDBAL: u64 = 0x2800;
pub(super) const RDBAH: u64 = 0x2804;
pub(super) const RDLEN: u64 = 0x2808;
pub(super) const RDH: u64 = 0x2810;
pub(super) const RDT: u64 = 0x2818;
pub(super) const TDH: u64 = 0x3810;
pub(super) const TDT: u64 = 0x3818;
pub(super) const TARC0: u64 = 0x3840;
// SDM 13.7 and DS 10.2.7: statistics.
pub(super) const CRCERRS: u64 = 0x4000;
pub(super) const MPC: u64 = 0x4010;
// SDM 13.5 and DS 10.2.5: receive address; SDM 13.4 and DS 10.2.8: management; DS 10.2.2: PCI Express.
pub(super) const RAL0: u64 = 0x5400;
pub(super) const RAH0: u64 = 0x5404;
pub(super) const MANC: u64 = 0x5820;
pub(super) const GCR: u64 = 0x5B00;
pub(super) const GCR2: u64 = 0x5B64;

pub(super) const CTRL_GIO_MASTER_DISABLE: u32 = 0x0000_0004;
pub(super) const CTRL_RST: u32 = 0x0400_0000;
pub(super) const CTRL_RFCE: u32 = 0x0800_0000;
pub(super) const STATUS_FD: u32 = 0x0000_0001;
pub(super) const STATUS_LU: u32 = 0x0000_0002;
pub(super) const STATUS_SPEED_1000: u32 = 0x0000_0080;
pub(super) const STATUS_PCIX_MODE: u32 = 0x0000_2000;
pub(super) const STATUS_GIO_MASTER_ENABLE: u32 = 0x0008_0000;
pub(super) const EECD_AUTO_RD: u32 = 0x0000_0200;
pub(super) const CTRL_EXT_EE_RST: u32 = 0x0000_2000;
pub(super) const EXTCNF_SW_OWNS_MDIO: u32 = 0x0000_0020;
pub(super) const RCTL_EN: u32 = 0x0000_0002;
pub(super) const RCTL_MPE: u32 = 0x0000_0010;
pub(super) const RCTL_DPF: u32 = 0x0040_0000;
pub(super) const RCTL_PMCF: u32 = 0x0080_0000;
pub(super) const TCTL_EN: u32 = 0x0000_0002;
pub(super) const TCTL_PSP: u32 = 0x0000_0008;
pub(super) const RAH_AV: u32 = 0x8000_0000;
pub(super) const MANC_ARP_EN: u32 = 0x0000_2000;

pub(super) const MDIC_OP_WRITE: u32 = 0x0400_0000;
pub(super) const MDIC_OP_READ: u32 = 0x0800_0000;
pub(super) const MDIC_READY: u32 = 0x1000_0000;
pub(super) const MDIC_ERROR: u32 = 0x4000_0000;

// IEEE 802.3, 22.2.4: PHY registers 0, 1, 4 and 5.
pub(super) const PHY_POWER_DOWN: u16 = 0x0800;
pub(super) const PHY_AUTONEG_COMPLETE: u16 = 0x0020;

// SDM 3.2.3 and 3.3.3: second words of legacy descriptors.
pub(super) const RXD_DD: u64 = 0x0000_0001_0000_0000;
pub(super) const RXD_EOP: u64 = 0x0000_0002_0000_0000;
pub(super) const TXD_EOP: u64 = 0x0100_0000;
pub(super) const TXD_RS: u64 = 0x0800_0000;
pub(super) const TXD_DD: u64 = 0x0000_0001_0000_0000;
