//! Tests of the port against a frontend: a correct driver here, misbehaving ones in `hostile`.

mod conformance;
mod guest;
mod hostile;
mod pass;

use std::path::Path;
use std::sync::Arc;

use vireo_eal::ErrorKind;
use vireo_eal::dma::{Burst, DATA_ROOM, DmaMemory, MAX_BURST, Packet, Part, Pool, PoolCache};
use vireo_eal::event::is_signaled;
use vireo_eal::handover::Fds;
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};

use super::{Device, Options, RECEIVE, RxQueue, TRANSMIT, TxQueue};
use crate::driver::{Facts, Vdev};
use crate::frames::tests::append;
use crate::handover::{HandOver, PortRecord};
use crate::port::{MacAddr, Nic, PortConfig, Queues, RxBurst, TxBurst};
use crate::virtio::{self, DESC_NEXT, DESC_WRITE, Features, HEADER};
use guest::{BUFFER, GUEST, Guest, MEMORY, SIZE};

const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);
const BUFFERS: u32 = 256;
const ALL: Features = super::backend::FEATURES;
const PLAIN: Features = Features::VERSION_1;

fn options(path: &Path) -> Options {
    Options { path: path.to_owned(), mac: None, queues: 1, client: false }
}

/// A started port.
struct Bench {
    dir: tempfile::TempDir,
    device: Device,
    rx: RxQueue,
    tx: TxQueue,
    cache: PoolCache,
    memory: Arc<DmaMemory>,
}

impl Bench {
    fn new() -> Self {
        Self::with_socket(false)
    }

    fn with_socket(client: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { client, ..options(&dir.path().join("socket")) };
        let mut device = Device::open("net_vhost0", &options).unwrap();
        let region = Region::new(Pool::bytes(BUFFERS), Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        let mut cache = Pool::new(&memory, BUFFERS).unwrap().cache();
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        Self { dir, device, rx, tx, cache, memory }
    }

    /// Creates a port, and a guest whose driver runs.
    fn with(features: Features) -> (Self, Guest) {
        let bench = Self::new();
        let mut guest = bench.guest();
        guest.start(features);
        assert!(bench.device.link().up);
        (bench, guest)
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.dir.path().join("socket"))
    }

    fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut burst = Burst::new();
        self.rx.rx_burst(&mut self.cache, &mut burst);
        let frames = burst.iter().map(|packet| self.bytes(packet)).collect();
        self.free(burst);
        frames
    }

    fn bytes(&self, packet: &Packet) -> Vec<u8> {
        let mut bytes = vec![0; packet.len()];
        self.cache.read(packet, 0, &mut bytes);
        bytes
    }

    fn send(&mut self, frames: &[Vec<u8>]) -> usize {
        let mut burst = Burst::new();
        for frame in frames {
            let mut packet = self.cache.allocate().unwrap().with_len(frame.len());
            self.cache.write(&mut packet, 0, frame);
            burst.push(packet);
        }
        let sent = self.tx.tx_burst(&mut self.cache, &mut burst);
        self.free(burst);
        sent
    }

    fn free(&mut self, burst: Burst) {
        burst.into_iter().for_each(|packet| self.cache.free(packet));
    }

    /// Hands the port over to another process, or keeps it because that fails at the end.
    fn hand_over(self, config: &PortConfig, fails: bool) -> Self {
        let Self { dir, mut device, rx, tx, cache, memory } = self;
        let mut fds = Fds::default();
        let facts = device.facts(&mut fds).unwrap();
        let fds = fds.duplicate().unwrap();
        let options = options(&dir.path().join("socket"));
        let client = Options { client: true, ..options.clone() };
        let facts = || Facts { record: &facts, fds: &fds };
        assert_eq!(client.attach("net_vhost0", facts()).unwrap_err().kind(), ErrorKind::Protocol);
        let mut next = options.attach("net_vhost0", facts()).unwrap();
        assert_eq!(next.link(), device.link());
        let (queues, mut fds) = (Queues::pair(rx, tx), Fds::default());
        let record = PortRecord::of(&device, &queues, config, &mut fds).unwrap();
        let fds = fds.duplicate().unwrap();
        let resumed =
            record.resume_on(&mut next, config, &memory, &mut cache.pool().take_free(), &fds).unwrap();
        let (device, queues) = if fails {
            next.leave();
            drop((next, resumed));
            device.keep();
            (device, queues)
        } else {
            device.leave();
            drop((device, queues));
            next.keep();
            (next, resumed)
        };
        assert!(options.path.exists(), "the socket is the other process's");
        let (rx, tx) = queues.into_pair().unwrap();
        Self { dir, device, rx, tx, cache, memory }
    }

    /// Stops the port; returns the number of available buffers.
    fn stop(mut self) -> u32 {
        self.device.stop_pair(self.rx, self.tx, &mut self.cache).unwrap();
        let pool = Arc::clone(self.cache.pool());
        drop(self.cache);
        pool.available()
    }
}

