//! Sleep of an lcore whose lanes have nothing to do, until one of their devices interrupts.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use vireo_drivers::port::RxBurst;
use vireo_eal::clock::Tsc;
use vireo_eal::event::wait_for_any;
use vireo_eal::lcore::StopFlag;

use crate::counts::LcoreTicks;
use crate::forward::{BusyTicks, Lane, Meter};

#[cfg(test)]
mod tests;

/// When an lcore sleeps.
#[derive(Clone, Copy, Debug)]
pub struct Sleep<'a> {
    /// Number of polls of each lane after which the lcore sleeps, if none of them moved packets.
    pub idle_polls: u32,
    /// Longest sleep, for an lcore that has more to do than its lanes.
    pub longest: Option<Duration>,
    /// Where sleeps are counted.
    pub counts: &'a LcoreTicks,
}

/// A lane that can wake its lcore: see [`RxBurst`].
pub(crate) trait Wakes {
    /// See [`RxBurst::event`].
    fn event(&self) -> Option<BorrowedFd<'_>>;
    /// See [`RxBurst::arm`].
    fn arm(&mut self) -> bool;
    /// See [`RxBurst::disarm`].
    fn disarm(&mut self);
}

impl<R: RxBurst, T, H> Wakes for Lane<R, T, H> {
    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.rx.event()
    }

    fn arm(&mut self) -> bool {
        self.rx.arm()
    }

    fn disarm(&mut self) {
        self.rx.disarm();
    }
}

impl Sleep<'_> {
    /// Sleeps until a packet arrives for one of `lanes` or `stop` is raised. Returns at once if that is already so, or
    /// `stop` has no event.
    pub(crate) fn until_woken(&self, lanes: &mut [impl Wakes], stop: &StopFlag) {
        // A flag that is raised after this look at it signals its event, and ends the wait.
        if let Some(stopped) = stop.event()
            && lanes.iter_mut().all(Wakes::arm)
            && !stop.is_raised()
        {
            let since = Tsc::now();
            wait_for_any(lanes.iter().filter_map(Wakes::event).chain([stopped.as_fd()]), self.longest);
            self.counts.sleeps.add(1);
            self.counts.asleep.add(Tsc::now().wrapping_sub(since));
        }
        lanes.iter_mut().for_each(Wakes::disarm);
    }
}

/// Counts polls in a row that moved no packets.
#[derive(Debug)]
pub(crate) struct IdlePolls<'a> {
    busy: Option<BusyTicks<'a>>,
    polls: u64,
    limit: u64,
}

impl<'a> IdlePolls<'a> {
    /// Starts to count the polls of `lanes` lanes. The ticks of the others go to `busy`, if given.
    pub(crate) fn new(sleep: Sleep<'_>, lanes: usize, busy: Option<BusyTicks<'a>>) -> Self {
        Self { busy, polls: 0, limit: u64::from(sleep.idle_polls) * lanes as u64 }
    }

    /// Starts again.
    pub(crate) fn restart(&mut self) {
        self.polls = 0;
    }
}

impl Meter for IdlePolls<'_> {
    #[inline(always)]
    fn begin(&mut self) {
        if let Some(busy) = &mut self.busy {
            busy.begin();
        }
    }

    #[inline(always)]
    fn end(&mut self, busy: bool) {
        if let Some(ticks) = &mut self.busy {
            ticks.end(busy);
        }
        self.polls = if busy { 0 } else { self.polls + 1 };
    }

    #[inline(always)]
    fn is_idle(&self) -> bool {
        self.polls >= self.limit
    }
}
