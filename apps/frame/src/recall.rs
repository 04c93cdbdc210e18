//! How lanes leave their lcores and return while a port restarts, at no cost to packets of the other lanes.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::PoisonError;
use std::time::Duration;

use vireo_drivers::table::{RxQueue, TxQueue};
use vireo_eal::clock::monotonic;
use vireo_eal::lcore::StopFlag;
use vireo_eal::sync::{Condvar, Mutex, MutexGuard};

use crate::forward::Lane;

#[cfg(test)]
#[cfg(loom)]
mod models;

/// Interval at which a wait for lcores checks whether the program is to stop.
const STOP_CHECK_PERIOD: Duration = Duration::from_millis(10);

/// Lanes to recall, by the numbers of their queue pairs.
#[derive(Clone, Debug)]
pub(crate) enum Wanted {
    /// Those from or to one of these pairs.
    At(Range<usize>),
    /// Those from one of these pairs.
    From(BTreeSet<usize>),
}

impl Wanted {
    fn includes<R, T, H>(&self, lane: &Lane<R, T, H>) -> bool {
        match self {
            Self::At(pairs) => pairs.contains(&lane.from) || pairs.contains(&lane.to),
            Self::From(pairs) => pairs.contains(&lane.from),
        }
    }
}

/// Handover point for lanes. Lcores visit it when the [`StopFlag`] is raised without a stop.
#[derive(Debug)]
pub(crate) struct Recall<H, R = RxQueue, T = TxQueue> {
    stop: StopFlag,
    state: Mutex<State<H, R, T>>,
    all_visited: Condvar,
}

#[derive(Debug)]
struct State<H, R, T> {
    /// Lanes that are recalled; `None` when lanes are returned.
    wanted: Option<Wanted>,
    /// Lanes that no lcore polls, each with the lcore that it belongs to.
    lanes: Vec<(u32, Lane<R, T, H>)>,
    /// Lcores that have not visited since the last call.
    awaited: BTreeSet<u32>,
    /// When the last of them visited, by the monotonic clock.
    last_visit: Duration,
}

impl<H, R, T> Recall<H, R, T> {
    /// Creates a handover point without lanes. It stops waiting for lcores when `stop` is set.
    pub(crate) fn new(stop: &StopFlag) -> Self {
        let state =
            State { wanted: None, lanes: Vec::new(), awaited: BTreeSet::new(), last_visit: Duration::ZERO };
        Self { stop: stop.clone(), state: Mutex::new(state), all_visited: Condvar::new() }
    }

    /// Locks the state, even after an lcore panicked with the lock held: lanes are moved whole.
    fn state(&self) -> MutexGuard<'_, State<H, R, T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over the lanes that are recalled from `lcore`, or takes the lanes that are returned to it. Call
    /// this when the flag is raised. Does not wait for other lcores.
    pub(crate) fn visit(&self, lcore: u32, lanes: &mut Vec<Lane<R, T, H>>) {
        let mut state = self.state();
        if !state.awaited.remove(&lcore) {
            return;
        }
        match state.wanted.clone() {
            Some(wanted) => {
                let recalled = lanes.extract_if(.., |lane| wanted.includes(lane));
                state.lanes.extend(recalled.map(|lane| (lcore, lane)));
            }
            None => {
                lanes.extend(state.lanes.extract_if(.., |(home, _)| *home == lcore).map(|(_, lane)| lane))
            }
        }
        if state.awaited.is_empty() {
            state.last_visit = monotonic();
            self.stop.resume();
            self.all_visited.notify_all();
        }
    }

    /// Takes the `wanted` lanes from `lcores`. If the program stops, takes only the lanes that
    /// they have handed over.
    pub(crate) fn take(&self, wanted: Wanted, lcores: &[u32]) -> Vec<(u32, Lane<R, T, H>)> {
        std::mem::take(&mut self.call(Some(wanted), Vec::new(), lcores).lanes)
    }

    /// Returns `lanes` to their lcores, and the time at which the last lcore had its own. If the program stops before the
    /// lcores visit, the lanes are left to [`Recall::into_lanes`].
    pub(crate) fn give(&self, lanes: Vec<(u32, Lane<R, T, H>)>, lcores: &[u32]) -> Duration {
        self.call(None, lanes, lcores).last_visit
    }

    /// Calls `lcores`, and waits until all of them have visited or the program is to stop.
    fn call(
        &self,
        wanted: Option<Wanted>,
        lanes: Vec<(u32, Lane<R, T, H>)>,
        lcores: &[u32],
    ) -> MutexGuard<'_, State<H, R, T>> {
        let mut state = self.state();
        state.wanted = wanted;
        state.lanes.extend(lanes);
        state.awaited = lcores.iter().copied().collect();
        self.stop.interrupt();
        while !state.awaited.is_empty() && !self.stop.is_set() {
            let waited = self.all_visited.wait_timeout(state, STOP_CHECK_PERIOD);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    /// Returns the lanes that no lcore has taken. Call this when all lcores have ended.
    pub(crate) fn into_lanes(self) -> impl Iterator<Item = Lane<R, T, H>> {
        self.state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .lanes
            .into_iter()
            .map(|(_, lane)| lane)
    }
}
