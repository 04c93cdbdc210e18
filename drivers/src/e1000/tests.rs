//! The driver against the in-process device: what a good device does, and each lie.

use std::collections::VecDeque;

use proptest::prelude::*;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DATA_ROOM, MAX_BURST, Packet, Pool};
use vireo_eal::mem::{Backing, Region};

use super::*;
use crate::fakedev::e1000::{FakeE1000, Faults, ID_82540EM};
use crate::port::{QueueStats, RxBurst, TxBurst};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const SIZES: QueueSizes = QueueSizes { rx: 64, tx: 64 };

/// A started port with its device, and one lcore's pool cache.
struct Rig {
    device: FakeE1000,
    port: Device,
    queues: Option<(RxQueue, TxQueue)>,
    memory: Arc<DmaMemory>,
    pool: Arc<Pool>,
    cache: PoolCache,
}

fn address() -> Bdf {
    Bdf::new(0, 0, 3, 0).unwrap()
}

fn memory(buffers: u32) -> (Arc<DmaMemory>, Arc<Pool>) {
    let bytes = Pool::bytes(buffers) + (64 << 10);
    let memory = DmaMemory::map(Region::new(bytes, Backing::SmallPages).unwrap(), &[]).unwrap();
    let pool = Pool::new(&memory, buffers).unwrap();
    (memory, pool)
}

impl Rig {
    fn new(id: DeviceId, sizes: QueueSizes, buffers: u32) -> Self {
        let (function, device) = FakeE1000::new(address(), id, MAC);
        let (memory, pool) = memory(buffers);
        device.attach(memory.device_view());
        let mut cache = pool.cache();
        let mut port = Device::probe(function).unwrap();
        let queues = Some(port.start(&memory, &mut cache, sizes).unwrap());
        Self { device, port, queues, memory, pool, cache }
    }

    fn standard() -> Self {
        Self::new(ID_82574L, SIZES, 512)
    }

    /// Frames of one poll.
    /// The second time for what is behind the end of the ring.
    fn receive(&mut self, burst: &mut Burst) {
        let (rx, _) = self.queues.as_mut().unwrap();
        rx.rx_burst(&mut self.cache, burst);
        rx.rx_burst(&mut self.cache, burst);
    }

    fn poll(&mut self) -> Vec<Vec<u8>> {
        let mut burst = Burst::new();
        self.receive(&mut burst);
        burst.drain(..).map(|packet| self.take(packet)).collect()
    }

    fn take(&mut self, packet: Packet) -> Vec<u8> {
        let mut bytes = vec![0; packet.len()];
        self.cache.read(&packet, 0, &mut bytes);
        self.cache.free(packet.into_buffer());
        bytes
    }

    fn send(&mut self, frames: &[Vec<u8>]) -> usize {
        let mut burst: Burst = frames
            .iter()
            .map(|frame| {
                let mut packet = Packet::new(self.cache.allocate().unwrap(), frame.len());
                self.cache.write(&mut packet, 0, frame);
                packet
            })
            .collect();
        let sent = self.queues.as_mut().unwrap().1.tx_burst(&mut self.cache, &mut burst);
        assert_eq!(burst.len(), frames.len() - sent);
        burst.drain(..).for_each(|packet| self.cache.free(packet.into_buffer()));
        sent
    }

    fn rx_stats(&self) -> QueueStats {
        self.queues.as_ref().unwrap().0.stats()
    }

    /// Stops the port; every buffer must be in the pool again.
    fn stop(mut self) {
        let (rx, tx) = self.queues.take().unwrap();
        self.port.stop(rx, tx, &mut self.cache).unwrap();
        drop(self.cache);
        assert_eq!(self.pool.free(), self.pool.count());
        assert!(!self.device.config().bus_master());
    }
}

/// A frame that is not like its neighbours.
fn frame(number: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; 60 + number % 1400];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    bytes
}

fn frames(numbers: std::ops::Range<usize>) -> Vec<Vec<u8>> {
    numbers.map(frame).collect()
}

