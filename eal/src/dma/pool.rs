//! Packet buffers: a shared pool, a cache of it for each lcore, and the 8-byte handles that own a buffer.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::DmaMemory;
use super::memory::Translation;
use crate::clock::Tsc;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
use crate::sync::ArrayQueue;
use crate::sync::atomic::{AtomicU64, Ordering};

#[cfg(test)]
#[cfg(loom)]
mod models;

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

/// Buffers that a cache takes back at once, at most.
pub(super) const MAX_FREE: usize = CACHE / 2;

/// Packets that move together.
pub type Burst = ArrayVec<Packet, MAX_BURST>;

/// Most buffers of a pool: their distances from the first fit into 32 bits.
const MAX_BUFFERS: u32 = u32::MAX / BUFFER_SIZE as u32;

/// Ownership of one packet buffer, by its distance from the pool's first in bytes. There is exactly one handle
/// of each buffer: it is moved, never copied, into a descriptor ring, a packet, or the pool. Losing it loses the
/// buffer.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub struct Buffer(pub(super) u32);

/// A packet: a buffer and how much of it is used. 8 bytes, moved by value.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a packet that is dropped is lost to its pool; give it to PoolCache::free"]
pub struct Packet {
    buffer: Buffer,
    len: u32,
}

const _: () = assert!(size_of::<Packet>() == 8);

impl Packet {
    /// A packet of `len` bytes in `buffer`; a `len` above [`DATA_ROOM`] becomes it.
    #[inline(always)]
    pub fn new(buffer: Buffer, len: usize) -> Self {
        Self { buffer, len: len.min(DATA_ROOM) as u32 }
    }

    /// Length in bytes, without the frame check sequence.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len as usize
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
    /// See [`bases`].
    bases: Box<[u64]>,
    free: ArrayQueue<ArrayVec<u32, CHUNK>>,
    /// TSC from which on it may be said again that the pool is exhausted.
    warn_from: AtomicU64,
}

/// What is to be added to a buffer's distance from the first to give the device address of its data: one entry
/// when the buffers are contiguous for the device, else one for each, rounded up to a power of two.
fn bases(translation: &Translation, offset: usize, count: u32) -> Box<[u64]> {
    let base = |index: usize| {
        let distance = index * BUFFER_SIZE;
        translation.iova(offset + distance).wrapping_sub(distance as u64).wrapping_add(HEADROOM as u64)
    };
    let entries = if translation.is_contiguous() { 1 } else { count.max(1) as usize };
    let mut bases: Vec<u64> = (0..entries).map(base).collect();
    bases.resize(entries.next_power_of_two(), 0);
    bases.into()
}

impl Pool {
    /// Takes `count` buffers of `memory`.
    ///
    /// # Errors
    /// `Os` when the memory is too small, `Usage` when a pool cannot be so large.
    pub fn new(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(memory, count, Access::ReadWrite)
    }

    /// As [`Pool::new`], of buffers that devices only read: packets that are sent and never received into. They go
    /// back to this pool only ([`PoolCache::free`] cannot tell whose they are).
    ///
    /// # Errors
    /// As for [`Pool::new`].
    pub fn send_only(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(memory, count, Access::Read)
    }

