//! The driver against the in-process device: what a good device does, and each lie.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use vireo_bus_pci::DeviceId;
use vireo_eal::ErrorKind;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DATA_ROOM, DmaMemory, MAX_BURST, Packet, Pool, PoolCache};
use vireo_eal::mem::{Backing, Region};

use super::*;
use crate::fakedev::e1000::{
    FakeE1000, Faults, ID_82540EM, ID_82544GC, ID_82545EM, ID_82545GM, ID_82574L, PAUSE_ADDRESS,
};
use crate::port::{Link, MacAddr, Nic, PortConfig, QueueStats, Queues, RxBurst, TxBurst};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);

/// A started port with its device, and one lcore's pool cache.
struct Rig {
    device: FakeE1000,
    port: Device,
    queues: Option<(RxQueue, TxQueue)>,
    memory: Arc<DmaMemory>,
    pool: Arc<Pool>,
    cache: PoolCache,
}

thread_local! {
    /// Whether devices of this thread's test are as the chips are.
    static SILICON: Cell<bool> = const { Cell::new(false) };
}

/// Runs `test` with devices as QEMU models them, and as the chips are.
fn in_both_modes(test: impl Fn()) {
    for silicon in [false, true] {
        SILICON.set(silicon);
        test();
    }
}

fn fake(id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, FakeE1000) {
    let make = if SILICON.get() { FakeE1000::silicon } else { FakeE1000::new };
    make(address(), id, mac)
}

fn address() -> Bdf {
    Bdf::new(0, 0, 3, 0).unwrap()
}

/// Device address of all memory: within 32 bits.
const IOVA: u64 = 0x8000_0000;

fn memory(buffers: u32) -> (Arc<DmaMemory>, Arc<Pool>) {
    let bytes = (Pool::bytes(buffers) + (64 << 10)).next_power_of_two();
    let region = Region::new(bytes, Backing::SmallPages).unwrap();
    let memory = DmaMemory::with_addresses(region, bytes, &[IOVA]);
    let pool = Pool::new(&memory, buffers).unwrap();
    (memory, pool)
}

impl Rig {
    fn new(id: DeviceId, config: PortConfig, buffers: u32) -> Self {
        let (function, device) = fake(id, MAC);
        let (memory, pool) = memory(buffers);
        device.attach(memory.device_view().unwrap());
        let mut cache = pool.cache();
        let mut port = Device::probe(function).unwrap();
        let queues = Some(port.start_pair(&config, &memory, &mut cache).unwrap());
        Self { device, port, queues, memory, pool, cache }
    }

    fn standard() -> Self {
        Self::new(ID_82574L, CONFIG, 512)
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
        self.cache.free(packet);
        bytes
    }

    fn send(&mut self, frames: &[Vec<u8>]) -> usize {
        let mut burst: Burst = frames
            .iter()
            .map(|frame| {
                let mut packet = self.cache.allocate().unwrap().with_len(frame.len());
                self.cache.write(&mut packet, 0, frame);
                packet
            })
            .collect();
        let sent = self.queues.as_mut().unwrap().1.tx_burst(&mut self.cache, &mut burst);
        assert_eq!(burst.len(), frames.len() - sent);
        burst.drain(..).for_each(|packet| self.cache.free(packet));
        sent
    }

    fn rx_stats(&self) -> QueueStats {
        self.queues.as_ref().unwrap().0.stats()
    }