fn frame(number: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; 60 + number * 37 % 1400];
    frame[..8].copy_from_slice(&number.to_le_bytes());
    frame
}

/// Passes `count` frames in each direction, in groups of up to a burst.
fn exchange(bench: &mut Bench, guest: &mut Guest, count: usize) {
    guest.provide_all();
    let mut number = 0;
    while number < count {
        let group: Vec<Vec<u8>> = (number..count.min(number + 1 + number % MAX_BURST)).map(frame).collect();
        group.iter().for_each(|frame| guest.transmit(frame));
        assert_eq!(bench.receive(), group);
        assert_eq!(guest.reap_transmitted(), group.len());
        assert_eq!(bench.send(&group), group.len());
        assert_eq!(guest.received(), group);
        number += group.len();
    }
}

/// A control thread reads it every few milliseconds. An lcore that found its ring locked would drop a burst.
#[test]
fn the_link_is_read_without_the_rings() {
    let (bench, _guest) = Bench::with(ALL);
    let _rings: Vec<_> = bench.device.rings.iter().map(|ring| ring.lock()).collect();
    assert!(bench.device.link().up);
}

#[test]
fn a_port_does_not_start_while_it_has_queues_of_an_earlier_start() {
    let mut bench = Bench::new();
    bench.device.stop(Queues { rx: Vec::new(), tx: Vec::new() }, &mut bench.cache).unwrap();
    let started = bench.device.start_pair(&CONFIG, &bench.memory, &mut bench.cache);
    let error = started.unwrap_err();
    assert!(error.to_string().contains("queues of an earlier start"), "{error}");
    drop(bench.rx);
    drop(bench.tx);
    bench.device.start_pair(&CONFIG, &bench.memory, &mut bench.cache).unwrap();
}

/// What [`RxBurst`] promises, for a ring that comes and goes.
#[test]
fn an_armed_queue_is_woken_by_kicks_and_by_changes_of_its_ring() {
    for features in [PLAIN, ALL] {
        let event_idx = features.contains(Features::EVENT_IDX);
        let mut bench = Bench::new();
        assert!(bench.rx.event().is_none() && !bench.rx.arm(), "it was not started with interrupts");
        bench.device.stop_pair(bench.rx, bench.tx, &mut bench.cache).unwrap();
        let config = CONFIG.with_rx_interrupts(true);
        (bench.rx, bench.tx) = bench.device.start_pair(&config, &bench.memory, &mut bench.cache).unwrap();
        let is_woken = |bench: &Bench| is_signaled(bench.rx.event().unwrap());
        let mut guest = bench.guest();
        for _ in 0..3 {
            assert!(bench.rx.arm() && !is_woken(&bench));
            guest.start(features);
            assert!(is_woken(&bench), "the ring was started");
            bench.rx.disarm();
            for number in 0..100 {
                assert!(bench.rx.arm() && !is_woken(&bench));
                guest.transmit(&frame(number));
                assert!(guest.kick(event_idx) && is_woken(&bench));
                bench.rx.disarm();
                assert!(!bench.rx.arm() && !is_woken(&bench), "a frame is there");
                bench.rx.disarm();
                assert!(!guest.kick(event_idx), "a kick for an lcore that polls");
                assert_eq!(bench.receive(), [frame(number)]);
                assert_eq!(guest.reap_transmitted(), 1);
            }
            guest.stop();
            assert!(is_woken(&bench), "the ring was stopped");
            bench.rx.disarm();
        }
        assert_eq!(bench.stop(), BUFFERS);
    }
}

