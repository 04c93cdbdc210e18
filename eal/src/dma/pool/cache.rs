//! One lcore's cache of the pool, and its access to packet data.

use std::mem::MaybeUninit;
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::place::{Buffers, Place};
use super::{Buffer, CHUNK, DATA_ROOM, MAX_BURST, Packet, Pool};
use crate::clock::Tsc;

/// Buffers that a cache keeps; what is above goes back to the pool.
pub(super) const CACHE: usize = 512;

/// Buffers that a cache takes back at once, at most.
pub(in crate::dma) const MAX_FREE: usize = CACHE / 2;

/// One lcore's view of a [`Pool`]: a last-in first-out cache of free buffers, and access to packet data.
///
/// Packet data is copied in and out, never borrowed: a device that breaks its rules may still write a buffer
/// that it has given back.
#[derive(Debug)]
pub struct PoolCache {
    place: Place,
    stack: Box<[MaybeUninit<u32>; CACHE]>,
    /// The first `len` entries of `stack` are initialised, each by a handle of this pool that is nowhere else.
    len: usize,
    /// Which of the pool's lists it takes from.
    near: usize,
    pool: Arc<Pool>,
}

// SAFETY: `place` points to memory that `pool` keeps mapped and that no thread owns, and to what never changes.
unsafe impl Send for PoolCache {}

impl PoolCache {
    /// A cache that takes buffers from the list `near` first.
    pub(super) fn new(pool: &Arc<Pool>, near: usize) -> Self {
        Self {
            place: Place::of(pool),
            stack: Box::new([MaybeUninit::uninit(); CACHE]),
            len: 0,
            near,
            pool: Arc::clone(pool),
        }
    }

    /// Takes up to `wanted` free buffers (at most [`MAX_BURST`]), fewer when the pool is exhausted.
    #[inline(always)]
    pub(in crate::dma) fn take(&mut self, wanted: usize) -> Taking<'_> {
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
            let Some(chunk) = self.pool.take_out(self.near) else {
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

    /// Takes a buffer back that came from this pool, by whichever cache. One of another pool is refused: it is lost to
    /// its own, and an error says so, at most once in a second.
    #[inline(always)]
    pub fn free(&mut self, buffer: Buffer) {
        if !self.place.owns(&[buffer.0]) {
            return self.pool.refuse(buffer);
        }
        if self.len == CACHE {
            self.spill();
        }
        self.stack[self.len] = MaybeUninit::new(buffer.0);
        self.len += 1;
    }

    /// Takes back at most [`MAX_FREE`] handles at once; false, and none, when not all are of this pool.
    #[inline(always)]
    #[must_use]
    pub(in crate::dma) fn free_all(&mut self, handles: &[u32]) -> bool {
        debug_assert!(handles.len() <= MAX_FREE);
        if !self.place.owns(handles) {
            return false;
        }
        if handles.len() > CACHE - self.len {
            self.spill();
        }
        let to = &mut self.stack[self.len..self.len + handles.len()];
        for (to, handle) in to.iter_mut().zip(handles) {
            *to = MaybeUninit::new(*handle);
        }
        self.len += handles.len();
        true
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
            self.pool.take_back(chunk);
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
    pub(in crate::dma) fn buffers(&self) -> Buffers<'_> {
        self.place.buffers()
    }

    /// Device address of the packet data in `buffer`; [`HEADROOM`](super::HEADROOM) bytes in front of it belong to the buffer.
    ///
    /// # Panics
    /// When the buffer is of another pool.
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
        assert!(bytes.len() <= DATA_ROOM && offset <= DATA_ROOM - bytes.len());
        // SAFETY: `data` gives the start of `DATA_ROOM` bytes and the copy ends within them; the source is a
        // slice of the caller's and cannot overlap memory that hands out no slices. The packet's handle is the
        // buffer's only one and borrowed mutably, so no other thread of ours touches the buffer.
        unsafe {
            self.buffers()
                .data(&packet.buffer)
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
        assert!(bytes.len() <= DATA_ROOM && offset <= DATA_ROOM - bytes.len());
        // SAFETY: as in `write`, the other way; nobody of ours writes while the only handle is borrowed.
        unsafe {
            self.buffers()
                .data(&packet.buffer)
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
pub(in crate::dma) struct Taking<'a> {
    stack: &'a [MaybeUninit<u32>; CACHE],
    len: &'a mut usize,
    /// Length of the stack now.
    left: usize,
    /// How many may still go; not more than there are.
    rest: usize,
    pub(in crate::dma) buffers: Buffers<'a>,
}

impl Taking<'_> {
    #[inline(always)]
    pub(in crate::dma) fn is_empty(&self) -> bool {
        self.rest == 0
    }

    /// How many may still go.
    #[inline(always)]
    pub(in crate::dma) fn remaining(&self) -> usize {
        self.rest
    }

    #[inline(always)]
    pub(in crate::dma) fn next(&mut self) -> Option<Buffer> {
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
