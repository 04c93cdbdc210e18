//! The ports of a run, from reserving their memory to checking that every buffer and packet is accounted for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use vireo_drivers::handover::{HandOver, PortRecord};
use vireo_drivers::memory::{MemoryNeed, PortMemory};
use vireo_drivers::port::{MacAddr, Nic, PortConfig, QueuesOf};
use vireo_drivers::ports::{OpenPort, buffers_needed, wait_for_links};
use vireo_drivers::table::Port;
use vireo_eal::dma::{DmaMemory, FreeBuffers, Pool, PoolCache};
use vireo_eal::event::Event;
use vireo_eal::handover::{Channel, Fds, ReceivedFds};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::Region;
use vireo_eal::{Error, ErrorKind, Result};

use crate::app::App;
use crate::balance::Balance;
use crate::caches::Home;
use crate::control::lend::{self, LentQueues, Report};
use crate::control::secondary::Standing;
use crate::control::{ParkedLane, RunEvent};
use crate::counts::{Counts, LcoreTicks};
use crate::forward::AnyLane;
use crate::hook::Hook;
use crate::idle::IdleQueues;
use crate::launch::{Shared, forward_on_lcores};
use crate::route::{Processes, Route};
use crate::status::SharedStatus;
use crate::supervised::{PortSummary, SupervisedPort};
use crate::telemetry::Telemetry;

/// Queues and packet buffers that an application requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Configuration of each port. A route uses the same pair number for its RX and its TX queue, so each
    /// port must have as many RX queues as TX queues. An offload that a port lacks is left out, and lanes
    /// compute the checksums that a port does not.
    pub port: PortConfig,
    /// Total number of packet buffers; by default as many as rings, bursts and caches of each process hold at once.
    pub buffers: Option<u32>,
    /// Number of these packet buffers that devices only send from. See [`Ports::send_only`].
    pub send_only: u32,
    /// Processes that share the ports. Each has a part of the packet buffers for itself.
    pub processes: Processes,
}

impl Config {
    /// Returns the memory that this configuration needs for `ports` ports and `caches` caches of packet
    /// buffers. Each lcore has one cache per NUMA node that its ports are on.
    pub fn need(&self, ports: usize, caches: usize) -> MemoryNeed {
        let Self { port: config, send_only, processes, .. } = *self;
        let needed = || buffers_needed(ports, caches, &config).saturating_mul(processes.count().into());
        let buffers = self.buffers.unwrap_or_else(needed).saturating_sub(send_only);
        MemoryNeed { buffers, send_only, config }
    }
}

/// What a port needs to start.
#[derive(Debug)]
pub(crate) struct PortResources {
    /// Packet buffers of each process.
    pools: Vec<Arc<Pool>>,
    memory: PortMemory,
    config: PortConfig,
    processes: Processes,
    /// Where the packet buffers of each queue pair come from.
    homes: Vec<Home>,
}

impl PortResources {
    /// Starts port `number`.
    pub(crate) fn start(&self, number: usize, open: &mut OpenPort) -> Result<QueuesOf<Port>> {
        let pairs = usize::from(self.config.rx_queues);
        let own = self.homes.get(number * pairs..(number + 1) * pairs).unwrap_or_default();
        // One cache for all queues leaves no buffers behind in others.
        let distinct = if own.iter().all(|home| *home == own[0]) { &own[..own.len().min(1)] } else { own };
        let mut caches: Vec<PoolCache> = distinct.iter().map(|home| self.cache_at(*home)).collect();
        let offloads = self.config.offloads & open.port.capabilities().offloads;
        open.port.start_from(&self.config.with_offloads(offloads), self.memory.of(open)?, &mut caches)
    }

    /// Creates a cache of any packet buffers, for those that return to their own pools.
    pub(crate) fn cache(&self) -> PoolCache {
        self.cache_at(Home::default())
    }

    /// Creates a cache of the packet buffers at `home`.
    pub(crate) fn cache_at(&self, home: Home) -> PoolCache {
        self.pool(home.process).cache_near(home.node)
    }

    /// Returns the packet buffers of `process`.
    pub(crate) fn pool(&self, process: u16) -> &Arc<Pool> {
        &self.pools[usize::from(process)]
    }

