//! A ring shared between the lcore that polls it and the thread that sets it up and takes it away.

use std::sync::{PoisonError, TryLockError};

use vireo_eal::sync::atomic::{AtomicU32, Ordering};
use vireo_eal::sync::{Mutex, MutexGuard};

use super::ring::{Report, Ring};

#[cfg(test)]
#[cfg(loom)]
mod models;

/// State of a ring.
#[derive(Debug, Default)]
pub(super) enum Slot {
    /// The frontend has not started the ring.
    #[default]
    Stopped,
    /// The lcore may use the ring.
    Running(Box<Ring>),
    /// As `Running`, for a guest that migrates: writes are marked in the log.
    Logged(Box<Ring>),
    /// Started but not enabled. The ring receives nothing, and what the frontend transmits is used and
    /// dropped (vhost-user, "Ring states"). No lcore does that, because the request that enables the ring may
    /// have arrived without being answered yet.
    Disabled(Box<Ring>),
    /// The frontend misbehaved. The ring ended at this position until it is started again.
    Broken(u16),
}

/// A ring's slot and its counters. The user of the ring holds both, so a counter has one writer at a time.
#[derive(Debug, Default)]
pub(super) struct RingState {
    pub(super) slot: Slot,
    pub(super) report: Report,
}

/// The lock of a ring's state. The lcore takes it once per burst and never waits; all other threads may wait.
/// Each lock has cache lines of its own, because the rings of a port may belong to two lcores.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Shared {
    /// Number of threads that wait for the state. While there is one, the lcore leaves the state alone;
    /// otherwise the lcore could hold it nearly all of the time.
    waiting: AtomicU32,
    state: Mutex<RingState>,
}

impl Shared {
    /// Creates a state without a ring.
    pub(super) fn new(report: Report) -> Self {
        Self { waiting: AtomicU32::new(0), state: Mutex::new(RingState { report, ..RingState::default() }) }
    }

    /// Whether a thread waits for the state.
    #[inline(always)]
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Locks the state, unless another thread holds or wants it.
    #[inline(always)]
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, RingState>> {
        if self.is_wanted() {
            return None;
        }
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(state)) => Some(state.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Locks the state, after at most one burst of the lcore.
    pub(super) fn lock(&self) -> MutexGuard<'_, RingState> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        state
    }

    /// Drops what the frontend transmits through a disabled ring before position `end`, and counts it as
    /// errors.
    pub(super) fn discard(&self, end: u16) {
        if let RingState { slot: Slot::Disabled(ring), report } = &mut *self.lock() {
            ring.discard(end, &report.counters);
        }
    }
}
