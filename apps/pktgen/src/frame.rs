//! Frames of a stream: an Ethernet header, and a payload of which the receiver knows every byte.
//!
//! | bytes | what |
//! |---|---|
//! | 0..6 | destination |
//! | 6..12 | source |
//! | 12..14 | EtherType 0x88b5, for local experiments (IEEE 802) |
//! | 14..18 | run number, little-endian |
//! | 18..26 | sequence number |
//! | 26..34 | due time of the frame, in ticks of the sender's clock |
//! | 34 to the last 8 | filler, which depends on the sequence number |
//! | the last 8 | check value, computed from the three numbers and the length |
//!
//! Comparing the filler detects what a checksum over it would detect, and costs less: both ends only copy.
//! The check value is at the end, so that it ties both ends of a frame together.

use std::ops::RangeInclusive;

use vireo_drivers::port::MacAddr;
use vireo_eal::dma::MAX_FRAME;

/// Shortest frame, without frame check sequence.
pub const SHORTEST: usize = 60;
/// Longest frame, without frame check sequence.
pub const LONGEST: usize = MAX_FRAME;

/// Bytes before the filler.
const HEADER: usize = 34;
/// Bytes after the filler.
const CHECK: usize = 8;
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// The multiplier of Fibonacci hashing, 2^64 divided by the golden ratio.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Number of offsets in `FILLER` at which the filler of a frame can begin.
const FILLERS: usize = 256;
static FILLER: [u8; LONGEST + FILLERS] = {
    let (mut bytes, mut state, mut i) = ([0; LONGEST + FILLERS], MIX, 0);
    while i < bytes.len() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes[i] = (state >> 32) as u8;
        i += 1;
    }
    bytes
};

/// Numbers that a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Run number.
    pub run: u32,
    /// Position in the stream, from 0.
    pub sequence: u64,
    /// When the frame was due, in ticks of the sender's clock.
    pub ticks: u64,
}

impl Tag {
    fn check(self, len: usize) -> [u8; CHECK] {
        let numbers = self.sequence ^ self.ticks.rotate_left(32) ^ u64::from(self.run);
        (numbers ^ (len as u64).rotate_left(48)).wrapping_mul(MIX).to_le_bytes()
    }

    fn filler(self, len: usize) -> &'static [u8] {
        let start = self.sequence.wrapping_mul(MIX) as usize % FILLERS;
        &FILLER[start..start + len - HEADER - CHECK]
    }
}

/// Returns the length in bytes of frame `sequence` in a stream with frames of `sizes`.
pub fn length(sizes: &RangeInclusive<usize>, sequence: u64) -> usize {
    let choices = sizes.end() - sizes.start() + 1;
    if choices == 1 {
        return *sizes.start();
    }
    let fraction = sequence.wrapping_mul(MIX) >> 32;
    sizes.start() + ((fraction * choices as u64) >> 32) as usize
}

/// Why a received frame is not counted as one that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The frame is of the run with this number.
    OtherRun(u32),
    /// The frame is not of this format.
    Stray,
    /// The frame is of this run, but differs from what was sent.
    Corrupt,
}

/// Fills `bytes`, which has [`SHORTEST`] to [`LONGEST`] bytes, with a frame.
pub fn write(bytes: &mut [u8], destination: MacAddr, source: MacAddr, tag: Tag) {
    let len = bytes.len();
    bytes[0..6].copy_from_slice(&destination.0);
    bytes[6..12].copy_from_slice(&source.0);
    bytes[12..14].copy_from_slice(&ETHERTYPE);
    bytes[14..18].copy_from_slice(&tag.run.to_le_bytes());
    bytes[18..26].copy_from_slice(&tag.sequence.to_le_bytes());
    bytes[26..34].copy_from_slice(&tag.ticks.to_le_bytes());
    bytes[HEADER..len - CHECK].copy_from_slice(tag.filler(len));
    bytes[len - CHECK..].copy_from_slice(&tag.check(len));
}

/// Returns destination, source and tag of a frame of `run`.
///
/// # Errors
/// When the frame is of another run, of another format, or damaged.
pub fn read(bytes: &[u8], run: u32) -> Result<(MacAddr, MacAddr, Tag), Wrong> {
    let len = bytes.len();
    let array = |at: usize| bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    let word = |at: usize| array(at).map(u64::from_le_bytes).ok_or(Wrong::Stray);
    let mac =
        |at: usize| array(at).map(|[a, b, c, d, e, f, ..]| MacAddr([a, b, c, d, e, f])).ok_or(Wrong::Stray);
    if len < SHORTEST || bytes[12..14] != ETHERTYPE {
        return Err(Wrong::Stray);
    }
    let of = word(14)? as u32;
    if of != run {
        return Err(Wrong::OtherRun(of));
    }
    let tag = Tag { run, sequence: word(18)?, ticks: word(26)? };
    if len > LONGEST
        || bytes[len - CHECK..] != tag.check(len)
        || bytes[HEADER..len - CHECK] != *tag.filler(len)
    {
        return Err(Wrong::Corrupt);
    }
    Ok((mac(0)?, mac(6)?, tag))
}

