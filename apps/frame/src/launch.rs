//! Forwarding on all lcores, with the control thread alongside.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use vireo_eal::event::wait_for_any;
use vireo_eal::{Error, ErrorKind, Result};

use crate::app::App;
use crate::caches::CachesByNode;
use crate::control::{Control, PortState};
use crate::counts::Counts;
use crate::forward::{AnyLane, Polling, forward_any, forward_any_general, forward_by_node};
use crate::hook::Hook;
use crate::idle::IdleQueues;
use crate::ports::PortResources;
use crate::recall::Recall;
use crate::sleep::Sleep;
use crate::supervised::SupervisedPort;

/// Polling rounds per call of the application's `tick`, which reads a clock.
const ROUNDS_PER_TICK: u32 = 64;

/// Time between two calls of `tick` while the main lcore has no packets.
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
    /// NUMA node of each queue pair's packet buffers; `None` means any node.
    pub(crate) nodes: &'a [Option<u32>],
}

/// Forwards the lanes of `shares`, keyed by lcore, until the run is to stop, and calls `tick` periodically on
/// the main lcore. Meanwhile the control thread supervises the `ports` whose numbers are in `used`, which are
/// started. `idle` has their queues that are in no lane. `announce` is called with each state that a port
/// enters. Returns the queues of the ports that are up at the end.
///
/// # Errors
/// When an lcore cannot be pinned or panicked, or the control thread cannot be started or panicked.
pub(crate) fn forward_on_lcores<H: Hook>(
    shared: Shared<'_>,
    (ports, used, idle): (&mut [SupervisedPort], &BTreeSet<usize>, IdleQueues),
    mut shares: BTreeMap<u32, Vec<AnyLane<H>>>,
    announce: &(dyn Fn(usize, PortState) + Sync),
    mut tick: impl FnMut(),
) -> Result<IdleQueues> {
    let Shared { app: App { eal, stop, .. }, resources, untie_period, sleep_after, .. } = shared;
    let lcores = &eal.lcores;
    let main = lcores.main_id();
    let own = shares.remove(&main).unwrap_or_default();
    let ids: Vec<u32> = shares.keys().copied().chain([main]).collect();
    let recall = Recall::new(stop);
    let (mut queues, lanes) = thread::scope(|scope| {
        let control =
            Control { ports, used, lcores: &ids, resources, recall: &recall, untie_period, announce };
        let control = thread::Builder::new()
            .name("vireo-control".into())
            .spawn_scoped(scope, move || control.run(idle, stop))
            .map_err(|error| Error::io("cannot start the control thread", &error))
            .inspect_err(|_| stop.set())?;
        let recall = &recall;
        let mut workers = Vec::with_capacity(shares.len());
        for (id, share) in shares {
            let worker = lcores.launch_in(scope, id, move |_| run_lanes(shared, recall, id, share, || ()));
            workers.push(worker.inspect_err(|_| stop.set())?);
        }
        let only_ticks = own.is_empty();
        // An lcore that sleeps may do only one round at a time.
        let rounds_per_tick = if sleep_after.is_some() { 1 } else { ROUNDS_PER_TICK };
        let mut round = 0_u32;
        let lanes = lcores.run_main(|_| {
            run_lanes(shared, recall, main, own, || {
                round = round.wrapping_add(1);
                if only_ticks {
                    // A main lcore without lanes leaves its core to other threads between ticks.
                    wait_for_any(stop.event(), Some(TICK_PERIOD));
                } else if !round.is_multiple_of(rounds_per_tick) {
                    return;
                }
                tick();
            })
        });
        let mut lanes = lanes.inspect_err(|_| stop.set())?;
        for worker in workers {
            lanes.extend(worker.join()?);
        }
        control.thread().unpark();
        let queues = control.join().map_err(|_| {
            let why = "the control thread panicked (its message is above)";
            Error::new(ErrorKind::Protocol, "cannot shut down cleanly", why)
        })?;
        Ok::<_, Error>((queues, lanes))
    })?;
    for lane in lanes.into_iter().chain(recall.into_lanes()) {
        queues.put(lane);
    }
    Ok(queues)
}

/// Forwards `lanes` on lcore `id`, and lanes that the lcore gets later, until the run is to stop.
fn run_lanes<H: Hook>(
    Shared { app: App { stop, eal, .. }, resources, counts, ties, nodes, sleep_after, .. }: Shared<'_>,
    recall: &Recall<H>,
    id: u32,
    mut lanes: Vec<AnyLane<H>>,
    mut tick: impl FnMut(),
) -> Vec<AnyLane<H>> {
    let ticks = counts.lcore(id).inspect(|ticks| ticks.begin());
    let longest = (id == eal.lcores.main_id()).then_some(TICK_PERIOD);
    let sleep = sleep_after.zip(ticks).map(|(idle_polls, counts)| Sleep { idle_polls, longest, counts });
    let polling = Polling { busy_ticks: ticks.map(|ticks| &ticks.busy), ties, sleep };
    loop {
        // Caches are dropped after each round, because a restarting port may need the buffers left in them.
        let nodes: Vec<Option<u32>> =
            lanes.iter().map(|lane| nodes.get(lane.from).copied().flatten()).collect();
        lanes = if nodes.iter().any(|node| *node != nodes[0]) {
            let mut caches = CachesByNode::new(&resources.pool, &nodes);
            match resources.is_general() {
                false => forward_by_node(lanes, &mut caches, polling, stop, &mut tick),
                true => forward_any_general(lanes, &mut caches, polling, stop, &mut tick),
            }
        } else {
            let mut cache = resources.pool.cache_near(nodes.first().copied().flatten());
            match resources.is_general() {
                false => forward_any(lanes, &mut cache, polling, stop, &mut tick),
                true => forward_any_general(lanes, &mut cache, polling, stop, &mut tick),
            }
        };
        if stop.is_set() {
            return lanes;
        }
        recall.visit(id, &mut lanes);
    }
}
