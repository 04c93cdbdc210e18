//! A started port whose device follows the input, and the guarantees that the port must keep.

use std::collections::HashSet;
use std::sync::Arc;

use arbitrary::Arbitrary;
use vireo_drivers::port::{Nic, PortConfig, RxBurst, TxBurst};
use vireo_eal::dma::{Burst, DATA_ROOM, DeviceView, DmaMemory, Pool, PoolCache};
use vireo_eal::mem::{Backing, Region};

/// Number of packet buffers: two full rings, a burst, and some more.
const BUFFERS: u32 = 176;
/// Number of bytes after the buffers, for the rings.
const RINGS: usize = 16 << 10;
const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);

/// Action of the lcore.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) enum Poll {
    /// Receives a burst and drops it.
    Receive,
    /// Receives a burst and sends it.
    Forward,
    /// Sends the given number of packets of the given length, both reduced to what is possible.
    Send(u8, u16),
}

/// Bytes that the device writes anywhere, even where the driver made nothing available.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub(crate) struct Poke {
    /// Whether to write within the rings, or else anywhere.
    pub(crate) rings: bool,
    pub(crate) at: u32,
    pub(crate) bytes: [u8; 8],
}

/// Creates memory for one port, and its packet buffers, which precede the rings.
pub(crate) fn memory() -> (Arc<DmaMemory>, Arc<Pool>) {
    let region = Region::new(Pool::bytes(BUFFERS) + RINGS, Backing::SmallPages).expect("pages of 4 KiB");
    let memory = DmaMemory::map(region, &[]).expect("no address space to map it in");
    let pool = Pool::new(&memory, BUFFERS).expect("room for the buffers");
    (memory, pool)
}

/// Returns `memory` as a device sees it.
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
    /// Starts `nic` with all its offloads. Its device must be attached to `memory`.
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

    /// Receives a burst, and reads the whole length of each packet.
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

    /// Stops the port, and asserts that every buffer is back in the pool exactly once.
    pub(crate) fn stop(mut self) {
        let (rx, tx) = self.queues;
        self.nic.stop_pair(rx, tx, &mut self.cache).expect("the device confirms its reset");
        count(self.cache);
    }
}

/// Asserts that the pool behind `cache` has each of its buffers exactly once.
pub(crate) fn count(mut cache: PoolCache) {
    let pool = Arc::clone(cache.pool());
    let buffers: Vec<_> = std::iter::from_fn(|| cache.allocate()).collect();
    let places: HashSet<u64> = buffers.iter().map(|buffer| cache.iova(buffer)).collect();
    assert_eq!((buffers.len(), places.len()), (pool.count() as usize, pool.count() as usize));
    buffers.into_iter().for_each(|buffer| cache.free(buffer));
}
