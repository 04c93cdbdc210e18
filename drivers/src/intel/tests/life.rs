//! Probe, start and stop, memory that a device may still write to, and the link.

use std::sync::Arc;

use vireo_bus_pci::DeviceId;
use vireo_eal::ErrorKind;
use vireo_eal::dma::{Burst, DmaMemory, Pool};
use vireo_eal::event::is_signaled;
use vireo_eal::mem::{Backing, Region};

use super::{CONFIG, Family, MAC, Rig, SILICON, fake, frame, in_both_modes, memory};
use crate::fakedev::intel::{Faults, PAUSE_ADDRESS};
use crate::intel::Device;
use crate::intel::regs::*;
use crate::port::{MacAddr, Nic, PortConfig, Queues, RxBurst, TxBurst};

pub(crate) fn promiscuous_mode_survives_a_restart_and_rings_keep_their_memory<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        rig.port.set_promiscuous(true).unwrap();
        assert_ne!(rig.device.register(RCTL) & RCTL_UPE, 0);
        let base = rig.device.register(F::RX.base_low);
        for round in 0..300 {
            rig.pause();
            assert_eq!(rig.device.register(RCTL) & RCTL_EN, 0);
            rig.resume();
            assert!(rig.device.receive(&frame(round)));
            assert_eq!(rig.poll(), [frame(round)]);
        }
        assert_eq!(rig.device.register(F::RX.base_low), base);
        assert_ne!(rig.device.register(RCTL) & (RCTL_UPE | RCTL_MPE), 0);
        rig.stop();
    });
}

pub(crate) fn a_start_without_buffers_leaves_the_pool_as_it_was<F: Family>() {
    in_both_modes(|| {
        let (function, device) = fake::<F>(F::STANDARD, MAC);
        let (memory, pool) = memory::<F>(40);
        let mut port = Device::<F>::probe(function).unwrap();
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

pub(crate) fn a_sleeping_phy_is_woken<F: Family>() {
    in_both_modes(|| {
        for id in F::CHIPS {
            let (function, device) = fake::<F>(*id, MAC);
            let (memory, pool) = memory::<F>(128);
            let mut port = Device::<F>::probe(function).unwrap();
            device.sleep_phy();
            assert!(!port.link().up, "{id}");
            let mut cache = pool.cache();
            let (rx, tx) = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
            assert!(port.link().up, "{id}");
            port.stop_pair(rx, tx, &mut cache).unwrap();
        }
    });
}

pub(crate) fn a_device_that_does_not_answer_is_refused<F: Family>() {
    let id = F::CHIPS[0];
    for (faults, why) in [
        (Faults { gone: true, ..Faults::default() }, "all ones"),
        (Faults { reset_hangs: true, no_function_reset: true, ..Faults::default() }, "after 1 s"),
        (Faults { no_address: true, ..Faults::default() }, "after 1 s"),
    ] {
        let (function, device) = fake::<F>(id, MAC);
        device.set_faults(faults);
        let error = Device::<F>::probe(function).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("0000:00:03.0"), "{error}");
        assert!(!device.config().bus_master());
    }
    // A virtual function of the 82576.
    let (function, _) = fake::<F>(DeviceId { vendor: 0x8086, device: 0x10CA }, MAC);
    assert_eq!(Device::<F>::probe(function).unwrap_err().kind(), ErrorKind::Unavailable);
    let (function, _) = fake::<F>(id, MacAddr([0x53, 0, 0, 0, 0, 1]));
    assert!(Device::<F>::probe(function).unwrap_err().to_string().contains("is not a station address"));
}

pub(crate) fn each_chip_is_reset_in_the_way_that_it_survives<F: Family>() {
    in_both_modes(|| {
        for id in F::KINDS {
            let mut rig = Rig::<F>::new(*id, CONFIG, 512);
            for number in 0..10 {
                rig.restart();
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

pub(crate) fn a_chip_that_hangs_in_its_reset_is_reset_by_the_function<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        rig.device.set_faults(Faults { reset_hangs: true, ..Faults::default() });
        rig.restart();
        assert!(rig.device.receive(&frame(1)));
        assert_eq!(rig.poll(), [frame(1)]);
        rig.stop();
    });
}

pub(crate) fn memory_is_kept_when_the_device_cannot_be_stopped<F: Family>() {
    let mut rig = Rig::<F>::standard();
    rig.device.set_faults(Faults { gone: true, ..Faults::default() });
    assert!(!rig.port.link().up);
    let (rx, tx) = rig.queues.take().unwrap();
    let references = Arc::strong_count(&rig.memory);
    assert!(rig.port.stop_pair(rx, tx, &mut rig.cache).is_err());
    assert_eq!(Arc::strong_count(&rig.memory), references);
    drop(rig.port);
    // The two rings are gone, but the port's reference is kept forever.
    assert_eq!(Arc::strong_count(&rig.memory), references - 2);
}

pub(crate) fn a_stop_that_is_confirmed_later_gives_the_buffers_back<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        rig.device.set_faults(Faults { gone: true, ..Faults::default() });
        assert_eq!(rig.port.check().unwrap_err().kind(), ErrorKind::Unavailable);
        let (rx, tx) = rig.queues.take().unwrap();
        rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap_err();
        rig.refusal();
        rig.device.set_faults(Faults::default());
        rig.resume();
        rig.port.check().unwrap();
        rig.stop();
    });
}

pub(crate) fn starts_that_fail_take_no_memory<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        rig.pause();
        rig.device.set_faults(Faults { gone: true, ..Faults::default() });
        for _ in 0..100 {
            let error = rig.refusal();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        }
        rig.device.set_faults(Faults::default());
        rig.resume();
        rig.stop();
    });
}

