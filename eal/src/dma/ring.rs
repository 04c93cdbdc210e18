//! Rings of words that both the CPU and the device read and write.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::DmaMemory;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
use crate::prefetch;

mod sealed {
    /// Access to a word of shared memory.
    pub trait Shared: crate::opaque::Whole {
        /// # Safety
        /// `at` is aligned and valid for the duration of the call. All accesses to it by this process are
        /// atomics of this size or [opaque](crate::opaque).
        unsafe fn load(at: *const Self) -> Self;
        /// # Safety
        /// Same as `load`.
        unsafe fn store(at: *const Self, value: Self);
    }
}

/// A word that a device and the CPU read and write as a whole. It is little-endian both for the device and in
/// the host.
pub trait Word: sealed::Shared + Copy + Default + Send + Sync + 'static {}

macro_rules! word {
    ($($plain:ty => $atomic:ty),*) => {$(
        impl sealed::Shared for $plain {
            #[inline(always)]
            unsafe fn load(at: *const Self) -> Self {
                // SAFETY: aligned and valid by the caller's contract. The atomic has the plain type's layout.
                Self::from_le(unsafe { &*at.cast::<$atomic>() }.load(Relaxed))
            }
            #[inline(always)]
            unsafe fn store(at: *const Self, value: Self) {
                // SAFETY: as in `load`.
                unsafe { &*at.cast::<$atomic>() }.store(value.to_le(), Relaxed);
            }
        }
        impl Word for $plain {}
    )*};
}
word!(u16 => AtomicU16, u32 => AtomicU32, u64 => AtomicU64);

/// A ring of entries of `N` words each, shared with a device. The number of entries is a power of two and
/// every index wraps, so no index is out of bounds and none is checked.
///
/// Each word is read and written atomically, but without ordering. [`dma_rmb`](super::dma_rmb) and its
/// siblings provide the order. A clone is the same ring.
#[derive(Clone, Debug)]
pub struct DmaRing<W: Word, const N: usize = 1> {
    words: NonNull<W>,
    mask: usize,
    iova: u64,
    _memory: Arc<DmaMemory>,
    _word: PhantomData<W>,
}

// SAFETY: this process accesses the words only by atomic operations, and `_memory` keeps them mapped.
unsafe impl<W: Word, const N: usize> Send for DmaRing<W, N> {}
// SAFETY: as above.
unsafe impl<W: Word, const N: usize> Sync for DmaRing<W, N> {}

impl<W: Word, const N: usize> DmaRing<W, N> {
    /// Allocates a zeroed ring of `entries` entries. Its device address is a multiple of `align` bytes.
    ///
    /// # Errors
    /// `Usage` if `entries` is not a power of two, `Os` if the memory is used up.
    pub fn new(memory: &Arc<DmaMemory>, entries: usize, align: usize) -> Result<Self> {
        let len = Self::bytes(entries)?;
        DmaBlock::new(memory, len, align.max(align_of::<W>()))?.carve(entries)
    }

    fn bytes(entries: usize) -> Result<usize> {
        let refused = |why: &str| {
            Error::new(ErrorKind::Usage, format!("cannot create a ring of {entries} entries"), why)
        };
        if !entries.is_power_of_two() {
            return Err(refused("the number is not a power of two"));
        }
        N.checked_mul(size_of::<W>())
            .and_then(|len| entries.checked_mul(len))
            .ok_or_else(|| refused("there are too many"))
    }

    /// First word.
    pub(super) fn start(&self) -> NonNull<W> {
        self.words
    }

    /// Device address of entry 0.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Number of entries.
    #[inline(always)]
    pub fn entries(&self) -> usize {
        self.mask + 1
    }

    /// Returns the ring's address and size by value. A loop over a view keeps them in registers. A loop over
    /// the ring reads them again after each atomic access.
    #[inline(always)]
    pub fn view(&self) -> RingView<'_, W, N> {
        RingView { words: self.words, mask: self.mask, _ring: PhantomData }
    }

    /// Reads word `WORD` of the entry at `index`, which wraps.
    #[inline(always)]
    pub fn load<const WORD: usize>(&self, index: usize) -> W {
        self.view().load::<WORD>(index)
    }

    /// Writes word `WORD` of the entry at `index`, which wraps.
    #[inline(always)]
    pub fn store<const WORD: usize>(&self, index: usize, value: W) {
        self.view().store::<WORD>(index, value);
    }

    /// Sets every word of every entry to `value`.
    pub fn fill(&self, value: W) {
        for word in 0..(self.mask + 1) * N {
            // SAFETY: `word` is below the number of words of the allocation.
            unsafe { W::store(self.words.as_ptr().add(word), value) }
        }
    }
}

