//! Which pool a buffer is of, in the top bits of its handle.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, ErrorKind, Result};

/// Bits that are set in each tag. None of two tags has all bits of the other, so the OR of the handles of many packets has
/// the tag of one pool exactly when all of the packets are of this pool.
const WEIGHT: u32 = u8::BITS / 2;

/// Number of tags: so many bytes have half of their bits set.
const TAGS: usize = 70;

/// The tags that pools have, and those that none can have any more.
static TAKEN: Mutex<[bool; 1 << u8::BITS]> = Mutex::new([false; 1 << u8::BITS]);

/// The tag of one pool, unlike that of every other whose handles exist.
#[derive(Debug)]
pub(super) struct Tag(u8);

impl Tag {
    /// Takes a tag that no handle has.
    pub(super) fn take() -> Result<Self> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |tag: &u8| tag.count_ones() == WEIGHT && !taken[usize::from(*tag)];
        let free = (0..=u8::MAX).find(free).ok_or_else(|| {
            let why = format!("{TAGS} pools exist, or were dropped before all of their buffers came back");
            Error::new(ErrorKind::Os, "cannot make a pool of packet buffers", why)
                .with_hint("restart the program")
        })?;
        taken[usize::from(free)] = true;
        Ok(Self(free))
    }

    /// The value, which is neither 0 nor all ones.
    pub(super) fn get(&self) -> u8 {
        self.0
    }

    /// Lets another pool have the tag. Only for one of which no handle exists any more.
    pub(super) fn release(&self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(self.0)] = false;
    }
}