/// The frontend notices nothing, whichever of the two processes has the port in the end.
#[test]
fn a_connection_moves_to_another_process() {
    for (features, interrupts) in [(PLAIN, false), (ALL, false), (ALL, true)] {
        let config = CONFIG.with_rx_interrupts(interrupts);
        let mut bench = Bench::new();
        bench.device.stop_pair(bench.rx, bench.tx, &mut bench.cache).unwrap();
        (bench.rx, bench.tx) = bench.device.start_pair(&config, &bench.memory, &mut bench.cache).unwrap();
        // There is no frontend yet.
        bench = bench.hand_over(&config, false);
        let mut guest = bench.guest();
        guest.introduce(features);
        // It has negotiated, and has no memory yet.
        bench = bench.hand_over(&config, false);
        guest.start(features);
        for fails in [false, true, true, false] {
            exchange(&mut bench, &mut guest, 100);
            guest.transmit(&frame(1));
            bench = bench.hand_over(&config, fails);
            assert!(bench.device.link().up);
            assert_eq!(bench.receive(), [frame(1)]);
            assert_eq!(guest.reap_transmitted(), 1);
        }
        assert_eq!(bench.rx.counters().packets.get(), 404);
        if interrupts {
            assert!(bench.rx.arm());
            guest.transmit(&frame(2));
            assert!(guest.kick(true) && is_signaled(bench.rx.event().unwrap()));
            bench.rx.disarm();
            assert_eq!(bench.receive(), [frame(2)]);
            guest.reap_transmitted();
        }
        // A ring that the frontend has broken stays so, at its position.
        guest.rings[TRANSMIT].avail_idx += 1000;
        guest.rings[TRANSMIT].publish();
        assert!(bench.receive().is_empty());
        bench = bench.hand_over(&config, false);
        assert!(!bench.device.link().up && bench.receive().is_empty());
        assert_eq!(guest.frontend_base(TRANSMIT), 404 + u32::from(interrupts));
        drop(guest);
        let mut guest = bench.guest();
        guest.start(features);
        exchange(&mut bench, &mut guest, 10);
        let socket = bench.dir.path().join("socket");
        bench.device.stop_pair(bench.rx, bench.tx, &mut bench.cache).unwrap();
        drop(bench.device);
        assert!(!socket.exists(), "the last process removes it");
    }
}

/// Frames of several packets are not sent to a frontend yet: they are dropped whole, whether or not the
/// frontend has room.
#[test]
fn frames_of_several_packets_are_dropped_and_counted() {
    let (mut bench, mut guest) = Bench::with(ALL);
    bench.device.stop_pair(bench.rx, bench.tx, &mut bench.cache).unwrap();
    let config = CONFIG.with_max_frame(9000);
    (bench.rx, bench.tx) = bench.device.start_pair(&config, &bench.memory, &mut bench.cache).unwrap();
    for room in [false, true] {
        if room {
            guest.provide_all();
        }
        let mut burst = Burst::new();
        for (number, len) in [(1, 60), (2, 9000), (3, DATA_ROOM), (4, 2000)] {
            append(&mut burst, &mut bench.cache, &crate::frames::tests::frame(number, len), DATA_ROOM);
        }
        let sent = bench.tx.tx_burst(&mut bench.cache, &mut burst);
        assert_eq!((sent, burst.len()), if room { (9, 0) } else { (7, 2) });
        bench.free(burst);
    }
    let wanted = [(1, 60), (3, DATA_ROOM)].map(|(number, len)| crate::frames::tests::frame(number, len));
    assert_eq!(guest.received(), wanted);
    assert_eq!((bench.tx.counters().packets.get(), bench.tx.counters().errors.get()), (2, 4));
    assert_eq!(bench.stop(), BUFFERS);
}

#[test]
fn frames_pass_both_ways_and_indices_wrap() {
    for features in [PLAIN, PLAIN | Features::MRG_RXBUF, PLAIN | Features::EVENT_IDX, ALL] {
        let bench = Bench::new();
        let mut guest = bench.guest();
        guest.rings.iter_mut().for_each(|ring| ring.begin_at(65_400));
        guest.start(features);
        let mut bench = bench;
        exchange(&mut bench, &mut guest, 1000);
        let (rx, tx) = (bench.rx.counters().read(), bench.tx.counters().read());
        assert_eq!((rx.packets, rx.errors, tx.packets, tx.errors), (1000, 0, 1000, 0));
        assert_eq!(rx.bytes, (0..1000).map(|number| frame(number).len() as u64).sum::<u64>());
        assert_eq!(rx.bytes, tx.bytes);
        assert_eq!(guest.frontend_base(TRANSMIT), u32::from(65_400_u16.wrapping_add(1000)));
        assert!(!bench.device.link().up);
        assert_eq!(bench.stop(), BUFFERS);
    }
}

#[test]
fn a_frame_may_be_spread_over_a_chain_in_any_way() {
    let (mut bench, mut guest) = Bench::with(ALL);
    let frame = frame(7);
    for cuts in [&[HEADER][..], &[5, HEADER, 40], &[HEADER, HEADER, 13, 14, 15], &[HEADER - 1], &[HEADER + 1]]
    {
        guest.transmit_chain(&frame, cuts);
        guest.transmit(&frame);
        assert_eq!(bench.receive(), [frame.clone(), frame.clone()], "{cuts:?}");
    }
    assert_eq!(bench.rx.counters().errors.get(), 0);
    assert_eq!(bench.stop(), BUFFERS);
}

