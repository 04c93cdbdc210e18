//! Two ports and their memory: the generator's or the forwarder's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vireo_bus_pci::{Bus, PciInfo, Report};
use vireo_drivers::counters::QueueCounters;
use vireo_drivers::memory;
use vireo_drivers::port::{MacAddr, Queues, RxBurst, TxBurst};
use vireo_drivers::ports::{self, OpenPort};
use vireo_drivers::table::{RxQueue, TxQueue};
use vireo_eal::Result;
use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};
use vireo_eal::vfio::{Vfio, VfioMode};
use vireo_frame::forward::AnyLane;
use vireo_frame::{Config, Ports, Route};
use vireo_l2fwd::rewrite::Rewrite;
use vireo_pktgen::frame::{self, SHORTEST, Tag};
use vireo_pktgen::generator::{self, End, Expect, Outcome, PATIENCE, PROBE_RATE, Stream};

const BUFFERS: u32 = 8192;

/// Ports of one side, with memory of their own.
pub(crate) struct Side {
    ports: Ports,
    /// Station addresses of the ports.
    pub(super) macs: [MacAddr; 2],
    /// Queues of the ports, except while lanes have them.
    queues: Vec<(RxQueue, TxQueue)>,
    cache: PoolCache,
    /// A second cache of the same pool, because the generator's two queues need one each.
    to_send: PoolCache,
    /// Time that mapping the memory took.
    pub(super) mapped: Duration,
}

impl Side {
    /// Opens and starts both ports.
    pub(crate) fn start(bus: &Bus, infos: [&PciInfo; 2], mode: VfioMode, promiscuous: bool) -> Result<Self> {
        let vfio = Vfio::new(None);
        let open = infos
            .into_iter()
            .map(|info| ports::open_one(bus, &vfio, info.clone(), mode, &[]))
            .collect::<Result<Vec<_>>>()?;
        let need = Config { buffers: Some(BUFFERS), ..Config::default() }.need(open.len(), 1);
        let opened: Vec<&OpenPort> = open.iter().collect();
        let region = Region::new(need.bytes(&opened), Backing::HugeMemfd)?;
        let since = Instant::now();
        let memory = memory::map(region, &need, &opened)?;
        let mapped = since.elapsed();
        let routes = [(0, 1), (1, 0)].map(|(from, to)| Route { lcore: 0, from, to, pair: 0, process: 0 });
        let mut ports = Ports::new(open, routes.into(), memory, &need)?;
        ports.start_all(promiscuous)?;
        let macs = [ports.mac(0)?, ports.mac(1)?];
        let (cache, to_send) = (ports.cache(), ports.cache());
        let mut side = Self { ports, macs, queues: Vec::new(), cache, to_send, mapped };
        side.take_queues();
        Ok(side)
    }

    fn take_queues(&mut self) {
        self.queues =
            [0, 1].into_iter().filter_map(|port| self.ports.take_queues(port)?.into_pair()).collect();
    }

    fn put_queues(&mut self) {
        for (port, (rx, tx)) in std::mem::take(&mut self.queues).into_iter().enumerate() {
            self.ports.put_queues(port, Queues::pair(rx, tx));
        }
    }

    /// Reports of how the ports were opened.
    pub(super) fn reports(&self) -> impl Iterator<Item = &Report> {
        [0, 1].into_iter().filter_map(|port| self.ports.get(port)?.report.as_ref())
    }

    /// Returns a stream of frames from the first port to the second, which ends when one arrives or after
    /// `patience`.
    pub(crate) fn probes(&self, window: u64, patience: Duration) -> Stream {
        // The streams that follow increment this number.
        let run = Tsc::now() as u32 >> 1;
        Stream {
            run,
            earlier: run..run,
            // Every NIC's filter accepts the broadcast address, whatever the forwarder's own address is.
            destination: MacAddr([0xff; 6]),
            source: self.macs[0],
            expect: Some(Expect { destination: Some(MacAddr([2, 0, 0, 0, 0, 1])), source: None }),
            sizes: SHORTEST..=SHORTEST,
            rate: Some(PROBE_RATE),
            window,
            end: End::FirstArrival(patience),
            patience: PATIENCE,
        }
    }

