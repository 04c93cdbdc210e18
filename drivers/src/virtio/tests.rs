//! Tests of the driver against the device half in `fakedev`: correct devices here, poor and misbehaving ones
//! in `hostile`.

mod checksum;
mod hostile;
mod long;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vireo_eal::ErrorKind;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DATA_ROOM, DmaMemory, MAX_BURST, Packet, Pool, PoolCache};
use vireo_eal::event::is_signaled;
use vireo_eal::mem::{Backing, Region};

use super::{Device, HEADER, Options, RxQueue, TxQueue};
use crate::fakedev::virtio::{Behaviour, RX, TX, VirtioNet, feature};
use crate::handover::HandOver;
use crate::port::{Nic, PortConfig, RxBurst, TxBurst};

const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);
const BUFFERS: u32 = 512;

/// A started port with its device half and its memory.
struct Bench {
    nic: VirtioNet,
    device: Device,
    rx: RxQueue,
    tx: TxQueue,
    cache: PoolCache,
    memory: Arc<DmaMemory>,
}

fn memory(buffers: u32) -> (Arc<DmaMemory>, PoolCache) {
    let len = Pool::bytes(buffers) + (1 << 20);
    let memory = DmaMemory::map(Region::new(len, Backing::SmallPages).unwrap(), &[]).unwrap();
    let cache = Pool::new(&memory, buffers).unwrap().cache();
    (memory, cache)
}

impl Bench {
    fn new(behaviour: Behaviour) -> Self {
        Self::with(behaviour, Options::default(), BUFFERS)
    }

    fn with(behaviour: Behaviour, options: Options, buffers: u32) -> Self {
        Self::started(behaviour, options, buffers, &CONFIG)
    }

    fn started(behaviour: Behaviour, options: Options, buffers: u32, config: &PortConfig) -> Self {
        let nic = VirtioNet::new(behaviour);
        let (memory, mut cache) = memory(buffers);
        nic.attach(memory.device_view().unwrap());
        let mut device = Device::probe_with(nic.function(), options).unwrap();
        let (rx, tx) = device.start_pair(config, &memory, &mut cache).unwrap();
        assert!(nic.is_live());
        Self { nic, device, rx, tx, cache, memory }
    }

    /// Polls twice: the second poll returns packets after a bad frame or after the end of the ring.
    fn receive(&mut self) -> Burst {
        let mut burst = Burst::new();
        self.rx.rx_burst(&mut self.cache, &mut burst);
        self.rx.rx_burst(&mut self.cache, &mut burst);
        burst
    }

    fn bytes(&self, packet: &Packet) -> Vec<u8> {
        let mut bytes = vec![0; packet.len()];
        self.cache.read(packet, 0, &mut bytes);
        bytes
    }

    fn send(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) -> usize {
        let mut burst = Burst::new();
        for frame in frames {
            let mut packet = self.cache.allocate().unwrap().with_len(frame.len());
            self.cache.write(&mut packet, 0, &frame);
            burst.push(packet);
        }
        let sent = self.tx.tx_burst(&mut self.cache, &mut burst);
        self.free(burst);
        sent
    }

    fn free(&mut self, burst: Burst) {
        burst.into_iter().for_each(|packet| self.cache.free(packet));
    }

    /// Receives a burst and sends it again; returns the number of packets.
    fn forward(&mut self) -> usize {
        let mut burst = self.receive();
        let received = burst.len();
        self.tx.tx_burst(&mut self.cache, &mut burst);
        self.free(burst);
        received
    }

    /// Stops the port; returns the number of available buffers and the device.
    fn stop(mut self) -> (u32, VirtioNet) {
        assert_eq!(self.nic.faults(), [""; 0]);
        self.device.stop_pair(self.rx, self.tx, &mut self.cache).unwrap();
        assert!(!self.nic.is_live());
        let pool = Arc::clone(self.cache.pool());
        drop(self.cache);
        (pool.available(), self.nic)
    }
}

fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![number as u8; 60 + (number % 1400) as usize];
    frame[..4].copy_from_slice(&number.to_le_bytes());
    frame
}

fn without(bits: u64) -> Behaviour {
    let mut behaviour = Behaviour::default();
    behaviour.features &= !bits;
    behaviour
}

