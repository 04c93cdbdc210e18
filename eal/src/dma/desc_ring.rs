//! Rings of descriptors that own packet buffers.

use std::hint::assert_unchecked;
use std::ptr::NonNull;

use super::in_fours;
use super::metadata::PartialChecksum;
use super::packet::{Burst, DATA_ROOM, HEADROOM, MAX_BURST, Packet};
use super::pool::{Buffers, MAX_FREE, PoolCache, send_home};
use super::ring::{DmaRing, RingEntry, RingView, Word};

#[cfg(test)]
mod tests;
mod words;

pub use words::GoodWord;

/// A descriptor as the device has it: two little-endian words, the first of which is a device address.
type Descriptor = [u64; 2];

/// A ring of descriptors of two words, and our own record of the buffers that they own, which the device cannot write.
///
/// Descriptors get their buffers in order, at [`DescRing::head`], and in order they give them back, at [`DescRing::tail`]. In
/// between all own a buffer, but for those that [`DescRing::take_at`] has emptied. Positions count descriptors since the
/// start; the low bits of a position are the descriptor's index.
///
/// Nobody else of this process writes the descriptors, so they are written plainly; a [`dma_wmb`](super::dma_wmb) orders
/// that before the write that tells the device. What the device writes is read atomically.
#[derive(Debug)]
pub struct DescRing {
    desc: NonNull<Descriptor>,
    /// Of each descriptor from `tail` to `head`: the distance of its buffer in the pool of `fresh_bits`, where no handle of
    /// that buffer exists; or [`EMPTY`]. Not in the memory that devices reach: a peer that is a process writes all of it.
    record: Box<[u32]>,
    /// Number of descriptors minus 1.
    mask: usize,
    head: usize,
    tail: usize,
    /// Empty descriptors from `tail` to `head`. The one at `tail` is none of them.
    holes: usize,
    /// Most descriptors that own a buffer at a time.
    capacity: usize,
    /// As [`Packet::fresh_bits`] of the tag: in a loop the compiler has to take them as they are.
    fresh_bits: u64,
    /// What `desc` points into.
    words: DmaRing<u64, 2>,
}

// SAFETY: `words` keeps mapped what `desc` leads to, and nothing else of ours leads there.
unsafe impl Send for DescRing {}
// SAFETY: as above; by a shared reference words are only read.
unsafe impl Sync for DescRing {}

/// No distance of a buffer.
const EMPTY: u32 = u32::MAX;

impl DescRing {
    /// A ring of the descriptors of `words` in which at most `capacity` own a buffer at a time.
    pub fn new(words: DmaRing<u64, 2>, capacity: usize) -> Self {
        let entries = words.entries();
        Self {
            desc: words.start().cast(),
            record: vec![EMPTY; entries].into(),
            mask: entries - 1,
            head: 0,
            tail: 0,
            holes: 0,
            capacity: capacity.min(entries),
            fresh_bits: 0,
            words,
        }
    }

    /// Number of descriptors.
    #[inline(always)]
    pub fn entries(&self) -> usize {
        self.mask + 1
    }

    /// Device address of the first descriptor.
    pub fn iova(&self) -> u64 {
        self.words.iova()
    }

    /// Position of the descriptor that gets the next buffer.
    #[inline(always)]
    pub fn head(&self) -> usize {
        self.head
    }

    /// Position of the descriptor that gives back the next buffer, if it owns one.
    #[inline(always)]
    pub fn tail(&self) -> usize {
        self.tail
    }

    /// Descriptors that can get a buffer.
    #[inline(always)]
    pub fn room(&self) -> usize {
        self.capacity.wrapping_sub(self.head.wrapping_sub(self.tail))
    }

    /// Position from which on the tail leaves room for `room` descriptors, until the head moves or the ring is closed.
    pub fn tail_with_room(&self, room: usize) -> usize {
        self.head.wrapping_sub(self.capacity).wrapping_add(room)
    }

    /// Whether the tail has reached `position`, which is less than half of all positions away. With
    /// [`DescRing::tail_with_room`], a poll sees whether there is room without a look at head and capacity.
    #[inline(always)]
    pub fn has_reached(&self, position: usize) -> bool {
        self.tail.wrapping_sub(position) as isize >= 0
    }

    /// Descriptors that own a buffer.
    #[inline(always)]
    pub fn owned(&self) -> usize {
        self.head.wrapping_sub(self.tail) - self.holes
    }

    /// Whether descriptors between tail and head are empty, because [`DescRing::take_at`] took their buffers.
    #[inline(always)]
    pub fn has_holes(&self) -> bool {
        self.holes > 0
    }

