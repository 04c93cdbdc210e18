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
    let mut bursts: Vec<Burst> = lanes.iter().map(|_| Burst::new()).collect();
    while !stop.is_set() {
        for (lane, burst) in lanes.iter_mut().zip(&mut bursts) {
            poll(lane, cache, counts, burst);
        }
        tick();
    }
    for (lane, burst) in lanes.iter_mut().zip(&mut bursts) {
        send(lane, cache, counts, burst);
    }
}

/// Receives into `burst`, and sends it when it is full or nothing more came: packets that come one by one share
/// a doorbell and the rest that a burst costs, and none waits for others that may not come.
#[inline(always)]
pub fn poll<R: RxBurst, T: TxBurst>(
    lane: &mut Lane<R, T>,
    cache: &mut PoolCache,
    counts: &[PortCounts],
    burst: &mut Burst,
) {
    let before = burst.len();
    lane.rx.rx_burst(cache, burst);
    if !burst.is_empty() && (burst.is_full() || burst.len() == before) {
        send(lane, cache, counts, burst);
    }
}

/// Rewrites the addresses of the packets in `burst` and sends them; leaves `burst` empty.
#[inline(always)]
fn send<R, T: TxBurst>(
    lane: &mut Lane<R, T>,
    cache: &mut PoolCache,
    counts: &[PortCounts],
    burst: &mut Burst,
) {
    let count = burst.len();
    if let Some([a, b, c, d, e, f, g, h, last @ ..]) = lane.ethernet {
        cache.write_each(burst, [a, b, c, d, e, f, g, h], last);
    }
    let sent = lane.tx.tx_burst(cache, burst);
    counts[lane.rx_port].received.add(count);
    counts[lane.tx_port].sent.add(sent);
    if sent < count {
        counts[lane.tx_port].dropped.add(count - sent);
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

#[cfg(test)]
mod tests {
    use vireo_drivers::port::QueueStats;
    use vireo_eal::dma::{DmaMemory, Packet, Pool};
    use vireo_eal::mem::{Backing, Region};

    use super::*;

    /// Gives so many packets in each poll.
    struct Source(Vec<usize>);

    impl RxBurst for Source {
        fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
            let count = self.0.pop().unwrap_or(0).min(burst.remaining_capacity());
            burst.extend((0..count).map(|_| Packet::new(cache.allocate().unwrap(), 60)));
        }

        fn stats(&self) -> QueueStats {
            QueueStats::default()
        }
    }

    /// Takes up to `room` packets of each burst and notes the length of the burst.
    struct Sink {
        room: usize,
        bursts: Vec<usize>,
    }

    impl TxBurst for Sink {
        fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
            self.bursts.push(burst.len());
            let count = burst.len().min(self.room);
            for packet in burst.drain(..count) {
                let mut bytes = [0; 12];
                cache.read(&packet, 0, &mut bytes);
                assert_eq!(bytes, ethernet(0, MacAddr([2; 6])));
                cache.free(packet.into_buffer());
            }
            count
        }

        fn stats(&self) -> QueueStats {
            QueueStats::default()
        }
    }

    #[test]
    fn packets_wait_for_others_only_while_others_come() {
        let region = Region::new(Pool::bytes(64), Backing::SmallPages).unwrap();
        let pool = Pool::new(&DmaMemory::map(region, &[]).unwrap(), 64).unwrap();
        let mut cache = pool.cache();
        let counts = [PortCounts::default()];
        let mut polls = vec![0, 20, 20, 0, 0, 1, 1, 1, 0, 5];
        polls.reverse();
        let mut rounds = polls.len();
        let (rx, tx) = (Source(polls), Sink { room: 30, bursts: Vec::new() });
        let mut lanes =
            [Lane { rx, rx_port: 0, tx, tx_port: 0, ethernet: Some(ethernet(0, MacAddr([2; 6]))) }];
        let stop = StopFlag::new();
        forward(&mut lanes, &mut cache, &counts, &stop, || {
            rounds -= 1;
            if rounds == 0 {
                stop.set();
            }
        });
        // The second 20 find room for 12. The last 5 are sent by the end.
        assert_eq!(lanes[0].tx.bursts, [32, 3, 5]);
        assert_eq!([&counts[0].received, &counts[0].sent, &counts[0].dropped].map(Count::get), [40, 38, 2]);
        drop(cache);
        assert_eq!(pool.free(), 64);
    }
}