#[test]
fn packets_pass_in_order_over_many_turns_of_the_rings() {
    for id in [ID_82540EM, ID_82574L] {
        let mut rig = Rig::new(id, QueueSizes { rx: 128, tx: 64 }, 512);
        for round in 0..1000 {
            let wanted = frames(round * 31..round * 31 + 31);
            assert!(wanted.iter().all(|frame| rig.device.receive(frame)));
            let got = rig.poll();
            assert_eq!(got, wanted);
            assert_eq!(rig.send(&got), 31);
            assert_eq!(rig.device.transmitted(), wanted);
        }
        let bytes: u64 = frames(0..31_000).iter().map(|frame| frame.len() as u64).sum();
        let (rx, tx) = rig.queues.as_ref().map(|(rx, tx)| (rx.stats(), tx.stats())).unwrap();
        assert_eq!((rx.packets, rx.bytes, rx.errors, rx.device_errors), (31_000, bytes, 0, 0));
        assert_eq!((tx.packets, tx.bytes, tx.doorbells), (31_000, bytes, 1000));
        rig.stop();
    }
}

#[test]
fn short_frames_are_padded_where_the_chip_does_not_do_it_well() {
    for (id, padded) in [(ID_82540EM, 60), (ID_82574L, 17)] {
        let mut rig = Rig::new(id, SIZES, 512);
        for number in 0..200 {
            // What was in the buffers before must not leave.
            assert!(rig.device.receive(&[0xEE; 60]));
            let mut burst = Burst::new();
            rig.receive(&mut burst);
            let packet = burst.pop().unwrap();
            assert!(burst.is_empty());
            let mut packet = Packet::new(packet.into_buffer(), 17);
            rig.cache.write(&mut packet, 0, &[number; 17]);
            burst.push(packet);
            let (_, tx) = rig.queues.as_mut().unwrap();
            assert_eq!(tx.tx_burst(&mut rig.cache, &mut burst), 1);
            let mut wanted = vec![number; 17];
            wanted.resize(padded, 0);
            assert_eq!(rig.device.transmitted(), [wanted]);
        }
        rig.stop();
    }
}

#[test]
fn the_receive_doorbell_rings_once_for_32_packets() {
    let mut rig = Rig::standard();
    assert_eq!((rig.device.register(RDT), rig.device.armed()), (63, 63));
    for number in 0..320 {
        assert!(rig.device.receive(&frame(number)));
        assert_eq!(rig.poll().len(), 1);
    }
    // One of them arms the ring at the start.
    assert_eq!(rig.rx_stats().doorbells, 1 + 10);
    let before = rig.rx_stats();
    assert!(rig.poll().is_empty());
    assert_eq!(rig.rx_stats(), before);
    rig.stop();
}

#[test]
fn a_full_receive_ring_makes_the_device_drop() {
    let mut rig = Rig::standard();
    let taken = (0..100).filter(|number| rig.device.receive(&frame(*number))).count();
    assert_eq!(taken, 63);
    assert_eq!(rig.port.device_drops()[0], ("rx_missed_errors", 37));
    assert_eq!(rig.port.device_drops()[0].1, 37, "the register clears itself, the sum stays");
    assert_eq!([rig.poll().len(), rig.poll().len(), rig.poll().len()], [32, 31, 0]);
    assert!(rig.device.receive(&frame(0)));
    rig.stop();
}

#[test]
fn a_full_transmit_ring_takes_what_fits() {
    let mut rig = Rig::standard();
    assert_eq!([0, 32, 64].map(|start| rig.send(&frames(start..start + 32))), [32, 31, 0]);
    assert_eq!(rig.device.transmitted(), frames(0..63));
    // Descriptors 0 to 31 are known to be done; 32 to 62 wait for the report of 63.
    assert_eq!(rig.send(&frames(63..95)), 32);
    assert_eq!(rig.device.transmitted(), frames(63..95));
    rig.stop();
}

#[test]
fn a_device_that_never_completes_tx_gets_one_ring_full() {
    let mut rig = Rig::standard();
    rig.device.set_faults(Faults { never_done: true, ..Faults::default() });
    let sent: usize = (0..10).map(|round| rig.send(&frames(round * 20..round * 20 + 20))).sum();
    assert_eq!(sent, 63);
    rig.stop();
}

