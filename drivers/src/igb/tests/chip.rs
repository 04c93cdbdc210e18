//! Set-up, reset, PHY and link.

use super::*;

#[test]
fn start_brings_up_what_the_manual_asks_for() {
    in_both_modes(|| {
        let rig = Rig::standard();
        let of = |register| rig.device.register(register);
        assert_eq!(of(RCTL), RCTL_EN | RCTL_BAM | RCTL_DPF | RCTL_SECRC);
        assert_eq!(of(TCTL), 0xA400_00FA, "EN and PSP, and the rest as it was");
        assert_eq!((of(RDLEN), of(TDLEN), of(RDT), of(TDT)), (1024, 1024, 63, 0));
        assert_eq!(of(SRRCTL), 0x0200_0002, "advanced, one buffer of 2 KiB, no Drop_En");
        assert_eq!((of(RXDCTL), of(TXDCTL)), (0x0200_0108, 0x0200_0108));
        assert_eq!((of(MRQC), of(VT_CTL), of(RXCSUM)), (0, 0, 0));
        assert_eq!(of(CTRL) & (CTRL_SLU | CTRL_FRCSPD | CTRL_FRCDPX | CTRL_GIO_MASTER_DISABLE), CTRL_SLU);
        assert_eq!(of(CTRL_EXT) & CTRL_EXT_DRV_LOAD, CTRL_EXT_DRV_LOAD);
        assert_eq!((of(FCRTH), of(FCRTL)), (0xE660, 0xE650 | FCRTL_XONE));
        assert!(rig.device.config().bus_master());
        assert_eq!(rig.port.mac(), MAC);
        assert_eq!(rig.port.link(), Link { up: true, speed: Some(1000), full_duplex: true, autoneg: true });
        let mut command = [0; 2];
        rig.device.config().read(4, &mut command);
        assert_ne!(command[1] & 1 << 2, 0, "an interrupt line that nobody serves stays silent");
        rig.stop();
    });
}

#[test]
fn the_chips_get_what_is_theirs() {
    in_both_modes(|| {
        // GCR sends requests again and has no timeout; PHPM cuts the link.
        for (id, gcr, control2, phpm) in [(ID_82576, 1 << 18, 5, 1 << 5), (ID_I350, 5 << 16, 0, 0)] {
            let rig = Rig::new(id, CONFIG, 512);
            let mut word = [0; 2];
            rig.device.config().read(0x40 + 0x28, &mut word);
            let got = (rig.device.register(GCR), u16::from_le_bytes(word), rig.device.register(PHPM));
            assert_eq!(got, (gcr, control2, phpm), "{id}");
            rig.stop();
        }
        // A chip with the first version of the capability has its timeout in GCR.
        let mut rig = Rig::standard();
        let (rx, tx) = rig.queues.take().unwrap();
        rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
        rig.device.set_register(GCR, 1 << 16);
        rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
        assert_eq!(rig.device.register(GCR), 1 << 12);
        rig.stop();
    });
}

#[test]
fn a_reset_is_survived_and_begins_anew() {
    in_both_modes(|| {
        for id in IDS_OF_CHIPS {
            let mut rig = Rig::new(id, CONFIG, 512);
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

#[test]
fn a_chip_that_hangs_in_its_reset_is_reset_by_the_function() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.device.set_faults(Faults { reset_hangs: true, ..Faults::default() });
        rig.restart();
        assert!(rig.device.receive(&frame(1)));
        assert_eq!(rig.poll(), [frame(1)]);
        rig.stop();
    });
}

#[test]
fn a_device_that_does_not_answer_is_refused() {
    for (faults, why) in [
        (Faults { gone: true, ..Faults::default() }, "all ones"),
        (Faults { reset_hangs: true, no_function_reset: true, ..Faults::default() }, "for a second"),
        (Faults { no_address: true, ..Faults::default() }, "for a second"),
    ] {
        let (function, device) = fake(ID_82576, MAC);
        device.set_faults(faults);
        let error = Device::probe(function).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("0000:00:03.0"), "{error}");
        assert!(!device.config().bus_master());
    }
    let (function, _) = fake(DeviceId { vendor: 0x8086, device: 0x10CA }, MAC);
    assert_eq!(Device::probe(function).unwrap_err().kind(), ErrorKind::Unavailable);
    let (function, _) = fake(ID_82576, MacAddr([0x53, 0, 0, 0, 0, 1]));
    assert!(Device::probe(function).unwrap_err().to_string().contains("no address of a station"));
}

