//! Packet counts of a run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vireo_drivers::counters::{PortCounters, PortStats};

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

/// Counters of a run. Clones share the counters, and any thread can read them at any time.
#[derive(Clone, Debug)]
pub struct Counts {
    ports: Vec<PortCounters>,
    /// TSC ticks of polls that moved packets, if measured.
    pub(crate) busy_ticks: Option<Arc<AtomicU64>>,
}

impl Counts {
    pub(crate) fn new(ports: Vec<PortCounters>) -> Self {
        Self { ports, busy_ticks: None }
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

    /// Returns the TSC ticks of polls that moved packets, if
    /// [`Ports::measure_busy_ticks`](crate::Ports::measure_busy_ticks) enabled this count.
    pub fn busy_ticks(&self) -> Option<u64> {
        self.busy_ticks.as_ref().map(|ticks| ticks.load(Ordering::Relaxed))
    }
}
