//! Tests of frames of several buffers.

use std::collections::VecDeque;

use proptest::prelude::*;
use vireo_eal::ErrorKind;
use vireo_eal::dma::{Burst, DATA_ROOM, MAX_BURST, MAX_FRAME, MAX_SEGMENTS, first_frame};

use super::super::{Device, Options};
use super::{BUFFERS, Bench, CONFIG, in_order, memory, without};
use crate::fakedev::virtio::{Behaviour, TX, VirtioNet, feature};
use crate::frames::tests::{append, frame, take};
use crate::port::{Nic, PortConfig, RxBurst, STANDARD_FRAME, TxBurst};

const LONG: PortConfig = CONFIG.with_max_frame(MAX_FRAME);

fn long(behaviour: Behaviour) -> Behaviour {
    Behaviour { features: behaviour.features | feature::INDIRECT_DESC, ..behaviour }
}

/// Starts a port for the longest frames.
fn bench(behaviour: Behaviour) -> Bench {
    Bench::started(behaviour, Options::default(), BUFFERS, &LONG)
}

/// Sends frames in segments of `each` bytes; returns the number of frames that were not sent.
fn send(bench: &mut Bench, frames: &[Vec<u8>], each: usize) -> usize {
    let mut burst = Burst::new();
    frames.iter().for_each(|frame| append(&mut burst, &mut bench.cache, frame, each));
    let before = burst.len();
    let sent = bench.tx.tx_burst(&mut bench.cache, &mut burst);
    assert_eq!(sent, before - burst.len());
    take(&mut burst, &mut bench.cache).len()
}

#[test]
fn long_frames_pass_between_short_ones() {
    let with = |change: fn(&mut Behaviour)| {
        let mut behaviour = long(Behaviour::default());
        change(&mut behaviour);
        behaviour
    };
    for behaviour in [
        with(|_| ()),
        with(|behaviour| behaviour.out_of_order = true),
        with(|behaviour| behaviour.features |= feature::IN_ORDER),
        with(|behaviour| behaviour.features &= !feature::EVENT_IDX),
    ] {
        let mut bench = bench(behaviour.clone());
        let lens = [60, 9000, DATA_ROOM, DATA_ROOM + 1, MAX_FRAME, 61, 1514, 5000];
        let (mut bytes, mut count) = (0, 0);
        for round in 0..400 {
            let mut frames: Vec<_> =
                (0..round % 5 + 1).map(|i| frame(round + i, lens[(round + i) % 8])).collect();
            // A device that uses the newest buffer first may find none: older buffers hold back those behind
            // them.
            frames.retain(|frame| bench.nic.receive(frame));
            assert!(frames.len() == round % 5 + 1 || behaviour.out_of_order, "{round}");
            bytes += frames.iter().map(Vec::len).sum::<usize>();
            count += frames.len() as u64;
            let mut received = 0;
            while received < frames.len() {
                let mut burst = Burst::new();
                bench.rx.rx_burst(&mut bench.cache, &mut burst);
                assert!(!burst.is_empty(), "{received} of {}", frames.len());
                received += vireo_eal::dma::frames(&burst).count();
                bench.tx.tx_burst(&mut bench.cache, &mut burst);
                assert!(burst.is_empty());
            }
            assert_eq!(bench.nic.transmitted(), frames);
        }
        assert!(count > 600, "{count}");
        let (rx, tx) = (bench.rx.counters().read(), bench.tx.counters().read());
        assert_eq!((rx.packets, tx.packets, rx.bytes, tx.bytes), (count, count, bytes as u64, bytes as u64));
        assert_eq!((rx.errors, rx.device_errors, tx.errors, tx.device_errors), (0, 0, 0, 0));
        assert_eq!(bench.stop().0, BUFFERS);
    }
}