    /// Stops the port; every buffer must be in the pool again.
    fn stop(mut self) {
        let (rx, tx) = self.queues.take().unwrap();
        self.port.stop_pair(rx, tx, &mut self.cache).unwrap();
        drop(self.cache);
        assert_eq!(self.pool.available(), self.pool.count());
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
    in_both_modes(|| {
        for id in [ID_82540EM, ID_82574L] {
            let mut rig = Rig::new(id, PortConfig::with_descriptors(128, 64), 512);
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
    });
}

#[test]
fn short_frames_are_padded_where_the_chip_does_not_do_it_well() {
    in_both_modes(|| {
        // QEMU's 82574L does not pad.
        for (id, padded) in [(ID_82540EM, 60), (ID_82574L, if SILICON.get() { 60 } else { 17 })] {
            let mut rig = Rig::new(id, CONFIG, 512);
            for number in 0..200 {
                // What was in the buffers before must not leave.
                assert!(rig.device.receive(&[0xEE; 60]));
                let mut burst = Burst::new();
                rig.receive(&mut burst);
                let packet = burst.pop().unwrap();
                assert!(burst.is_empty());
                let mut packet = packet.with_len(17);
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
    });
}

#[test]
fn the_receive_doorbell_rings_once_for_32_packets() {
    in_both_modes(|| {
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
    });
}

#[test]
fn a_full_receive_ring_makes_the_device_drop() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        let taken = (0..100).filter(|number| rig.device.receive(&frame(*number))).count();
        assert_eq!(taken, 63);
        assert_eq!(rig.port.device_drops()[0], ("rx_missed_errors", 37));
        assert_eq!(rig.port.device_drops()[0].1, 37, "the register clears itself, the sum stays");
        assert_eq!([rig.poll().len(), rig.poll().len(), rig.poll().len()], [32, 31, 0]);
        assert!(rig.device.receive(&frame(0)));
        rig.stop();
    });
}

/// QEMU's 82540EM keeps what it has counted, for the next process too.
#[test]
fn a_frame_that_was_dropped_counts_once() {
    in_both_modes(|| {
        for id in [ID_82540EM, ID_82574L] {
            let mut rig = Rig::new(id, CONFIG, 512);
            for dropped in [37, 36] {
                (0..63 + dropped).for_each(|number| _ = rig.device.receive(&frame(number)));
                let (rx, tx) = rig.queues.take().unwrap();
                rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
                assert_eq!(rig.port.device_drops()[0], ("rx_missed_errors", dropped as u64), "{id}");
                rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
                assert_eq!(rig.port.device_drops()[0].1, 0, "{id}");
            }
            rig.stop();
        }
    });
}

#[test]
fn a_full_transmit_ring_takes_what_fits() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        assert_eq!([0, 32, 64].map(|start| rig.send(&frames(start..start + 32))), [32, 31, 0]);
        assert_eq!(rig.device.transmitted(), frames(0..63));
        // Descriptors 0 to 31 are known to be done; 32 to 62 wait for the report of 63.
        assert_eq!(rig.send(&frames(63..95)), 32);
        assert_eq!(rig.device.transmitted(), frames(63..95));
        rig.stop();
    });
}

#[test]
fn a_device_that_never_completes_tx_gets_one_ring_full() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.device.set_faults(Faults { never_done: true, ..Faults::default() });
        let sent: usize = (0..10).map(|round| rig.send(&frames(round * 20..round * 20 + 20))).sum();
        assert_eq!(sent, 63);
        rig.stop();
    });
}

#[test]
fn an_empty_pool_is_counted_and_recovered_from() {
    in_both_modes(|| {
        let mut rig = Rig::new(ID_82574L, CONFIG, 64 + 10);
        let (mut held, mut arrived) = (Vec::new(), 0);
        while held.len() < 64 + 10 {
            while rig.device.receive(&frame(arrived)) {
                arrived += 1;
            }
            let (rx, mut burst) = (&mut rig.queues.as_mut().unwrap().0, Burst::new());
            rx.rx_burst(&mut rig.cache, &mut burst);
            held.extend(burst);
        }
        assert_eq!((arrived, rig.rx_stats().packets), (74, 74));
        let before = rig.rx_stats().no_buffer;
        assert!(rig.poll().is_empty() && rig.rx_stats().no_buffer > before);
        let got: Vec<_> = held.into_iter().map(|packet| rig.take(packet)).collect();
        assert_eq!(got, frames(0..74));
        assert!(rig.poll().is_empty());
        assert!(rig.device.receive(&frame(74)));
        assert_eq!(rig.poll(), frames(74..75));
        rig.stop();
    });
}

