use std::cell::RefCell;
use std::sync::Arc;

use vireo_drivers::counters::QueueStats;
use vireo_drivers::fakedev::e1000::{FakeE1000, ID_82540EM, ID_82574L};
use vireo_drivers::fakedev::igb::{FakeIgb, ID_82576};
use vireo_drivers::fakedev::virtio::{Behaviour, RX, TX, VirtioNet, feature};
use vireo_drivers::port::{MacAddr, Nic, PortConfig, Queues, RxBurst, TxBurst};
use vireo_drivers::table::Port;
use vireo_drivers::{e1000, igb, virtio};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{DATA_ROOM, DmaMemory, Pool};
use vireo_eal::mem::{Backing, Region};

use super::*;
use crate::forward::{AnyLane, Polling, forward_any};

const BUFFERS: u32 = 256;
/// Runs of a lane, and of a test with surprises.
const ROUNDS: u64 = if cfg!(miri) { 2 } else { 8 };
const SEEDS: u64 = if cfg!(miri) { 1 } else { 8 };
const ADDRESSES: [u8; 12] = [2, 0, 0, 0, 0, 9, 0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Hook that treats all packets alike.
#[derive(Clone, Copy)]
pub(crate) struct Same(Uniform);

impl Hook for Same {
    fn process(&mut self, packets: &mut crate::Packets<'_>) {
        if let Uniform::Addresses([a, b, c, d, e, f, g, h, last @ ..]) = self.0 {
            packets.write_each([a, b, c, d, e, f, g, h], last);
        }
    }

    fn uniform(&self) -> Option<Uniform> {
        Some(self.0)
    }
}

/// Reproducible choices.
pub(crate) struct Choices(pub(crate) u64);

impl Choices {
    /// Returns a number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    E1000,
    E1000e,
    Igb,
    Virtio,
    /// Without mergeable buffers.
    Plain,
    InOrder,
}

pub(crate) const KINDS: [Kind; 6] =
    [Kind::E1000, Kind::E1000e, Kind::Igb, Kind::Virtio, Kind::Plain, Kind::InOrder];

#[derive(Clone)]
pub(crate) enum Device {
    E1000(FakeE1000),
    Igb(FakeIgb),
    Virtio(VirtioNet),
}

impl Device {
    fn new(kind: Kind, slot: u8, memory: &Arc<DmaMemory>) -> (Self, Port) {
        let (address, view) = (Bdf::new(0, 0, slot, 0).unwrap(), memory.device_view().unwrap());
        let mac = MacAddr([0x52, 0x54, 0, 0, 0, slot]);
        match kind {
            Kind::E1000 | Kind::E1000e => {
                let id = if kind == Kind::E1000 { ID_82540EM } else { ID_82574L };
                let (function, device) = FakeE1000::new(address, id, mac);
                device.attach(view);
                (Self::E1000(device), e1000::Device::probe(function).unwrap().into())
            }
            Kind::Igb => {
                let (function, device) = FakeIgb::new(address, ID_82576, mac);
                device.attach(view);
                (Self::Igb(device), igb::Device::probe(function).unwrap().into())
            }
            Kind::Virtio | Kind::Plain | Kind::InOrder => {
                let in_order = kind == Kind::InOrder;
                let mut behaviour = Behaviour { one_element: in_order, ..Behaviour::default() };
                behaviour.features |= feature::IN_ORDER;
                let device = VirtioNet::at(address, behaviour);
                device.attach(view);
                let options = virtio::Options { mrg_rxbuf: kind != Kind::Plain, in_order };
                let port = virtio::Device::probe_with(device.function(), options).unwrap();
                (Self::Virtio(device), port.into())
            }
        }
    }

    pub(crate) fn receive(&self, frame: &[u8]) -> bool {
        match self {
            Self::E1000(device) => device.receive(frame),
            Self::Igb(device) => device.receive(frame),
            Self::Virtio(device) => device.receive(frame),
        }
    }

    pub(crate) fn transmitted(&self) -> Vec<Vec<u8>> {
        match self {
            Self::E1000(device) => device.transmitted(),
            Self::Igb(device) => device.transmitted(),
            Self::Virtio(device) => device.transmitted(),
        }
    }

    /// Does something that a tied lane does not expect, and that harms no frame. `number` selects what.
    fn surprise(&self, number: u64) {
        match self {
            // A damaged frame: errors, a length of 0, a length beyond the buffer, a part of a frame and its end.
            // A device that has no descriptor left drops frames, also damaged ones.
            Self::E1000(device) if device.armed() < 2 => {}
            Self::Igb(device) if device.armed() < 1 => {}
            Self::E1000(device) => match number % 4 {
                0 => device.receive_raw(3 << 32 | 60 | 1 << 40),
                1 => device.receive_raw(3 << 32),
                2 => device.receive_raw(3 << 32 | (DATA_ROOM as u64 + 1)),
                _ => [1, 3].iter().for_each(|end| device.receive_raw(end << 32 | 60)),
            },
            Self::Igb(device) => match number % 2 {
                0 => device.receive_raw(3),
                _ => device.receive_raw(3 | (DATA_ROOM as u64 + 1) << 32),
            },
            Self::Virtio(device) => device.behave(|behaviour| {
                if !behaviour.one_element {
                    behaviour.out_of_order ^= true;
                }
            }),
        }
    }
}

fn memory() -> (Arc<DmaMemory>, Arc<Pool>) {
    let region = Region::new(Pool::bytes(BUFFERS) + (128 << 10), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    let pool = Pool::new(&memory, BUFFERS).unwrap();
    (memory, pool)
}

/// Two ports, and one lane from the first to the second.
pub(crate) struct Bench {
    pub(crate) devices: [Device; 2],
    ports: [Port; 2],
    pub(crate) lane: Option<AnyLane<Same>>,
    /// The queues that the lane does not use.
    rest: Option<(vireo_drivers::table::TxQueue, vireo_drivers::table::RxQueue)>,
    pub(crate) pool: Arc<Pool>,
}

impl Bench {
    pub(crate) fn new(kinds: [Kind; 2], sizes: [u16; 2], uniform: Uniform) -> Self {
        let (memory, pool) = memory();
        let (from, mut from_port) = Device::new(kinds[0], 3, &memory);
        let (to, mut to_port) = Device::new(kinds[1], 4, &memory);
        let mut cache = pool.cache();
        let mut start = |port: &mut Port, size| {
            let config = PortConfig::with_descriptors(size, size).with_rx_interrupts(true);
            port.start(&config, &memory, &mut cache).unwrap().into_pair().unwrap()
        };
        let ((rx, rest_tx), (rest_rx, tx)) = (start(&mut from_port, sizes[0]), start(&mut to_port, sizes[1]));
        let lane = Lane { rx, from: 0, tx, to: 1, hook: Same(uniform) };
        let (devices, ports) = ([from, to], [from_port, to_port]);
        Self { devices, ports, lane: Some(lane), rest: Some((rest_tx, rest_rx)), pool }
    }

    /// Runs the lane until `tick`, which is called after each poll, returns false.
    fn run(&mut self, mut tick: impl FnMut(&[Device; 2]) -> bool) {
        let (mut cache, stop) = (self.pool.cache(), StopFlag::new());
        let lanes = self.lane.take().into_iter().collect();
        let mut lanes = forward_any(lanes, &mut cache, Polling::default(), &stop, || {
            if !tick(&self.devices) {
                stop.set();
            }
        });
        self.lane = lanes.pop();
    }

    fn stats(&self) -> (QueueStats, QueueStats) {
        let lane = self.lane.as_ref().unwrap();
        (lane.rx.counters().read(), lane.tx.counters().read())
    }

    /// Stops both ports, and checks that every buffer came back.
    pub(crate) fn stop(mut self) {
        let (lane, (tx, rx)) = (self.lane.take().unwrap(), self.rest.take().unwrap());
        let mut cache = self.pool.cache();
        let [from, to] = &mut self.ports;
        from.stop(Queues::pair(lane.rx, tx), &mut cache).unwrap();
        to.stop(Queues::pair(rx, lane.tx), &mut cache).unwrap();
        drop(cache);
        assert_eq!(self.pool.available(), BUFFERS);
    }
}

pub(crate) fn frame(number: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| number.to_le_bytes().get(i.wrapping_sub(12)).map_or((number + i) as u8, |byte| *byte))
        .collect()
}

/// What `frame` becomes on its way.
fn sent(mut frame: Vec<u8>, uniform: Uniform) -> Vec<u8> {
    if let Uniform::Addresses(addresses) = uniform {
        frame[..12].copy_from_slice(&addresses);
    }
    frame
}

/// Sends frames of many sizes, in bursts of many sizes, with `surprises` in between. Each frame must arrive once.
fn traffic(kinds: [Kind; 2], uniform: Uniform, surprises: bool, seed: u64) -> QueueStats {
    let mut bench = Bench::new(kinds, [64, 64], uniform);
    let mut choices = Choices(seed);
    let (mut expected, seen) = (Vec::new(), RefCell::new(Vec::new()));
    for round in 0..ROUNDS {
        let mut polls = 30;
        bench.run(|[from, to]| {
            seen.borrow_mut().extend(to.transmitted());
            polls -= 1;
            for _ in 0..if polls < 6 { 0 } else { [0, 1, 1, 5, 31, 40][choices.below(6) as usize] } {
                let frame = frame(expected.len(), 60 + choices.below(1400) as usize);
                if from.receive(&frame) {
                    expected.push(sent(frame, uniform));
                }
            }
            if surprises && polls > 6 && choices.below(20) == 0 {
                from.surprise(choices.below(100));
                if choices.below(2) == 0 && matches!(to, Device::Virtio(_)) {
                    to.surprise(0);
                }
            }
            polls > 0
        });
        seen.borrow_mut().extend(bench.devices[1].transmitted());
        assert_eq!(seen.borrow().len(), expected.len(), "{kinds:?}, round {round}");
    }
    let (rx, tx) = bench.stats();
    let bytes: usize = expected.iter().map(Vec::len).sum();
    for stats in [rx, tx] {
        assert_eq!((stats.packets, stats.bytes), (expected.len() as u64, bytes as u64), "{kinds:?}");
    }
    let mut seen = seen.into_inner();
    if surprises {
        seen.sort();
        expected.sort();
    }
    assert!(seen == expected, "{kinds:?}: a frame was changed, or left out of order");
    assert_eq!((tx.dropped, tx.errors, tx.device_errors), (0, 0, 0), "{kinds:?}");
    bench.stop();
    rx
}

#[test]
fn what_is_expected_passes_tied_lanes_between_all_drivers() {
    for from in KINDS {
        for to in KINDS {
            for uniform in [Uniform::Addresses(ADDRESSES), Uniform::Unchanged] {
                let rx = traffic([from, to], uniform, false, 0x1234_5678);
                // Lanes between igb and other drivers share the version for all drivers.
                let can_tie = (from == Kind::Igb) == (to == Kind::Igb);
                assert_eq!((rx.tied > 0, rx.errors, rx.device_errors), (can_tie, 0, 0), "{from:?}, {to:?}");
            }
        }
    }
}

#[test]
fn what_is_not_expected_unties_a_lane_and_harms_no_frame() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        let mut sum = (0, 0);
        for seed in 1..=SEEDS {
            let rx = traffic([kind; 2], Uniform::Addresses(ADDRESSES), true, seed * 77 + i as u64);
            sum = (sum.0 + rx.tied, sum.1 + rx.untied);
        }
        // Each round ties the lane, and each surprise unties it until it is tied again.
        let (tied, untied) = (sum.0 - SEEDS * ROUNDS, sum.1);
        assert!(kind == Kind::InOrder || tied > 5 && untied > 10, "{kind:?}: {sum:?}");
    }
}

