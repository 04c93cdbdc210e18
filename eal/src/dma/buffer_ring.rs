//! The driver's own record of which buffer is where.

use std::hint::assert_unchecked;

use super::pool::{Buffer, Buffers, Burst, MAX_BURST, MAX_FREE, Packet, PoolCache};
use super::ring::{DmaRing, RingEntry, Word};

/// Which buffer each descriptor of a ring owns: our own record, which the device cannot reach.
#[derive(Debug)]
pub struct BufferRing {
    slots: Box<[u32]>,
}

impl BufferRing {
    /// No handle: no pool has its tag. Not all ones, which the compiler would write by a call of memset.
    const EMPTY: u32 = u32::MAX - 1;

    /// A record for `entries` descriptors, all empty; rounded up to a power of two.
    ///
    /// # Panics
    /// When there is no memory for as many.
    pub fn new(entries: usize) -> Self {
        // Without debug assertions what overflows there would be 0, and no index within the record.
        let slots = entries.checked_next_power_of_two().unwrap_or(usize::MAX);
        Self { slots: vec![Self::EMPTY; slots].into() }
    }

    #[inline(always)]
    fn slot(&mut self, index: usize) -> &mut u32 {
        let mask = self.slots.len() - 1;
        &mut self.slots[index & mask]
    }

    /// Puts `buffer` at `index`, which wraps, and gives what was there.
    #[inline(always)]
    pub fn replace(&mut self, index: usize, buffer: Buffer) -> Option<Buffer> {
        let old = std::mem::replace(self.slot(index), buffer.0);
        (old != Self::EMPTY).then_some(Buffer(old))
    }

    /// Puts `buffer` at `index`, which wraps and is empty.
    #[inline(always)]
    pub fn put(&mut self, index: usize, buffer: Buffer) {
        let slot = self.slot(index);
        debug_assert!(*slot == Self::EMPTY, "the buffer that is there would be lost");
        *slot = buffer.0;
    }

    /// Takes what is at `index`, which wraps.
    #[inline(always)]
    pub fn take(&mut self, index: usize) -> Option<Buffer> {
        let old = std::mem::replace(self.slot(index), Self::EMPTY);
        (old != Self::EMPTY).then_some(Buffer(old))
    }

    /// Whether `index`, which wraps, owns a buffer.
    #[inline(always)]
    pub fn is_filled(&self, index: usize) -> bool {
        self.slots[index & (self.slots.len() - 1)] != Self::EMPTY
    }

    /// Descriptors that own a buffer.
    pub fn filled(&self) -> usize {
        self.slots.iter().filter(|slot| **slot != Self::EMPTY).count()
    }

    /// Receives: for each of up to `most` descriptors from `start` on, which wraps, of which all are filled and
    /// `done` gives a length, puts a fresh buffer of `cache` in the place of the one there, and appends that one
    /// to `burst` as a packet. `arm` then sees the descriptor with its fresh buffer. A length above
    /// [`DATA_ROOM`](super::DATA_ROOM) is cut to it. `done` also gets the entry of `completions` with the
    /// descriptor's index. Both rings have as many entries as this record.
    ///
    /// Ends where `done` gives none or the ring ends, so that no index wraps in the loop, when `burst` is full or
    /// the pool exhausted; gives the number of packets.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub fn exchange<W: Word, const N: usize, C: Word, const M: usize>(
        &mut self,
        ring: &DmaRing<W, N>,
        completions: &DmaRing<C, M>,
        start: usize,
        most: usize,
        cache: &mut PoolCache,
        burst: &mut Burst,
        mut done: impl FnMut(&Filled<'_, W, N>, RingEntry<'_, C, M>) -> Option<usize>,
        mut arm: impl FnMut(&Slot<'_, W, N>),
    ) -> usize {
        let before = burst.len();
        // SAFETY: a burst is not longer than its capacity.
        unsafe { assert_unchecked(before <= MAX_BURST) };
        let packets = burst.as_mut_ptr();
        let (ring, completions) = (ring.view(), completions.view());
        // Powers of two minus 1, so this is the smallest.
        let mask = ring.mask() & completions.mask() & (self.slots.len() - 1);
        let first = start & mask;
        // SAFETY: the masked index is below the record's length.
        let slots = unsafe { self.slots.get_unchecked_mut(first..) };
        let (ring, completions) = (ring.entry(first), completions.entry(first));
        let most = most.min(MAX_BURST - before).min(mask + 1 - first);
        let mut fresh = cache.take(most);
        let mut count = 0;
        while !fresh.is_empty() {
            // SAFETY: no more buffers are taken than there are entries from `first` to the smallest ring's end.
            let (place, entry, completion) =
                unsafe { (slots.get_unchecked_mut(count), ring.ahead(count), completions.ahead(count)) };
            let index = first + count;
            debug_assert!(*place != Self::EMPTY, "there is no buffer to give out");
            let old = Filled { index, entry, buffers: fresh.buffers, buffer: Buffer(*place) };
            let Some(len) = done(&old, completion) else { break };
            // SAFETY: no more buffers are taken than `burst` has room for.
            unsafe { packets.add(before + count).write(Packet::new(old.buffer, len)) };
            let Some(buffer) = fresh.next() else { break };
            // The cache has this pool's only.
            let iova = fresh.buffers.iova_of_any(&buffer);
            let new = Slot { index, entry, iova, buffers: fresh.buffers, buffer };
            arm(&new);
            *place = new.buffer.0;
            count += 1;
        }
        // SAFETY: the packets up to there were written.
        unsafe { burst.set_len(before + count) };
        count
    }