    /// Returns the number of packet buffers of all processes.
    pub(crate) fn buffers(&self) -> u32 {
        self.pools.iter().map(|pool| pool.count()).sum()
    }

    /// Returns where the packet buffers of queue pair `number` come from.
    pub(crate) fn home(&self, number: usize) -> Home {
        self.homes.get(number).copied().unwrap_or_default()
    }

    /// Returns the numbers of the queue pairs whose packets belong to `process`.
    pub(crate) fn numbers_of(&self, process: u16) -> BTreeSet<usize> {
        let own = self.homes.iter().enumerate().filter(|(_, home)| home.process == process);
        own.map(|(number, _)| number).collect()
    }

    /// Returns the processes that share the ports.
    pub(crate) fn processes(&self) -> Processes {
        self.processes
    }

    /// Describes a started port for a secondary process.
    pub(crate) fn share(&self, open: &OpenPort) -> Result<PortRecord> {
        PortRecord::without_queues(&open.port, &self.config, &mut Fds::default())
    }

    /// Describes a started port for a successor.
    pub(crate) fn record(
        &self,
        open: &OpenPort,
        queues: &QueuesOf<Port>,
        fds: &mut Fds<'_>,
    ) -> Result<PortRecord> {
        PortRecord::of(&open.port, queues, &self.config, fds)
    }

    /// Continues a port of the running program.
    pub(crate) fn resume(
        &self,
        open: &mut OpenPort,
        record: &PortRecord,
        free: &mut FreeBuffers,
        fds: &ReceivedFds,
    ) -> Result<QueuesOf<Port>> {
        let offloads = self.config.offloads & open.port.capabilities().offloads;
        let memory = self.memory.of(open)?;
        record.resume_on(&mut open.port, &self.config.with_offloads(offloads), memory, free, fds)
    }

    pub(crate) fn memory(&self) -> &PortMemory {
        &self.memory
    }

    /// Returns whether frames may consist of several packets, or have partial checksums.
    pub(crate) fn is_general(&self) -> bool {
        self.config.is_scattered() || !self.config.offloads.is_empty()
    }

    /// Creates an empty collection for the queues of these ports.
    pub(crate) fn idle_queues(&self) -> IdleQueues {
        IdleQueues::new(self.config.rx_queues)
    }
}

/// The ports of a run, with their memory. If this is dropped early, it resets the devices and then releases
/// the memory.
#[derive(Debug)]
pub struct Ports {
    queues: IdleQueues,
    ports: Vec<SupervisedPort>,
    /// Numbers of the ports named by the routes.
    used: BTreeSet<usize>,
    routes: Vec<Route>,
    counts: Counts,
    send_only: Option<Arc<Pool>>,
    resources: PortResources,
    /// Whether lanes are tied where possible.
    ties: bool,
    /// See [`Ports::untie_every`].
    untie_period: Option<Duration>,
    /// See [`Ports::sleep_after`].
    sleep_after: Option<u32>,
    /// Whether the ports run for another process, until [`Ports::forward`] takes them over or shares them.
    runs_elsewhere: bool,
    /// Whether a successor has the ports.
    is_handed_over: bool,
    /// Why this secondary process could not return its queues.
    lost_primary: Option<Error>,
}

impl Ports {
    /// Creates the ports of `routes`, which are in `open`, with the `memory` that was reserved for `need`.
    ///
    /// # Errors
    /// `Usage` when a route names a port or queue pair that does not exist; otherwise as for
    /// [`Pool::on_nodes`].
    pub fn new(
        open: Vec<OpenPort>,
        routes: Vec<Route>,
        memory: PortMemory,
        need: &MemoryNeed,
    ) -> Result<Self> {
        let is_there = |route: &&Route| {
            route.from.max(route.to) < open.len() && route.pair < usize::from(need.config.rx_queues)
        };
        if let Some(route) = routes.iter().find(|route| !is_there(route)) {
            let what = format!("cannot forward from port {} to port {}", route.from, route.to);
            let why =
                format!("there are {} ports with {} queue pairs each", open.len(), need.config.rx_queues);
            return Err(Error::new(ErrorKind::Usage, what, why));
        }
        let count = routes.iter().map(|route| u32::from(route.process) + 1).max().unwrap_or(1);
        let pools = (0..count).map(|_| memory.pool(need.buffers / count)).collect::<Result<_>>()?;
        let send_only = match need.send_only {
            0 => None,
            count => Some(memory.send_only(count)?),
        };
        let pairs = usize::from(need.config.rx_queues);
        let home = |number: usize| {
            let (port, pair) = (number / pairs, number % pairs);
            let route = routes.iter().find(|route| (route.from, route.pair) == (port, pair));
            Home { process: route.map_or(0, |route| route.process), node: memory.node_of(&open[port]) }
        };
        let homes = (0..open.len() * pairs).map(home).collect();
        let (config, processes) = (need.config, Processes::default());
        let resources = PortResources { pools, memory, config, processes, homes };
        Ok(Self {
            queues: resources.idle_queues(),
            used: Route::ports(&routes),
            counts: Counts::new(open.iter().map(|open| open.port.counters().clone()).collect()),
            ports: open.into_iter().map(SupervisedPort::new).collect(),
            routes,
            send_only,
            resources,
            ties: true,
            untie_period: None,
            sleep_after: None,
            runs_elsewhere: false,
            is_handed_over: false,
            lost_primary: None,
        })
    }

