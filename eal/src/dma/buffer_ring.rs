//! The driver's own record of which buffer is where.

use super::pool::{Buffer, Burst, CHUNK, Packet, PoolCache};

/// Which buffer each descriptor of a ring owns: our own record, which the device cannot reach.
#[derive(Debug)]
pub struct BufferRing {
    slots: Box<[u32]>,
}

impl BufferRing {
    const EMPTY: u32 = u32::MAX;

    /// A record for `entries` descriptors, all empty; rounded up to a power of two.
    pub fn new(entries: usize) -> Self {
        Self { slots: vec![Self::EMPTY; entries.next_power_of_two()].into() }
    }

    /// The record for the length of a loop.
    #[inline(always)]
    pub fn view(&mut self) -> BufferSlots<'_> {
        BufferSlots { mask: self.slots.len() - 1, slots: &mut self.slots }
    }

    /// As [`BufferSlots::replace`].
    #[inline(always)]
    pub fn replace(&mut self, index: usize, buffer: Buffer) -> Option<Buffer> {
        self.view().replace(index, buffer)
    }

    /// As [`BufferSlots::put`].
    #[inline(always)]
    pub fn put(&mut self, index: usize, buffer: Buffer) {
        self.view().put(index, buffer);
    }

    /// As [`BufferSlots::take`].
    #[inline(always)]
    pub fn take(&mut self, index: usize) -> Option<Buffer> {
        self.view().take(index)
    }

    /// Whether `index`, which wraps, owns a buffer.
    #[inline(always)]
    pub fn is_filled(&self, index: usize) -> bool {
        self.slots[index & (self.slots.len() - 1)] != Self::EMPTY
    }

    /// Puts fresh buffers of `cache` in the place of those from `start` on, which wraps, and appends what was
    /// there to `burst` as packets of these lengths, none above [`DATA_ROOM`](super::DATA_ROOM). `arm` gets
    /// the index of each and the device address of its fresh buffer. Gives their number, which is below that
    /// of `lens` when `burst` is full or the pool exhausted.
    #[inline(always)]
    pub fn exchange(
        &mut self,
        start: usize,
        lens: &[u16],
        cache: &mut PoolCache,
        burst: &mut Burst,
        mut arm: impl FnMut(usize, u64),
    ) -> usize {
        let (fresh, buffers) = cache.reserve(lens.len().min(burst.remaining_capacity())).take_all();
        let count = fresh.len();
        // Two loops, because one would have more values than there are registers; the second is vector code.
        for (i, fresh) in fresh.iter().enumerate() {
            // SAFETY: what was reserved is initialised.
            let fresh = Buffer(unsafe { fresh.assume_init() });
            arm(start.wrapping_add(i), buffers.iova(&fresh));
        }
        let (to_end, from_start) = self.runs(start, count);
        let (mut fresh, mut lens) = (fresh, &lens[..count]);
        for slots in [to_end, from_start] {
            let (now, then) = fresh.split_at(slots.len());
            burst.extend(slots.iter().zip(lens).map(|(slot, len)| Packet::fitting(Buffer(*slot), *len)));
            for (slot, fresh) in slots.iter_mut().zip(now) {
                // SAFETY: as above.
                *slot = unsafe { fresh.assume_init() };
            }
            (fresh, lens) = (then, &lens[slots.len()..]);
        }
        count
    }

    /// The slots of `count` descriptors from `start` on: those up to the end of the ring, and the rest.
    #[inline(always)]
    fn runs(&mut self, start: usize, count: usize) -> (&mut [u32], &mut [u32]) {
        let start = start & (self.slots.len() - 1);
        let (head, tail) = self.slots.split_at_mut(start);
        let first = count.min(tail.len());
        (&mut tail[..first], &mut head[..count - first])
    }

    /// Gives the buffers of `count` descriptors from `start` on, which wraps, to `cache`.
    #[inline]
    pub fn release(&mut self, start: usize, count: usize, cache: &mut PoolCache) {
        let mask = self.slots.len() - 1;
        let (mut index, mut rest) = (start & mask, count.min(self.slots.len()));
        while rest > 0 {
            let len = rest.min(self.slots.len() - index).min(CHUNK);
            let run = &mut self.slots[index..index + len];
            // Without an early end, so that the test costs less than one instruction for each buffer.
            if run.iter().fold(false, |any, slot| any | (*slot == Self::EMPTY)) {
                for slot in run.iter().filter(|slot| **slot != Self::EMPTY) {
                    cache.free(Buffer(*slot));
                }
            } else {
                cache.free_all(run);
            }
            run.fill(Self::EMPTY);
            index = (index + len) & mask;
            rest -= len;
        }
    }

    /// Gives every buffer to `cache`; for a ring whose device was reset.
    pub fn release_all(&mut self, cache: &mut PoolCache) {
        self.release(0, self.slots.len(), cache);
    }
}

