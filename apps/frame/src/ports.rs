//! The ports of a run, from reserving their memory to checking that every buffer and packet is accounted for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use vireo_drivers::handover::PortRecord;
use vireo_drivers::memory::{MemoryNeed, PortMemory};
use vireo_drivers::port::{MacAddr, Nic, PortConfig, QueuesOf};
use vireo_drivers::ports::{OpenPort, buffers_needed, wait_for_links};
use vireo_drivers::table::Port;
use vireo_eal::dma::{DmaMemory, FreeBuffers, Pool, PoolCache};
use vireo_eal::event::Event;
use vireo_eal::handover::{Fds, ReceivedFds};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::Region;
use vireo_eal::{Error, ErrorKind, Result};

use crate::app::App;
use crate::balance::Balance;
use crate::control::{ParkedLane, RunEvent};
use crate::counts::{Counts, LcoreTicks};
use crate::forward::AnyLane;
use crate::hook::Hook;
use crate::idle::IdleQueues;
use crate::launch::{Shared, forward_on_lcores};
use crate::route::Route;
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
    /// Total number of packet buffers; by default as many as rings, bursts and caches hold at once.
    pub buffers: Option<u32>,
    /// Number of these packet buffers that devices only send from. See [`Ports::send_only`].
    pub send_only: u32,
}

impl Config {
    /// Returns the memory that this configuration needs for `ports` ports and `caches` caches of packet
    /// buffers. Each lcore has one cache per NUMA node that its ports are on.
    pub fn need(&self, ports: usize, caches: usize) -> MemoryNeed {
        let Self { port: config, send_only, .. } = *self;
        let needed = || buffers_needed(ports, caches, &config);
        let buffers = self.buffers.unwrap_or_else(needed).saturating_sub(send_only);
        MemoryNeed { buffers, send_only, config }
    }
}

/// What a port needs to start.
#[derive(Debug)]
pub(crate) struct PortResources {
    pub(crate) pool: Arc<Pool>,
    memory: PortMemory,
    config: PortConfig,
}

impl PortResources {
    /// Starts a port.
    pub(crate) fn start(&self, open: &mut OpenPort) -> Result<QueuesOf<Port>> {
        let (rings, mut near) = (self.memory.of(open)?, self.pool.cache_near(self.memory.node_of(open)));
        let offloads = self.config.offloads & open.port.capabilities().offloads;
        open.port.start(&self.config.with_offloads(offloads), rings, &mut near)
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

    /// Continues a port of the predecessor.
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
    /// Whether the ports run for a predecessor, until [`Ports::forward`] takes them over.
    is_successor: bool,
    /// Whether a successor has the ports.
    is_handed_over: bool,
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
        let pool = memory.pool(need.buffers)?;
        let send_only = match need.send_only {
            0 => None,
            count => Some(memory.send_only(count)?),
        };
        let resources = PortResources { pool, memory, config: need.config };
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
            is_successor: false,
            is_handed_over: false,
        })
    }

    /// Leaves the start of all ports to [`Ports::forward`], which takes them over from the running program.
    pub(crate) fn of_predecessor(self) -> Self {
        Self { is_successor: true, ..self }
    }

    /// Returns whether a successor has the ports. They are closed then, and their buffers remain with it.
    pub fn is_handed_over(&self) -> bool {
        self.is_handed_over
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
        self.resources.pool.cache()
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

    /// Returns the pools of packet buffers: those that ports receive into, and [`Config::send_only`] ones.
    pub(crate) fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        [&self.resources.pool].into_iter().chain(&self.send_only)
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

    /// Starts port `number`. In a take-over, the port runs already, and [`Ports::forward`] continues it.
    ///
    /// # Errors
    /// `Unavailable` when the port is closed; otherwise when the device refuses, or there is too little
    /// memory or too few buffers.
    pub fn start(&mut self, number: usize) -> Result<()> {
        let Self { ports, resources, queues, .. } = self;
        let open = open_in(ports, number)?;
        if self.is_successor {
            ports[number].is_down = true;
            return Ok(());
        }
        queues.put_port(number, resources.start(open)?);
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
    /// happens here.
    ///
    /// # Errors
    /// When an lcore cannot be pinned or panicked, or the control thread cannot be started or panicked; as
    /// for [`Ports::lanes`]; why the running program keeps its ports.
    pub fn forward<H: Hook>(
        &mut self,
        app: &App,
        hook: impl FnMut(&Route) -> H,
        announce: &(dyn Fn(RunEvent) + Sync),
        mut tick: impl FnMut(&Counts),
    ) -> Result<()> {
        self.begin();
        let begin = if std::mem::take(&mut self.is_successor) { Some(Event::new()?) } else { None };
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
        let node = |number| self.get(number).and_then(|open| self.memory().node_of(open));
        let of_port = |number| self.queues.numbers(number).map(move |_| node(number));
        let nodes: Vec<Option<u32>> = (0..self.count()).flat_map(of_port).collect();
        let Self { ports, used, queues, resources, counts, ties, untie_period, sleep_after, .. } = self;
        let (ties, untie_period, sleep_after) = (*ties, *untie_period, *sleep_after);
        let begin = begin.as_ref();
        let shared = Shared { app, resources, counts, ties, untie_period, sleep_after, begin, nodes: &nodes };
        let idle = std::mem::replace(queues, resources.idle_queues());
        let ended =
            forward_on_lcores(shared, (ports, used, idle), shares, parked, announce, || tick(counts))?;
        (self.queues, self.is_handed_over) = (ended.queues, ended.is_handed_over);
        Ok(())
    }

    /// Returns the lanes of all routes without queues, in route order.
    fn parked_lanes<H>(&self, mut hook: impl FnMut(&Route) -> H) -> Vec<ParkedLane<H>> {
        let lane = |route: &Route| {
            let [from, to] = [route.from, route.to].map(|port| self.queues.numbers(port).start + route.pair);
            ParkedLane { lcore: route.lcore, from, to, hook: hook(route) }
        };
        self.routes.iter().map(lane).collect()
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
    /// The reason why a port did not confirm its stop; `Protocol` when buffers are lost.
    pub fn check_buffers(&mut self) -> Result<()> {
        if self.is_handed_over {
            return Ok(());
        }
        if let Some(error) = self.ports.iter_mut().find_map(|port| port.unconfirmed.take()) {
            return Err(error);
        }
        for pool in self.pools() {
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
        let route = |&(from, to, pair): &(usize, usize, usize)| Route { lcore: 0, from, to, pair };
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
