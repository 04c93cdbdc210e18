//! Registers and descriptor bits of the 8254x and the 82574, under their manuals' names.
//!
//! SDM is Intel's *PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual* (317453), DS
//! the *82574 GbE Controller Family Datasheet*. A register with a section of only one manual exists only on
//! that manual's chips.

use crate::intel::registers;
pub use crate::intel::regs::*;

// RW: read and write. RO: read only. RC: counter that a read clears.
registers! {
    CTRL_DUP 0x00004 RW "Device control, second copy"         "SDM 13.4"
    TIPG     0x00410 RW "Transmit inter-packet gap"           "SDM 13.4, DS 10.2.6"
    EXTCNF_CTRL 0x00F00 RW "Extended configuration control"   "DS 10.2.2"
    PBA      0x01000 RW "Packet buffer allocation in KiB"     "SDM 13.4, DS 10.2.2"
    RDBAL    0x02800 RW "RX descriptor base address low"      "SDM 13.4, DS 10.2.5"
    RDBAH    0x02804 RW "RX descriptor base address high"     "SDM 13.4, DS 10.2.5"
    RDLEN    0x02808 RW "RX descriptor ring length in bytes"  "SDM 13.4, DS 10.2.5"
    RDH      0x02810 RW "RX descriptor head"                  "SDM 13.4, DS 10.2.5"
    RDT      0x02818 RW "RX descriptor tail"                  "SDM 13.4, DS 10.2.5"
    TDBAL    0x03800 RW "TX descriptor base address low"      "SDM 13.4, DS 10.2.6"
    TDBAH    0x03804 RW "TX descriptor base address high"     "SDM 13.4, DS 10.2.6"
    TDLEN    0x03808 RW "TX descriptor ring length in bytes"  "SDM 13.4, DS 10.2.6"
    TDH      0x03810 RW "TX descriptor head"                  "SDM 13.4, DS 10.2.6"
    TDT      0x03818 RW "TX descriptor tail"                  "SDM 13.4, DS 10.2.6"
    TXDCTL   0x03828 RW "TX descriptor control"               "SDM 13.4, DS 10.2.6"
    TARC0    0x03840 RW "TX arbitration count"                "DS 10.2.6"
    RFCTL    0x05008 RW "Receive filter control"              "DS 10.2.5"
    MANC     0x05820 RW "Management control"                  "SDM 13.4, DS 10.2.8"
    GCR2     0x05B64 RW "Second PCI Express control"          "DS 10.2.2"
}

/// I/O port that selects a register (SDM 13.2.2), as an offset in the BAR of the I/O ports.
pub const IOADDR: u64 = 0;
/// I/O port that reads and writes the register selected by [`IOADDR`].
pub const IODATA: u64 = 4;

/// Must be 0 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const CTRL_82574_CLEAR: u32 = 1 << 29;

/// The bus is in PCI-X mode; 8254x only.
pub const STATUS_PCIX_MODE: u32 = 1 << 13;

/// Loads the registers from the EEPROM; 8254x only.
pub const CTRL_EXT_EE_RST: u32 = 1 << 13;
/// Must be 1 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const CTRL_EXT_82574_SET: u32 = 1 << 22;
/// Must be 0 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const CTRL_EXT_82574_CLEAR: u32 = 1 << 23;
/// Software owns MDIO, the access to the PHY.
pub const EXTCNF_CTRL_MDIO_SW_OWNERSHIP: u32 = 1 << 5;
/// Must be 1 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const TARC0_82574_SET: u32 = 1 << 26;
/// Must be 0 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const TARC0_82574_CLEAR: u32 = 0xF << 27;
/// Keeps the 82574 from losing completions (82574 specification update; Linux, `e1000_initialize_hw_bits_82571`).
pub const GCR_82574_SET: u32 = 1 << 22;
/// Keeps the 82574 from losing completions, like [`GCR_82574_SET`].
pub const GCR2_82574_SET: u32 = 1 << 0;
/// The firmware consumes ARP requests.
pub const MANC_ARP_EN: u32 = 1 << 13;

/// Mask of the receive FIFO size in KiB.
pub const PBA_RXA: u32 = 0xFFFF;
/// Lowest bit of the transmit FIFO size in KiB, which is what the receive FIFO leaves.
pub const PBA_TXA_SHIFT: u32 = 16;

/// Collision threshold 15 and collision distance 64 for full duplex, as both manuals recommend.
pub const TCTL_COLLISION: u32 = 0x0F << 4 | 0x40 << 12;
/// Multiple request support; 82574 only.
pub const TCTL_MULR: u32 = 1 << 28;
/// IPGT 8, IPGR1 8 and IPGR2 6, as both manuals recommend for copper.
pub const TIPG_COPPER: u32 = 8 | 8 << 10 | 6 << 20;
/// Counts waiting descriptors. DS 10.2.6 requires it to be set.
pub const TXDCTL_COUNT_DESC: u32 = 1 << 22;

/// Descriptor done, in the second word of a legacy receive descriptor (SDM 3.2.3), which has the length in
/// bits 15:0, the status in 39:32 and the errors in 47:40.
pub const RXD_DD: u64 = 1 << 32;
/// End of packet.
pub const RXD_EOP: u64 = 1 << 33;
/// Errors of the frame itself: CE, SE, SEQ, CXE and RXE. Wrong IP and TCP checksums are left to the packet's
/// recipient.
pub const RXD_ERRORS: u64 = 0x97 << 40;

/// End of packet, in the second word of a legacy transmit descriptor (SDM 3.3.3), which has the length in
/// bits 15:0, the command in 31:24 and the status in 35:32.
pub const TXD_EOP: u64 = 1 << 24;
/// Inserts the frame check sequence.
pub const TXD_IFCS: u64 = 1 << 25;
/// Report status.
pub const TXD_RS: u64 = 1 << 27;
/// Descriptor done; written if RS requests it.
pub const TXD_DD: u64 = 1 << 32;
