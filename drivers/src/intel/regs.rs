//! Registers and bits that are at the same place in the 8254x, the 82574 and the 82576, under the manuals'
//! names.
//!
//! Sources are given by chapter. SDM is Intel's *PCI/PCI-X Family of Gigabit Ethernet Controllers Software
//! Developer's Manual* (317453), DS the *82574 GbE Controller Family Datasheet*, 82576 the *82576EB Gigabit
//! Ethernet Controller Datasheet* (320961).

macro_rules! registers {
    ($($name:ident $offset:literal $access:ident $what:literal $section:literal)*) => {$(
        #[doc = concat!($what, ". ", stringify!($access), ", ", $section, ".")]
        pub const $name: u64 = $offset;
    )*};
}
pub(crate) use registers;

// RW: read and write. RO: read only. RC: counter that a read clears.
registers! {
    CTRL     0x00000 RW "Device control"                      "SDM 13.4, DS 10.2.2, 82576 8.2"
    STATUS   0x00008 RO "Device status"                       "SDM 13.4, DS 10.2.2, 82576 8.2"
    EECD     0x00010 RW "NVM control"                         "SDM 13.4, DS 10.2.2, 82576 8.4"
    CTRL_EXT 0x00018 RW "Extended device control"             "SDM 13.4, DS 10.2.2, 82576 8.2"
    MDIC     0x00020 RW "MDI control, access to the PHY"      "SDM 13.4, DS 10.2.2, 82576 8.2"
    FCAL     0x00028 RW "Flow control address low"            "SDM 13.4, DS 10.2.2, 82576 8.5"
    FCAH     0x0002C RW "Flow control address high"           "SDM 13.4, DS 10.2.2, 82576 8.5"
    FCT      0x00030 RW "Flow control EtherType"              "SDM 13.4, DS 10.2.2, 82576 8.5"
    ICR      0x000C0 RC "Interrupt cause read"                "SDM 13.4, DS 10.2.4, 82576 8.8"
    IMS      0x000D0 RW "Interrupt mask set"                  "SDM 13.4, DS 10.2.4, 82576 8.8"
    IMC      0x000D8 RW "Interrupt mask clear"                "SDM 13.4, DS 10.2.4, 82576 8.8"
    RCTL     0x00100 RW "Receive control"                     "SDM 13.4, DS 10.2.5, 82576 8.10"
    FCTTV    0x00170 RW "Flow control transmit timer"         "SDM 13.4, DS 10.2.2, 82576 8.5"
    TCTL     0x00400 RW "Transmit control"                    "SDM 13.4, DS 10.2.6, 82576 8.12"
    FCRTL    0x02160 RW "Flow control low watermark"          "SDM 13.4, DS 10.2.2, 82576 8.5"
    FCRTH    0x02168 RW "Flow control high watermark"         "SDM 13.4, DS 10.2.2, 82576 8.5"
    CRCERRS  0x04000 RC "Frames with a bad CRC"               "SDM 13.7, DS 10.2.7, 82576 8.19"
    ALGNERRC 0x04004 RC "Frames with an incomplete last byte" "SDM 13.7, DS 10.2.7, 82576 8.19"
    MPC      0x04010 RC "Missed packets: no room in the FIFO" "SDM 13.7, DS 10.2.7, 82576 8.19"
    ROC      0x040AC RC "Oversized frames"                    "SDM 13.7, DS 10.2.7, 82576 8.19"
    RXCSUM   0x05000 RW "Receive checksum control"            "SDM 13.4, DS 10.2.5, 82576 8.10"
    MTA      0x05200 RW "Multicast table, 128 words"          "SDM 13.5, DS 10.2.5, 82576 8.10"
    RAL0     0x05400 RW "Receive address low"                 "SDM 13.5, DS 10.2.5, 82576 8.10"
    RAH0     0x05404 RW "Receive address high"                "SDM 13.5, DS 10.2.5, 82576 8.10"
    MRQC     0x05818 RW "Multiple receive queues command"     "DS 10.2.5, 82576 8.10"
    GCR      0x05B00 RW "PCI Express control"                 "DS 10.2.2, 82576 8.6"
}

/// Number of words of [`MTA`].
pub const MTA_WORDS: u64 = 128;

/// Blocks new requests; PCI Express only.
pub const CTRL_GIO_MASTER_DISABLE: u32 = 1 << 2;
/// Set link up.
pub const CTRL_SLU: u32 = 1 << 6;
/// Force speed.
pub const CTRL_FRCSPD: u32 = 1 << 11;
/// Force duplex.
pub const CTRL_FRCDPX: u32 = 1 << 12;
/// Device reset; clears itself.
pub const CTRL_RST: u32 = 1 << 26;
/// Receive flow control: the chip obeys PAUSE frames.
pub const CTRL_RFCE: u32 = 1 << 27;
/// Transmit flow control: the chip sends PAUSE frames.
pub const CTRL_TFCE: u32 = 1 << 28;
/// VLAN mode: the chip strips tags.
pub const CTRL_VME: u32 = 1 << 30;