#[test]
fn frames_that_fit_into_no_buffer_or_are_none_are_dropped() {
    let (mut bench, mut guest) = Bench::with(ALL);
    for len in [0, 16, 17, DATA_ROOM, DATA_ROOM + 1, BUFFER - HEADER] {
        guest.transmit(&vec![1; len]);
        guest.transmit_chain(&vec![2; len], &[HEADER]);
    }
    let lens: Vec<usize> = bench.receive().iter().map(Vec::len).collect();
    assert_eq!(lens, [17, 17, DATA_ROOM, DATA_ROOM]);
    assert_eq!(guest.reap_transmitted(), 12);
    assert_eq!((bench.rx.counters().errors.get(), bench.rx.counters().device_errors.get()), (8, 0));
    assert_eq!(bench.stop(), BUFFERS);
}

#[test]
fn mergeable_buffers_are_merged() {
    let (mut bench, mut guest) = Bench::with(ALL);
    let frame = frame(20);
    let chains = (HEADER + frame.len()).div_ceil(100);
    (0..chains - 1).for_each(|_| guest.provide(&[100]));
    assert_eq!(bench.send(std::slice::from_ref(&frame)), 0, "it waits for all of its buffers");
    guest.provide(&[5, 20, 75]);
    guest.provide(&[BUFFER as u32]);
    assert_eq!(bench.send(&[frame.clone(), frame.clone()]), 2);
    assert_eq!(guest.received(), [frame.clone(), frame.clone()]);
    assert_eq!(guest.last_num_buffers, [chains as u16, 1]);
    assert_eq!((bench.tx.counters().packets.get(), bench.tx.counters().errors.get()), (2, 0));
    assert_eq!(bench.stop(), BUFFERS);
}

#[test]
fn without_mergeable_buffers_a_frame_needs_one_chain() {
    let (mut bench, mut guest) = Bench::with(PLAIN);
    let frames = [frame(20), frame(0), frame(1)];
    guest.provide(&[100]);
    assert_eq!(bench.send(&frames[..1]), 1, "it waits for no second chain");
    guest.provide(&[HEADER as u32, 1600]);
    guest.provide(&[100]);
    assert_eq!(bench.send(&frames), 3, "one is dropped");
    assert_eq!(guest.received(), &frames[1..]);
    assert_eq!((bench.tx.counters().packets.get(), bench.tx.counters().errors.get()), (2, 2));
    assert_eq!(bench.send(&[frame(20)]), 1, "it is dropped while a chain is there to say so");
    assert_eq!((bench.tx.counters().packets.get(), bench.tx.counters().errors.get()), (2, 3));
    assert_eq!(bench.stop(), BUFFERS);
}

/// Every descriptor is used, and a chain that is too short for one packet is read again for the next one.
#[test]
fn chains_may_fill_the_table() {
    let half = usize::from(SIZE) / 2;
    let (mut bench, mut guest) = Bench::with(ALL);
    let cuts: Vec<usize> = (1..half).map(|i| i * 10).collect();
    [1, 2].iter().for_each(|number| guest.transmit_chain(&vec![*number; 1000], &cuts));
    assert_eq!(bench.receive(), [vec![1; 1000], vec![2; 1000]]);
    (0..2).for_each(|_| guest.provide(&vec![10; half]));
    let frame = vec![3; 20 * half - HEADER];
    assert_eq!(bench.send(std::slice::from_ref(&frame)), 1);
    assert_eq!(guest.received(), std::slice::from_ref(&frame));

    let (mut plain, mut guest) = Bench::with(PLAIN);
    (0..2).for_each(|_| guest.provide(&vec![10; half]));
    let fits = vec![4; 10 * half - HEADER];
    let frames: Vec<Vec<u8>> = [&frame, &frame, &fits].into_iter().cycle().take(6).cloned().collect();
    assert_eq!(plain.send(&frames), 6);
    assert_eq!(guest.received(), [fits.clone(), fits]);
    assert_eq!((plain.tx.counters().errors.get(), plain.tx.counters().device_errors.get()), (4, 0));
    assert_eq!((bench.rx.counters().device_errors.get(), bench.tx.counters().device_errors.get()), (0, 0));
}

#[test]
fn the_driver_is_woken_only_when_it_wants() {
    let (mut bench, mut guest) = Bench::with(PLAIN);
    guest.provide_all();
    guest.clear_calls();
    bench.send(&[frame(0)]);
    guest.transmit(&frame(0));
    bench.receive();
    assert_eq!([RECEIVE, TRANSMIT].map(|ring| guest.take_call(ring)), [true, true]);
    assert_eq!(bench.rx.counters().doorbells.get() + bench.tx.counters().doorbells.get(), 2);
    guest.rings.iter().for_each(|ring| ring.set_no_interrupt());
    bench.send(&[frame(0)]);
    guest.transmit(&frame(0));
    bench.receive();
    assert_eq!([RECEIVE, TRANSMIT].map(|ring| guest.take_call(ring)), [false, false]);
    assert!(guest.rings.iter().all(|ring| ring.wants_no_kick(false)));

    let (mut bench, mut guest) = Bench::with(ALL);
    guest.provide_all();
    guest.clear_calls();
    guest.rings[RECEIVE].set_used_event(2);
    let frames: Vec<Vec<u8>> = (0..5).map(frame).collect();
    let woken: Vec<bool> = [1, 1, 1, 2]
        .map(|count| {
            bench.send(&frames[..count]);
            guest.take_call(RECEIVE)
        })
        .into();
    assert_eq!(woken, [false, false, true, false]);
    guest.rings[RECEIVE].set_used_event(7);
    bench.send(&frames);
    assert!(guest.take_call(RECEIVE));
}