#[test]
fn an_empty_pool_is_counted_and_recovered_from() {
    let mut rig = Rig::new(ID_82574L, SIZES, 64 + 10);
    assert!((0..20).all(|number| rig.device.receive(&frame(number))));
    let mut burst = Burst::new();
    let rx = &mut rig.queues.as_mut().unwrap().0;
    rx.rx_burst(&mut rig.cache, &mut burst);
    assert_eq!((burst.len(), rx.stats().no_buffer), (10, 0));
    let mut more = Burst::new();
    rx.rx_burst(&mut rig.cache, &mut more);
    assert_eq!((more.len(), rx.stats().no_buffer), (0, 1));
    let mut got: Vec<_> = burst.drain(..).map(|packet| rig.take(packet)).collect();
    got.extend(rig.poll());
    assert_eq!(got, frames(0..20));
    rig.stop();
}

#[test]
fn lies_about_received_frames_are_dropped_and_counted() {
    const DONE: u64 = RXD_DD | RXD_EOP;
    // Completions of one frame, whether it is the frame's fault or the device's.
    let cases: [(&[u64], bool); 9] = [
        (&[DONE], false),
        (&[DONE | 0xFFFF], false),
        (&[DONE | (DATA_ROOM as u64 + 1)], false),
        (&[DONE | 60 | 1 << 40], true),
        (&[DONE | 60 | 1 << 47], true),
        (&[DONE | RXD_ERRORS], true),
        (&[RXD_DD | 2048, DONE | 60], true),
        (&[RXD_DD | 2048, RXD_DD | 0xFFFF, RXD_DD, DONE], true),
        (&[RXD_DD; 33], true),
    ];
    for (words, frame_error) in cases {
        let mut rig = Rig::standard();
        assert!(rig.device.receive(&frame(1)));
        words.iter().for_each(|word| rig.device.receive_raw(*word));
        if words.last().is_some_and(|word| word & RXD_EOP == 0) {
            rig.device.receive_raw(DONE);
        }
        assert!(rig.device.receive(&frame(2)));
        // A poll ends at the first bad descriptor, and the next gets past 32 of them.
        let got = [rig.poll(), rig.poll(), rig.poll()].concat();
        assert_eq!(got, [frame(1), frame(2)], "{words:x?}");
        let stats = rig.rx_stats();
        let wanted = if frame_error { (1, 0) } else { (0, 1) };
        assert_eq!((stats.errors, stats.device_errors, stats.packets), (wanted.0, wanted.1, 2), "{words:x?}");
        // The buffers went back to the device: the ring is as full as before.
        for number in 0..200 {
            assert!(rig.device.receive(&frame(number)));
            assert_eq!(rig.poll(), [frame(number)]);
        }
        rig.stop();
    }
}

#[test]
fn wrong_checksums_of_the_payload_are_no_errors_of_the_frame() {
    let mut rig = Rig::standard();
    rig.device.receive_raw(RXD_DD | RXD_EOP | 60 | 0x60 << 40);
    assert_eq!(rig.poll().len(), 1);
    rig.stop();
}

#[test]
fn a_device_that_completes_without_end_does_not_hold_the_lcore() {
    let mut rig = Rig::standard();
    (0..64 * 3).for_each(|_| rig.device.receive_raw(RXD_DD | RXD_EOP));
    assert!(rig.poll().is_empty());
    // A poll of the rig receives twice.
    assert_eq!(rig.rx_stats().device_errors, 2 * MAX_BURST as u64);
    rig.stop();
}

#[test]
fn start_brings_up_what_the_manual_asks_for() {
    let rig = Rig::standard();
    let of = |register| rig.device.register(register);
    assert_eq!(of(RCTL), RCTL_EN | RCTL_BAM | RCTL_SECRC);
    assert_eq!(of(TCTL), 0x1004_00FA, "EN, PSP, CT, COLD, MULR");
    assert_eq!((of(RDLEN), of(TDLEN), of(RDT), of(TDT)), (1024, 1024, 63, 0));
    assert_ne!(of(CTRL) & CTRL_SLU, 0);
    assert!(rig.device.config().bus_master());
    assert_eq!(rig.port.mac(), MAC);
    assert_eq!(rig.port.link(), Link { up: true, speed: Some(1000), full_duplex: true });
    rig.stop();
}

