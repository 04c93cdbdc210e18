//! A ring between the lcore that polls it and the thread that sets it up and takes it away.

use std::sync::{PoisonError, TryLockError};

use vireo_eal::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vireo_eal::sync::{Mutex, MutexGuard};

use super::ring::Ring;

#[cfg(test)]
#[cfg(loom)]
mod models;

/// What there is of a ring.
#[derive(Debug)]
pub(super) enum Slot {
    /// The frontend has not started it.
    Stopped,
    /// The lcore may use it.
    Running(Box<Ring>),
    /// As `Running`, of a guest that migrates: what is written is marked.
    Logged(Box<Ring>),
    /// Started and not enabled: it receives nothing, and what it transmits is used and dropped (vhost-user, "Ring
    /// states"). No lcore does that: the request that enables the ring may be there and not answered yet.
    Disabled(Box<Ring>),
    /// The frontend lied; the ring ended at this position, until it is started anew.
    Broken(u16),
}

/// A ring's slot. The lcore takes it once for each burst and never waits; everybody else may. Each has cache lines
/// of its own, for the rings of a port may belong to two lcores.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Shared {
    /// How many wait for the slot: the lcore then leaves it, or it could hold it nearly all of the time.
    waiting: AtomicU32,
    /// Frames that were dropped while the ring was disabled.
    discarded: AtomicU64,
    slot: Mutex<Slot>,
}

impl Default for Shared {
    fn default() -> Self {
        Self { waiting: AtomicU32::new(0), discarded: AtomicU64::new(0), slot: Mutex::new(Slot::Stopped) }
    }
}

impl Shared {
    /// Whether somebody waits for the slot.
    #[inline(always)]
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The slot, unless somebody else has or wants it.
    #[inline(always)]
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, Slot>> {
        if self.is_wanted() {
            return None;
        }
        match self.slot.try_lock() {
            Ok(slot) => Some(slot),
            Err(TryLockError::Poisoned(slot)) => Some(slot.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The slot, after at most one burst of the lcore.
    pub(super) fn lock(&self) -> MutexGuard<'_, Slot> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        slot
    }

    /// Frames that the frontend transmitted while the ring was disabled, and that were dropped.
    pub(super) fn discarded(&self) -> u64 {
        self.discarded.load(Ordering::Acquire)
    }

    /// Drops what the frontend transmits by a disabled ring, before position `end`.
    pub(super) fn discard(&self, end: u16) {
        if let Slot::Disabled(ring) = &mut *self.lock() {
            // Counted when the frontend sees that they are used.
            self.discarded.fetch_add(end.wrapping_sub(ring.next()).into(), Ordering::Release);
            ring.discard(end);
        }
    }
}
