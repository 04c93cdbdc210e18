//! The packet path: receive, run the hook, send.

use vireo_drivers::counters::Count;
use vireo_drivers::port::{Offloads, RxBurst, TxBurst};
use vireo_drivers::table::{RxQueue, TxQueue};
use vireo_drivers::tied::{TieRx, TieTx};
use vireo_drivers::{e1000, igb, vhost, virtio};
use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, PoolCache};
use vireo_eal::lcore::StopFlag;

use crate::caches::{Caches, CachesByHome};
use crate::checksum;
use crate::hook::{Hook, Packets};
use crate::kind::{Between, Direct, General, Kind, Plain};
use crate::sleep::{IdlePolls, Sleep};
use crate::tied::TiedLanes;

/// One forwarding direction: packets received on `rx` leave on `tx`. Owned by the lcore that polls it.
#[derive(Debug)]
pub struct Lane<R, T, H> {
    /// Queue that packets are received on.
    pub rx: R,
    /// Number of the RX queue's pair, counted across all ports.
    pub from: usize,
    /// Queue that packets are sent on.
    pub tx: T,
    /// Number of the TX queue's pair, counted across all ports.
    pub to: usize,
    /// Packet processing of the application.
    pub hook: H,
}

/// Measures polls. The implementation for `()` measures nothing.
pub trait Meter {
    /// Called before each poll.
    fn begin(&mut self) {}
    /// Called after each poll; `busy` if the poll moved packets.
    fn end(&mut self, _busy: bool) {}
    /// Whether the lanes are to be left because they have nothing to do; called once per round.
    fn is_idle(&self) -> bool {
        false
    }
}

impl Meter for () {}

/// Counts the TSC ticks of polls that moved packets, as testpmd's `--record-core-cycles` does.
#[derive(Debug)]
pub(crate) struct BusyTicks<'a> {
    since: u64,
    sum: &'a Count,
}

impl<'a> BusyTicks<'a> {
    pub(crate) fn new(sum: &'a Count) -> Self {
        Self { since: 0, sum }
    }
}

impl Meter for BusyTicks<'_> {
    #[inline(always)]
    fn begin(&mut self) {
        self.since = Tsc::now();
    }

    #[inline(always)]
    fn end(&mut self, busy: bool) {
        if busy {
            self.sum.add(Tsc::now().wrapping_sub(self.since));
        }
    }
}

/// Polls `lanes` until `stop` is raised or `meter` finds them idle, for at least one round, and calls `tick` once per
/// round. `bursts` has one empty burst per lane. Each packet is a frame.
pub fn forward<R: RxBurst, T: TxBurst, H: Hook>(
    lanes: &mut [Lane<R, T, H>],
    bursts: &mut [Burst],
    caches: &mut impl Caches,
    stop: &StopFlag,
    meter: &mut impl Meter,
    tick: impl FnMut(),
) {
    poll_all::<Plain, _, _, _>(lanes, bursts, caches, stop, meter, tick);
}

/// Does the same as [`forward`], for ports that are started for long frames or with offloads. Packets may be
/// segments, counters count frames, and a checksum that the sending device does not compute is computed here.
pub fn forward_general<R: RxBurst, T: TxBurst, H: Hook>(
    lanes: &mut [Lane<R, T, H>],
    bursts: &mut [Burst],
    caches: &mut impl Caches,
    stop: &StopFlag,
    meter: &mut impl Meter,
    tick: impl FnMut(),
) {
    poll_all::<General, _, _, _>(lanes, bursts, caches, stop, meter, tick);
}

#[inline(never)]
fn poll_all<K: Between<R, T, H>, R: RxBurst, T: TxBurst, H: Hook>(
    lanes: &mut [Lane<R, T, H>],
    bursts: &mut [Burst],
    caches: &mut impl Caches,
    stop: &StopFlag,
    meter: &mut impl Meter,
    mut tick: impl FnMut(),
) {
    loop {
        for (index, (lane, burst)) in lanes.iter_mut().zip(&mut *bursts).enumerate() {
            meter.begin();
            let busy = K::poll(lane, caches.of_lane(index), burst);
            meter.end(busy);
        }
        tick();
        if stop.is_raised() || meter.is_idle() {
            break;
        }
    }
    for (index, (lane, burst)) in lanes.iter_mut().zip(bursts).enumerate() {
        K::end(lane, caches.of_lane(index), burst);
    }
}

