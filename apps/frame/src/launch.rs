//! Forwarding on all lcores, with the control thread alongside.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use vireo_eal::event::{Event, wait_for_any};
use vireo_eal::{Error, ErrorKind, Result};

use crate::app::App;
use crate::caches::{CachesByHome, Home};
use crate::control::{Control, Ended, ParkedLane, RunEvent};
use crate::counts::Counts;
use crate::forward::{AnyLane, Polling, forward_any, forward_any_general, forward_by_home};
use crate::hook::Hook;
use crate::idle::IdleQueues;
use crate::ports::PortResources;
use crate::recall::Recall;
use crate::sleep::Sleep;
use crate::supervised::SupervisedPort;

/// Polling rounds per call of the application's `tick`, which reads a clock.
const ROUNDS_PER_TICK: u32 = 64;

/// Time between two calls of `tick` while the main lcore has no packets or no lanes.
const TICK_PERIOD: Duration = Duration::from_millis(50);

/// State shared by all lcores.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    pub(crate) app: &'a App,
    pub(crate) resources: &'a PortResources,
    pub(crate) counts: &'a Counts,
    /// Whether lanes are tied where possible.
    pub(crate) ties: bool,
    /// See [`Control::untie_period`].
    pub(crate) untie_period: Option<Duration>,
    /// See [`Ports::sleep_after`](crate::Ports::sleep_after).
    pub(crate) sleep_after: Option<u32>,
    /// Event that ends a take-over by which the run begins.
    pub(crate) begin: Option<&'a Event>,
}

/// Forwards the lanes of `shares`, keyed by lcore, until the run is to stop, and calls `tick` periodically on
/// the main lcore. Meanwhile the control thread supervises the `ports` whose numbers are in `used`, which are
/// started. `idle` has their queues that are in no lane, `parked` the lanes that wait for their queues, which another
/// process has. `announce` is
/// called with each event. Returns the queues of the ports that are up at the end.
///
/// # Errors
/// When an lcore cannot be pinned or panicked, the control thread cannot be started or panicked, or a take-over fails.
pub(crate) fn forward_on_lcores<H: Hook>(
    shared: Shared<'_>,
    (ports, used, idle): (&mut [SupervisedPort], &BTreeSet<usize>, IdleQueues),
    mut shares: BTreeMap<u32, Vec<AnyLane<H>>>,
    parked: Vec<ParkedLane<H>>,
    announce: &(dyn Fn(RunEvent) + Sync),
    tick: impl FnMut(),
) -> Result<Ended> {
    let Shared { app: App { eal, stop, .. }, resources, untie_period, sleep_after, begin, .. } = shared;
    let lcores = &eal.lcores;
    let main = lcores.main_id();
    let own = shares.remove(&main).unwrap_or_default();
    let ids: Vec<u32> = shares.keys().copied().chain([main]).collect();
    let recall = Recall::new(stop);
    let running = eal.running().zip(begin);
    let lcores_ended = &Event::new().inspect_err(|_| stop.set())?;
    let (mut ended, lanes) = thread::scope(|scope| {
        let recall = &recall;
        let control = Control {
            eal,
            ports,
            used,
            lcores: &ids,
            resources,
            recall,
            untie_period,
            announce,
            running,
            lcores_ended,
        };
        let control = thread::Builder::new()
            .name("vireo-control".into())
            .spawn_scoped(scope, move || control.run(idle, parked, stop))
            .map_err(|error| Error::io("cannot start the control thread", &error))
            .inspect_err(|_| stop.set())?;
        let mut workers = Vec::with_capacity(shares.len());
        for (id, share) in shares {
            let worker = lcores.launch_in(scope, id, move |_| run_lanes(shared, recall, id, share, ()));
            workers.push(worker.inspect_err(|_| stop.set())?);
        }
        // An lcore that sleeps may do only one round at a time.
        let per_tick = if sleep_after.is_some() { 1 } else { ROUNDS_PER_TICK };
        let ticks = Ticks { tick, per_tick, round: 0 };
        let lanes = lcores.run_main(|_| run_lanes(shared, recall, main, own, ticks));
        let mut lanes = lanes.inspect_err(|_| stop.set())?;
        for worker in workers {
            lanes.extend(worker.join()?);
        }
        lcores_ended.signal();
        let ended = control.join().map_err(|_| {
            let why = "the control thread panicked (its message is above)";
            Error::new(ErrorKind::Protocol, "cannot shut down cleanly", why)
        })??;
        Ok::<_, Error>((ended, lanes))
    })?;
    for lane in lanes.into_iter().chain(recall.into_lanes()) {
        ended.queues.put(lane);
    }
    Ok(ended)
}

/// What an lcore does besides forwarding. A worker does nothing.
trait Rounds {
    /// Called after each round of polls.
    fn polled(&mut self) {}
    /// Called when the lcore has no lanes and has waited.
    fn waited(&mut self) {}
}

impl Rounds for () {}

/// Calls the application's `tick` on the main lcore.
struct Ticks<F> {
    tick: F,
    /// Rounds of polls per call.
    per_tick: u32,
    round: u32,
}

impl<F: FnMut()> Rounds for Ticks<F> {
    fn polled(&mut self) {
        self.round = self.round.wrapping_add(1);
        if self.round.is_multiple_of(self.per_tick) {
            (self.tick)();
        }
    }

    fn waited(&mut self) {
        (self.tick)();
    }
}

/// Forwards `lanes` on lcore `id`, and lanes that the lcore gets later, until the run is to stop.
fn run_lanes<H: Hook>(
    Shared { app: App { stop, eal, .. }, resources, counts, ties, sleep_after, .. }: Shared<'_>,
    recall: &Recall<H>,
    id: u32,
    mut lanes: Vec<AnyLane<H>>,
    mut rounds: impl Rounds,
) -> Vec<AnyLane<H>> {
    let ticks = counts.lcore(id).inspect(|ticks| ticks.begin());
    let longest = (id == eal.lcores.main_id()).then_some(TICK_PERIOD);
    let sleep = sleep_after.zip(ticks).map(|(idle_polls, counts)| Sleep { idle_polls, longest, counts });
    let polling = Polling { busy_ticks: ticks.map(|ticks| &ticks.busy), ties, sleep };
    loop {
        // An lcore without lanes leaves its CPU to others: to those of a program that is taken over, for example.
        while lanes.is_empty() && !stop.is_raised() {
            wait_for_any(stop.event(), longest.or(stop.event().is_none().then_some(TICK_PERIOD)));
            rounds.waited();
        }
        let tick = || rounds.polled();
        // Caches are dropped after each round, because a restarting port may need the buffers left in them.
        let homes: Vec<Home> = lanes.iter().map(|lane| resources.home(lane.from)).collect();
        lanes = if homes.iter().any(|home| *home != homes[0]) {
            let mut caches = CachesByHome::new(&homes, |home| resources.cache_at(home));
            match resources.is_general() {
                false => forward_by_home(lanes, &mut caches, polling, stop, tick),
                true => forward_any_general(lanes, &mut caches, polling, stop, tick),
            }
        } else {
            let mut cache = resources.cache_at(homes.first().copied().unwrap_or_default());
            match resources.is_general() {
                false => forward_any(lanes, &mut cache, polling, stop, tick),
                true => forward_any_general(lanes, &mut cache, polling, stop, tick),
            }
        };
        if stop.is_set() {
            return lanes;
        }
        recall.visit(id, &mut lanes);
    }
}
