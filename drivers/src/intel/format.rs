//! Differences between the descriptors of e1000 and igb. Both have two words, the first of which is a device
//! address.

use std::fmt::Debug;

use vireo_eal::dma::{GoodWord, SendWord};

/// Descriptor format: the meaning of the second word.
pub trait Format: Debug + Send + Sync + 'static {
    /// Descriptor done: the device has filled the buffer.
    const RXD_DD: u64;
    /// End of packet: the descriptor is the frame's last.
    const RXD_EOP: u64;
    /// Error bits. Any of them in a frame's last descriptor marks the frame as damaged.
    const RXD_ERRORS: u64;
    /// Lowest bit of the 16-bit length: bytes in the buffer, without the frame check sequence, which
    /// RCTL.SECRC removes (SDM 3.2.3).
    const RXD_LEN_SHIFT: u32;
    /// Whether the device overwrites a descriptor's address when it reports a packet.
    const RXD_OVERWRITES_ADDRESS: bool;
    /// Whether the device overwrites a descriptor's address when it reports its completion.
    const TXD_OVERWRITES_ADDRESS: bool;
    /// Report status: the device is to report the descriptor's completion.
    const TXD_RS: u64;
    /// Descriptor done: the device has reported the completion.
    const TXD_DD: u64;

    /// Second word of a completed descriptor that holds a whole, undamaged packet.
    const GOOD: GoodWord = GoodWord {
        bits: Self::RXD_DD | Self::RXD_EOP,
        mask: Self::RXD_DD | Self::RXD_EOP | Self::RXD_ERRORS,
        len_shift: Self::RXD_LEN_SHIFT,
    };

    /// Second word of a descriptor that sends a whole packet and is not reported.
    const SEND: SendWord;

    /// Returns the second word of a descriptor that sends `len` bytes of a frame and is not reported. `whole`
    /// is the frame's length in its first descriptor, and 0 in the others.
    fn segment(len: u64, whole: u64, is_last: bool) -> u64;

    /// Returns the number of bytes in the buffer of a received descriptor.
    fn len(word: u64) -> usize {
        usize::from((word >> Self::RXD_LEN_SHIFT) as u16)
    }
}
