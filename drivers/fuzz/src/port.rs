//! A started port whose device does what the input says, and the promises that it keeps meanwhile.

use std::collections::HashSet;
use std::sync::Arc;

use arbitrary::Arbitrary;
use vireo_drivers::port::{Nic, PortConfig, RxBurst, TxBurst};
use vireo_eal::dma::{Burst, DATA_ROOM, DeviceView, DmaMemory, Pool, PoolCache};
use vireo_eal::mem::{Backing, Region};

/// Packet buffers: two full rings, a burst, and some more.
const BUFFERS: u32 = 176;
/// Bytes behind the buffers, where the rings are.
const RINGS: usize = 16 << 10;
const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);

/// What the lcore does.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) enum Poll {
    /// Receives a burst and drops it.
    Receive,
    /// Receives a burst and sends it.
    Forward,
    /// Sends so many packets of this length, modulo what there can be.
    Send(u8, u16),
}

/// Words that the device writes at any place, although nothing was offered there.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) struct Poke {
    /// Into the rings, or else anywhere.
    pub(crate) rings: bool,
    pub(crate) at: u32,
    pub(crate) bytes: [u8; 8],
}

/// Memory for one port, and its packet buffers in front of the rings.
pub(crate) fn memory() -> (Arc<DmaMemory>, Arc<Pool>) {
    let region = Region::new(Pool::bytes(BUFFERS) + RINGS, Backing::SmallPages).expect("pages of 4 KiB");
    let memory = DmaMemory::map(region, &[]).expect("no address space to map it in");
    let pool = Pool::new(&memory, BUFFERS).expect("room for the buffers");
    (memory, pool)
}

/// `memory` as a device has it.
pub(crate) fn view(memory: &Arc<DmaMemory>) -> DeviceView {
    memory.device_view().expect("a memfd can be mapped twice")
}

pub(crate) struct Port<N: Nic> {
    nic: N,
    queues: (N::Rx, N::Tx),
    memory: Arc<DmaMemory>,
    view: DeviceView,
    cache: PoolCache,
}

impl<N: Nic> Port<N> {
    /// Starts `nic`, whose device was given `memory`, with all offloads that it has.
    pub(crate) fn start(mut nic: N, memory: Arc<DmaMemory>, pool: &Arc<Pool>) -> Self {
        let mut cache = pool.cache();
        let config = CONFIG.with_offloads(nic.capabilities().offloads);
        let queues = nic.start_pair(&config, &memory, &mut cache).expect("an honest device starts");
        let view = view(&memory);
        Self { nic, queues, memory, view, cache }
    }

    pub(crate) fn poll(&mut self, poll: Poll) {
        let mut burst = Burst::new();
        match poll {
            Poll::Receive => self.receive(&mut burst),
            Poll::Forward => {
                self.receive(&mut burst);
                self.send(&mut burst);
            }
            Poll::Send(count, len) => {
                while burst.len() < usize::from(count).min(burst.capacity())
                    && let Some(buffer) = self.cache.allocate()
                {
                    burst.push(buffer.with_len(usize::from(len) % (DATA_ROOM + 1)));
                }
                self.send(&mut burst);
            }
        }
        burst.into_iter().for_each(|packet| self.cache.free(packet));
    }

    /// Receives, and reads all that is said to be in the packets.
    fn receive(&mut self, burst: &mut Burst) {
        self.queues.0.rx_burst(&mut self.cache, burst);
        let mut bytes = [0; DATA_ROOM];
        for packet in &*burst {
            self.cache.read(packet, 0, &mut bytes[..packet.len()]);
            if let Some(partial) = self.cache.partial_checksum(packet) {
                let at = usize::from(partial.start) + usize::from(partial.offset);
                bytes[..packet.len()][at..at + 2].fill(0);
            }
        }
    }

    fn send(&mut self, burst: &mut Burst) {
        let before = burst.len();
        let sent = self.queues.1.tx_burst(&mut self.cache, burst);
        assert_eq!(sent + burst.len(), before, "a packet is sent or stays");
    }

    pub(crate) fn poke(&self, poke: Poke) {
        let len = self.memory.region().len();
        let start = if poke.rings { len - RINGS } else { 0 };
        let at = (start + poke.at as usize % (len - start)).min(len - poke.bytes.len());
        let iova = self.memory.linear_iova().expect("one region") + at as u64;
        self.view.write(iova, &poke.bytes).expect("within the region");
    }

    /// Stops the port: every buffer must be there again, once.
    pub(crate) fn stop(mut self) {
        let (rx, tx) = self.queues;
        self.nic.stop_pair(rx, tx, &mut self.cache).expect("the device confirms its reset");
        count(self.cache);
    }
}

/// Asserts that the pool behind `cache` has each of its buffers, once.
pub(crate) fn count(mut cache: PoolCache) {
    let pool = Arc::clone(cache.pool());
    let buffers: Vec<_> = std::iter::from_fn(|| cache.allocate()).collect();
    let places: HashSet<u64> = buffers.iter().map(|buffer| cache.iova(buffer)).collect();
    assert_eq!((buffers.len(), places.len()), (pool.count() as usize, pool.count() as usize));
    buffers.into_iter().for_each(|buffer| cache.free(buffer));
}