/// A [`DmaRing`] in registers. In a loop, the compiler has to read a ring's fields again after each store to
/// shared memory, but not those of a local copy.
#[derive(Clone, Copy, Debug)]
pub struct RingView<'a, W: Word, const N: usize = 1> {
    words: NonNull<W>,
    mask: usize,
    _ring: PhantomData<&'a DmaRing<W, N>>,
}

impl<'a, W: Word, const N: usize> RingView<'a, W, N> {
    /// Creates a view of the ring of `mask + 1` entries at `words`.
    ///
    /// # Safety
    /// The number of entries is a power of two, and `words` is aligned and valid for all of their words
    /// during `'a`. This process accesses them only by atomic operations of this size, except that a peer may
    /// make Vireo copy packets over the peer's own ring, [opaquely](crate::opaque). Each word that is loaded
    /// from a peer is checked as input, so a word that is torn by such a copy has no more effect than a wrong
    /// word from a misbehaving peer.
    #[inline(always)]
    pub(super) unsafe fn over(words: NonNull<W>, mask: usize) -> Self {
        Self { words, mask, _ring: PhantomData }
    }

    /// The entry at `index`, which wraps.
    #[inline(always)]
    pub fn entry(self, index: usize) -> RingEntry<'a, W, N> {
        // SAFETY: the masked index is below the number of entries.
        RingEntry { words: unsafe { self.words.add((index & self.mask) * N) }, _ring: PhantomData }
    }

    /// Number of entries minus 1.
    #[inline(always)]
    pub(super) fn mask(self) -> usize {
        self.mask
    }

    /// Reads word `WORD` of the entry at `index`, which wraps.
    #[inline(always)]
    pub fn load<const WORD: usize>(self, index: usize) -> W {
        self.entry(index).load::<WORD>()
    }

    /// Writes word `WORD` of the entry at `index`, which wraps.
    #[inline(always)]
    pub fn store<const WORD: usize>(self, index: usize, value: W) {
        self.entry(index).store::<WORD>(value);
    }
}

/// Position of an entry relative to another one, in bytes of an array of `u32`. Loops count in it, because the
/// scales of x86-64's addresses (1, 2, 4 and 8) make one register enough for arrays of entries of 4 to 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place(isize);

impl Place {
    /// Place of the entry itself.
    pub(super) const HERE: Self = Self(0);

    const UNIT: usize = size_of::<u32>();

    /// Distance from the entry, in bytes of the array of `u32`.
    #[inline(always)]
    pub(super) fn number(self) -> isize {
        self.0
    }

    /// `count` entries further.
    #[inline(always)]
    pub(super) fn ahead(self, count: usize) -> Self {
        Self(self.0 + (count * Self::UNIT) as isize)
    }

    /// `count` entries back.
    #[inline(always)]
    pub(super) fn back(self, count: usize) -> Self {
        Self(self.0 - (count * Self::UNIT) as isize)
    }

    /// Number of entries since `before`, which is not ahead.
    #[inline(always)]
    pub(super) fn since(self, before: Self) -> usize {
        (self.0 - before.0) as usize / Self::UNIT
    }

    /// Index of the entry, if that of the entry from which places are counted is `index`.
    #[inline(always)]
    pub(super) fn index(self, index: usize) -> usize {
        index.wrapping_add_signed(self.0 >> Self::UNIT.trailing_zeros())
    }

    /// Whether `end` is at least `count` entries ahead.
    #[inline(always)]
    pub(super) fn is_before(self, end: Self, count: usize) -> bool {
        self.0 <= end.0 - (count * Self::UNIT) as isize
    }

    /// The entry at this place, counted from `start`. The size of an entry is a multiple of 4 bytes.
    ///
    /// # Safety
    /// That entry is within the array of `start`, or at its end.
    #[inline(always)]
    pub(super) unsafe fn of<T>(self, start: NonNull<T>) -> NonNull<T> {
        // SAFETY: by the caller's contract.
        unsafe { start.byte_offset(self.0 * (size_of::<T>() / Self::UNIT) as isize) }
    }
}

/// One entry of a [`DmaRing`].
#[derive(Clone, Copy, Debug)]
pub struct RingEntry<'a, W: Word, const N: usize> {
    words: NonNull<W>,
    _ring: PhantomData<&'a DmaRing<W, N>>,
}

