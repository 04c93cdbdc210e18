//! Rings in a peer's memory, which share no byte.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::PeerMemory;
use super::mapping::PeerMapping;
use crate::dma::ring::{RingView, Word};
use crate::error::{Error, ErrorKind, Result};

impl PeerMemory {
    /// Returns the ring of `entries` entries at `user`, an address of the peer's own address space.
    ///
    /// # Errors
    /// `Usage` if `entries` is not a power of two. `Protocol` if the ring is not aligned to its words, is not
    /// within one region, or overlaps another ring that still exists.
    pub fn ring<W: Word, const N: usize>(&self, user: u64, entries: usize) -> Result<PeerRing<W, N>> {
        let refused = |kind, why: &str| {
            Error::new(kind, format!("cannot use a frontend's ring of {entries} entries at {user:#x}"), why)
        };
        if !entries.is_power_of_two() {
            return Err(refused(ErrorKind::Usage, "the number is not a power of two"));
        }
        let len = N.saturating_mul(size_of::<W>()).saturating_mul(entries);
        let at = self.all().find_map(|area| {
            let offset = user.wrapping_sub(area.user);
            let fits = offset <= area.len && len as u64 <= area.len - offset;
            // SAFETY: the offset is not beyond the area, as just checked.
            fits.then(|| (unsafe { area.base.add(offset as usize) }, &area.mapping))
        });
        let (at, mapping) =
            at.ok_or_else(|| refused(ErrorKind::Protocol, "it is not within one memory region"))?;
        let words = at.cast::<W>();
        if !words.is_aligned() {
            return Err(refused(ErrorKind::Protocol, "its address is not aligned"));
        }
        if !mapping.take(bytes_of(words, entries * N)) {
            return Err(refused(ErrorKind::Protocol, "it overlaps another ring"));
        }
        Ok(PeerRing { words, mask: entries - 1, mapping: Arc::clone(mapping) })
    }
}

/// Addresses of the bytes of `number` mapped words.
fn bytes_of<W>(words: NonNull<W>, number: usize) -> Range<usize> {
    let start = words.addr().get();
    start..start + number * size_of::<W>()
}

/// A ring of entries of `N` words each in a peer's memory, like [`DmaRing`](crate::dma::DmaRing). It keeps
/// that memory mapped.
#[derive(Debug)]
pub struct PeerRing<W: Word, const N: usize = 1> {
    words: NonNull<W>,
    mask: usize,
    mapping: Arc<PeerMapping>,
}

// SAFETY: `mapping` keeps the words mapped and gives them to no other ring. All accesses by this process are
// therefore atomics of the words' size, or opaque copies. Each word is checked as input after it was loaded.
unsafe impl<W: Word, const N: usize> Send for PeerRing<W, N> {}
// SAFETY: as above.
unsafe impl<W: Word, const N: usize> Sync for PeerRing<W, N> {}

impl<W: Word, const N: usize> Drop for PeerRing<W, N> {
    fn drop(&mut self) {
        self.mapping.release(&bytes_of(self.words, self.entries() * N));
    }
}

impl<W: Word, const N: usize> PeerRing<W, N> {
    /// Number of entries.
    #[inline(always)]
    pub fn entries(&self) -> usize {
        self.mask + 1
    }

    /// The ring's address and size by value, for use in a loop.
    #[inline(always)]
    pub fn view(&self) -> RingView<'_, W, N> {
        // SAFETY: the words of all entries were checked to be mapped and aligned. The borrow keeps them
        // mapped, and keeps other rings away from them.
        unsafe { RingView::over(self.words, self.mask) }
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
}