    /// Shares the ports among `processes`, according to their routes.
    ///
    /// # Errors
    /// `Usage` when a port is not a NIC.
    pub(crate) fn shared_by(mut self, processes: Processes) -> Result<Self> {
        let is_virtual =
            |number: &usize| self.get(*number).is_some_and(|open| open.port.function().is_none());
        if let Some(number) = self.used.iter().copied().find(is_virtual).filter(|_| processes.count() > 1) {
            let what = format!("cannot share port {number} among processes");
            return Err(Error::new(
                ErrorKind::Usage,
                what,
                "it is a virtual device, whose peer has one process",
            )
            .with_hint("leave --num-procs out"));
        }
        self.resources.processes = processes;
        Ok(self)
    }

    /// Leaves the start of all ports to [`Ports::forward`], which continues them from the running program.
    pub(crate) fn of_running(self) -> Self {
        Self { runs_elsewhere: true, ..self }
    }

    /// Returns whether a successor has the ports. They are closed then, and their buffers remain with it.
    pub fn is_handed_over(&self) -> bool {
        self.is_handed_over
    }

    /// Returns whether this process resets the ports when it closes them. A successor does that in its place, and for a
    /// secondary process its primary.
    pub fn is_owner(&self) -> bool {
        !self.is_handed_over && self.resources.processes.owns()
    }

