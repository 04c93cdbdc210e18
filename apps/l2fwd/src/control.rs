//! The control thread: looks after the ports while lcores forward, and restarts one whose device broke a rule.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use vireo_drivers::memory::PortMemory;
use vireo_drivers::port::{Leftover, Nic, QueueSizes, QueueStats, RxBurst, TxBurst};
use vireo_drivers::ports::OpenPort;
use vireo_drivers::table::{RxQueue, TxQueue};
use vireo_eal::Error;
use vireo_eal::dma::{Pool, PoolCache};
use vireo_eal::lcore::StopFlag;

use crate::forward::{AnyLane, Lane};
use crate::recall::Recall;

/// Time between two looks at the ports.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Shortest time between two restarts of a port: a device that misbehaves forever must not keep the thread busy.
const RESTART_EVERY: Duration = Duration::from_millis(500);

/// Queues of started ports while no lcore has them, by number: pairs are counted over all ports, as many for each.
#[derive(Debug)]
pub struct Queues {
    /// Pairs of a port.
    pairs: usize,
    rx: BTreeMap<usize, RxQueue>,
    tx: BTreeMap<usize, TxQueue>,
}

impl Queues {
    /// None, for ports with so many pairs each.
    pub fn new(pairs: usize) -> Self {
        Self { pairs, rx: BTreeMap::new(), tx: BTreeMap::new() }
    }

    /// Numbers of the pairs of `port`.
    pub fn numbers(&self, port: usize) -> Range<usize> {
        port * self.pairs..(port + 1) * self.pairs
    }

    /// Keeps the queues of `port`.
    pub fn put_port(&mut self, port: usize, queues: Vec<(RxQueue, TxQueue)>) {
        for (number, (rx, tx)) in self.numbers(port).zip(queues) {
            self.rx.insert(number, rx);
            self.tx.insert(number, tx);
        }
    }

    /// Gives the queues of `port`, if all are here.
    pub fn take_port(&mut self, port: usize) -> Option<Vec<(RxQueue, TxQueue)>> {
        let numbers = self.numbers(port);
        if !numbers.clone().all(|number| self.rx.contains_key(&number) && self.tx.contains_key(&number)) {
            return None;
        }
        numbers.map(|number| Some((self.rx.remove(&number)?, self.tx.remove(&number)?))).collect()
    }

    /// Makes a lane from the receiving half of one pair to the sending half of another, if both are here.
    pub fn join(&mut self, from: usize, to: usize, ethernet: Option<[u8; 12]>) -> Option<AnyLane> {
        if !self.tx.contains_key(&to) {
            return None;
        }
        let rx = self.rx.remove(&from)?;
        Some(Lane { rx, from, tx: self.tx.remove(&to)?, to, ethernet })
    }

    /// Takes `lane` apart.
    pub fn put(&mut self, lane: AnyLane) {
        self.rx.insert(lane.from, lane.rx);
        self.tx.insert(lane.to, lane.tx);
    }
}

/// A port of the run, and what it counted before its last restart.
#[derive(Debug)]
pub struct Managed {
    /// The port, until the kernel has it back.
    pub open: Option<OpenPort>,
    /// Counts of RX queues that are gone.
    pub rx: QueueStats,
    /// Counts of TX queues that are gone.
    pub tx: QueueStats,
    /// What the device dropped before, by name.
    pub drops: BTreeMap<&'static str, u64>,
    /// What its stops threw away.
    pub leftover: Leftover,
    /// How often it was restarted.
    pub restarts: u64,
    /// How often its link was seen to change; of NICs.
    pub link_changes: u64,
    /// Whether its link was up at the last look; `None` for a virtual port, which has a peer instead of a link.
    link_up: Option<bool>,
    /// Whether it is stopped, and is to be started.
    down: bool,
    /// When it was started last, or that was tried.
    tried: Instant,
    /// Why it did not confirm its last stop: packet buffers are with it.
    pub unconfirmed: Option<Error>,
}

impl Managed {
    /// A port that was just started.
    pub fn new(open: OpenPort) -> Self {
        let (rx, tx, drops, leftover) = Default::default();
        let link_up = open.report.is_some().then(|| open.port.link().up);
        Self {
            open: Some(open),
            rx,
            tx,
            drops,
            leftover,
            restarts: 0,
            link_changes: 0,
            link_up,
            down: false,
            tried: Instant::now(),
            unconfirmed: None,
        }
    }

    /// Stops the port, and adds what it counted. A port that is down has no queues: if it did not confirm its stop, that
    /// is tried again.
    pub fn stop(&mut self, queues: Option<Vec<(RxQueue, TxQueue)>>, cache: &mut PoolCache) {
        let Some(OpenPort { port, .. }) = &mut self.open else { return };
        self.unconfirmed = match queues {
            None => port.retry_stop(cache),
            Some(queues) => {
                for (rx, tx) in &queues {
                    self.rx += rx.stats();
                    self.tx += tx.stats();
                }
                let stopped = port.stop_pairs(queues, cache, None);
                for (name, count) in port.device_drops() {
                    *self.drops.entry(name).or_default() += count;
                }
                stopped
            }
        }
        .err();
        self.leftover = port.leftover();
    }

