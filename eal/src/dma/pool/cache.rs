//! One lcore's cache of the pool, and access to packet data.

use std::mem::MaybeUninit;
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::addresses::{Buffers, PoolAddresses};
use super::tag::return_to_owner;
use super::{CHUNK, Pool};
use crate::clock::Tsc;
use crate::dma::metadata::PartialChecksum;
use crate::dma::packet::{MAX_BURST, Packet, SHORT};

/// Maximum number of buffers in a cache. Excess buffers return to the pool.
pub(super) const CACHE: usize = 512;

/// Maximum number of buffers that a cache takes back at once.
pub(in crate::dma) const MAX_FREE: usize = CACHE / 2;

/// One lcore's view of a [`Pool`]: a last-in, first-out cache of free buffers, and access to packet data.
///
/// Packet data is copied in and out, never borrowed, because a misbehaving device may still write a buffer
/// that it has returned.
#[derive(Debug)]
pub struct PoolCache {
    addresses: PoolAddresses,
    stack: Box<[MaybeUninit<u32>; CACHE]>,
    /// The first `len` entries of `stack` are initialized. Each is the pool offset of a buffer of this pool
    /// that has no handle.
    len: usize,
    /// Index of the node whose buffers the cache takes first.
    near: usize,
    pool: Arc<Pool>,
}

// SAFETY: `addresses` points to memory that `pool` keeps mapped and that no thread owns, and to the table of
// bases, which never changes.
unsafe impl Send for PoolCache {}

impl PoolCache {
    /// Maximum number of buffers in a cache.
    pub const CAPACITY: usize = CACHE;

    /// Creates a cache that takes buffers of the node at index `near` first.
    pub(super) fn new(pool: &Arc<Pool>, near: usize) -> Self {
        Self {
            addresses: PoolAddresses::of(pool),
            stack: Box::new([MaybeUninit::uninit(); CACHE]),
            len: 0,
            near,
            pool: Arc::clone(pool),
        }
    }

