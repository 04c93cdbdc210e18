//! The packet path: receive, rewrite the addresses, send.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;
use vireo_drivers::port::{MacAddr, RxBurst, RxQueue, TxBurst, TxQueue};
use vireo_drivers::{e1000, virtio};
use vireo_eal::dma::{Burst, PoolCache};
use vireo_eal::lcore::StopFlag;

/// A count with one writer and any readers.
#[derive(Debug, Default)]
pub struct Count(CachePadded<AtomicU64>);

impl Count {
    /// Adds without a locked instruction: there is one writer.
    #[inline(always)]
    fn add(&self, n: usize) {
        self.0.store(self.0.load(Ordering::Relaxed) + n as u64, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a port did, as DPDK's l2fwd counts it. Each count is written by one lcore.
#[derive(Debug, Default)]
pub struct PortCounts {
    /// Packets handed to the port's TX queue.
    pub sent: Count,
    /// Packets taken from the port's RX queue.
    pub received: Count,
    /// Packets for this port that found its TX queue full.
    pub dropped: Count,
}

/// One direction: packets received on `rx` leave on `tx`. Owned by the lcore that polls it.
#[derive(Debug)]
pub struct Lane<R, T> {
    /// Where packets come from.
    pub rx: R,
    /// Index of its port.
    pub rx_port: usize,
    /// Where they go.
    pub tx: T,
    /// Index of its port.
    pub tx_port: usize,
    /// The first bytes of every packet sent, unless addresses stay as they are.
    pub ethernet: Option<[u8; 12]>,
}

/// Destination and source that l2fwd gives to packets leaving by port `tx_port` with address `source`:
/// `02:00:00:00:00:PORT` and the port's own.
pub fn ethernet(tx_port: usize, source: MacAddr) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0] = 2;
    bytes[5] = tx_port as u8;
    bytes[6..].copy_from_slice(&source.0);
    bytes
}

/// Polls `lanes` until `stop` is set; calls `tick` once in each round.
#[inline(never)]
pub fn forward<R: RxBurst, T: TxBurst>(
    lanes: &mut [Lane<R, T>],
    cache: &mut PoolCache,
    counts: &[PortCounts],
    stop: &StopFlag,
    mut tick: impl FnMut(),
) {
    let mut burst = Burst::new();
    while !stop.is_set() {
        for lane in &mut *lanes {
            poll(lane, cache, counts, &mut burst);
        }
        tick();
    }
}

/// One burst from a lane's RX queue to its TX queue; leaves `burst` empty.
#[inline(always)]
pub fn poll<R: RxBurst, T: TxBurst>(
    lane: &mut Lane<R, T>,
    cache: &mut PoolCache,
    counts: &[PortCounts],
    burst: &mut Burst,
) {
    lane.rx.rx_burst(cache, burst);
    if burst.is_empty() {
        return;
    }
    let received = burst.len();
    if let Some(ethernet) = &lane.ethernet {
        for packet in burst.iter_mut() {
            cache.write(packet, 0, ethernet);
        }
    }
    let sent = lane.tx.tx_burst(cache, burst);
    counts[lane.rx_port].received.add(received);
    counts[lane.tx_port].sent.add(sent);
    if sent < received {
        counts[lane.tx_port].dropped.add(received - sent);
        for packet in burst.drain(..) {
            cache.free(packet.into_buffer());
        }
    }
}

/// Lanes of any drivers.
pub type AnyLane = Lane<RxQueue, TxQueue>;

/// Runs [`forward`] in the version for the drivers of `lanes`: chosen here, once, so that the loop itself
/// knows its queue types. Lanes of several drivers share the version that looks at each burst.
pub fn forward_any(
    lanes: Vec<AnyLane>,
    cache: &mut PoolCache,
    counts: &[PortCounts],
    stop: &StopFlag,
    tick: impl FnMut(),
) -> Vec<AnyLane> {
    macro_rules! of {
        ($rx:ident($rx_queue:ty), $tx:ident($tx_queue:ty)) => {
            if lanes.iter().all(|l| matches!((&l.rx, &l.tx), (RxQueue::$rx(_), TxQueue::$tx(_)))) {
                let mut lanes: Vec<Lane<$rx_queue, $tx_queue>> = lanes
                    .into_iter()
                    .filter_map(|Lane { rx, rx_port, tx, tx_port, ethernet }| match (rx, tx) {
                        (RxQueue::$rx(rx), TxQueue::$tx(tx)) => {
                            Some(Lane { rx, rx_port, tx, tx_port, ethernet })
                        }
                        _ => None,
                    })
                    .collect();
                forward(&mut lanes, cache, counts, stop, tick);
                return lanes
                    .into_iter()
                    .map(|Lane { rx, rx_port, tx, tx_port, ethernet }| Lane {
                        rx: RxQueue::$rx(rx),
                        rx_port,
                        tx: TxQueue::$tx(tx),
                        tx_port,
                        ethernet,
                    })
                    .collect();
            }
        };
    }
    of!(Virtio(virtio::RxQueue), Virtio(virtio::TxQueue));
    of!(Virtio(virtio::RxQueue), E1000(e1000::TxQueue));
    of!(E1000(e1000::RxQueue), Virtio(virtio::TxQueue));
    of!(E1000(e1000::RxQueue), E1000(e1000::TxQueue));
    let mut lanes = lanes;
    forward(&mut lanes, cache, counts, stop, tick);
    lanes
}