#[test]
fn lanes_that_do_not_fit_are_not_tied() {
    for (sizes, kinds) in [([64, 128], [Kind::E1000; 2]), ([128, 64], [Kind::Virtio; 2])] {
        let mut bench = Bench::new(kinds, sizes, Uniform::Unchanged);
        let mut polls = 0;
        bench.run(|[from, to]| {
            drop(to.transmitted());
            polls += 1;
            if polls <= 100 {
                assert!(from.receive(&frame(polls, 60)));
            }
            polls < 110
        });
        let (rx, tx) = bench.stats();
        assert_eq!((rx.tied, rx.packets, tx.packets), (0, 100, 100), "{kinds:?}");
        bench.stop();
    }
}

/// Lets devices tell any lie, and checks that nothing leaves that was not good before the first lie, and that
/// every buffer comes back.
fn lies(kind: Kind, seed: u64) -> bool {
    let mut bench = Bench::new([kind; 2], [64, 64], Uniform::Addresses(ADDRESSES));
    let (mut choices, mut good, mut seen) = (Choices(seed), 0, 0);
    let (mut lied, mut polls) = (false, 5 + choices.below(40));
    bench.run(|[from, to]| {
        let frames = to.transmitted();
        seen += if lied { 0 } else { frames.len() };
        assert!(frames.iter().all(|frame| frame.len() <= DATA_ROOM), "{kind:?}, seed {seed}");
        for _ in 0..choices.below(40) {
            if choices.below(60) > 0 {
                good += usize::from(from.receive(&frame(good, 60)) && !lied);
                continue;
            }
            lied = true;
            let (word, few) = (choices.below(u64::MAX), choices.below(70) as u32);
            let (len, jump) =
                ([0, 11, 12, 72, 12 + DATA_ROOM as u32, u32::MAX][few as usize % 6], word as u16);
            match (from, to) {
                (Device::Virtio(device), _) if few.is_multiple_of(2) => match few % 5 {
                    0 => device.push_used(RX, few, len),
                    1 => device.push_used(RX, word as u32, 72),
                    2 => device.jump_used(RX, if few > 35 { jump } else { few as u16 }),
                    3 => device.behave(|behaviour| behaviour.num_buffers = Some(jump)),
                    _ => device.behave(|behaviour| behaviour.num_buffers = Some(0)),
                },
                (_, Device::Virtio(device)) => match few % 3 {
                    0 => device.push_used(TX, few, 0),
                    1 => device.push_used(TX, word as u32, 0),
                    _ => device.jump_used(TX, if few > 35 { jump } else { few as u16 }),
                },
                (Device::E1000(device), _) => {
                    device.receive_raw_ahead(few, word | if few % 3 > 0 { 3 << 32 } else { 0 })
                }
                (Device::Igb(device), _) => {
                    device.receive_raw_ahead(few, word | if few % 3 > 0 { 3 } else { 0 })
                }
                _ => {}
            }
        }
        polls -= 1;
        polls > 0
    });
    assert!(seen <= good, "{kind:?}, seed {seed}: {seen} frames left, {good} were good");
    bench.stop();
    lied
}

