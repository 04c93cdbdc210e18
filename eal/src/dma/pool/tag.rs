//! The tag in a buffer's handle, which names its pool, and the way back to that pool.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::free::Chunk;
use super::{CHUNK, Pool};
use crate::error::{Error, ErrorKind, Result};

/// Bits that are set in each tag. None of two tags has all bits of the other, so the OR of the handles of many packets has
/// the tag of one pool exactly when all of the packets are of this pool.
const WEIGHT: u32 = u8::BITS / 2;

/// Number of tags: so many bytes have half of their bits set.
const TAGS: usize = 70;

/// Who has each tag.
static OWNERS: Mutex<[Owner; 1 << u8::BITS]> = Mutex::new([const { Owner::none() }; 1 << u8::BITS]);

/// Who has a tag.
#[derive(Debug)]
struct Owner {
    is_taken: bool,
    pool: Weak<Pool>,
    /// Buffers without a pool whose handles still exist. Negative while a pool is being dropped, by the buffers that come
    /// back meanwhile.
    strays: i64,
}

impl Owner {
    const fn none() -> Self {
        Self { is_taken: false, pool: Weak::new(), strays: 0 }
    }

    /// Counts strays, and frees the tag when the last one is gone.
    fn add_strays(&mut self, count: i64) {
        self.strays += count;
        if self.strays == 0 {
            *self = Self::none();
        }
    }
}

fn owners() -> MutexGuard<'static, [Owner; 1 << u8::BITS]> {
    // No panic leaves an entry half changed.
    OWNERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tag of one pool, unlike that of every other whose handles exist.
#[derive(Debug)]
pub(super) struct Tag(u8);

impl Tag {
    /// Takes a tag that no handle has.
    pub(super) fn take() -> Result<Self> {
        let mut owners = owners();
        let free = |tag: &u8| tag.count_ones() == WEIGHT && !owners[usize::from(*tag)].is_taken;
        let free = (0..=u8::MAX).find(free).ok_or_else(|| {
            let why = format!("{TAGS} pools exist, or were dropped before all of their buffers came back");
            Error::new(ErrorKind::Os, "cannot make a pool of packet buffers", why)
                .with_hint("restart the program")
        })?;
        owners[usize::from(free)].is_taken = true;
        Ok(Self(free))
    }

    /// The value, which is neither 0 nor all ones.
    pub(super) fn get(&self) -> u8 {
        self.0
    }

    /// Names the pool to which buffers with this tag go back.
    pub(super) fn assign(&self, pool: &Arc<Pool>) {
        owners()[usize::from(self.0)].pool = Arc::downgrade(pool);
    }

    /// Ends the use of the tag by its pool, of which `missing` buffers are somewhere else. Another pool gets the tag when
    /// all of their handles have been freed.
    pub(super) fn retire(&self, missing: u32) {
        owners()[usize::from(self.0)].add_strays(missing.into());
    }
}

/// Gives the buffers at the distances `slots`, whose pool has `tag`, back to that pool. If the pool is gone, so is the
/// memory of the buffers, and their handles are only counted.
///
/// No handle of the buffers may exist any more.
#[cold]
#[inline(never)]
pub(in crate::dma) fn send_home(tag: u8, slots: &[u32]) {
    let pool = {
        let mut owners = owners();
        let owner = &mut owners[usize::from(tag)];
        let pool = owner.pool.upgrade();
        if pool.is_none() && owner.is_taken {
            owner.add_strays(-(slots.len() as i64));
        }
        pool
    };
    // The lock is free again: this may be the last use of the pool, whose drop takes it.
    let Some(pool) = pool else { return };
    for chunk in slots.chunks(CHUNK) {
        pool.take_back(chunk.iter().copied().collect::<Chunk>());
    }
}