    /// Sends `stream` on the first port and receives it on the second.
    pub(crate) fn send(&mut self, stream: &Stream, stop: &StopFlag) -> Result<Outcome> {
        let (first, rest) = self.queues.split_at_mut(1);
        let tx = (&mut first[0].1, &mut self.to_send);
        generator::run(stream, tx, (&mut rest[0].0, &mut self.cache), stop)
    }

    /// Returns the lanes between the two ports, in both directions. The lanes take the queues, and
    /// [`Self::take_back`] returns them.
    pub(crate) fn lanes(&mut self) -> Result<Vec<AnyLane<Rewrite>>> {
        self.put_queues();
        let macs = self.macs;
        self.ports.lanes(|route| Rewrite::of(route.to, macs[route.to]))
    }

    /// Takes the queues back from the lanes of [`Self::lanes`].
    pub(crate) fn take_back(&mut self, lanes: Vec<AnyLane<Rewrite>>) {
        self.ports.put_lanes(lanes);
        self.take_queues();
    }

    /// Counters of the two ports' queues.
    pub(crate) fn counters(&self) -> Counters {
        let of = |port| self.ports.counts().port(port);
        Counters { rx: [0, 1].map(|port| of(port).rx(0)), tx: [0, 1].map(|port| of(port).tx(0)) }
    }

    /// Returns a separate cache for the lanes.
    pub(crate) fn cache(&self) -> PoolCache {
        self.cache.pool().cache()
    }

    /// Sends a burst of `count` shortest frames on the first port.
    pub(crate) fn send_burst(&mut self, count: usize) {
        let mut burst = Burst::new();
        let mut bytes = [0; SHORTEST];
        let tag = Tag { run: 0, sequence: 0, ticks: 0 };
        frame::write(&mut bytes, MacAddr([0xff; 6]), self.macs[0], tag);
        while burst.len() < count
            && let Some(buffer) = self.to_send.allocate()
        {
            let mut packet = buffer.with_len(bytes.len());
            self.to_send.write(&mut packet, 0, &bytes);
            burst.push(packet);
        }
        self.queues[0].1.tx_burst(&mut self.to_send, &mut burst);
        for packet in burst.drain(..) {
            self.to_send.free(packet);
        }
    }

    /// Discards a burst of what has arrived on the second port. Returns the number of frames.
    pub(crate) fn drain(&mut self) -> usize {
        let mut burst = Burst::new();
        self.queues[1].0.rx_burst(&mut self.cache, &mut burst);
        let arrived = burst.len();
        for packet in burst.drain(..) {
            self.cache.free(packet);
        }
        arrived
    }

    /// Stops the ports and collects their counters. `side` is the prefix of the names of lost packets.
    pub(crate) fn stop(mut self, side: &str) -> Result<Stopped> {
        self.put_queues();
        let Self { mut ports, cache, to_send, .. } = self;
        drop((cache, to_send));
        let (mut drops, mut doorbells) = (BTreeMap::new(), 0);
        for number in [0, 1] {
            let stats = ports.stop(number).stats;
            let (rx, tx) = (stats.rx_sum(), stats.tx_sum());
            doorbells += rx.doorbells + tx.doorbells;
            for (name, count) in
                stats.device.into_iter().chain([("rx_errors", rx.errors), ("tx_errors", tx.errors)])
            {
                *drops.entry(format!("{side}_{name}")).or_default() += count;
            }
        }
        ports.check_buffers()?;
        Ok(Stopped { ports, drops, doorbells })
    }
}

/// Counters of the queues of two ports.
pub(crate) struct Counters {
    pub(crate) rx: [Arc<QueueCounters>; 2],
    pub(crate) tx: [Arc<QueueCounters>; 2],
}

/// A stopped side.
pub(crate) struct Stopped {
    /// The ports, still open.
    pub(super) ports: Ports,
    /// Packets that the ports counted as lost, by name.
    pub(super) drops: BTreeMap<String, u64>,
    /// Doorbell writes of all queues.
    pub(super) doorbells: u64,
}