#[test]
fn no_kick_is_asked_for_however_far_the_index_runs() {
    let (mut bench, mut guest) = Bench::with(ALL);
    for _ in 0..(1 << 17) / usize::from(SIZE) {
        guest.provide_all();
        assert!(guest.rings[RECEIVE].wants_no_kick(true));
        while bench.send(&vec![vec![0; 60]; MAX_BURST]) > 0 {}
        guest.received();
    }
    assert_eq!(bench.tx.counters().packets.get(), 1 << 17);
}

#[test]
fn memory_in_several_regions() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    guest.regions = 4;
    guest.start(ALL);
    let mut bench = bench;
    exchange(&mut bench, &mut guest, 200);
    // When memory is plugged in, the rings continue where they were.
    guest.regions = 2;
    guest.set_mem_table();
    assert!(bench.device.link().up);
    exchange(&mut bench, &mut guest, 200);
    assert_eq!(bench.rx.counters().packets.get(), 400);
}

/// The regions are adjacent in guest addresses.
#[test]
fn a_buffer_may_cross_from_one_region_into_the_next() {
    for features in [PLAIN, ALL] {
        for before in [1, 5, HEADER - 1, HEADER, HEADER + 1, 100] {
            let bench = Bench::new();
            let mut guest = bench.guest();
            guest.regions = 4;
            guest.start(features);
            let mut bench = bench;
            let border = GUEST + MEMORY / guest.regions;
            let (at, other) = (border - before as u64, border + MEMORY / guest.regions - before as u64);
            let sent = frame(11);
            guest.view.write(at, &[&[0xa5; HEADER][..], &sent].concat()).unwrap();
            guest.rings[TRANSMIT].describe(0, at, (HEADER + sent.len()) as u32, 0, 0);
            guest.rings[TRANSMIT].offer(0);
            assert_eq!(bench.receive(), [sent], "{before}");
            assert_eq!(guest.reap_transmitted(), 1);
            guest.rings[RECEIVE].describe(0, other, BUFFER as u32, DESC_WRITE, 0);
            guest.rings[RECEIVE].offer(0);
            assert_eq!(bench.send(&[frame(12)]), 1, "{before}");
            assert_eq!(guest.received(), [frame(12)]);
            assert_eq!(
                (bench.rx.counters().device_errors.get(), bench.tx.counters().device_errors.get()),
                (0, 0)
            );
        }
    }
}

#[test]
fn rings_that_are_not_enabled_receive_nothing_and_send_nothing() {
    let (mut bench, mut guest) = Bench::with(ALL);
    guest.provide_all();
    guest.enable(TRANSMIT, false);
    assert!(!bench.device.link().up);
    guest.transmit(&frame(1));
    guest.transmit_chain(&frame(2), &[HEADER, 40]);
    assert!(bench.receive().is_empty());
    assert_eq!(guest.await_transmitted(2), 2, "what a disabled ring sends is used and dropped");
    assert_eq!((bench.rx.counters().packets.get(), bench.rx.counters().errors.get()), (0, 2));
    guest.enable(TRANSMIT, true);
    guest.transmit(&frame(1));
    assert_eq!(bench.receive(), [frame(1)]);
    guest.enable(RECEIVE, false);
    assert_eq!(bench.send(&[frame(2)]), 0);
    guest.enable(RECEIVE, true);
    assert_eq!(bench.send(&[frame(3)]), 1);
    assert_eq!(guest.received(), [frame(3)]);
}

/// cloud-hypervisor, crosvm and DPDK stop a device in this order.
#[test]
fn a_disabled_ring_ends_where_it_was() {
    for running in [true, false] {
        let bench = Bench::new();
        let mut guest = bench.guest();
        guest.rings.iter_mut().for_each(|ring| ring.begin_at(65_400));
        guest.start(ALL);
        let mut bench = bench;
        if running {
            exchange(&mut bench, &mut guest, 300);
        }
        let end = 65_400_u16.wrapping_add(if running { 300 } else { 0 });
        for ring in [RECEIVE, TRANSMIT] {
            guest.enable(ring, false);
        }
        assert_eq!([RECEIVE, TRANSMIT].map(|ring| guest.frontend_base(ring)), [u32::from(end); 2]);
        // A second request returns the same position.
        assert_eq!([RECEIVE, TRANSMIT].map(|ring| guest.frontend_base(ring)), [u32::from(end); 2]);
    }
}

