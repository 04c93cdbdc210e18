//! Registers and bits that only the 8254x and the 82574 have.
//!
//! SDM is Intel's *PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual* (317453), DS the
//! *82574 GbE Controller Family Datasheet*.

pub(super) use crate::fakedev::intel::registers::*;

// SDM 13.4 and DS 10.2.2: general registers.
pub(super) const CTRL_DUP: u64 = 0x0004;
pub(super) const EECD: u64 = 0x0010;
pub(super) const EXTCNF_CTRL: u64 = 0x0F00;
pub(super) const PBA: u64 = 0x1000;
// SDM 13.4 and DS 10.2.5 and 10.2.6: receive and transmit.
pub(super) const RDBAL: u64 = 0x2800;
pub(super) const TDBAL: u64 = 0x3800;
pub(super) const TARC0: u64 = 0x3840;
// DS 10.2.2: PCI Express.
pub(super) const GCR2: u64 = 0x5B64;

pub(super) const STATUS_PCIX_MODE: u32 = 0x0000_2000;
pub(super) const EECD_AUTO_RD: u32 = 0x0000_0200;
pub(super) const CTRL_EXT_EE_RST: u32 = 0x0000_2000;
pub(super) const EXTCNF_SW_OWNS_MDIO: u32 = 0x0000_0020;

// SDM 3.2.3: second word of a legacy receive descriptor.
pub(super) const RXD_DD: u64 = 0x0000_0001_0000_0000;
pub(super) const RXD_EOP: u64 = 0x0000_0002_0000_0000;