/// Runs 60 times for each kind of device, or as often as `VIREO_LIES` says.
#[test]
fn devices_that_lie_to_tied_lanes_harm_nobody() {
    let runs = std::env::var("VIREO_LIES").ok().and_then(|runs| runs.parse().ok());
    let runs = runs.unwrap_or(if cfg!(miri) { 2 } else { 60 });
    for kind in KINDS {
        let lied = (1..=runs).filter(|seed| lies(kind, seed * 0x9e37_79b9)).count() as u64;
        assert!(lied * 10 > runs * 8 || cfg!(miri), "{kind:?}: {lied}");
    }
}

/// A TX device that stalls leaves the RX queue without buffers, which is counted, and the lane goes on later.
#[test]
fn a_stalled_sender_is_counted_as_starvation() {
    for kind in KINDS {
        let mut bench = Bench::new([kind; 2], [64, 64], Uniform::Addresses(ADDRESSES));
        let (mut number, mut received, mut left, mut polls) = (0, 0, 0, 0);
        bench.run(|[from, to]| {
            polls += 1;
            for _ in 0..if polls < 40 { 8 } else { 0 } {
                received += usize::from(from.receive(&frame(number, 60)));
                number += 1;
            }
            if polls > 50 {
                left += to.transmitted().len();
            }
            polls < 60
        });
        left += bench.devices[1].transmitted().len();
        let (rx, tx) = bench.stats();
        assert_eq!(
            (left, rx.packets, tx.packets, tx.dropped),
            (received, received as u64, received as u64, 0)
        );
        assert!(rx.starved > 0 && received < 130, "{kind:?}: {} and {received}", rx.starved);
        bench.stop();
    }
}

/// A device that has used up its buffers gets those that came back since, however few they are. Intel's NICs report
/// 32 at a time, which are enough in any case.
#[test]
fn a_device_without_buffers_gets_the_few_that_came_back() {
    for kind in [Kind::Virtio, Kind::Plain, Kind::InOrder] {
        let mut bench = Bench::new([kind; 2], [64, 64], Uniform::Addresses(ADDRESSES));
        let (mut number, mut polls, mut left) = (0, 0, 0);
        bench.run(|[from, to]| {
            polls += 1;
            let mut receive = || {
                number += 1;
                from.receive(&frame(number, 60))
            };
            match polls {
                1 => assert!((0..8).all(|_| receive())),
                10 => {
                    left += to.transmitted().len();
                    while receive() {}
                    number -= 1;
                }
                20 => assert!(receive(), "{kind:?}: 8 frames were sent, and no buffer was offered"),
                30.. => left += to.transmitted().len(),
                _ => {}
            }
            polls < 40
        });
        left += bench.devices[1].transmitted().len();
        assert_eq!((left, bench.stats().0.packets), (number, number as u64), "{kind:?}");
        bench.stop();
    }
}