#[test]
fn lies_about_received_frames_are_dropped_and_counted() {
    in_both_modes(|| {
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
            assert_eq!(
                (stats.errors, stats.device_errors, stats.packets),
                (wanted.0, wanted.1, 2),
                "{words:x?}"
            );
            // The buffers went back to the device: the ring is as full as before.
            for number in 0..200 {
                assert!(rig.device.receive(&frame(number)));
                assert_eq!(rig.poll(), [frame(number)]);
            }
            rig.stop();
        }
    });
}

#[test]
fn wrong_checksums_of_the_payload_are_no_errors_of_the_frame() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.device.receive_raw(RXD_DD | RXD_EOP | 60 | 0x60 << 40);
        assert_eq!(rig.poll().len(), 1);
        rig.stop();
    });
}

#[test]
fn a_device_that_completes_without_end_does_not_hold_the_lcore() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        (0..64 * 3).for_each(|_| rig.device.receive_raw(RXD_DD | RXD_EOP));
        assert!(rig.poll().is_empty());
        // A poll of the rig receives twice, and one descriptor has no buffer.
        assert_eq!(rig.rx_stats().device_errors, 2 * MAX_BURST as u64 - 1);
        rig.stop();
    });
}

#[test]
fn start_brings_up_what_the_manual_asks_for() {
    in_both_modes(|| {
        let rig = Rig::standard();
        let of = |register| rig.device.register(register);
        assert_eq!(of(RCTL), RCTL_EN | RCTL_BAM | RCTL_DPF | RCTL_SECRC);
        assert_eq!(of(TCTL), 0x1004_00FA, "EN, PSP, CT, COLD, MULR");
        assert_eq!((of(RDLEN), of(TDLEN), of(RDT), of(TDT)), (1024, 1024, 63, 0));
        assert_ne!(of(CTRL) & CTRL_SLU, 0);
        assert!(rig.device.config().bus_master());
        assert_eq!(rig.port.mac(), MAC);
        assert_eq!(rig.port.link(), Link { up: true, speed: Some(1000), full_duplex: true, autoneg: true });
        rig.stop();
    });
}

#[test]
fn promiscuous_mode_survives_a_restart_and_rings_keep_their_memory() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.port.set_promiscuous(true).unwrap();
        assert_ne!(rig.device.register(RCTL) & RCTL_UPE, 0);
        let base = rig.device.register(RDBAL);
        for round in 0..300 {
            let (rx, tx) = rig.queues.take().unwrap();
            rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
            assert_eq!(rig.device.register(RCTL) & RCTL_EN, 0);
            rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
            assert!(rig.device.receive(&frame(round)));
            assert_eq!(rig.poll(), [frame(round)]);
        }
        assert_eq!(rig.device.register(RDBAL), base);
        assert_ne!(rig.device.register(RCTL) & (RCTL_UPE | RCTL_MPE), 0);
        rig.stop();
    });
}

#[test]
fn a_start_without_buffers_leaves_the_pool_as_it_was() {
    in_both_modes(|| {
        let (function, device) = fake(ID_82574L, MAC);
        let (memory, pool) = memory(40);
        let mut port = Device::probe(function).unwrap();
        let mut cache = pool.cache();
        for _ in 0..2000 {
            let error = port.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
            assert!(error.contains("only 40 buffers are free"), "{error}");
        }
        assert!(port.start_pair(&PortConfig::with_descriptors(48, 64), &memory, &mut cache).is_err());
        assert!(!device.config().bus_master());
        drop(cache);
        assert_eq!(pool.available(), 40);
    });
}

#[test]
fn a_sleeping_phy_is_woken() {
    in_both_modes(|| {
        let (function, device) = fake(ID_82540EM, MAC);
        let (memory, pool) = memory(128);
        let mut port = Device::probe(function).unwrap();
        device.sleep_phy();
        assert!(!port.link().up);
        let mut cache = pool.cache();
        let (rx, tx) = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        assert!(port.link().up);
        port.stop_pair(rx, tx, &mut cache).unwrap();
    });
}

