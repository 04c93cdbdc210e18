//! Gives buffers to descriptors in order, four at a time on x86-64.

use std::slice;

use super::{DescRing, Descriptor};
use crate::dma::metadata::PartialChecksum;
use crate::dma::packet::{Burst, DEVICE_HEADER, HEADROOM, MAX_BURST, Packet};
use crate::dma::pool::{Buffers, PoolCache};

/// Second word of a descriptor that sends a whole packet.
#[derive(Clone, Copy, Debug)]
pub struct SendWord {
    /// Bits that are set in addition to the length.
    pub bits: u64,
    /// Number of bytes before the packet's data that the device also reads, at most 16. The length includes them.
    pub front: usize,
    /// Position of the lowest bit of a second copy of the length, for descriptors that have one.
    pub second_len: Option<u32>,
    /// Whether the device writes to descriptors.
    pub written_by_device: bool,
}

impl SendWord {
    /// Whether the upper half of the word stays the same for all packets, so that only the other half is written.
    #[inline(always)]
    pub(super) fn is_lower_half(self) -> bool {
        self.second_len.is_none() && !self.written_by_device
    }

    /// Returns the word for a packet of `len` bytes.
    #[inline(always)]
    pub fn of(self, len: usize) -> u64 {
        let len = (len + self.front) as u64;
        self.bits | len | self.second_len.map_or(0, |shift| len << shift)
    }
}

/// Packet whose buffer moves into a descriptor. Its tag was checked.
#[derive(Debug)]
pub struct Slot<'a> {
    packet: &'a mut Packet,
    buffers: Buffers<'a>,
}

impl<'a> Slot<'a> {
    /// # Safety
    /// `packet` belongs to the pool of `buffers`.
    #[inline(always)]
    unsafe fn new(packet: &'a mut Packet, buffers: Buffers<'a>) -> Self {
        Self { packet, buffers }
    }

    /// Reads the bytes directly before the packet's data. See [`PoolCache::read_header`].
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        // SAFETY: the packet belongs to the pool of `buffers`, and is borrowed.
        unsafe { self.buffers.read_before(self.packet.at()) }
    }

    /// Writes `bytes` directly before the packet's data. See [`PoolCache::write_header`].
    #[inline(always)]
    pub fn write_header<const LEN: usize>(&mut self, bytes: &[u8; LEN]) {
        // SAFETY: the packet belongs to the pool of `buffers`, and is borrowed mutably.
        unsafe { self.buffers.write_before(self.packet.at(), bytes) }
    }

    /// Returns the packet's partial checksum. See [`PoolCache::partial_checksum`].
    #[inline(always)]
    pub fn partial_checksum(&self) -> Option<PartialChecksum> {
        self.buffers.partial_checksum(self.packet)
    }
}

impl DescRing {
    /// Gives up to `most` descriptors a buffer from `cache` each. The number is limited by [`MAX_BURST`], by
    /// the room in the ring and by the free buffers. A descriptor's first word becomes the device address
    /// `front` bytes before the data of a fresh packet, its second word becomes `word`. Returns the number of
    /// descriptors.
    ///
    /// # Panics
    /// Panics if the ring owns buffers of another pool, or if `front` is more than 16.
    #[inline(always)]
    pub fn refill(&mut self, most: usize, front: usize, word: u64, cache: &mut PoolCache) -> usize {
        assert!(front <= DEVICE_HEADER);
        self.use_pool(cache);
        let taking = cache.take(most.min(self.room()).min(MAX_BURST));
        let (buffers, mut rest) = (taking.buffers, taking.all());
        let count = rest.len();
        let data = (HEADROOM - front) as u32;
        // Takes two iterations if the ring wraps, so that no index wraps in the inner loop.
        while !rest.is_empty() {
            let first = self.head & self.mask;
            let (run, next) = rest.split_at(rest.len().min(self.mask + 1 - first));
            // SAFETY: the masked index is below the number of descriptors.
            let (desc, record) =
                unsafe { (self.desc.add(first).as_ptr(), self.record.as_mut_ptr().add(first)) };
            // SAFETY: the run does not go beyond the end of the ring.
            unsafe { write_fresh(run, data, word, buffers, desc, record) };
            self.head = self.head.wrapping_add(run.len());
            rest = next;
        }
        count
    }

