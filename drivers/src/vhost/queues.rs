//! The two queues of a port: a lock that is taken once for a burst, then the ring.

use std::sync::Arc;

use vireo_eal::dma::{Burst, PoolCache};

use super::ring::{Lie, Report};
use super::shared::{Shared, Slot};
use crate::port::{QueueStats, RxBurst, TxBurst};

/// Rings by what the frontend does with them.
const TRANSMIT: &str = "transmit";
const RECEIVE: &str = "receive";

/// What both queues are.
#[derive(Debug)]
struct Queue {
    shared: Arc<Shared>,
    report: Report,
}

/// Receiving half: takes from the ring by which the frontend transmits.
#[derive(Debug)]
pub struct RxQueue(Queue);

/// Sending half: fills the ring by which the frontend receives.
#[derive(Debug)]
pub struct TxQueue(Queue);

impl Queue {
    fn new(shared: &Arc<Shared>, name: &Arc<str>) -> Self {
        Self { shared: Arc::clone(shared), report: Report::new(name) }
    }

    /// Ends the use of a ring whose frontend lied.
    #[cold]
    #[inline(never)]
    fn end(slot: &mut Slot, lie: Lie, report: &mut Report, direction: &str) {
        if let Slot::Running(ring) | Slot::Logged(ring) | Slot::Disabled(ring) = slot {
            tracing::error!("{}: {direction} ring stopped: {}", report.name, lie.reason());
            report.stats.device_errors += 1;
            *slot = Slot::Broken(ring.next());
        }
    }
}

impl RxQueue {
    pub(super) fn new(shared: &Arc<Shared>, name: &Arc<str>) -> Self {
        Self(Queue::new(shared, name))
    }

    pub(super) fn is_of(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.0.shared, shared)
    }

    /// What there is to do for a ring that does not just run.
    #[cold]
    #[inline(never)]
    fn otherwise(slot: &mut Slot, cache: &mut PoolCache, burst: &mut Burst, report: &mut Report) {
        let Slot::Logged(ring) = slot else { return };
        if let Err(lie) = ring.receive_logged(cache, burst, &mut report.stats) {
            Queue::end(slot, lie, report, TRANSMIT);
        }
    }
}

impl TxQueue {
    pub(super) fn new(shared: &Arc<Shared>, name: &Arc<str>) -> Self {
        Self(Queue::new(shared, name))
    }

    pub(super) fn is_of(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.0.shared, shared)
    }

    /// As of [`RxQueue`]; gives the number of packets that were taken.
    #[cold]
    #[inline(never)]
    fn otherwise(slot: &mut Slot, cache: &mut PoolCache, burst: &mut Burst, report: &mut Report) -> usize {
        let Slot::Logged(ring) = slot else { return 0 };
        let before = burst.len();
        if let Err(lie) = ring.send_logged(cache, burst, report) {
            Queue::end(slot, lie, report, RECEIVE);
        }
        before - burst.len()
    }
}

impl RxBurst for RxQueue {
    #[inline(never)]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        let Queue { shared, report } = &mut self.0;
        let Some(mut slot) = shared.try_lock() else { return };
        let Slot::Running(ring) = &mut *slot else {
            return Self::otherwise(&mut slot, cache, burst, report);
        };
        if let Err(lie) = ring.receive(cache, burst, &mut report.stats) {
            Queue::end(&mut slot, lie, report, TRANSMIT);
        }
    }

    fn stats(&self) -> QueueStats {
        let Queue { shared, report } = &self.0;
        QueueStats { errors: report.stats.errors + shared.discarded(), ..report.stats }
    }
}

impl TxBurst for TxQueue {
    /// Packets for which the frontend has no room, or which come while none is there, stay in `burst`.
    #[inline(never)]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let Queue { shared, report } = &mut self.0;
        let Some(mut slot) = shared.try_lock() else { return 0 };
        let Slot::Running(ring) = &mut *slot else {
            return Self::otherwise(&mut slot, cache, burst, report);
        };
        let before = burst.len();
        if let Err(lie) = ring.send(cache, burst, report) {
            Queue::end(&mut slot, lie, report, RECEIVE);
        }
        before - burst.len()
    }

    fn stats(&self) -> QueueStats {
        self.0.report.stats
    }
}
