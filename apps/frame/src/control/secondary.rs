//! The control thread's part in a secondary process: it gets queues from the primary, and gives them back.

use vireo_drivers::handover::HandOver;
use vireo_eal::handover::{Fds, ReceivedFds, RunningProgram};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use super::handover::ProgramRecord;
use super::lend::{self, LentQueues, Order, Report};
use super::{INSPECTION_PERIOD, RunEvent, Supervisor};
use crate::caches::Home;

const CANNOT: &str = "cannot poll queues of the primary";

/// How a secondary process stands with its primary.
#[derive(Debug)]
pub(crate) struct Standing {
    /// Its lanes, as the numbers of their queue pairs.
    pub(crate) lanes: Vec<(usize, usize)>,
    /// Whether it has their queues, which it has to return.
    pub(crate) has_queues: bool,
    /// Why it cannot return them: the primary has ended.
    pub(crate) lost: Option<Error>,
}

impl<H> Supervisor<'_, H> {
    /// Polls the queues that the primary lends, until `stop`.
    ///
    /// # Errors
    /// When the primary refuses this process, or lends what does not fit its memory.
    pub(super) fn serve_primary(&mut self, primary: &RunningProgram, stop: &StopFlag) -> Result<Standing> {
        self.attach(primary).inspect_err(|_| stop.set())?;
        let lanes = self.parked.iter().map(|lane| (lane.from, lane.to)).collect();
        let mut standing = Standing { lanes, has_queues: false, lost: None };
        while !stop.is_set() {
            let mut reports = Vec::new();
            if primary.channel().has_message(INSPECTION_PERIOD).inspect_err(|_| stop.set())? {
                self.obey(primary, &mut standing, &mut reports, stop).inspect_err(|_| stop.set())?;
            }
            if standing.has_queues {
                reports.extend(self.fault(&mut standing));
            }
            if let Err(error) = reports.iter().try_for_each(|report| send(primary, report)) {
                standing.lost = Some(ended(primary, error.why()));
                stop.set();
            }
        }
        Ok(standing)
    }

    /// Attaches to all ports, without their queues, and tells the primary that this process is ready.
    fn attach(&mut self, primary: &RunningProgram) -> Result<()> {
        let super::Control { recall, lcores, resources, .. } = self.control;
        // All lcores run and wait for lanes.
        recall.give(Vec::new(), lcores);
        let processes = resources.processes();
        let mut free = resources.pool(processes.own()).take_free();
        for shared in primary.record::<ProgramRecord>()?.shared {
            let number = shared.number as usize;
            let Some(port) = self.control.ports.get_mut(number) else { continue };
            let Some(open) = &mut port.open else { continue };
            let queues = resources.resume(open, &shared.record, &mut free, &ReceivedFds::default())?;
            // The primary resets the device.
            open.port.leave();
            port.is_down = false;
            self.queues.put_port(number, queues);
        }
        send(primary, &Report::Ready { process: processes.own(), count: processes.count() })
    }

    /// Does what the primary orders. What there is to tell it is added to `reports`.
    fn obey(
        &mut self,
        primary: &RunningProgram,
        standing: &mut Standing,
        reports: &mut Vec<Report>,
        stop: &StopFlag,
    ) -> Result<()> {
        match primary.channel().receive::<Order>(INSPECTION_PERIOD) {
            Ok((Order::Poll(lent), _)) if !standing.has_queues => self.poll(primary, &lent, standing)?,
            Ok((Order::Count, _)) => reports.push(self.counted(standing)),
            Ok((Order::Return, _)) if standing.has_queues => {
                let returned = self.give_up(standing, None);
                reports.extend([self.counted(standing), returned]);
            }
            // It was sent before the primary read that a device has misbehaved.
            Ok((Order::Return | Order::Poll(_), _)) => {}
            Ok((Order::End, _)) => {
                tracing::info!("the primary, process {}, ends", primary.pid());
                stop.set();
            }
            Ok((Order::Refuse(why), _)) => return Err(Error::new(ErrorKind::Busy, CANNOT, why)),
            Err(error) => {
                standing.lost = Some(ended(primary, error.why()));
                stop.set();
            }
        }
        Ok(())
    }

    fn poll(&mut self, primary: &RunningProgram, lent: &LentQueues, standing: &mut Standing) -> Result<()> {
        let super::Control { resources, announce, .. } = self.control;
        let mut free = resources.pool(resources.processes().own()).take_free();
        lend::take_back(self.control.ports, &mut self.queues, &standing.lanes, lent, &mut free)?;
        drop(free);
        self.return_lanes();
        standing.has_queues = true;
        announce(RunEvent::Joined { pid: primary.pid() });
        Ok(())
    }

    /// What this process has counted.
    fn counted(&self, standing: &Standing) -> Report {
        Report::Counted(lend::counted(self.control.ports, &self.queues, &standing.lanes))
    }

    /// Takes all lanes from the lcores, and lends their queues to the primary. If there is a `fault`, or a queue cannot be
    /// lent, reports that their ports must restart.
    fn give_up(&mut self, standing: &mut Standing, fault: Option<String>) -> Report {
        let mut parked = self.park_all();
        self.parked.append(&mut parked);
        standing.has_queues = false;
        let resources = self.control.resources;
        let mut cache = resources.cache_at(Home { process: resources.processes().own(), node: None });
        let lanes = (&*self.control.ports, &mut self.queues, &standing.lanes[..]);
        lend::give_up(lanes, &mut cache, fault, Report::Returned)
    }

    /// Gives up the queues if a device has misbehaved.
    fn fault(&mut self, standing: &mut Standing) -> Option<Report> {
        let mut open = self.control.ports.iter_mut().filter_map(|port| port.open.as_mut());
        let why = open.find_map(|open| open.port.take_fault())?;
        tracing::warn!("{why}; the primary restarts the port");
        Some(self.give_up(standing, Some(why.to_owned())))
    }
}

fn send(primary: &RunningProgram, report: &Report) -> Result<()> {
    primary.channel().send(report, &Fds::default())
}

/// Error of a process whose primary has ended, as `sign` shows.
fn ended(primary: &RunningProgram, sign: &str) -> Error {
    let why = format!("the primary, process {}, has ended ({sign})", primary.pid());
    Error::new(ErrorKind::Unavailable, CANNOT, why)
}