/// Full duplex.
pub const STATUS_FD: u32 = 1 << 0;
/// Link up.
pub const STATUS_LU: u32 = 1 << 1;
/// Lowest bit of the speed: 0 for 10, 1 for 100, 2 and 3 for 1000 Mbit/s.
pub const STATUS_SPEED_SHIFT: u32 = 6;
/// Requests may still be outstanding; PCI Express only.
pub const STATUS_GIO_MASTER_ENABLE: u32 = 1 << 19;

/// The registers have been loaded from the NVM; PCI Express only.
pub const EECD_AUTO_RD: u32 = 1 << 9;

/// First four bytes of the PAUSE address, 01:80:C2:00:00:01 (IEEE 802.3, 31B.1).
pub const FLOW_CONTROL_ADDRESS_LOW: u32 = 0x00C2_8001;
/// Last two bytes of the PAUSE address.
pub const FLOW_CONTROL_ADDRESS_HIGH: u32 = 0x0100;
/// EtherType of MAC control frames.
pub const FLOW_CONTROL_TYPE: u32 = 0x8808;
/// Sends XON at the low watermark.
pub const FCRTL_XONE: u32 = 1 << 31;

/// Lowest bit of the PHY register number, which is in bits 20:16.
pub const MDIC_REG_SHIFT: u32 = 16;
/// Address of the internal PHY: 1, in bits 25:21.
pub const MDIC_PHY: u32 = 1 << 21;
/// Operation: write.
pub const MDIC_OP_WRITE: u32 = 1 << 26;
/// Operation: read.
pub const MDIC_OP_READ: u32 = 2 << 26;
/// The operation has completed.
pub const MDIC_READY: u32 = 1 << 28;
/// The operation failed.
pub const MDIC_ERROR: u32 = 1 << 30;
/// PHY control register (IEEE 802.3, 22.2.4.1).
pub const PHY_CONTROL: u32 = 0;
/// Power down.
pub const PHY_CONTROL_POWER_DOWN: u16 = 1 << 11;
/// Restarts auto-negotiation; clears itself.
pub const PHY_CONTROL_RESTART_AUTONEG: u16 = 1 << 9;
/// Enables auto-negotiation of speed, duplex and flow control.
pub const PHY_CONTROL_AUTONEG: u16 = 1 << 12;
/// Full duplex.
pub const PHY_CONTROL_FULL_DUPLEX: u16 = 1 << 8;
/// Speed of 1000 Mbit/s, if bit 13 is 0.
pub const PHY_CONTROL_SPEED_1000: u16 = 1 << 6;
/// Loopback of transmitted data.
pub const PHY_CONTROL_LOOPBACK: u16 = 1 << 14;
/// PHY status register (IEEE 802.3, 22.2.4.2).
pub const PHY_STATUS: u32 = 1;
/// Auto-negotiation is complete.
pub const PHY_STATUS_AUTONEG_COMPLETE: u16 = 1 << 5;
/// Abilities that this end advertises (IEEE 802.3, 28.2.4.1.3).
pub const PHY_ADVERTISED: u32 = 4;
/// Abilities that the link partner advertises (IEEE 802.3, 28.2.4.1.4).
pub const PHY_PARTNER: u32 = 5;
/// PAUSE in both directions (IEEE 802.3, table 28B-2).
pub const PHY_PAUSE: u16 = 1 << 10;
/// PAUSE in one direction.
pub const PHY_ASM_DIR: u16 = 1 << 11;

/// Receiver enable. A buffer size of 0 in bits 17:16 and 25 means 2048 bytes, unless SRRCTL overrides it.
pub const RCTL_EN: u32 = 1 << 1;
/// Long packet enable: receives frames of more than 1522 bytes including the check sequence. On igb the limit
/// is 1518 bytes without a VLAN tag.
pub const RCTL_LPE: u32 = 1 << 5;
/// Receive buffers of 1024 bytes.
pub const RCTL_BSIZE_1024: u32 = 1 << 16;
/// Unicast promiscuous.
pub const RCTL_UPE: u32 = 1 << 3;
/// Multicast promiscuous.
pub const RCTL_MPE: u32 = 1 << 4;
/// Broadcast accept.
pub const RCTL_BAM: u32 = 1 << 15;
/// Discards PAUSE frames to the station address. Those to the group address do not reach the host while PMCF
/// is 0.
pub const RCTL_DPF: u32 = 1 << 22;
/// Strips the Ethernet CRC.
pub const RCTL_SECRC: u32 = 1 << 26;

/// Interrupt cause: the link has changed.
pub const ICR_LSC: u32 = 1 << 2;
/// Interrupt cause: the RX ring has few descriptors with a buffer left.
pub const ICR_RXDMT0: u32 = 1 << 4;
/// Interrupt cause: a packet was missed because the FIFO had no room.
pub const ICR_RXO: u32 = 1 << 6;
/// Interrupt cause: a packet was received, and its delay timer, which is off, has expired. On igb: its descriptor
/// was written.
pub const ICR_RXT0: u32 = 1 << 7;

/// Transmitter enable.
pub const TCTL_EN: u32 = 1 << 1;
/// Pads short packets to 64 bytes including their check sequence.
pub const TCTL_PSP: u32 = 1 << 3;

/// The address in RAL0 and RAH0 is valid.
pub const RAH_AV: u32 = 1 << 31;
