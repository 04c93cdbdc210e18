//! Packet buffers: a shared pool, a cache of it for each lcore, and the 8-byte handles that own a buffer.

use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;

use super::DmaMemory;
use crate::error::Result;

/// Distance of two buffers in bytes; a power of two, so that no buffer crosses a page.
pub const BUFFER_SIZE: usize = 2048;

/// Bytes in front of a packet's first byte: room for a virtio-net header, and the packet on a cache line.
pub const HEADROOM: usize = 64;

/// Longest packet that a buffer holds, in bytes.
pub const DATA_ROOM: usize = BUFFER_SIZE - HEADROOM;

/// Packets in a [`Burst`].
pub const MAX_BURST: usize = 32;

/// Buffers that move between the pool and a cache at a time.
const CHUNK: usize = 32;

/// Buffers that a cache keeps; what is above goes back to the pool.
const CACHE: usize = 512;

/// Packets that move together.
pub type Burst = ArrayVec<Packet, MAX_BURST>;

/// Ownership of one packet buffer. There is exactly one handle of each buffer: it is moved, never copied,
/// into a descriptor ring, a packet, or the pool. Losing it loses the buffer.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub struct Buffer(u32);

/// A packet: a buffer and how much of it is used. 8 bytes, moved by value.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a packet that is dropped is lost to its pool; give it to PoolCache::free"]
pub struct Packet {
    buffer: Buffer,
    len: u16,
    flags: u16,
}

const _: () = assert!(size_of::<Packet>() == 8);

impl Packet {
    /// A packet of `len` bytes in `buffer`; a `len` above [`DATA_ROOM`] becomes it.
    #[inline(always)]
    pub fn new(buffer: Buffer, len: usize) -> Self {
        Self { buffer, len: len.min(DATA_ROOM) as u16, flags: 0 }
    }

    /// Length in bytes, without the frame check sequence.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// The buffer that the packet is in.
    #[inline(always)]
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Gives up the packet, keeps its buffer.
    #[inline(always)]
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }
}

/// All packet buffers of a process, at one linear range of offsets in a [`DmaMemory`].
#[derive(Debug)]
pub struct Pool {
    memory: Arc<DmaMemory>,
    /// Offset of buffer 0 in the memory.
    offset: usize,
    count: u32,
    free: ArrayQueue<ArrayVec<u32, CHUNK>>,
}

impl Pool {
    /// Takes `count` buffers of `memory`.
    ///
    /// # Errors
    /// `Os` when the memory is too small.
    pub fn new(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        let offset = memory.allocate_buffers(count as usize, BUFFER_SIZE)?;
        // A cache may give back a chunk that is not full, so there can be as many chunks as buffers.
        let free = ArrayQueue::new(count.max(1) as usize);
        let indices: Vec<u32> = (0..count).collect();
        for chunk in indices.chunks(CHUNK) {
            let _ = free.push(chunk.iter().copied().collect());
        }
        Ok(Arc::new(Self { memory: Arc::clone(memory), offset, count, free }))
    }

    /// Bytes of memory that a pool of `count` buffers takes.
    pub fn bytes(count: u32) -> usize {
        (count as usize).saturating_add(1).saturating_mul(BUFFER_SIZE)
    }

    /// Buffers in all.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Buffers that are neither in a cache, a ring nor a packet. Exact while no cache moves.
    pub fn free(&self) -> u32 {
        let mut chunks = Vec::with_capacity(self.free.len());
        while let Some(chunk) = self.free.pop() {
            chunks.push(chunk);
        }
        let free = chunks.iter().map(ArrayVec::len).sum::<usize>() as u32;
        for chunk in chunks {
            let _ = self.free.push(chunk);
        }
        free
    }

    /// A cache for one lcore.
    pub fn cache(self: &Arc<Self>) -> PoolCache {
        let len = self.count as usize * BUFFER_SIZE;
        PoolCache {
            base: self.memory.pointer(self.offset, len),
            offset: self.offset,
            count: self.count,
            stack: Box::new([MaybeUninit::uninit(); CACHE]),
            len: 0,
            pool: Arc::clone(self),
        }
    }
}

/// One lcore's view of a [`Pool`]: a last-in first-out cache of free buffers, and access to packet data.
///
/// Packet data is copied in and out, never borrowed: a device that breaks its rules may still write a buffer
/// that it has given back.
#[derive(Debug)]
pub struct PoolCache {
    base: NonNull<u8>,
    offset: usize,
    count: u32,
    stack: Box<[MaybeUninit<u32>; CACHE]>,
    /// The first `len` entries of `stack` are initialised.
    len: usize,
    pool: Arc<Pool>,
}

