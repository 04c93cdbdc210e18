//! The frames of a stream: an Ethernet header and a payload that says which frame it is.
//!
//! | bytes | what |
//! |---|---|
//! | 0..6 | destination |
//! | 6..12 | source |
//! | 12..14 | EtherType 0x88b5, for local experiments (IEEE 802) |
//! | 14..18 | number of the run, little-endian |
//! | 18..26 | sequence number |
//! | 26..34 | time of sending, in ticks of the sender's clock |
//! | 34..42 | check: mixed from the three above |

use vireo_drivers::port::MacAddr;

/// Bytes of a frame that carry something; the rest is padding.
pub const HEADER: usize = 42;
/// Shortest frame, without frame check sequence.
pub const SHORTEST: usize = 60;
/// Longest frame, without frame check sequence.
pub const LONGEST: usize = 1514;

const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// What a frame says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Number of the run.
    pub run: u32,
    /// Position in the stream, from 0.
    pub sequence: u64,
    /// Ticks of the sender's clock.
    pub ticks: u64,
}

impl Tag {
    fn check(self) -> u64 {
        (self.sequence ^ self.ticks.rotate_left(32) ^ u64::from(self.run)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// The bytes of a frame.
pub fn write(destination: MacAddr, source: MacAddr, tag: Tag) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[0..6].copy_from_slice(&destination.0);
    bytes[6..12].copy_from_slice(&source.0);
    bytes[12..14].copy_from_slice(&ETHERTYPE);
    bytes[14..18].copy_from_slice(&tag.run.to_le_bytes());
    bytes[18..26].copy_from_slice(&tag.sequence.to_le_bytes());
    bytes[26..34].copy_from_slice(&tag.ticks.to_le_bytes());
    bytes[34..42].copy_from_slice(&tag.check().to_le_bytes());
    bytes
}

/// Destination, source and tag of a frame of ours; none when it is another's or damaged.
pub fn read(bytes: &[u8; HEADER]) -> Option<(MacAddr, MacAddr, Tag)> {
    let word = |at: usize| bytes[at..at + 8].try_into().ok().map(u64::from_le_bytes);
    let mac = |at: usize| bytes[at..at + 6].try_into().ok().map(MacAddr);
    let run = u32::from_le_bytes(bytes[14..18].try_into().ok()?);
    let tag = Tag { run, sequence: word(18)?, ticks: word(26)? };
    (bytes[12..14] == ETHERTYPE && word(34)? == tag.check()).then_some((mac(0)?, mac(6)?, tag))
}

/// Which sequence numbers arrived: finds repetition and wrong order.
#[derive(Debug, Default)]
pub struct Arrivals {
    seen: Vec<u64>,
    next: u64,
    /// Frames that arrived for the first time.
    pub unique: u64,
    /// Frames that had arrived before.
    pub duplicates: u64,
    /// Frames that arrived after a later one.
    pub reordered: u64,
}

impl Arrivals {
    /// Notes one arrival of a sequence number below the number of frames sent; true when it is the first.
    pub fn note(&mut self, sequence: u64) -> bool {
        let (word, bit) = ((sequence / 64) as usize, 1 << (sequence % 64));
        if word >= self.seen.len() {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicates += 1;
            return false;
        }
        self.seen[word] |= bit;
        self.unique += 1;
        if sequence < self.next {
            self.reordered += 1;
        } else {
            self.next = sequence + 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);

    proptest! {
        #[test]
        fn frames_are_read_back_and_damage_is_seen(
            run: u32, sequence: u64, ticks: u64, at in 12..HEADER, flip in 1_u8..
        ) {
            let tag = Tag { run, sequence, ticks };
            let mut bytes = write(A, B, tag);
            prop_assert_eq!(read(&bytes), Some((A, B, tag)));
            bytes[at] ^= flip;
            prop_assert_ne!(read(&bytes).map(|(_, _, tag)| tag), Some(tag));
        }
    }

    #[test]
    fn arrivals_tell_order_and_repetition() {
        let mut arrivals = Arrivals::default();
        for sequence in [0, 1, 3, 2, 3, 200] {
            arrivals.note(sequence);
        }
        assert_eq!((arrivals.unique, arrivals.duplicates, arrivals.reordered), (5, 1, 1));
    }
}