impl<W: Word, const N: usize> RingEntry<'_, W, N> {
    /// Address of the entry's first word.
    #[inline(always)]
    pub(super) fn start(self) -> NonNull<W> {
        self.words
    }

    /// The entry at `place`, counted from this one.
    ///
    /// # Safety
    /// That entry is within the ring.
    #[inline(always)]
    pub(super) unsafe fn at(self, place: Place) -> Self {
        // SAFETY: within the ring by the caller's contract.
        Self { words: unsafe { place.of(self.words.cast::<[W; N]>()) }.cast(), ..self }
    }

    /// Prefetches the entry's first cache line for reading.
    #[inline(always)]
    pub fn prefetch(self) {
        // SAFETY: the entry is within the ring.
        unsafe { prefetch::to_read(self.words.as_ptr().cast()) }
    }

    /// Reads word `WORD`.
    #[inline(always)]
    pub fn load<const WORD: usize>(self) -> W {
        const { assert!(WORD < N) };
        // SAFETY: the entry has `N` words inside the allocation, which the borrowed ring keeps mapped. They
        // are aligned because the allocation is.
        unsafe { W::load(self.words.as_ptr().add(WORD)) }
    }

    /// Writes word `WORD`.
    #[inline(always)]
    pub fn store<const WORD: usize>(self, value: W) {
        const { assert!(WORD < N) };
        // SAFETY: as in `load`.
        unsafe { W::store(self.words.as_ptr().add(WORD), value) }
    }
}

/// Zeroed memory shared with a device, for structures in which rings and single words follow each other.
#[derive(Debug)]
pub struct DmaBlock {
    offset: usize,
    len: usize,
    /// Number of bytes that [`DmaBlock::carve`] has allocated. No byte is allocated twice.
    carved: usize,
    memory: Arc<DmaMemory>,
}

impl DmaBlock {
    /// Allocates `len` bytes whose device address is a multiple of `align` bytes.
    ///
    /// # Errors
    /// `Os` if the memory is used up.
    pub fn new(memory: &Arc<DmaMemory>, len: usize, align: usize) -> Result<Self> {
        Self::with_access(memory, len, align, Access::ReadWrite)
    }

    /// Allocates a block that the device only reads. See [`DmaBlock::new`].
    ///
    /// # Errors
    /// Same as [`DmaBlock::new`].
    pub fn read_only(memory: &Arc<DmaMemory>, len: usize, align: usize) -> Result<Self> {
        Self::with_access(memory, len, align, Access::Read)
    }

    fn with_access(memory: &Arc<DmaMemory>, len: usize, align: usize, access: Access) -> Result<Self> {
        let offset = memory.allocate(len, align, access)?;
        Ok(Self { offset, len, carved: 0, memory: Arc::clone(memory) })
    }

    /// Device address of the first byte.
    pub fn iova(&self) -> u64 {
        self.memory.iova(self.offset)
    }

    /// Makes a ring of the bytes directly after those that were carved before.
    ///
    /// # Errors
    /// `Usage` if `entries` is not a power of two, the ring does not fit, or its words would not be aligned.
    pub fn carve<W: Word, const N: usize>(&mut self, entries: usize) -> Result<DmaRing<W, N>> {
        let len = DmaRing::<W, N>::bytes(entries)?;
        let offset = self.offset + self.carved;
        if len > self.len - self.carved || !offset.is_multiple_of(align_of::<W>()) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot create a ring of {entries} entries"),
                "it does not fit into the rest of the block",
            ));
        }
        self.carved += len;
        Ok(DmaRing {
            words: self.memory.pointer(offset, len).cast(),
            mask: entries - 1,
            iova: self.memory.iova(offset),
            _memory: Arc::clone(&self.memory),
            _word: PhantomData,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{Backing, Region};

    #[test]
    fn indices_wrap_and_words_keep_apart() {
        let memory = DmaMemory::map(Region::new(1 << 16, Backing::SmallPages).unwrap(), &[]).unwrap();
        let ring: DmaRing<u64, 2> = DmaRing::new(&memory, 4, 128).unwrap();
        assert_eq!(ring.iova() % 128, 0);
        ring.store::<0>(5, 11);
        ring.store::<1>(5, 12);
        assert_eq!((ring.load::<0>(1), ring.load::<1>(1)), (11, 12));
        assert_eq!(memory.device_view().unwrap().load::<u64>(ring.iova() + 24).unwrap(), 12);
        assert!(DmaRing::<u16>::new(&memory, 3, 2).is_err());
        assert!(DmaRing::<u64, { 1 << 61 }>::new(&memory, 1, 8).is_err());
        assert!(DmaRing::<u16>::new(&memory, 1 << 20, 2).unwrap_err().to_string().contains("-m"));
    }

    #[test]
    fn a_block_is_carved_without_gap_or_overlap() {
        let memory = DmaMemory::map(Region::new(1 << 16, Backing::SmallPages).unwrap(), &[]).unwrap();
        let mut block = DmaBlock::new(&memory, 14, 2).unwrap();
        let head: DmaRing<u16> = block.carve(2).unwrap();
        let tail: DmaRing<u32, 2> = block.carve(1).unwrap();
        assert_eq!((head.iova(), tail.iova()), (block.iova(), block.iova() + 4));
        assert!(block.carve::<u16, 1>(2).is_err());
        block.carve::<u16, 1>(1).unwrap();
        let mut odd = DmaBlock::new(&memory, 8, 4).unwrap();
        odd.carve::<u16, 1>(1).unwrap();
        assert!(odd.carve::<u32, 1>(1).is_err());
    }
}