    /// Takes the room that is left, for a device that is to get nothing more before a [`DescRing::restart`].
    pub fn close(&mut self) {
        self.capacity = self.head.wrapping_sub(self.tail);
    }

    /// Begins anew at position 0, with `words` in each descriptor and at most `capacity` that own a buffer. Buffers that the
    /// ring still owns are lost to their pool.
    pub fn restart(&mut self, capacity: usize, words: Descriptor) {
        (self.head, self.tail, self.holes) = (0, 0, 0);
        self.capacity = capacity.min(self.entries());
        (0..self.entries()).for_each(|index| self.set(index, words));
    }

    /// Reads word `WORD` of the descriptor at `index`, which wraps.
    #[inline(always)]
    pub fn load<const WORD: usize>(&self, index: usize) -> u64 {
        self.view().load::<WORD>(index)
    }

    /// Writes both words of the descriptor at `index`, which wraps.
    #[inline(always)]
    pub fn set(&mut self, index: usize, words: Descriptor) {
        // SAFETY: the masked index is below the number of descriptors.
        unsafe { self.desc.add(index & self.mask).write([words[0].to_le(), words[1].to_le()]) };
    }

    /// Writes the second word of the descriptor at `index`, which wraps.
    #[inline(always)]
    pub fn set_word(&mut self, index: usize, word: u64) {
        self.view().store::<1>(index, word);
    }

    /// Has no lifetime of `self`, which would forbid to change the record meanwhile.
    #[inline(always)]
    fn view<'a>(&self) -> RingView<'a, u64, 2> {
        // SAFETY: the words are valid as long as `self`, behind which no caller keeps the view. Nothing of ours writes them
        // but by `&mut self`.
        unsafe { RingView::over(self.desc.cast(), self.mask) }
    }

    /// Sees that all buffers of the ring are of the pool of `cache`.
    #[inline(always)]
    fn use_pool(&mut self, cache: &PoolCache) {
        if self.fresh_bits != cache.fresh_bits() {
            self.change_pool(cache);
        }
    }

    #[cold]
    #[inline(never)]
    fn change_pool(&mut self, cache: &PoolCache) {
        assert!(self.owned() == 0, "a ring that owns buffers of one pool gets those of another");
        self.fresh_bits = cache.fresh_bits();
    }

    /// Descriptors that own a buffer, from the tail on to the end of the ring or of another, whose number of entries is
    /// `mask + 1`; none if one in between is empty.
    #[inline(always)]
    fn run(&self, mask: usize) -> usize {
        // Powers of two minus 1, so this is the smaller.
        let smaller = self.mask & mask;
        let in_order = if self.holes == 0 { self.head.wrapping_sub(self.tail) } else { 0 };
        in_order.min(smaller + 1 - (self.tail & smaller))
    }

    /// Takes the buffer at the tail as a packet of `len` bytes, cut to [`DATA_ROOM`], if `burst` has room. Gives false when
    /// nothing was taken.
    ///
    /// Takes fewer instructions than [`DescRing::take_words`] for one packet.
    #[inline(always)]
    pub fn take_one(&mut self, burst: &mut Burst, len: usize) -> bool {
        if self.head == self.tail || burst.is_full() {
            return false;
        }
        // SAFETY: the masked index is below the number of descriptors. The descriptor at the tail is never empty.
        let slot = unsafe { *self.record.get_unchecked(self.tail & self.mask) };
        self.tail = self.tail.wrapping_add(1);
        burst.push(Packet::in_slot(slot, len.min(DATA_ROOM), self.fresh_bits));
        self.close_holes();
        true
    }

    /// Takes the buffers at the tail, one for each of `lens`, as the segments of one frame with so many bytes each, cut to
    /// [`DATA_ROOM`]. Gives false, and takes nothing, when `burst` has less room, or fewer descriptors up to the first empty
    /// one own a buffer.
    #[inline(never)]
    pub fn take_frame(&mut self, burst: &mut Burst, lens: &[usize]) -> bool {
        if lens.len() > burst.remaining_capacity() || lens.len() > self.owned() || self.has_holes() {
            return false;
        }
        let first = burst.len();
        for len in lens {
            self.take_one(burst, *len);
        }
        if let [segments @ .., _] = &mut burst[first..] {
            segments.iter_mut().for_each(|packet| packet.set_more(true));
        }
        true
    }

