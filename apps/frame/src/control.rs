//! The control thread: inspects the ports while lcores forward, and restarts a port whose device misbehaves.

pub(crate) mod handover;
pub(crate) mod lend;
mod primary;
pub(crate) mod secondary;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use serde::Serialize;
use vireo_drivers::port::Nic;
use vireo_eal::event::{Event, wait_for_any};
use vireo_eal::handover::{Channel, Role, RunningProgram};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Result};

pub use self::handover::Handover;
use self::primary::Secondary;
pub use self::primary::SecondaryState;
use self::secondary::Standing;
use crate::forward::AnyLane;
use crate::idle::IdleQueues;
use crate::ports::PortResources;
use crate::recall::{Recall, Wanted};
use crate::supervised::SupervisedPort;

/// Time between two inspections of the ports.
pub(crate) const INSPECTION_PERIOD: Duration = Duration::from_millis(100);

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

/// Something that happens while lcores forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEvent {
    /// A port enters a state.
    Port {
        /// Number of the port.
        port: usize,
        /// The state.
        state: PortState,
    },
    /// This program forwards in place of its predecessor from now on.
    TookOver(Handover),
    /// The successor forwards in place of this program, which ends.
    HandedOver(Handover),
    /// A secondary process enters a state.
    Secondary {
        /// Number of the process.
        process: u16,
        /// Process id.
        pid: u32,
        /// The state.
        state: SecondaryState,
    },
    /// This secondary process polls queues of its primary from now on.
    Joined {
        /// Process id of the primary.
        pid: u32,
    },
}

impl fmt::Display for RunEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port { port, state } => {
                let state = match state {
                    PortState::Restarting => "restarting",
                    PortState::Running => "running",
                    PortState::Closed => "closed",
                    PortState::LinkUp => "link up",
                    PortState::LinkDown => "link down",
                };
                write!(f, "port {port}: {state}")
            }
            Self::TookOver(Handover { pid, gap }) => {
                write!(f, "took over from process {pid}: nobody polled for {} µs", gap.as_micros())
            }
            Self::HandedOver(Handover { pid, gap }) => {
                write!(f, "handed over to process {pid}: nobody polled for {} µs", gap.as_micros())
            }
            Self::Secondary { process, pid, state } => write!(f, "process {process} (pid {pid}) {state}"),
            Self::Joined { pid } => write!(f, "polling queues of process {pid}"),
        }
    }
}

/// A lane without its queues.
#[derive(Debug)]
pub(crate) struct ParkedLane<H> {
    pub(crate) lcore: u32,
    /// Numbers of the queue pairs, as in [`Lane`](crate::forward::Lane).
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) hook: H,
}

/// The control thread's view of a run.
pub(crate) struct Control<'a, H> {
    pub(crate) eal: &'a Eal,
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
    /// Called with each event.
    pub(crate) announce: &'a (dyn Fn(RunEvent) + Sync),
    /// Program whose ports this one takes over or shares, and the event that the control thread signals when it has
    /// taken over.
    pub(crate) running: Option<(&'a RunningProgram, &'a Event)>,
    /// Signaled when all lcores have ended, so that this thread ends at once, too.
    pub(crate) lcores_ended: &'a Event,
}

/// How a run ended.
pub(crate) struct Ended {
    /// Queues that no lcore polls.
    pub(crate) queues: IdleQueues,
    /// Whether a successor has the ports.
    pub(crate) is_handed_over: bool,
    /// How a secondary process stands with its primary.
    pub(crate) standing: Option<Standing>,
}

/// Working state of the control thread.
struct Supervisor<'a, H> {
    control: Control<'a, H>,
    /// Queues that no lcore polls. They are in no lane, or a port at either end of their lane is down.
    queues: IdleQueues,
    /// Lanes without their queues, which wait for a port at either end to come up.
    parked: Vec<ParkedLane<H>>,
    /// A successor that prepares to take over.
    successor: Option<Successor>,
    secondaries: Vec<Secondary<H>>,
    /// Why ports must restart whose queues a secondary process has not returned yet.
    due: BTreeMap<usize, String>,
}

/// A process that prepares to take over.
struct Successor {
    channel: Channel,
    pid: u32,
    /// Number of restarts of all ports when it was made the offer, which a restart may outdate.
    restarts: u64,
}