/// One element may cover all buffers of a frame, and those of other frames.
#[test]
fn one_element_may_stand_for_the_buffers_of_a_frame() {
    let mut bench = bench(long(in_order()));
    for round in 0..200 {
        // Buffers before the last are full.
        let frames = [frame(round, DATA_ROOM), frame(round, 2 * DATA_ROOM + 12), frame(round, 5000)];
        assert!(bench.nic.receive_together(&frames[..1 + round % 3]));
        let mut burst = Burst::new();
        bench.rx.rx_burst(&mut bench.cache, &mut burst);
        assert_eq!(take(&mut burst, &mut bench.cache), frames[..1 + round % 3]);
    }
    assert_eq!(bench.rx.counters().read().device_errors, 0);
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn a_frame_waits_for_a_burst_with_room_for_it() {
    let mut bench = bench(long(Behaviour::default()));
    let mut burst: Burst =
        (0..MAX_BURST - MAX_SEGMENTS + 1).map(|_| bench.cache.allocate().unwrap()).collect();
    assert!(bench.nic.receive(&frame(1, 9000)));
    bench.rx.rx_burst(&mut bench.cache, &mut burst);
    assert_eq!(burst.len(), MAX_BURST - MAX_SEGMENTS + 1);
    bench.cache.free(burst.pop().unwrap());
    bench.rx.rx_burst(&mut bench.cache, &mut burst);
    let mut rest: Burst = burst.drain(MAX_BURST - MAX_SEGMENTS..).collect();
    assert_eq!((first_frame(&rest), take(&mut rest, &mut bench.cache)), (5, vec![frame(1, 9000)]));
    bench.free(burst);
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn segments_of_any_size_are_sent_and_too_long_frames_dropped() {
    let mut bench = bench(long(Behaviour::default()));
    for each in [1024, DATA_ROOM] {
        let frames = [frame(1, MAX_FRAME), frame(2, 60), frame(3, 2 * each)];
        assert_eq!(send(&mut bench, &frames, each), 0);
        assert_eq!(bench.nic.transmitted(), frames);
    }
    let frames = [frame(1, MAX_FRAME + 1), frame(2, 700), frame(3, 110)];
    assert_eq!(send(&mut bench, &frames[..1], DATA_ROOM), 0);
    assert_eq!((send(&mut bench, &frames[1..2], 70), send(&mut bench, &frames[2..], 10)), (0, 0));
    assert_eq!(bench.nic.transmitted(), frames[1..2], "ten segments are the most");
    assert_eq!((bench.tx.counters().read().packets, bench.tx.counters().read().errors), (7, 2));
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn a_full_ring_keeps_whole_frames() {
    let mut bench = bench(long(Behaviour::default()));
    let frames: Vec<_> = (0..25).map(|number| frame(number, 4000)).collect();
    for three in frames[..21].chunks(3) {
        assert_eq!(send(&mut bench, three, DATA_ROOM), 0);
    }
    // 63 of 64 descriptors are in use.
    assert_eq!(send(&mut bench, &frames[21..23], DATA_ROOM), 2);
    assert_eq!(send(&mut bench, &[frame(0, 60), frame(1, 60)], DATA_ROOM), 1);
    assert_eq!(bench.nic.transmitted(), [&frames[..21], &[frame(0, 60)]].concat());
    assert_eq!(send(&mut bench, &frames[21..25], DATA_ROOM), 0);
    assert_eq!(bench.nic.transmitted(), frames[21..25]);
    assert_eq!(bench.stop().0, BUFFERS);
}

/// The device still holds segments at the stop, and the tables are reused by the next start.
#[test]
fn a_stop_gives_all_segments_back() {
    let Bench { nic, mut device, rx, tx, cache, memory } = bench(long(Behaviour::default()));
    let mut queues = (rx, tx);
    let mut cache = cache;
    for round in 0..200 {
        let (rx, tx) = queues;
        let mut bench = Bench { nic: nic.clone(), device, rx, tx, cache, memory: memory.clone() };
        assert_eq!(
            send(&mut bench, &[frame(round, 9000), frame(round, 60), frame(round, 3000)], DATA_ROOM),
            0
        );
        assert!(bench.nic.receive(&frame(round, 9000)));
        Bench { device, cache, .. } = bench;
        device.stop_pair(bench.rx, bench.tx, &mut cache).unwrap();
        // Every other start is for short frames only.
        queues = if round % 2 == 0 {
            device.start_pair(&CONFIG, &memory, &mut cache).unwrap()
        } else {
            device.start_pair(&LONG, &memory, &mut cache).unwrap()
        };
        if round % 2 == 0 {
            device.stop_pair(queues.0, queues.1, &mut cache).unwrap();
            queues = device.start_pair(&LONG, &memory, &mut cache).unwrap();
        }
    }
    let (rx, tx) = queues;
    assert_eq!(Bench { nic, device, rx, tx, cache, memory }.stop().0, BUFFERS);
}

#[test]
fn a_port_for_short_frames_drops_long_ones() {
    let mut bench = Bench::new(long(Behaviour::default()));
    assert!(bench.nic.receive(&frame(0, 60)) && bench.nic.receive(&frame(1, 5000)));
    assert!(bench.nic.receive(&frame(2, 60)));
    let mut burst = bench.receive();
    assert_eq!(take(&mut burst, &mut bench.cache), [frame(0, 60), frame(2, 60)]);
    assert_eq!((bench.rx.counters().read().errors, bench.rx.counters().read().device_errors), (1, 0));
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn the_shortest_ring_for_long_frames_never_wedges() {
    let nic = VirtioNet::new(long(Behaviour::default()));
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    for (rx, tx) in [(16, 64), (64, 16)] {
        let config = PortConfig { rx_descriptors: rx, tx_descriptors: tx, ..LONG };
        assert_eq!(device.start(&config, &memory, &mut cache).unwrap_err().kind(), ErrorKind::Usage);
    }
    let config = PortConfig { rx_descriptors: 32, tx_descriptors: 32, ..LONG };
    let (rx, tx) = device.start_pair(&config, &memory, &mut cache).unwrap();
    let mut bench = Bench { nic, device, rx, tx, cache, memory };
    for number in 0..200 {
        let frames = [frame(number, [60, 1024 * 7, 1024 * MAX_SEGMENTS - 600][number % 3])];
        assert_eq!(send(&mut bench, &frames, 1024), 0, "{number}");
        assert_eq!(bench.nic.transmitted(), frames);
    }
    bench.stop();
}

#[test]
fn a_device_says_how_long_its_frames_may_be() {
    let limit = |behaviour: Behaviour| {
        let nic = VirtioNet::new(behaviour);
        Device::probe(nic.function()).unwrap().capabilities().max_frame
    };
    assert_eq!(limit(long(Behaviour::default())), MAX_FRAME);
    assert_eq!(limit(long(without(feature::MRG_RXBUF))), STANDARD_FRAME);
    assert_eq!(limit(Behaviour::default()), STANDARD_FRAME);
    let mut behaviour = long(Behaviour::default());
    behaviour.features |= feature::MTU;
    for (mtu, longest) in [(0, STANDARD_FRAME), (1500, STANDARD_FRAME), (4000, 4014), (u16::MAX, MAX_FRAME)] {
        assert_eq!(limit(Behaviour { mtu, ..behaviour.clone() }), longest);
    }
    for behaviour in [long(without(feature::MRG_RXBUF)), Behaviour { mtu: 8985, ..behaviour }] {
        let nic = VirtioNet::new(behaviour);
        let (memory, mut cache) = memory(BUFFERS);
        nic.attach(memory.device_view().unwrap());
        let mut device = Device::probe(nic.function()).unwrap();
        let error = device.start_pair(&LONG.with_max_frame(9000), &memory, &mut cache).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("host_mtu"), "{error}");
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        device.stop_pair(rx, tx, &mut cache).unwrap();
    }
}

/// Either `num_buffers` is 0 or exceeds the buffers used, a frame is longer than agreed, or a buffer is not
/// one of the queue's.
#[test]
fn lies_about_long_frames_stop_the_queue_and_lose_no_buffer() {
    type Violation = fn(&VirtioNet);
    let lies: [(&str, Violation); 4] = [
        ("num_buffers 0", |nic| {
            nic.behave(|behaviour| behaviour.num_buffers = Some(0));
            nic.receive(&frame(1, 5000));
        }),
        ("num_buffers above what came", |nic| {
            nic.behave(|behaviour| behaviour.num_buffers = Some(4));
            nic.receive(&frame(1, 5000));
        }),
        ("the second buffer is none that it has", |nic| {
            nic.behave(|behaviour| behaviour.num_buffers = Some(2));
            nic.receive(&frame(1, 60));
            nic.push_used(0, 0, 100);
        }),
        ("the second buffer has no length", |nic| {
            nic.behave(|behaviour| behaviour.num_buffers = Some(2));
            nic.receive(&frame(1, 60));
            nic.push_used(0, 2, 0);
        }),
    ];
    for (what, violation) in lies {
        let mut bench = bench(long(Behaviour::default()));
        assert!(bench.nic.receive(&frame(0, 60)));
        let mut burst = bench.receive();
        assert_eq!(take(&mut burst, &mut bench.cache).len(), 1);
        violation(&bench.nic);
        assert!(bench.receive().is_empty(), "{what}");
        assert_eq!((bench.rx.counters().read().device_errors, bench.rx.is_broken()), (1, true), "{what}");
        assert_eq!(send(&mut bench, &[frame(3, 3000)], DATA_ROOM), 0);
        assert_eq!(bench.nic.transmitted(), [frame(3, 3000)], "{what}");
        assert_eq!(bench.stop().0, BUFFERS, "{what}");
    }
}

#[test]
fn frames_that_are_longer_than_agreed_are_dropped() {
    let mut bench = bench(long(Behaviour::default()));
    for len in [MAX_FRAME + 1, 20_000] {
        assert!(bench.nic.receive(&frame(1, len)) && bench.nic.receive(&frame(2, 61)));
        let mut burst = bench.receive();
        assert_eq!(take(&mut burst, &mut bench.cache), [frame(2, 61)]);
    }
    assert_eq!((bench.rx.counters().read().errors, bench.rx.is_broken()), (2, false));
    assert_eq!(bench.stop().0, BUFFERS);
}

#[test]
fn a_lie_about_a_sent_frame_keeps_its_segments_until_the_stop() {
    let mut bench = bench(long(Behaviour::default()));
    assert_eq!(send(&mut bench, &[frame(1, 9000), frame(2, 9000), frame(3, 60)], DATA_ROOM), 0);
    let free = bench.cache.len();
    // The second frame is completed first, so its descriptor returns after the first one's. Then it is
    // completed twice.
    bench.nic.push_used(TX, 1, 0);
    assert_eq!(bench.send([]), 0);
    bench.nic.push_used(TX, 1, 0);
    assert_eq!(bench.send([]), 0);
    assert!(bench.tx.is_broken() && bench.cache.len() <= free + 1);
    assert_eq!(bench.stop().0, BUFFERS);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// As for short frames, every frame is forwarded once, whole and in order, or dropped by the driver; no
    /// buffer is lost.
    #[test]
    fn bursts_of_any_lengths_conserve_frames(
        steps in prop::collection::vec((prop::collection::vec(60..MAX_FRAME, 0..12), 0..4_u32, any::<bool>()), 1..100),
        quirks in 0..3,
    ) {
        let mut behaviour = long(Behaviour::default());
        behaviour.features |= if quirks == 1 { feature::IN_ORDER } else { 0 };
        // The device uses the newest buffer first; the order of the frames is preserved.
        behaviour.out_of_order = quirks == 2;
        let mut bench = bench(behaviour);
        let (mut number, mut forwarded) = (0, VecDeque::new());
        for (lens, polls, transmit) in steps {
            for len in lens {
                bench.nic.receive(&frame(number, len));
                number += 1;
            }
            for _ in 0..polls {
                let mut burst = Burst::new();
                bench.rx.rx_burst(&mut bench.cache, &mut burst);
                let frames: Vec<Vec<u8>> = vireo_eal::dma::frames(&burst)
                    .map(|frame| frame.iter().flat_map(|packet| bench.bytes(packet)).collect())
                    .collect();
                bench.tx.tx_burst(&mut bench.cache, &mut burst);
                let left = take(&mut burst, &mut bench.cache).len();
                forwarded.extend(frames.iter().take(frames.len() - left).cloned());
            }
            if transmit {
                for sent in bench.nic.transmitted() {
                    prop_assert_eq!(Some(sent), forwarded.pop_front());
                }
                prop_assert!(forwarded.is_empty());
            }
        }
        prop_assert_eq!((bench.rx.counters().read().device_errors, bench.rx.counters().read().errors), (0, 0));
        prop_assert_eq!(bench.stop().0, BUFFERS);
    }
}