    /// Takes up to `most` buffers from the tail on, in order, as packets, where the completions are in a ring of their own:
    /// those for which `done` gives a length, up to the first for which it gives none. `done` gets the buffer and the entry
    /// of `completions` with the descriptor's index. What is longer than [`DATA_ROOM`] is cut to it.
    ///
    /// Ends at the end of a ring, too, so that no index wraps in the loop, and when `burst` is full. Takes nothing
    /// while a descriptor in between is empty. Gives the number of packets.
    ///
    /// # Panics
    /// When `cache` is of another pool than the buffers, and `done` reads a header.
    #[inline(always)]
    pub fn take_completed<C: Word, const M: usize>(
        &mut self,
        completions: &DmaRing<C, M>,
        most: usize,
        cache: &PoolCache,
        burst: &mut Burst,
        mut done: impl FnMut(&Filled<'_>, RingEntry<'_, C, M>) -> Option<usize>,
    ) -> usize {
        let before = burst.len();
        // SAFETY: a burst is not longer than its capacity.
        unsafe { assert_unchecked(before <= MAX_BURST) };
        let packets = burst.as_mut_ptr();
        let (buffers, completions) = (cache.buffers(), completions.view());
        let first = self.tail & self.mask;
        let most = most.min(MAX_BURST - before).min(self.run(completions.mask()));
        let (entries, record, fresh_bits) = (completions.entry(first), self.record.as_ptr(), self.fresh_bits);
        let count = in_fours(most, |i| {
            let index = first + i;
            // SAFETY: a run of `most` entries crosses the end of neither ring.
            let (slot, entry) = unsafe { (record.add(index).read(), entries.ahead(i)) };
            let filled = Filled { index, packet: Packet::in_slot(slot, 0, fresh_bits), buffers };
            let Some(len) = done(&filled, entry) else { return false };
            // SAFETY: `burst` has room for `most` more.
            unsafe { packets.add(before + i).write(Packet::in_slot(slot, len.min(DATA_ROOM), fresh_bits)) };
            true
        });
        self.tail = self.tail.wrapping_add(count);
        // SAFETY: the packets up to there were written.
        unsafe { burst.set_len(before + count) };
        count
    }

    /// Takes the buffer of the descriptor at `index`, which wraps, if it owns one, as a packet without data: for a device
    /// that completes out of order.
    pub fn take_at(&mut self, index: usize) -> Option<Packet> {
        let index = index & self.mask;
        if index.wrapping_sub(self.tail) & self.mask >= self.head.wrapping_sub(self.tail) {
            return None;
        }
        // SAFETY: the masked index is below the number of descriptors.
        let slot = std::mem::replace(unsafe { self.record.get_unchecked_mut(index) }, EMPTY);
        if slot == EMPTY {
            return None;
        }
        self.holes += 1;
        self.close_holes();
        Some(Packet::in_slot(slot, 0, self.fresh_bits))
    }

    /// Moves the tail over empty descriptors.
    #[inline(always)]
    fn close_holes(&mut self) {
        // SAFETY: the masked index is below the number of descriptors.
        while self.holes > 0 && unsafe { *self.record.get_unchecked(self.tail & self.mask) } == EMPTY {
            self.tail = self.tail.wrapping_add(1);
            self.holes -= 1;
        }
    }

    /// Gives up to `most` descriptors, at most [`MAX_BURST`], a buffer of `cache` each, as far as there are room and
    /// buffers. The first word becomes the device address of `front` bytes in front of where a packet's data begins, the
    /// second `word`. Gives the number of descriptors.
    ///
    /// # Panics
    /// When the ring owns buffers of another pool.
    #[inline(always)]
    pub fn refill(&mut self, most: usize, front: usize, word: u64, cache: &mut PoolCache) -> usize {
        self.use_pool(cache);
        let taking = cache.take(most.min(self.room()).min(MAX_BURST));
        let (buffers, mut rest) = (taking.buffers, taking.all());
        let count = rest.len();
        // Twice where the ring ends in between, so that no index wraps in the loop.
        while !rest.is_empty() {
            let first = self.head & self.mask;
            let (run, next) = rest.split_at(rest.len().min(self.mask + 1 - first));
            // SAFETY: the masked index is below the number of descriptors.
            let (desc, record) = unsafe { (self.desc.add(first), self.record.as_mut_ptr().add(first)) };
            in_fours(run.len(), |i| {
                // SAFETY: the run ends with the ring at the latest.
                unsafe {
                    let slot = *run.get_unchecked(i);
                    let iova = buffers.iova_at(slot).wrapping_add(HEADROOM as u64).wrapping_sub(front as u64);
                    record.add(i).write(slot);
                    desc.add(i).write([iova.to_le(), word.to_le()]);
                }
                true
            });
            self.head = self.head.wrapping_add(run.len());
            rest = next;
        }
        count
    }

