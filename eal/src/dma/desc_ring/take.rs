//! Takes buffers from descriptors in order, four at a time on x86-64.

use std::hint::assert_unchecked;
use std::ptr::NonNull;

use super::DescRing;
use crate::dma::packet::{Burst, MAX_BURST, Packet};
use crate::dma::ring::Place;

/// Lengths that a device reports for consecutive descriptors.
pub(super) trait Lengths {
    /// Returns the length in bytes of the packet at `at`, at most [`DATA_ROOM`](super::DATA_ROOM), or
    /// `None` if the device does not report a good packet.
    ///
    /// # Safety
    /// There is a descriptor at `at`.
    unsafe fn len(&self, at: Place) -> Option<usize>;

    /// Returns false if the packet at `at` is certainly not good, in fewer instructions than [`Lengths::len`].
    ///
    /// # Safety
    /// There is a descriptor at `at`.
    #[inline(always)]
    unsafe fn is_completed(&self, _at: Place) -> bool {
        true
    }

    /// What [`Lengths::four`] keeps from one call to the next.
    #[cfg(target_arch = "x86_64")]
    type Fours: Copy;

    /// Returns the state for a first call of [`Lengths::four`] at `at`.
    #[cfg(target_arch = "x86_64")]
    fn fours(&self, at: Place) -> Self::Fours;

    /// Returns the lengths of four packets from `at` on, 32 bits each, if all four are good and have at least
    /// `shortest` bytes. `at` is four places after that of the last call with this state.
    ///
    /// # Safety
    /// There are four descriptors from `at` on.
    #[cfg(target_arch = "x86_64")]
    unsafe fn four(
        &self,
        at: Place,
        shortest: usize,
        fours: &mut Self::Fours,
    ) -> Option<std::arch::x86_64::__m128i>;
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
        let (record, packets) = unsafe {
            let packets = NonNull::new_unchecked(burst.as_mut_ptr()).add(before);
            (NonNull::new_unchecked(self.record.as_mut_ptr()).add(first), packets)
        };
        let (mut at, mut end) = (Place::HERE, Place::HERE.ahead(most));
        #[cfg(not(target_arch = "x86_64"))]
        let mut bytes = 0;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: there are `most` descriptors, and `burst` has room for as many packets.
        let mut bytes =
            unsafe { x86::take((&mut at, &mut end), lengths, fresh_bits, record, packets, &keep) };
        while at < end {
            // SAFETY: as above.
            let (slot, len) = unsafe { (at.of(record).read(), lengths.len(at)) };
            let Some(len) = len.filter(|len| keep(slot, *len)) else { break };
            // SAFETY: as above.
            unsafe { at.of(packets).write(Packet::in_slot(slot, len, fresh_bits)) };
            bytes += len as u64;
            at = at.ahead(1);
        }
        let count = at.since(Place::HERE);
        self.tail = self.tail.wrapping_add(count);
        // SAFETY: the packets up to there were written.
        unsafe { burst.set_len(before + count) };
        (count, bytes)
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::{Lengths, NonNull, Packet, Place};

    /// [`DescRing::take`](super::DescRing::take) in groups of four from `at` on, up to the first group of which not
    /// all can be taken. Moves `at` there, and `end` too if the next packet is known not to be good. Returns the
    /// sum of the packets' lengths in bytes.
    ///
    /// # Safety
    /// From `record` and `packets` on there are buffers, and places for packets, up to `end`; `lengths` has as many.
    #[inline(always)]
    pub(super) unsafe fn take(
        (at, end): (&mut Place, &mut Place),
        lengths: &impl Lengths,
        fresh_bits: u64,
        record: NonNull<u32>,
        packets: NonNull<Packet>,
        keep: &impl Fn(u32, usize) -> bool,
    ) -> u64 {
        // SAFETY: SSE2 is part of x86-64. All accesses are within what the caller vouches for.
        unsafe {
            // The two halves of a fresh packet: its data offset and its tag.
            let (begin, tag) = (_mm_set1_epi32(fresh_bits as i32), _mm_set1_epi32((fresh_bits >> 32) as i32));
            let (mut sum, mut fours) = (_mm_setzero_si128(), lengths.fours(*at));
            while at.is_before(*end, 4) {
                if !lengths.is_completed(*at) {
                    *end = *at;
                    break;
                }
                let Some(four) = lengths.four(*at, 0, &mut fours) else { break };
                let (record, to) = (at.of(record), at.of(packets));
                let begins = _mm_or_si128(_mm_loadu_si128(record.as_ptr().cast()), begin);
                let rest = _mm_or_si128(_mm_slli_epi32::<16>(four), tag);
                _mm_storeu_si128(to.as_ptr().cast(), _mm_unpacklo_epi32(begins, rest));
                _mm_storeu_si128(to.add(2).as_ptr().cast(), _mm_unpackhi_epi32(begins, rest));
                let keep = |i: usize| keep(record.add(i).read(), to.add(i).as_ref().len());
                if !(keep(0) && keep(1) && keep(2) && keep(3)) {
                    break;
                }
                sum = _mm_add_epi32(sum, four);
                *at = at.ahead(4);
            }
            total(sum)
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

    use super::{Lengths, Place};

    /// Compares four packets at a time with one at a time, of any length and of at least 60 bytes.
    ///
    /// # Safety
    /// There are four descriptors.
    pub(in super::super) unsafe fn compare(lengths: &impl Lengths) {
        for shortest in [0, 60] {
            // SAFETY: SSE2 is part of x86-64, and there are four descriptors.
            let (four, single) = unsafe {
                let four = lengths.four(Place::HERE, shortest, &mut lengths.fours(Place::HERE)).map(|four| {
                    let mut lens = [0_u32; 4];
                    _mm_storeu_si128(lens.as_mut_ptr().cast(), four);
                    lens.map(|len| Some(len as usize))
                });
                (four, [0, 1, 2, 3].map(|i| lengths.len(Place::HERE.ahead(i))))
            };
            let are_good = single.iter().all(|len| len.is_some_and(|len| len >= shortest));
            assert_eq!(four, are_good.then_some(single), "{shortest}");
        }
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