    /// Takes up to `wanted` free buffers (at most [`MAX_BURST`]), fewer if the pool is exhausted.
    #[inline(always)]
    pub(in crate::dma) fn take(&mut self, wanted: usize) -> Allocation<'_> {
        debug_assert!(wanted <= MAX_BURST);
        let mut rest = wanted;
        if self.len < wanted {
            self.refill();
            rest = wanted.min(self.len);
        }
        Allocation {
            left: self.len,
            rest,
            stack: &self.stack,
            len: &mut self.len,
            buffers: self.addresses.buffers(),
        }
    }

    /// Allocates a packet without data. Returns `None` if the pool is exhausted.
    #[inline(always)]
    pub fn allocate(&mut self) -> Option<Packet> {
        let fresh_bits = self.fresh_bits();
        self.take(1).next().map(|slot| Packet::in_slot(slot, 0, fresh_bits))
    }

    /// Tag of the pool.
    #[inline(always)]
    pub(in crate::dma) fn tag(&self) -> u8 {
        Packet::tag_in(self.fresh_bits())
    }

    /// Addresses of the pool's buffers, valid as long as the pool exists.
    pub(in crate::dma) fn addresses(&self) -> PoolAddresses {
        self.addresses
    }

    /// [`Packet::fresh_bits`] of the pool's tag.
    #[inline(always)]
    pub(in crate::dma) fn fresh_bits(&self) -> u64 {
        self.addresses.fresh_bits
    }

    #[cold]
    #[inline(never)]
    fn refill(&mut self) {
        while self.len < MAX_BURST {
            let Some(chunk) = self.pool.take_out(self.near) else {
                if self.len == 0 && self.pool.may_warn(Tsc::now()) {
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

    /// Frees a packet of this pool, whichever cache allocated it. A packet of another pool returns to the
    /// free buffers of its own pool, which takes a lock.
    #[inline(always)]
    pub fn free(&mut self, packet: Packet) {
        if packet.tag() != self.tag() {
            return return_to_owner(packet.tag(), &[packet.slot()]);
        }
        if self.len == CACHE {
            self.spill();
        }
        self.stack[self.len] = MaybeUninit::new(packet.slot());
        self.len += 1;
    }

    /// Frees at most [`MAX_FREE`] buffers at once, by their pool offsets.
    ///
    /// # Safety
    /// The buffers belong to this pool, and no handle of them exists.
    #[inline(always)]
    pub(in crate::dma) unsafe fn free_slots(&mut self, slots: &[u32]) {
        debug_assert!(slots.len() <= MAX_FREE);
        if slots.len() > CACHE - self.len {
            self.spill();
        }
        let to = &mut self.stack[self.len..self.len + slots.len()];
        for (to, slot) in to.iter_mut().zip(slots) {
            *to = MaybeUninit::new(*slot);
        }
        self.len += slots.len();
    }

    /// Returns chunks to the pool until half of the cache is empty.
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
            // SAFETY: entries below the old `len` are initialized.
            chunk.push(unsafe { self.stack[self.len].assume_init() });
        }
        if !chunk.is_empty() {
            self.pool.take_back(chunk);
        }
    }

    /// Number of buffers in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the cache holds no buffer. The pool may still have some.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pool of the cache.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Returns the addresses of the buffers, for use in a loop.
    #[inline(always)]
    pub(in crate::dma) fn buffers(&self) -> Buffers<'_> {
        self.addresses.buffers()
    }

    /// Device address of the packet's first byte.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    #[inline(always)]
    pub fn iova(&self, packet: &Packet) -> u64 {
        self.buffers().iova(packet)
    }

    /// Returns the address of the `len` bytes at `offset` of the packet's data.
    ///
    /// # Panics
    /// Panics if the bytes are not within the packet's buffer, or `packet` belongs to another pool.
    #[inline(always)]
    pub(in crate::dma) fn data(&self, packet: &Packet, offset: usize, len: usize) -> *mut u8 {
        let room = packet.len() + packet.tailroom();
        assert!(len <= room && offset <= room - len, "access beyond the packet's buffer");
        // SAFETY: the data and what follows it are `room` bytes of the buffer.
        unsafe { self.buffers().data(packet).as_ptr().add(offset) }
    }

    /// Copies `bytes` into the packet at `offset`. They may be after the packet's data, where
    /// [`Packet::append`] would put them.
    ///
    /// # Panics
    /// Panics if the bytes do not fit into the packet's buffer, or `packet` belongs to another pool.
    #[inline(always)]
    pub fn write(&mut self, packet: &mut Packet, offset: usize, bytes: &[u8]) {
        let to = self.data(packet, offset, bytes.len());
        // SAFETY: the copy ends within the buffer. The source is a slice of the caller and cannot overlap
        // memory that hands out no slices. The packet is the buffer's only handle and is borrowed mutably, so
        // no other thread of this process accesses the buffer.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Copies `first` and then `second`, together at most 64 bytes, to the front of each packet. Both are
    /// passed by value, so that they stay in registers. A slice would be read again for each packet.
    ///
    /// # Panics
    /// Panics if a packet belongs to another pool.
    #[inline(always)]
    pub fn write_each<const N: usize, const M: usize>(
        &mut self,
        packets: &mut [Packet],
        first: [u8; N],
        second: [u8; M],
    ) {
        const { assert!(N + M <= SHORT) };
        let buffers = self.buffers();
        let (fours, rest) = packets.as_chunks::<4>();
        let write = |packet: &Packet| {
            // SAFETY: as in `write`, because the tag was checked, and data starts at least `SHORT` bytes before
            // the end of its buffer. Byte arrays need no alignment.
            unsafe {
                let data = buffers.at(packet.at());
                data.cast::<[u8; N]>().write(first);
                data.add(N).cast::<[u8; M]>().write(second);
            }
        };
        for packets in fours {
            buffers.check(Packet::tags(packets));
            packets.iter().for_each(write);
        }
        for packet in rest {
            buffers.check(packet.tag());
            write(packet);
        }
    }

    /// Pads the packet with zeros to at least `LEN` bytes, which must not exceed 64. Used for a device that
    /// does not pad.
    ///
    /// # Panics
    /// Panics if the packet needs padding and belongs to another pool.
    #[inline(always)]
    pub fn pad<const LEN: usize>(&mut self, packet: &mut Packet) {
        const { assert!(LEN <= SHORT) };
        if packet.len() < LEN {
            self.pad_to(packet, LEN);
        }
    }

    #[cold]
    #[inline(never)]
    fn pad_to(&mut self, packet: &mut Packet, len: usize) {
        const ZEROS: [u8; SHORT] = [0; SHORT];
        let from = packet.len();
        self.write(packet, from, &ZEROS[..len - from]);
        // This cannot fail: the `SHORT` bytes from the start of the data are within the buffer.
        let _ = packet.append(len - from);
    }

    /// Copies bytes out of the packet, from `offset` on.
    ///
    /// # Panics
    /// Panics if the bytes are not within the packet's buffer, or `packet` belongs to another pool.
    #[inline(always)]
    pub fn read(&self, packet: &Packet, offset: usize, bytes: &mut [u8]) {
        let from = self.data(packet, offset, bytes.len());
        // SAFETY: as in `write`, in the other direction. Nothing in this process writes while the only handle
        // is borrowed.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Removes `count` bytes from the front of the packet's data. Returns `None`, and changes nothing, if
    /// there are fewer.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    #[must_use]
    pub fn adj(&mut self, packet: &mut Packet, count: usize) -> Option<()> {
        let rest = packet.len().checked_sub(count)?;
        if packet.advance(count).is_some() {
            return Some(());
        }
        let partial = self.partial_checksum(packet);
        let from = self.data(packet, count, rest);
        packet.rewind(rest);
        let to = self.data(packet, 0, rest);
        // SAFETY: both ranges are within the buffer, whose only handle is borrowed mutably. They may overlap.
        unsafe { to.copy_from(from, rest) };
        let moved = partial.and_then(|partial| {
            Some(PartialChecksum { start: partial.start.checked_sub(count as u16)?, ..partial })
        });
        self.set_partial_checksum(packet, moved)
    }

    /// Writes `bytes` directly before the packet's data.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    #[inline(always)]
    pub fn write_header<const N: usize>(&mut self, packet: &mut Packet, bytes: &[u8; N]) {
        self.buffers().write_header(packet, bytes);
    }

    /// Reads the `N` bytes directly before the packet's data.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    #[inline(always)]
    pub fn read_header<const N: usize>(&self, packet: &Packet) -> [u8; N] {
        self.buffers().read_header(packet)
    }
}

impl Drop for PoolCache {
    fn drop(&mut self) {
        while self.len > 0 {
            self.give_back(CHUNK);
        }
    }
}

/// Free buffers that are taken from the top of a cache's stack, one by one. Dropping this value, even in a
/// panic, sets the stack's new length, so that no buffer gets two handles.
pub(in crate::dma) struct Allocation<'a> {
    stack: &'a [MaybeUninit<u32>; CACHE],
    len: &'a mut usize,
    /// Current length of the stack.
    left: usize,
    /// Number of buffers that can still be taken, at most `left`.
    rest: usize,
    pub(in crate::dma) buffers: Buffers<'a>,
}

impl<'a> Allocation<'a> {
    #[inline(always)]
    pub(in crate::dma) fn is_empty(&self) -> bool {
        self.rest == 0
    }

    /// Number of buffers that can still be taken.
    #[inline(always)]
    pub(in crate::dma) fn remaining(&self) -> usize {
        self.rest
    }

    /// Takes all buffers that can still be taken. Returns their pool offsets. They have no handle.
    #[inline(always)]
    pub(in crate::dma) fn all(mut self) -> &'a [u32] {
        let top = self.left;
        self.left -= std::mem::take(&mut self.rest);
        // SAFETY: `rest` was not above `left`, the length of the stack, and entries below that are
        // initialized. They do not change, because the cache is borrowed as long as they are.
        unsafe { self.stack.get_unchecked(self.left..top).assume_init_ref() }
    }

    /// Takes one buffer. Returns its pool offset. It has no handle.
    #[inline(always)]
    pub(in crate::dma) fn next(&mut self) -> Option<u32> {
        if self.is_empty() {
            return None;
        }
        self.rest -= 1;
        self.left -= 1;
        // SAFETY: `left` was above 0, because `rest` was, and entries below the stack's length are
        // initialized.
        Some(unsafe { self.stack.get_unchecked(self.left).assume_init() })
    }
}

impl Drop for Allocation<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.len = self.left;
    }
}
