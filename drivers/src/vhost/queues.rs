//! RX and TX queues of a port: a lock that is taken once per burst, then the ring.

use std::sync::Arc;

use vireo_eal::dma::{Burst, DATA_ROOM, PoolCache};

use super::ring::{Report, Violation};
use super::shared::{RingState, Shared, Slot};
use crate::counters::QueueCounters;
use crate::frames::drop_long;
use crate::port::{RxBurst, TxBurst};

/// Names of the rings by what the frontend does with them.
const TRANSMIT: &str = "transmit";
const RECEIVE: &str = "receive";

/// State that both queues have.
#[derive(Debug)]
struct Queue {
    shared: Arc<Shared>,
    /// The ring's counters, which are read without locking its state.
    counters: Arc<QueueCounters>,
}

/// RX queue: takes from the ring through which the frontend transmits.
#[derive(Debug)]
pub struct RxQueue(Queue);

/// TX queue: fills the ring through which the frontend receives.
#[derive(Debug)]
pub struct TxQueue {
    queue: Queue,
    /// Whether frames may be several packets.
    scattered: bool,
}

impl Queue {
    fn new(shared: &Arc<Shared>) -> Self {
        let counters = Arc::clone(&shared.lock().report.counters);
        Self { shared: Arc::clone(shared), counters }
    }

    /// Ends the use of a ring whose frontend misbehaved.
    #[cold]
    #[inline(never)]
    fn end(slot: &mut Slot, violation: Violation, report: &Report, direction: &str) {
        if let Slot::Running(ring) | Slot::Logged(ring) | Slot::Disabled(ring) = slot {
            tracing::error!("{}: {direction} ring stopped: {}", report.name, violation.reason());
            report.counters.device_errors.add(1);
            *slot = Slot::Broken(ring.next());
        }
    }
}

impl RxQueue {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self(Queue::new(shared))
    }

    pub(super) fn is_of(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.0.shared, shared)
    }

    /// Handles a ring that is in any state other than `Slot::Running`.
    #[cold]
    #[inline(never)]
    fn not_running(RingState { slot, report }: &mut RingState, cache: &mut PoolCache, burst: &mut Burst) {
        let Slot::Logged(ring) = slot else { return };
        if let Err(violation) = ring.receive_logged(cache, burst, &report.counters) {
            Queue::end(slot, violation, report, TRANSMIT);
        }
    }
}

impl TxQueue {
    /// Creates the queue. If `scattered`, frames may be several packets; such frames are dropped.
    pub(super) fn new(shared: &Arc<Shared>, scattered: bool) -> Self {
        Self { queue: Queue::new(shared), scattered }
    }

    pub(super) fn is_of(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.queue.shared, shared)
    }

    /// Handles a ring that is in any state other than `Slot::Running`; returns the number of packets taken
    /// from `burst`.
    #[cold]
    #[inline(never)]
    fn not_running(
        RingState { slot, report }: &mut RingState,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) -> usize {
        let Slot::Logged(ring) = slot else { return 0 };
        let before = burst.len();
        if let Err(violation) = ring.send_logged(cache, burst, report) {
            Queue::end(slot, violation, report, RECEIVE);
        }
        before - burst.len()
    }

    #[inline(always)]
    fn send(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let Some(mut state) = self.queue.shared.try_lock() else { return 0 };
        let RingState { slot: Slot::Running(ring), report } = &mut *state else {
            return Self::not_running(&mut state, cache, burst);
        };
        let before = burst.len();
        if let Err(violation) = ring.send(cache, burst, report) {
            let RingState { slot, report } = &mut *state;
            Queue::end(slot, violation, report, RECEIVE);
        }
        before - burst.len()
    }

    /// Drops frames of several packets, then sends as [`TxQueue::send`] does.
    #[cold]
    #[inline(never)]
    fn send_single(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let before = burst.len();
        match self.queue.shared.try_lock() {
            None => return 0,
            Some(state) => state.report.counters.errors.add(drop_long(burst, DATA_ROOM, 1, cache) as u64),
        }
        before - burst.len() + self.send(cache, burst)
    }
}

impl RxBurst for RxQueue {
    #[inline(never)]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        let Some(mut state) = self.0.shared.try_lock() else { return };
        let RingState { slot: Slot::Running(ring), report } = &mut *state else {
            return Self::not_running(&mut state, cache, burst);
        };
        if let Err(violation) = ring.receive(cache, burst, &report.counters) {
            let RingState { slot, report } = &mut *state;
            Queue::end(slot, violation, report, TRANSMIT);
        }
    }

    fn counters(&self) -> &QueueCounters {
        &self.0.counters
    }
}

impl TxBurst for TxQueue {
    /// Sends a burst. Packets stay in `burst` if the frontend has no room for them or is not connected.
    #[inline(never)]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.scattered { self.send_single(cache, burst) } else { self.send(cache, burst) }
    }

    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }
}
