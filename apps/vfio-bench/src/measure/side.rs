//! Two ports and their memory: the generator's ends, or the forwarder's.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vireo_bus_pci::{Bus, PciInfo};
use vireo_drivers::memory::{self, MemoryNeed, PortMemory};
use vireo_drivers::port::{MacAddr, Nic, QueueSizes, RxBurst, TxBurst, counters};
use vireo_drivers::ports::{self, OpenPort};
use vireo_drivers::table::{RxQueue, TxQueue};
use vireo_eal::Result;
use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, Packet, Pool, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};
use vireo_eal::vfio::{Vfio, VfioMode};
use vireo_l2fwd::forward::{AnyLane, Lane, ethernet};
use vireo_pktgen::frame::{self, SHORTEST, Tag};
use vireo_pktgen::generator::{self, End, Expect, KNOCKS, Outcome, PATIENCE, Stream};

const SIZES: QueueSizes = QueueSizes { rx: 1024, tx: 1024 };
const BUFFERS: u32 = 8192;

/// Ports of one side, with memory of their own.
pub(crate) struct Side {
    pub(super) ports: Vec<OpenPort>,
    queues: Vec<(RxQueue, TxQueue)>,
    cache: PoolCache,
    /// A cache of the same pool: the generator's two queues have one each.
    to_send: PoolCache,
    memory: PortMemory,
    /// What mapping the memory took.
    pub(super) mapped: Duration,
}

impl Side {
    /// Opens and starts both.
    pub(crate) fn start(bus: &Bus, infos: [&PciInfo; 2], mode: VfioMode, promiscuous: bool) -> Result<Self> {
        let vfio = Vfio::new(None);
        let mut ports = infos
            .into_iter()
            .map(|info| ports::open_one(bus, &vfio, info.clone(), mode, &[]))
            .collect::<Result<Vec<_>>>()?;
        let need = MemoryNeed { buffers: BUFFERS, send_only: 0, sizes: SIZES, pairs: 1 };
        let opened: Vec<&OpenPort> = ports.iter().collect();
        let region = Region::new(need.bytes(&opened), Backing::HugeMemfd)?;
        let since = Instant::now();
        let memory = memory::map(region, &need, &opened)?;
        let mapped = since.elapsed();
        let pool = Pool::new(&memory.buffers, BUFFERS)?;
        let (mut cache, to_send) = (pool.cache(), pool.cache());
        let mut queues = Vec::with_capacity(ports.len());
        for open in &mut ports {
            open.port.set_promiscuous(promiscuous)?;
            queues.push(open.port.start(memory.of(open), &mut cache, SIZES)?);
        }
        Ok(Self { ports, queues, cache, to_send, memory, mapped })
    }

    /// Frames from the first port to the second, until one arrives or for `patience`.
    pub(crate) fn knocks(&self, window: u64, patience: Duration) -> Stream {
        // The streams that follow count on from it.
        let run = Tsc::now() as u32 >> 1;
        Stream {
            run,
            earlier: run..run,
            // Every NIC's filter lets the broadcast address pass, whatever the forwarder's own address is.
            destination: MacAddr([0xff; 6]),
            source: self.ports[0].port.mac(),
            expect: Some(Expect { destination: Some(MacAddr([2, 0, 0, 0, 0, 1])), source: None }),
            sizes: SHORTEST..=SHORTEST,
            rate: Some(KNOCKS),
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

    /// The lanes between the two ports, in both directions. They take the queues; [`Self::take_back`] returns these.
    pub(crate) fn lanes(&mut self) -> Vec<AnyLane> {
        let (rx, tx): (Vec<_>, Vec<_>) = std::mem::take(&mut self.queues).into_iter().unzip();
        let pairs = rx.into_iter().enumerate().zip(tx.into_iter().rev());
        pairs
            .map(|((from, rx), tx)| {
                let to = 1 - from;
                Lane { rx, from, tx, to, ethernet: Some(ethernet(to, self.ports[to].port.mac())) }
            })
            .collect()
    }

    /// Takes the queues of [`Self::lanes`] back.
    pub(crate) fn take_back(&mut self, mut lanes: Vec<AnyLane>) {
        lanes.sort_by_key(|lane| lane.from);
        let (rx, tx): (Vec<_>, Vec<_>) = lanes.into_iter().map(|lane| (lane.rx, lane.tx)).unzip();
        self.queues = rx.into_iter().zip(tx.into_iter().rev()).collect();
    }

    /// A cache of its own for the lanes.
    pub(crate) fn cache(&self) -> PoolCache {
        self.cache.pool().cache()
    }

    /// Sends a burst of `count` shortest frames on the first port.
    pub(crate) fn send_burst(&mut self, count: usize) {
        let mut burst = Burst::new();
        let mut bytes = [0; SHORTEST];
        let tag = Tag { run: 0, sequence: 0, ticks: 0 };
        frame::write(&mut bytes, MacAddr([0xff; 6]), self.ports[0].port.mac(), tag);
        while burst.len() < count
            && let Some(buffer) = self.to_send.allocate()
        {
            let mut packet = Packet::new(buffer, bytes.len());
            self.to_send.write(&mut packet, 0, &bytes);
            burst.push(packet);
        }
        self.queues[0].1.tx_burst(&mut self.to_send, &mut burst);
        for packet in burst.drain(..) {
            self.to_send.free(packet.into_buffer());
        }
    }

    /// Throws away what has come on the second port.
    pub(crate) fn drain(&mut self) {
        let mut burst = Burst::new();
        self.queues[1].0.rx_burst(&mut self.cache, &mut burst);
        for packet in burst.drain(..) {
            self.cache.free(packet.into_buffer());
        }
    }

    /// Stops the ports, and counts; `side` is the name that lost packets are counted under.
    pub(crate) fn stop(mut self, side: &str) -> Result<Stopped> {
        let (mut drops, mut doorbells) = (BTreeMap::new(), 0);
        for (open, (rx, tx)) in self.ports.iter_mut().zip(self.queues) {
            let (rx_stats, tx_stats) = (rx.stats(), tx.stats());
            doorbells += rx_stats.doorbells + tx_stats.doorbells;
            open.port.stop(rx, tx, &mut self.cache)?;
            let device = open.port.device_drops();
            let lost: Vec<&str> =
                device.iter().map(|(name, _)| *name).chain(["rx_errors", "tx_errors"]).collect();
            for (name, count) in counters(rx_stats, tx_stats, device.clone()) {
                if lost.contains(&name) {
                    *drops.entry(format!("{side}_{name}")).or_default() += count;
                }
            }
        }
        drop(self.memory);
        Ok(Stopped { ports: self.ports, drops, doorbells })
    }
}

/// A side that has stopped.
pub(crate) struct Stopped {
    pub(super) ports: Vec<OpenPort>,
    /// What each port counted as lost, by name.
    pub(super) drops: BTreeMap<String, u64>,
    /// Doorbell writes of all queues.
    pub(super) doorbells: u64,
}
