//! What e1000's and igb's descriptors differ in. Both have two words, of which the first is a device address.

use std::fmt::Debug;

use vireo_eal::dma::GoodWord;

/// A format of descriptors: what their second words say.
pub trait Format: Debug + Send + Sync + 'static {
    /// The device has filled the descriptor's buffer.
    const RXD_DD: u64;
    /// It is the frame's last.
    const RXD_EOP: u64;
    /// Any of these, in a frame's last descriptor: the frame is damaged.
    const RXD_ERRORS: u64;
    /// Lowest of the 16 bits that are the length of what is in the buffer, in bytes; without check sequence, which RCTL.SECRC
    /// removes (SDM 3.2.3).
    const RXD_LEN_SHIFT: u32;
    /// The device is to report the descriptor.
    const TXD_RS: u64;
    /// The device has reported it.
    const TXD_DD: u64;

    /// What a packet's only descriptor says once the packet is there, undamaged.
    const GOOD: GoodWord = GoodWord {
        bits: Self::RXD_DD | Self::RXD_EOP,
        mask: Self::RXD_DD | Self::RXD_EOP | Self::RXD_ERRORS,
        len_shift: Self::RXD_LEN_SHIFT,
    };

    /// To send `len` bytes of a frame by a descriptor, which is not reported; `whole` is the length of the frame in its first
    /// descriptor, and 0 in others.
    fn segment(len: u64, whole: u64, is_last: bool) -> u64;

    /// To send a packet of `len` bytes by one descriptor, which is not reported.
    #[inline(always)]
    fn data(len: u64) -> u64 {
        Self::segment(len, len, true)
    }

    /// Bytes in the buffer of a descriptor that was received.
    fn len(word: u64) -> usize {
        usize::from((word >> Self::RXD_LEN_SHIFT) as u16)
    }
}
