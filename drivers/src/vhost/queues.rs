//! RX and TX queues of a port: a lock that is taken once per burst, then the ring.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vireo_eal::dma::{Burst, DATA_ROOM, MAX_BURST, PoolCache};
use vireo_eal::sync::Owner;

use super::shared::{RingState, Shared};
use super::waker::Waker;
use crate::counters::QueueCounters;
use crate::frames::drop_long;
use crate::port::{RxBurst, TxBurst};
use crate::tied::Polled;

/// Names of the rings by what the frontend does with them.
const TRANSMIT: &str = "transmit";
const RECEIVE: &str = "receive";

/// State that both queues have.
#[derive(Debug)]
struct Queue {
    ring: Owner<RingState>,
    /// The ring's counters, which are read without locking its state.
    counters: Arc<QueueCounters>,
}

/// RX queue: takes from the ring through which the frontend transmits.
#[derive(Debug)]
pub struct RxQueue {
    queue: Queue,
    /// `None` if the lcore never sleeps.
    waker: Option<Waker>,
    /// Number of frames that [`RxQueue::pass`] has forwarded since it last woke the frontends.
    unwoken: usize,
}

/// TX queue: fills the ring through which the frontend receives.
#[derive(Debug)]
pub struct TxQueue {
    queue: Queue,
    /// Whether frames may be several packets.
    scattered: bool,
}

impl Queue {
    /// Returns `None` while there is another queue of the ring.
    fn new(shared: &Arc<Shared>) -> Option<Self> {
        let counters = Arc::clone(&shared.lock().report.counters);
        Some(Self { ring: shared.own()?, counters })
    }
}

impl RxQueue {
    /// Creates the queue, whose lcore may sleep if there is a `waker`. Returns `None` while there is another one of the
    /// ring.
    pub(super) fn new(shared: &Arc<Shared>, waker: Option<Waker>) -> Option<Self> {
        let queue = Queue::new(shared)?;
        shared.lock().changed = waker.as_ref().map(|waker| waker.changed().clone());
        Some(Self { queue, waker, unwoken: 0 })
    }

    pub(super) fn is_of(&self, shared: &Arc<Shared>) -> bool {
        self.queue.ring.is_of(shared)
    }

    /// Forwards long frames to `tx` in one copy each, from the memory of one frontend to that of another, without a
    /// packet buffer. The first 12 bytes of each frame become `addresses`, if given. Frontends that sleep are
    /// [woken](RxQueue::wake) when as many frames were forwarded as a burst has, or nothing more arrived.
    /// [`Polled::Odd`] leaves the next frame, or what hinders it, to [`rx_burst`](RxBurst::rx_burst) and
    /// [`tx_burst`](TxBurst::tx_burst).
    #[inline(always)]
    pub fn pass(&mut self, tx: &mut TxQueue, addresses: Option<[u8; 12]>) -> Polled {
        match self.try_pass(tx, addresses) {
            Some(0) if self.unwoken == 0 => Polled::Idle,
            Some(0) => {
                self.wake(tx);
                Polled::Busy
            }
            Some(passed) => {
                self.unwoken += passed;
                if self.unwoken >= MAX_BURST {
                    self.wake(tx);
                }
                Polled::Busy
            }
            None => {
                if self.unwoken > 0 {
                    self.wake(tx);
                }
                Polled::Odd
            }
        }
    }

    /// Returns the number of frames that passed; `None` if the next one cannot.
    #[inline(always)]
    fn try_pass(&mut self, tx: &mut TxQueue, addresses: Option<[u8; 12]>) -> Option<usize> {
        let Some(mut from) = self.queue.ring.try_lock() else { return Some(0) };
        let (from, report) = from.running()?;
        let pending = from.pending().ok()?;
        if pending == 0 {
            return Some(0);
        }
        if !from.begins_with_long() {
            return None;
        }
        let mut to = tx.queue.ring.try_lock()?;
        let (to, to_report) = to.running()?;
        let wanted = pending.min(to.pending().ok()?).into();
        let passed = from.pass(to, wanted, addresses, (&report.counters, &to_report.counters));
        (passed > 0).then_some(passed)
    }

    /// Wakes both frontends for the frames that [`RxQueue::pass`] has forwarded, if they sleep.
    #[inline(never)]
    pub fn wake(&mut self, tx: &mut TxQueue) {
        for queue in [&mut tx.queue, &mut self.queue] {
            // If another thread holds the ring, the next call does this.
            let Some(mut state) = queue.ring.try_lock() else { return };
            state.wake();
        }
        self.unwoken = 0;
    }

    /// Handles a ring that is not running.
    #[cold]
    #[inline(never)]
    fn not_running(state: &mut RingState, cache: &mut PoolCache, burst: &mut Burst) {
        let Some((ring, report)) = state.logged() else { return };
        if let Err(violation) = ring.receive_logged(cache, burst, &report.counters) {
            state.end(violation, TRANSMIT);
        }
    }
}

impl TxQueue {
    /// Creates the queue. If `scattered`, frames may be several packets; such frames are dropped. Returns `None`
    /// while there is another queue of the ring.
    pub(super) fn new(shared: &Arc<Shared>, scattered: bool) -> Option<Self> {
        Some(Self { queue: Queue::new(shared)?, scattered })
    }

    pub(super) fn is_of(&self, shared: &Arc<Shared>) -> bool {
        self.queue.ring.is_of(shared)
    }

    /// Handles a ring that is not running; returns the number of packets taken from `burst`.
    #[cold]
    #[inline(never)]
    fn not_running(state: &mut RingState, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let Some((ring, report)) = state.logged() else { return 0 };
        let before = burst.len();
        if let Err(violation) = ring.send_logged(cache, burst, report) {
            state.end(violation, RECEIVE);
        }
        before - burst.len()
    }

    #[inline(always)]
    fn send(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let Some(mut state) = self.queue.ring.try_lock() else { return 0 };
        let Some((ring, report)) = state.running() else {
            return Self::not_running(&mut state, cache, burst);
        };
        let before = burst.len();
        if let Err(violation) = ring.send(cache, burst, report) {
            state.end(violation, RECEIVE);
        }
        before - burst.len()
    }

    /// Drops frames of several packets, then sends as [`TxQueue::send`] does.
    #[cold]
    #[inline(never)]
    fn send_single(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let before = burst.len();
        match self.queue.ring.try_lock() {
            None => return 0,
            Some(state) => state.report.counters.errors.add(drop_long(burst, DATA_ROOM, 1, cache) as u64),
        }
        before - burst.len() + self.send(cache, burst)
    }
}

impl RxBurst for RxQueue {
    #[inline(never)]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        let Some(mut state) = self.queue.ring.try_lock() else { return };
        let Some((ring, report)) = state.running() else {
            return Self::not_running(&mut state, cache, burst);
        };
        if let Err(violation) = ring.receive(cache, burst, &report.counters) {
            state.end(violation, TRANSMIT);
        }
    }

    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.waker.as_ref().map(AsFd::as_fd)
    }

    /// Returns true without a ring that could be used: its start is a change, which wakes the lcore.
    fn arm(&mut self) -> bool {
        let (Some(waker), Some(state)) = (&mut self.waker, self.queue.ring.try_lock()) else { return false };
        state.usable().is_none_or(|ring| waker.listen_to(ring.kick()) && ring.request_kick())
    }

    fn disarm(&mut self) {
        let Some(waker) = &self.waker else { return };
        if let Some(state) = self.queue.ring.try_lock()
            && let Some(ring) = state.usable()
        {
            ring.suppress_kicks();
        }
        waker.take();
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