impl<H> Control<'_, H> {
    /// Inspects the ports until `stop`. Takes the `queues` and lanes that no lcore polls, and returns the queues that no
    /// lcore polls in the end.
    ///
    /// # Errors
    /// When a take-over fails, or when the primary refuses this process.
    pub(crate) fn run(
        self,
        queues: IdleQueues,
        parked: Vec<ParkedLane<H>>,
        stop: &StopFlag,
    ) -> Result<Ended> {
        let used = self.used;
        let Control { untie_period, recall, lcores, running, .. } = self;
        let mut supervisor = Supervisor {
            control: self,
            queues,
            parked,
            successor: None,
            secondaries: Vec::new(),
            due: BTreeMap::new(),
        };
        match running {
            None => {}
            Some((primary, _)) if primary.role() == Role::Secondary => {
                let standing = Some(supervisor.serve_primary(primary, stop)?);
                return Ok(Ended { queues: supervisor.queues, is_handed_over: false, standing });
            }
            Some((predecessor, done)) => {
                supervisor.take_over(predecessor).inspect_err(|_| stop.set())?;
                done.signal();
            }
        }
        let mut last_untied = Instant::now();
        let mut is_handed_over = false;
        while !stop.is_set() {
            for number in used {
                supervisor.inspect(*number);
                supervisor.control.ports[*number].publish();
            }
            if untie_period.is_some_and(|period| last_untied.elapsed() >= period) {
                recall.give(Vec::new(), lcores);
                last_untied = Instant::now();
            }
            is_handed_over = supervisor.serve_peers(stop);
            if is_handed_over {
                break;
            }
            wait_for_any(supervisor.events(), Some(INSPECTION_PERIOD));
        }
        supervisor.end_secondaries();
        if let Some(successor) = &supervisor.successor {
            let _ = successor.channel.refuse("it was asked to end".to_owned());
        }
        Ok(Ended { queues: supervisor.queues, is_handed_over, standing: None })
    }
}

impl<H> Supervisor<'_, H> {
    /// Events that end the wait for the next inspection: messages, changes of links, and the end of all lcores.
    fn events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let channels = self.secondaries.iter().filter_map(Secondary::channel);
        let channels = channels.chain(self.successor.as_ref().map(|successor| &successor.channel));
        // A port that must restart is not asked for its link.
        let watched = self.control.used.iter().filter(|number| !self.due.contains_key(number));
        let links = watched.filter_map(|number| self.control.ports[*number].link_event());
        channels.map(AsFd::as_fd).chain(links).chain([self.control.lcores_ended.as_fd()])
    }

    fn inspect(&mut self, number: usize) {
        let announce = self.control.announce;
        let announce = |port, state| announce(RunEvent::Port { port, state });
        let is_settled = self.control.ports[number].is_settled();
        let SupervisedPort { open, is_down, .. } = &mut self.control.ports[number];
        let Some(open) = open else { return };
        if open.release_requested() {
            tracing::warn!("port {number}: the kernel requests {} back; closing the port", open.name);
            // The kernel waits for every process that has the device open.
            let is_down = *is_down;
            if !self.end_secondaries() {
                // The kernel repeats its request.
                return;
            }
            if is_down {
                self.control.ports[number].stop(None, &mut self.control.resources.cache());
            } else if !self.stop(number) {
                return;
            }
            self.control.ports[number].open = None;
            announce(number, PortState::Closed);
        } else if !is_settled {
            // Too early to inspect or restart the port.
        } else if *is_down {
            self.bring_up(number);
        } else if let Some(why) =
            self.due.remove(&number).or_else(|| Some(open.port.check().err()?.to_string()))
        {
            if !self.restart(&[number].into(), &why) {
                self.due.insert(number, why);
            }
        } else if let Some(state) = self.control.ports[number].link_change(number) {
            announce(number, state);
        }
    }

    /// Stops port `number` after its lanes have left their lcores. Returns false if the program is to stop
    /// before they have.
    fn stop(&mut self, number: usize) -> bool {
        let Control { recall, lcores, resources, .. } = self.control;
        for (lcore, lane) in recall.take(Wanted::At(self.queues.numbers(number)), lcores) {
            let parked = self.park(lcore, lane);
            self.parked.push(parked);
        }
        let Some(queues) = self.queues.take_port(number) else { return false };
        let port = &mut self.control.ports[number];
        port.is_down = true;
        port.stop(Some(queues), &mut resources.cache());
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
        match self.control.resources.start(number, open) {
            Ok(queues) => self.queues.put_port(number, queues),
            Err(error) => return tracing::debug!("port {number} stays down: {error}"),
        }
        tracing::info!("port {number} is up again");
        (port.is_down, port.unconfirmed) = (false, None);
        port.status.update(|status| status.is_started = true);
        self.return_lanes();
        (self.control.announce)(RunEvent::Port { port: number, state: PortState::Running });
    }

    /// Separates the queues of a lane of `lcore` from the lane.
    fn park(&mut self, lcore: u32, lane: AnyLane<H>) -> ParkedLane<H> {
        let (from, to) = (lane.from, lane.to);
        ParkedLane { lcore, from, to, hook: self.queues.put(lane) }
    }

    /// Returns the lanes whose ends are both up to their lcores, and the time at which the last lcore had its own.
    fn return_lanes(&mut self) -> Duration {
        let mut lanes = Vec::new();
        for ParkedLane { lcore, from, to, hook } in std::mem::take(&mut self.parked) {
            match self.queues.join(from, to, hook) {
                Ok(lane) => lanes.push((lcore, lane)),
                Err(hook) => self.parked.push(ParkedLane { lcore, from, to, hook }),
            }
        }
        self.control.recall.give(lanes, self.control.lcores)
    }
}