    /// Gives the buffers of the first `count` packets of `burst` to descriptors, in order. A descriptor's
    /// first word becomes the device address `front` bytes before the packet's data. Its second word becomes
    /// what `send` returns for the packet and its length.
    ///
    /// # Panics
    /// Panics if `burst` has fewer than `count` packets, if the ring has no room for `count` packets, if the
    /// ring owns buffers of another pool, or if `front` is more than 16. Also panics at a packet that does not
    /// belong to the pool of `cache`; the descriptors then stay free, and their content is meaningless.
    #[inline(always)]
    pub fn fill(
        &mut self,
        count: usize,
        front: usize,
        cache: &PoolCache,
        burst: &mut Burst,
        mut send: impl FnMut(&mut Slot<'_>, usize) -> u64,
    ) {
        assert!(front <= DEVICE_HEADER);
        let buffers = cache.buffers();
        let mut filling = self.start_filling(count, cache, burst);
        while let Some(run) = self.next_run(&mut filling) {
            for (i, packet) in run.packets.iter_mut().enumerate() {
                buffers.check(packet.tag());
                let len = packet.len();
                // SAFETY: the tag was checked. The run has as many descriptors as packets.
                unsafe {
                    let word = send(&mut Slot::new(packet, buffers), len);
                    write(packet, front, word, buffers, run.desc.add(i), run.record.add(i));
                }
            }
        }
        self.end_filling(&filling, burst);
    }

    /// [`DescRing::fill`] with second words that follow from the packets' lengths. A packet of fewer than
    /// `SHORTEST` bytes, at most 64, is padded to them with zeros. `header` may write the `word.front` bytes
    /// before each packet's data; it is not called if `word.front` is 0, and may be called twice for a packet
    /// near one that is padded. Returns the sum of the packets' lengths in bytes.
    ///
    /// # Panics
    /// As [`DescRing::fill`].
    #[inline(always)]
    pub fn fill_words<const SHORTEST: usize>(
        &mut self,
        count: usize,
        word: SendWord,
        cache: &mut PoolCache,
        burst: &mut Burst,
        mut header: impl FnMut(&mut Slot<'_>),
    ) -> u64 {
        assert!(word.front <= DEVICE_HEADER);
        let mut bytes = 0;
        let mut filling = self.start_filling(count, cache, burst);
        while let Some(Run { packets, desc, record }) = self.next_run(&mut filling) {
            let mut done = 0;
            #[cfg(target_arch = "x86_64")]
            if packets.len() >= 4 {
                let buffers = cache.buffers();
                // SAFETY: the run has as many descriptors as packets.
                let sum = unsafe { x86::fill::<SHORTEST>(packets, word, buffers, desc, record, &mut header) };
                if let Some(sum) = sum {
                    bytes += sum;
                    done = packets.len() & !3;
                }
            }
            for (i, packet) in packets.iter_mut().enumerate().skip(done) {
                cache.pad::<SHORTEST>(packet);
                let buffers = cache.buffers();
                buffers.check(packet.tag());
                let len = packet.len();
                bytes += len as u64;
                // SAFETY: the tag was checked. The run has as many descriptors as packets.
                unsafe {
                    if word.front > 0 {
                        header(&mut Slot::new(packet, buffers));
                    }
                    write(packet, word.front, word.of(len), buffers, desc.add(i), record.add(i));
                }
            }
        }
        self.end_filling(&filling, burst);
        bytes
    }

    /// Takes the first `count` packets out of `burst`, for [`DescRing::next_run`]. If the caller panics before
    /// [`DescRing::end_filling`], the burst's packets are lost, but no buffer gets a second handle.
    #[inline(always)]
    fn start_filling(&mut self, count: usize, cache: &PoolCache, burst: &mut Burst) -> Filling {
        let len = burst.len();
        assert!(count <= len && count <= self.room());
        self.use_pool(cache);
        // SAFETY: 0 packets are initialized.
        unsafe { burst.set_len(0) };
        // Taken after `set_len`, which borrows the whole burst and would end an earlier borrow.
        Filling { packets: burst.as_mut_ptr(), filled: 0, count, len }
    }

    /// Returns the next packets whose descriptors do not cross the end of the ring. Takes two calls if the ring
    /// wraps, so that no index wraps in the caller's loop.
    #[inline(always)]
    fn next_run<'a>(&mut self, filling: &mut Filling) -> Option<Run<'a>> {
        let rest = filling.count - filling.filled;
        if rest == 0 {
            return None;
        }
        let first = self.head.wrapping_add(filling.filled) & self.mask;
        let run = rest.min(self.mask + 1 - first);
        // SAFETY: `filled + run` is at most `count`, and each packet is in one run only. The masked index is
        // below the number of descriptors.
        let run = unsafe {
            Run {
                packets: slice::from_raw_parts_mut(filling.packets.add(filling.filled), run),
                desc: self.desc.as_ptr().add(first),
                record: self.record.as_mut_ptr().add(first),
            }
        };
        filling.filled += run.packets.len();
        Some(run)
    }

    /// Moves the packets after the first `count` to the front of `burst`.
    #[inline(always)]
    fn end_filling(&mut self, filling: &Filling, burst: &mut Burst) {
        let (count, rest) = (filling.count, filling.len - filling.count);
        if rest > 0 {
            // SAFETY: these packets were not moved out, and the new length counts only them. The pointer in
            // `filling` is not used, because this function's borrow of `burst` has invalidated it.
            unsafe {
                let packets = burst.as_mut_ptr();
                packets.add(count).copy_to(packets, rest);
                burst.set_len(rest);
            }
        }
        self.head = self.head.wrapping_add(count);
    }
}

/// Packets of a burst on their way to descriptors.
struct Filling {
    packets: *mut Packet,
    filled: usize,
    count: usize,
    /// Length of the burst before.
    len: usize,
}

/// Packets for consecutive descriptors that own no buffer, the first descriptor, and its record.
struct Run<'a> {
    packets: &'a mut [Packet],
    desc: *mut Descriptor,
    record: *mut u32,
}

/// Writes the descriptors and records of fresh buffers at the pool offsets `slots`. Packet data starts `data`
/// bytes into each buffer.
///
/// # Safety
/// From `desc` and `record` on there are as many descriptors and records as `slots`.
#[inline(always)]
pub(super) unsafe fn write_fresh(
    slots: &[u32],
    data: u32,
    word: u64,
    buffers: Buffers<'_>,
    desc: *mut Descriptor,
    record: *mut u32,
) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: by the caller's contract.
    let done = unsafe { x86::write_fresh(slots, data, word, buffers, desc, record) };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for (i, slot) in slots.iter().enumerate().skip(done) {
        let iova = buffers.iova_at(slot + data);
        // SAFETY: by the caller's contract.
        unsafe {
            record.add(i).write(*slot);
            desc.add(i).write([iova.to_le(), word.to_le()]);
        }
    }
}