pub(crate) fn memory_outlives_all_that_a_program_can_drop_while_the_nic_runs<F: Family>() {
    let Rig { device, port, queues, memory, pool, cache, .. } = Rig::<F>::standard();
    let weak = Arc::downgrade(&memory);
    // A fake device holds the memory that it is attached to, unlike a NIC, so it is attached to other memory.
    device.attach(self::memory::<F>(1).0.device_view().unwrap());
    drop((queues, memory, pool, cache));
    assert!(device.config().bus_master() && weak.upgrade().is_some());
    drop(port);
    assert!(!device.config().bus_master() && weak.upgrade().is_none());
}

pub(crate) fn sent_buffers_go_back_to_the_pool_that_they_came_from<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        let (other, pool) = memory::<F>(64);
        let mut to_send = Pool::send_only(&other, 8).unwrap().cache();
        assert_eq!(to_send.pool().available(), 8);
        let mut burst: Burst = (0..8).map(|_| to_send.allocate().unwrap().with_len(60)).collect();
        let (rx, mut tx) = rig.queues.take().unwrap();
        assert_eq!(tx.tx_burst(&mut to_send, &mut burst), 8);
        rig.port.stop(Queues::pair(rx, tx), &mut rig.cache).unwrap();
        let sent = Arc::clone(to_send.pool());
        drop((to_send, rig.cache));
        assert_eq!((sent.available(), rig.pool.available(), pool.available()), (8, 512, 64));
    });
}

pub(crate) fn a_port_that_is_dropped_stops_its_device<F: Family>() {
    in_both_modes(|| {
        let rig = Rig::<F>::standard();
        let device = rig.device.clone();
        drop(rig.port);
        assert!(!device.config().bus_master());
        assert_eq!(device.register(RCTL), 0);
    });
}

pub(crate) fn a_port_stops_with_its_own_queues_only<F: Family>() {
    let (mut rig, mut other) = (Rig::<F>::standard(), Rig::<F>::standard());
    let ((rx, tx), theirs) = (rig.queues.take().unwrap(), other.queues.take().unwrap());
    let lone = Queues { rx: Vec::new(), tx: vec![tx] };
    let error = rig.port.stop(lone, &mut rig.cache).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let error = rig.port.stop_pair(theirs.0, theirs.1, &mut rig.cache).unwrap_err();
    assert!(error.to_string().contains("the queues belong to another port"), "{error}");
    assert!(rig.device.config().bus_master());
    drop(rx);
}

pub(crate) fn rings_of_every_size_have_room_in_what_the_driver_asks_for<F: Family>() {
    in_both_modes(|| {
        for entries in [64, 1024, 4096] {
            let config = PortConfig::with_descriptors(entries, entries);
            let (function, device) = fake::<F>(F::STANDARD, MAC);
            let mut port = Device::<F>::probe(function).unwrap();
            let [bytes, read_only] = (port.capabilities().ring_bytes)(&config);
            let buffers = u32::from(entries) + 64;
            let region = Region::new(Pool::bytes(buffers) + bytes + read_only, Backing::SmallPages).unwrap();
            let memory = DmaMemory::map(region, &[]).unwrap();
            let pool = Pool::new(&memory, buffers).unwrap();
            let mut cache = pool.cache();
            let (rx, tx) = port.start_pair(&config, &memory, &mut cache).unwrap();
            for ring in [F::RX, F::TX] {
                assert_eq!(device.register(ring.base_low) % 128, 0);
                assert_eq!(device.register(ring.len), u32::from(entries) * 16);
            }
            port.stop_pair(rx, tx, &mut cache).unwrap();
        }
    });
}