/// Receives into `burst`, and sends the burst when it is full or nothing more arrived. Packets that arrive
/// one by one thus share a doorbell and the other costs of a burst, and no packet waits for others that may
/// not arrive. Returns whether packets were received or sent.
#[inline(always)]
pub(crate) fn poll<K: Kind, R: RxBurst, T: TxBurst, H: Hook>(
    lane: &mut Lane<R, T, H>,
    cache: &mut PoolCache,
    burst: &mut Burst,
) -> bool {
    let before = burst.len();
    lane.rx.rx_burst(cache, burst);
    let busy = !burst.is_empty();
    if busy && (burst.is_full() || burst.len() == before) {
        send::<K, _, _, _>(lane, cache, burst);
    }
    busy
}

/// Runs the hook on the packets in `burst` and sends those that remain. Leaves `burst` empty.
#[inline(always)]
pub(crate) fn send<K: Kind, R: RxBurst, T: TxBurst, H: Hook>(
    lane: &mut Lane<R, T, H>,
    cache: &mut PoolCache,
    burst: &mut Burst,
) {
    let received = K::count(burst);
    let mut packets = Packets::new(burst, cache, K::GENERAL);
    lane.hook.process(&mut packets);
    let consumed = packets.consumed();
    let left = received - consumed;
    if K::GENERAL && !lane.tx.offloads().contains(Offloads::TX_CHECKSUM) {
        lane.tx.counters().checksum_computed.add(checksum::complete(burst, cache) as u64);
    }
    let taken = lane.tx.tx_burst(cache, burst);
    let sent = if K::GENERAL { left - K::count(burst) } else { taken };
    if consumed > 0 {
        lane.rx.counters().consumed.add(consumed as u64);
    }
    if sent < left {
        lane.tx.counters().dropped.add((left - sent) as u64);
        Packets::new(burst, cache, K::GENERAL).free();
    }
}

/// Lane between queues of any drivers.
pub type AnyLane<H> = Lane<RxQueue, TxQueue, H>;

/// How lanes are polled.
#[derive(Clone, Copy, Debug)]
pub struct Polling<'a> {
    /// Sum to which the TSC ticks of polls that moved packets are added, if given.
    pub busy_ticks: Option<&'a Count>,
    /// Whether lanes are [tied](crate::tied) where possible, and long frames between vhost ports copied once.
    pub ties: bool,
    /// When the lcore sleeps, if it does. Its ports must be started with RX interrupts
    /// ([`PortConfig::rx_interrupts`](vireo_drivers::port::PortConfig::rx_interrupts)).
    pub sleep: Option<Sleep<'a>>,
}

impl Default for Polling<'_> {
    /// Measures nothing, ties lanes, and never sleeps.
    fn default() -> Self {
        Self { busy_ticks: None, ties: true, sleep: None }
    }
}

/// Runs [`poll_all`] as `polling` says, until `stop` is raised.
fn measured<K: Between<R, T, H>, R: RxBurst, T: TxBurst, H: Hook>(
    lanes: &mut [Lane<R, T, H>],
    caches: &mut impl Caches,
    polling: Polling<'_>,
    stop: &StopFlag,
    mut tick: impl FnMut(),
) {
    let mut bursts: Vec<Burst> = lanes.iter().map(|_| Burst::new()).collect();
    let bursts = bursts.as_mut_slice();
    let busy_ticks = polling.busy_ticks.map(BusyTicks::new);
    let Some(sleep) = polling.sleep else {
        return match busy_ticks {
            None => poll_all::<K, _, _, _>(lanes, bursts, caches, stop, &mut (), tick),
            Some(mut ticks) => poll_all::<K, _, _, _>(lanes, bursts, caches, stop, &mut ticks, tick),
        };
    };
    let mut idle = IdlePolls::new(sleep, lanes.len(), busy_ticks);
    loop {
        poll_all::<K, _, _, _>(lanes, bursts, caches, stop, &mut idle, &mut tick);
        if stop.is_raised() {
            return;
        }
        sleep.until_woken(lanes, stop);
        idle.restart();
    }
}