/// Writes a packet's descriptor and record.
///
/// # Safety
/// `desc` and `record` belong to a descriptor that owns no buffer.
#[inline(always)]
unsafe fn write(
    packet: &Packet,
    front: usize,
    word: u64,
    buffers: Buffers<'_>,
    desc: *mut Descriptor,
    record: *mut u32,
) {
    let iova = buffers.iova_at(packet.at()).wrapping_sub(front as u64);
    // SAFETY: by the caller's contract.
    unsafe {
        record.write(packet.slot());
        desc.write([iova.to_le(), word.to_le()]);
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;
    use std::ptr::NonNull;

    use super::super::take::x86::total;
    use super::{Buffers, Descriptor, Packet, SendWord, Slot};
    use crate::dma::packet::BUFFER_SIZE;
    use crate::dma::ring::Place;

    /// [`write_fresh`](super::write_fresh) in groups of four. Returns the number of buffers; up to three remain.
    ///
    /// # Safety
    /// As for the former.
    #[inline(always)]
    pub(super) unsafe fn write_fresh(
        slots: &[u32],
        data: u32,
        word: u64,
        buffers: Buffers<'_>,
        desc: *mut Descriptor,
        record: *mut u32,
    ) -> usize {
        let (fours, _) = slots.as_chunks::<4>();
        // SAFETY: SSE2 is part of x86-64. All accesses are within what the caller vouches for.
        unsafe {
            let (data, word) = (_mm_set1_epi32(data as i32), _mm_set1_epi64x(word as i64));
            for (i, four) in fours.iter().enumerate() {
                let slots = _mm_loadu_si128(four.as_ptr().cast());
                _mm_storeu_si128(record.add(4 * i).cast(), slots);
                write(desc.add(4 * i), buffers.four_iovas_at(_mm_add_epi32(slots, data)), [word; 2]);
            }
        }
        4 * fours.len()
    }

    /// [`DescRing::fill_words`](super::DescRing::fill_words) in groups of four; up to three packets remain.
    /// Returns the sum of the lengths in bytes, or `None` if a packet has fewer than `SHORTEST` bytes. What was
    /// written is meaningless then.
    ///
    /// # Safety
    /// There are four packets or more. From `desc` and `record` on there are as many descriptors and records.
    #[inline(always)]
    pub(super) unsafe fn fill<const SHORTEST: usize>(
        packets: &mut [Packet],
        word: SendWord,
        buffers: Buffers<'_>,
        desc: *mut Descriptor,
        record: *mut u32,
        header: &mut impl FnMut(&mut Slot<'_>),
    ) -> Option<u64> {
        let (mut at, end) = (Place::HERE, Place::HERE.ahead(packets.len()));
        // SAFETY: SSE2 is part of x86-64. All accesses are within what the caller vouches for.
        unsafe {
            let packets = NonNull::new_unchecked(packets.as_mut_ptr());
            let (desc, record) = (NonNull::new_unchecked(desc), NonNull::new_unchecked(record));
            let zero = _mm_setzero_si128();
            let front = _mm_set1_epi32(word.front as i32);
            let offset = _mm_set1_epi32(BUFFER_SIZE as i32 - 1);
            // Lengths are the upper halves of the 32-bit lanes; the lower halves stay at the minimum.
            let enough = _mm_set1_epi32((SHORTEST << 16) as i32 | i32::from(i16::MIN as u16));
            let (mut sum, mut tags, mut shortest) = (zero, zero, enough);
            while at.is_before(end, 4) {
                let four = &mut *at.of(packets).cast::<[Packet; 4]>().as_ptr();
                if word.front > 0 {
                    buffers.check(Packet::tags(four));
                    four.iter_mut().for_each(|packet| header(&mut Slot::new(packet, buffers)));
                }
                let pair = |i: usize| _mm_loadu_ps(four.as_ptr().add(2 * i).cast());
                let (low, high) = (pair(0), pair(1));
                let begin = _mm_castps_si128(_mm_shuffle_ps::<0b10_00_10_00>(low, high));
                let rest = _mm_castps_si128(_mm_shuffle_ps::<0b11_01_11_01>(low, high));
                tags = _mm_or_si128(tags, rest);
                if SHORTEST > 0 {
                    shortest = _mm_min_epi16(shortest, rest);
                }
                _mm_storeu_si128(at.of(record).as_ptr().cast(), _mm_andnot_si128(offset, begin));
                let len = _mm_srli_epi32::<16>(rest);
                sum = _mm_add_epi32(sum, len);
                // One `or` in place of two, if all upper halves are 0.
                let words = if word.second_len.is_none() && word.bits >> 32 == 0 {
                    let lower = send_lower(word, len);
                    [_mm_unpacklo_epi32(lower, zero), _mm_unpackhi_epi32(lower, zero)]
                } else {
                    send_words(word, len)
                };
                write(at.of(desc).as_ptr(), buffers.four_iovas_at(_mm_sub_epi32(begin, front)), words);
                at = at.ahead(4);
            }
            if word.front == 0 {
                let halves = _mm_or_si128(tags, _mm_unpackhi_epi64(tags, tags));
                buffers.check((_mm_cvtsi128_si64(halves) | _mm_cvtsi128_si64(halves) >> 32) as u8);
            }
            let are_long = SHORTEST == 0 || _mm_movemask_epi8(_mm_cmpeq_epi16(shortest, enough)) == 0xffff;
            are_long.then(|| total(sum))
        }
    }

    /// Lower halves of [`SendWord::of`] for four lengths.
    #[inline(always)]
    pub(in super::super) fn send_lower(word: SendWord, len: __m128i) -> __m128i {
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let len = _mm_add_epi32(len, _mm_set1_epi32(word.front as i32));
            _mm_or_si128(len, _mm_set1_epi32(word.bits as i32))
        }
    }

    /// Writes the lower halves of four words. Without `REWRITES`, they are not written if all of them are right
    /// already.
    ///
    /// # Safety
    /// The words are those of descriptors that the device does not use.
    #[inline(always)]
    pub(in super::super) unsafe fn write_lower<const REWRITES: bool>(lower: __m128i, words: [*mut u64; 4]) {
        let [a, b, c, d] = words;
        // SAFETY: SSE2 is part of x86-64. By the caller's contract.
        unsafe {
            if !REWRITES {
                let pair = |first: *mut u64, second: *mut u64| {
                    _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(first.cast()), second.cast()))
                };
                let before = _mm_castps_si128(_mm_shuffle_ps::<0b10_00_10_00>(pair(a, b), pair(c, d)));
                if _mm_movemask_epi8(_mm_cmpeq_epi32(before, lower)) == 0xffff {
                    return;
                }
            }
            a.cast::<i32>().write(_mm_cvtsi128_si32(lower));
            b.cast::<i32>().write(_mm_cvtsi128_si32(_mm_shuffle_epi32::<1>(lower)));
            c.cast::<i32>().write(_mm_cvtsi128_si32(_mm_shuffle_epi32::<2>(lower)));
            d.cast::<i32>().write(_mm_cvtsi128_si32(_mm_shuffle_epi32::<3>(lower)));
        }
    }

    /// [`SendWord::of`] for four lengths.
    #[inline(always)]
    pub(in super::super) fn send_words(word: SendWord, len: __m128i) -> [__m128i; 2] {
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let (zero, bits) = (_mm_setzero_si128(), _mm_set1_epi64x(word.bits as i64));
            let len = _mm_add_epi32(len, _mm_set1_epi32(word.front as i32));
            let (mut low, mut high) = (_mm_unpacklo_epi32(len, zero), _mm_unpackhi_epi32(len, zero));
            if let Some(shift) = word.second_len {
                let shift = _mm_cvtsi32_si128(shift as i32);
                low = _mm_or_si128(low, _mm_sll_epi64(low, shift));
                high = _mm_or_si128(high, _mm_sll_epi64(high, shift));
            }
            [_mm_or_si128(low, bits), _mm_or_si128(high, bits)]
        }
    }

    /// Writes four descriptors: `first` holds their first words, `second` their second words.
    ///
    /// # Safety
    /// From `desc` on there are four descriptors.
    #[inline(always)]
    unsafe fn write(desc: *mut Descriptor, first: [__m128i; 2], second: [__m128i; 2]) {
        // SAFETY: SSE2 is part of x86-64, and the four descriptors are the caller's.
        unsafe {
            _mm_storeu_si128(desc.cast(), _mm_unpacklo_epi64(first[0], second[0]));
            _mm_storeu_si128(desc.add(1).cast(), _mm_unpackhi_epi64(first[0], second[0]));
            _mm_storeu_si128(desc.add(2).cast(), _mm_unpacklo_epi64(first[1], second[1]));
            _mm_storeu_si128(desc.add(3).cast(), _mm_unpackhi_epi64(first[1], second[1]));
        }
    }
}
