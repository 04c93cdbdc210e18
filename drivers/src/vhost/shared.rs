//! A ring between the lcore that polls it and the thread that sets it up and takes it away.

use std::sync::{PoisonError, TryLockError};

use vireo_eal::sync::atomic::{AtomicU32, Ordering};
use vireo_eal::sync::{Mutex, MutexGuard};

use super::ring::{Report, Ring};

#[cfg(test)]
#[cfg(loom)]
mod models;

/// What there is of a ring.
#[derive(Debug, Default)]
pub(super) enum Slot {
    /// The frontend has not started it.
    #[default]
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

/// A ring's slot and what is counted of the ring. Whoever uses the ring holds both, so a count has one writer at a time.
#[derive(Debug, Default)]
pub(super) struct Place {
    pub(super) slot: Slot,
    pub(super) report: Report,
}

/// A ring's place. The lcore takes it once for each burst and never waits; everybody else may. Each has cache lines
/// of its own, for the rings of a port may belong to two lcores.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Shared {
    /// How many wait for the place: the lcore then leaves it, or it could hold it nearly all of the time.
    waiting: AtomicU32,
    place: Mutex<Place>,
}

impl Shared {
    /// A place without a ring.
    pub(super) fn new(report: Report) -> Self {
        Self { waiting: AtomicU32::new(0), place: Mutex::new(Place { report, ..Place::default() }) }
    }

    /// Whether somebody waits for the place.
    #[inline(always)]
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The place, unless somebody else has or wants it.
    #[inline(always)]
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, Place>> {
        if self.is_wanted() {
            return None;
        }
        match self.place.try_lock() {
            Ok(place) => Some(place),
            Err(TryLockError::Poisoned(place)) => Some(place.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The place, after at most one burst of the lcore.
    pub(super) fn lock(&self) -> MutexGuard<'_, Place> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        place
    }

    /// Drops what the frontend transmits by a disabled ring, before position `end`, and counts it as errors.
    pub(super) fn discard(&self, end: u16) {
        if let Place { slot: Slot::Disabled(ring), report } = &mut *self.lock() {
            ring.discard(end, &report.counters);
        }
    }
}