    /// Returns the numbers of the ports named by the routes, in ascending order.
    pub fn used(&self) -> impl Iterator<Item = usize> + '_ {
        self.used.iter().copied()
    }

    /// Returns the number of ports, including those that are closed or that no route names.
    pub fn count(&self) -> usize {
        self.ports.len()
    }

    /// Returns port `number`, unless it is closed.
    pub fn get(&self, number: usize) -> Option<&OpenPort> {
        self.ports.get(number)?.open.as_ref()
    }

    /// Returns the MAC address of port `number`.
    ///
    /// # Errors
    /// `Unavailable` when the port is closed.
    pub fn mac(&self, number: usize) -> Result<MacAddr> {
        self.get(number).map(|open| open.port.mac()).ok_or_else(|| is_closed(number))
    }

    /// Returns the memory of the ports.
    pub fn memory(&self) -> &PortMemory {
        &self.resources.memory
    }

    /// Adds `region` to the memory of the ports and maps it for all of them, even after they are started. It
    /// stays mapped as long as the ports exist. Call this before [`App::confine`], which forbids the system
    /// calls that mapping needs. [`Eal::reserve`](vireo_eal::Eal::reserve) creates a region of the kind of
    /// pages that the arguments select. If the process is killed, such pages are freed only after its NICs
    /// without an IOMMU are closed.
    ///
    /// # Errors
    /// As for [`PortMemory::add`] and [`Nic::update_memory`]. On an error, some ports may already be able to
    /// access the memory.
    pub fn add_memory(&mut self, region: Region) -> Result<Arc<DmaMemory>> {
        let memory = self.resources.memory.add(region)?;
        for open in self.ports.iter_mut().filter_map(|port| port.open.as_mut()) {
            open.port.update_memory(&memory)?;
        }
        Ok(memory)
    }

    /// Creates a cache of the packet buffers.
    pub fn cache(&self) -> PoolCache {
        self.resources.pool(self.resources.processes.own()).cache()
    }

    /// Creates a cache of the [`Config::send_only`] buffers, which no device can write to.
    ///
    /// # Errors
    /// `Usage` when there are no such buffers.
    pub fn send_only(&self) -> Result<PoolCache> {
        let none = || {
            let why = "the configuration has none";
            Error::new(ErrorKind::Usage, "cannot allocate send-only packet buffers", why)
        };
        self.send_only.as_ref().map(Pool::cache).ok_or_else(none)
    }

    /// Answers telemetry clients until the returned value is dropped, for an application that polls the queues
    /// itself. [`Ports::forward`] does this. Call it after [`App::confine`].
    pub fn serve_telemetry(&mut self, app: &App) -> Telemetry {
        self.begin();
        Telemetry::start(app, self, None)
    }

    /// Records the links, for later ones to be compared with, and tells other threads the state of the ports.
    fn begin(&mut self) {
        for port in &mut self.ports {
            port.begin();
            port.publish();
        }
    }

    /// Returns the configuration of all ports.
    pub(crate) fn config(&self) -> PortConfig {
        self.resources.config
    }

    /// Returns the state of port `number`, which other threads may read.
    pub(crate) fn status(&self, number: usize) -> SharedStatus {
        self.ports[number].status.clone()
    }

    /// Returns the pools of packet buffers with their names: those that ports receive into, one for each process, and
    /// that of [`Config::send_only`].
    pub(crate) fn pools(&self) -> impl Iterator<Item = (String, &Arc<Pool>)> {
        let received = (0..).zip(&self.resources.pools).map(|(process, pool)| (pool_name(process), pool));
        received.chain(self.send_only.iter().map(|pool| ("send-only".to_owned(), pool)))
    }

    /// Returns the name of the pool that RX queue `queue` of port `number` receives into.
    pub(crate) fn pool_of(&self, number: usize, queue: u16) -> String {
        let pair = self.queues.numbers(number).start + usize::from(queue);
        pool_name(self.resources.home(pair).process)
    }

    /// Returns the counters of all ports.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Enables [`Counts::lcore`] and [`Counts::busy_ticks`].
    pub fn measure_busy_ticks(&mut self) {
        let lcores = self.routes.iter().map(|route| (route.lcore, LcoreTicks::default()));
        self.counts.lcores = Arc::new(lcores.collect());
    }

    /// Lets an lcore sleep when `idle_polls` polls of each of its lanes in a row moved no packet, until a device
    /// interrupts. The ports must be configured with [`PortConfig::rx_interrupts`]. Also enables [`Counts::lcore`].
    pub fn sleep_after(&mut self, idle_polls: u32) {
        self.sleep_after = Some(idle_polls);
        if self.counts.lcores.is_empty() {
            self.measure_busy_ticks();
        }
    }

    /// Sets whether lanes are [tied](crate::tied) where possible, which they are by default.
    pub fn set_tied_lanes(&mut self, on: bool) {
        self.ties = on;
    }

    /// Unties all lanes, and ties them again, in the middle of their traffic at this interval of at least 100 ms.
    /// Without it, only packets that a tied lane cannot forward untie it.
    pub fn untie_every(&mut self, period: Duration) {
        self.untie_period = Some(period);
    }

    /// Sets whether port `number` receives every frame, or only frames addressed to it.
    ///
    /// # Errors
    /// `Unavailable` when the port is closed; otherwise when the device refuses.
    pub fn set_promiscuous(&mut self, number: usize, on: bool) -> Result<()> {
        open_in(&mut self.ports, number)?.port.set_promiscuous(on)?;
        self.ports[number].status.update(|status| status.is_promiscuous = on);
        Ok(())
    }

    /// Starts port `number`. A port of a running program runs already, and [`Ports::forward`] continues it.
    ///
    /// # Errors
    /// `Unavailable` when the port is closed; otherwise when the device refuses, or there is too little
    /// memory or too few buffers.
    pub fn start(&mut self, number: usize) -> Result<()> {
        let Self { ports, resources, queues, .. } = self;
        let open = open_in(ports, number)?;
        if self.runs_elsewhere {
            ports[number].is_down = true;
            return Ok(());
        }
        queues.put_port(number, resources.start(number, open)?);
        ports[number].status.update(|status| status.is_started = true);
        Ok(())
    }

    /// Starts all ports named by the routes. They receive every frame if `promiscuous`.
    ///
    /// # Errors
    /// As for [`Ports::start`] and [`Ports::set_promiscuous`].
    pub fn start_all(&mut self, promiscuous: bool) -> Result<()> {
        for number in self.used.clone() {
            self.set_promiscuous(number, promiscuous)?;
            self.start(number)?;
        }
        Ok(())
    }

    /// Waits until all links are up, for at most 9 s or until `stop`, and calls `waiting` every 100 ms.
    ///
    /// # Errors
    /// The first error of `waiting`.
    pub fn wait_for_links(&self, stop: &StopFlag, waiting: impl FnMut() -> Result<()>) -> Result<()> {
        wait_for_links(self.used.iter().filter_map(|number| self.get(*number)), stop, waiting)
    }

    /// Forwards on all lcores until the run is to stop. `hook` creates the application's hook for each lane.
    /// A port whose device misbehaves is restarted meanwhile. `announce` is called on another thread with
    /// each event. `tick` is called periodically on the main lcore. A take-over by which the program starts
    /// happens here. A secondary process polls the queues of its part, and a primary those that no other process has.
    ///
    /// # Errors
    /// When an lcore cannot be pinned or panicked, or the control thread cannot be started or panicked; as
    /// for [`Ports::lanes`]; why the running program keeps its ports or queues.
    pub fn forward<H: Hook>(
        &mut self,
        app: &App,
        hook: impl FnMut(&Route) -> H,
        announce: &(dyn Fn(RunEvent) + Sync),
        mut tick: impl FnMut(&Counts),
    ) -> Result<()> {
        self.begin();
        let begin = if std::mem::take(&mut self.runs_elsewhere) { Some(Event::new()?) } else { None };
        let _telemetry = Telemetry::start(app, self, begin.clone());
        let mut shares: BTreeMap<u32, Vec<AnyLane<H>>> = BTreeMap::new();
        let mut parked = Vec::new();
        if begin.is_some() {
            parked = self.parked_lanes(hook);
            shares.extend(parked.iter().map(|lane| (lane.lcore, Vec::new())));
        } else {
            let lanes = self.lanes(hook)?;
            for (route, lane) in self.routes.iter().zip(lanes) {
                shares.entry(route.lcore).or_default().push(lane);
            }
        }
        let Self { ports, used, queues, resources, counts, ties, untie_period, sleep_after, .. } = self;
        let (ties, untie_period, sleep_after) = (*ties, *untie_period, *sleep_after);
        let begin = begin.as_ref();
        let shared = Shared { app, resources, counts, ties, untie_period, sleep_after, begin };
        let idle = std::mem::replace(queues, resources.idle_queues());
        let ended =
            forward_on_lcores(shared, (ports, used, idle), shares, parked, announce, || tick(counts))?;
        (self.queues, self.is_handed_over) = (ended.queues, ended.is_handed_over);
        if let Some((standing, primary)) = ended.standing.zip(app.eal.primary()) {
            self.leave_primary(standing, primary.channel());
        }
        Ok(())
    }

    /// Returns the queues of this secondary process, which no lcore polls, to its primary, and leaves the ports to it.
    fn leave_primary(&mut self, Standing { lanes, has_queues, lost }: Standing, primary: &Channel) {
        let home = Home { process: self.resources.processes.own(), node: None };
        let mut cache = self.resources.cache_at(home);
        let report = match has_queues {
            false => Report::Left(LentQueues::default()),
            true => lend::give_up((&self.ports, &mut self.queues, &lanes), &mut cache, None, Report::Left),
        };
        let counts = Report::Counted(lend::counted(&self.ports, &self.queues, &lanes));
        let send = |report| primary.send(report, &Fds::default());
        self.lost_primary = lost.or_else(|| send(&counts).and_then(|()| send(&report)).err());
        self.ports.iter_mut().for_each(SupervisedPort::leave);
    }

    /// Returns the routes whose queues this process polls.
    fn own_routes(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter().filter(|route| self.resources.processes.polls(route.process))
    }

    /// Returns the numbers of a route's queue pairs.
    fn ends(&self, route: &Route) -> (usize, usize) {
        let number = |port| self.queues.numbers(port).start + route.pair;
        (number(route.from), number(route.to))
    }

    /// Returns the lanes of this process's routes without queues, in route order.
    fn parked_lanes<H>(&self, mut hook: impl FnMut(&Route) -> H) -> Vec<ParkedLane<H>> {
        let lane = |route: &Route| {
            let (from, to) = self.ends(route);
            ParkedLane { lcore: route.lcore, from, to, hook: hook(route) }
        };
        self.own_routes().map(lane).collect()
    }

    /// Returns the lanes of all routes, in route order and with their queues, for an application that polls
    /// them itself. [`Ports::put_lanes`] takes the lanes back.
    ///
    /// # Errors
    /// `Usage` when a queue is not started or is in two routes.
    pub fn lanes<H>(&mut self, mut hook: impl FnMut(&Route) -> H) -> Result<Vec<AnyLane<H>>> {
        let queues = &mut self.queues;
        let lanes = self.routes.iter().map(|route| {
            let [from, to] = [route.from, route.to].map(|port| queues.numbers(port).start + route.pair);
            queues.join(from, to, hook(route)).map_err(|_| {
                let what = format!("cannot forward from port {} to port {}", route.from, route.to);
                Error::new(ErrorKind::Usage, what, "a queue is not started or is in two routes")
            })
        });
        lanes.collect()
    }

    /// Takes back lanes that the application polled itself.
    pub fn put_lanes<H>(&mut self, lanes: Vec<AnyLane<H>>) {
        for lane in lanes {
            self.queues.put(lane);
        }
    }

    /// Returns the queues of port `number`, for an application that polls them itself; `None` if the port is
    /// not started or its queues are in use. [`Ports::put_queues`] takes the queues back.
    pub fn take_queues(&mut self, number: usize) -> Option<QueuesOf<Port>> {
        self.queues.take_port(number)
    }

    /// Takes back the queues of port `number`.
    pub fn put_queues(&mut self, number: usize, queues: QueuesOf<Port>) {
        self.queues.put_port(number, queues);
    }

    /// Stops port `number`, which stays open, and returns its counters.
    ///
    /// # Panics
    /// When there is no such port.
    pub fn stop(&mut self, number: usize) -> PortSummary {
        let (queues, mut cache) = (self.queues.take_port(number), self.cache());
        let port = &mut self.ports[number];
        port.stop(queues, &mut cache);
        port.counted.clone()
    }

    /// Stops port `number`, closes it and returns its counters.
    ///
    /// # Panics
    /// When there is no such port.
    pub fn close(&mut self, number: usize) -> PortSummary {
        let summary = self.stop(number);
        self.ports[number].open = None;
        summary
    }

    /// Checks that each device confirmed its stop, and that every packet buffer was returned. Call this when
    /// all ports have stopped and no cache is left. Checks nothing if a successor has the ports and the buffers.
    ///
    /// # Errors
    /// The reason why a port did not confirm its stop; `Protocol` when buffers are lost; `Unavailable` when the primary
    /// of this secondary process has ended.
    pub fn check_buffers(&mut self) -> Result<()> {
        if self.is_handed_over {
            return Ok(());
        }
        let unconfirmed = self.ports.iter_mut().find_map(|port| port.unconfirmed.take());
        if let Some(error) = unconfirmed.or_else(|| self.lost_primary.take()) {
            return Err(error);
        }
        for (_, pool) in self.pools() {
            let lost = pool.count() - pool.available();
            if lost > 0 {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    format!("{lost} of {} packet buffers were not returned", pool.count()),
                    "a driver lost them",
                ));
            }
        }
        Ok(())
    }

    /// Returns the packet balance of each forwarding direction. Call this when the ports have stopped.
    pub fn balances(&self) -> Vec<Balance> {
        Balance::of(&self.routes, &self.counts)
    }

    /// Closes all ports, calls `each` with the number and the summary of each port that a route names, and
    /// checks that every buffer was returned and every packet is accounted for.
    ///
    /// # Errors
    /// As for [`Ports::check_buffers`] and [`Balance::check`]; otherwise the first error of `each`.
    pub fn finish(mut self, mut each: impl FnMut(usize, &PortSummary) -> Result<()>) -> Result<()> {
        let mut told = Ok(());
        for number in self.used.clone() {
            let summary = self.close(number);
            told = told.and_then(|()| each(number, &summary));
        }
        self.check_buffers()?;
        self.balances().iter().try_for_each(Balance::check)?;
        told
    }
}