#[test]
fn a_device_that_does_not_answer_is_refused() {
    for (faults, why) in [
        (Faults { gone: true, ..Faults::default() }, "all ones"),
        (Faults { reset_hangs: true, ..Faults::default() }, "for a second"),
        (Faults { no_address: true, ..Faults::default() }, "for a second"),
    ] {
        let (function, device) = fake(ID_82540EM, MAC);
        device.set_faults(faults);
        let error = Device::probe(function).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("0000:00:03.0"), "{error}");
        assert!(!device.config().bus_master());
    }
    let (function, _) = fake(DeviceId { vendor: 0x8086, device: 0x10C9 }, MAC);
    assert_eq!(Device::probe(function).unwrap_err().kind(), ErrorKind::Unavailable);
    let (function, _) = fake(ID_82540EM, MacAddr([0x53, 0, 0, 0, 0, 1]));
    assert!(Device::probe(function).unwrap_err().to_string().contains("no address of a station"));
}

#[test]
fn memory_is_kept_when_the_device_cannot_be_stopped() {
    let mut rig = Rig::standard();
    rig.device.set_faults(Faults { gone: true, ..Faults::default() });
    assert!(!rig.port.link().up);
    let (rx, tx) = rig.queues.take().unwrap();
    let references = Arc::strong_count(&rig.memory);
    assert!(rig.port.stop_pair(rx, tx, &mut rig.cache).is_err());
    assert_eq!(Arc::strong_count(&rig.memory), references);
    drop(rig.port);
    // The two rings are gone, the reference that the port had is left for ever.
    assert_eq!(Arc::strong_count(&rig.memory), references - 2);
}

#[test]
fn a_stop_that_is_confirmed_later_gives_the_buffers_back() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.device.set_faults(Faults { gone: true, ..Faults::default() });
        assert_eq!(rig.port.check().unwrap_err().kind(), ErrorKind::Unavailable);
        let (rx, tx) = rig.queues.take().unwrap();
        rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap_err();
        rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap_err();
        rig.device.set_faults(Faults::default());
        rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
        rig.port.check().unwrap();
        rig.stop();
    });
}

#[test]
fn starts_that_fail_take_no_memory() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        let (rx, tx) = rig.queues.take().unwrap();
        rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
        rig.device.set_faults(Faults { gone: true, ..Faults::default() });
        for _ in 0..100 {
            let error = rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        }
        rig.device.set_faults(Faults::default());
        rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
        rig.stop();
    });
}

#[test]
fn memory_outlives_all_that_a_program_can_drop_while_the_nic_runs() {
    let Rig { device, port, queues, memory, pool, cache } = Rig::standard();
    let weak = Arc::downgrade(&memory);
    // The test's device holds what it is attached to, which a NIC does not.
    device.attach(self::memory(1).0.device_view().unwrap());
    drop((queues, memory, pool, cache));
    assert!(device.config().bus_master() && weak.upgrade().is_some());
    drop(port);
    assert!(!device.config().bus_master() && weak.upgrade().is_none());
}

#[test]
fn sent_buffers_go_back_to_the_pool_that_they_came_from() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        let (other, pool) = memory(64);
        let mut to_send = Pool::send_only(&other, 8).unwrap().cache();
        assert_eq!(to_send.pool().available(), 8);
        let mut burst: Burst = (0..8).map(|_| to_send.allocate().unwrap().with_len(60)).collect();
        let (rx, mut tx) = rig.queues.take().unwrap();
        assert_eq!(tx.tx_burst(&mut to_send, &mut burst), 8);
        rig.port.stop(Queues::pair(rx, tx), &mut rig.cache, Some(&mut to_send)).unwrap();
        let sent = Arc::clone(to_send.pool());
        drop((to_send, rig.cache));
        assert_eq!((sent.available(), rig.pool.available(), pool.available()), (8, 512, 64));
    });
}

#[test]
fn a_port_that_is_dropped_stops_its_device() {
    in_both_modes(|| {
        let rig = Rig::standard();
        let device = rig.device.clone();
        drop(rig.port);
        assert!(!device.config().bus_master());
        assert_eq!(device.register(RCTL), 0);
    });
}

/// One chip of each kind that is reset in its own way.
const KINDS: [DeviceId; 5] = [ID_82544GC, ID_82540EM, ID_82545EM, ID_82545GM, ID_82574L];

