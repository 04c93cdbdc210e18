//! A ring shared between the lcore that polls it and the thread that sets it up and takes it away.

use std::sync::Arc;

use vireo_eal::event::Event;
use vireo_eal::sync::BiasedLock;
use vireo_eal::sync::atomic::{AtomicBool, Ordering};

use super::ring::{Report, Ring, Violation};

/// A ring's state. The lcore takes it once per burst and never waits; all other threads may wait.
pub(super) type Shared = BiasedLock<RingState>;

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

impl Slot {
    /// Position of the next chain, unless the ring is stopped.
    pub(super) fn next(&self) -> Option<u16> {
        match self {
            Self::Running(ring) | Self::Logged(ring) | Self::Disabled(ring) => Some(ring.next()),
            Self::Broken(next) => Some(*next),
            Self::Stopped => None,
        }
    }
}

/// A ring's slot and its counters. The user of the ring holds both, so a counter has one writer at a time.
#[derive(Debug, Default)]
pub(super) struct RingState {
    slot: Slot,
    pub(super) report: Report,
    /// Whether the lcore may use the ring. Others read it without the lock, which would cost the lcore a burst.
    is_up: Arc<AtomicBool>,
    /// Wakes the lcore, which may sleep, when the slot changes.
    pub(super) changed: Option<Event>,
}

impl RingState {
    /// Creates the state of a ring that the frontend has not started.
    pub(super) fn new(report: Report) -> Self {
        Self { report, ..Self::default() }
    }

    /// Whether the lcore may use the ring, now and later.
    pub(super) fn is_up(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_up)
    }

    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    pub(super) fn put(&mut self, slot: Slot) {
        self.is_up.store(matches!(slot, Slot::Running(_) | Slot::Logged(_)), Ordering::Release);
        self.slot = slot;
        self.changed.iter().for_each(Event::signal);
    }

    /// Replaces the slot with the one that `next` makes of it, and returns what else `next` returns. The link does
    /// not go down in between.
    pub(super) fn replace<T>(&mut self, next: impl FnOnce(Slot) -> (Slot, T)) -> T {
        let (slot, result) = next(std::mem::take(&mut self.slot));
        self.put(slot);
        result
    }

    /// Returns the ring in state [`Slot::Running`].
    #[inline(always)]
    pub(super) fn running(&mut self) -> Option<(&mut Ring, &mut Report)> {
        let Slot::Running(ring) = &mut self.slot else { return None };
        Some((ring, &mut self.report))
    }

    /// Returns the ring in state [`Slot::Logged`].
    pub(super) fn logged(&mut self) -> Option<(&mut Ring, &mut Report)> {
        let Slot::Logged(ring) = &mut self.slot else { return None };
        Some((ring, &mut self.report))
    }

    /// Wakes the frontend if it sleeps and does not know yet of all used chains.
    pub(super) fn wake(&mut self) {
        if let Slot::Running(ring) | Slot::Logged(ring) | Slot::Disabled(ring) = &mut self.slot {
            ring.wake(&self.report.counters);
        }
    }

    /// Returns the ring that the lcore may use.
    pub(super) fn usable(&self) -> Option<&Ring> {
        match &self.slot {
            Slot::Running(ring) | Slot::Logged(ring) => Some(ring),
            Slot::Stopped | Slot::Disabled(_) | Slot::Broken(_) => None,
        }
    }

    /// Ends the use of a ring whose frontend misbehaved. `direction` names the ring by what the frontend does
    /// with it.
    #[cold]
    #[inline(never)]
    pub(super) fn end(&mut self, violation: Violation, direction: &str) {
        if let Slot::Running(ring) | Slot::Logged(ring) | Slot::Disabled(ring) = &self.slot {
            let next = ring.next();
            tracing::error!("{}: {direction} ring stopped: {}", self.report.name, violation.reason());
            self.report.counters.device_errors.add(1);
            self.put(Slot::Broken(next));
        }
    }

    /// Drops what the frontend transmits through a disabled ring before position `end`, and counts it as
    /// errors.
    pub(super) fn discard(&mut self, end: u16) {
        if let Slot::Disabled(ring) = &mut self.slot {
            ring.discard(end, &self.report.counters);
        }
    }
}
