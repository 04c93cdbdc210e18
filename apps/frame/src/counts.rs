//! Packet counts of a run.

use std::collections::BTreeMap;
use std::sync::Arc;

use vireo_drivers::counters::{Count, PortCounters, PortStats};
use vireo_eal::clock::Tsc;
use vireo_eal::sync::atomic::{AtomicU64, Ordering};

/// Packet counts of one port at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Packets handed to devices.
    pub sent: u64,
    /// Packets received.
    pub received: u64,
    /// Packets dropped because a TX queue was full, or because its driver cannot send them.
    pub dropped: u64,
    /// Received packets that the application's [`Hook`](crate::Hook) removed.
    pub consumed: u64,
}

impl From<&PortStats> for Totals {
    fn from(stats: &PortStats) -> Self {
        let (rx, tx) = (stats.rx_sum(), stats.tx_sum());
        let dropped = tx.dropped + tx.errors;
        Self { sent: tx.packets, received: rx.packets, dropped, consumed: rx.consumed }
    }
}

/// How an lcore spends its time, in ticks of the TSC.
#[derive(Debug, Default)]
pub struct LcoreTicks {
    /// Ticks of polls that moved packets.
    pub busy: Count,
    /// Ticks in which the lcore slept.
    pub asleep: Count,
    /// Number of times that the lcore slept.
    pub sleeps: Count,
    /// Value of the TSC when the lcore began to poll; 0 before.
    begun: AtomicU64,
}

impl LcoreTicks {
    /// Starts the time of the lcore, unless it runs already.
    pub(crate) fn begin(&self) {
        let _ = self.begun.compare_exchange(0, Tsc::now(), Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Returns the ticks since the lcore began to poll.
    pub fn total(&self) -> u64 {
        match self.begun.load(Ordering::Relaxed) {
            0 => 0,
            begun => Tsc::now().saturating_sub(begun),
        }
    }
}

/// Counters of a run. Clones share the counters, and any thread can read them at any time.
#[derive(Clone, Debug)]
pub struct Counts {
    ports: Vec<PortCounters>,
    /// By lcore; empty unless measured.
    pub(crate) lcores: Arc<BTreeMap<u32, LcoreTicks>>,
}

impl Counts {
    pub(crate) fn new(ports: Vec<PortCounters>) -> Self {
        Self { ports, lcores: Arc::default() }
    }

    /// Returns the counters of port `number`, even if it is closed.
    ///
    /// # Panics
    /// When there is no such port.
    pub fn port(&self, number: usize) -> &PortCounters {
        &self.ports[number]
    }

    /// Returns the packet counts of port `number` so far.
    ///
    /// # Panics
    /// As for [`Counts::port`].
    pub fn of(&self, number: usize) -> Totals {
        Totals::from(&self.port(number).read())
    }

    /// Returns how lcore `id` spends its time, if
    /// [`Ports::measure_busy_ticks`](crate::Ports::measure_busy_ticks) enabled this count.
    pub fn lcore(&self, id: u32) -> Option<&LcoreTicks> {
        self.lcores.get(&id)
    }

    /// Returns the ticks of all lcores' polls that moved packets, if they are measured.
    pub fn busy_ticks(&self) -> Option<u64> {
        (!self.lcores.is_empty()).then(|| self.lcores.values().map(|lcore| lcore.busy.get()).sum())
    }
}