// SAFETY: `base` points into memory that `pool` keeps mapped and that no thread owns.
unsafe impl Send for PoolCache {}

impl PoolCache {
    /// Makes `wanted` free buffers ready (at most [`MAX_BURST`]) and gives them out one by one; those not
    /// taken stay in the cache. Fewer when the pool is exhausted.
    #[inline(always)]
    pub fn reserve(&mut self, wanted: usize) -> Reserved<'_> {
        let wanted = wanted.min(MAX_BURST);
        if self.len < wanted {
            self.refill();
        }
        Reserved { floor: self.len - wanted.min(self.len), cache: self }
    }

    /// One free buffer, if the pool has one.
    #[inline(always)]
    pub fn allocate(&mut self) -> Option<Buffer> {
        self.reserve(1).next()
    }

    #[cold]
    #[inline(never)]
    fn refill(&mut self) {
        while self.len < MAX_BURST {
            let Some(chunk) = self.pool.free.pop() else { return };
            for index in chunk {
                self.stack[self.len] = MaybeUninit::new(index);
                self.len += 1;
            }
        }
    }

    /// Takes a buffer back.
    #[inline(always)]
    pub fn free(&mut self, buffer: Buffer) {
        if self.len == CACHE {
            self.spill();
        }
        self.stack[self.len] = MaybeUninit::new(buffer.0);
        self.len += 1;
    }

    /// Gives chunks back to the pool until half of the cache is empty.
    #[cold]
    #[inline(never)]
    fn spill(&mut self) {
        while self.len > CACHE / 2 {
            self.give_back(CHUNK);
        }
    }

    fn give_back(&mut self, most: usize) {
        let mut chunk = ArrayVec::new();
        while self.len > 0 && chunk.len() < most {
            self.len -= 1;
            // SAFETY: entries below the old `len` are initialised.
            chunk.push(unsafe { self.stack[self.len].assume_init() });
        }
        if !chunk.is_empty() {
            let _ = self.pool.free.push(chunk);
        }
    }

    /// Buffers in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the cache holds no buffer; the pool may hold some.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pool behind the cache.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Device address of the packet data in `buffer`; [`HEADROOM`] bytes in front of it belong to the buffer.
    #[inline(always)]
    pub fn iova(&self, buffer: &Buffer) -> u64 {
        let offset = self.offset + buffer.0 as usize * BUFFER_SIZE + HEADROOM;
        self.pool.memory.translation().iova(offset)
    }

    /// Copies `bytes` into the packet at `offset`.
    ///
    /// # Panics
    /// When they do not fit into [`DATA_ROOM`], or the packet is of another pool.
    #[inline(always)]
    pub fn write(&mut self, packet: &mut Packet, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= DATA_ROOM);
        // SAFETY: `data` gives the start of `DATA_ROOM` bytes and the copy ends within them; the source is a
        // slice of the caller's and cannot overlap memory that hands out no slices. The packet's handle is
        // unique and borrowed mutably, so no other thread of ours touches the buffer.
        unsafe {
            self.data(&packet.buffer)
                .as_ptr()
                .add(offset)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// Copies bytes of the packet at `offset` out.
    ///
    /// # Panics
    /// When they are not within [`DATA_ROOM`], or the packet is of another pool.
    #[inline(always)]
    pub fn read(&self, packet: &Packet, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= DATA_ROOM);
        // SAFETY: as in `write`, the other way; nobody writes while the handle is borrowed.
        unsafe {
            self.data(&packet.buffer)
                .as_ptr()
                .add(offset)
                .copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
        }
    }

    /// Writes `bytes` directly in front of the packet data.
    ///
    /// # Panics
    /// When they do not fit into [`HEADROOM`], or the buffer is of another pool.
    #[inline(always)]
    pub fn write_header<const N: usize>(&mut self, buffer: &mut Buffer, bytes: &[u8; N]) {
        const { assert!(N <= HEADROOM) };
        // SAFETY: `data` is `HEADROOM` bytes into the buffer, so the header starts inside it; the handle is
        // borrowed mutably.
        unsafe { self.data(buffer).as_ptr().sub(N).copy_from_nonoverlapping(bytes.as_ptr(), N) }
    }

    /// Reads one byte-array directly in front of the packet data.
    #[inline(always)]
    pub fn read_header<const N: usize>(&self, buffer: &Buffer) -> [u8; N] {
        const { assert!(N <= HEADROOM) };
        let mut bytes = [0; N];
        // SAFETY: as in `write_header`, the other way.
        unsafe { self.data(buffer).as_ptr().sub(N).copy_to_nonoverlapping(bytes.as_mut_ptr(), N) };
        bytes
    }

    #[inline(always)]
    fn data(&self, buffer: &Buffer) -> NonNull<u8> {
        assert!(buffer.0 < self.count, "a buffer of another pool");
        // SAFETY: the index is below the count, so the offset is inside the pool's range of the memory.
        unsafe { self.base.add(buffer.0 as usize * BUFFER_SIZE + HEADROOM) }
    }
}

