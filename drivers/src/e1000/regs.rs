//! Registers and descriptor bits of the 8254x and the 82574, named as their manuals name them.
//!
//! SDM is Intel's *PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual* (317453), DS
//! the *82574 GbE Controller Family Datasheet*. A register with one section is on one of the chips only.

macro_rules! registers {
    ($($name:ident $offset:literal $access:ident $what:literal $section:literal)*) => {$(
        #[doc = concat!($what, ". ", stringify!($access), ", ", $section, ".")]
        pub const $name: u64 = $offset;
    )*};
}

// RW is read and write, RO read only, RC a counter that a read clears.
registers! {
    CTRL     0x00000 RW "Device control"                      "SDM 13.4, DS 10.2.2"
    CTRL_DUP 0x00004 RW "Device control, second place"        "SDM 13.4"
    STATUS   0x00008 RO "Device status"                       "SDM 13.4, DS 10.2.2"
    EECD     0x00010 RW "NVM control"                         "SDM 13.4, DS 10.2.2"
    CTRL_EXT 0x00018 RW "Extended device control"             "SDM 13.4, DS 10.2.2"
    MDIC     0x00020 RW "MDI control, the way to the PHY"     "SDM 13.4, DS 10.2.2"
    FCAL     0x00028 RW "Flow control address low"            "SDM 13.4, DS 10.2.2"
    FCAH     0x0002C RW "Flow control address high"           "SDM 13.4, DS 10.2.2"
    FCT      0x00030 RW "Flow control EtherType"              "SDM 13.4, DS 10.2.2"
    IMC      0x000D8 RW "Interrupt mask clear"                "SDM 13.4, DS 10.2.4"
    RCTL     0x00100 RW "Receive control"                     "SDM 13.4, DS 10.2.5"
    FCTTV    0x00170 RW "Flow control transmit timer"         "SDM 13.4, DS 10.2.2"
    TCTL     0x00400 RW "Transmit control"                    "SDM 13.4, DS 10.2.6"
    TIPG     0x00410 RW "Transmit inter-packet gap"           "SDM 13.4, DS 10.2.6"
    EXTCNF_CTRL 0x00F00 RW "Extended configuration control"   "DS 10.2.2"
    PBA      0x01000 RW "Packet buffer allocation in KiB"     "SDM 13.4, DS 10.2.2"
    FCRTL    0x02160 RW "Flow control low watermark"          "SDM 13.4, DS 10.2.2"
    FCRTH    0x02168 RW "Flow control high watermark"         "SDM 13.4, DS 10.2.2"
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
    CRCERRS  0x04000 RC "Frames with a bad CRC"               "SDM 13.7, DS 10.2.7"
    ALGNERRC 0x04004 RC "Frames of no whole number of bytes"  "SDM 13.7, DS 10.2.7"
    MPC      0x04010 RC "Missed packets: no room in the FIFO" "SDM 13.7, DS 10.2.7"
    ROC      0x040AC RC "Oversized frames"                    "SDM 13.7, DS 10.2.7"
    RXCSUM   0x05000 RW "Receive checksum control"            "SDM 13.4, DS 10.2.5"
    RFCTL    0x05008 RW "Receive filter control"              "DS 10.2.5"
    MTA      0x05200 RW "Multicast table, 128 words"          "SDM 13.5, DS 10.2.5"
    RAL0     0x05400 RW "Receive address low"                 "SDM 13.5, DS 10.2.5"
    RAH0     0x05404 RW "Receive address high"                "SDM 13.5, DS 10.2.5"
    MRQC     0x05818 RW "Multiple receive queues command"     "DS 10.2.5"
    MANC     0x05820 RW "Management control"                  "SDM 13.4, DS 10.2.8"
    GCR      0x05B00 RW "PCI Express control"                 "DS 10.2.2"
    GCR2     0x05B64 RW "Second PCI Express control"          "DS 10.2.2"
}

/// I/O port that names a register (SDM 13.2.2), as offset in the BAR of I/O ports.
pub const IOADDR: u64 = 0;
/// I/O port through which the register that [`IOADDR`] names is read and written.
pub const IODATA: u64 = 4;

