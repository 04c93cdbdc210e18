//! The control thread's part in a primary that shares its ports: it lends queues to secondary processes, takes them back,
//! and starts those of a killed process anew.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;
use vireo_eal::event::wait_for_any;
use vireo_eal::handover::{Channel, Fds, Peer};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use super::lend::{self, Direction, LentQueues, Order, QueueCounts, Report};
use super::{INSPECTION_PERIOD, ParkedLane, PortState, RunEvent, Supervisor};
use crate::caches::Home;
use crate::recall::Wanted;

/// How long a secondary process may take to return its queues.
const RETURN_PATIENCE: Duration = Duration::from_secs(1);
/// Maximum number of reports that are read from a process before others get their turn.
const REPORTS_AT_ONCE: usize = 16;

/// What a secondary process does, as its primary sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SecondaryState {
    /// It polls its queues.
    Polls,
    /// It has returned its queues and ended.
    Left,
    /// It has ended without returning its queues, which this process has started anew.
    Died,
}

impl fmt::Display for SecondaryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Polls => "polls its queues",
            Self::Left => "has returned its queues",
            Self::Died => "has died",
        })
    }
}

/// A secondary process.
pub(super) struct Secondary<H> {
    peer: Peer,
    /// Number of the process; `None` until it is ready.
    process: Option<u16>,
    stage: Stage,
    /// Lanes whose queues it has, or waits for.
    parked: Vec<ParkedLane<H>>,
    /// What it has counted so far.
    counted: QueueCounts,
    /// When it was last asked for that, and whether it has answered.
    asked: (Instant, bool),
    /// Whether the log says already that the process does not return its queues.
    is_known_late: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It prepares its ports.
    Preparing,
    /// It is ready, and waits for its queues.
    Waiting,
    /// It has its queues.
    Polling,
    /// It has its queues, and was ordered to return them.
    Returning,
    /// It has given up its queues, whose ports must restart.
    Faulty,
    /// Its connection has ended, and its queues must be started anew.
    Dying,
    /// It has no queues, and will get none.
    Gone,
}

impl Stage {
    /// Whether the process may access its queues.
    fn has_queues(self) -> bool {
        matches!(self, Self::Polling | Self::Returning | Self::Dying)
    }
}

impl<H> Secondary<H> {
    pub(super) fn new(peer: Peer) -> Self {
        Self {
            peer,
            process: None,
            stage: Stage::Preparing,
            parked: Vec::new(),
            counted: QueueCounts::new(),
            asked: (Instant::now(), true),
            is_known_late: false,
        }
    }

    /// Connection to the process, unless it has ended.
    pub(super) fn channel(&self) -> Option<&Channel> {
        (!matches!(self.stage, Stage::Dying | Stage::Gone)).then_some(&self.peer.channel)
    }

    fn lanes(&self) -> Vec<(usize, usize)> {
        self.parked.iter().map(|lane| (lane.from, lane.to)).collect()
    }

    /// Sends an order. If that fails, the end of the connection is the next thing to be heard.
    fn order(&self, order: &Order) {
        if let Err(error) = self.peer.channel.send(order, &Fds::default()) {
            tracing::debug!("process {}: {error}", self.peer.pid);
            self.peer.channel.close();
        }
    }

    /// Asks for what the process has counted, if it is time to.
    fn ask_for_counts(&mut self) {
        let (at, is_answered) = self.asked;
        if is_answered && at.elapsed() >= INSPECTION_PERIOD {
            self.asked = (Instant::now(), false);
            self.order(&Order::Count);
        }
    }
}