/// Forwards `count` frames in groups of `group` and checks that each arrives once, unchanged and in order.
fn round_trip(mut bench: Bench, count: u32, group: u32) -> VirtioNet {
    let mut expected = VecDeque::new();
    let mut number = 0;
    while number < count {
        for _ in 0..group {
            assert!(bench.nic.receive(&frame(number)));
            expected.push_back(frame(number));
            number += 1;
        }
        while bench.forward() > 0 {}
        for sent in bench.nic.transmitted() {
            assert_eq!(Some(sent), expected.pop_front());
        }
        assert!(expected.is_empty());
    }
    let (rx, tx) = (bench.rx.counters().read(), bench.tx.counters().read());
    assert_eq!((rx.packets, tx.packets), (number.into(), number.into()));
    assert_eq!((rx.bytes, rx.errors, rx.device_errors, tx.device_errors), (tx.bytes, 0, 0, 0));
    let (free, nic) = bench.stop();
    assert_eq!(free, BUFFERS);
    nic
}

#[test]
fn frames_pass_with_and_without_mergeable_buffers_and_event_index() {
    for bits in [0, feature::MRG_RXBUF, feature::EVENT_IDX, feature::MRG_RXBUF | feature::EVENT_IDX] {
        let nic = round_trip(Bench::new(without(bits)), 1000, 7);
        assert_eq!(nic.interrupts(), 0);
    }
    let options = Options { mrg_rxbuf: false, ..Options::default() };
    round_trip(Bench::with(Behaviour::default(), options, BUFFERS), 100, 20);
}

#[test]
fn a_device_may_insist_on_memory_barriers() {
    let features = Behaviour::default().features | feature::ORDER_PLATFORM;
    round_trip(Bench::new(Behaviour { features, ..Behaviour::default() }), 100, 7);
}

#[test]
fn indices_wrap() {
    let nic = round_trip(Bench::new(Behaviour::default()), 150_000, 31);
    assert_eq!(nic.interrupts(), 0);
    round_trip(Bench::new(without(feature::EVENT_IDX)), 70_000, 32);
}

