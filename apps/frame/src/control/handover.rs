//! The control thread's part in a take-over: as the predecessor it gives all ports away, as the successor it gets them.
//! `vireo_eal::handover` has the messages, `vireo_drivers::handover` the state of a port.

use std::time::Duration;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_drivers::handover::PortRecord;
use vireo_drivers::ports::OfferedPort;
use vireo_eal::clock::monotonic;
use vireo_eal::dma::FreeBuffers;
use vireo_eal::handover::{Channel, Fds, Peer, ReceivedFds, Role, RunningProgram, Step, encode};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use super::primary::Secondary;
use super::{ParkedLane, RunEvent, Successor, Supervisor};
use crate::recall::Wanted;
use crate::supervised::SupervisedPort;

/// How long the successor waits for the predecessor's state. The predecessor looks for messages ten times per second,
/// but may be restarting a port.
const STATE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the predecessor waits with all queues in hand. After that it polls them again.
const RUNNING_PATIENCE: Duration = Duration::from_secs(1);

/// How long a process whose connection has ended may take to end itself.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// What a program tells its successor or a secondary process in advance.
#[derive(Debug, Serialize, Deserialize, Schema)]
pub(crate) struct ProgramRecord {
    pub(crate) ports: Vec<OfferedPort>,
    /// Number of packet buffers that devices receive into.
    pub(crate) buffers: u32,
    /// Started ports, for a secondary process.
    pub(crate) shared: Vec<SharedPort>,
}

/// A started port, as a secondary process needs it.
#[derive(Debug, Serialize, Deserialize, Schema)]
pub(crate) struct SharedPort {
    pub(crate) number: u32,
    pub(crate) record: PortRecord,
}

/// State of the program when no lcore polls any more.
#[derive(Debug, Serialize, Deserialize, Schema)]
struct State {
    /// When lcores stopped polling, by the monotonic clock.
    stopped: Duration,
    ports: Vec<PortState>,
}

#[derive(Debug, Serialize, Deserialize, Schema)]
struct PortState {
    number: u32,
    record: PortRecord,
    restarts: u64,
    link_changes: u64,
}

/// A take-over that moved all ports from one process to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover {
    /// Process id of the other process.
    pub pid: u32,
    /// Time in which no process polled.
    pub gap: Duration,
}

/// Passes `state` on, and returns when the successor polls the queues in it.
///
/// # Errors
/// When the successor does not poll them and never will.
fn commit(channel: &Channel, state: &State, fds: &Fds<'_>) -> Result<()> {
    channel.reply(state, fds)?;
    let running = channel.receive::<Step>(RUNNING_PATIENCE);
    // Either the message has arrived by now, or the successor cannot send it any more, and gives up.
    channel.close();
    match running.or_else(|_| channel.receive(Duration::ZERO))?.0 {
        Step::Running => Ok(()),
        Step::Ready => Err(Error::new(ErrorKind::Protocol, "cannot hand over", "it did not take the ports")),
    }
}

