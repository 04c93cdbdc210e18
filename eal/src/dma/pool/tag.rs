//! Which pool a buffer is of, in the low bits of its handle.

use std::sync::{Mutex, PoisonError};

use super::{BUFFER_SIZE, HEADROOM};
use crate::error::{Error, ErrorKind, Result};

/// The bits of a handle that are its pool's tag. Distances of buffers leave three more free, but a byte is compared by
/// one instruction.
const BITS: u32 = u8::MAX as u32;

/// No tag has this bit, so no two differ by it alone: see [`super::place::Buffers::is_foreign`].
const NEVER: u32 = HEADROOM as u32;

/// Number of tags: all values of the other seven bits but 0.
const TAGS: u32 = BITS.div_ceil(2) - 1;

/// The tags that pools have, and those that none can have any more.
static TAKEN: Mutex<[bool; BITS as usize + 1]> = Mutex::new([false; BITS as usize + 1]);

/// The tag of one pool, unlike that of every other whose handles exist.
#[derive(Debug)]
pub(super) struct Tag(u32);

impl Tag {
    /// Takes a tag that no handle has.
    pub(super) fn take() -> Result<Self> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let free = (1..=BITS).find(|tag| tag & NEVER == 0 && !taken[*tag as usize]).ok_or_else(|| {
            let why = format!("{TAGS} pools exist, or were dropped before all of their buffers came back");
            Error::new(ErrorKind::Os, "cannot make a pool of packet buffers", why)
                .with_hint("restart the program")
        })?;
        taken[free as usize] = true;
        Ok(Self(free))
    }

    /// The value: one byte, not 0, without the bit of [`HEADROOM`].
    pub(super) fn get(&self) -> u32 {
        self.0
    }

    /// Lets another pool have the tag. Only for one of which no handle exists any more.
    pub(super) fn release(&self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[self.0 as usize] = false;
    }
}

/// Whether `handle` is of the pool that has `tag`.
#[inline(always)]
pub(super) fn is_of(handle: u32, tag: u32) -> bool {
    handle as u8 == tag as u8
}

/// Whether all of `handles` are of the pool that has `tag`. Without an early end, so that the test costs less than one
/// instruction for each.
#[inline(always)]
pub(super) fn are_of(handles: &[u32], tag: u32) -> bool {
    handles.iter().fold(0, |difference, handle| difference | (handle ^ tag)) & BITS == 0
}

const _: () =
    assert!(BUFFER_SIZE.is_multiple_of(BITS as usize + 1) && NEVER.is_power_of_two() && NEVER <= BITS);
