//! Rings of descriptors that own packet buffers.

use std::ptr::NonNull;

use super::packet::{Burst, DATA_ROOM, Packet};
use super::pool::{MAX_FREE, PoolCache, return_to_owner};
use super::ring::{DmaRing, RingView};

mod fill;
mod record;
mod take;
#[cfg(test)]
mod tests;
mod tied;
mod used;
mod words;

pub use fill::{SendWord, Slot};
pub use record::RingRecord;
pub use tied::{Limits, Moved, TiedPacket, TiedRings};
pub use used::Completed;
pub use words::GoodWord;

/// A descriptor as the device sees it: two little-endian words, the first of which is a device address.
type Descriptor = [u64; 2];

/// A ring of two-word descriptors, with a record of the buffers that they own. The device cannot write the
/// record.
///
/// Descriptors receive their buffers in order, at [`DescRing::head`], and return them in order, at
/// [`DescRing::tail`]. Every descriptor from the tail to the head owns a buffer, except those that
/// [`DescRing::take_at`] has emptied. A position counts descriptors since the start. Its low bits are the
/// descriptor's index.
///
/// Nothing else in this process writes the descriptors, so plain stores are sufficient. A
/// [`dma_wmb`](super::dma_wmb) orders them before the write that notifies the device. Words that the device
/// writes are read atomically.
#[derive(Debug)]
pub struct DescRing {
    desc: NonNull<Descriptor>,
    /// For each descriptor from `tail` to `head`: the pool offset of its buffer in the pool of `fresh_bits`,
    /// or [`EMPTY`]. No handle of a recorded buffer exists. The record is not in DMA memory, because a peer
    /// process can write all of that. Not a box, because [`TiedRings`] has a pointer to an element while it is
    /// moved, and a pointer into a box ends when the box is moved.
    record: Vec<u32>,
    /// Number of descriptors minus 1.
    mask: usize,
    head: usize,
    tail: usize,
    /// Number of empty descriptors from `tail` to `head`. The descriptor at `tail` is never empty.
    holes: usize,
    /// Maximum number of descriptors that own a buffer at a time.
    capacity: usize,
    /// [`Packet::fresh_bits`] of the pool's tag. A field, so that the compiler does not compute the bits
    /// again in loops.
    fresh_bits: u64,
    /// The ring that `desc` points into.
    words: DmaRing<u64, 2>,
}

// SAFETY: `words` keeps the descriptors mapped, and nothing else in this process points to them.
unsafe impl Send for DescRing {}
// SAFETY: as above. Through a shared reference, words are only read.
unsafe impl Sync for DescRing {}

/// Marks an empty descriptor in the record. No buffer has this pool offset.
const EMPTY: u32 = u32::MAX;

