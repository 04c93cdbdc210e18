//! What lcores count of packets.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

/// A count with one writer and any readers.
#[derive(Debug, Default)]
pub struct Count(CachePadded<AtomicU64>);

impl Count {
    /// Adds without a locked instruction: there is one writer.
    #[inline(always)]
    pub(crate) fn add(&self, n: usize) {
        self.0.store(self.0.load(Ordering::Relaxed) + n as u64, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Packets of one pair of queues. Each count is written by one lcore.
#[derive(Debug, Default)]
pub struct PairCounts {
    /// Packets handed to the TX queue.
    pub sent: Count,
    /// Packets taken from the RX queue.
    pub received: Count,
    /// Packets that found the TX queue full.
    pub dropped: Count,
    /// Received packets that the application's [`Hook`](crate::Hook) took out.
    pub consumed: Count,
}

/// Packets of one port at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Packets sent.
    pub sent: u64,
    /// Packets received.
    pub received: u64,
    /// Packets dropped because the TX queue was full.
    pub dropped: u64,
    /// Packets received that the application took out.
    pub consumed: u64,
}

impl Totals {
    /// Sums over `pairs`.
    pub fn of(pairs: &[PairCounts]) -> Self {
        let sum = |of: fn(&PairCounts) -> &Count| pairs.iter().map(|pair| of(pair).get()).sum();
        Self {
            sent: sum(|pair| &pair.sent),
            received: sum(|pair| &pair.received),
            dropped: sum(|pair| &pair.dropped),
            consumed: sum(|pair| &pair.consumed),
        }
    }
}

/// Counts of a run.
#[derive(Debug)]
pub struct Counts {
    /// Of each pair, counted over all ports.
    pub(crate) pairs: Vec<PairCounts>,
    /// Pairs of a port.
    per_port: usize,
    /// Ticks of polls that moved packets, if they are measured.
    pub(crate) busy_ticks: Option<AtomicU64>,
}

impl Counts {
    pub(crate) fn new(ports: usize, per_port: usize) -> Self {
        let pairs = (0..ports * per_port).map(|_| PairCounts::default()).collect();
        Self { pairs, per_port: per_port.max(1), busy_ticks: None }
    }

    pub(crate) fn of_pair(&self, port: usize, pair: usize) -> &PairCounts {
        &self.pairs[port * self.per_port + pair]
    }

    /// Packets of port `number` so far.
    pub fn of(&self, number: usize) -> Totals {
        Totals::of(self.pairs.chunks(self.per_port).nth(number).unwrap_or_default())
    }

    /// TSC ticks of the polls that moved packets, if [`Ports::measure_busy_ticks`](crate::Ports::measure_busy_ticks) asked
    /// for them.
    pub fn busy_ticks(&self) -> Option<u64> {
        self.busy_ticks.as_ref().map(|ticks| ticks.load(Ordering::Relaxed))
    }
}
