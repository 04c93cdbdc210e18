//! Queues of started ports that no lcore polls.

use std::collections::BTreeMap;
use std::ops::Range;

use vireo_drivers::port::{Queues, QueuesOf};
use vireo_drivers::table::{Port, RxQueue, TxQueue};

use crate::forward::{AnyLane, Lane};

/// Queues of started ports that no lcore polls, by pair number. Pairs are numbered across all ports, and each
/// port has the same number of pairs.
#[derive(Debug)]
pub(crate) struct IdleQueues {
    /// Queue pairs per port.
    pairs: usize,
    rx: BTreeMap<usize, RxQueue>,
    tx: BTreeMap<usize, TxQueue>,
}

impl IdleQueues {
    /// Creates an empty collection for ports with `pairs` queue pairs each.
    pub(crate) fn new(pairs: u16) -> Self {
        Self { pairs: pairs.into(), rx: BTreeMap::new(), tx: BTreeMap::new() }
    }

    /// Returns the pair numbers of `port`.
    pub(crate) fn numbers(&self, port: usize) -> Range<usize> {
        port * self.pairs..(port + 1) * self.pairs
    }

    /// Stores the queues of `port`.
    pub(crate) fn put_port(&mut self, port: usize, queues: QueuesOf<Port>) {
        self.rx.extend(self.numbers(port).zip(queues.rx));
        self.tx.extend(self.numbers(port).zip(queues.tx));
    }

    /// Removes and returns the queues of `port`, if all of them are here.
    pub(crate) fn take_port(&mut self, port: usize) -> Option<QueuesOf<Port>> {
        let numbers = self.numbers(port);
        if !numbers.clone().all(|number| self.rx.contains_key(&number) && self.tx.contains_key(&number)) {
            return None;
        }
        let rx = numbers.clone().filter_map(|number| self.rx.remove(&number)).collect();
        Some(Queues { rx, tx: numbers.filter_map(|number| self.tx.remove(&number)).collect() })
    }

    /// Returns the port of pair `number`.
    pub(crate) fn port_of(&self, number: usize) -> usize {
        number / self.pairs
    }

    /// Returns the number that pair `number` has within its port.
    pub(crate) fn queue_of(&self, number: usize) -> u16 {
        (number % self.pairs) as u16
    }

    /// Returns the RX queue of pair `number`, if it is here.
    pub(crate) fn rx_mut(&mut self, number: usize) -> Option<&mut RxQueue> {
        self.rx.get_mut(&number)
    }

    /// Returns the TX queue of pair `number`, if it is here.
    pub(crate) fn tx_mut(&mut self, number: usize) -> Option<&mut TxQueue> {
        self.tx.get_mut(&number)
    }

    /// Creates a lane from the RX queue of pair `from` to the TX queue of pair `to`. Returns the hook if one
    /// of them is not here.
    pub(crate) fn join<H>(&mut self, from: usize, to: usize, hook: H) -> Result<AnyLane<H>, H> {
        let both = (self.rx.remove(&from), self.tx.remove(&to));
        match both {
            (Some(rx), Some(tx)) => Ok(Lane { rx, from, tx, to, hook }),
            (rx, tx) => {
                self.rx.extend(rx.map(|rx| (from, rx)));
                self.tx.extend(tx.map(|tx| (to, tx)));
                Err(hook)
            }
        }
    }

    /// Stores the queues of `lane` and returns its hook.
    pub(crate) fn put<H>(&mut self, lane: AnyLane<H>) -> H {
        self.rx.insert(lane.from, lane.rx);
        self.tx.insert(lane.to, lane.tx);
        lane.hook
    }
}
