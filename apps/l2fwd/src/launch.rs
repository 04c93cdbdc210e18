//! Forwarding on all lcores at once, with the control thread beside them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use vireo_drivers::memory::PortMemory;
use vireo_drivers::port::QueueSizes;
use vireo_eal::dma::Pool;
use vireo_eal::lcore::{Lcores, StopFlag};
use vireo_eal::{Error, ErrorKind, Result};

use crate::control::{Control, Managed, PortState, Queues};
use crate::forward::{AnyLane, PairCounts, forward_any};
use crate::recall::Recall;

/// The clock is read once in so many rounds of polling.
const ROUNDS_PER_LOOK: u32 = 64;

/// What all lcores share.
#[derive(Clone, Copy, Debug)]
pub struct Shared<'a> {
    /// The lcores there are.
    pub lcores: &'a Lcores,
    /// Ends the run.
    pub stop: &'a StopFlag,
    /// For rings.
    pub memory: &'a PortMemory,
    /// For packets.
    pub pool: &'a Arc<Pool>,
    /// Descriptors of each queue.
    pub sizes: QueueSizes,
    /// Pairs of queues of each port.
    pub pairs: u16,
    /// Of each pair, by number.
    pub counts: &'a [PairCounts],
    /// Gets the ticks of polls that moved packets, if they are wanted.
    pub busy_ticks: Option<&'a AtomicU64>,
}

/// What an lcore has to do.
#[derive(Debug, Default)]
pub struct Share {
    /// NUMA node that it takes packet buffers from, where that makes a difference.
    pub node: Option<u32>,
    /// What it polls and sends to.
    pub lanes: Vec<AnyLane>,
}

/// Forwards the lanes of `shares` (by lcore) until the run is to stop, and calls `tick` now and then on the main
/// lcore. `ports`, of which those with numbers in `enabled` are started, are looked after meanwhile, and `announce` is called
/// with what becomes of them. Gives the queues of the ports that work at the end.
///
/// # Errors
/// When an lcore cannot be pinned, or panicked.
pub fn forward_on_lcores(
    shared: Shared<'_>,
    ports: &mut [Managed],
    enabled: &[usize],
    mut shares: BTreeMap<u32, Share>,
    announce: &(dyn Fn(usize, PortState) + Sync),
    mut tick: impl FnMut(),
) -> Result<Queues> {
    let Shared { lcores, stop, memory, pool, sizes, pairs, .. } = shared;
    let main = lcores.main_id();
    let own = shares.remove(&main).unwrap_or_default();
    let ids: Vec<u32> = shares.keys().copied().chain([main]).collect();
    let recall = Recall::new(stop);
    let (mut queues, lanes) = thread::scope(|scope| {
        let control = Control::new(ports, enabled, &ids, (memory, sizes, pairs), pool, &recall, announce);
        let control = thread::Builder::new()
            .name("vireo-control".into())
            .spawn_scoped(scope, move || control.run(stop))
            .map_err(|error| Error::io("cannot start the control thread", &error))
            .inspect_err(|_| stop.set())?;
        let recall = &recall;
        let mut workers = Vec::with_capacity(shares.len());
        for (id, share) in shares {
            let worker = lcores.launch_in(scope, id, move |_| run_lanes(shared, recall, id, share, || ()));
            workers.push(worker.inspect_err(|_| stop.set())?);
        }
        let idle = own.lanes.is_empty();
        let mut round = 0_u32;
        let lanes = lcores.run_main(|_| {
            run_lanes(shared, recall, main, own, || {
                round = round.wrapping_add(1);
                if idle {
                    // A main lcore without ports only prints: it leaves its core to others.
                    thread::sleep(Duration::from_millis(1));
                } else if !round.is_multiple_of(ROUNDS_PER_LOOK) {
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
            Error::new(ErrorKind::Protocol, "cannot end in order", "the control thread panicked; see above")
        })?;
        Ok::<_, Error>((queues, lanes))
    })?;
    lanes.into_iter().chain(recall.into_lanes()).for_each(|lane| queues.put(lane));
    Ok(queues)
}

/// Forwards `lanes` on lcore `id`, and those that it gets later, until the run is to stop.
fn run_lanes(
    shared: Shared<'_>,
    recall: &Recall,
    id: u32,
    Share { node, mut lanes }: Share,
    mut tick: impl FnMut(),
) -> Vec<AnyLane> {
    loop {
        let mut cache = shared.pool.cache_near(node);
        lanes = forward_any(lanes, &mut cache, shared.counts, shared.busy_ticks, shared.stop, &mut tick);
        // A port that starts again may need the buffers that are left in it.
        drop(cache);
        if shared.stop.is_set() {
            return lanes;
        }
        recall.look(id, &mut lanes);
    }
}
