//! Completions in the descriptors' second words, checked four at a time on x86-64.

use std::hint::assert_unchecked;

use super::DescRing;
use crate::dma::packet::{Burst, DATA_ROOM, MAX_BURST, Packet};

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
        // A bit that differs ends up above the 16 bits of the length, and so makes the length too large.
        let len = ((word ^ self.bits) & self.checked()).rotate_right(self.len_shift);
        (len.wrapping_sub(1) < DATA_ROOM as u64).then_some(len as usize)
    }

    /// All bits that are checked, including the length.
    #[inline(always)]
    fn checked(self) -> u64 {
        self.mask | u64::from(u16::MAX) << self.len_shift
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
        let before = burst.len();
        // SAFETY: a burst is not longer than its capacity.
        unsafe { assert_unchecked(before <= MAX_BURST) };
        let most = self.run(self.mask).min(MAX_BURST - before);
        let first = self.tail & self.mask;
        let (view, fresh_bits) = (self.view(), self.fresh_bits);
        // SAFETY: `first` is below the number of descriptors, and `before` is at most the capacity of the
        // burst.
        let (record, packets) = unsafe { (self.record.as_ptr().add(first), burst.as_mut_ptr().add(before)) };
        let entries = view.entry(first);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the run has `most` descriptors, and `burst` has room for as many packets.
        let (fours, mut bytes) =
            unsafe { x86::take(most / 4, good, fresh_bits, entries.start(), record, packets) };
        #[cfg(not(target_arch = "x86_64"))]
        let (fours, mut bytes) = (0, 0);
        let mut count = 4 * fours;
        while count < most {
            // SAFETY: as above.
            let (slot, entry) = unsafe { (record.add(count).read(), entries.ahead(count)) };
            let Some(len) = good.len(entry.load::<1>()) else { break };
            bytes += len as u64;
            // SAFETY: as above.
            unsafe { packets.add(count).write(Packet::in_slot(slot, len, fresh_bits)) };
            count += 1;
        }
        self.tail = self.tail.wrapping_add(count);
        // SAFETY: all packets up to the new length were written.
        unsafe { burst.set_len(before + count) };
        (count, bytes)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ptr::NonNull;

    use super::{DATA_ROOM, GoodWord, Packet};

    /// Takes four buffers at a time, up to `most` times, while all four words are good. Returns how many
    /// times, and the sum of the packets' lengths in bytes.
    ///
    /// # Safety
    /// `descriptors`, `record` and `packets` are valid for four times `most` descriptors of two words, record
    /// entries, and packets. Nothing else in this process accesses the descriptors during the call.
    #[inline(always)]
    pub(super) unsafe fn take(
        most: usize,
        good: GoodWord,
        fresh_bits: u64,
        descriptors: NonNull<u64>,
        record: *const u32,
        packets: *mut Packet,
    ) -> (usize, u64) {
        // SAFETY: SSE2 is part of x86-64. All accesses are within the memory that the caller guarantees. A
        // device writes each word as a whole, and each word is loaded by one access of its size.
        unsafe {
            let mask = _mm_set1_epi64x(good.checked() as i64);
            let bits = _mm_set1_epi64x(good.bits as i64);
            let longest = _mm_set1_epi64x(DATA_ROOM as i64 - 1);
            let one = _mm_set1_epi64x(1);
            // The two halves of a fresh packet: its data offset and its tag.
            let (begin, tag) = (_mm_set1_epi32(fresh_bits as i32), _mm_set1_epi32((fresh_bits >> 32) as i32));
            let zero = _mm_setzero_si128();
            let mut sum = zero;
            for four in 0..most {
                let word = descriptors.as_ptr().add(8 * four + 1).cast_const();
                let pair = |i: usize| {
                    let low = _mm_castsi128_pd(_mm_loadl_epi64(word.add(4 * i).cast()));
                    let words = _mm_castpd_si128(_mm_loadh_pd(low, word.add(4 * i + 2).cast()));
                    let checked = _mm_and_si128(_mm_xor_si128(words, bits), mask);
                    // The rotation of `GoodWord::len`.
                    if good.len_shift == 0 { checked } else { _mm_shuffle_epi32::<0b10_11_00_01>(checked) }
                };
                let (low, high) = (pair(0), pair(1));
                // Per 16 bits: the excess over the longest length in the lowest 16 bits of a word, over 0 in
                // its other bits.
                let over = |lengths| _mm_subs_epu16(_mm_sub_epi64(lengths, one), longest);
                let odd = _mm_or_si128(over(low), over(high));
                if _mm_movemask_epi8(_mm_cmpeq_epi32(odd, zero)) != 0xffff {
                    return (four, total(sum));
                }
                sum = _mm_add_epi64(sum, _mm_add_epi64(low, high));
                let lengths = _mm_castps_si128(_mm_shuffle_ps::<0b10_00_10_00>(
                    _mm_castsi128_ps(low),
                    _mm_castsi128_ps(high),
                ));
                let at = _mm_or_si128(_mm_loadu_si128(record.add(4 * four).cast()), begin);
                let rest = _mm_or_si128(_mm_slli_epi32::<16>(lengths), tag);
                let to = packets.add(4 * four).cast::<__m128i>();
                _mm_storeu_si128(to, _mm_unpacklo_epi32(at, rest));
                _mm_storeu_si128(to.add(1), _mm_unpackhi_epi32(at, rest));
            }
            (most, total(sum))
        }
    }

    /// Sum of the two 64-bit halves.
    #[inline(always)]
    fn total(sum: __m128i) -> u64 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_cvtsi128_si64(_mm_add_epi64(sum, _mm_unpackhi_epi64(sum, sum))) as u64 }
    }
}