#[test]
fn each_chip_is_reset_in_the_way_that_it_survives() {
    in_both_modes(|| {
        for id in KINDS {
            let mut rig = Rig::new(id, CONFIG, 512);
            for number in 0..10 {
                let (rx, tx) = rig.queues.take().unwrap();
                rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
                rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
                assert!(rig.device.receive(&frame(number)), "{id}");
                assert_eq!(rig.poll(), [frame(number)], "{id}");
                assert_eq!(rig.send(&[frame(number)]), 1);
                assert_eq!(rig.device.transmitted(), [frame(number)], "{id}");
            }
            assert_eq!(rig.port.mac(), MAC);
            assert_eq!(rig.device.resets(), 11, "{id}: one of the probe, and one of each stop");
            assert!(rig.port.link().up && !rig.device.is_hung(), "{id}");
            rig.stop();
        }
    });
}

#[test]
fn settings_survive_the_reload_behind_a_reset() {
    in_both_modes(|| {
        for id in KINDS {
            let rig = Rig::new(id, CONFIG, 512);
            let ctrl = rig.device.register(CTRL);
            assert_eq!(ctrl & (CTRL_SLU | CTRL_FRCSPD | CTRL_FRCDPX), CTRL_SLU, "{id}: {ctrl:#x}");
            assert_eq!(rig.device.register(MANC) & MANC_ARP_EN, 0, "{id}");
            rig.stop();
        }
    });
}

#[test]
fn the_82574_gets_what_its_errata_want() {
    in_both_modes(|| {
        let rig = Rig::standard();
        let of = |register| rig.device.register(register);
        assert_eq!((of(GCR) >> 22 & 1, of(GCR2) & 1), (1, 1));
        assert_eq!((of(CTRL_EXT) >> 22 & 3, of(CTRL) >> 29 & 1), (1, 0));
        assert_eq!((of(TARC0) >> 26 & 1, of(TARC0) >> 27 & 0xF), (1, 0));
        let mut link_control = [0xff; 2];
        rig.device.config().read(0x50, &mut link_control);
        assert_eq!(link_control[0] & 3, 0, "ASPM");
        rig.stop();
    });
}

#[test]
fn rings_of_every_size_are_within_64_kib() {
    in_both_modes(|| {
        for id in [ID_82545EM, ID_82544GC] {
            for entries in [64, 1024, 4096] {
                let config = PortConfig::with_descriptors(entries, entries);
                let (function, device) = fake(id, MAC);
                let region = Region::new(16 << 20, Backing::SmallPages).unwrap();
                let memory = DmaMemory::with_addresses(region, 16 << 20, &[IOVA]);
                device.attach(memory.device_view().unwrap());
                let pool = Pool::new(&memory, 4500).unwrap();
                let mut cache = pool.cache();
                let mut port = Device::probe(function).unwrap();
                let (mut rx, tx) = port.start_pair(&config, &memory, &mut cache).unwrap();
                for (low, len) in [(RDBAL, RDLEN), (TDBAL, TDLEN)] {
                    let (base, len) = (device.register(low), device.register(len));
                    assert_eq!((base ^ (base + len - 1)) >> 16, 0, "{base:#x}, {len:#x}");
                }
                assert!(device.receive(&frame(1)));
                let mut burst = Burst::new();
                rx.rx_burst(&mut cache, &mut burst);
                assert_eq!(burst.len(), 1);
                burst.drain(..).for_each(|packet| cache.free(packet));
                port.stop_pair(rx, tx, &mut cache).unwrap();
            }
        }
    });
}

#[test]
fn chips_on_conventional_pci_state_32_address_bits() {
    SILICON.set(true);
    for (id, pcix, mask) in [
        (ID_82540EM, false, u32::MAX.into()),
        (ID_82545GM, false, u32::MAX.into()),
        (ID_82545GM, true, u64::MAX),
        (ID_82574L, false, u64::MAX),
    ] {
        let (function, device) = fake(id, MAC);
        if pcix {
            device.set_pcix();
        }
        assert_eq!(Device::probe(function).unwrap().capabilities().dma_mask, mask, "{id}");
    }
    let (function, device) = fake(ID_82544GC, MAC);
    device.set_pcix();
    assert!(Device::probe(function).unwrap_err().to_string().contains("PCI-X slot"));
}

