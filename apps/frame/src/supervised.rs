//! A port of a run, with what it counted over its restarts.

use std::collections::BTreeMap;
use std::time::Instant;

use vireo_drivers::port::{Leftover, Nic, QueueStats, RxBurst, TxBurst};
use vireo_drivers::ports::OpenPort;
use vireo_eal::Error;
use vireo_eal::dma::PoolCache;

use crate::control::PortState;
use crate::idle::Pairs;

/// A port that the control thread looks after, and what it counted before its last stop.
#[derive(Debug)]
pub(crate) struct SupervisedPort {
    /// The port, until it is closed.
    pub(crate) open: Option<OpenPort>,
    /// Counts of RX queues that are stopped.
    pub(crate) rx: QueueStats,
    /// Counts of TX queues that are stopped.
    pub(crate) tx: QueueStats,
    /// Frames that the device dropped before, by name.
    pub(crate) drops: BTreeMap<&'static str, u64>,
    /// Packets that stops threw away.
    pub(crate) leftover: Leftover,
    /// Times that it was restarted.
    pub(crate) restarts: u64,
    /// Changes of its link that were seen; of NICs.
    pub(crate) link_changes: u64,
    /// Whether its link was up at the last inspection; `None` for a virtual port, which has a peer instead of a link.
    link_up: Option<bool>,
    /// Whether it is stopped, and waits for its next start.
    pub(crate) is_down: bool,
    /// When it was started last, or that was tried.
    pub(crate) last_start: Instant,
    /// Why it did not confirm its last stop: packet buffers are with it.
    pub(crate) unconfirmed: Option<Error>,
}

impl SupervisedPort {
    /// A port that has counted nothing.
    pub(crate) fn new(open: OpenPort) -> Self {
        let (rx, tx, drops, leftover) = Default::default();
        Self {
            open: Some(open),
            rx,
            tx,
            drops,
            leftover,
            restarts: 0,
            link_changes: 0,
            link_up: None,
            is_down: false,
            last_start: Instant::now(),
            unconfirmed: None,
        }
    }

    /// Takes the link as it is for the one to compare with.
    pub(crate) fn begin(&mut self) {
        let nic = self.open.as_ref().filter(|open| open.report.is_some());
        self.link_up = nic.map(|open| open.port.link().up);
        self.last_start = Instant::now();
    }

    /// Stops the port, and adds what it counted; TX rings give their buffers to `sent`, if they are of another pool. A port
    /// that is down has no queues: if it did not confirm its stop, that is tried again.
    pub(crate) fn stop(
        &mut self,
        queues: Option<Pairs>,
        cache: &mut PoolCache,
        sent: Option<&mut PoolCache>,
    ) {
        let Some(OpenPort { port, .. }) = &mut self.open else { return };
        self.unconfirmed = match queues {
            None => port.retry_stop(cache),
            Some(queues) => {
                for (rx, tx) in &queues {
                    self.rx += rx.stats();
                    self.tx += tx.stats();
                }
                let stopped = port.stop_pairs(queues, cache, sent);
                for (name, count) in port.device_drops() {
                    *self.drops.entry(name).or_default() += count;
                }
                stopped
            }
        }
        .err();
        self.leftover = port.leftover();
    }

    /// Notes a change of the link, and gives it.
    pub(crate) fn link_change(&mut self, number: usize) -> Option<PortState> {
        let (open, link_up) = (self.open.as_ref()?, self.link_up.as_mut()?);
        let up = open.port.link().up;
        if std::mem::replace(link_up, up) == up {
            return None;
        }
        self.link_changes += 1;
        tracing::info!("port {number}: link {}", if up { "up" } else { "down" });
        Some(if up { PortState::LinkUp } else { PortState::LinkDown })
    }
}