/// Runs [`TiedLanes::forward`], or [`forward`] if lanes are not to be tied.
fn measured_tied<R: TieRx, T: TieTx, H: Hook>(
    mut lanes: Vec<Lane<R, T, H>>,
    cache: &mut PoolCache,
    polling: Polling<'_>,
    stop: &StopFlag,
    mut tick: impl FnMut(),
) -> Vec<Lane<R, T, H>> {
    if !polling.ties {
        measured::<Plain, _, _, _>(&mut lanes, cache, polling, stop, tick);
        return lanes;
    }
    let count = lanes.len();
    let mut lanes = TiedLanes::new(lanes, cache);
    let busy_ticks = polling.busy_ticks.map(BusyTicks::new);
    match (polling.sleep, busy_ticks) {
        (None, None) => lanes.forward(cache, stop, &mut (), tick),
        (None, Some(mut ticks)) => lanes.forward(cache, stop, &mut ticks, tick),
        (Some(sleep), ticks) => {
            let mut idle = IdlePolls::new(sleep, count, ticks);
            loop {
                lanes.forward(cache, stop, &mut idle, &mut tick);
                if stop.is_raised() {
                    break;
                }
                lanes.sleep(sleep, stop);
                idle.restart();
            }
        }
    }
    lanes.into_lanes(cache)
}

/// Does the same as [`forward_any`] with [`forward_general`], in one version for all drivers.
pub(crate) fn forward_any_general<H: Hook>(
    mut lanes: Vec<AnyLane<H>>,
    caches: &mut impl Caches,
    polling: Polling<'_>,
    stop: &StopFlag,
    tick: impl FnMut(),
) -> Vec<AnyLane<H>> {
    measured::<General, _, _, _>(&mut lanes, caches, polling, stop, tick);
    lanes
}

/// Does the same as [`forward_any`] for lanes that receive at several homes, without ties. All drivers
/// share one version.
pub(crate) fn forward_by_home<H: Hook>(
    mut lanes: Vec<AnyLane<H>>,
    caches: &mut CachesByHome,
    polling: Polling<'_>,
    stop: &StopFlag,
    tick: impl FnMut(),
) -> Vec<AnyLane<H>> {
    measured::<Plain, _, _, _>(&mut lanes, caches, polling, stop, tick);
    lanes
}

/// Runs [`TiedLanes::forward`] or [`forward`] in the version compiled for the drivers of `lanes`. The version is
/// chosen once, here, so that the loop itself knows its queue types. Other combinations of drivers share one
/// version, which dispatches on each burst.
pub fn forward_any<H: Hook>(
    lanes: Vec<AnyLane<H>>,
    cache: &mut PoolCache,
    polling: Polling<'_>,
    stop: &StopFlag,
    tick: impl FnMut(),
) -> Vec<AnyLane<H>> {
    macro_rules! of {
        ($rx:ident($rx_queue:ty), $tx:ident($tx_queue:ty), $run:expr) => {
            if lanes.iter().all(|l| matches!((&l.rx, &l.tx), (RxQueue::$rx(_), TxQueue::$tx(_)))) {
                let lanes: Vec<Lane<$rx_queue, $tx_queue, H>> = lanes
                    .into_iter()
                    .filter_map(|Lane { rx, from, tx, to, hook }| match (rx, tx) {
                        (RxQueue::$rx(rx), TxQueue::$tx(tx)) => Some(Lane { rx, from, tx, to, hook }),
                        _ => None,
                    })
                    .collect();
                return $run(lanes)
                    .into_iter()
                    .map(|Lane { rx, from, tx, to, hook }| Lane {
                        rx: RxQueue::$rx(rx),
                        from,
                        tx: TxQueue::$tx(tx),
                        to,
                        hook,
                    })
                    .collect();
            }
        };
        ($rx:ident($rx_queue:ty), $tx:ident($tx_queue:ty)) => {
            of!($rx($rx_queue), $tx($tx_queue), |lanes| measured_tied(lanes, cache, polling, stop, tick));
        };
    }
    of!(Virtio(virtio::RxQueue), Virtio(virtio::TxQueue));
    of!(Virtio(virtio::RxQueue), E1000(e1000::TxQueue));
    of!(E1000(e1000::RxQueue), Virtio(virtio::TxQueue));
    of!(E1000(e1000::RxQueue), E1000(e1000::TxQueue));
    of!(Igb(igb::RxQueue), Igb(igb::TxQueue));
    of!(Vhost(vhost::RxQueue), Vhost(vhost::TxQueue), |mut lanes: Vec<_>| {
        match polling.ties {
            true => measured::<Direct, _, _, _>(&mut lanes, cache, polling, stop, tick),
            false => measured::<Plain, _, _, _>(&mut lanes, cache, polling, stop, tick),
        }
        lanes
    });
    let mut lanes = lanes;
    measured::<Plain, _, _, _>(&mut lanes, cache, polling, stop, tick);
    lanes
}

