//! Bytes of a peer's memory by guest address, for copies.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{Area, PeerMemory};
use crate::{opaque, prefetch};

impl PeerMemory {
    /// Returns the regions by guest address, for use in a loop.
    #[inline(always)]
    pub fn view(&self) -> PeerView<'_> {
        match self.areas.first() {
            Some(area) => PeerView::of(self, area),
            None => PeerView::of(self, &self.leaving[0]),
        }
    }
}

/// A [`PeerMemory`] in registers: the region that was used last, and a reference to all regions.
#[derive(Clone, Copy, Debug)]
pub struct PeerView<'a> {
    guest: u64,
    len: u64,
    base: NonNull<u8>,
    memory: &'a PeerMemory,
}

impl<'a> PeerView<'a> {
    #[inline(always)]
    fn of(memory: &'a PeerMemory, area: &Area) -> Self {
        Self { guest: area.guest, len: area.len, base: area.base, memory }
    }

    /// Returns the `len` bytes at the guest address `guest`, or `None` if they are not within one region.
    #[inline(always)]
    pub fn at(&mut self, guest: u64, len: usize) -> Option<PeerSlice<'a>> {
        let covers = |view: &Self| {
            let offset = guest.wrapping_sub(view.guest);
            (offset <= view.len && len as u64 <= view.len - offset).then_some(offset as usize)
        };
        let offset = match covers(self) {
            Some(offset) => offset,
            None => {
                self.turn_to(guest);
                covers(self)?
            }
        };
        // SAFETY: the offset is not beyond the region, which `memory` keeps mapped.
        Some(PeerSlice { at: unsafe { self.base.add(offset) }, len, _memory: PhantomData })
    }

    /// Calls `each` for the `len` bytes at the guest address `guest`, once per region that has some of them:
    /// a buffer may cross from one region into the next. Returns `None` at the first byte that is in no
    /// region, or when `each` returns `None`.
    pub fn parts(
        &mut self,
        guest: u64,
        len: usize,
        mut each: impl FnMut(PeerSlice<'a>) -> Option<()>,
    ) -> Option<()> {
        if len == 0 {
            return each(self.at(guest, len)?);
        }
        let (mut guest, mut len) = (guest, len);
        while len > 0 {
            self.turn_to(guest);
            let rest = self.len.checked_sub(guest.wrapping_sub(self.guest)).filter(|rest| *rest > 0)?;
            let part = len.min(usize::try_from(rest).unwrap_or(usize::MAX));
            each(self.at(guest, part)?)?;
            // The sum does not overflow, because no region extends beyond the last address.
            guest += part as u64;
            len -= part;
        }
        Some(())
    }

    /// Switches to the region that has the byte at `guest`, if there is one.
    #[cold]
    #[inline(never)]
    fn turn_to(&mut self, guest: u64) {
        if let Some(area) = self.memory.find(guest) {
            *self = Self::of(self.memory, area);
        }
    }
}

/// Bytes of a peer's memory. They are copied and never borrowed, because the peer may write them at any time.
#[derive(Clone, Copy, Debug)]
pub struct PeerSlice<'a> {
    /// Valid for `len` bytes.
    pub(in crate::dma) at: NonNull<u8>,
    pub(in crate::dma) len: usize,
    _memory: PhantomData<&'a PeerMemory>,
}

impl PeerSlice<'_> {
    /// Length in bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the length is 0.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits the bytes at `middle`, or at the end if `middle` is beyond it.
    #[inline(always)]
    pub fn split_at(self, middle: usize) -> (Self, Self) {
        let middle = middle.min(self.len);
        // SAFETY: `middle` is not beyond the end.
        let at = unsafe { self.at.add(middle) };
        (Self { len: middle, ..self }, Self { at, len: self.len - middle, ..self })
    }

    /// Copies `bytes` to the front, as many as fit.
    pub fn write(self, bytes: &[u8]) {
        let len = bytes.len().min(self.len);
        // SAFETY: both have `len` bytes. They do not overlap, because nothing hands out slices of the peer's
        // mapping. The mapping is only accessed by opaque copies and atomics.
        unsafe { opaque::write(bytes.as_ptr(), self.at.as_ptr(), len) }
    }

    /// Prefetches the first cache line, to write it.
    #[inline(always)]
    pub(in crate::dma) fn prefetch_to_write(self) {
        if !prefetch::ACCESSES || !self.is_empty() {
            // SAFETY: the first byte is mapped if it is accessed, by one thread.
            unsafe { prefetch::to_write(self.at.as_ptr()) }
        }
    }

    /// Prefetches the first cache line, to read it.
    #[inline(always)]
    pub(in crate::dma) fn prefetch_to_read(self) {
        if !prefetch::ACCESSES || !self.is_empty() {
            // SAFETY: the first byte is mapped if it is accessed.
            unsafe { prefetch::to_read(self.at.as_ptr()) }
        }
    }
}
