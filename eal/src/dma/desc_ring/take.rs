//! Takes buffers from descriptors in order, four at a time on x86-64.

use std::hint::assert_unchecked;

use super::DescRing;
use crate::dma::packet::{Burst, MAX_BURST, Packet};

/// Lengths that a device reports for consecutive descriptors.
pub(super) trait Lengths {
    /// Returns the length in bytes of the packet in descriptor `i`, at most [`DATA_ROOM`](super::DATA_ROOM), or
    /// `None` if the device does not report a good packet.
    ///
    /// # Safety
    /// There are more than `i` descriptors.
    unsafe fn len(&self, i: usize) -> Option<usize>;

    /// Returns false if packet `i` is certainly not good, in fewer instructions than [`Lengths::len`].
    ///
    /// # Safety
    /// There are more than `i` descriptors.
    #[inline(always)]
    unsafe fn is_completed(&self, _i: usize) -> bool {
        true
    }

    /// Returns the lengths of packets `i` to `i + 3`, 32 bits each, if all four are good.
    ///
    /// # Safety
    /// There are more than `i + 3` descriptors.
    #[cfg(target_arch = "x86_64")]
    unsafe fn four(&self, i: usize) -> Option<std::arch::x86_64::__m128i>;
}

impl DescRing {
    /// Takes up to `most` buffers in order from the tail as packets of `lengths`, which are those of the
    /// descriptors from the tail on. Stops at a length that is `None`, at a buffer for which `keep` returns
    /// false, and when `burst` is full. `keep` is called with the buffer's pool offset and the length. Returns
    /// the number of packets and the sum of their lengths in bytes.
    ///
    /// # Safety
    /// `most` buffers can be taken in order before the end of the ring, and `lengths` has as many.
    #[inline(always)]
    pub(super) unsafe fn take(
        &mut self,
        most: usize,
        lengths: &impl Lengths,
        burst: &mut Burst,
        keep: impl Fn(u32, usize) -> bool,
    ) -> (usize, u64) {
        let before = burst.len();
        // SAFETY: a burst is not longer than its capacity.
        unsafe { assert_unchecked(before <= MAX_BURST) };
        let most = most.min(MAX_BURST - before);
        let first = self.tail & self.mask;
        let fresh_bits = self.fresh_bits;
        // SAFETY: both are within their memory, the burst's if there is room.
        let (record, packets) = unsafe { (self.record.as_ptr().add(first), burst.as_mut_ptr().add(before)) };
        #[cfg(target_arch = "x86_64")]
        // SAFETY: there are `most` descriptors, and `burst` has room for as many packets.
        let (mut count, mut bytes, is_end) =
            unsafe { x86::take(most, lengths, fresh_bits, record, packets, &keep) };
        #[cfg(not(target_arch = "x86_64"))]
        let (mut count, mut bytes, is_end) = (0, 0, false);
        while count < most && !is_end {
            // SAFETY: as above.
            let (slot, len) = unsafe { (record.add(count).read(), lengths.len(count)) };
            let Some(len) = len.filter(|len| keep(slot, *len)) else { break };
            // SAFETY: as above.
            unsafe { packets.add(count).write(Packet::in_slot(slot, len, fresh_bits)) };
            bytes += len as u64;
            count += 1;
        }
        self.tail = self.tail.wrapping_add(count);
        // SAFETY: the packets up to there were written.
        unsafe { burst.set_len(before + count) };
        (count, bytes)
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::{Lengths, Packet};

    /// [`DescRing::take`](super::DescRing::take) in groups of four, up to the first group of which not all can be
    /// taken. Returns the number of packets, the sum of their lengths in bytes, and whether the next packet is
    /// known not to be good.
    ///
    /// # Safety
    /// From `record` and `packets` on there are `most` buffers, and places for as many packets; `lengths` has
    /// as many.
    #[inline(always)]
    pub(super) unsafe fn take(
        most: usize,
        lengths: &impl Lengths,
        fresh_bits: u64,
        record: *const u32,
        packets: *mut Packet,
        keep: &impl Fn(u32, usize) -> bool,
    ) -> (usize, u64, bool) {
        // SAFETY: SSE2 is part of x86-64. All accesses are within what the caller vouches for.
        unsafe {
            // The two halves of a fresh packet: its data offset and its tag.
            let (begin, tag) = (_mm_set1_epi32(fresh_bits as i32), _mm_set1_epi32((fresh_bits >> 32) as i32));
            let mut sum = _mm_setzero_si128();
            let (mut count, mut is_end) = (0, false);
            while most - count >= 4 {
                let Some(four) = lengths.four(count) else {
                    is_end = lengths.len(count).is_none();
                    break;
                };
                let at = _mm_or_si128(_mm_loadu_si128(record.add(count).cast()), begin);
                let rest = _mm_or_si128(_mm_slli_epi32::<16>(four), tag);
                let to = packets.add(count);
                _mm_storeu_si128(to.cast(), _mm_unpacklo_epi32(at, rest));
                _mm_storeu_si128(to.add(2).cast(), _mm_unpackhi_epi32(at, rest));
                let keep = |i: usize| keep(record.add(count + i).read(), (*to.add(i)).len());
                if !(keep(0) && keep(1) && keep(2) && keep(3)) {
                    break;
                }
                sum = _mm_add_epi32(sum, four);
                count += 4;
            }
            (count, total(sum), is_end)
        }
    }

    /// Sum of the four 32-bit lanes.
    #[inline(always)]
    pub(in super::super) fn total(sum: __m128i) -> u64 {
        // SAFETY: SSE2 is part of x86-64.
        let halves = unsafe { _mm_cvtsi128_si64(_mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum))) } as u64;
        (halves & u64::from(u32::MAX)) + (halves >> 32)
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
pub(super) mod tests {
    use std::arch::x86_64::*;

    use super::Lengths;

    /// Compares four packets at a time with one at a time.
    ///
    /// # Safety
    /// There are four descriptors.
    pub(in super::super) unsafe fn compare(lengths: &impl Lengths) {
        // SAFETY: SSE2 is part of x86-64, and there are four descriptors.
        let (four, single) = unsafe {
            let four = lengths.four(0).map(|four| {
                let mut lens = [0_u32; 4];
                _mm_storeu_si128(lens.as_mut_ptr().cast(), four);
                lens.map(|len| Some(len as usize))
            });
            (four, [0, 1, 2, 3].map(|i| lengths.len(i)))
        };
        assert_eq!(four, single.iter().all(Option::is_some).then_some(single));
    }

    /// Calls `set` with values of a word that are close to `good`: each of its four parts of 16 bits takes
    /// every value, and two bits differ.
    pub(in super::super) fn near(good: u64, mut set: impl FnMut(u64)) {
        let (values, pairs) = if cfg!(miri) { (16_381, 1009) } else { (1, 1) };
        for part in [0, 16, 32, 48] {
            let others = good & !(0xffff << part);
            (0..=0xffff_u64).step_by(values).for_each(|value| set(others | value << part));
        }
        let two = (0..64).flat_map(|first| (0..first).map(move |second| (first, second)));
        two.step_by(pairs).for_each(|(first, second)| set(good ^ 1 << first ^ 1 << second));
    }
}