#[test]
fn promiscuous_mode_survives_a_restart_and_rings_keep_their_memory() {
    let mut rig = Rig::standard();
    rig.port.set_promiscuous(true).unwrap();
    assert_ne!(rig.device.register(RCTL) & RCTL_UPE, 0);
    let base = rig.device.register(RDBAL);
    for round in 0..300 {
        let (rx, tx) = rig.queues.take().unwrap();
        rig.port.stop(rx, tx, &mut rig.cache).unwrap();
        assert_eq!(rig.device.register(RCTL) & RCTL_EN, 0);
        rig.queues = Some(rig.port.start(&rig.memory, &mut rig.cache, SIZES).unwrap());
        assert!(rig.device.receive(&frame(round)));
        assert_eq!(rig.poll(), [frame(round)]);
    }
    assert_eq!(rig.device.register(RDBAL), base);
    assert_ne!(rig.device.register(RCTL) & (RCTL_UPE | RCTL_MPE), 0);
    rig.stop();
}

#[test]
fn a_start_without_buffers_leaves_the_pool_as_it_was() {
    let (function, device) = FakeE1000::new(address(), ID_82574L, MAC);
    let (memory, pool) = memory(40);
    let mut port = Device::probe(function).unwrap();
    let mut cache = pool.cache();
    for _ in 0..2000 {
        let error = port.start(&memory, &mut cache, SIZES).unwrap_err().to_string();
        assert!(error.contains("only 40 buffers are free"), "{error}");
    }
    assert!(port.start(&memory, &mut cache, QueueSizes { rx: 48, tx: 64 }).is_err());
    assert!(!device.config().bus_master());
    drop(cache);
    assert_eq!(pool.free(), 40);
}

#[test]
fn a_sleeping_phy_is_woken() {
    let (function, device) = FakeE1000::new(address(), ID_82540EM, MAC);
    let (memory, pool) = memory(128);
    let mut port = Device::probe(function).unwrap();
    device.sleep_phy();
    assert!(!port.link().up);
    let mut cache = pool.cache();
    let (rx, tx) = port.start(&memory, &mut cache, SIZES).unwrap();
    assert!(port.link().up);
    port.stop(rx, tx, &mut cache).unwrap();
}

#[test]
fn a_device_that_does_not_answer_is_refused() {
    for (faults, why) in [
        (Faults { gone: true, ..Faults::default() }, "all ones"),
        (Faults { reset_hangs: true, ..Faults::default() }, "for a second"),
        (Faults { no_address: true, ..Faults::default() }, "for a second"),
    ] {
        let (function, device) = FakeE1000::new(address(), ID_82540EM, MAC);
        device.set_faults(faults);
        let error = Device::probe(function).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("0000:00:03.0"), "{error}");
        assert!(!device.config().bus_master());
    }
    let (function, _) = FakeE1000::new(address(), DeviceId { vendor: 0x8086, device: 0x10C9 }, MAC);
    assert_eq!(Device::probe(function).unwrap_err().kind(), ErrorKind::Unavailable);
    let (function, _) = FakeE1000::new(address(), ID_82540EM, MacAddr([0x53, 0, 0, 0, 0, 1]));
    assert!(Device::probe(function).unwrap_err().to_string().contains("no address of a station"));
}

#[test]
fn memory_is_kept_when_the_device_cannot_be_stopped() {
    let mut rig = Rig::standard();
    rig.device.set_faults(Faults { gone: true, ..Faults::default() });
    assert!(!rig.port.link().up);
    let (rx, tx) = rig.queues.take().unwrap();
    let references = Arc::strong_count(&rig.memory);
    assert!(rig.port.stop(rx, tx, &mut rig.cache).is_err());
    assert_eq!(Arc::strong_count(&rig.memory), references);
    drop(rig.port);
    // The two rings are gone, the reference that the port had is left for ever.
    assert_eq!(Arc::strong_count(&rig.memory), references - 2);
}

#[test]
fn a_stop_that_is_confirmed_later_gives_the_buffers_back() {
    let mut rig = Rig::standard();
    rig.device.set_faults(Faults { gone: true, ..Faults::default() });
    assert_eq!(rig.port.check().unwrap_err().kind(), ErrorKind::Unavailable);
    let (rx, tx) = rig.queues.take().unwrap();
    rig.port.stop(rx, tx, &mut rig.cache).unwrap_err();
    rig.port.start(&rig.memory, &mut rig.cache, SIZES).unwrap_err();
    rig.device.set_faults(Faults::default());
    rig.queues = Some(rig.port.start(&rig.memory, &mut rig.cache, SIZES).unwrap());
    rig.port.check().unwrap();
    rig.stop();
}