    fn with_access(memory: &Arc<DmaMemory>, count: u32, access: Access) -> Result<Arc<Self>> {
        if count > MAX_BUFFERS {
            let what = format!("cannot make a pool of {count} packet buffers");
            return Err(Error::new(ErrorKind::Usage, what, format!("there can be at most {MAX_BUFFERS}")));
        }
        let offset = memory.allocate_buffers(count as usize, BUFFER_SIZE, access)?;
        // A cache may give back a chunk that is not full, so there can be as many chunks as buffers.
        let free = ArrayQueue::new(count.max(1) as usize);
        let buffers: Vec<u32> = (0..count).map(|index| index * BUFFER_SIZE as u32).collect();
        for chunk in buffers.chunks(CHUNK) {
            let _ = free.push(chunk.iter().copied().collect());
        }
        let bases = bases(memory.translation(), offset, count);
        Ok(Arc::new(Self {
            memory: Arc::clone(memory),
            offset,
            count,
            bases,
            free,
            warn_from: AtomicU64::new(0),
        }))
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

    /// Whether it is to be said at `now`, in TSC ticks, that the pool is exhausted: once in a second.
    fn is_to_warn(&self, now: u64) -> bool {
        let from = self.warn_from.load(Ordering::Relaxed);
        let next = now + Tsc::hz();
        now >= from
            && self.warn_from.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// A cache for one lcore.
    pub fn cache(self: &Arc<Self>) -> PoolCache {
        let len = self.count as usize * BUFFER_SIZE;
        PoolCache {
            place: Place {
                base: self.memory.pointer(self.offset, len),
                bases: NonNull::from(&*self.bases).cast(),
                mask: self.bases.len() - 1,
                end: len as u32,
            },
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
    place: Place,
    stack: Box<[MaybeUninit<u32>; CACHE]>,
    /// The first `len` entries of `stack` are initialised.
    len: usize,
    pool: Arc<Pool>,
}

// SAFETY: `place` points to memory that `pool` keeps mapped and that no thread owns, and to what never changes.
unsafe impl Send for PoolCache {}

impl PoolCache {
    /// Takes up to `wanted` free buffers (at most [`MAX_BURST`]), fewer when the pool is exhausted.
    #[inline(always)]
    pub(super) fn take(&mut self, wanted: usize) -> Taking<'_> {
        debug_assert!(wanted <= MAX_BURST);
        let mut rest = wanted;
        if self.len < wanted {
            self.refill();
            rest = wanted.min(self.len);
        }
        Taking { left: self.len, rest, stack: &self.stack, len: &mut self.len, buffers: self.place.buffers() }
    }

    /// One free buffer, if the pool has one.
    #[inline(always)]
    pub fn allocate(&mut self) -> Option<Buffer> {
        self.take(1).next()
    }

    #[cold]
    #[inline(never)]
    fn refill(&mut self) {
        while self.len < MAX_BURST {
            let Some(chunk) = self.pool.free.pop() else {
                if self.len == 0 && self.pool.is_to_warn(Tsc::now()) {
                    tracing::warn!("no packet buffer is free: all {} are in use", self.pool.count);
                }
                return;
            };
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

    /// Takes back at most [`MAX_FREE`] indices at once.
    #[inline(always)]
    pub(super) fn free_all(&mut self, indices: &[u32]) {
        debug_assert!(indices.len() <= MAX_FREE);
        if indices.len() > CACHE - self.len {
            self.spill();
        }
        let to = &mut self.stack[self.len..self.len + indices.len()];
        for (to, index) in to.iter_mut().zip(indices) {
            *to = MaybeUninit::new(*index);
        }
        self.len += indices.len();
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

    /// Where the buffers are, for the length of a loop.
    #[inline(always)]
    pub(super) fn buffers(&self) -> Buffers<'_> {
        self.place.buffers()
    }

    /// Device address of the packet data in `buffer`; [`HEADROOM`] bytes in front of it belong to the buffer.
    /// For a buffer of another pool it is any address.
    #[inline(always)]
    pub fn iova(&self, buffer: &Buffer) -> u64 {
        self.buffers().iova(buffer)
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

    /// Copies `first` and then `second` to the front of each packet. They are values, so that they stay in
    /// registers where a slice would be read again for each packet.
    ///
    /// # Panics
    /// When a packet is of another pool.
    #[inline(always)]
    pub fn write_each<const N: usize, const M: usize>(
        &mut self,
        packets: &mut [Packet],
        first: [u8; N],
        second: [u8; M],
    ) {
        const { assert!(N + M <= DATA_ROOM) };
        let buffers = self.buffers();
        for packet in packets {
            let data = buffers.data(&packet.buffer).as_ptr();
            // SAFETY: as in `write`; arrays of bytes need no alignment.
            unsafe {
                data.cast::<[u8; N]>().write(first);
                data.add(N).cast::<[u8; M]>().write(second);
            }
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
    /// When the buffer is of another pool.
    #[inline(always)]
    pub fn write_header<const N: usize>(&mut self, buffer: &mut Buffer, bytes: &[u8; N]) {
        self.buffers().write_header(buffer, bytes);
    }

    /// Reads the `N` bytes directly in front of the packet data.
    ///
    /// # Panics
    /// When the buffer is of another pool.
    #[inline(always)]
    pub fn read_header<const N: usize>(&self, buffer: &Buffer) -> [u8; N] {
        self.buffers().read_header(buffer)
    }

    #[inline(always)]
    fn data(&self, buffer: &Buffer) -> NonNull<u8> {
        self.buffers().data(buffer)
    }
}

/// Where the buffers of a pool are, for the CPU and for the device.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// First byte of the first buffer.
    base: NonNull<u8>,
    bases: NonNull<u64>,
    /// Number of bases minus 1.
    mask: usize,
    /// Bytes of all buffers.
    end: u32,
}

impl Place {
    #[inline(always)]
    fn buffers<'a>(self) -> Buffers<'a> {
        Buffers { place: self, _pool: PhantomData }
    }
}

/// A local copy of where the buffers of a pool are: it stays in registers, where the compiler would have to read
/// a cache's fields again after each store to shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers<'a> {
    place: Place,
    _pool: PhantomData<&'a Pool>,
}

impl Buffers<'_> {
    #[inline(always)]
    pub(super) fn data(&self, buffer: &Buffer) -> NonNull<u8> {
        assert!(buffer.0 < self.place.end, "a buffer of another pool");
        // SAFETY: buffers begin at multiples of their size, and this one below the end, which is such a multiple
        // too; so it is inside the pool's range of the memory.
        unsafe { self.place.base.add(buffer.0 as usize + HEADROOM) }
    }

    #[inline(always)]
    pub(super) fn iova(&self, buffer: &Buffer) -> u64 {
        let index = (buffer.0 as usize / BUFFER_SIZE) & self.place.mask;
        // SAFETY: `mask` is the number of bases minus 1 and that number a power of two, so the masked index is
        // below it; the pool that is borrowed keeps them.
        let base = unsafe { self.place.bases.add(index).read() };
        base.wrapping_add(u64::from(buffer.0))
    }

    #[inline(always)]
    pub(super) fn write_header<const N: usize>(&self, buffer: &mut Buffer, bytes: &[u8; N]) {
        const { assert!(N <= HEADROOM) };
        // SAFETY: `data` is `HEADROOM` bytes into the buffer, so the header starts inside it; the buffer has
        // no other handle and this one is borrowed mutably.
        unsafe { self.data(buffer).as_ptr().sub(N).copy_from_nonoverlapping(bytes.as_ptr(), N) }
    }

    #[inline(always)]
    pub(super) fn read_header<const N: usize>(&self, buffer: &Buffer) -> [u8; N] {
        const { assert!(N <= HEADROOM) };
        let mut bytes = [0; N];
        // SAFETY: as in `write_header`, the other way.
        unsafe { self.data(buffer).as_ptr().sub(N).copy_to_nonoverlapping(bytes.as_mut_ptr(), N) };
        bytes
    }
}

impl Drop for PoolCache {
    fn drop(&mut self) {
        while self.len > 0 {
            self.give_back(CHUNK);
        }
    }
}

/// Free buffers that go from the top of a cache's stack, one by one. The stack has its new length when this is
/// dropped, by a panic too, so that no buffer gets two handles.
pub(super) struct Taking<'a> {
    stack: &'a [MaybeUninit<u32>; CACHE],
    len: &'a mut usize,
    /// Length of the stack now.
    left: usize,
    /// How many may still go; not more than there are.
    rest: usize,
    pub(super) buffers: Buffers<'a>,
}

impl Taking<'_> {
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.rest == 0
    }

    /// How many may still go.
    #[inline(always)]
    pub(super) fn remaining(&self) -> usize {
        self.rest
    }

    #[inline(always)]
    pub(super) fn next(&mut self) -> Option<Buffer> {
        if self.is_empty() {
            return None;
        }
        self.rest -= 1;
        self.left -= 1;
        // SAFETY: `left` was above 0 because `rest` was, and entries below the stack's length are initialised.
        Some(Buffer(unsafe { self.stack.get_unchecked(self.left).assume_init() }))
    }
}

impl Drop for Taking<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.len = self.left;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::mem::{Backing, Region};
    use proptest::prelude::*;

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
    fn device_addresses_follow_the_pages() {
        let pages: Vec<u64> = (0..9).map(|page| 0x10_0000 + (page * 7 % 9) * 0x3000).collect();
        let translation = Translation::paged(4096, &pages);
        for offset in [0, 2048, 4096, 3 * 2048] {
            let bases = bases(&translation, offset, 10);
            for index in 0..10_usize {
                let wanted = translation.iova(offset + index * BUFFER_SIZE + HEADROOM);
                assert_eq!(bases[index].wrapping_add((index * BUFFER_SIZE) as u64), wanted);
            }
        }
        let memory = DmaMemory::map(Region::new(1 << 20, Backing::SmallPages).unwrap(), &[]).unwrap();
        assert_eq!(Pool::new(&memory, 100).unwrap().bases.len(), 1);
    }

    #[test]
    fn an_exhausted_pool_is_told_once_a_second() {
        let (pool, second) = (pool(1), Tsc::hz());
        let told = [0, 1, second / 2, second, second + 1, 5 * second].map(|at| pool.is_to_warn(second + at));
        assert_eq!(told, [true, false, false, true, false, true]);
    }

    #[test]
    fn what_is_not_taken_stays() {
        let pool = pool(40);
        let mut cache = pool.cache();
        let mut taking = cache.take(3);
        let taken = [taking.next(), taking.next()];
        drop(taking);
        assert_eq!((taken[0] == taken[1], cache.len()), (false, 30));
        let mut taking = cache.take(32);
        assert_eq!(std::iter::from_fn(|| taking.next()).count(), 32);
        drop(taking);
        let mut taking = cache.take(32);
        assert_eq!(std::iter::from_fn(|| taking.next()).count(), 6);
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

    /// What an lcore does with its cache.
    #[derive(Clone, Debug)]
    enum Step {
        Allocate(usize),
        Free(usize),
        FreeAll(usize),
        /// The lcore ends, and another begins.
        Renew,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..600_usize).prop_map(Step::Allocate),
            (0..600_usize).prop_map(Step::Free),
            (0..=CACHE / 2).prop_map(Step::FreeAll),
            Just(Step::Renew),
        ]
    }

