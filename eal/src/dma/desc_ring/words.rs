//! Completions in the descriptors' second words, checked four at a time on x86-64.

use super::DescRing;
use super::take::Lengths;
use crate::dma::packet::{Burst, DATA_ROOM};
use crate::dma::ring::{Place, RingEntry};

/// Pattern for a descriptor's second word: it matches if the packet is complete, in one piece, free of
/// errors, and no longer than a buffer.
#[derive(Clone, Copy, Debug)]
pub struct GoodWord {
    /// Bits that must be set. They do not overlap the length.
    pub bits: u64,
    /// Bits that are compared: those of `bits`, and those that must be 0.
    pub mask: u64,
    /// Position of the lowest of the 16 bits that hold the length in bytes: 0 or 32.
    pub len_shift: u32,
}

impl GoodWord {
    /// Returns the packet's length, at least 1, if `word` is good.
    #[inline(always)]
    pub fn len(self, word: u64) -> Option<usize> {
        let len = self.len_or_more(word);
        (len.wrapping_sub(1) < DATA_ROOM).then_some(len)
    }

    /// Returns the packet's length, or a number above [`DATA_ROOM`] if `word` is not good.
    #[inline(always)]
    pub(super) fn len_or_more(self, word: u64) -> usize {
        // A bit that differs ends up above the 16 bits of the length, and so makes the length too large.
        ((word ^ self.bits) & self.checked()).rotate_right(self.len_shift) as usize
    }

    /// All bits that are checked, including the length.
    #[inline(always)]
    fn checked(self) -> u64 {
        self.mask | u64::from(u16::MAX) << self.len_shift
    }
}

/// Second words of consecutive descriptors.
pub(super) struct Words<'a> {
    pub(super) first: RingEntry<'a, u64, 2>,
    pub(super) good: GoodWord,
}

impl Lengths for Words<'_> {
    #[inline(always)]
    unsafe fn len(&self, at: Place) -> Option<usize> {
        // SAFETY: there is a descriptor at `at`.
        self.good.len(unsafe { self.first.at(at) }.load::<1>())
    }

    #[inline(always)]
    unsafe fn is_completed(&self, at: Place) -> bool {
        // SAFETY: as above.
        self.good.bits == 0 || unsafe { self.first.at(at) }.load::<1>() & self.good.bits != 0
    }

    #[cfg(target_arch = "x86_64")]
    type Fours = ();

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn fours(&self, _at: Place) {}

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn four(&self, at: Place, shortest: usize, _: &mut ()) -> Option<std::arch::x86_64::__m128i> {
        use std::arch::x86_64::*;
        let shortest = shortest.max(1);
        // SAFETY: SSE2 is part of x86-64, and there are four descriptors from `at` on. A device writes each word
        // as a whole, and each word is loaded by one access of its size.
        unsafe {
            let mask = _mm_set1_epi64x(self.good.checked() as i64);
            let bits = _mm_set1_epi64x(self.good.bits as i64);
            let shortest = _mm_set1_epi64x(shortest as i64);
            let range = _mm_sub_epi64(_mm_set1_epi64x(DATA_ROOM as i64), shortest);
            let word = self.first.at(at).start().as_ptr().add(1).cast_const();
            let pair = |i: usize| {
                let low = _mm_castsi128_pd(_mm_loadl_epi64(word.add(4 * i).cast()));
                let words = _mm_castpd_si128(_mm_loadh_pd(low, word.add(4 * i + 2).cast()));
                let checked = _mm_and_si128(_mm_xor_si128(words, bits), mask);
                // The rotation of `GoodWord::len`.
                if self.good.len_shift == 0 { checked } else { _mm_shuffle_epi32::<0b10_11_00_01>(checked) }
            };
            let (low, high) = (pair(0), pair(1));
            // Per 16 bits: the excess of a length over the longest one in the lowest 16 bits of a word, over 0 in its
            // other bits.
            let over = |lengths| _mm_subs_epu16(_mm_sub_epi64(lengths, shortest), range);
            let odd = _mm_or_si128(over(low), over(high));
            let is_good = _mm_movemask_epi8(_mm_cmpeq_epi32(odd, _mm_setzero_si128())) == 0xffff;
            let (low, high) = (_mm_castsi128_ps(low), _mm_castsi128_ps(high));
            is_good.then(|| _mm_castps_si128(_mm_shuffle_ps::<0b10_00_10_00>(low, high)))
        }
    }
}

impl DescRing {
    /// Takes buffers in order from the tail, as packets, up to the first whose second word is not `good`.
    /// Returns the number of packets and the sum of their lengths in bytes.
    ///
    /// Also stops at the end of the ring, so that no index wraps in the loop, and when `burst` is full. Takes
    /// nothing while a descriptor between tail and head is empty.
    #[inline(always)]
    pub fn take_words(&mut self, good: GoodWord, burst: &mut Burst) -> (usize, u64) {
        let words = Words { first: self.view().entry(self.tail), good };
        // SAFETY: a run ends with the ring at the latest.
        unsafe { self.take(self.run(self.mask), &words, burst, |_, _| true) }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::take::tests::{compare, near};
    use super::*;
    use crate::dma::{DmaMemory, DmaRing};
    use crate::mem::{Backing, Region};

    #[test]
    fn four_words_are_checked_as_one_by_one() {
        let memory = DmaMemory::map(Region::new(256, Backing::SmallPages).unwrap(), &[]).unwrap();
        let ring: DmaRing<u64, 2> = DmaRing::new(&memory, 16, 16).unwrap();
        let legacy = GoodWord { bits: 3 << 32, mask: 3 << 32 | 0x97 << 40, len_shift: 0 };
        let advanced = GoodWord { bits: 3, mask: 0x8000_0003, len_shift: 32 };
        for good in [legacy, advanced, GoodWord { bits: 0, mask: 0, len_shift: 0 }] {
            let words = Words { first: ring.view().entry(8), good };
            let word = |i: u64| good.bits | (60 + i) << good.len_shift;
            (0..4).for_each(|i| ring.store::<1>(8 + i, word(i as u64)));
            for i in 0..4 {
                near(word(i as u64), |word| {
                    ring.store::<1>(8 + i, word);
                    // SAFETY: there are four descriptors from the eighth on.
                    unsafe { compare(&words) };
                });
                ring.store::<1>(8 + i, word(i as u64));
            }
        }
    }
}