#[cfg(test)]
mod tests {
    use vireo_drivers::counters::QueueCounters;
    use vireo_eal::dma::{DmaMemory, MemoryMap, Part, Pool, first_frame};
    use vireo_eal::mem::{Backing, Placement, Region};

    use super::*;
    use crate::caches::Home;

    /// Yields packets in each poll; the counts are popped from the end of the list.
    struct Source(Vec<usize>, QueueCounters);

    impl RxBurst for Source {
        fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
            let count = self.0.pop().unwrap_or(0).min(burst.remaining_capacity());
            burst.extend((0..count).map(|_| cache.allocate().unwrap().with_len(60)));
        }

        fn counters(&self) -> &QueueCounters {
            &self.1
        }
    }

    /// Takes up to `room` packets of each burst, and records the length of the burst.
    struct Sink {
        room: usize,
        bursts: Vec<usize>,
        counters: QueueCounters,
    }

    impl TxBurst for Sink {
        fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
            self.bursts.push(burst.len());
            let count = burst.len().min(self.room);
            for packet in burst.drain(..count) {
                let mut bytes = [0; 3];
                cache.read(&packet, 0, &mut bytes);
                assert_eq!(bytes, [1, 2, 3]);
                cache.free(packet);
            }
            count
        }

        fn counters(&self) -> &QueueCounters {
            &self.counters
        }
    }

    /// Marks packets, and removes every eighth.
    #[derive(Default)]
    struct Mark(usize);

    impl Hook for Mark {
        fn process(&mut self, packets: &mut Packets<'_>) {
            packets.write_each([1], [2, 3]);
            packets.retain(|packet| {
                assert_eq!(packet.len(), 60);
                self.0 += 1;
                !self.0.is_multiple_of(8)
            });
        }
    }

    #[test]
    fn packets_wait_for_others_only_while_others_come() {
        let region = Region::new(Pool::bytes(64), Backing::SmallPages).unwrap();
        let pool = Pool::new(&DmaMemory::map(region, &[]).unwrap(), 64).unwrap();
        let mut cache = pool.cache();
        let mut polls = vec![0, 20, 20, 0, 0, 1, 1, 1, 0, 5];
        polls.reverse();
        let mut rounds = polls.len();
        let rx = Source(polls, QueueCounters::default());
        let tx = Sink { room: 27, bursts: Vec::new(), counters: QueueCounters::default() };
        let mut lanes = [Lane { rx, from: 0, tx, to: 0, hook: Mark::default() }];
        let stop = StopFlag::new();
        let busy = Count::default();
        forward(&mut lanes, &mut [Burst::new()], &mut cache, &stop, &mut BusyTicks::new(&busy), || {
            rounds -= 1;
            if rounds == 0 {
                stop.set();
            }
        });
        assert!(busy.get() > 0);
        // The second 20 packets of the first 40 find room for 12. The hook removes 4, 0 and 1 packets. The
        // last 5 packets are sent when the loop ends.
        assert_eq!(lanes[0].tx.bursts, [28, 3, 4]);
        assert_eq!((lanes[0].rx.counters().consumed.get(), lanes[0].tx.counters().dropped.get()), (5, 1));
        drop(cache);
        assert_eq!(pool.available(), 64);
    }

    /// Yields one frame in each poll; the numbers of segments are popped from the end of the list.
    struct Segments(Vec<usize>, QueueCounters);

    impl RxBurst for Segments {
        fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
            let Some(count) = self.0.pop() else { return };
            if count > burst.remaining_capacity() {
                return self.0.push(count);
            }
            for i in 0..count {
                let mut packet = cache.allocate().unwrap().with_len(60);
                cache.write(&mut packet, 0, &[9, 9, 9]);
                packet.set_more(i + 1 < count);
                burst.push(packet);
            }
        }

        fn counters(&self) -> &QueueCounters {
            &self.1
        }
    }

    /// Takes up to `room` packets of each burst, in whole frames, and records the number of segments of each
    /// frame.
    struct Frames {
        room: usize,
        sent: Vec<usize>,
        counters: QueueCounters,
    }

    impl TxBurst for Frames {
        fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
            let before = burst.len();
            while !burst.is_empty() && first_frame(burst) <= self.room + burst.len() - before {
                let frame: Vec<_> = burst.drain(..first_frame(burst)).collect();
                self.sent.push(frame.len());
                for (i, packet) in frame.into_iter().enumerate() {
                    let mut bytes = [0; 3];
                    cache.read(&packet, 0, &mut bytes);
                    assert_eq!(bytes, if i == 0 { [1, 2, 3] } else { [9, 9, 9] });
                    cache.free(packet);
                }
            }
            before - burst.len()
        }

        fn counters(&self) -> &QueueCounters {
            &self.counters
        }
    }

    #[test]
    fn frames_of_several_segments_are_sent_dropped_and_taken_out_whole() {
        let region = Region::new(Pool::bytes(64), Backing::SmallPages).unwrap();
        let pool = Pool::new(&DmaMemory::map(region, &[]).unwrap(), 64).unwrap();
        let mut cache = pool.cache();
        // The eleventh frame finds no room in its burst, and waits for the next. The hook removes the eighth.
        let mut segments = vec![1, 5, 1, 1, 9, 1, 1, 3, 2, 2, 10, 4, 8, 1];
        segments.reverse();
        let rx = Segments(segments, QueueCounters::default());
        let tx = Frames { room: 20, sent: Vec::new(), counters: QueueCounters::default() };
        let mut lanes = [Lane { rx, from: 0, tx, to: 0, hook: Mark::default() }];
        let (stop, mut rounds) = (StopFlag::new(), 20);
        forward_general(&mut lanes, &mut [Burst::new()], &mut cache, &stop, &mut (), || {
            rounds -= 1;
            if rounds == 0 {
                stop.set();
            }
        });
        // Each burst has 23 segments left for 20 places, so its last two frames are dropped.
        assert_eq!(lanes[0].tx.sent, [1, 5, 1, 1, 9, 1, 1, 10, 4]);
        assert_eq!((lanes[0].rx.counters().consumed.get(), lanes[0].tx.counters().dropped.get()), (1, 4));
        drop(cache);
        assert_eq!(pool.available(), 64);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri cannot unmap part of a mapping")]
    fn each_lane_uses_the_cache_of_its_node() {
        let bytes = Pool::bytes(64);
        let regions =
            Region::adjoining(&[(Some(0), bytes), (None, bytes)], Backing::SmallPages, Placement::Preferred);
        let regions = match regions {
            Ok(regions) => regions.into_iter().map(|region| (region, vec![Part::default()])).collect(),
            Err(error) => return println!("skipped: {error}"),
        };
        let memory = MemoryMap::without_spaces().add_all(regions).unwrap();
        let shares: Vec<_> = memory.into_iter().flatten().map(|memory| (memory, 64)).collect();
        let pool = Pool::on_nodes(&shares).unwrap();
        let homes = [None, Some(0), None].map(|node| Home { process: 0, node });
        let mut caches = CachesByHome::new(&homes, |home| pool.cache_near(home.node));
        assert_eq!(caches.of_lanes, [0, 1, 0]);
        let lane = || Lane {
            rx: Source(vec![8; 3], QueueCounters::default()),
            from: 0,
            tx: Sink { room: 32, bursts: Vec::new(), counters: QueueCounters::default() },
            to: 0,
            hook: Mark::default(),
        };
        let (mut lanes, mut bursts) = ([lane(), lane(), lane()], [Burst::new(), Burst::new(), Burst::new()]);
        let stop = StopFlag::new();
        let mut rounds = 0;
        forward(&mut lanes, &mut bursts, &mut caches, &stop, &mut (), || {
            rounds += 1;
            if rounds == 10 {
                stop.set();
            }
        });
        // Every packet returned to the cache that it was allocated from.
        for (cache, node) in caches.caches.iter_mut().zip([None, Some(0)]) {
            let (own, _) = shares.iter().find(|(memory, _)| memory.region().node() == node).unwrap();
            let first = own.linear_iova().unwrap();
            let packets: Vec<_> = (0..cache.len()).map(|_| cache.allocate().unwrap()).collect();
            assert!(!packets.is_empty());
            for packet in packets {
                assert!((first..first + bytes as u64).contains(&cache.iova(&packet)), "{node:?}");
                cache.free(packet);
            }
        }
        drop(caches);
        assert_eq!(pool.available(), 128);
    }
}