/// Words of [`MTA`].
pub const MTA_WORDS: u64 = 128;

/// Blocks new requests on PCI Express; 82574 only.
pub const CTRL_GIO_MASTER_DISABLE: u32 = 1 << 2;
/// Set link up.
pub const CTRL_SLU: u32 = 1 << 6;
/// Force speed.
pub const CTRL_FRCSPD: u32 = 1 << 11;
/// Force duplex.
pub const CTRL_FRCDPX: u32 = 1 << 12;
/// Device reset, clears itself.
pub const CTRL_RST: u32 = 1 << 26;
/// Receive flow control: PAUSE frames are obeyed.
pub const CTRL_RFCE: u32 = 1 << 27;
/// Transmit flow control: PAUSE frames are sent.
pub const CTRL_TFCE: u32 = 1 << 28;
/// Has to be 0 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const CTRL_82574_CLEAR: u32 = 1 << 29;
/// VLAN mode: strips tags.
pub const CTRL_VME: u32 = 1 << 30;

/// Full duplex.
pub const STATUS_FD: u32 = 1 << 0;
/// Link up.
pub const STATUS_LU: u32 = 1 << 1;
/// Speed: 10, 100, 1000 and again 1000 Mbit/s.
pub const STATUS_SPEED_SHIFT: u32 = 6;
/// Requests on PCI Express may still be under way; 82574 only.
pub const STATUS_GIO_MASTER_ENABLE: u32 = 1 << 19;

/// The bus is in PCI-X mode; 8254x only.
pub const STATUS_PCIX_MODE: u32 = 1 << 13;

/// The registers have been loaded from the NVM; 82574 only.
pub const EECD_AUTO_RD: u32 = 1 << 9;
/// Loads the registers from the EEPROM; 8254x only.
pub const CTRL_EXT_EE_RST: u32 = 1 << 13;
/// Has to be 1 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const CTRL_EXT_82574_SET: u32 = 1 << 22;
/// Has to be 0 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const CTRL_EXT_82574_CLEAR: u32 = 1 << 23;
/// Software has the way to the PHY.
pub const EXTCNF_CTRL_MDIO_SW_OWNERSHIP: u32 = 1 << 5;
/// Has to be 1 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const TARC0_82574_SET: u32 = 1 << 26;
/// Have to be 0 on the 82574 (Linux, `e1000_initialize_hw_bits_82571`).
pub const TARC0_82574_CLEAR: u32 = 0xF << 27;
/// Keeps the 82574 from losing completions (82574 specification update; Linux, `e1000_initialize_hw_bits_82571`).
pub const GCR_82574_SET: u32 = 1 << 22;
/// As [`GCR_82574_SET`].
pub const GCR2_82574_SET: u32 = 1 << 0;
/// The firmware keeps ARP requests to itself.
pub const MANC_ARP_EN: u32 = 1 << 13;

/// The address of PAUSE frames, 01:80:C2:00:00:01 (IEEE 802.3, 31B.1): its first four bytes.
pub const FLOW_CONTROL_ADDRESS_LOW: u32 = 0x00C2_8001;
/// Its last two bytes.
pub const FLOW_CONTROL_ADDRESS_HIGH: u32 = 0x0100;
/// EtherType of MAC control frames.
pub const FLOW_CONTROL_TYPE: u32 = 0x8808;
/// Receive FIFO in KiB.
pub const PBA_RXA: u32 = 0xFFFF;
/// Sends XON at the low watermark.
pub const FCRTL_XONE: u32 = 1 << 31;
/// High watermark: a multiple of 8 bytes.
pub const FCRTH_RTH: u32 = 0xFFF8;