impl<H> Supervisor<'_, H> {
    /// Reads what secondary processes report, and lends them their queues, or takes these back.
    pub(super) fn serve_secondaries(&mut self, stop: &StopFlag) {
        for index in 0..self.secondaries.len() {
            self.hear(index);
            match self.secondaries[index].stage {
                Stage::Waiting => self.lend_to(index, stop),
                Stage::Polling => self.secondaries[index].ask_for_counts(),
                Stage::Faulty => {
                    let ports = self.ports_of(index);
                    if self.restart(&ports, "a secondary process reports that its device has misbehaved") {
                        self.secondaries[index].stage = Stage::Waiting;
                    }
                }
                Stage::Dying if self.secondaries[index].peer.has_ended(Duration::ZERO) => self.bury(index),
                _ => {}
            }
        }
        self.secondaries.retain(|secondary| secondary.stage != Stage::Gone);
    }

    /// Reads up to [`REPORTS_AT_ONCE`] reports of a process that have arrived.
    fn hear(&mut self, index: usize) {
        for _ in 0..REPORTS_AT_ONCE {
            let Some(channel) = self.secondaries[index].channel() else { return };
            if !channel.has_message(Duration::ZERO).unwrap_or(false) {
                return;
            }
            let report = channel.receive::<Report>(Duration::ZERO);
            let stage = self.secondaries[index].stage;
            match report {
                Ok((Report::Ready { process, count }, _)) if stage == Stage::Preparing => {
                    match self.admit(process, count) {
                        Ok(()) => {
                            let secondary = &mut self.secondaries[index];
                            (secondary.process, secondary.stage) = (Some(process), Stage::Waiting);
                        }
                        Err(why) => {
                            self.secondaries[index].order(&Order::Refuse(why));
                            self.secondaries[index].stage = Stage::Gone;
                        }
                    }
                }
                Ok((Report::Counted(counts), _)) => self.count(index, counts),
                Ok((Report::Returned(lent), _)) if stage.has_queues() => {
                    let taken = self.take_back_from(index, &lent);
                    self.secondaries[index].stage = if taken { Stage::Waiting } else { Stage::Faulty };
                }
                Ok((Report::Fault(why), _)) if stage.has_queues() => {
                    tracing::warn!("process {}: {why}", self.secondaries[index].peer.pid);
                    self.secondaries[index].stage = Stage::Faulty;
                }
                Ok((Report::Left(lent), _)) => {
                    if stage.has_queues() && self.take_back_from(index, &lent) {
                        self.secondaries[index].stage = Stage::Waiting;
                    }
                    self.end_of(index);
                }
                // Its connection has ended, or it talks nonsense.
                _ => self.end_of(index),
            }
        }
    }

    /// Ends the connection to a process. Its lanes become this process's own, at once if their queues are in order.
    fn end_of(&mut self, index: usize) {
        let stage = self.secondaries[index].stage;
        if stage.has_queues() || stage == Stage::Faulty {
            self.secondaries[index].stage = Stage::Dying;
            return;
        }
        if stage == Stage::Waiting {
            self.announce(index, SecondaryState::Left);
        }
        self.keep_lanes_of(index);
        self.return_lanes();
    }

    /// Checks that a process of `count` may have the queues of `process`.
    fn admit(&self, process: u16, count: u16) -> std::result::Result<(), String> {
        let processes = self.control.resources.processes();
        let rival = self.secondaries.iter().find(|other| other.process == Some(process));
        match rival {
            _ if count != processes.count() => {
                Err(format!("it was started with --num-procs {}", processes.count()))
            }
            _ if process == processes.own() => Err(format!("process {process} (--proc-id) is the primary")),
            Some(rival) => {
                Err(format!("process {} polls the queues of process {process} already", rival.peer.pid))
            }
            None => Ok(()),
        }
    }

    fn announce(&self, index: usize, state: SecondaryState) {
        let Secondary { peer, process: Some(process), .. } = &self.secondaries[index] else { return };
        let event = RunEvent::Secondary { process: *process, pid: peer.pid, state };
        tracing::info!("{event}");
        (self.control.announce)(event);
    }

    /// Lends a process its queues, if its ports are up.
    fn lend_to(&mut self, index: usize, stop: &StopFlag) {
        let super::Control { recall, lcores, resources, used, .. } = self.control;
        let own = self.ports_of(index);
        let is_up = self.are_up(if own.is_empty() { used } else { &own });
        let Some(process) = self.secondaries[index].process.filter(|_| is_up) else { return };
        if self.secondaries[index].parked.is_empty() {
            let own = resources.numbers_of(process);
            let parked = recall.take(Wanted::From(own.clone()), lcores);
            let parked: Vec<_> = parked.into_iter().map(|(lcore, lane)| self.park(lcore, lane)).collect();
            let waiting = self.parked.extract_if(.., |lane| own.contains(&lane.from));
            self.secondaries[index].parked = waiting.chain(parked).collect();
        }
        if stop.is_set() {
            // Not all lcores may have handed over their lanes.
            return;
        }
        match self.lend_parked(index, process) {
            Ok(lent) => {
                self.secondaries[index].stage = Stage::Polling;
                self.secondaries[index].order(&Order::Poll(lent));
                self.announce(index, SecondaryState::Polls);
            }
            Err(error) => {
                tracing::warn!("process {} gets no queues: {error}", self.secondaries[index].peer.pid);
                self.secondaries[index].order(&Order::Refuse(error.to_string()));
                self.keep_lanes_of(index);
                self.return_lanes();
            }
        }
    }

    /// Lends the queues of a process's lanes, which no lcore polls.
    fn lend_parked(&mut self, index: usize, process: u16) -> Result<LentQueues> {
        let (resources, lanes) = (self.control.resources, self.secondaries[index].lanes());
        let mut cache = resources.cache_at(Home { process, node: None });
        let lent = lend::lend(self.control.ports, &mut self.queues, &lanes, &mut cache)?;
        drop(cache);
        let pool = resources.pool(process);
        if pool.available() == pool.count() {
            return Ok(lent);
        }
        let lost = pool.count() - pool.available();
        lend::take_back(self.control.ports, &mut self.queues, &lanes, &lent, &mut pool.take_free())?;
        let why = format!("{lost} of its packet buffers are in use");
        Err(Error::new(ErrorKind::Protocol, "cannot share the ports", why))
    }

    /// Adds what a process has counted since its last report.
    fn count(&mut self, index: usize, counts: QueueCounts) {
        let (lanes, secondary) = (self.secondaries[index].lanes(), &mut self.secondaries[index]);
        secondary.asked.1 = true;
        for ((direction, number), stats) in counts {
            let number = number as usize;
            let is_its = match direction {
                Direction::Rx => lanes.iter().any(|(from, _)| *from == number),
                Direction::Tx => lanes.iter().any(|(_, to)| *to == number),
            };
            let counters = lend::counters(self.control.ports, &self.queues, direction, number);
            if let Some(counters) = counters.filter(|_| is_its) {
                let before = secondary.counted.insert((direction, number as u32), stats);
                counters.add(&stats.since(&before.unwrap_or_default()));
            }
        }
    }

    /// Continues the queues that a process has returned. Returns false if they must be reset.
    fn take_back_from(&mut self, index: usize, lent: &LentQueues) -> bool {
        let Secondary { process: Some(process), peer, .. } = &self.secondaries[index] else { return false };
        let lanes = self.secondaries[index].lanes();
        let mut free = self.control.resources.pool(*process).take_free();
        if let Err(error) = lend::take_back(self.control.ports, &mut self.queues, &lanes, lent, &mut free) {
            tracing::warn!("process {}: {error}", peer.pid);
            return false;
        }
        true
    }

    /// Makes the lanes of a process, which ends, this process's own.
    fn keep_lanes_of(&mut self, index: usize) {
        let secondary = &mut self.secondaries[index];
        secondary.stage = Stage::Gone;
        self.parked.append(&mut secondary.parked);
    }

    fn are_up(&self, ports: &BTreeSet<usize>) -> bool {
        let mut ports = ports.iter().map(|number| &self.control.ports[*number]);
        ports.all(|port| port.open.is_some() && !port.is_down)
    }

    /// Polls the queues of a process that has died: starts them anew or, where only a reset stops them, restarts their
    /// ports.
    fn bury(&mut self, index: usize) {
        let Some(process) = self.secondaries[index].process else { return };
        let (ports, lanes) = (self.ports_of(index), self.secondaries[index].lanes());
        let mut why = "a process has died with its queues".to_owned();
        if self.are_up(&ports) {
            let mut cache = self.control.resources.cache_at(Home { process, node: None });
            match lend::renew(self.control.ports, &mut self.queues, &lanes, &mut cache) {
                Ok(()) => {
                    drop(cache);
                    self.write_off(index);
                    self.return_lanes();
                    return;
                }
                Err(error) => why = format!("{why} ({error})"),
            }
        }
        self.restart(&ports, &why);
    }

    /// Makes the lanes of a process that has died this process's own. The packets that it had received and not sent when it
    /// last told its counts are lost.
    fn write_off(&mut self, index: usize) {
        self.announce(index, SecondaryState::Died);
        let counted = std::mem::take(&mut self.secondaries[index].counted);
        let of = |direction, number| counted.get(&(direction, number as u32)).copied().unwrap_or_default();
        for (from, to) in self.secondaries[index].lanes() {
            let (rx, tx) = (of(Direction::Rx, from), of(Direction::Tx, to));
            let lost = rx.packets.saturating_sub(tx.packets + tx.errors + tx.dropped + rx.consumed);
            if let Some(counters) = lend::counters(self.control.ports, &self.queues, Direction::Tx, to) {
                counters.dropped.add(lost);
            }
        }
        self.keep_lanes_of(index);
    }

    /// Ports at the ends of a process's lanes.
    fn ports_of(&self, index: usize) -> BTreeSet<usize> {
        let lanes = self.secondaries[index].lanes();
        lanes.into_iter().flat_map(|(from, to)| [from, to].map(|pair| self.queues.port_of(pair))).collect()
    }

    /// Restarts `ports` together, so that no lane has queues of before and after, and with them those of processes that
    /// have died with their queues. Returns false if a process has queues of them and has not returned these in time.
    pub(super) fn restart(&mut self, ports: &BTreeSet<usize>, why: &str) -> bool {
        let mut ports = ports.clone();
        let dead = loop {
            if !self.reclaim(&ports) {
                return false;
            }
            let concerned = self.concerned_by(&ports).into_iter();
            let dead: Vec<usize> =
                concerned.filter(|index| self.secondaries[*index].stage == Stage::Dying).collect();
            let before = ports.len();
            dead.iter().for_each(|index| ports.append(&mut self.ports_of(*index)));
            if ports.len() == before {
                break dead;
            }
        };
        for &port in &ports {
            if self.control.ports[port].is_down || self.control.ports[port].open.is_none() {
                continue;
            }
            tracing::warn!("port {port}: {why}; restarting the port");
            self.control.ports[port].counted.restarts += 1;
            (self.control.announce)(RunEvent::Port { port, state: PortState::Restarting });
            self.stop(port);
        }
        dead.into_iter().for_each(|index| self.write_off(index));
        for &port in &ports {
            if self.control.ports[port].is_down {
                self.bring_up(port);
            }
        }
        true
    }

    /// Processes that have, or wait for, queues of `ports`.
    fn concerned_by(&self, ports: &BTreeSet<usize>) -> Vec<usize> {
        (0..self.secondaries.len()).filter(|index| !self.ports_of(*index).is_disjoint(ports)).collect()
    }

    /// Takes back the queues of `ports` from secondary processes. Returns false if one does not return them in time.
    pub(super) fn reclaim(&mut self, ports: &BTreeSet<usize>) -> bool {
        let concerned = self.concerned_by(ports);
        let mut until = Instant::now();
        for &index in &concerned {
            let secondary = &mut self.secondaries[index];
            if secondary.stage == Stage::Polling {
                secondary.stage = Stage::Returning;
                secondary.order(&Order::Return);
                until = Instant::now() + RETURN_PATIENCE;
            }
        }
        self.await_queues(&concerned, until)
    }

    /// Waits until none of these processes has queues, but not longer than `until`.
    fn await_queues(&mut self, concerned: &[usize], until: Instant) -> bool {
        loop {
            concerned.iter().for_each(|index| self.hear(*index));
            let still = |index: &&usize| {
                let Secondary { stage, peer, .. } = &self.secondaries[**index];
                stage.has_queues() && !(*stage == Stage::Dying && peer.has_ended(Duration::ZERO))
            };
            let Some(late) = concerned.iter().find(still) else { return true };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let Secondary { peer: Peer { pid, .. }, is_known_late, .. } = &mut self.secondaries[*late];
                if !std::mem::replace(is_known_late, true) {
                    tracing::warn!("process {pid} does not return its queues; end it: kill -KILL {pid}");
                }
                return false;
            }
            let channels: Vec<_> =
                concerned.iter().filter_map(|index| self.secondaries[*index].channel()).collect();
            match channels[..] {
                // The kernel is about to end it.
                [] => std::thread::sleep(left.min(Duration::from_millis(1))),
                _ => wait_for_any(channels, Some(left)),
            }
        }
    }

    /// Ends all secondary processes. Returns false if one has not returned its queues in time.
    pub(super) fn end_secondaries(&mut self) -> bool {
        self.secondaries.iter().for_each(|secondary| secondary.order(&Order::End));
        let all: Vec<usize> = (0..self.secondaries.len()).collect();
        self.await_queues(&all, Instant::now() + RETURN_PATIENCE)
    }
}