/// The descriptors of a chain on a disabled ring are invalid, but they are not read.
#[test]
fn a_disabled_ring_is_drained_without_a_look_at_its_frames() {
    let (mut bench, mut guest) = Bench::with(ALL);
    guest.enable(TRANSMIT, false);
    for round in 0..3 {
        (0..SIZE).for_each(|_| guest.transmit(&frame(round)));
        assert!(bench.receive().is_empty());
        assert_eq!(guest.await_transmitted(SIZE.into()), usize::from(SIZE));
    }
    assert_eq!(guest.frontend_base(TRANSMIT), 3 * u32::from(SIZE));
    assert_eq!(bench.rx.counters().errors.get(), 3 * u64::from(SIZE));
}

/// The port may read a request late: what a frontend transmits after a request that enables the ring is not
/// dropped.
#[test]
fn nothing_is_dropped_behind_a_request_that_enables_the_ring() {
    let (mut bench, mut guest) = Bench::with(ALL);
    guest.enable(TRANSMIT, false);
    let mut number = 0;
    for part in [4, 12, 20] {
        let mut frames = Vec::new();
        guest.begin_to_enable(TRANSMIT, part, |guest| {
            for _ in 0..3 {
                number += 1;
                guest.transmit(&frame(number));
                frames.extend(bench.receive());
            }
        });
        let begin = std::time::Instant::now();
        while frames.len() < 3 && begin.elapsed().as_secs() < 20 {
            frames.extend(bench.receive());
        }
        assert_eq!(frames, [number - 2, number - 1, number].map(frame));
        guest.enable(TRANSMIT, false);
    }
    assert_eq!(bench.rx.counters().errors.get(), 0);
}

#[test]
fn rings_may_be_enabled_before_features_are_accepted() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.enable_early(RECEIVE as u32, 1, false), None);
    assert_eq!(guest.enable_early(TRANSMIT as u32, 1, true), Some(0));
    guest.start(ALL);
    let mut bench = bench;
    exchange(&mut bench, &mut guest, 10);
    drop(guest);
    let mut guest = bench.guest();
    assert_eq!(guest.enable_early(2, 1, true), Some(1), "there is no such ring");
    assert!(guest.is_disconnected());
}

#[test]
fn a_frontend_may_go_and_another_come() {
    let (mut bench, mut guest) = Bench::with(ALL);
    exchange(&mut bench, &mut guest, 50);
    drop(guest);
    let mut guest = bench.guest();
    // An answer to the second guest means that the first one is forgotten.
    guest.introduce(PLAIN);
    assert!(!bench.device.link().up);
    assert_eq!((bench.receive().len(), bench.send(&[frame(1)])), (0, 0));
    guest.start(PLAIN);
    exchange(&mut bench, &mut guest, 50);
    guest.stop();
    assert!(!bench.device.link().up);
    guest.start(PLAIN);
    exchange(&mut bench, &mut guest, 50);
    assert_eq!(bench.rx.counters().packets.get(), 150);
    assert_eq!(bench.stop(), BUFFERS);
}

/// Open vSwitch recommends this setup: whichever end restarts, the other one stays.
#[test]
fn a_client_connects_to_each_frontend_that_listens() {
    let mut bench = Bench::with_socket(true);
    let path = bench.dir.path().join("socket");
    for features in [ALL, PLAIN, ALL] {
        assert!(!bench.device.link().up && !path.exists());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut guest = Guest::on(listener.accept().unwrap().0);
        guest.start(features);
        exchange(&mut bench, &mut guest, 50);
        // The machine ends and leaves its socket behind, as a killed one does.
        drop((guest, listener));
        while bench.device.link().up {
            std::thread::yield_now();
        }
        std::fs::remove_file(&path).unwrap();
    }
    assert_eq!(bench.rx.counters().packets.get(), 150);
    // A port ends whether it waits for a frontend or has one; the socket is the frontend's.
    assert_eq!(bench.stop(), BUFFERS);
    let bench = Bench::with_socket(true);
    let path = bench.dir.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut guest = Guest::on(listener.accept().unwrap().0);
    guest.start(ALL);
    drop(bench.device);
    assert!(guest.is_disconnected() && path.exists());
    let long = "x".repeat(200);
    let error = Device::open("net_vhost0", &Options { client: true, ..options(Path::new(&long)) });
    assert!(error.unwrap_err().errno().is_some());
}