#[test]
fn completions_may_come_in_any_order() {
    let mut bench = Bench::new(Behaviour { out_of_order: true, ..Behaviour::default() });
    for round in 0..5000_u32 {
        let group = round % 30 + 1;
        let frames: Vec<_> = (0..group).map(|i| frame(round * 31 + i)).collect();
        let received = frames.iter().filter(|frame| bench.nic.receive(frame)).count();
        let mut forwarded = 0;
        while forwarded < received {
            forwarded += bench.forward();
        }
        assert_eq!(bench.nic.transmitted(), frames[..received]);
    }
    assert_eq!((bench.rx.counters().device_errors.get(), bench.tx.counters().device_errors.get()), (0, 0));
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn a_full_ring_keeps_what_it_cannot_send() {
    let mut bench = Bench::new(Behaviour::default());
    assert_eq!(bench.send((0..32).map(frame)), 32);
    assert_eq!(bench.send((32..64).map(frame)), 32);
    assert_eq!(bench.send((64..70).map(frame)), 0);
    assert_eq!(bench.nic.transmitted().len(), 64);
    assert_eq!(bench.send((70..76).map(frame)), 6);
    assert_eq!(bench.nic.transmitted(), (70..76).map(frame).collect::<Vec<_>>());
    assert_eq!(bench.tx.counters().packets.get(), 70);
    assert_eq!(bench.stop().0, BUFFERS);
}

/// The ring is found full twice, more than a second apart and at the same used index: 2^16 packets were sent
/// in between.
#[test]
fn a_ring_that_is_full_again_is_not_stuck() {
    let mut bench = Bench::new(Behaviour::default());
    let begin = Instant::now();
    for last in [false, true] {
        assert_eq!([bench.send((0..32).map(frame)), bench.send((0..32).map(frame))], [32, 32]);
        assert_eq!((bench.send([frame(0)]), bench.tx.is_broken()), (0, false));
        assert_eq!(bench.nic.transmitted().len(), 64);
        for _ in 0..if last { 0 } else { (1 << 16) / 32 - 2 } {
            assert_eq!(bench.send((0..32).map(frame)), 32);
            bench.nic.transmitted();
        }
        while begin.elapsed() < Duration::from_millis(1100) {
            std::thread::yield_now();
        }
    }
}

/// A device behaves like this while its host is paused or the switch behind it restarts.
#[test]
fn a_device_that_sends_nothing_for_long_is_rung_again_and_kept() {
    let mut bench = Bench::new(Behaviour::default());
    let begin = Instant::now();
    assert_eq!([bench.send((0..32).map(frame)), bench.send((0..32).map(frame))], [32, 32]);
    assert!(bench.nic.take_doorbell(TX));
    while !bench.nic.take_doorbell(TX) {
        assert!(begin.elapsed() < Duration::from_secs(60), "not rung again");
        assert_eq!(bench.send([frame(0)]), 0);
        assert!(!bench.tx.is_broken());
    }
    bench.device.check().unwrap();
    assert!(bench.nic.receive(&frame(5)));
    let burst = bench.receive();
    assert_eq!(bench.bytes(&burst[0]), frame(5), "nothing is lost that it receives");
    bench.free(burst);
    assert_eq!(bench.nic.transmitted(), (0..32).chain(0..32).map(frame).collect::<Vec<_>>());
    assert_eq!(bench.send([frame(1)]), 1);
    assert_eq!(bench.nic.transmitted(), [frame(1)]);
    assert_eq!((bench.rx.counters().device_errors.get(), bench.tx.counters().device_errors.get()), (0, 0));
    assert_eq!(bench.stop().0, BUFFERS);
}

/// QEMU's device behaves like this when its bus mastering is switched off.
#[test]
fn a_device_that_was_stopped_by_somebody_else_is_started_again() {
    let mut bench = Bench::new(Behaviour::default());
    bench.device.check().unwrap();
    bench.nic.behave(|behaviour| behaviour.halted = true);
    let error = bench.device.check().unwrap_err().to_string();
    assert!(error.contains("its status 0xb has lost DRIVER_OK"), "{error}");
    bench.nic.behave(|behaviour| behaviour.halted = false);
    let Bench { nic, mut device, rx, tx, mut cache, memory } = bench;
    device.stop_pair(rx, tx, &mut cache).unwrap();
    device.check().unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    device.check().unwrap();
    assert_eq!(Bench { nic, device, rx, tx, cache, memory }.stop().0, BUFFERS);
}

#[test]
fn an_empty_burst_takes_buffers_back() {
    let mut bench = Bench::new(Behaviour::default());
    bench.send((0..5).map(frame));
    let before = bench.cache.len();
    bench.nic.transmitted();
    assert_eq!(bench.send([]), 0);
    assert_eq!(bench.cache.len(), before + 5);
}

#[test]
fn an_exhausted_pool_is_counted_and_recovers() {
    let mut bench = Bench::with(Behaviour::default(), Options::default(), 96);
    let mut held = Vec::new();
    let mut number = 0;
    while bench.nic.receive(&frame(number)) {
        number += 1;
        held.extend(bench.receive());
    }
    assert_eq!((held.len(), number), (96, 96));
    assert!(bench.rx.counters().no_buffer.get() > 0);
    assert!(bench.receive().is_empty());
    bench.nic.take_doorbell(RX);
    for packet in held {
        bench.cache.free(packet);
    }
    assert!(bench.receive().is_empty());
    assert!(bench.nic.take_doorbell(RX), "a dry device waits for the doorbell");
    assert!(bench.nic.receive(&frame(7)));
    let burst = bench.receive();
    assert_eq!(bench.bytes(&burst[0]), frame(7));
    bench.free(burst);
    assert_eq!(bench.stop().0, 96);
}

#[test]
fn too_few_buffers_to_start_are_an_error_that_loses_none() {
    let nic = VirtioNet::default();
    let (memory, mut cache) = memory(40);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err();
    assert!(error.to_string().contains("24 of 64 packet buffers are missing"), "{error}");
    let pool = Arc::clone(cache.pool());
    drop(cache);
    assert_eq!((pool.available(), nic.is_live()), (40, false));
}

#[test]
fn the_device_is_rung_when_it_asks_and_only_then() {
    for behaviour in [Behaviour::default(), without(feature::EVENT_IDX)] {
        let event_idx = behaviour.features & feature::EVENT_IDX != 0;
        let mut bench = Bench::new(behaviour);
        assert!(bench.nic.take_doorbell(RX), "the first buffers are announced");
        assert_eq!(bench.rx.counters().doorbells.get(), 1);
        // The device sleeps. The first burst wakes it; with an event index, later bursts do not.
        bench.send([frame(1)]);
        assert!(bench.nic.take_doorbell(TX));
        bench.send((0..20).map(frame));
        assert_eq!(bench.nic.take_doorbell(TX), !event_idx);
        assert_eq!(bench.nic.transmitted().len(), 21);
        bench.send((0..20).map(frame));
        assert!(bench.nic.take_doorbell(TX));
        assert_eq!(bench.tx.counters().doorbells.get(), if event_idx { 2 } else { 3 });
        // Buffers are offered again while the device has others, so it does not request a doorbell.
        for number in 0..200 {
            assert!(bench.nic.receive(&frame(number)));
            let burst = bench.receive();
            bench.free(burst);
        }
        assert!(!bench.nic.take_doorbell(RX));
        assert_eq!((bench.rx.counters().doorbells.get(), bench.nic.interrupts()), (1, 0));
    }
}

/// A device that promises to complete in order, and writes one used element for several buffers.
fn in_order() -> Behaviour {
    let features = Behaviour::default().features | feature::IN_ORDER;
    Behaviour { features, one_element: true, ..Behaviour::default() }
}

#[test]
fn a_device_in_order_may_leave_used_elements_out() {
    let mut bench = Bench::new(in_order());
    let mut number = 0;
    for round in 0..500 {
        let frames: Vec<_> = (number..number + 1 + round % 32).map(frame).collect();
        number += 1 + round % 32;
        assert!(frames.iter().all(|frame| bench.nic.receive(frame)));
        assert_eq!((bench.forward(), bench.nic.transmitted()), (frames.len(), frames));
    }
    assert_eq!((bench.rx.counters().device_errors.get(), bench.tx.counters().device_errors.get()), (0, 0));
    assert_eq!(bench.stop().0, BUFFERS);
}

/// One element covers more frames than a burst holds, with and without mergeable buffers.
#[test]
fn one_element_for_many_frames_is_taken_burst_by_burst() {
    for features in [0, feature::MRG_RXBUF] {
        let mut behaviour = in_order();
        behaviour.features &= !features;
        let mut bench = Bench::new(behaviour);
        let mut number = 0;
        for round in 0..300 {
            // The elements that are left out later still contain the lengths of short frames.
            bench.nic.behave(|behaviour| behaviour.one_element = false);
            for number in 0..64 {
                assert!(bench.nic.receive(&frame(number)));
                let burst = bench.receive();
                bench.free(burst);
            }
            bench.nic.behave(|behaviour| behaviour.one_element = true);
            let mut frames: Vec<_> = (number..number + 1 + round % 46).map(frame).collect();
            number += 1 + round % 46;
            // A buffer whose element is left out counts as full, so each frame must fill its buffer.
            frames.iter_mut().for_each(|frame| frame.resize(DATA_ROOM, 7));
            assert!(bench.nic.receive_together(&frames));
            let mut received = Vec::new();
            while received.len() < frames.len() {
                let burst = bench.receive();
                assert!(!burst.is_empty(), "{} of {}", received.len(), frames.len());
                received.extend(burst.iter().map(|packet| bench.bytes(packet)));
                bench.free(burst);
            }
            assert_eq!(received, frames);
        }
        assert_eq!(bench.rx.counters().device_errors.get(), 0);
        assert_eq!(bench.stop().0, BUFFERS);
    }
}

/// Queues that different processes poll have buffers of their own pools, and one of them starts anew alone.
#[test]
fn each_queue_is_filled_from_its_own_pool_and_renewed_alone() {
    let features = Behaviour::default().features | feature::MQ | feature::RING_RESET;
    let nic = VirtioNet::new(Behaviour { pairs: 2, features, ..Behaviour::default() });
    let region = Region::new(Pool::bytes(BUFFERS) + (1 << 20), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    nic.attach(memory.device_view().unwrap());
    let pools = [(); 2].map(|()| Pool::new(&memory, BUFFERS / 2).unwrap());
    let mut caches = pools.each_ref().map(Pool::cache);
    let mut device = Device::probe(nic.function()).unwrap();
    let mut queues = device.start_from(&CONFIG.with_pairs(2), &memory, &mut caches).unwrap();
    let held = |pool: &Pool, cache: &PoolCache| pool.count() - pool.available() - cache.len() as u32;
    assert_eq!([0, 1].map(|n| held(&pools[n], &caches[n])), [64, 64]);
    device.lend_rx(&mut queues.rx[1], &mut caches[1]).unwrap();
    device.lend_tx(&mut queues.tx[1], &mut caches[1]).unwrap();
    assert_eq!(held(&pools[1], &caches[1]), 0);
    // Its process has died.
    device.halt_rx(1).unwrap();
    device.halt_tx(1).unwrap();
    assert!(nic.receive_on(0, &[0; 60]) && !nic.receive_on(1, &[1; 60]));
    device.renew_tx(1, &mut queues.tx[1]).unwrap();
    device.renew_rx(1, &mut queues.rx[1], &mut caches[1]).unwrap();
    assert!(nic.receive_on(1, &[1; 60]));
    for (n, cache) in caches.iter_mut().enumerate() {
        let mut burst = Burst::new();
        queues.rx[n].rx_burst(cache, &mut burst);
        assert_eq!(burst.len(), 1);
        assert_eq!(queues.tx[n].tx_burst(cache, &mut burst), 1);
        assert_eq!(nic.transmitted_on(n as u16), [vec![n as u8; 60]]);
    }
    assert_eq!(nic.faults(), Vec::<&str>::new());
    device.stop(queues, &mut caches[0]).unwrap();
    drop(caches);
    assert!(pools.iter().all(|pool| pool.available() == pool.count()));
    // Without the feature, only the whole device is reset.
    let old = VirtioNet::default();
    let error = Device::probe(old.function()).unwrap().halt_rx(0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[test]
fn several_pairs_need_a_control_queue() {
    let features = (Behaviour::default().features | feature::MQ) & !(feature::CTRL_VQ | feature::CTRL_RX);
    let nic = VirtioNet::new(Behaviour { pairs: 2, features, ..Behaviour::default() });
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    let error = device.start(&CONFIG.with_pairs(2), &memory, &mut cache).unwrap_err().to_string();
    assert!(error.contains("2 RX queues are requested, but it has 1"), "{error}");
    assert_eq!(nic.faults(), [""; 0]);
}

#[test]
fn each_rx_queue_has_its_own_interrupt_with_and_without_event_index() {
    const SLEEPS: PortConfig = CONFIG.with_rx_interrupts(true);
    for bits in [0, feature::EVENT_IDX] {
        let features = (Behaviour::default().features | feature::MQ) & !bits;
        let nic = VirtioNet::new(Behaviour { pairs: 2, vectors: 1, features, ..Behaviour::default() });
        let (memory, mut cache) = memory(BUFFERS);
        nic.attach(memory.device_view().unwrap());
        let mut device = Device::probe(nic.function()).unwrap();
        let error = device.start(&SLEEPS.with_pairs(2), &memory, &mut cache).unwrap_err();
        assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("vectors=N"), "{error}");
        nic.behave(|behaviour| behaviour.vectors = 2);
        for pairs in [1, 2, 1] {
            let mut queues = device.start(&SLEEPS.with_pairs(pairs), &memory, &mut cache).unwrap();
            for number in 0..pairs {
                let before = nic.interrupts();
                for queue in &mut queues.rx {
                    assert!(queue.arm());
                }
                assert!(nic.receive_on(number, &frame(1)));
                let signaled = queues.rx.iter().map(|queue| is_signaled(queue.event().unwrap()));
                let wanted = (0..pairs).map(|other| other == number);
                assert_eq!(signaled.collect::<Vec<_>>(), wanted.collect::<Vec<_>>());
                assert_eq!(nic.interrupts(), before + 1);
                for queue in &mut queues.rx {
                    queue.disarm();
                    let mut burst = Burst::new();
                    queue.rx_burst(&mut cache, &mut burst);
                    burst.into_iter().for_each(|packet| cache.free(packet));
                }
            }
            device.stop(queues, &mut cache).unwrap();
        }
        let mut queues = device.start(&CONFIG, &memory, &mut cache).unwrap();
        assert!(queues.rx[0].event().is_none() && !queues.rx[0].arm());
        queues.rx[0].disarm();
        assert!(nic.receive(&frame(1)));
        assert_eq!((nic.faults(), nic.interrupts()), (vec![], 4));
        device.stop(queues, &mut cache).unwrap();
    }
}

#[test]
fn changes_of_the_link_are_signaled_if_a_vector_is_left() {
    for (vectors, rx_interrupts, has_event) in
        [(0, false, false), (1, false, true), (1, true, false), (2, true, true)]
    {
        let nic = VirtioNet::new(Behaviour { vectors, ..Behaviour::default() });
        let (memory, mut cache) = memory(BUFFERS);
        nic.attach(memory.device_view().unwrap());
        let mut device = Device::probe(nic.function()).unwrap();
        let config = CONFIG.with_rx_interrupts(rx_interrupts).with_link_interrupt(true);
        for _ in 0..2 {
            let queues = device.start(&config, &memory, &mut cache).unwrap();
            assert_eq!(queues.rx[0].event().is_some(), rx_interrupts);
            for up in [false, true] {
                assert!(nic.receive(&frame(1)));
                assert!(!device.link_event().is_some_and(is_signaled), "a packet is no change of the link");
                nic.behave(|behaviour| behaviour.link_up = up);
                assert_eq!(device.link_event().map(is_signaled), has_event.then_some(true), "{vectors}");
                assert_eq!(device.link().up, up);
                assert!(!device.link_event().is_some_and(is_signaled));
            }
            device.stop(queues, &mut cache).unwrap();
        }
        let queues = device.start(&CONFIG, &memory, &mut cache).unwrap();
        assert!(device.link_event().is_none());
        device.stop(queues, &mut cache).unwrap();
        assert_eq!(nic.faults(), [""; 0]);
    }
}

#[test]
fn a_driver_that_gives_up_clears_no_status() {
    let nic = VirtioNet::new(Behaviour { refuse_features: true, ..Behaviour::default() });
    Device::probe(nic.function()).unwrap_err();
    assert_eq!(nic.faults(), [""; 0]);
}

/// The driver uses the first capability that it supports, not the first of all (4.1.4.1).
#[test]
fn a_capability_that_cannot_be_used_is_passed_over() {
    let nic = VirtioNet::default();
    // The device's own capabilities are at 0x40, 0x54 and 0x68, with BAR and offset at +4 and +8.
    for (number, (kind, offset)) in [(1, 0_u32), (4, 0x1000), (2, 0x2000)].into_iter().enumerate() {
        let own = 0x40 + 20 * number as u16;
        match number {
            0 => nic.config().set(own + 4, &[5]),
            _ => nic.config().set(own + 8, &[0xff; 4]),
        }
        let mut body = [0; 18];
        body[..3].copy_from_slice(&[20, kind, 4]);
        body[6..10].copy_from_slice(&offset.to_le_bytes());
        body[10..14].copy_from_slice(&0x1000_u32.to_le_bytes());
        body[14] = 4;
        nic.config().add_capability(0x09, &body);
    }
    Device::probe(nic.function()).unwrap();
}

#[test]
fn the_promise_of_order_is_taken_only_if_the_user_wants_it() {
    let options = Options { in_order: false, ..Options::default() };
    let mut bench = Bench::with(Behaviour { out_of_order: true, ..in_order() }, options, BUFFERS);
    assert_eq!(bench.send((0..32).map(frame)), 32);
    bench.nic.transmitted();
    assert_eq!(bench.send([]), 0);
    assert_eq!((bench.tx.counters().device_errors.get(), bench.stop().0), (0, BUFFERS));
}

#[test]
fn a_frame_larger_than_a_buffer_is_dropped_and_counted() {
    // The last buffer has no header in front, so any length from one byte on is valid.
    for len in (DATA_ROOM + 1..=DATA_ROOM + HEADER).chain([2 * DATA_ROOM]) {
        for behaviour in [Behaviour::default(), in_order()] {
            large_frames(behaviour, len);
        }
    }
    let mut bench = Bench::new(without(feature::MRG_RXBUF));
    assert!(!bench.nic.receive(&[1; DATA_ROOM + 1]));
    assert!(bench.nic.receive(&[1; DATA_ROOM]));
    assert_eq!(bench.receive().iter().map(Packet::len).collect::<Vec<_>>(), [DATA_ROOM]);
}

fn large_frames(behaviour: Behaviour, len: usize) {
    let mut bench = Bench::new(behaviour);
    for round in 0..200 {
        assert!(bench.nic.receive(&frame(round)));
        assert!(bench.nic.receive(&vec![1; len]));
        assert!(bench.nic.receive(&frame(round + 1)));
        let burst = bench.receive();
        let frames: Vec<_> = burst.iter().map(|packet| bench.bytes(packet)).collect();
        assert_eq!(frames, [frame(round), frame(round + 1)]);
        bench.free(burst);
    }
    let stats = bench.rx.counters().read();
    assert_eq!((stats.packets, stats.errors, stats.device_errors), (400, 200, 0));
    assert!(!bench.rx.is_broken());
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn a_port_may_stop_and_start_any_number_of_times() {
    let mut bench = Bench::new(Behaviour::default());
    let counters = bench.device.counters().clone();
    let mut forwarded = 0;
    for round in 0..2000 {
        for number in 0..round % 50 {
            assert!(bench.nic.receive(&frame(number)));
        }
        forwarded += bench.forward();
        let Bench { nic, mut device, rx, tx, mut cache, memory } = bench;
        device.stop_pair(rx, tx, &mut cache).unwrap();
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        bench = Bench { nic, device, rx, tx, cache, memory };
        assert_eq!(counters.read().rx_sum().packets, forwarded as u64, "{round}");
    }
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn rings_of_other_sizes_and_numbers_are_kept_for_later() {
    let features = Behaviour::default().features | feature::MQ;
    let nic = VirtioNet::new(Behaviour { pairs: 2, features, ..Behaviour::default() });
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    for round in 0..2000 {
        nic.behave(|behaviour| behaviour.queue_size = 16 << (round % 3));
        let queues = device.start(&CONFIG.with_pairs(1 + round / 3 % 2), &memory, &mut cache).unwrap();
        device.stop(queues, &mut cache).unwrap();
    }
}

#[test]
fn there_may_be_fewer_queues_to_send_from_than_to_receive_on() {
    let behaviour =
        Behaviour { pairs: 2, features: Behaviour::default().features | feature::MQ, ..Behaviour::default() };
    let nic = VirtioNet::new(behaviour);
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    assert_eq!((device.capabilities().rx_queues, device.capabilities().tx_queues), (2, 2));
    let more_tx = PortConfig { tx_queues: 2, ..CONFIG };
    let error = device.start(&more_tx, &memory, &mut cache).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let more_rx = PortConfig { rx_queues: 2, ..CONFIG };
    let mut queues = device.start(&more_rx, &memory, &mut cache).unwrap();
    assert_eq!((nic.pairs(), queues.rx.len(), queues.tx.len()), (2, 2, 1));
    for (pair, rx) in (0..).zip(&mut queues.rx) {
        assert!(nic.receive_on(pair, &frame(pair.into())));
        let mut burst = Burst::new();
        rx.rx_burst(&mut cache, &mut burst);
        assert_eq!(queues.tx[0].tx_burst(&mut cache, &mut burst), 1);
        assert_eq!(nic.transmitted_on(0), [frame(pair.into())]);
    }
    device.stop(queues, &mut cache).unwrap();
    assert_eq!(nic.faults(), [""; 0]);
}

#[test]
fn each_pair_carries_its_own_frames() {
    let behaviour =
        Behaviour { pairs: 2, features: Behaviour::default().features | feature::MQ, ..Behaviour::default() };
    let nic = VirtioNet::new(behaviour);
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    let error = device.start(&CONFIG.with_pairs(3), &memory, &mut cache).unwrap_err();
    assert!(error.to_string().contains("3 RX queues are requested, but it has 2"), "{error}");
    for pairs in [1, 2, 1, 2] {
        let mut queues = device.start(&CONFIG.with_pairs(pairs), &memory, &mut cache).unwrap();
        assert_eq!((nic.pairs(), queues.rx.len(), queues.tx.len()), (pairs, pairs.into(), pairs.into()));
        for round in 0..200 {
            for (pair, (rx, tx)) in (0..).zip(queues.rx.iter_mut().zip(&mut queues.tx)) {
                let number = 1000 * u32::from(pair) + round;
                assert!(nic.receive_on(pair, &frame(number)));
                let mut burst = Burst::new();
                rx.rx_burst(&mut cache, &mut burst);
                assert_eq!((burst.len(), tx.tx_burst(&mut cache, &mut burst)), (1, 1));
                assert_eq!(nic.transmitted_on(pair), [frame(number)]);
            }
        }
        device.stop(queues, &mut cache).unwrap();
    }
    let counted =
        |number| (device.counters().rx(number).packets.get(), device.counters().tx(number).packets.get());
    assert_eq!([0, 1].map(counted), [(800, 800), (400, 400)]);
    assert_eq!(nic.faults(), [""; 0]);
    let pool = Arc::clone(cache.pool());
    drop(cache);
    assert_eq!(pool.available(), BUFFERS);
}

#[test]
fn a_stop_that_the_device_does_not_confirm_keeps_its_memory() {
    let Bench { nic, mut device, rx, tx, mut cache, memory } = Bench::new(Behaviour::default());
    nic.behave(|behaviour| {
        behaviour.ignore_reset = true;
        behaviour.function_reset = false;
    });
    let error = device.stop_pair(rx, tx, &mut cache).unwrap_err().to_string();
    assert!(error.contains("after 1 s") && error.contains("is kept"), "{error}");
    let weak = Arc::downgrade(&memory);
    drop((device, memory, cache));
    assert!(weak.upgrade().is_some());
}

#[test]
fn a_stop_that_is_confirmed_later_gives_the_buffers_back() {
    let Bench { nic, mut device, rx, tx, mut cache, memory } = Bench::new(Behaviour::default());
    nic.behave(|behaviour| (behaviour.removed, behaviour.function_reset) = (true, false));
    assert_eq!(device.check().unwrap_err().kind(), ErrorKind::Unavailable);
    device.stop_pair(rx, tx, &mut cache).unwrap_err();
    device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err();
    nic.behave(|behaviour| behaviour.removed = false);
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    device.check().unwrap();
    assert_eq!(Bench { nic, device, rx, tx, cache, memory }.stop().0, BUFFERS);
}

#[test]
fn a_stop_that_the_device_ignores_is_done_by_the_function() {
    let Bench { nic, mut device, rx, tx, mut cache, .. } = Bench::new(Behaviour::default());
    nic.behave(|behaviour| behaviour.ignore_reset = true);
    device.stop_pair(rx, tx, &mut cache).unwrap();
    assert!(!nic.is_live());
}

#[test]
fn a_dropped_device_is_reset() {
    let Bench { nic, device, rx, tx, cache, memory } = Bench::new(Behaviour::default());
    drop(device);
    assert!(!nic.is_live());
    let weak = Arc::downgrade(&memory);
    nic.attach(self::memory(1).0.device_view().unwrap());
    drop((rx, tx, cache, memory));
    assert!(weak.upgrade().is_none());
}

#[test]
fn memory_outlives_all_that_a_program_can_drop_while_the_nic_runs() {
    let Bench { nic, device, rx, tx, cache, memory } = Bench::new(Behaviour::default());
    let weak = Arc::downgrade(&memory);
    nic.attach(self::memory(1).0.device_view().unwrap());
    drop((rx, tx, cache, memory));
    assert!(nic.is_live() && weak.upgrade().is_some());
    drop(device);
    assert!(!nic.is_live() && weak.upgrade().is_none());
}

#[test]
fn queues_of_another_device_are_not_stopped() {
    let mut bench = Bench::new(Behaviour::default());
    let other = VirtioNet::at(Bdf::new(0, 0, 4, 0).unwrap(), Behaviour::default());
    let mut device = Device::probe(other.function()).unwrap();
    assert_eq!(device.stop_pair(bench.rx, bench.tx, &mut bench.cache).unwrap_err().kind(), ErrorKind::Usage);
    assert!(bench.nic.is_live());
}

#[test]
fn address_link_and_filter() {
    let mut bench = Bench::new(Behaviour::default());
    assert_eq!(bench.device.mac().to_string(), "52:54:00:12:34:56");
    assert!(bench.device.link().up);
    bench.nic.behave(|behaviour| behaviour.link_up = false);
    assert!(!bench.device.link().up);
    assert!(!bench.nic.is_promiscuous());
    for on in [true, true, false, true] {
        bench.device.set_promiscuous(on).unwrap();
        assert_eq!(bench.nic.is_promiscuous(), on);
    }
    bench.nic.behave(|behaviour| behaviour.removed = true);
    assert!(!bench.device.link().up);
    bench.nic.behave(|behaviour| behaviour.removed = false);

    let bits = feature::MAC | feature::STATUS | feature::CTRL_RX;
    let mut bench = Bench::new(Behaviour { link_up: false, ..without(bits) });
    assert!(bench.device.link().up);
    assert_eq!(bench.device.mac().0[0] & 3, 2, "locally administered, unicast");
    let error = bench.device.set_promiscuous(true).unwrap_err().to_string();
    assert!(error.contains("ctrl_rx=on"), "{error}");
}

#[test]
fn a_fixed_receive_filter_is_the_same_before_and_after_the_start() {
    let nic = VirtioNet::new(without(feature::CTRL_RX));
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    let asked = |device: &mut Device| {
        device.set_promiscuous(false).unwrap();
        let error = device.set_promiscuous(true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("leave out -P"), "{error}");
    };
    asked(&mut device);
    for _ in 0..2 {
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        asked(&mut device);
        device.stop_pair(rx, tx, &mut cache).unwrap();
    }
}

#[test]
fn control_commands_keep_the_rules_of_the_ring() {
    for bits in [0, feature::EVENT_IDX] {
        for mut behaviour in [Behaviour::default(), in_order()] {
            behaviour.features &= !bits;
            let mut bench = Bench::new(behaviour);
            for on in [true, false, true, true, false] {
                bench.device.set_promiscuous(on).unwrap();
                assert_eq!(bench.nic.is_promiscuous(), on);
            }
            assert_eq!((bench.nic.faults(), bench.nic.interrupts()), (vec![], 0));
        }
    }
}

#[test]
fn what_was_asked_before_start_holds_after_it() {
    let nic = VirtioNet::default();
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    device.set_promiscuous(true).unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    assert!(nic.is_promiscuous());
    device.stop_pair(rx, tx, &mut cache).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// For any burst sizes and any pace of the device, every accepted frame is forwarded once and in order,
    /// or dropped by the driver for lack of a descriptor; no buffer is lost.
    #[test]
    fn bursts_of_any_size_conserve_frames(
        steps in prop::collection::vec((0_u32..80, 0..4_u32, any::<bool>()), 1..200),
        features in 0_u64..4,
    ) {
        let bits = ((features & 1) * feature::EVENT_IDX) | ((features >> 1) * feature::MRG_RXBUF);
        let mut bench = Bench::new(without(bits));
        let (mut number, mut forwarded) = (0, VecDeque::new());
        for (arrive, polls, transmit) in steps {
            for _ in 0..arrive {
                bench.nic.receive(&frame(number));
                number += 1;
            }
            for _ in 0..polls {
                let mut burst = bench.receive();
                let frames: Vec<_> = burst.iter().map(|packet| bench.bytes(packet)).collect();
                prop_assert!(frames.len() <= MAX_BURST);
                let sent = bench.tx.tx_burst(&mut bench.cache, &mut burst);
                prop_assert_eq!(sent + burst.len(), frames.len());
                forwarded.extend(frames.into_iter().take(sent));
                bench.free(burst);
            }
            if transmit {
                for sent in bench.nic.transmitted() {
                    prop_assert_eq!(Some(sent), forwarded.pop_front());
                }
                prop_assert!(forwarded.is_empty());
            }
        }
        prop_assert_eq!(bench.nic.interrupts(), 0);
        prop_assert_eq!(bench.stop().0, BUFFERS);
    }
}
