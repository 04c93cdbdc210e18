//! Completions in a used ring (virtio 1.2, 2.7.8), checked four at a time on x86-64.

use super::DescRing;
use super::take::Lengths;
use crate::dma::packet::{Burst, DATA_ROOM, HEADROOM, Packet};
use crate::dma::pool::{Buffers, PoolCache};
use crate::dma::ring::{DmaRing, Place, RingEntry};

/// Consecutive elements of a used ring: the lower half of each is a descriptor's index, the upper half a length
/// in bytes.
pub(super) struct UsedElements<'a> {
    /// The element from which places are counted.
    pub(super) first: RingEntry<'a, u64, 1>,
    /// Index that it names if completions are in order.
    pub(super) index: usize,
    /// Number of bytes before the packet's data that the lengths include.
    pub(super) front: usize,
}

impl UsedElements<'_> {
    /// Returns the length in bytes of the packet at `at`, or a number above [`DATA_ROOM`] if the device does not
    /// report a good packet.
    ///
    /// # Safety
    /// There is an element at `at`.
    #[inline(always)]
    pub(super) unsafe fn len_or_more(&self, at: Place) -> usize {
        let expected = at.index(self.index) as u64 + ((self.front as u64) << 32);
        // SAFETY: by the caller's contract.
        let rest = unsafe { self.first.at(at) }.load::<0>().wrapping_sub(expected);
        // The length ends up in the lower half, and a difference of the index above it.
        rest.rotate_left(32) as usize
    }

    /// Whether each of the first `count` elements names its own descriptor.
    ///
    /// # Safety
    /// There are `count` elements.
    #[inline(always)]
    unsafe fn are_in_order(&self, count: usize) -> bool {
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86-64, and there are `count` elements.
        unsafe {
            use std::arch::x86_64::*;
            let element = self.first.start().as_ptr().cast_const();
            let mut expected = _mm_add_epi32(_mm_set1_epi32(self.index as i32), _mm_setr_epi32(0, 1, 2, 3));
            let mut odd = _mm_setzero_si128();
            while count - done >= 4 {
                let pair = |i: usize| _mm_loadu_ps(element.add(done + 2 * i).cast());
                let ids = _mm_castps_si128(_mm_shuffle_ps::<0b10_00_10_00>(pair(0), pair(1)));
                odd = _mm_or_si128(odd, _mm_xor_si128(ids, expected));
                expected = _mm_add_epi32(expected, _mm_set1_epi32(4));
                done += 4;
            }
            if _mm_movemask_epi8(_mm_cmpeq_epi32(odd, _mm_setzero_si128())) != 0xffff {
                return false;
            }
        }
        (done..count).all(|i| {
            // SAFETY: there are `count` elements.
            let element = unsafe { self.first.at(Place::HERE.ahead(i)) };
            element.load::<0>() as u32 == (self.index + i) as u32
        })
    }
}

impl Lengths for UsedElements<'_> {
    #[inline(always)]
    unsafe fn len(&self, at: Place) -> Option<usize> {
        // SAFETY: by the caller's contract.
        let len = unsafe { self.len_or_more(at) };
        (len <= DATA_ROOM).then_some(len)
    }

    /// The next four elements if their lengths are 0.
    #[cfg(target_arch = "x86_64")]
    type Fours = [std::arch::x86_64::__m128i; 2];

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn fours(&self, at: Place) -> Self::Fours {
        use std::arch::x86_64::*;
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let (index, front) = (_mm_set1_epi64x(at.index(self.index) as i64), self.front as i32);
            let expected = |i| _mm_add_epi32(index, _mm_setr_epi32(i, front, i + 1, front));
            // `map` of an array is a call per four elements where the standard library is not optimized together
            // with this crate (no LTO).
            [expected(0), expected(2)]
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn four(
        &self,
        at: Place,
        shortest: usize,
        fours: &mut Self::Fours,
    ) -> Option<std::arch::x86_64::__m128i> {
        use std::arch::x86_64::*;
        // SAFETY: SSE2 is part of x86-64, and there are four elements from `at` on. If the halves of an element are from
        // two writes of the device, they are checked like any other input.
        unsafe {
            let [expected_low, expected_high] = *fours;
            let next = |expected| _mm_add_epi32(expected, _mm_setr_epi32(4, 0, 4, 0));
            *fours = [next(expected_low), next(expected_high)];
            let shortest = _mm_set1_epi64x((shortest as i64) << 32);
            let range = _mm_sub_epi64(_mm_set1_epi64x((DATA_ROOM as i64) << 32), shortest);
            let element = self.first.at(at).start().as_ptr().cast::<__m128i>().cast_const();
            let low = _mm_sub_epi32(_mm_loadu_si128(element), expected_low);
            let high = _mm_sub_epi32(_mm_loadu_si128(element.add(1)), expected_high);
            // Per 16 bits: the excess of a length over the longest one in its lowest 16 bits, over 0 in all others.
            let over = |elements| _mm_subs_epu16(_mm_sub_epi32(elements, shortest), range);
            let odd = _mm_or_si128(over(low), over(high));
            let is_good = _mm_movemask_epi8(_mm_cmpeq_epi32(odd, _mm_setzero_si128())) == 0xffff;
            let (low, high) = (_mm_castsi128_ps(low), _mm_castsi128_ps(high));
            is_good.then(|| _mm_castps_si128(_mm_shuffle_ps::<0b11_01_11_01>(low, high)))
        }
    }
}

/// Packet that the device has completed and the ring still owns.
#[derive(Debug)]
pub struct Completed<'a> {
    slot: u32,
    /// Length of the packet in bytes.
    pub len: usize,
    buffers: Buffers<'a>,
}