/// PHY register number in bits 20:16, PHY address 1 in bits 25:21.
pub const MDIC_REG_SHIFT: u32 = 16;
/// Address of the internal PHY.
pub const MDIC_PHY: u32 = 1 << 21;
/// Operation: write.
pub const MDIC_OP_WRITE: u32 = 1 << 26;
/// Operation: read.
pub const MDIC_OP_READ: u32 = 2 << 26;
/// The operation ended.
pub const MDIC_READY: u32 = 1 << 28;
/// The operation failed.
pub const MDIC_ERROR: u32 = 1 << 30;
/// PHY control register (IEEE 802.3, 22.2.4.1).
pub const PHY_CONTROL: u32 = 0;
/// Power down.
pub const PHY_CONTROL_POWER_DOWN: u16 = 1 << 11;
/// Full duplex.
pub const PHY_CONTROL_FULL_DUPLEX: u16 = 1 << 8;
/// 1000 Mbit/s, without bit 13.
pub const PHY_CONTROL_SPEED_1000: u16 = 1 << 6;
/// What is sent comes back.
pub const PHY_CONTROL_LOOPBACK: u16 = 1 << 14;
/// PHY status register (IEEE 802.3, 22.2.4.2).
pub const PHY_STATUS: u32 = 1;
/// Auto-negotiation is complete.
pub const PHY_STATUS_AUTONEG_COMPLETE: u16 = 1 << 5;
/// What this end advertises (IEEE 802.3, 28.2.4.1.3).
pub const PHY_ADVERTISED: u32 = 4;
/// What the other end advertises (IEEE 802.3, 28.2.4.1.4).
pub const PHY_PARTNER: u32 = 5;
/// PAUSE in both directions (IEEE 802.3, table 28B-2).
pub const PHY_PAUSE: u16 = 1 << 10;
/// PAUSE in one direction.
pub const PHY_ASM_DIR: u16 = 1 << 11;

/// Receiver enable. The buffer size in bits 17:16 and 25 is 0: 2048 bytes.
pub const RCTL_EN: u32 = 1 << 1;
/// Unicast promiscuous.
pub const RCTL_UPE: u32 = 1 << 3;
/// Multicast promiscuous.
pub const RCTL_MPE: u32 = 1 << 4;
/// Broadcast accept.
pub const RCTL_BAM: u32 = 1 << 15;
/// Discards PAUSE frames to the station address; those to the group are kept from the host while PMCF is 0.
pub const RCTL_DPF: u32 = 1 << 22;
/// Strip Ethernet CRC.
pub const RCTL_SECRC: u32 = 1 << 26;

/// Transmitter enable.
pub const TCTL_EN: u32 = 1 << 1;
/// Pad short packets to 64 bytes.
pub const TCTL_PSP: u32 = 1 << 3;
/// Collision threshold 15 and collision distance 64 for full duplex, as both manuals recommend.
pub const TCTL_COLLISION: u32 = 0x0F << 4 | 0x40 << 12;
/// Multiple requests; 82574 only.
pub const TCTL_MULR: u32 = 1 << 28;
/// IPGT 8, IPGR1 8, IPGR2 6: what both manuals recommend for copper.
pub const TIPG_COPPER: u32 = 8 | 8 << 10 | 6 << 20;
/// Counts descriptors that wait; DS 10.2.6 wants it set.
pub const TXDCTL_COUNT_DESC: u32 = 1 << 22;

/// The address in RAL0 and RAH0 is valid.
pub const RAH_AV: u32 = 1 << 31;

/// Second word of a legacy receive descriptor (SDM 3.2.3): length in bits 15:0, status in 39:32, errors in
/// 47:40. Descriptor done.
pub const RXD_DD: u64 = 1 << 32;
/// End of packet.
pub const RXD_EOP: u64 = 1 << 33;
/// Errors of the frame itself: CE, SE, SEQ, CXE and RXE. Wrong IP and TCP checksums are the receiver's matter.
pub const RXD_ERRORS: u64 = 0x97 << 40;

/// Second word of a legacy transmit descriptor (SDM 3.3.3): length in bits 15:0, command in 31:24, status in
/// 35:32. End of packet.
pub const TXD_EOP: u64 = 1 << 24;
/// Insert frame check sequence.
pub const TXD_IFCS: u64 = 1 << 25;
/// Report status.
pub const TXD_RS: u64 = 1 << 27;
/// Descriptor done; written where RS asked for it.
pub const TXD_DD: u64 = 1 << 32;