    /// Sends: keeps the buffers of the first `count` packets of `burst` at the descriptors from `start` on, which
    /// wraps and is empty. `send` gets each with its packet's length. `ring` has as many entries as this record, and
    /// `count` is not above it. Only debug builds check that and the emptiness; else what is overwritten is lost to
    /// its pool.
    ///
    /// # Panics
    /// When there are fewer packets. When one is of another pool, which is found at the end, so that it costs one
    /// instruction: `send` has seen an address for it that means nothing, and the device must not be told.
    #[inline(always)]
    pub fn keep<W: Word, const N: usize>(
        &mut self,
        ring: &DmaRing<W, N>,
        start: usize,
        count: usize,
        cache: &PoolCache,
        burst: &mut Burst,
        mut send: impl FnMut(&mut Slot<'_, W, N>, usize),
    ) {
        let buffers = cache.buffers();
        let ring = ring.view();
        debug_assert!(ring.mask() + 1 == self.slots.len(), "a record of another ring");
        // Powers of two minus 1, so this is the smaller.
        let mask = ring.mask() & (self.slots.len() - 1);
        let len = burst.len();
        assert!(count <= len);
        // SAFETY: 0 packets are initialised. A panic of `send` loses the others; none has two handles.
        unsafe { burst.set_len(0) };
        // After that call, which borrows all of the burst and would end what was borrowed before.
        let packets = burst.as_mut_ptr();
        let (mut kept, mut iovas) = (0, 0);
        // Twice where the ring ends in between, so that no index wraps in the loop.
        while kept < count {
            let first = start.wrapping_add(kept) & mask;
            let run = (count - kept).min(mask + 1 - first);
            // SAFETY: the masked index is below the record's length.
            let (slots, entries) = (unsafe { self.slots.get_unchecked_mut(first..) }, ring.entry(first));
            for i in 0..run {
                // SAFETY: `kept + run` is at most `count`, and each packet is moved out once.
                let packet = unsafe { packets.add(kept + i).read() };
                let (index, len) = (first + i, packet.len());
                // SAFETY: the run ends where the smaller ring does.
                let (place, entry) = unsafe { (slots.get_unchecked_mut(i), entries.ahead(i)) };
                let buffer = packet.into_buffer();
                let iova = buffers.iova_of_any(&buffer);
                iovas |= iova;
                let mut slot = Slot { index, entry, iova, buffers, buffer };
                send(&mut slot, len);
                debug_assert!(*place == Self::EMPTY, "the buffer that is there would be lost");
                *place = slot.buffer.0;
            }
            kept += run;
        }
        if count < len {
            // SAFETY: these packets are still there; they move to the front, and no more than them is counted.
            unsafe {
                packets.add(count).copy_to(packets, len - count);
                burst.set_len(len - count);
            }
        }
        assert!(!Buffers::is_foreign(iovas), "a packet of another pool");
    }

    /// Gives the buffers of `count` descriptors from `start` on, which wraps, to `cache`.
    #[inline]
    pub fn release(&mut self, start: usize, count: usize, cache: &mut PoolCache) {
        let mask = self.slots.len() - 1;
        let (mut index, mut rest) = (start & mask, count.min(self.slots.len()));
        while rest > 0 {
            let len = rest.min(self.slots.len() - index).min(MAX_FREE);
            let run = &mut self.slots[index..index + len];
            if !cache.free_all(run) {
                for slot in run.iter().filter(|slot| **slot != Self::EMPTY) {
                    cache.free(Buffer(*slot));
                }
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

/// A descriptor of a ring, and the buffer that it owns and that the device may have filled.
#[derive(Debug)]
pub struct Filled<'a, W: Word, const N: usize> {
    /// Its index in the ring.
    pub index: usize,
    /// The descriptor itself.
    pub entry: RingEntry<'a, W, N>,
    buffers: Buffers<'a>,
    buffer: Buffer,
}

impl<W: Word, const N: usize> Filled<'_, W, N> {
    /// As [`PoolCache::read_header`], of its buffer.
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        self.buffers.read_header(&self.buffer)
    }
}

/// A descriptor of a ring, and the buffer that it gets.
#[derive(Debug)]
pub struct Slot<'a, W: Word, const N: usize> {
    /// Its index in the ring.
    pub index: usize,
    /// The descriptor itself.
    pub entry: RingEntry<'a, W, N>,
    iova: u64,
    buffers: Buffers<'a>,
    buffer: Buffer,
}

impl<W: Word, const N: usize> Slot<'_, W, N> {
    /// Device address of the packet data in its buffer, as [`PoolCache::iova`] gives it.
    #[inline(always)]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// As [`PoolCache::read_header`], of its buffer.
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        self.buffers.read_header(&self.buffer)
    }

    /// As [`PoolCache::write_header`], of its buffer.
    #[inline(always)]
    pub fn write_header<const LEN: usize>(&mut self, bytes: &[u8; LEN]) {
        self.buffers.write_header(&mut self.buffer, bytes);
    }

    /// Sets the packet data from `len` up to `LEN` bytes to zero, for a device that does not pad what is shorter, and
    /// gives `LEN`.
    #[inline(always)]
    pub fn pad<const LEN: usize>(&mut self, len: usize) -> usize {
        self.buffers.pad::<LEN>(&mut self.buffer, len)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use super::super::{DATA_ROOM, DmaMemory, Pool};
    use super::*;
    use crate::mem::{Backing, Region};
    use proptest::prelude::*;

    fn pool(count: u32) -> Arc<Pool> {
        let region = Region::new(Pool::bytes(count), Backing::SmallPages).unwrap();
        Pool::new(&DmaMemory::map(region, &[]).unwrap(), count).unwrap()
    }

    fn descriptors(entries: usize) -> DmaRing<u64, 2> {
        let region = Region::new(16 * entries, Backing::SmallPages).unwrap();
        DmaRing::new(&DmaMemory::map(region, &[]).unwrap(), entries, 16).unwrap()
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
        let (mut ring, desc) = (BufferRing::new(8), descriptors(8));
        (0..8).for_each(|index| ring.put(index, cache.allocate().unwrap()));
        let mut burst = Burst::new();
        let mut armed = Vec::new();
        for round in 0..6 {
            let start = round * 7;
            let mut arm = |slot: &Slot<'_, u64, 2>| armed.push((slot.index, slot.iova()));
            let mut some = |start, most| {
                ring.exchange(&desc, &desc, start, most, &mut cache, &mut burst, |_, _| Some(60), &mut arm)
            };
            let count = some(start, 7);
            some(start + count, 7 - count);
        }
        // 32 is the burst's capacity, and what the ring of 8 leaves of 40.
        assert_eq!((burst.len(), armed.len(), cache.len()), (32, 32, 0));
        assert_eq!(armed[31].0, 7);
        burst.drain(30..).for_each(|packet| cache.free(packet.into_buffer()));
        let mut lens = [3, usize::MAX].into_iter();
        assert_eq!(ring.exchange(&desc, &desc, 32, 8, &mut cache, &mut burst, |_, _| lens.next(), |_| {}), 2);
        assert_eq!([29, 30, 31].map(|i| burst[i].len()), [60, 3, DATA_ROOM]);
        burst.drain(..).for_each(|packet| cache.free(packet.into_buffer()));
        ring.release_all(&mut cache);
        drop(cache);
        assert_eq!(pool.available(), 40);
    }

    #[test]
    #[should_panic(expected = "capacity overflow")]
    fn a_record_that_is_too_large_is_not_an_empty_one() {
        BufferRing::new(usize::MAX);
    }

    #[test]
    fn what_is_kept_leaves_the_burst() {
        let pool = pool(8);
        let mut cache = pool.cache();
        let (mut ring, desc) = (BufferRing::new(4), descriptors(4));
        let mut burst: Burst = (1..4).map(|len| Packet::new(cache.allocate().unwrap(), len)).collect();
        let mut sent = Vec::new();
        ring.keep(&desc, 3, 2, &cache, &mut burst, |slot, len| sent.push((slot.index, len)));
        assert_eq!((burst.len(), burst[0].len()), (1, 3));
        ring.keep(&desc, 5, 1, &cache, &mut burst, |slot, len| sent.push((slot.index, len)));
        assert_eq!(sent, [(3, 1), (0, 2), (1, 3)]);
        assert!(burst.is_empty() && !ring.is_filled(2));
        ring.release(3, 3, &mut cache);
        assert_eq!(cache.len(), 8);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "a record of another ring")]
    fn a_ring_of_another_size_keeps_nothing() {
        let mut record = BufferRing::new(8);
        record.keep(&descriptors(4), 0, 0, &pool(1).cache(), &mut Burst::new(), |_, _| {});
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
        assert_eq!(pool.available(), 900);
    }

    proptest! {
        /// The model is a queue: the ring gives buffers out in the order in which it was given them.
        #[test]
        fn a_ring_that_receives_is_a_queue(
            shift in 0..7_u32,
            spare in 0..40_u32,
            steps in prop::collection::vec((0..MAX_BURST, 0..MAX_BURST, 0..=MAX_BURST), 1..40),
        ) {
            let entries = 1_usize << shift;
            let pool = pool(entries as u32 + spare);
            let mut cache = pool.cache();
            let (mut ring, desc) = (BufferRing::new(entries), descriptors(entries));
            let mut model: VecDeque<u64> = VecDeque::new();
            for index in 0..entries {
                let buffer = cache.allocate().unwrap();
                model.push_back(cache.iova(&buffer));
                ring.put(index, buffer);
            }
            let (mut next, mut burst) = (0, Burst::new());
            for (asked, done, freed) in steps {
                let (before, mut left, mut fresh) = (burst.len(), done, Vec::new());
                let good = |_: &Filled<'_, u64, 2>, _: RingEntry<'_, u64, 2>| {
                    left = left.checked_sub(1)?;
                    Some(done)
                };
                let arm = |slot: &Slot<'_, u64, 2>| fresh.push(slot.iova());
                let got = ring.exchange(&desc, &desc, next, asked, &mut cache, &mut burst, good, arm);
                let room = (MAX_BURST - before).min(entries - next % entries);
                prop_assert!(got <= done.min(asked).min(room));
                prop_assert!(got == done.min(asked).min(room) || pool.available() == 0 && cache.is_empty());
                for packet in &burst[before..] {
                    prop_assert_eq!(Some(cache.iova(packet.buffer())), model.pop_front());
                }
                model.extend(fresh);
                next += got;
                let freed = freed.min(burst.len());
                burst.drain(..freed).for_each(|packet| cache.free(packet.into_buffer()));
                prop_assert_eq!(model.len(), entries);
            }
            burst.drain(..).for_each(|packet| cache.free(packet.into_buffer()));
            ring.release_all(&mut cache);
            drop(cache);
            prop_assert_eq!(pool.available(), pool.count());
        }

        /// The model is a queue here too, of what was sent and is not back.
        #[test]
        fn a_ring_that_sends_is_a_queue(
            shift in 0..7_u32,
            steps in prop::collection::vec((0..=MAX_BURST, 0..=300_usize), 1..60),
        ) {
            let entries = 1_usize << shift;
            let pool = pool(entries as u32 + 40);
            let mut cache = pool.cache();
            let (mut ring, desc) = (BufferRing::new(entries), descriptors(entries));
            let mut model: VecDeque<u64> = VecDeque::new();
            let (mut head, mut tail) = (0, 0);
            for (packets, back) in steps {
                let mut burst: Burst = (0..packets).map(|len| Packet::new(cache.allocate().unwrap(), len)).collect();
                let iovas: Vec<u64> = burst.iter().map(|packet| cache.iova(packet.buffer())).collect();
                let count = packets.min(entries - model.len());
                let mut sent = Vec::new();
                ring.keep(&desc, head, count, &cache, &mut burst, |slot, len| sent.push((slot.index, slot.iova(), len)));
                let wanted: Vec<_> = (0..count).map(|i| ((head + i) % entries, iovas[i], i)).collect();
                prop_assert_eq!(sent, wanted);
                let rest: Vec<u64> = burst.iter().map(|packet| cache.iova(packet.buffer())).collect();
                prop_assert_eq!(&rest[..], &iovas[count..]);
                burst.drain(..).for_each(|packet| cache.free(packet.into_buffer()));
                model.extend(&iovas[..count]);
                head += count;
                let back = back.min(model.len());
                ring.release(tail, back, &mut cache);
                model.drain(..back);
                tail += back;
                prop_assert!((0..entries).all(|i| ring.is_filled(tail + i) == (i < model.len())));
                prop_assert_eq!(cache.len() + pool.available() as usize + model.len(), pool.count() as usize);
            }
        }
    }
}
