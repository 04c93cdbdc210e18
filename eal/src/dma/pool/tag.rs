//! Tags in handles, which identify the pool of a buffer, and the return of buffers to that pool.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::free::Chunk;
use super::{CHUNK, Pool};
use crate::error::{Error, ErrorKind, Result};

/// Number of bits that are set in each tag. No tag has all bits of another. So the OR of many packets' tags
/// is the tag of one pool exactly if all of the packets belong to that pool.
const WEIGHT: u32 = u8::BITS / 2;

/// Number of tags: the number of bytes in which half of the bits are set.
const TAGS: usize = 70;

/// Owner of each tag.
static OWNERS: Mutex<[Owner; 1 << u8::BITS]> = Mutex::new([const { Owner::none() }; 1 << u8::BITS]);

/// Owner of a tag, if there is one.
#[derive(Debug)]
struct Owner {
    is_taken: bool,
    pool: Weak<Pool>,
    /// Number of existing handles whose pool is gone. Negative while a pool is being dropped, by the number
    /// of buffers that come back meanwhile.
    strays: i64,
}

impl Owner {
    const fn none() -> Self {
        Self { is_taken: false, pool: Weak::new(), strays: 0 }
    }

    /// Adds `count` strays, and frees the tag when none are left.
    fn add_strays(&mut self, count: i64) {
        self.strays += count;
        if self.strays == 0 {
            *self = Self::none();
        }
    }
}

fn owners() -> MutexGuard<'static, [Owner; 1 << u8::BITS]> {
    // No panic leaves an entry half-changed.
    OWNERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tag of one pool. No other pool whose handles exist has the same tag.
#[derive(Debug)]
pub(super) struct Tag(u8);

impl Tag {
    /// Takes a tag that no handle has.
    pub(super) fn take() -> Result<Self> {
        let mut owners = owners();
        let free = |tag: &u8| tag.count_ones() == WEIGHT && !owners[usize::from(*tag)].is_taken;
        let free = (0..=u8::MAX).find(free).ok_or_else(|| {
            let why = format!("{TAGS} pools exist, or were dropped before all of their buffers came back");
            Error::new(ErrorKind::Os, "cannot create a pool of packet buffers", why)
                .with_hint("restart the program")
        })?;
        owners[usize::from(free)].is_taken = true;
        Ok(Self(free))
    }

    /// Value of the tag, which is neither 0 nor all ones.
    pub(super) fn get(&self) -> u8 {
        self.0
    }

    /// Sets the pool to which buffers with this tag return.
    pub(super) fn assign(&self, pool: &Arc<Pool>) {
        owners()[usize::from(self.0)].pool = Arc::downgrade(pool);
    }

    /// Ends the pool's use of the tag. `missing` of the pool's buffers are somewhere else. Another pool can
    /// get the tag when all of their handles have been freed.
    pub(super) fn retire(&self, missing: u32) {
        owners()[usize::from(self.0)].add_strays(missing.into());
    }
}

/// Returns the buffers at the pool offsets `slots` to their pool, which has the tag `tag`. If the pool is
/// gone, so is the memory of the buffers, and their handles are only counted.
///
/// No handle of the buffers may exist any more.
#[cold]
#[inline(never)]
pub(in crate::dma) fn return_to_owner(tag: u8, slots: &[u32]) {
    let pool = {
        let mut owners = owners();
        let owner = &mut owners[usize::from(tag)];
        let pool = owner.pool.upgrade();
        if pool.is_none() && owner.is_taken {
            owner.add_strays(-(slots.len() as i64));
        }
        pool
    };
    // The lock was released above, because this may be the last use of the pool, whose drop takes the lock.
    let Some(pool) = pool else { return };
    for chunk in slots.chunks(CHUNK) {
        pool.take_back(chunk.iter().copied().collect::<Chunk>());
    }
}
