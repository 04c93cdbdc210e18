//! Time that the steps of a device's acquisition take.

use std::time::{Duration, Instant};

use crate::clock::thread_time;
use crate::ioctl::{self, Calls};

/// Step of a device's acquisition, and how long it took.
#[derive(Clone, Debug)]
pub struct Phase {
    /// `open`, `bind` or `attach`.
    pub name: &'static str,
    /// Elapsed time, in the kernel and in this process.
    pub took: Duration,
    /// CPU time of the thread. It waited for the rest of `took`.
    pub worked: Duration,
    /// Calls to VFIO and iommufd during the step, including those of other threads.
    pub calls: Vec<Calls>,
}

/// Stopwatch of the acquisition.
pub(super) struct Phases {
    since: Instant,
    /// [`thread_time`] at `since`.
    worked: Duration,
    /// [`ioctl::table`] at `since`.
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