impl Drop for PoolCache {
    fn drop(&mut self) {
        while self.len > 0 {
            self.give_back(CHUNK);
        }
    }
}

/// Free buffers made ready by [`PoolCache::reserve`]; an iterator that takes them out of the cache.
#[derive(Debug)]
pub struct Reserved<'a> {
    floor: usize,
    cache: &'a mut PoolCache,
}

impl Reserved<'_> {
    /// The cache, for device addresses while buffers are taken.
    #[inline(always)]
    pub fn cache(&self) -> &PoolCache {
        self.cache
    }
}

impl Iterator for Reserved<'_> {
    type Item = Buffer;

    #[inline(always)]
    fn next(&mut self) -> Option<Buffer> {
        if self.cache.len <= self.floor {
            return None;
        }
        self.cache.len -= 1;
        // SAFETY: `len` was above `floor`, so at least 1; entries below it are initialised, and `len` never
        // exceeds the stack's length.
        Some(Buffer(unsafe { self.cache.stack.get_unchecked(self.cache.len).assume_init() }))
    }
}

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

    #[inline(always)]
    fn slot(&mut self, index: usize) -> &mut u32 {
        let mask = self.slots.len() - 1;
        // SAFETY: the length is a power of two, at least 1, so the masked index is below it.
        unsafe { self.slots.get_unchecked_mut(index & mask) }
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

    /// Gives the buffers of `count` descriptors from `start` on, which wraps, to `cache`.
    #[inline(always)]
    pub fn release(&mut self, start: usize, count: usize, cache: &mut PoolCache) {
        for index in start..start.wrapping_add(count) {
            if let Some(buffer) = self.take(index) {
                cache.free(buffer);
            }
        }
    }

    /// Gives every buffer to `cache`; for a ring whose device was reset.
    pub fn release_all(&mut self, cache: &mut PoolCache) {
        self.release(0, self.slots.len(), cache);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{Backing, Region};

    fn pool(count: u32) -> Arc<Pool> {
        let memory =
            DmaMemory::map(Region::new(Pool::bytes(count), Backing::SmallPages).unwrap(), &[]).unwrap();
        Pool::new(&memory, count).unwrap()
    }

    #[test]
    fn every_buffer_is_given_out_once_and_comes_back() {
        let pool = pool(1000);
        let mut cache = pool.cache();
        let mut buffers: Vec<Buffer> = std::iter::from_fn(|| cache.allocate()).collect();
        assert_eq!(buffers.len(), 1000);
        buffers.sort_by_key(|buffer| buffer.0);
        buffers.dedup();
        assert_eq!(buffers.len(), 1000);
        buffers.into_iter().for_each(|buffer| cache.free(buffer));
        drop(cache);
        assert_eq!(pool.free(), 1000);
    }

    #[test]
    fn a_reservation_leaves_what_is_not_taken() {
        let pool = pool(40);
        let mut cache = pool.cache();
        let taken: Vec<Buffer> = cache.reserve(8).take(3).collect();
        assert_eq!(cache.len(), 29);
        assert_eq!(cache.reserve(100).count(), 32);
        assert_eq!(taken.len(), 3);
    }

    #[test]
    fn data_and_header_do_not_touch() {
        let pool = pool(2);
        let mut cache = pool.cache();
        let mut buffer = cache.allocate().unwrap();
        cache.write_header(&mut buffer, &[7; 12]);
        let mut packet = Packet::new(buffer, 60);
        cache.write(&mut packet, 0, &[1; 60]);
        assert_eq!(cache.read_header::<12>(packet.buffer()), [7; 12]);
        let mut bytes = [0; 62];
        cache.read(&packet, 0, &mut bytes);
        assert_eq!((bytes[59], bytes[60]), (1, 0));
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
}
