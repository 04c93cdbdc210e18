//! Vireo at the other end: a thread of this process that sends some packets and then back what it receives.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{panic, thread};

use vireo_drivers::counters::{Count, PortCounters};
use vireo_drivers::driver::Vdev;
use vireo_drivers::port::{Nic, PortConfig, TxBurst};
use vireo_drivers::table::Port;
use vireo_drivers::vhost;
use vireo_drivers::virtio::UserOptions;
use vireo_eal::dma::{Burst, DmaMemory, MAX_BURST, Pool, PoolCache};
use vireo_eal::lcore::{StopFlag, pin_to};
use vireo_eal::mem::{Backing, Region};
use vireo_eal::{Error, ErrorKind, Result};
use vireo_frame::forward::{AnyLane, Lane, Polling, forward_any};
use vireo_l2fwd::rewrite::Rewrite;

use super::Side;

const CONFIG: PortConfig = PortConfig::with_descriptors(256, 256);
/// Number of ports. What arrives at one leaves through the other.
const PORTS: usize = 2;
const BUFFERS: u32 = 4096;
/// Packets that circulate in each direction, and their length, as those of testpmd.
const PACKETS: usize = 8 * MAX_BURST;
const LENGTH: usize = 60;
/// Longest time until the program at the other end takes them.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the thread has done so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// Packets received on both ports.
    pub(super) packets: u64,
    /// TSC ticks of polls that moved packets.
    pub(super) ticks: u64,
}

/// Two open ports.
#[derive(Debug)]
pub(super) struct Echo {
    ports: Vec<Port>,
    lanes: Vec<AnyLane<Rewrite>>,
    cache: PoolCache,
}

impl Echo {
    /// Opens the ports at the end `side` of connections at `socket(0)` and `socket(1)`. Those at the device's end
    /// listen there.
    pub(super) fn open(side: Side, socket: impl Fn(usize) -> String) -> Result<Self> {
        let len = (Pool::bytes(BUFFERS) + (1 << 20)).next_multiple_of(4096);
        let memory = DmaMemory::map(Region::new(len, Backing::SmallPages)?, &[])?;
        let mut cache = Pool::new(&memory, BUFFERS)?.cache();
        let (mut ports, mut rx_queues, mut tx_queues) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..PORTS {
            let mut port: Port = match side {
                Side::VirtioUser => open::<UserOptions>("path", number, socket(number))?.into(),
                Side::Vhost => open::<vhost::Options>("iface", number, socket(number))?.into(),
            };
            let (rx, tx) = port.start_pair(&CONFIG, &memory, &mut cache)?;
            ports.push(port);
            rx_queues.push(rx);
            tx_queues.push(tx);
        }
        tx_queues.reverse();
        let pairs = rx_queues.into_iter().zip(tx_queues).enumerate();
        let lane = |(from, (rx, tx))| Lane { rx, from, tx, to: PORTS - 1 - from, hook: Rewrite::NONE };
        let lanes = pairs.map(lane).collect();
        Ok(Self { ports, lanes, cache })
    }

    /// Sends packets, and then back what it receives, on CPU `cpu`.
    pub(super) fn start(mut self, cpu: usize) -> Running {
        let counters = self.ports.iter().map(|port| port.counters().clone()).collect();
        let (stop, ticks) = (StopFlag::new(), Arc::new(Count::default()));
        let (stopped, busy_ticks) = (stop.clone(), Arc::clone(&ticks));
        let thread = thread::spawn(move || {
            pin_to(cpu)?;
            for lane in &mut self.lanes {
                send(&mut lane.tx, &mut self.cache)?;
            }
            let polling = Polling { busy_ticks: Some(&busy_ticks), ..Polling::default() };
            self.lanes = forward_any(self.lanes, &mut self.cache, polling, &stopped, || ());
            Ok(self)
        });
        Running { counters, ticks, stop, thread: Some(thread) }
    }
}

fn open<V: Vdev>(key: &str, number: usize, socket: String) -> Result<V::Device> {
    let name = format!("{}{number}", V::NAMES[0]);
    V::parse(&name, &[(key.to_owned(), socket)])?.open(&name, &StopFlag::new())
}

/// Sends the packets that will circulate, as soon as the other end has room for them.
fn send(tx: &mut impl TxBurst, cache: &mut PoolCache) -> Result<()> {
    let (since, mut left) = (Instant::now(), PACKETS);
    while left > 0 {
        let packets = (0..left.min(MAX_BURST)).map_while(|_| cache.allocate());
        let mut burst: Burst = packets.map(|packet| packet.with_len(LENGTH)).collect();
        left -= tx.tx_burst(cache, &mut burst);
        burst.drain(..).for_each(|packet| cache.free(packet));
        if left > 0 && since.elapsed() > PATIENCE {
            let why = format!("the other end has no room for {left} of {PACKETS} packets");
            return Err(Error::new(ErrorKind::Unavailable, "cannot start the packets", why));
        }
    }
    Ok(())
}

/// The thread.
#[derive(Debug)]
pub(super) struct Running {
    counters: Vec<PortCounters>,
    ticks: Arc<Count>,
    stop: StopFlag,
    thread: Option<JoinHandle<Result<Echo>>>,
}

impl Running {
    pub(super) fn progress(&self) -> Progress {
        let packets = self.counters.iter().map(|counters| counters.rx(0).read().packets).sum();
        Progress { packets, ticks: self.ticks.get() }
    }

    /// Ends the thread and closes the ports.
    ///
    /// # Errors
    /// If it ended earlier, the reason.
    pub(super) fn end(mut self) -> Result<()> {
        self.stop.set();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(ended)) => ended.map(drop),
            Some(Err(panic)) => panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.set();
    }
}
