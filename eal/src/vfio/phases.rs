//! What the steps of an acquisition took.

use std::time::{Duration, Instant};

use crate::clock::thread_time;
use crate::ioctl::{self, Calls};

/// A step of the acquisition and how long it took.
#[derive(Clone, Debug)]
pub struct Phase {
    /// `open`, `bind` or `attach`.
    pub name: &'static str,
    /// Time in the kernel and around it.
    pub took: Duration,
    /// Of that, what the thread had on a CPU; the rest it waited.
    pub worked: Duration,
    /// Calls to VFIO and iommufd meanwhile, those of other threads too.
    pub calls: Vec<Calls>,
}

/// Stop-watch of the acquisition.
pub(super) struct Phases {
    since: Instant,
    /// [`thread_time`] of that moment.
    worked: Duration,
    /// [`ioctl::table`] of that moment.
    calls: Vec<Calls>,
    pub(super) done: Vec<Phase>,
}

impl Phases {
    pub(super) fn start() -> Self {
        let (done, calls) = (Vec::with_capacity(3), ioctl::table());
        Self { since: Instant::now(), worked: thread_time(), calls, done }
    }

    pub(super) fn end(&mut self, name: &'static str) {
        let (took, worked) = (self.since.elapsed(), thread_time().saturating_sub(self.worked));
        let calls = ioctl::since(&self.calls);
        self.done.push(Phase { name, took, worked, calls });
        self.calls = ioctl::table();
        (self.since, self.worked) = (Instant::now(), thread_time());
    }
}