#[test]
fn the_port_may_stop_and_start_while_a_frontend_is_there() {
    let (mut bench, mut guest) = Bench::with(ALL);
    exchange(&mut bench, &mut guest, 50);
    let Bench { dir, mut device, rx, tx, mut cache, memory } = bench;
    assert_eq!(device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().kind(), ErrorKind::Usage);
    device.stop_pair(rx, tx, &mut cache).unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let mut bench = Bench { dir, device, rx, tx, cache, memory };
    exchange(&mut bench, &mut guest, 50);
    assert_eq!(bench.rx.counters().packets.get(), 100);
    let other = Bench::new();
    let error = bench.device.stop_pair(other.rx, other.tx, &mut bench.cache).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let path = bench.dir.path().join("socket");
    assert!(path.exists());
    drop(bench.device);
    assert!(!path.exists() && guest.is_disconnected());
}

#[test]
fn a_socket_that_is_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listen = || Device::open("net_vhost0", &options(&path));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let device = listen().unwrap();
    let error = listen().unwrap_err();
    assert_eq!((error.kind(), path.exists()), (ErrorKind::Busy, true));
    assert!(error.to_string().starts_with("net_vhost0: cannot listen at"), "{error}");
    drop(device);
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(listen().unwrap_err().kind(), ErrorKind::Usage);
    assert!(path.exists());
    let nowhere = Device::open("net_vhost0", &options(&path.join("below"))).unwrap_err();
    assert!(nowhere.errno().is_some(), "{nowhere}");
}

/// The socket belongs to another process, whose connection queue is full.
#[test]
fn a_socket_that_accepts_nobody_does_not_hang_the_start() {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let busy = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(busy.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&busy, Backlog::new(0).unwrap()).unwrap();
    let _first = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    let start = std::thread::spawn(move || done.send(Device::open("net_vhost0", &options(&path))).is_ok());
    let error = ended.recv_timeout(std::time::Duration::from_secs(10)).expect("it waits").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("another process listens there"), "{error}");
    assert!(start.join().unwrap());
}

#[test]
fn an_empty_pool_receives_later() {
    let (mut bench, mut guest) = Bench::with(ALL);
    let held: Vec<_> = std::iter::from_fn(|| bench.cache.allocate()).collect();
    guest.transmit(&frame(1));
    assert!(bench.receive().is_empty());
    assert_eq!(bench.rx.counters().no_buffer.get(), 1);
    held.into_iter().for_each(|buffer| bench.cache.free(buffer));
    assert_eq!(bench.receive(), [frame(1)]);
    assert_eq!(bench.stop(), BUFFERS);
}

/// Pairs the RX and TX queues of the same number.
fn pairs_of<R, T>(queues: &mut Queues<R, T>) -> impl Iterator<Item = (&mut R, &mut T)> {
    queues.rx.iter_mut().zip(&mut queues.tx)
}

