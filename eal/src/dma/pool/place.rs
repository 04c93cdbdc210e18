//! From a buffer to its addresses.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{BUFFER_SIZE, Buffer, DATA_ROOM, HEADROOM, Pool};
use crate::dma::memory::Translation;

/// What is to be added to a buffer's distance from the first to give the device address of its data: one entry
/// when the buffers are contiguous for the device, else one for each, rounded up to a power of two.
pub(super) fn bases(translation: &Translation, offset: usize, count: u32) -> Box<[u64]> {
    let base = |index: usize| {
        let distance = index * BUFFER_SIZE;
        translation.iova(offset + distance).wrapping_sub(distance as u64).wrapping_add(HEADROOM as u64)
    };
    let entries = if translation.is_contiguous() { 1 } else { count.max(1) as usize };
    let mut bases: Vec<u64> = (0..entries).map(base).collect();
    bases.resize(entries.next_power_of_two(), 0);
    bases.into()
}

/// Where the buffers of a pool are, for the CPU and for the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// First byte of the first buffer.
    base: NonNull<u8>,
    bases: NonNull<u64>,
    /// Number of bases minus 1.
    mask: usize,
    /// Bytes of all buffers.
    end: u32,
}

impl Place {
    pub(super) fn of(pool: &Pool) -> Self {
        let len = pool.count as usize * BUFFER_SIZE;
        Self {
            base: pool.memory.pointer(pool.offset, len),
            bases: NonNull::from(&*pool.bases).cast(),
            mask: pool.bases.len() - 1,
            end: len as u32,
        }
    }

    #[inline(always)]
    pub(super) fn buffers<'a>(self) -> Buffers<'a> {
        Buffers { place: self, _pool: PhantomData }
    }
}

/// A local copy of where the buffers of a pool are: it stays in registers, where the compiler would have to read
/// a cache's fields again after each store to shared memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::dma) struct Buffers<'a> {
    place: Place,
    _pool: PhantomData<&'a Pool>,
}

/// Sets what is behind the first `from` of `len` bytes to zero, and gives `len`. Apart from the packet path, which few
/// packets leave for this.
///
/// # Safety
/// `data` is the start of `len` bytes that nothing else of this process reaches meanwhile.
#[cold]
#[inline(never)]
unsafe fn zero(data: NonNull<u8>, from: usize, len: usize) -> usize {
    let from = from.min(len);
    // SAFETY: these are the last of the bytes that the caller vouches for.
    unsafe { data.as_ptr().add(from).write_bytes(0, len - from) };
    len
}

impl Buffers<'_> {
    #[inline(always)]
    pub(in crate::dma) fn data(&self, buffer: &Buffer) -> NonNull<u8> {
        assert!(buffer.0 < self.place.end, "a buffer of another pool");
        // SAFETY: buffers begin at multiples of their size, and this one below the end, which is such a multiple
        // too; so it is inside the pool's range of the memory.
        unsafe { self.place.base.add(buffer.0 as usize + HEADROOM) }
    }

    #[inline(always)]
    pub(in crate::dma) fn iova(&self, buffer: &Buffer) -> u64 {
        let index = (buffer.0 as usize / BUFFER_SIZE) & self.place.mask;
        // SAFETY: `mask` is the number of bases minus 1 and that number a power of two, so the masked index is
        // below it; the pool that is borrowed keeps them.
        let base = unsafe { self.place.bases.add(index).read() };
        base.wrapping_add(u64::from(buffer.0))
    }

    #[inline(always)]
    pub(in crate::dma) fn write_header<const N: usize>(&self, buffer: &mut Buffer, bytes: &[u8; N]) {
        const { assert!(N <= HEADROOM) };
        // SAFETY: `data` is `HEADROOM` bytes into the buffer, so the header starts inside it; the buffer has no
        // other handle, as `PoolCache::free` asks for, and this one is borrowed mutably.
        unsafe { self.data(buffer).as_ptr().sub(N).copy_from_nonoverlapping(bytes.as_ptr(), N) }
    }

    #[inline(always)]
    pub(in crate::dma) fn pad<const LEN: usize>(&self, buffer: &mut Buffer, len: usize) -> usize {
        const { assert!(LEN <= DATA_ROOM) };
        // SAFETY: `data` gives the start of `DATA_ROOM` bytes; the buffer has no other handle, as `PoolCache::free` asks
        // for, and this one is borrowed mutably.
        unsafe { zero(self.data(buffer), len, LEN) }
    }

    #[inline(always)]
    pub(in crate::dma) fn read_header<const N: usize>(&self, buffer: &Buffer) -> [u8; N] {
        const { assert!(N <= HEADROOM) };
        let mut bytes = [0; N];
        // SAFETY: as in `write_header`, the other way.
        unsafe { self.data(buffer).as_ptr().sub(N).copy_to_nonoverlapping(bytes.as_mut_ptr(), N) };
        bytes
    }
}
