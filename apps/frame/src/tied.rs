//! The packet path of lanes whose queues can be tied, see [`vireo_drivers::tied`].
//!
//! A lane is tied if its two rings have the same size and its hook is [`Uniform`]. It is untied to receive and
//! send what a tied lane cannot, and tied again later.

use std::os::fd::BorrowedFd;

use vireo_drivers::tied::{Polled, TieRx, TieTx, TiedLane, prepare};
use vireo_eal::dma::{Burst, PoolCache};
use vireo_eal::lcore::StopFlag;

use crate::forward::{Lane, Meter, poll, send};
use crate::hook::{Hook, Uniform};
use crate::kind::Plain;
use crate::sleep::{Sleep, Wakes};

/// Lane of [`TiedLanes`].
enum State<R: TieRx, T: TieTx, H> {
    Tied(TiedLane<R, T>, End<H>),
    Untied(Lane<R, T, H>, Untied),
    /// On its way from one of the other states to the other.
    Moving,
}

impl<R: TieRx, T: TieTx, H> Wakes for State<R, T, H> {
    fn event(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tied(tied, _) => tied.event(),
            Self::Untied(lane, _) => lane.event(),
            Self::Moving => None,
        }
    }

    fn arm(&mut self) -> bool {
        match self {
            Self::Tied(tied, _) => tied.arm(),
            Self::Untied(lane, _) => lane.arm(),
            Self::Moving => false,
        }
    }

    fn disarm(&mut self) {
        match self {
            Self::Tied(tied, _) => tied.disarm(),
            Self::Untied(lane, _) => lane.disarm(),
            Self::Moving => {}
        }
    }
}

/// What a lane consists of besides its queues.
struct End<H> {
    from: usize,
    to: usize,
    hook: H,
}

/// State of a lane that is not tied.
#[derive(Default)]
struct Untied {
    /// Packets on the way.
    burst: Burst,
    /// Tail of the RX ring from which the lane may be tied again. Ties are thus so rare, whatever the device
    /// does, that their cost does not matter.
    tie_at: usize,
}

/// Lanes that are tied while their packets allow it.
pub struct TiedLanes<R: TieRx, T: TieTx, H>(Vec<State<R, T, H>>);

impl<R: TieRx, T: TieTx, H: Hook> TiedLanes<R, T, H> {
    /// Ties those of `lanes` that can be tied. [`TiedLanes::into_lanes`] returns them.
    pub fn new(lanes: Vec<Lane<R, T, H>>, cache: &mut PoolCache) -> Self {
        let start = |lane: Lane<R, T, H>| {
            let untied = Untied { burst: Burst::new(), tie_at: lane.rx.ring().tail() };
            tie(lane, untied, cache)
        };
        Self(lanes.into_iter().map(start).collect())
    }

    /// Does the same as [`forward`](crate::forward::forward).
    #[inline(never)]
    pub fn forward(
        &mut self,
        cache: &mut PoolCache,
        stop: &StopFlag,
        meter: &mut impl Meter,
        mut tick: impl FnMut(),
    ) {
        let states = self.0.as_mut_slice();
        loop {
            for state in &mut *states {
                meter.begin();
                let busy = poll_lane(state, cache);
                meter.end(busy);
            }
            tick();
            if stop.is_raised() || meter.is_idle() {
                break;
            }
        }
    }

    /// Sleeps until a lane has something to do or `stop` is raised. Call this when the lanes are idle.
    pub(crate) fn sleep(&mut self, sleep: Sleep<'_>, stop: &StopFlag) {
        sleep.until_woken(&mut self.0, stop);
    }

    /// Sends what the lanes have received, and returns them.
    pub fn into_lanes(self, cache: &mut PoolCache) -> Vec<Lane<R, T, H>> {
        let end = |state| match state {
            State::Tied(tied, end) => Some(untie(tied, end, cache)),
            State::Untied(mut lane, mut untied) => {
                send::<Plain, _, _, _>(&mut lane, cache, &mut untied.burst);
                Some(lane)
            }
            State::Moving => None,
        };
        self.0.into_iter().filter_map(end).collect()
    }
}

/// Returns whether packets were received or sent.
#[inline(always)]
fn poll_lane<R: TieRx, T: TieTx, H: Hook>(state: &mut State<R, T, H>, cache: &mut PoolCache) -> bool {
    let State::Tied(tied, end) = state else { return poll_untied(state, cache) };
    let addresses = || match end.hook.uniform() {
        Some(Uniform::Addresses(addresses)) => Some(addresses),
        _ => None,
    };
    match tied.poll(addresses) {
        Polled::Idle => false,
        Polled::Busy => true,
        Polled::Odd => poll_odd(state, cache),
    }
}

/// Polls a lane that is not tied, and ties it if possible.
#[inline(never)]
fn poll_untied<R: TieRx, T: TieTx, H: Hook>(state: &mut State<R, T, H>, cache: &mut PoolCache) -> bool {
    let State::Untied(lane, untied) = state else { return false };
    let busy = poll::<Plain, _, _, _>(lane, cache, &mut untied.burst);
    if untied.burst.is_empty()
        && lane.rx.ring().has_reached(untied.tie_at)
        && prepare(&mut lane.rx, &mut lane.tx, cache)
        && let State::Untied(lane, untied) = std::mem::replace(state, State::Moving)
    {
        *state = tie(lane, untied, cache);
    }
    busy
}

/// Unties a lane, and polls it.
#[cold]
#[inline(never)]
fn poll_odd<R: TieRx, T: TieTx, H: Hook>(state: &mut State<R, T, H>, cache: &mut PoolCache) -> bool {
    if let State::Tied(tied, end) = std::mem::replace(state, State::Moving) {
        let lane = untie(tied, end, cache);
        lane.rx.counters().untied.add(1);
        let ring = lane.rx.ring();
        let tie_at = ring.tail().wrapping_add(ring.entries());
        *state = State::Untied(lane, Untied { burst: Burst::new(), tie_at });
    }
    poll_untied(state, cache)
}

/// Ties a lane if possible. Its burst is empty.
fn tie<R: TieRx, T: TieTx, H: Hook>(
    lane: Lane<R, T, H>,
    untied: Untied,
    cache: &mut PoolCache,
) -> State<R, T, H> {
    if lane.hook.uniform().is_none() {
        return State::Untied(lane, untied);
    }
    let Lane { rx, from, tx, to, hook } = lane;
    match TiedLane::new(rx, tx, cache) {
        Ok(tied) => State::Tied(tied, End { from, to, hook }),
        Err((rx, tx)) => State::Untied(Lane { rx, from, tx, to, hook }, untied),
    }
}

/// Sends what a tied lane has received, and unties it.
fn untie<R: TieRx, T: TieTx, H>(tied: TiedLane<R, T>, end: End<H>, cache: &mut PoolCache) -> Lane<R, T, H> {
    let End { from, to, hook } = end;
    let (rx, tx) = tied.untie(cache);
    Lane { rx, from, tx, to, hook }
}

#[cfg(test)]
pub(crate) mod tests;
