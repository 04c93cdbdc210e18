//! A port that the control thread supervises.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use vireo_drivers::counters::{PortCounters, PortStats};
use vireo_drivers::handover::HandOver;
use vireo_drivers::port::{Link, Nic, QueuesOf};
use vireo_drivers::ports::OpenPort;
use vireo_drivers::table::Port;
use vireo_eal::Error;
use vireo_eal::dma::PoolCache;
use vireo_eal::event::is_signaled;

use crate::control::{INSPECTION_PERIOD, PortState};
use crate::status::{PortStatus, SharedStatus};

/// Minimum time between two starts of a port, so that a device that always misbehaves does not keep the
/// control thread busy.
const RESTART_PERIOD: Duration = Duration::from_millis(500);

/// What a port counted until it was stopped.
#[derive(Clone, Debug, Default)]
pub struct PortSummary {
    /// Whether the device confirmed its last stop. If not,
    /// [`Ports::check_buffers`](crate::Ports::check_buffers) returns the reason.
    pub is_confirmed: bool,
    /// Counters of the port's queues and device, over all starts.
    pub stats: PortStats,
    /// Number of restarts of the port.
    pub restarts: u64,
    /// Number of link changes seen; counted only for NICs.
    pub link_changes: u64,
}

/// A port that the control thread supervises.
#[derive(Debug)]
pub(crate) struct SupervisedPort {
    /// The port; `None` after it is closed.
    pub(crate) open: Option<OpenPort>,
    /// Counters of the port, which outlive it.
    pub(crate) counters: PortCounters,
    /// Counters at the last stop, and number of restarts.
    pub(crate) counted: PortSummary,
    /// State for other threads, as of the last [`SupervisedPort::publish`].
    pub(crate) status: SharedStatus,
    /// Link at the last inspection; `None` before the first.
    link: Option<Link>,
    /// Time of the last inspection that found the event of the port signaled.
    pub(crate) last_link_event: Option<Instant>,
    /// Whether the port is stopped and waits for its next start.
    pub(crate) is_down: bool,
    /// Time of the last start or attempted start.
    pub(crate) last_start: Instant,
    /// Why the device did not confirm its last stop. Until it does, it holds packet buffers.
    pub(crate) unconfirmed: Option<Error>,
}

impl SupervisedPort {
    /// Creates a port that has counted nothing.
    pub(crate) fn new(open: OpenPort) -> Self {
        Self {
            counters: open.port.counters().clone(),
            open: Some(open),
            counted: PortSummary::default(),
            status: SharedStatus::default(),
            link: None,
            last_link_event: None,
            is_down: false,
            last_start: Instant::now(),
            unconfirmed: None,
        }
    }

    /// Records the current link state, for later states to be compared with.
    pub(crate) fn begin(&mut self) {
        self.link = self.open.as_ref().map(|open| open.port.link());
        self.last_start = Instant::now();
    }

    /// Whether the last start, or attempt, is long enough ago for the port to be inspected and restarted.
    pub(crate) fn is_settled(&self) -> bool {
        self.last_start.elapsed() >= RESTART_PERIOD
    }

    /// Event that says that the port should be inspected now. After each, the next inspection is a periodic one, so
    /// that a device that signals all the time does not keep the control thread busy.
    pub(crate) fn link_event(&self) -> Option<BorrowedFd<'_>> {
        let is_due = self.last_link_event.is_none_or(|last| last.elapsed() >= INSPECTION_PERIOD);
        let open = self.open.as_ref().filter(|_| !self.is_down && self.is_settled() && is_due)?;
        open.port.link_event()
    }

    /// Tells other threads the state of the port.
    pub(crate) fn publish(&self) {
        let (is_open, link) = (self.open.is_some(), self.link.filter(|_| !self.is_down));
        let PortSummary { restarts, link_changes, .. } = self.counted;
        self.status.update(|status| {
            *status = PortStatus { is_open, link, restarts, link_changes, ..*status };
        });
    }

    /// Stops the port and records its counters. A port that is down has no queues. If its device did not
    /// confirm the stop, the stop is retried.
    pub(crate) fn stop(&mut self, queues: Option<QueuesOf<Port>>, cache: &mut PoolCache) {
        let Self { open: Some(OpenPort { port, .. }), counters, counted, status, .. } = self else { return };
        status.update(|status| status.is_started = false);
        self.unconfirmed = match queues {
            None => port.retry_stop(cache),
            Some(queues) => port.stop(queues, cache),
        }
        .err();
        counted.stats = counters.read();
        counted.is_confirmed = self.unconfirmed.is_none();
    }

    /// Keeps the port: no other process continues it.
    pub(crate) fn keep(&mut self) {
        self.open.iter_mut().for_each(|open| open.port.keep());
    }

    /// Leaves the port to a successor, which continues it.
    pub(crate) fn leave(&mut self) {
        if let Some(mut open) = self.open.take() {
            open.port.leave();
            self.counted.stats = self.counters.read();
            self.counted.is_confirmed = true;
        }
    }

    /// Records the link state, and returns its change. A virtual port has a peer instead of a link.
    pub(crate) fn link_change(&mut self, number: usize) -> Option<PortState> {
        let open = self.open.as_ref()?;
        if open.port.link_event().is_some_and(is_signaled) {
            self.last_link_event = Some(Instant::now());
        }
        let link = open.port.link();
        let (up, was_up) = (link.up, self.link.replace(link)?.up);
        if was_up == up || open.report.is_none() {
            return None;
        }
        self.counted.link_changes += 1;
        tracing::info!("port {number}: link {}", if up { "up" } else { "down" });
        Some(if up { PortState::LinkUp } else { PortState::LinkDown })
    }
}