/// Both ends are Vireo ports, and each queue pair is an independent path.
#[test]
fn a_virtio_user_port_uses_several_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let mut server = Device::open("net_vhost0", &Options { queues: 2, ..options(&path) }).unwrap();
    let args = [("path", path.to_str().unwrap()), ("queues", "4")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let user = virtio::UserOptions::parse("net_virtio_user0", &args).unwrap();
    let mut client = virtio::Device::connect("net_virtio_user0", &user, &StopFlag::new()).unwrap();
    let region = Region::new(Pool::bytes(BUFFERS) + (1 << 20), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    let pool = Pool::new(&memory, BUFFERS).unwrap();
    let mut cache = pool.cache();
    for pairs in [1, 2] {
        let mut ours = server.start(&CONFIG.with_pairs(pairs), &memory, &mut cache).unwrap();
        let mut theirs = client.start(&CONFIG.with_pairs(pairs), &memory, &mut cache).unwrap();
        for length in 60..200 {
            for ((rx, tx), (peer_rx, peer_tx)) in pairs_of(&mut ours).zip(pairs_of(&mut theirs)) {
                let ways: [(&mut dyn TxBurst, &mut dyn RxBurst); 2] = [(peer_tx, rx), (tx, peer_rx)];
                for (tx, rx) in ways {
                    let mut burst: Burst =
                        std::iter::once(cache.allocate().unwrap().with_len(length)).collect();
                    assert_eq!(tx.tx_burst(&mut cache, &mut burst), 1);
                    rx.rx_burst(&mut cache, &mut burst);
                    assert_eq!(burst.iter().map(Packet::len).collect::<Vec<_>>(), [length]);
                    burst.drain(..).for_each(|packet| cache.free(packet));
                }
            }
        }
        client.stop(theirs, &mut cache).unwrap();
        server.stop(ours, &mut cache).unwrap();
    }
    let error = client.start(&CONFIG.with_pairs(4), &memory, &mut cache).unwrap_err();
    assert!(error.to_string().contains("4 RX queues are requested, but it has 2"), "{error}");
    drop(cache);
    assert_eq!(pool.available(), BUFFERS);
}

/// A pool is in memory that was added while a virtio-user port runs: the peer finds the packets, and the TX
/// ring returns them to that pool.
#[test]
fn a_virtio_user_port_sends_from_memory_that_was_added() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let mut server = Device::open("net_vhost0", &options(&path)).unwrap();
    let args = [("path".to_owned(), path.to_str().unwrap().to_owned())];
    let user = virtio::UserOptions::parse("net_virtio_user0", &args).unwrap();
    let mut client = virtio::Device::connect("net_virtio_user0", &user, &StopFlag::new()).unwrap();
    let region = |bytes| Region::new(Pool::bytes(BUFFERS) + bytes, Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region(1 << 20), &[]).unwrap();
    let pool = Pool::new(&memory, BUFFERS).unwrap();
    let mut cache = pool.cache();
    let (mut rx, server_tx) = server.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let (client_rx, mut tx) = client.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let added = memory.memory_map().add(region(0), &[Part::default()]).unwrap().swap_remove(0);
    client.update_memory(&added).unwrap();
    let more = Pool::new(&added, BUFFERS).unwrap();
    let mut to_send = more.cache();
    let mut burst = Burst::new();
    for number in 0..20 {
        let mut packet = to_send.allocate().unwrap().with_len(frame(number).len());
        to_send.write(&mut packet, 0, &frame(number));
        burst.push(packet);
    }
    assert_eq!(tx.tx_burst(&mut to_send, &mut burst), 20);
    rx.rx_burst(&mut cache, &mut burst);
    assert_eq!(burst.len(), 20);
    for (number, packet) in burst.drain(..).enumerate() {
        let mut bytes = vec![0; packet.len()];
        cache.read(&packet, 0, &mut bytes);
        assert_eq!(bytes, frame(number));
        cache.free(packet);
    }
    client.stop_pair(client_rx, tx, &mut cache).unwrap();
    server.stop_pair(rx, server_tx, &mut cache).unwrap();
    drop((cache, to_send));
    assert_eq!((pool.available(), more.available()), (BUFFERS, BUFFERS));
}

#[test]
fn the_keys_are_those_of_dpdk() {
    let parse = |args: &[(&str, &str)]| {
        let args: Vec<_> = args.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        Options::parse("net_vhost0", &args)
    };
    let full = [("iface", "/tmp/a"), ("queues", "4"), ("client", "0"), ("mac", "02:00:00:00:00:09")];
    let mac = Some(MacAddr([2, 0, 0, 0, 0, 9]));
    let expected = Options { path: "/tmp/a".into(), mac, queues: 4, client: false };
    assert_eq!(parse(&full).unwrap(), expected);
    assert!(parse(&[("iface", "/tmp/a"), ("client", "1")]).unwrap().client);
    let wrong: [&[(&str, &str)]; 5] =
        [&[], &[("client", "yes")], &[("queues", "129")], &[("mac", "2")], &[("dequeue-zero-copy", "1")]];
    assert!(wrong.iter().all(|args| parse(args).unwrap_err().kind() == ErrorKind::Usage));
}

/// A subscriber that collects the lines logged by this thread.
struct Logged(std::sync::Mutex<Vec<String>>);

impl tracing::field::Visit for &Logged {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0.lock().unwrap().push(format!("{value:?}"));
        }
    }
}

impl tracing::Subscriber for Logged {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut &*self);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// Without mergeable buffers a frame must fit into the next buffer, which remains the next one when the frame
/// does not fit.
#[test]
fn a_buffer_that_is_too_short_is_named_once() {
    let (mut bench, mut guest) = Bench::with(PLAIN);
    guest.provide(&[13]);
    (1..SIZE).for_each(|_| guest.provide(&[BUFFER as u32]));
    let logged = Arc::new(Logged(std::sync::Mutex::default()));
    tracing::subscriber::with_default(Arc::clone(&logged), || {
        for _ in 0..3 {
            assert_eq!(bench.send(&[frame(1), frame(2)]), 2);
        }
    });
    assert_eq!((bench.tx.counters().errors.get(), bench.tx.counters().packets.get()), (6, 0));
    let lines = logged.0.lock().unwrap();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = "net_vhost0: frames are dropped: the frontend's next receive buffer has 13 bytes, a frame of 97 bytes \
                needs 109, and without VIRTIO_NET_F_MRG_RXBUF a frame takes one buffer";
    assert_eq!(lines[0], line);
}
