//! Bytes of a peer's memory by guest address, to be copied.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{Area, PeerMemory};
use crate::dma::ring::prefetch;
use crate::opaque;

impl PeerMemory {
    /// The regions by guest address, for the length of a loop.
    #[inline(always)]
    pub fn view(&self) -> PeerView<'_> {
        match self.areas.first() {
            Some(area) => PeerView::of(self, area),
            None => PeerView::of(self, &self.leaving[0]),
        }
    }
}

/// [`PeerMemory`] in registers: the region that was last used, and all of them behind it.
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

    /// The `len` bytes at the guest address `guest`; none when they are not within one region.
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

    /// Calls `each` for the `len` bytes at the guest address `guest`, once for each region that has some of them: a buffer
    /// may cross from one region into the next. Ends with none at the first byte that is in no region, or when `each`
    /// gives none.
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
            // No region reaches beyond the last address.
            guest += part as u64;
            len -= part;
        }
        Some(())
    }

    /// Makes the region of `guest` the one that is looked at, if there is one.
    #[cold]
    #[inline(never)]
    fn turn_to(&mut self, guest: u64) {
        if let Some(area) = self.memory.find(guest) {
            *self = Self::of(self.memory, area);
        }
    }
}

/// Bytes of a peer's memory. They are copied and never borrowed: the peer may write at any time.
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

    /// Whether there is no byte.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes up to `middle` and those from it on; a `middle` beyond the end becomes it.
    #[inline(always)]
    pub fn split_at(self, middle: usize) -> (Self, Self) {
        let middle = middle.min(self.len);
        // SAFETY: `middle` is not beyond the end.
        let at = unsafe { self.at.add(middle) };
        (Self { len: middle, ..self }, Self { at, len: self.len - middle, ..self })
    }

    /// Copies `bytes` to the front, as far as there is room.
    pub fn write(self, bytes: &[u8]) {
        let len = bytes.len().min(self.len);
        // SAFETY: both have `len` bytes, and a slice of ours does not overlap a mapping that hands out none. The mapping is
        // copied or atomic wherever it is accessed.
        unsafe { opaque::write(bytes.as_ptr(), self.at.as_ptr(), len) }
    }

    /// Asks for the first cache line, to be written.
    #[inline(always)]
    pub(in crate::dma) fn prefetch_write(self) {
        // The compiler's hint becomes a prefetch to read where PREFETCHW is no part of the target, as in x86-64.
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: a prefetch reads nothing and faults nowhere; a processor that does not have this one takes it
        // for a NOP (AMD64 manual, volume 3, and Intel SDM, volume 2: PREFETCHW).
        unsafe {
            std::arch::asm!("prefetchw [{}]", in(reg) self.at.as_ptr(), options(readonly, nostack, preserves_flags));
        }
    }

    /// Asks for the first cache line, to be read.
    #[inline(always)]
    pub(in crate::dma) fn prefetch(self) {
        prefetch(self.at);
    }
}