/// A [`BufferRing`] in registers, as [`Buffers`] is for a cache.
#[derive(Debug)]
pub struct BufferSlots<'a> {
    slots: &'a mut [u32],
    mask: usize,
}

impl BufferSlots<'_> {
    #[inline(always)]
    fn slot(&mut self, index: usize) -> &mut u32 {
        // SAFETY: `mask` is the length minus 1 and the length a power of two, so the masked index is below it.
        unsafe { self.slots.get_unchecked_mut(index & self.mask) }
    }

    /// Puts `buffer` at `index`, which wraps, and gives what was there.
    #[inline(always)]
    pub fn replace(&mut self, index: usize, buffer: Buffer) -> Option<Buffer> {
        let old = std::mem::replace(self.slot(index), buffer.0);
        (old != BufferRing::EMPTY).then_some(Buffer(old))
    }

    /// Puts `buffer` at `index`, which wraps and is empty.
    #[inline(always)]
    pub fn put(&mut self, index: usize, buffer: Buffer) {
        let slot = self.slot(index);
        debug_assert!(*slot == BufferRing::EMPTY, "the buffer that is there would be lost");
        *slot = buffer.0;
    }

    /// Takes what is at `index`, which wraps.
    #[inline(always)]
    pub fn take(&mut self, index: usize) -> Option<Buffer> {
        let old = std::mem::replace(self.slot(index), BufferRing::EMPTY);
        (old != BufferRing::EMPTY).then_some(Buffer(old))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{DmaMemory, Pool};
    use super::*;
    use crate::mem::{Backing, Region};

    fn pool(count: u32) -> Arc<Pool> {
        let region = Region::new(Pool::bytes(count), Backing::SmallPages).unwrap();
        Pool::new(&DmaMemory::map(region, &[]).unwrap(), count).unwrap()
    }

    #[test]
    fn a_buffer_ring_forgets_what_it_releases() {
        let pool = pool(4);
        let mut cache = pool.cache();
        let mut ring = BufferRing::new(4);
        let buffers: Vec<Buffer> = std::iter::from_fn(|| cache.allocate()).collect();
        for (index, buffer) in buffers.into_iter().enumerate() {
            assert!(ring.replace(index + 2, buffer).is_none());
        }
        ring.release(1, 2, &mut cache);
        assert_eq!((cache.len(), ring.is_filled(1), ring.is_filled(3)), (2, false, true));
        ring.release_all(&mut cache);
        assert_eq!(cache.len(), 4);
        assert!(ring.take(0).is_none());
    }

    #[test]
    fn an_exchange_takes_no_more_than_there_is() {
        let pool = pool(40);
        let mut cache = pool.cache();
        let mut ring = BufferRing::new(8);
        (0..8).for_each(|index| ring.put(index, cache.allocate().unwrap()));
        let mut burst = Burst::new();
        let mut armed = Vec::new();
        for round in 0..6 {
            let start = round * 7;
            ring.exchange(start, &[60; 7], &mut cache, &mut burst, |index, iova| armed.push((index, iova)));
        }
        // 32 is the burst's capacity, and what the ring of 8 leaves of 40.
        assert_eq!((burst.len(), armed.len(), cache.len()), (32, 32, 0));
        assert_eq!(armed[31].0, 31);
        let freed = burst.pop().map(|packet| cache.free(packet.into_buffer()));
        assert!(freed.is_some());
        assert_eq!(ring.exchange(32, &[1, 2], &mut cache, &mut burst, |_, _| {}), 1);
        assert_eq!((burst[31].len(), burst[0].len()), (1, 60));
        burst.drain(..).for_each(|packet| cache.free(packet.into_buffer()));
        ring.release_all(&mut cache);
        drop(cache);
        assert_eq!(pool.free(), 40);
    }

    #[test]
    fn a_release_may_wrap_and_meet_empty_slots() {
        let pool = pool(900);
        let mut cache = pool.cache();
        let mut ring = BufferRing::new(128);
        let mut held: Vec<Buffer> = std::iter::from_fn(|| cache.allocate()).take(400).collect();
        for round in 0..200 {
            for index in 0..100 {
                if index != round % 110 {
                    ring.put(round * 37 + index, cache.allocate().or_else(|| held.pop()).unwrap());
                }
            }
            ring.release(round * 37, 100, &mut cache);
            assert!((0..128).all(|index| !ring.is_filled(index)));
        }
        held.into_iter().for_each(|buffer| cache.free(buffer));
        drop(cache);
        assert_eq!(pool.free(), 900);
    }
}