/// Length of the bitmap in [`Arrivals`], in words of 64 frames. A frame that falls further behind cannot be
/// recognized as new or as a duplicate.
const WORDS: usize = 1024;

/// Sequence numbers that arrived recently. Detects duplicates and wrong order in constant memory.
#[derive(Debug)]
pub struct Arrivals {
    seen: Box<[u64; WORDS]>,
    next: u64,
    /// Frames that arrived for the first time.
    pub unique: u64,
    /// Frames that had arrived before.
    pub duplicates: u64,
    /// Frames that arrived after a later one.
    pub reordered: u64,
}

impl Default for Arrivals {
    fn default() -> Self {
        Self { seen: Box::new([0; WORDS]), next: 0, unique: 0, duplicates: 0, reordered: 0 }
    }
}

impl Arrivals {
    /// Records the arrival of a sequence number, which is below the number of frames sent. Returns true if it
    /// is the first arrival of that number. A frame that arrives after 65,000 later ones is counted only as
    /// reordered, because it is unknown whether it arrived before.
    pub fn note(&mut self, sequence: u64) -> bool {
        let word = sequence / 64;
        if sequence >= self.next {
            let unused = self.next.div_ceil(64).max((word + 1).saturating_sub(WORDS as u64));
            (unused..=word).for_each(|word| *self.word(word) = 0);
        } else if word + (WORDS as u64) <= (self.next - 1) / 64 {
            self.reordered += 1;
            return false;
        }
        let (bit, seen) = (1 << (sequence % 64), self.word(word));
        if *seen & bit != 0 {
            self.duplicates += 1;
            return false;
        }
        *seen |= bit;
        self.unique += 1;
        if sequence < self.next {
            self.reordered += 1;
        } else {
            self.next = sequence + 1;
        }
        true
    }

    fn word(&mut self, word: u64) -> &mut u64 {
        &mut self.seen[word as usize % WORDS]
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
            run: u32, sequence: u64, ticks: u64, len in SHORTEST..=LONGEST, at in 12..LONGEST, flip in 1_u8..
        ) {
            let tag = Tag { run, sequence, ticks };
            let mut bytes = vec![0; len];
            write(&mut bytes, A, B, tag);
            prop_assert_eq!(read(&bytes, run), Ok((A, B, tag)));
            bytes[12 + at % (len - 12)] ^= flip;
            prop_assert!(read(&bytes, run).is_err());
        }

        #[test]
        fn a_frame_that_was_cut_or_grew_is_corrupt(len in SHORTEST + 1..LONGEST, sequence: u64) {
            let mut bytes = vec![0; len];
            write(&mut bytes, A, B, Tag { run: 7, sequence, ticks: 1 });
            prop_assert_eq!(read(&bytes[..len - 1], 7), Err(Wrong::Corrupt));
            bytes.push(0);
            prop_assert_eq!(read(&bytes, 7), Err(Wrong::Corrupt));
            prop_assert_eq!(read(&bytes, 8), Err(Wrong::OtherRun(7)));
        }

        #[test]
        fn lengths_are_within_their_range(first in SHORTEST..=LONGEST, more in 0..100_usize, sequence: u64) {
            let sizes = first..=first + more;
            prop_assert!(sizes.contains(&length(&sizes, sequence)));
        }
    }

    #[test]
    fn every_length_comes() {
        let mut lengths: Vec<usize> = (0..1000).map(|sequence| length(&(60..=69), sequence)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        assert_eq!(lengths, (60..=69).collect::<Vec<_>>());
    }

    #[test]
    fn arrivals_tell_order_and_repetition() {
        let mut arrivals = Arrivals::default();
        for sequence in [0, 1, 3, 2, 3, 200] {
            arrivals.note(sequence);
        }
        assert_eq!((arrivals.unique, arrivals.duplicates, arrivals.reordered), (5, 1, 1));
        // A lap later, the same bits are free again, and earlier frames are too old to be recognized.
        for sequence in [1 << 16, (1 << 16) + 3, 130, 3, (1 << 20), (1 << 20) - 5, (1 << 20) - 5] {
            arrivals.note(sequence);
        }
        assert_eq!((arrivals.unique, arrivals.duplicates, arrivals.reordered), (10, 2, 4));
    }
}