fn open_in(ports: &mut [SupervisedPort], number: usize) -> Result<&mut OpenPort> {
    ports.get_mut(number).and_then(|port| port.open.as_mut()).ok_or_else(|| is_closed(number))
}

/// Name of the pool of `process`.
fn pool_name(process: u16) -> String {
    if process == 0 { "packets".to_owned() } else { format!("packets-{process}") }
}

fn is_closed(number: usize) -> Error {
    Error::new(ErrorKind::Unavailable, format!("cannot use port {number}"), "it is not open")
}

#[cfg(test)]
pub(crate) mod tests {
    use vireo_drivers::e1000;
    use vireo_drivers::fakedev::e1000::{FakeE1000, ID_82540EM};
    use vireo_eal::bdf::Bdf;
    use vireo_eal::mem::Backing;

    use super::*;

    /// Creates three ports with two queue pairs each, and routes given as `(from, to, pair)`.
    pub(crate) fn ports(routes: &[(usize, usize, usize)]) -> Result<Ports> {
        let open = |device| {
            let address = Bdf::new(0, 0, device, 0).unwrap();
            let (function, _) = FakeE1000::new(address, ID_82540EM, MacAddr([2, 0, 0, 0, 0, device]));
            OpenPort::virtual_port(e1000::Device::probe(function).unwrap().into(), "port", String::new())
        };
        let route =
            |&(from, to, pair): &(usize, usize, usize)| Route { lcore: 0, from, to, pair, process: 0 };
        let need = MemoryNeed {
            buffers: 32,
            send_only: 0,
            config: PortConfig::with_descriptors(64, 64).with_pairs(2),
        };
        let region = Region::new(Pool::bytes(32), Backing::SmallPages).unwrap();
        let memory = PortMemory::from(DmaMemory::map(region, &[]).unwrap());
        Ports::new((0..3).map(open).collect(), routes.iter().map(route).collect(), memory, &need)
    }