#[test]
fn an_interrupt_line_that_nobody_serves_stays_silent() {
    const INTX_DISABLE: u8 = 1 << 2;
    in_both_modes(|| {
        let rig = Rig::standard();
        let mut command = [0; 2];
        rig.device.config().read(4, &mut command);
        assert_ne!(command[1] & INTX_DISABLE, 0);
        rig.stop();
    });
}

/// A PAUSE frame to `destination` (IEEE 802.3, 31B.1).
fn pause_frame(destination: MacAddr) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[..6].copy_from_slice(&destination.0);
    frame[12..18].copy_from_slice(&[0x88, 0x08, 0, 1, 0xFF, 0xFF]);
    frame
}

#[test]
fn flow_control_is_what_the_ends_of_the_link_agreed_on() {
    const PAUSE: u16 = 1 << 10;
    const ASM_DIR: u16 = 1 << 11;
    in_both_modes(|| {
        for id in [ID_82540EM, ID_82574L] {
            let mut rig = Rig::new(id, CONFIG, 512);
            let flags = |rig: &Rig| rig.device.register(CTRL) & (CTRL_RFCE | CTRL_TFCE);
            assert_eq!(flags(&rig), 0, "{id}: the partner knows no PAUSE");
            for (partner, wanted) in
                [(PAUSE, CTRL_RFCE | CTRL_TFCE), (ASM_DIR, CTRL_RFCE), (0, 0), (PAUSE, CTRL_RFCE | CTRL_TFCE)]
            {
                rig.device.plug(false, 0);
                rig.port.check().unwrap();
                rig.device.plug(true, partner);
                rig.port.check().unwrap();
                assert_eq!(flags(&rig), wanted, "{id}: {partner:#x}");
            }
            let (rx, tx) = rig.queues.take().unwrap();
            rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
            rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
            assert_eq!(flags(&rig), CTRL_RFCE | CTRL_TFCE, "{id}: of a link that was up at the start");
            rig.stop();
        }
    });
}

#[test]
fn pause_frames_are_obeyed_and_never_received() {
    SILICON.set(true);
    for id in [ID_82540EM, ID_82574L] {
        let mut rig = Rig::new(id, CONFIG, 512);
        for promiscuous in [false, true] {
            rig.port.set_promiscuous(promiscuous).unwrap();
            for destination in [PAUSE_ADDRESS, MAC] {
                assert!(rig.device.receive(&pause_frame(destination)));
                assert!(rig.poll().is_empty(), "{id}, {promiscuous}, {destination}");
            }
        }
        assert_eq!(rig.device.pauses(), 0, "{id}");
        rig.device.plug(false, 0);
        assert!(!rig.port.link().up);
        rig.device.plug(true, 1 << 10);
        assert!(rig.port.link().up);
        assert!(rig.device.receive(&pause_frame(PAUSE_ADDRESS)));
        assert_eq!(rig.device.pauses(), 1, "{id}");
        assert!(rig.device.register(FCRTH) > rig.device.register(FCRTL) & !FCRTL_XONE);
        // Firmware for ASF has taken this one before.
        let mut request = vec![0xFF; 60];
        request[12..14].copy_from_slice(&[0x08, 0x06]);
        assert!(rig.device.receive(&request));
        assert_eq!(rig.poll(), [request], "{id}");
        rig.stop();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the pattern of bursts, nothing is lost, doubled or reordered but what the wire drops.
    #[test]
    fn order_and_number_are_kept(
        steps in prop::collection::vec((0_usize..80, 1_usize..=MAX_BURST, any::<bool>()), 1..200),
        silicon in any::<bool>(),
    ) {
        SILICON.set(silicon);
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
                burst.push(rig.cache.allocate().unwrap().with_len(0));
            }
            rig.receive(&mut burst);
            for packet in burst.drain(..MAX_BURST - burst_size) {
                rig.cache.free(packet);
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
