//! The control thread: inspects the ports while lcores forward, and restarts a port whose device misbehaves.

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use vireo_drivers::port::Nic;
use vireo_eal::lcore::StopFlag;

use crate::idle::IdleQueues;
use crate::ports::PortResources;
use crate::recall::Recall;
use crate::supervised::SupervisedPort;

/// Time between two inspections of the ports.
const INSPECTION_PERIOD: Duration = Duration::from_millis(100);
/// Minimum time between two starts of a port, so that a device that always misbehaves does not keep the
/// thread busy.
const RESTART_PERIOD: Duration = Duration::from_millis(500);

/// State that a port enters while the lcores forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// The device misbehaves or completes nothing. The port is stopped and started again.
    Restarting,
    /// The port is up again after a restart.
    Running,
    /// The kernel asked for the device back, and the port is closed.
    Closed,
    /// The link came up.
    LinkUp,
    /// The link went down.
    LinkDown,
}

/// A lane without its queues.
#[derive(Debug)]
struct ParkedLane<H> {
    lcore: u32,
    from: usize,
    to: usize,
    hook: H,
}

/// The control thread's view of a run.
pub(crate) struct Control<'a, H> {
    /// All ports.
    pub(crate) ports: &'a mut [SupervisedPort],
    /// Numbers of the started ports.
    pub(crate) used: &'a BTreeSet<usize>,
    /// Lcores that forward.
    pub(crate) lcores: &'a [u32],
    /// What a port needs to start. No cache of the pool is kept here, because a starting port needs the
    /// buffers that another port returned.
    pub(crate) resources: &'a PortResources,
    /// Handover point for lanes.
    pub(crate) recall: &'a Recall<H>,
    /// Interval at which all lanes leave their loops and go on, if any.
    pub(crate) untie_period: Option<Duration>,
    /// Called with each state that a port enters.
    pub(crate) announce: &'a (dyn Fn(usize, PortState) + Sync),
}

/// Working state of the control thread.
struct Supervisor<'a, H> {
    control: Control<'a, H>,
    /// Queues that no lcore polls. They are in no lane, or a port at either end of their lane is down.
    queues: IdleQueues,
    /// Lanes without their queues, which wait for a port at either end to come up.
    parked: Vec<ParkedLane<H>>,
}

impl<H> Control<'_, H> {
    /// Inspects the ports until `stop`. [`thread::Thread::unpark`] triggers the next inspection at once.
    /// Takes the `queues` that no lcore polls, and returns those that no lcore polls in the end.
    pub(crate) fn run(self, queues: IdleQueues, stop: &StopFlag) -> IdleQueues {
        let used = self.used;
        let Control { untie_period, recall, lcores, .. } = self;
        let mut supervisor = Supervisor { control: self, queues, parked: Vec::new() };
        let mut last_untied = Instant::now();
        while !stop.is_set() {
            for number in used {
                supervisor.inspect(*number);
                supervisor.control.ports[*number].publish();
            }
            if untie_period.is_some_and(|period| last_untied.elapsed() >= period) {
                recall.give(Vec::new(), lcores);
                last_untied = Instant::now();
            }
            thread::park_timeout(INSPECTION_PERIOD);
        }
        supervisor.queues
    }
}

impl<H> Supervisor<'_, H> {
    fn inspect(&mut self, number: usize) {
        let announce = self.control.announce;
        let SupervisedPort { open, is_down, last_start, counted, .. } = &mut self.control.ports[number];
        let Some(open) = open else { return };
        if open.release_requested() {
            tracing::warn!("port {number}: the kernel requests {} back; closing the port", open.name);
            if *is_down {
                self.control.ports[number].stop(None, &mut self.control.resources.pool.cache());
            } else if !self.stop(number) {
                return;
            }
            self.control.ports[number].open = None;
            announce(number, PortState::Closed);
        } else if last_start.elapsed() < RESTART_PERIOD {
            // Too early to inspect or restart the port.
        } else if *is_down {
            self.bring_up(number);
        } else if let Err(error) = open.port.check() {
            tracing::warn!("port {number}: {error}; restarting the port");
            counted.restarts += 1;
            announce(number, PortState::Restarting);
            if self.stop(number) {
                self.bring_up(number);
            }
        } else if let Some(state) = self.control.ports[number].link_change(number) {
            announce(number, state);
        }
    }

    /// Stops port `number` after its lanes have left their lcores. Returns false if the program is to stop
    /// before they have.
    fn stop(&mut self, number: usize) -> bool {
        let Control { recall, lcores, resources, .. } = self.control;
        for (lcore, lane) in recall.take(self.queues.numbers(number), lcores) {
            let (from, to) = (lane.from, lane.to);
            let hook = self.queues.put(lane);
            self.parked.push(ParkedLane { lcore, from, to, hook });
        }
        let Some(queues) = self.queues.take_port(number) else { return false };
        let port = &mut self.control.ports[number];
        port.is_down = true;
        port.stop(Some(queues), &mut resources.pool.cache());
        if let Some(error) = &port.unconfirmed {
            tracing::error!("port {number}: {error}");
        }
        true
    }

    /// Starts port `number`, which is down, and returns lanes to their lcores if both of their ends are up.
    fn bring_up(&mut self, number: usize) {
        let port = &mut self.control.ports[number];
        let Some(open) = &mut port.open else { return };
        port.last_start = Instant::now();
        match self.control.resources.start(open) {
            Ok(queues) => self.queues.put_port(number, queues),
            Err(error) => return tracing::debug!("port {number} stays down: {error}"),
        }
        tracing::info!("port {number} is up again");
        (port.is_down, port.unconfirmed) = (false, None);
        port.status.update(|status| status.is_started = true);
        let mut lanes = Vec::new();
        for ParkedLane { lcore, from, to, hook } in std::mem::take(&mut self.parked) {
            match self.queues.join(from, to, hook) {
                Ok(lane) => lanes.push((lcore, lane)),
                Err(hook) => self.parked.push(ParkedLane { lcore, from, to, hook }),
            }
        }
        self.control.recall.give(lanes, self.control.lcores);
        (self.control.announce)(number, PortState::Running);
    }
}