    #[test]
    fn routes_without_queues_are_refused() {
        for route in [(0, 3, 0), (3, 0, 0), (0, 1, 2)] {
            let error = ports(&[(0, 1, 0), route]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{route:?}");
            assert!(error.to_string().contains("there are 3 ports with 2 queue pairs each"), "{error}");
        }
        let mut unstarted = ports(&[(0, 1, 0)]).unwrap();
        assert_eq!(unstarted.used().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(unstarted.lanes(|_| ()).unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn memory_that_is_added_is_in_the_map_of_the_ports() {
        let mut ports = ports(&[(0, 1, 0)]).unwrap();
        let added = ports.add_memory(Region::new(Pool::bytes(8), Backing::SmallPages).unwrap()).unwrap();
        let buffers = ports.memory().of(ports.get(0).unwrap()).unwrap();
        assert!(Arc::ptr_eq(added.memory_map(), buffers.memory_map()) && !Arc::ptr_eq(&added, buffers));
        assert_ne!(added.linear_iova(), buffers.linear_iova());
        assert_eq!(Pool::new(&added, 8).unwrap().available(), 8);
    }

    #[test]
    fn ways_that_meet_in_a_port_have_sums_of_their_own() {
        let ports = ports(&[(0, 2, 0), (1, 2, 1), (2, 0, 0), (2, 0, 1)]).unwrap();
        for (from, pair, packets) in [(0, 0, 5), (1, 1, 7)] {
            ports.counts.port(from).rx(pair).packets.add(packets);
            ports.counts.port(2).tx(pair).packets.add(packets);
        }
        let balances = ports.balances();
        let received: Vec<_> = balances.iter().map(|way| (way.from, way.to, way.rx_packets)).collect();
        assert_eq!(received, [(0, 2, 5), (1, 2, 7), (2, 0, 0)]);
        balances.iter().for_each(|balance| balance.check().unwrap());
        ports.counts.port(1).rx(1).packets.add(1);
        let wrong: Vec<bool> = ports.balances().iter().map(|balance| balance.check().is_err()).collect();
        assert_eq!(wrong, [false, true, false]);
    }
}