pub(crate) fn an_interrupt_line_that_nobody_serves_stays_silent<F: Family>() {
    const INTX_DISABLE: u8 = 1 << 2;
    in_both_modes(|| {
        let rig = Rig::<F>::standard();
        let mut command = [0; 2];
        rig.device.config().read(4, &mut command);
        assert_ne!(command[1] & INTX_DISABLE, 0);
        rig.stop();
    });
}

pub(crate) fn changes_of_the_link_are_signaled<F: Family>() {
    in_both_modes(|| {
        for id in F::CHIPS {
            let mut rig = Rig::<F>::new(*id, CONFIG.with_link_interrupt(true), 512);
            let signaled = |rig: &Rig<F>| is_signaled(rig.port.link_event().unwrap());
            for round in 0..2 {
                rig.port.link();
                for up in [false, true] {
                    if !up {
                        assert!(rig.device.receive(&frame(1)) && rig.poll().len() == 1);
                    }
                    assert!(!signaled(&rig), "{id}: the link has not changed");
                    rig.device.plug(up, 0);
                    assert!(signaled(&rig), "{id}, up: {up}");
                    assert_eq!(rig.port.link().up, up);
                }
                if round == 0 {
                    rig.pause();
                    assert!(rig.port.link_event().is_none(), "{id}: it is stopped");
                    rig.resume();
                }
            }
            rig.stop();
            assert!(Rig::<F>::standard().port.link_event().is_none(), "nobody has asked for it");
        }
    });
}

pub(crate) fn a_sleeping_queue_passes_changes_of_the_link_on<F: Family>() {
    in_both_modes(|| {
        let config = CONFIG.with_rx_interrupts(true).with_link_interrupt(true);
        let mut rig = Rig::<F>::new(F::STANDARD, config, 512);
        let is_armed = |rig: &mut Rig<F>| rig.rx().arm();
        assert!(is_armed(&mut rig));
        rig.rx().disarm();
        rig.port.link();
        for plugged in [false, true] {
            assert!(is_armed(&mut rig));
            rig.device.plug(plugged, 0);
            assert!(is_signaled(rig.rx().event().unwrap()), "it wakes the lcore");
            rig.rx().disarm();
            assert!(!is_signaled(rig.port.link_event().unwrap()));
            assert!(is_armed(&mut rig));
            assert!(is_signaled(rig.port.link_event().unwrap()), "before it sleeps again, the queue tells");
            assert_eq!(rig.port.link().up, plugged);
            assert!(!is_signaled(rig.rx().event().unwrap()) && !is_signaled(rig.port.link_event().unwrap()));
            rig.rx().disarm();
        }
        assert!(is_armed(&mut rig));
        assert!(rig.device.receive(&frame(1)));
        rig.rx().disarm();
        assert_eq!(rig.poll(), [frame(1)]);
        assert!(is_armed(&mut rig));
        assert!(!is_signaled(rig.port.link_event().unwrap()), "a packet is no change of the link");
        rig.rx().disarm();
        rig.stop();
    });
}

pub(crate) fn flow_control_is_what_the_ends_of_the_link_agreed_on<F: Family>() {
    const PAUSE: u16 = 1 << 10;
    const ASM_DIR: u16 = 1 << 11;
    in_both_modes(|| {
        for id in F::CHIPS {
            let mut rig = Rig::<F>::new(*id, CONFIG, 512);
            let flags = |rig: &Rig<F>| rig.device.register(CTRL) & (CTRL_RFCE | CTRL_TFCE);
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
            rig.restart();
            assert_eq!(flags(&rig), CTRL_RFCE | CTRL_TFCE, "{id}: of a link that was up at the start");
            rig.stop();
        }
    });
}

/// A PAUSE frame to `destination` (IEEE 802.3, 31B.1).
fn pause_frame(destination: MacAddr) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[..6].copy_from_slice(&destination.0);
    frame[12..18].copy_from_slice(&[0x88, 0x08, 0, 1, 0xFF, 0xFF]);
    frame
}

pub(crate) fn pause_frames_are_obeyed_and_never_received<F: Family>() {
    SILICON.set(true);
    for id in F::CHIPS {
        let mut rig = Rig::<F>::new(*id, CONFIG, 512);
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
        // ASF firmware consumes this ARP request if the driver lets it.
        let mut request = vec![0xFF; 60];
        request[12..14].copy_from_slice(&[0x08, 0x06]);
        assert!(rig.device.receive(&request));
        assert_eq!(rig.poll(), [request], "{id}");
        rig.stop();
    }
}