    /// Notes a change of the link, and gives it.
    fn look_at_link(&mut self, number: usize) -> Option<PortState> {
        let (open, link_up) = (self.open.as_ref()?, self.link_up.as_mut()?);
        let up = open.port.link().up;
        if std::mem::replace(link_up, up) == up {
            return None;
        }
        self.link_changes += 1;
        tracing::info!("port {number}: link {}", if up { "up" } else { "down" });
        Some(if up { PortState::LinkUp } else { PortState::LinkDown })
    }
}

/// What becomes of a port while the lcores forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// Its device broke a rule or completes nothing: it is stopped and started again.
    Restarting,
    /// It is up again after a restart.
    Running,
    /// The kernel wanted it back, and has it.
    Closed,
    /// Its link came up.
    LinkUp,
    /// Its link went down.
    LinkDown,
}

/// A lane without its queues, and its lcore.
#[derive(Clone, Copy, Debug)]
struct Route {
    lcore: u32,
    from: usize,
    to: usize,
    ethernet: Option<[u8; 12]>,
}

/// What the control thread works with.
pub struct Control<'a> {
    ports: &'a mut [Managed],
    enabled: &'a [usize],
    lcores: &'a [u32],
    rings: (&'a PortMemory, QueueSizes, u16),
    /// No cache of it is kept here: a port that starts needs what another port gave back.
    pool: &'a Arc<Pool>,
    recall: &'a Recall,
    announce: &'a (dyn Fn(usize, PortState) + Sync),
    /// Queues that no lcore has, because their port is down or the one that they forward to or from.
    queues: Queues,
    /// The lanes that they are to be again.
    routes: Vec<Route>,
}

impl<'a> Control<'a> {
    /// Of `ports`, those with numbers in `enabled` are looked after: they are started, and `lcores` forward between
    /// them. `rings` says where rings are made, how many descriptors they have, and how many pairs a port has. `announce`
    /// is called with what becomes of a port.
    pub fn new(
        ports: &'a mut [Managed],
        enabled: &'a [usize],
        lcores: &'a [u32],
        rings: (&'a PortMemory, QueueSizes, u16),
        pool: &'a Arc<Pool>,
        recall: &'a Recall,
        announce: &'a (dyn Fn(usize, PortState) + Sync),
    ) -> Self {
        let queues = Queues::new(rings.2.into());
        Self { ports, enabled, lcores, rings, pool, recall, announce, queues, routes: Vec::new() }
    }

    /// Looks after the ports until `stop`; [`thread::Thread::unpark`] makes it look at once. Gives the queues
    /// that no lcore had then.
    pub fn run(mut self, stop: &StopFlag) -> Queues {
        while !stop.is_set() {
            self.enabled.iter().for_each(|number| self.look_at(*number));
            thread::park_timeout(LOOK_EVERY);
        }
        self.queues
    }

    fn look_at(&mut self, number: usize) {
        let Managed { open, down, tried, restarts, .. } = &mut self.ports[number];
        let Some(open) = open else { return };
        if open.is_asked_back() {
            tracing::warn!("port {number}: the kernel wants {} back; it is closed", open.name);
            if *down {
                self.ports[number].stop(None, &mut self.pool.cache());
            } else if !self.stop(number) {
                return;
            }
            self.ports[number].open = None;
            (self.announce)(number, PortState::Closed);
        } else if tried.elapsed() < RESTART_EVERY {
            // Soon.
        } else if *down {
            self.bring_up(number);
        } else if let Err(error) = open.port.check() {
            tracing::warn!("port {number}: {error}; it is restarted");
            *restarts += 1;
            (self.announce)(number, PortState::Restarting);
            if self.stop(number) {
                self.bring_up(number);
            }
        } else if let Some(state) = self.ports[number].look_at_link(number) {
            (self.announce)(number, state);
        }
    }

    /// Stops port `number`, whose lanes leave their lcores; false when the program is to stop before they came.
    fn stop(&mut self, number: usize) -> bool {
        for (lcore, lane) in self.recall.take(self.queues.numbers(number), self.lcores) {
            let Lane { from, to, ethernet, .. } = lane;
            self.routes.push(Route { lcore, from, to, ethernet });
            self.queues.put(lane);
        }
        let Some(queues) = self.queues.take_port(number) else { return false };
        let port = &mut self.ports[number];
        port.down = true;
        port.stop(Some(queues), &mut self.pool.cache());
        if let Some(error) = &port.unconfirmed {
            tracing::error!("port {number}: {error}");
        }
        true
    }

    /// Starts port `number`, which is down, and gives back the lanes of which both ends are there.
    fn bring_up(&mut self, number: usize) {
        let port = &mut self.ports[number];
        let Some(open) = &mut port.open else { return };
        port.tried = Instant::now();
        let (memory, sizes, pairs) = self.rings;
        let mut near = self.pool.cache_near(memory.node_of(open));
        match open.port.start_pairs(memory.of(open), &mut near, sizes, pairs) {
            Ok(queues) => self.queues.put_port(number, queues),
            Err(error) => return tracing::debug!("port {number} stays down: {error}"),
        }
        tracing::info!("port {number} is up again");
        (port.down, port.unconfirmed) = (false, None);
        let mut lanes = Vec::new();
        self.routes.retain(|&Route { lcore, from, to, ethernet }| {
            let lane = self.queues.join(from, to, ethernet);
            let waits = lane.is_none();
            lanes.extend(lane.map(|lane| (lcore, lane)));
            waits
        });
        self.recall.give(lanes, self.lcores);
        (self.announce)(number, PortState::Running);
    }
}
