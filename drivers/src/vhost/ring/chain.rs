//! Descriptor chains, which are input from the frontend: their checks, and the limit on how many a burst
//! reads.

use vireo_eal::dma::{PeerSlice, PeerView, RingView};

/// Frontend behavior that breaks the rules of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vhost) enum Violation {
    /// `avail.idx` counts more chains than there are descriptors.
    AvailIndex,
    /// A descriptor's index is beyond the table.
    Index,
    /// A descriptor has the wrong direction, or is indirect, which was not offered.
    Flags,
    /// A descriptor's memory is not within a memory region.
    Address,
    /// A chain does not end, or chains share descriptors.
    Loop,
    /// Buffers cross from one memory region into the next more often than there are descriptors.
    Borders,
    /// A chain is too short for the header.
    Header,
}

impl Violation {
    pub(in crate::vhost) fn reason(self) -> &'static str {
        match self {
            Self::AvailIndex => "avail.idx is ahead by more than the size of the ring",
            Self::Index => "a descriptor is beyond the table",
            Self::Flags => "a descriptor has invalid flags",
            Self::Address => "a descriptor's memory is outside the memory regions",
            Self::Loop => "a chain of descriptors does not end, or shares descriptors with another",
            Self::Borders => "buffers are scattered over too many memory regions",
            Self::Header => "a chain is too short for the header",
        }
    }
}

pub(in crate::vhost) type Checked<T> = std::result::Result<T, Violation>;

/// Number of reads left in a burst. Chains that end and share no descriptors are together at most as long as
/// the table. More is misbehavior, which would occupy the lcore for the length of a table per chain.
pub(super) struct Budget {
    descriptors: usize,
    /// Borders of memory regions inside buffers. One per descriptor is enough, because regions are larger
    /// than buffers.
    borders: usize,
}

impl Budget {
    pub(super) fn new(descriptors: usize) -> Self {
        Self { descriptors, borders: descriptors }
    }

    pub(super) fn spend(&mut self) -> Checked<()> {
        self.descriptors = self.descriptors.checked_sub(1).ok_or(Violation::Loop)?;
        Ok(())
    }

    /// Calls `each` for the parts of a descriptor's memory, each of which lies in one region.
    pub(super) fn parts<'a>(
        &mut self,
        descriptor: Descriptor,
        view: &mut PeerView<'a>,
        mut each: impl FnMut(PeerSlice<'a>),
    ) -> Checked<()> {
        let mut violation = Violation::Address;
        let mut borders = Some(self.borders + 1);
        let within = view.parts(descriptor.address, descriptor.len, |part| {
            borders = borders.and_then(|borders| borders.checked_sub(1));
            if borders.is_none() {
                violation = Violation::Borders;
            }
            borders.map(|_| each(part))
        });
        self.borders = borders.unwrap_or(0);
        within.ok_or(violation)
    }
}

/// A descriptor, copied from the table.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// The descriptor table, with a check of each index.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    pub(super) words: RingView<'a, u64, 2>,
    pub(super) entries: usize,
}

impl Table<'_> {
    #[inline(always)]
    pub(super) fn get(self, index: u16) -> Option<Descriptor> {
        if usize::from(index) >= self.entries {
            return None;
        }
        let entry = self.words.entry(index.into());
        let (address, shape) = (entry.load::<0>(), entry.load::<1>());
        let (len, flags, next) = (shape as u32 as usize, (shape >> 32) as u16, (shape >> 48) as u16);
        Some(Descriptor { address, len, flags, next })
    }
}