#[test]
fn a_queue_that_does_not_start_gives_its_buffers_back() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        let (rx, tx) = rig.queues.take().unwrap();
        rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
        rig.device.set_faults(Faults { never_enabled: true, ..Faults::default() });
        let error = rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap_err().to_string();
        assert!(error.contains("register 0xc028 stays"), "{error}");
        assert!(!rig.device.config().bus_master());
        rig.device.set_faults(Faults::default());
        rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
        rig.stop();
    });
}

#[test]
fn a_sleeping_phy_is_woken() {
    in_both_modes(|| {
        let (function, device) = fake(ID_82576, MAC);
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

/// Whoever has the semaphore or the PHY is a process that was killed: nobody else uses this port.
#[test]
fn what_a_killed_process_held_is_taken_back() {
    const PORT_1: u32 = SW_FW_SYNC_PHY[1];
    in_both_modes(|| {
        for (swsm, sync) in [(SWSM_SMBI, 0), (SWSM_SMBI | SWSM_SWESMBI, PORT_1), (0, PORT_1 | 1 << 1)] {
            let (function, device) = fake(ID_82576, MAC);
            let (memory, pool) = memory(128);
            device.sleep_phy();
            let mut port = Device::probe(function).unwrap();
            device.set_register(SWSM, swsm);
            device.set_register(SW_FW_SYNC, sync);
            // The probe does, of a function whose reset leaves them as they are.
            port.chip.disown_phy(&port.hardware);
            let mut cache = pool.cache();
            let (rx, tx) = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
            assert!(port.link().up, "{swsm:#x} {sync:#x}");
            // Another port's PHY stays its own.
            assert_eq!(device.register(SW_FW_SYNC), sync & !PORT_1);
            assert_eq!(device.register(SWSM) & (SWSM_SMBI | SWSM_SWESMBI), 0);
            port.stop_pair(rx, tx, &mut cache).unwrap();
        }
    });
}

#[test]
fn firmware_that_keeps_the_phy_leaves_the_port_without_flow_control() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.device.plug(false, 0);
        rig.port.check().unwrap();
        rig.device.set_register(SW_FW_SYNC, SW_FW_SYNC_PHY[1] << SW_FW_SYNC_FIRMWARE_SHIFT);
        rig.device.plug(true, PHY_PAUSE);
        rig.port.check().unwrap();
        assert_eq!(rig.device.register(CTRL) & (CTRL_RFCE | CTRL_TFCE), 0);
        rig.stop();
    });
}