impl<H> Supervisor<'_, H> {
    /// Answers other processes. Returns true when a successor has taken over.
    pub(super) fn serve_peers(&mut self, stop: &StopFlag) -> bool {
        let eal = self.control.eal;
        let Some(listener) = eal.peers() else { return false };
        match listener.accept() {
            Ok(None) => {}
            Ok(Some(peer)) => {
                let pid = peer.pid;
                if let Err(error) = self.offer(peer) {
                    tracing::warn!("process {pid} is refused: {error}");
                }
            }
            Err(error) => tracing::debug!("{error}"),
        }
        self.serve_secondaries(stop);
        let has_message =
            |successor: &mut Successor| successor.channel.has_message(Duration::ZERO).unwrap_or(true);
        let Some(successor) = self.successor.take_if(has_message) else { return false };
        match successor.channel.receive::<Step>(Duration::ZERO) {
            Ok((Step::Ready, _)) => self.give_away(&successor, stop),
            _ => {
                tracing::info!("the successor has given up");
                false
            }
        }
    }

    /// Returns why a process that has introduced itself gets nothing.
    fn objection(&self, role: Role) -> Option<String> {
        let is_shared = self.control.resources.processes().count() > 1;
        match (&self.successor, role) {
            (Some(other), _) => Some(format!("process {} is taking it over already", other.pid)),
            (None, Role::Successor) if is_shared => {
                Some("it shares its ports with other processes (--num-procs)".to_owned())
            }
            (None, Role::Secondary) if !is_shared => {
                Some("it was started without --num-procs, and polls all queues itself".to_owned())
            }
            (None, _) => None,
        }
    }

    /// Offers a process that has introduced itself what it needs to prepare its ports.
    fn offer(&mut self, peer: Peer) -> Result<()> {
        let Peer { channel, pid, role, .. } = &peer;
        if let Some(why) = self.objection(*role) {
            channel.refuse(why.clone())?;
            return Err(Error::new(ErrorKind::Busy, "cannot use the ports", why));
        }
        let control = &self.control;
        let (map, mut fds) = (control.resources.memory().memory_map(), Fds::default());
        let segments = map.segments();
        let mut offer = || {
            let is_closed = || Error::new(ErrorKind::Unavailable, "cannot hand over", "a port is closed");
            let offered = control
                .ports
                .iter()
                .map(|port| OfferedPort::of(port.open.as_ref().ok_or_else(is_closed)?, map, &mut fds));
            let ports = offered.collect::<Result<Vec<_>>>()?;
            let buffers = control.resources.buffers();
            let shared = match role {
                Role::Successor => Vec::new(),
                Role::Secondary => self.shared_ports()?,
            };
            let regions = segments.iter().map(|segment| segment.region());
            control.eal.offer(regions, encode(&ProgramRecord { ports, buffers, shared })?, &mut fds)
        };
        match offer() {
            Ok(offer) => channel.reply(&offer, &fds)?,
            Err(error) => {
                channel.refuse(error.to_string())?;
                return Err(error);
            }
        }
        match role {
            Role::Successor => {
                tracing::info!("process {pid} prepares to take over");
                let Peer { channel, pid, .. } = peer;
                self.successor = Some(Successor { channel, pid, restarts: self.restarts() });
            }
            Role::Secondary => self.secondaries.push(Secondary::new(peer)),
        }
        Ok(())
    }

    /// Describes all started ports for a secondary process.
    fn shared_ports(&self) -> Result<Vec<SharedPort>> {
        let shared = |number: &usize| {
            let open = self.control.ports[*number].open.as_ref();
            let open =
                open.ok_or_else(|| Error::new(ErrorKind::Unavailable, "cannot share", "a port is closed"))?;
            Ok(SharedPort { number: *number as u32, record: self.control.resources.share(open)? })
        };
        self.control.used.iter().map(shared).collect()
    }

    /// Number of restarts of all ports.
    fn restarts(&self) -> u64 {
        self.control.ports.iter().map(|port| port.counted.restarts).sum()
    }

    /// Gives all ports to the successor. Returns false, and continues to poll, if that fails.
    fn give_away(&mut self, Successor { channel, pid, restarts }: &Successor, stop: &StopFlag) -> bool {
        let stopped = monotonic();
        let mut parked = self.park_all();
        let mut fds = Fds::default();
        let given = self.state(stopped, *restarts, &mut fds).and_then(|state| {
            commit(channel, &state, &fds)?;
            Ok(Handover { pid: *pid, gap: monotonic().saturating_sub(stopped) })
        });
        match given {
            Ok(handover) => {
                self.control.ports.iter_mut().for_each(SupervisedPort::leave);
                self.control.eal.leave();
                stop.set();
                (self.control.announce)(RunEvent::HandedOver(handover));
                true
            }
            Err(error) => {
                let _ = channel.refuse(error.to_string());
                self.control.ports.iter_mut().for_each(SupervisedPort::keep);
                self.parked.append(&mut parked);
                self.return_lanes();
                tracing::warn!("{error}; this process continues");
                false
            }
        }
    }

    /// Takes all lanes from the lcores. Returns them without their queues.
    pub(super) fn park_all(&mut self) -> Vec<ParkedLane<H>> {
        let super::Control { recall, lcores, .. } = self.control;
        let all = 0..self.queues.numbers(self.control.ports.len()).start;
        recall.take(Wanted::At(all), lcores).into_iter().map(|(lcore, lane)| self.park(lcore, lane)).collect()
    }

    /// Describes all started ports, whose queues no lcore polls, if they are as they were after `restarts`. Their
    /// descriptors are in `fds`.
    fn state(&mut self, stopped: Duration, restarts: u64, fds: &mut Fds<'_>) -> Result<State> {
        if self.restarts() != restarts {
            let why = "a port was restarted meanwhile";
            return Err(Error::new(ErrorKind::Busy, "cannot hand over", why).with_hint("try again"));
        }
        let mut ports = Vec::new();
        for &number in self.control.used {
            let port = &self.control.ports[number];
            let refused =
                |why| Err(Error::new(ErrorKind::Unavailable, format!("cannot hand over port {number}"), why));
            let Some(open) = port.open.as_ref().filter(|_| !port.is_down) else {
                return refused("it is closed or restarting");
            };
            let Some(queues) = self.queues.take_port(number) else {
                return refused("this process is about to end");
            };
            let record = self.control.resources.record(open, &queues, fds);
            self.queues.put_port(number, queues);
            let (restarts, link_changes) = (port.counted.restarts, port.counted.link_changes);
            let number = number as u32;
            ports.push(PortState { number, record: record?, restarts, link_changes });
        }
        Ok(State { stopped, ports })
    }

    /// Takes all ports over from the predecessor. If that has ended before, the ports stay down, and start anew.
    ///
    /// # Errors
    /// Why the predecessor keeps its ports.
    pub(super) fn take_over(&mut self, predecessor: &RunningProgram) -> Result<()> {
        let super::Control { eal, recall, lcores, resources, announce, .. } = self.control;
        // All lcores run and wait for lanes.
        recall.give(Vec::new(), lcores);
        let mut free = resources.pool(0).take_free();
        let channel = predecessor.channel();
        let sent = channel.send(&Step::Ready, &Fds::default());
        let state = sent.and_then(|()| channel.answer::<State>(STATE_PATIENCE));
        let (state, fds) = match state {
            Ok(answer) => answer,
            Err(error) if predecessor.has_ended(END_PATIENCE) => {
                tracing::warn!("{error}: process {} has ended; its ports are reset", predecessor.pid());
                eal.succeed();
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let resumed = self.resume(&state, &fds, &mut free);
        drop((free, fds));
        let running = resumed.and_then(|()| {
            channel.send(&Step::Running, &Fds::default()).map_err(|error| {
                let why = format!("it waited no longer, and continues ({})", error.why());
                Error::new(ErrorKind::Busy, "cannot use the ports of the running program", why)
            })
        });
        if let Err(error) = running {
            // The predecessor continues, so its devices must not be reset here.
            self.control.ports.iter_mut().for_each(SupervisedPort::leave);
            return Err(error);
        }
        let gap = self.return_lanes().saturating_sub(state.stopped);
        eal.succeed();
        self.control.ports.iter_mut().for_each(SupervisedPort::keep);
        for port in state.ports {
            let port = &mut self.control.ports[port.number as usize];
            port.open.iter_mut().for_each(|open| open.watch_release_request());
            port.status.update(|status| status.is_started = true);
        }
        announce(RunEvent::TookOver(Handover { pid: predecessor.pid(), gap }));
        Ok(())
    }

    /// Continues all ports of `state`, whose rings claim their buffers from `free`.
    fn resume(&mut self, state: &State, fds: &ReceivedFds, free: &mut FreeBuffers) -> Result<()> {
        if state.ports.iter().map(|port| port.number as usize).ne(self.control.used.iter().copied()) {
            let why = "it forwards between other ports";
            return Err(Error::new(ErrorKind::Busy, "cannot use the ports of the running program", why)
                .with_hint("give both the same arguments"));
        }
        for PortState { number, record, restarts, link_changes } in &state.ports {
            let number = *number as usize;
            let port = &mut self.control.ports[number];
            let Some(open) = &mut port.open else { continue };
            self.queues.put_port(number, self.control.resources.resume(open, record, free, fds)?);
            (port.counted.restarts, port.counted.link_changes) = (*restarts, *link_changes);
            port.is_down = false;
        }
        Ok(())
    }
}