    /// Gives the buffers of the first `count` packets of `burst` to descriptors, in order. The first word becomes the device
    /// address of `front` bytes in front of the packet's data, the second what `send` gives for the packet and its
    /// length.
    ///
    /// # Panics
    /// When there are fewer packets or less room, or the ring owns buffers of another pool. When a packet is of another
    /// pool than `cache`; that is found at the end, so that it costs one instruction per packet, and the descriptors, which
    /// mean nothing then, stay free.
    #[inline(always)]
    pub fn fill(
        &mut self,
        count: usize,
        front: usize,
        cache: &PoolCache,
        burst: &mut Burst,
        mut send: impl FnMut(&mut Slot<'_>, usize) -> u64,
    ) {
        let buffers = cache.buffers();
        let len = burst.len();
        assert!(count <= len && count <= self.room());
        self.use_pool(cache);
        // SAFETY: 0 packets are initialised. A panic of `send` loses the others; none has two handles.
        unsafe { burst.set_len(0) };
        // After that call, which borrows all of the burst and would end what was borrowed before.
        let packets = burst.as_mut_ptr();
        let (desc, record) = (self.desc, self.record.as_mut_ptr());
        let (mut filled, mut all) = (0, 0);
        // Twice where the ring ends in between, as in `refill`.
        while filled < count {
            let first = self.head.wrapping_add(filled) & self.mask;
            let run = (count - filled).min(self.mask + 1 - first);
            in_fours(run, |i| {
                // SAFETY: `filled + run` is at most `count`, and each packet is moved out once.
                let packet = unsafe { packets.add(filled + i).read() };
                all |= packet.tag();
                let iova = buffers.iova_at(packet.at()).wrapping_sub(front as u64);
                let (slot, len) = (packet.slot(), packet.len());
                let word = send(&mut Slot { buffers, packet }, len);
                // SAFETY: the run ends with the ring at the latest.
                unsafe {
                    record.add(first + i).write(slot);
                    desc.add(first + i).write([iova.to_le(), word.to_le()]);
                }
                true
            });
            filled += run;
        }
        if count < len {
            // SAFETY: these packets are still there; they move to the front, and no more than them is counted.
            unsafe {
                packets.add(count).copy_to(packets, len - count);
                burst.set_len(len - count);
            }
        }
        assert!(count == 0 || all == cache.tag(), "a packet of another pool");
        self.head = self.head.wrapping_add(count);
    }

    /// Gives the buffers of `count` descriptors from the tail on, in order, to `cache`, or to their own pool if `cache` is
    /// of another one.
    ///
    /// # Panics
    /// When fewer own one.
    #[inline]
    pub fn reclaim(&mut self, count: usize, cache: &mut PoolCache) {
        assert!(count <= self.head.wrapping_sub(self.tail) && self.holes == 0);
        let mut rest = count;
        while rest > 0 {
            let first = self.tail & self.mask;
            let run = rest.min(self.mask + 1 - first).min(MAX_FREE);
            self.tail = self.tail.wrapping_add(run);
            rest -= run;
            // SAFETY: the run ends with the ring at the latest. Its buffers are no longer the ring's, and have no handle.
            unsafe {
                let slots = self.record.get_unchecked(first..first + run);
                if cache.fresh_bits() == self.fresh_bits {
                    cache.free_slots(slots);
                } else {
                    send_home(Packet::tag_in(self.fresh_bits), slots);
                }
            }
        }
    }

    /// Gives every buffer to `cache`; for a ring whose device was reset.
    pub fn reclaim_all(&mut self, cache: &mut PoolCache) {
        while self.holes > 0 {
            if let Some(packet) = self.take_at(self.tail) {
                cache.free(packet);
            }
        }
        self.reclaim(self.owned(), cache);
    }
}

/// The buffer of a descriptor that the device may have filled.
#[derive(Debug)]
pub struct Filled<'a> {
    /// The descriptor's index in the ring.
    pub index: usize,
    packet: Packet,
    buffers: Buffers<'a>,
}

impl Filled<'_> {
    /// As [`PoolCache::read_header`].
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        self.buffers.read_header(&self.packet)
    }
}

/// A packet that becomes a descriptor's.
#[derive(Debug)]
pub struct Slot<'a> {
    packet: Packet,
    buffers: Buffers<'a>,
}

impl Slot<'_> {
    /// As [`PoolCache::read_header`].
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        self.buffers.read_header(&self.packet)
    }

    /// As [`PoolCache::write_header`].
    #[inline(always)]
    pub fn write_header<const LEN: usize>(&mut self, bytes: &[u8; LEN]) {
        self.buffers.write_header(&mut self.packet, bytes);
    }

    /// As [`PoolCache::partial_checksum`].
    #[inline(always)]
    pub fn partial_checksum(&self) -> Option<PartialChecksum> {
        self.buffers.partial_checksum(&self.packet)
    }
}
