//! How lanes leave their lcores and come back while a port restarts, at no cost to the packets of the others.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::PoisonError;
use std::time::Duration;

use vireo_drivers::table::{RxQueue, TxQueue};
use vireo_eal::lcore::StopFlag;
use vireo_eal::sync::{Condvar, Mutex, MutexGuard};

use crate::forward::Lane;

#[cfg(test)]
#[cfg(loom)]
mod models;

/// How long a wait for lcores takes to see that the program is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A place where lanes change hands: lcores look in when the [`StopFlag`] is raised and no stop.
#[derive(Debug)]
pub struct Recall<R = RxQueue, T = TxQueue> {
    stop: StopFlag,
    state: Mutex<State<R, T>>,
    all_looked: Condvar,
}

#[derive(Debug)]
struct State<R, T> {
    /// Pairs whose lanes are wanted; none when lanes are given back.
    wanted: Option<Range<usize>>,
    /// Lanes that no lcore has, each with the lcore that polls it.
    lanes: Vec<(u32, Lane<R, T>)>,
    /// Lcores that have not looked since the last call.
    absent: BTreeSet<u32>,
}

impl<R, T> Recall<R, T> {
    /// With nothing to hand over, until `stop`.
    pub fn new(stop: &StopFlag) -> Self {
        let state = State { wanted: None, lanes: Vec::new(), absent: BTreeSet::new() };
        Self { stop: stop.clone(), state: Mutex::new(state), all_looked: Condvar::new() }
    }

    /// Whatever a panicking lcore left, lanes stay lanes.
    fn state(&self) -> MutexGuard<'_, State<R, T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over what is asked of `lcore`, or takes what is there for it. To be called when the flag is raised;
    /// does not wait for others.
    pub fn look(&self, lcore: u32, lanes: &mut Vec<Lane<R, T>>) {
        let mut state = self.state();
        if !state.absent.remove(&lcore) {
            return;
        }
        match state.wanted.clone() {
            Some(pairs) => {
                let recalled =
                    lanes.extract_if(.., |lane| pairs.contains(&lane.from) || pairs.contains(&lane.to));
                state.lanes.extend(recalled.map(|lane| (lcore, lane)));
            }
            None => {
                lanes.extend(state.lanes.extract_if(.., |(home, _)| *home == lcore).map(|(_, lane)| lane))
            }
        }
        if state.absent.is_empty() {
            self.stop.dismiss();
            self.all_looked.notify_all();
        }
    }

    /// The lanes from and to `pairs`, from `lcores`; what they had handed over by then if the program stops.
    pub fn take(&self, pairs: Range<usize>, lcores: &[u32]) -> Vec<(u32, Lane<R, T>)> {
        std::mem::take(&mut self.call(Some(pairs), Vec::new(), lcores).lanes)
    }

    /// Gives `lanes` to their lcores. If the program stops before they come, [`Recall::into_lanes`] has them.
    pub fn give(&self, lanes: Vec<(u32, Lane<R, T>)>, lcores: &[u32]) {
        drop(self.call(None, lanes, lcores));
    }

    /// Waits until all of `lcores` have looked, or are to stop.
    fn call(
        &self,
        wanted: Option<Range<usize>>,
        lanes: Vec<(u32, Lane<R, T>)>,
        lcores: &[u32],
    ) -> MutexGuard<'_, State<R, T>> {
        let mut state = self.state();
        state.wanted = wanted;
        state.lanes.extend(lanes);
        state.absent = lcores.iter().copied().collect();
        self.stop.call();
        while !state.absent.is_empty() && !self.stop.is_set() {
            let waited = self.all_looked.wait_timeout(state, LOOK_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    /// What no lcore has taken, when all have ended.
    pub fn into_lanes(self) -> impl Iterator<Item = Lane<R, T>> {
        self.state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .lanes
            .into_iter()
            .map(|(_, lane)| lane)
    }
}
