//! From a buffer to its addresses.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{BUFFER_SIZE, Buffer, DATA_ROOM, HEADROOM, Pool, tag};
use crate::dma::memory::Translation;

/// What is to be added to a buffer's handle to give the device address of its data: one entry when the buffers are
/// contiguous for the device, else one for each, rounded up to a power of two.
///
/// # Panics
/// When the pages of the device are not aligned to buffers, as all are.
pub(super) fn bases(translation: &Translation, offset: usize, count: u32, tag: u32) -> Box<[u64]> {
    let base = |index: usize| {
        let distance = index * BUFFER_SIZE;
        let start = translation.iova(offset + distance);
        assert!(start.is_multiple_of(BUFFER_SIZE as u64), "a page of the device that is not aligned");
        start.wrapping_sub(distance as u64 + u64::from(tag)).wrapping_add(HEADROOM as u64)
    };
    let entries = if translation.is_contiguous() { 1 } else { count.max(1) as usize };
    let mut bases: Vec<u64> = (0..entries).map(|index| if count == 0 { 0 } else { base(index) }).collect();
    bases.resize(entries.next_power_of_two(), 0);
    bases.into()
}

/// Where the buffers of a pool are, for the CPU and for the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// First byte of the first buffer, minus the pool's tag.
    base: *mut u8,
    bases: NonNull<u64>,
    /// Number of bases minus 1.
    mask: usize,
    tag: u32,
}

impl Place {
    pub(super) fn of(pool: &Pool) -> Self {
        let start = pool.memory.pointer(pool.offset, pool.count as usize * BUFFER_SIZE).as_ptr();
        assert!(
            start.addr().is_multiple_of(BUFFER_SIZE),
            "the region and the pool's offset in it are aligned"
        );
        let tag = pool.tag.get();
        Self {
            base: start.wrapping_sub(tag as usize),
            bases: NonNull::from(&*pool.bases).cast(),
            mask: pool.bases.len() - 1,
            tag,
        }
    }

    #[inline(always)]
    pub(super) fn buffers<'a>(self) -> Buffers<'a> {
        Buffers { place: self, _pool: PhantomData }
    }

    /// Whether all of `handles` are of the pool.
    #[inline(always)]
    pub(super) fn owns(&self, handles: &[u32]) -> bool {
        tag::are_of(handles, self.tag)
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
        assert!(tag::is_of(buffer.0, self.place.tag), "a buffer of another pool");
        // SAFETY: no other pool has this tag while handles with it exist, so the buffer is one of this pool's, which are
        // inside its range of the memory; the tag that `base` lacks is in the handle.
        unsafe { NonNull::new_unchecked(self.place.base.wrapping_add(buffer.0 as usize).add(HEADROOM)) }
    }

    /// Device address of the packet data in `buffer`, for which [`Buffers::is_foreign`] tells whether it is of the pool.
    #[inline(always)]
    pub(in crate::dma) fn iova_of_any(&self, buffer: &Buffer) -> u64 {
        let index = (buffer.0 as usize / BUFFER_SIZE) & self.place.mask;
        // SAFETY: `mask` is the number of bases minus 1 and that number a power of two, so the masked index is
        // below it; the pool that is borrowed keeps them.
        let base = unsafe { self.place.bases.add(index).read() };
        base.wrapping_add(u64::from(buffer.0))
    }

    /// Whether one of the addresses in `iovas`, each of [`Buffers::iova_of_any`] and all joined by OR, is that of a
    /// buffer of another pool. Packet data of this pool is [`HEADROOM`] behind a multiple of a buffer's size. Tags
    /// neither are 0 nor have the bit of `HEADROOM`, so that one other than the pool's shows in one of the other bits.
    #[inline(always)]
    pub(in crate::dma) fn is_foreign(iovas: u64) -> bool {
        iovas & (BUFFER_SIZE - 1 - HEADROOM) as u64 != 0
    }

    #[inline(always)]
    pub(in crate::dma) fn iova(&self, buffer: &Buffer) -> u64 {
        let iova = self.iova_of_any(buffer);
        assert!(!Self::is_foreign(iova), "a buffer of another pool");
        iova
    }

    #[inline(always)]
    pub(in crate::dma) fn write_header<const N: usize>(&self, buffer: &mut Buffer, bytes: &[u8; N]) {
        const { assert!(N <= HEADROOM) };
        // SAFETY: `data` is `HEADROOM` bytes into the buffer, so the header starts inside it; the buffer has no
        // other handle, and this one is borrowed mutably.
        unsafe { self.data(buffer).as_ptr().sub(N).copy_from_nonoverlapping(bytes.as_ptr(), N) }
    }

    #[inline(always)]
    pub(in crate::dma) fn pad<const LEN: usize>(&self, buffer: &mut Buffer, len: usize) -> usize {
        const { assert!(LEN <= DATA_ROOM) };
        // SAFETY: `data` gives the start of `DATA_ROOM` bytes; the buffer has no other handle, and this
        // one is borrowed mutably.
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