    proptest! {
        /// The model is the set of buffers that the lcores hold: the others are free, wherever they are.
        #[test]
        fn caches_agree_with_a_set_of_buffers(
            count in 0..1300_u32,
            steps in prop::collection::vec((0..3_usize, step()), 1..20),
        ) {
            let pool = pool(count);
            let mut caches = [pool.cache(), pool.cache(), pool.cache()];
            let mut held: HashSet<u32> = HashSet::new();
            for (lcore, step) in steps {
                let cache = &mut caches[lcore];
                let some = |held: &mut HashSet<u32>, most| {
                    let some: Vec<u32> = held.iter().copied().take(most).collect();
                    held.retain(|index| !some.contains(index));
                    some
                };
                match step {
                    Step::Allocate(wanted) => {
                        for _ in 0..wanted {
                            let Some(buffer) = cache.allocate() else {
                                prop_assert_eq!((cache.len(), pool.free()), (0, 0));
                                break;
                            };
                            prop_assert!(held.insert(buffer.0), "it is given out twice");
                        }
                    }
                    Step::Free(most) => {
                        some(&mut held, most).into_iter().for_each(|index| cache.free(Buffer(index)));
                    }
                    Step::FreeAll(most) => cache.free_all(&some(&mut held, most)),
                    Step::Renew => caches[lcore] = pool.cache(),
                }
                let cached: usize = caches.iter().map(PoolCache::len).sum();
                prop_assert_eq!(held.len() + cached + pool.free() as usize, count as usize);
            }
        }
    }
}
