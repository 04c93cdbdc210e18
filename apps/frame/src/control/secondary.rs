//! The control thread's part in a secondary process: it gets queues from the primary, and gives them back.

use vireo_drivers::handover::HandOver;
use vireo_eal::handover::{Fds, ReceivedFds, RunningProgram};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use super::handover::ProgramRecord;
use super::lend::{self, LentQueues, Order, Report};
use super::{INSPECTION_PERIOD, RunEvent, Supervisor};
use crate::caches::Home;

/// How a secondary process stands with its primary when its lcores have ended.
#[derive(Debug)]
pub(crate) struct Standing {
    /// Whether it has queues, which it has to return.
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
        let mut standing = Standing { has_queues: false, lost: None };
        while !stop.is_set() {
            if primary.channel().has_message(INSPECTION_PERIOD)? {
                self.obey(primary, &mut standing, stop).inspect_err(|_| stop.set())?;
            }
            if standing.has_queues {
                self.report_fault(primary, &mut standing)?;
            }
        }
        Ok(standing)
    }

    /// Attaches to all ports, without their queues, and tells the primary that this process is ready.
    fn attach(&mut self, primary: &RunningProgram) -> Result<()> {
        let super::Control { recall, lcores, resources, .. } = self.control;
        // All lcores run and wait for lanes.
        recall.give(Vec::new(), lcores);
        let own = resources.processes().own();
        let mut free = resources.pool(own).take_free();
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
        let ready = Report::Ready { process: own, count: resources.processes().count() };
        primary.channel().send(&ready, &Fds::default())
    }

    /// Does what the primary orders.
    fn obey(&mut self, primary: &RunningProgram, standing: &mut Standing, stop: &StopFlag) -> Result<()> {
        match primary.channel().receive::<Order>(INSPECTION_PERIOD) {
            Ok((Order::Poll(lent), _)) if !standing.has_queues => self.poll(primary, &lent, standing),
            Ok((Order::Return, _)) if standing.has_queues => {
                let report = self.give_up(None);
                standing.has_queues = false;
                primary.channel().send(&report, &Fds::default())
            }
            // It was sent before the primary read that a device has misbehaved.
            Ok((Order::Return | Order::Poll(_), _)) => Ok(()),
            Ok((Order::End, _)) => {
                tracing::info!("the primary, process {}, ends", primary.pid());
                stop.set();
                Ok(())
            }
            Ok((Order::Refuse(why), _)) => Err(Error::new(ErrorKind::Busy, CANNOT, why)),
            Err(_) => {
                let why = format!("the primary, process {}, has ended", primary.pid());
                standing.lost = Some(Error::new(ErrorKind::Unavailable, CANNOT, why));
                stop.set();
                Ok(())
            }
        }
    }

    fn poll(&mut self, primary: &RunningProgram, lent: &LentQueues, standing: &mut Standing) -> Result<()> {
        let super::Control { resources, announce, .. } = self.control;
        let lanes: Vec<_> = self.parked.iter().map(|lane| (lane.from, lane.to)).collect();
        let mut free = resources.pool(resources.processes().own()).take_free();
        lend::take_back(self.control.ports, &mut self.queues, &lanes, lent, &mut free)?;
        drop(free);
        self.return_lanes();
        standing.has_queues = true;
        announce(RunEvent::Joined { pid: primary.pid() });
        Ok(())
    }

    /// Takes all lanes from the lcores, and returns their queues to the primary, or reports why the ports must restart.
    fn give_up(&mut self, fault: Option<String>) -> Report {
        let mut parked = self.park_all();
        let lanes: Vec<_> = parked.iter().map(|lane| (lane.from, lane.to)).collect();
        self.parked.append(&mut parked);
        let resources = self.control.resources;
        let home = Home { process: resources.processes().own(), node: None };
        let mut cache = resources.cache_at(home);
        let (ports, queues) = (&*self.control.ports, &mut self.queues);
        let lent = match fault {
            None => lend::lend(ports, queues, &lanes, &mut cache).map_err(|error| error.to_string()),
            Some(why) => Err(why),
        };
        lent.map_or_else(
            |why| {
                if let Err(error) = lend::forget(ports, queues, &lanes, &mut cache) {
                    tracing::error!("{error}");
                }
                Report::Fault(why)
            },
            Report::Returned,
        )
    }

    /// Gives up the queues if a device has misbehaved.
    fn report_fault(&mut self, primary: &RunningProgram, standing: &mut Standing) -> Result<()> {
        let mut open = self.control.ports.iter_mut().filter_map(|port| port.open.as_mut());
        let Some(why) = open.find_map(|open| open.port.take_fault()) else { return Ok(()) };
        tracing::warn!("{why}; the primary restarts the port");
        let report = self.give_up(Some(why.to_owned()));
        standing.has_queues = false;
        primary.channel().send(&report, &Fds::default())
    }
}

const CANNOT: &str = "cannot poll queues of the primary";