#[test]
fn flow_control_is_what_the_ends_of_the_link_agreed_on() {
    in_both_modes(|| {
        for id in IDS_OF_CHIPS {
            let mut rig = Rig::new(id, CONFIG, 512);
            let flags = |rig: &Rig| rig.device.register(CTRL) & (CTRL_RFCE | CTRL_TFCE);
            assert_eq!(flags(&rig), 0, "{id}: the partner knows no PAUSE");
            for (partner, wanted) in [
                (PHY_PAUSE, CTRL_RFCE | CTRL_TFCE),
                (PHY_ASM_DIR, CTRL_RFCE),
                (0, 0),
                (PHY_PAUSE, CTRL_RFCE | CTRL_TFCE),
            ] {
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

#[test]
fn pause_frames_are_obeyed_and_never_received() {
    const PAUSE_ADDRESS: MacAddr = MacAddr([0x01, 0x80, 0xC2, 0, 0, 1]);
    SILICON.set(true);
    let pause_frame = |destination: MacAddr| {
        let mut frame = vec![0; 60];
        frame[..6].copy_from_slice(&destination.0);
        frame[12..18].copy_from_slice(&[0x88, 0x08, 0, 1, 0xFF, 0xFF]);
        frame
    };
    let mut rig = Rig::standard();
    for promiscuous in [false, true] {
        rig.port.set_promiscuous(promiscuous).unwrap();
        for destination in [PAUSE_ADDRESS, MAC] {
            assert!(rig.device.receive(&pause_frame(destination)));
            assert!(rig.poll().is_empty(), "{promiscuous}, {destination}");
        }
    }
    assert_eq!(rig.device.pauses(), 0);
    rig.device.plug(false, 0);
    assert!(!rig.port.link().up);
    rig.device.plug(true, PHY_PAUSE);
    assert!(rig.port.link().up);
    assert!(rig.device.receive(&pause_frame(PAUSE_ADDRESS)));
    assert_eq!(rig.device.pauses(), 1);
    rig.stop();
}

#[test]
fn short_frames_are_padded_where_the_chip_does_not_do_it() {
    in_both_modes(|| {
        // QEMU's does not pad at all, and a chip only from 17 bytes on.
        for (pads, len, padded) in
            [(false, 17, if SILICON.get() { 60 } else { 17 }), (false, 16, 16), (true, 1, 60), (true, 17, 60)]
        {
            let mut rig = Rig::standard();
            if pads {
                rig.port.pad_short_frames();
                rig.restart();
            }
            for number in 0..100 {
                // What was in the buffers before must not leave.
                assert!(rig.device.receive(&[0xEE; 60]));
                let mut burst = Burst::new();
                rig.receive(&mut burst);
                let packet = burst.pop().unwrap();
                let mut packet = packet.with_len(len);
                rig.cache.write(&mut packet, 0, &vec![number; len]);
                burst.push(packet);
                let (_, tx) = rig.queues.as_mut().unwrap();
                assert_eq!(tx.tx_burst(&mut rig.cache, &mut burst), 1);
                let mut wanted = vec![number; len];
                wanted.resize(padded, 0);
                assert_eq!(rig.device.transmitted(), [wanted], "{pads} {len}");
            }
            rig.stop();
        }
    });
}

#[test]
fn a_frame_that_was_dropped_counts_once() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        for dropped in [37, 36] {
            (0..63 + dropped).for_each(|number| _ = rig.device.receive(&frame(number)));
            let (rx, tx) = rig.queues.take().unwrap();
            rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
            assert_eq!(rig.port.device_drops()[0], ("rx_missed_errors", dropped as u64));
            rig.queues = Some(rig.port.start_pair(&CONFIG, &rig.memory, &mut rig.cache).unwrap());
            assert_eq!(rig.port.device_drops()[0].1, 0);
        }
        rig.stop();
    });
}

#[test]
fn rings_of_every_size_have_room_in_what_the_driver_asks_for() {
    in_both_modes(|| {
        for entries in [64, 1024, 4096] {
            let config = PortConfig::with_descriptors(entries, entries);
            let (function, device) = fake(ID_82576, MAC);
            let mut port = Device::probe(function).unwrap();
            let [bytes, read_only] = (port.capabilities().ring_bytes)(&config);
            let buffers = u32::from(entries) + 64;
            let region = Region::new(Pool::bytes(buffers) + bytes + read_only, Backing::SmallPages).unwrap();
            let memory = DmaMemory::map(region, &[]).unwrap();
            let pool = Pool::new(&memory, buffers).unwrap();
            let mut cache = pool.cache();
            let (rx, tx) = port.start_pair(&config, &memory, &mut cache).unwrap();
            for base in [RDBAL, TDBAL] {
                assert_eq!(device.register(base) % 128, 0);
            }
            port.stop_pair(rx, tx, &mut cache).unwrap();
        }
    });
}
