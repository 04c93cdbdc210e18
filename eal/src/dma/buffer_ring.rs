//! The driver's own record of which buffer is where.

use super::pool::{Buffer, Burst, CHUNK, MAX_BURST, Packet, PoolCache};

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

    /// Receives: for each descriptor from `start` on, which wraps, of which `done` gives a length, puts a fresh
    /// buffer of `cache` in the place of the one there, and appends that one to `burst` as a packet. `arm` gets
    /// the descriptor's index and the device address of its fresh buffer. A length above
    /// [`DATA_ROOM`](super::DATA_ROOM) is cut to it.
    ///
    /// Ends where `done` gives none, when `burst` is full or the pool exhausted; gives the number of packets.
    #[inline(always)]
    pub fn exchange(
        &mut self,
        start: usize,
        cache: &mut PoolCache,
        burst: &mut Burst,
        mut done: impl FnMut(usize) -> Option<u16>,
        mut arm: impl FnMut(usize, u64),
    ) -> usize {
        let before = burst.len();
        let packets = burst.as_mut_ptr();
        let mut fresh = cache.reserve(MAX_BURST - before);
        // A panic of the callers' code loses these buffers; none has two handles.
        let (ready, buffers) = fresh.take_all();
        let mut slots = self.view();
        let mut count = 0;
        while count < ready.len() {
            let index = start.wrapping_add(count);
            let Some(len) = done(index) else { break };
            // SAFETY: the index is below the length, and what was reserved is initialised.
            let new = Buffer(unsafe { ready.get_unchecked(ready.len() - 1 - count).assume_init() });
            arm(index, buffers.iova(&new));
            let old = std::mem::replace(slots.slot(index), new.0);
            debug_assert!(old != Self::EMPTY, "there is no buffer to give out");
            // SAFETY: no more was reserved than `burst` has room for.
            unsafe { packets.add(before + count).write(Packet::new(Buffer(old), usize::from(len))) };
            count += 1;
        }
        fresh.give_back(&ready[..ready.len() - count]);
        // SAFETY: the packets up to there were written.
        unsafe { burst.set_len(before + count) };
        count
    }

    /// Sends: keeps the buffers of the first `count` packets of `burst` at the descriptors from `start` on, which
    /// wraps and is empty. `send` gets the index, the device address and the length of each.
    ///
    /// # Panics
    /// When there are fewer packets.
    #[inline(always)]
    pub fn keep(
        &mut self,
        start: usize,
        count: usize,
        cache: &PoolCache,
        burst: &mut Burst,
        mut send: impl FnMut(usize, u64, usize),
    ) {
        let (buffers, mut slots) = (cache.buffers(), self.view());
        let len = burst.len();
        assert!(count <= len);
        let packets = burst.as_mut_ptr();
        // SAFETY: 0 packets are initialised. A panic of `send` loses the others; none has two handles.
        unsafe { burst.set_len(0) };
        let mut i = 0;
        while i < count {
            // SAFETY: `i` is below the number of packets that there were, and each is moved out once.
            let packet = unsafe { packets.add(i).read() };
            let index = start.wrapping_add(i);
            send(index, buffers.iova(packet.buffer()), packet.len());
            slots.put(index, packet.into_buffer());
            i += 1;
        }
        if count < len {
            // SAFETY: these packets are still there; they move to the front, and no more than them is counted.
            unsafe {
                packets.add(count).copy_to(packets, len - count);
                burst.set_len(len - count);
            }
        }
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

    use super::super::{DATA_ROOM, DmaMemory, Pool};
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
            let done = |index| (index < start + 7).then_some(60);
            ring.exchange(start, &mut cache, &mut burst, done, |index, iova| armed.push((index, iova)));
        }
        // 32 is the burst's capacity, and what the ring of 8 leaves of 40.
        assert_eq!((burst.len(), armed.len(), cache.len()), (32, 32, 0));
        assert_eq!(armed[31].0, 31);
        burst.drain(30..).for_each(|packet| cache.free(packet.into_buffer()));
        let mut lens = [3, u16::MAX].into_iter();
        assert_eq!(ring.exchange(32, &mut cache, &mut burst, |_| lens.next(), |_, _| {}), 2);
        assert_eq!([29, 30, 31].map(|i| burst[i].len()), [60, 3, DATA_ROOM]);
        burst.drain(..).for_each(|packet| cache.free(packet.into_buffer()));
        ring.release_all(&mut cache);
        drop(cache);
        assert_eq!(pool.free(), 40);
    }

    #[test]
    fn what_is_kept_leaves_the_burst() {
        let pool = pool(8);
        let mut cache = pool.cache();
        let mut ring = BufferRing::new(4);
        let mut burst: Burst = (1..4).map(|len| Packet::new(cache.allocate().unwrap(), len)).collect();
        let mut sent = Vec::new();
        ring.keep(3, 2, &cache, &mut burst, |index, _, len| sent.push((index, len)));
        assert_eq!((burst.len(), burst[0].len()), (1, 3));
        ring.keep(5, 1, &cache, &mut burst, |index, _, len| sent.push((index, len)));
        assert_eq!(sent, [(3, 1), (4, 2), (5, 3)]);
        assert!(burst.is_empty() && !ring.is_filled(2));
        ring.release(3, 3, &mut cache);
        assert_eq!(cache.len(), 8);
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
