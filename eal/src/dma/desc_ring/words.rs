//! Completions that are in the descriptors' second words, four at a time where the processor can.

use std::hint::assert_unchecked;

use super::DescRing;
use crate::dma::packet::{Burst, DATA_ROOM, MAX_BURST, Packet};

/// What a second word says of a packet that is complete, whole, free of errors, and no longer than a buffer.
#[derive(Clone, Copy, Debug)]
pub struct GoodWord {
    /// The bits that are set then. None of them is among those of the length.
    pub bits: u64,
    /// The bits that count: those of `bits`, and those that must be 0.
    pub mask: u64,
    /// Lowest of the 16 bits that are the length in bytes: 0, or 32.
    pub len_shift: u32,
}

impl GoodWord {
    /// The packet's length, at least 1, if `word` is as it should be.
    #[inline(always)]
    pub fn len(self, word: u64) -> Option<usize> {
        // Whatever is not as it should be makes the length too large: it goes above it.
        let len = ((word ^ self.bits) & self.checked()).rotate_right(self.len_shift);
        (len.wrapping_sub(1) < DATA_ROOM as u64).then_some(len as usize)
    }

    /// All bits that are looked at.
    #[inline(always)]
    fn checked(self) -> u64 {
        self.mask | u64::from(u16::MAX) << self.len_shift
    }
}

impl DescRing {
    /// Takes the buffers from the tail on, in order, as packets, up to the first whose second word is not `good`. Gives the
    /// number of packets, and of their bytes.
    ///
    /// Ends at the end of the ring, too, so that no index wraps in the loop, and when `burst` is full. Takes nothing
    /// while a descriptor in between is empty.
    #[inline(always)]
    pub fn take_words(&mut self, good: GoodWord, burst: &mut Burst) -> (usize, u64) {
        let before = burst.len();
        // SAFETY: a burst is not longer than its capacity.
        unsafe { assert_unchecked(before <= MAX_BURST) };
        let most = self.run(self.mask).min(MAX_BURST - before);
        let first = self.tail & self.mask;
        let (view, fresh_bits) = (self.view(), self.fresh_bits);
        // SAFETY: both are within their memory, the burst's if there is room.
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
        // SAFETY: the packets up to there were written.
        unsafe { burst.set_len(before + count) };
        (count, bytes)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ptr::NonNull;

    use super::{DATA_ROOM, GoodWord, Packet};

    /// Takes up to `most` times four buffers while four words are good. Gives how often, and the bytes of the packets.
    ///
    /// # Safety
    /// From `descriptors`, `record` and `packets` on there are as many descriptors of two words, records of buffers, and
    /// places for packets. Nothing else of ours reaches the descriptors meanwhile.
    #[inline(always)]
    pub(super) unsafe fn take(
        most: usize,
        good: GoodWord,
        fresh_bits: u64,
        descriptors: NonNull<u64>,
        record: *const u32,
        packets: *mut Packet,
    ) -> (usize, u64) {
        // SAFETY: SSE2 is part of x86-64. All accesses are within what the caller vouches for. A device writes a word whole, and
        // each word is loaded by one access of its size.
        unsafe {
            let mask = _mm_set1_epi64x(good.checked() as i64);
            let bits = _mm_set1_epi64x(good.bits as i64);
            let longest = _mm_set1_epi64x(DATA_ROOM as i64 - 1);
            let one = _mm_set1_epi64x(1);
            // Halves of a fresh packet: where its data begins, and its tag.
            let (begin, tag) = (_mm_set1_epi32(fresh_bits as i32), _mm_set1_epi32((fresh_bits >> 32) as i32));
            let zero = _mm_setzero_si128();
            let mut sum = zero;
            for four in 0..most {
                let word = descriptors.as_ptr().add(8 * four + 1).cast_const();
                let pair = |i: usize| {
                    let low = _mm_castsi128_pd(_mm_loadl_epi64(word.add(4 * i).cast()));
                    let words = _mm_castpd_si128(_mm_loadh_pd(low, word.add(4 * i + 2).cast()));
                    let checked = _mm_and_si128(_mm_xor_si128(words, bits), mask);
                    // As `GoodWord::len` rotates it.
                    if good.len_shift == 0 { checked } else { _mm_shuffle_epi32::<0b10_11_00_01>(checked) }
                };
                let (low, high) = (pair(0), pair(1));
                // Of each 16 bits what is above the longest length in the lowest ones, and above 0 in the others.
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

    /// Sum of both halves.
    #[inline(always)]
    fn total(sum: __m128i) -> u64 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_cvtsi128_si64(_mm_add_epi64(sum, _mm_unpackhi_epi64(sum, sum))) as u64 }
    }
}