impl DescRing {
    /// Creates a ring of the descriptors in `words`. At most `capacity` of them own a buffer at a time.
    pub fn new(words: DmaRing<u64, 2>, capacity: usize) -> Self {
        let entries = words.entries();
        Self {
            desc: words.start().cast(),
            record: vec![EMPTY; entries],
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

    /// Position of the descriptor that receives the next buffer.
    #[inline(always)]
    pub fn head(&self) -> usize {
        self.head
    }

    /// Position of the descriptor that returns the next buffer, if it owns one.
    #[inline(always)]
    pub fn tail(&self) -> usize {
        self.tail
    }

    /// Number of descriptors that can receive a buffer.
    #[inline(always)]
    pub fn room(&self) -> usize {
        self.capacity.wrapping_sub(self.head.wrapping_sub(self.tail))
    }

    /// Tail position from which the ring has room for `room` buffers. Valid until the head moves or the ring
    /// is closed.
    pub fn tail_with_room(&self, room: usize) -> usize {
        self.head.wrapping_sub(self.capacity).wrapping_add(room)
    }

    /// Returns whether the tail has reached `position`, which must be less than half of all positions away.
    /// With [`DescRing::tail_with_room`], a poll checks for room without reading the head and the capacity.
    #[inline(always)]
    pub fn has_reached(&self, position: usize) -> bool {
        self.tail.wrapping_sub(position) as isize >= 0
    }

    /// Number of descriptors that own a buffer.
    #[inline(always)]
    pub fn owned(&self) -> usize {
        self.head.wrapping_sub(self.tail) - self.holes
    }

    /// Returns whether [`DescRing::take_at`] has left empty descriptors between tail and head.
    #[inline(always)]
    pub fn has_holes(&self) -> bool {
        self.holes > 0
    }

    /// Reduces the capacity to the descriptors between tail and head, which leaves no room. Used when the
    /// device must receive no more buffers before a [`DescRing::restart`].
    pub fn close(&mut self) {
        self.capacity = self.head.wrapping_sub(self.tail);
    }

    /// Restarts the ring at position 0, with `words` in each descriptor. At most `capacity` descriptors own a
    /// buffer at a time. Buffers that the ring still owns are lost to their pool.
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

    /// Returns a view whose lifetime does not depend on `self`, because a borrow would forbid changes to the
    /// record.
    #[inline(always)]
    fn view<'a>(&self) -> RingView<'a, u64, 2> {
        // SAFETY: the words are valid as long as `self`, and no caller keeps the view longer. This process
        // writes them only through `&mut self`.
        unsafe { RingView::over(self.desc.cast(), self.mask) }
    }

    /// Ensures that all buffers of the ring belong to the pool of `cache`.
    #[inline(always)]
    fn use_pool(&mut self, cache: &PoolCache) {
        if self.fresh_bits != cache.fresh_bits() {
            self.change_pool(cache);
        }
    }

    #[cold]
    #[inline(never)]
    fn change_pool(&mut self, cache: &PoolCache) {
        assert!(self.owned() == 0, "a ring that owns buffers of one pool cannot take those of another");
        self.fresh_bits = cache.fresh_bits();
    }

    /// Number of buffers that can be taken in order, from the tail to the end of this ring or of a ring of
    /// `mask + 1` entries, whichever comes first. 0 if a descriptor between tail and head is empty.
    #[inline(always)]
    fn run(&self, mask: usize) -> usize {
        // Both masks are powers of two minus 1, so this is the smaller one.
        let smaller = self.mask & mask;
        let in_order = if self.holes == 0 { self.head.wrapping_sub(self.tail) } else { 0 };
        in_order.min(smaller + 1 - (self.tail & smaller))
    }

    /// Takes the buffer at the tail as a packet of `len` bytes, cut to [`DATA_ROOM`]. Returns false if the
    /// ring owns no buffer or `burst` is full.
    ///
    /// For a single packet, this takes fewer instructions than [`DescRing::take_words`].
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

    /// Takes one buffer from the tail for each of `lens`, as the segments of one frame. `lens` are the
    /// segments' lengths in bytes, each cut to [`DATA_ROOM`]. Returns false, and takes nothing, if `burst`
    /// has too little room, too few descriptors own a buffer, or a descriptor between tail and head is empty.
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

    /// Takes the buffer of the descriptor at `index`, which wraps, as a packet without data. Returns `None`
    /// if the descriptor owns no buffer. Used for devices that complete out of order.
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

    /// Moves the tail past empty descriptors.
    #[inline(always)]
    fn close_holes(&mut self) {
        // SAFETY: the masked index is below the number of descriptors.
        while self.holes > 0 && unsafe { *self.record.get_unchecked(self.tail & self.mask) } == EMPTY {
            self.tail = self.tail.wrapping_add(1);
            self.holes -= 1;
        }
    }

    /// Returns the buffers of `count` descriptors, in order from the tail, to `cache`, or to their own pool
    /// if `cache` belongs to another one.
    ///
    /// # Panics
    /// Panics if there are fewer than `count` descriptors from tail to head, or one of them is empty.
    #[inline]
    pub fn reclaim(&mut self, count: usize, cache: &mut PoolCache) {
        assert!(count <= self.head.wrapping_sub(self.tail) && self.holes == 0);
        let mut rest = count;
        while rest > 0 {
            let first = self.tail & self.mask;
            let run = rest.min(self.mask + 1 - first).min(MAX_FREE);
            self.tail = self.tail.wrapping_add(run);
            rest -= run;
            // SAFETY: the run does not go beyond the end of the ring. The ring no longer owns its buffers,
            // and they have no handle.
            unsafe {
                let slots = self.record.get_unchecked(first..first + run);
                if cache.fresh_bits() == self.fresh_bits {
                    cache.free_slots(slots);
                } else {
                    return_to_owner(Packet::tag_in(self.fresh_bits), slots);
                }
            }
        }
    }

    /// Returns all buffers to `cache`. Used for a ring whose device was reset.
    pub fn reclaim_all(&mut self, cache: &mut PoolCache) {
        while self.holes > 0 {
            if let Some(packet) = self.take_at(self.tail) {
                cache.free(packet);
            }
        }
        self.reclaim(self.owned(), cache);
    }
}
