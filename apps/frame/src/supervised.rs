//! A port of a run.

use std::time::Instant;

use vireo_drivers::counters::{PortCounters, PortStats};
use vireo_drivers::port::{Nic, QueuesOf};
use vireo_drivers::ports::OpenPort;
use vireo_drivers::table::Port;
use vireo_eal::Error;
use vireo_eal::dma::PoolCache;

use crate::control::PortState;

/// What a port counted, when it has stopped.
#[derive(Clone, Debug, Default)]
pub struct PortSummary {
    /// Whether the device confirmed its last stop. If not, [`Ports::check_buffers`](crate::Ports::check_buffers) says why.
    pub is_confirmed: bool,
    /// What its queues and its device counted, over all starts.
    pub stats: PortStats,
    /// Times that the port was restarted.
    pub restarts: u64,
    /// Changes of the link that were seen; of NICs.
    pub link_changes: u64,
}

/// A port that the control thread looks after.
#[derive(Debug)]
pub(crate) struct SupervisedPort {
    /// The port, until it is closed.
    pub(crate) open: Option<OpenPort>,
    /// Its counters, which outlive it.
    pub(crate) counters: PortCounters,
    /// What it had counted when it was stopped last, and its restarts.
    pub(crate) counted: PortSummary,
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
        Self {
            counters: open.port.counters().clone(),
            open: Some(open),
            counted: PortSummary::default(),
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

    /// Stops the port, and notes what it counted. A port that is down has no queues: if it did not confirm its stop, that is
    /// tried again.
    pub(crate) fn stop(&mut self, queues: Option<QueuesOf<Port>>, cache: &mut PoolCache) {
        let Self { open: Some(OpenPort { port, .. }), counters, counted, .. } = self else { return };
        self.unconfirmed = match queues {
            None => port.retry_stop(cache),
            Some(queues) => port.stop(queues, cache),
        }
        .err();
        counted.stats = counters.read();
        counted.is_confirmed = self.unconfirmed.is_none();
    }

    /// Notes a change of the link, and gives it.
    pub(crate) fn link_change(&mut self, number: usize) -> Option<PortState> {
        let (open, link_up) = (self.open.as_ref()?, self.link_up.as_mut()?);
        let up = open.port.link().up;
        if std::mem::replace(link_up, up) == up {
            return None;
        }
        self.counted.link_changes += 1;
        tracing::info!("port {number}: link {}", if up { "up" } else { "down" });
        Some(if up { PortState::LinkUp } else { PortState::LinkDown })
    }
}