impl Completed<'_> {
    /// Reads the bytes directly before the packet's data. See [`PoolCache::read_header`].
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        // SAFETY: the ring owns the buffer and is borrowed. `buffers_in` has checked the pool.
        unsafe { self.buffers.read_before(self.slot + HEADROOM as u32) }
    }
}

impl DescRing {
    /// Takes up to `most` buffers in order from the tail, as packets, when completions are elements of a used
    /// ring (virtio 1.2, 2.7.8). Their lengths include `front` bytes before the packet's data. Stops at an
    /// element that does not name its own descriptor, at a length that does not fit a buffer, and at a packet
    /// for which `keep` returns false. Returns the number of packets and the sum of their lengths in bytes.
    ///
    /// Also stops at the end of either ring, so that no index wraps in the loop, and when `burst` is full.
    /// Takes nothing while a descriptor between tail and head is empty.
    ///
    /// # Panics
    /// Panics if the ring's buffers do not belong to the pool of `cache`.
    #[inline(always)]
    pub fn take_used(
        &mut self,
        used: &DmaRing<u64>,
        most: usize,
        front: usize,
        cache: &PoolCache,
        burst: &mut Burst,
        keep: impl Fn(&Completed<'_>) -> bool,
    ) -> (usize, u64) {
        let most = most.min(self.run(used.view().mask()));
        let (elements, buffers) = (self.elements(used, front), self.buffers_in(cache));
        // SAFETY: a run of `most` buffers ends with either ring at the latest.
        unsafe { self.take(most, &elements, burst, |slot, len| keep(&Completed { slot, len, buffers })) }
    }

    /// [`DescRing::take_used`] for one packet, in fewer instructions. Returns its length in bytes, or `None` if
    /// there is no room or nothing to take.
    ///
    /// # Panics
    /// As [`DescRing::take_used`].
    #[inline(always)]
    pub fn take_one_used(
        &mut self,
        used: &DmaRing<u64>,
        front: usize,
        cache: &PoolCache,
        burst: &mut Burst,
        keep: impl Fn(&Completed<'_>) -> bool,
    ) -> Option<usize> {
        if self.head == self.tail || self.holes > 0 || burst.is_full() {
            return None;
        }
        let (elements, buffers) = (self.elements(used, front), self.buffers_in(cache));
        // SAFETY: the masked index is below the number of descriptors, and `elements` has at least one.
        let (slot, len) =
            unsafe { (*self.record.get_unchecked(self.tail & self.mask), elements.len(Place::HERE)?) };
        if !keep(&Completed { slot, len, buffers }) {
            return None;
        }
        self.tail = self.tail.wrapping_add(1);
        burst.push(Packet::in_slot(slot, len, self.fresh_bits));
        Some(len)
    }

    /// Returns how many of the next `most` elements of `used`, from the tail on, name their own descriptors: all up
    /// to the end of either ring, or 0 if one of them names another descriptor or a descriptor between tail and head
    /// is empty.
    #[inline(always)]
    pub fn used_in_order(&self, used: &DmaRing<u64>, most: usize) -> usize {
        let most = most.min(self.run(used.view().mask()));
        // SAFETY: a run of `most` buffers ends with either ring at the latest.
        if unsafe { self.elements(used, 0).are_in_order(most) } { most } else { 0 }
    }

    /// Returns the buffers of [`DescRing::used_in_order`] to `cache`, as [`DescRing::reclaim`] does, and their number.
    #[inline(always)]
    pub fn reclaim_used(&mut self, used: &DmaRing<u64>, most: usize, cache: &mut PoolCache) -> usize {
        let count = self.used_in_order(used, most);
        self.reclaim(count, cache);
        count
    }

    /// Returns the elements of `used` from the tail on.
    #[inline(always)]
    fn elements<'a>(&self, used: &'a DmaRing<u64>, front: usize) -> UsedElements<'a> {
        let used = used.view();
        UsedElements { first: used.entry(self.tail), index: self.tail & self.mask & used.mask(), front }
    }

    /// Returns the addresses of the buffers in the pool of `cache`, which must be the ring's pool.
    #[inline(always)]
    fn buffers_in<'a>(&self, cache: &'a PoolCache) -> Buffers<'a> {
        assert!(self.fresh_bits == cache.fresh_bits(), "the ring owns buffers of another pool");
        cache.buffers()
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::take::tests::{compare, near};
    use super::*;
    use crate::dma::DmaMemory;
    use crate::mem::{Backing, Region};

    #[test]
    fn four_elements_are_checked_as_one_by_one() {
        let memory = DmaMemory::map(Region::new(256, Backing::SmallPages).unwrap(), &[]).unwrap();
        let ring: DmaRing<u64> = DmaRing::new(&memory, 32, 8).unwrap();
        for (index, front) in [(0, 0), (4, 12), (27, 12)] {
            let elements = UsedElements { first: ring.view().entry(index), index, front };
            let good = |i: usize| (index + i) as u64 | ((front + 60 + i) as u64) << 32;
            (0..4).for_each(|i| ring.store::<0>(index + i, good(i)));
            for i in 0..4 {
                near(good(i), |element| {
                    ring.store::<0>(index + i, element);
                    // SAFETY: there are four elements from `index` on.
                    unsafe { compare(&elements) };
                    let is_in_order = element as u32 as usize == index + i;
                    // SAFETY: as above.
                    assert_eq!(unsafe { elements.are_in_order(4) }, is_in_order);
                });
                ring.store::<0>(index + i, good(i));
            }
        }
    }
}