#[test]
fn starts_that_fail_take_no_memory() {
    let mut rig = Rig::standard();
    let (rx, tx) = rig.queues.take().unwrap();
    rig.port.stop(rx, tx, &mut rig.cache).unwrap();
    rig.device.set_faults(Faults { gone: true, ..Faults::default() });
    for _ in 0..100 {
        let error = rig.port.start(&rig.memory, &mut rig.cache, SIZES).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
    rig.device.set_faults(Faults::default());
    rig.queues = Some(rig.port.start(&rig.memory, &mut rig.cache, SIZES).unwrap());
    rig.stop();
}

#[test]
fn memory_outlives_all_that_a_program_can_drop_while_the_nic_runs() {
    let Rig { device, port, queues, memory, pool, cache } = Rig::standard();
    let weak = Arc::downgrade(&memory);
    // The test's device holds what it is attached to, which a NIC does not.
    device.attach(self::memory(1).0.device_view());
    drop((queues, memory, pool, cache));
    assert!(device.config().bus_master() && weak.upgrade().is_some());
    drop(port);
    assert!(!device.config().bus_master() && weak.upgrade().is_none());
}

#[test]
fn sent_buffers_go_back_to_the_pool_that_they_came_from() {
    let mut rig = Rig::standard();
    let (other, pool) = memory(64);
    let mut to_send = Pool::send_only(&other, 8).unwrap().cache();
    assert_eq!(to_send.pool().free(), 8);
    let mut burst: Burst = (0..8).map(|_| Packet::new(to_send.allocate().unwrap(), 60)).collect();
    let (rx, mut tx) = rig.queues.take().unwrap();
    assert_eq!(tx.tx_burst(&mut to_send, &mut burst), 8);
    rig.port.stop_pairs(vec![(rx, tx)], &mut rig.cache, Some(&mut to_send)).unwrap();
    let sent = Arc::clone(to_send.pool());
    drop((to_send, rig.cache));
    assert_eq!((sent.free(), rig.pool.free(), pool.free()), (8, 512, 64));
}

#[test]
fn a_port_that_is_dropped_stops_its_device() {
    let rig = Rig::standard();
    let device = rig.device.clone();
    drop(rig.port);
    assert!(!device.config().bus_master());
    assert_eq!(device.register(RCTL), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the pattern of bursts, nothing is lost, doubled or reordered but what the wire drops.
    #[test]
    fn order_and_number_are_kept(
        steps in prop::collection::vec((0_usize..80, 1_usize..=MAX_BURST, any::<bool>()), 1..200),
    ) {
        let mut rig = Rig::standard();
        let (mut number, mut wire, mut queued) = (0, VecDeque::new(), VecDeque::new());
        for (arriving, burst_size, transmit) in steps {
            for _ in 0..arriving {
                if rig.device.receive(&frame(number)) {
                    wire.push_back(frame(number));
                }
                number += 1;
            }
            // A burst with other room than 32: the rest of it is taken.
            let mut burst = Burst::new();
            while burst.len() < MAX_BURST - burst_size {
                burst.push(Packet::new(rig.cache.allocate().unwrap(), 0));
            }
            rig.receive(&mut burst);
            for packet in burst.drain(..MAX_BURST - burst_size) {
                rig.cache.free(packet.into_buffer());
            }
            prop_assert!(burst.len() == burst_size || burst.len() == wire.len());
            let got: Vec<_> = burst.drain(..).map(|packet| rig.take(packet)).collect();
            prop_assert_eq!(&got, &wire.drain(..got.len()).collect::<Vec<_>>());
            let sent = rig.send(&got);
            queued.extend(got.into_iter().take(sent));
            if transmit {
                prop_assert_eq!(rig.device.transmitted(), queued.drain(..).collect::<Vec<_>>());
            }
        }
        prop_assert_eq!(rig.device.transmitted(), queued.into_iter().collect::<Vec<_>>());
        rig.stop();
    }
}
