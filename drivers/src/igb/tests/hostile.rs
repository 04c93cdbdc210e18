//! What a device may say of frames that are none.

use std::time::Duration;

use super::*;

const DONE: u64 = RXD_DD | RXD_EOP;

/// Length `len` in the second word of a descriptor.
const fn length(len: u64) -> u64 {
    len << RXD_LEN_SHIFT
}

#[test]
fn lies_about_received_frames_are_dropped_and_counted() {
    in_both_modes(|| {
        // Completions of one frame, whether it is the frame's fault or the device's.
        let cases: [(&[u64], bool); 10] = [
            (&[DONE], false),
            (&[DONE | length(0xFFFF)], false),
            (&[DONE | length(DATA_ROOM as u64 + 1)], false),
            // A VLAN tag is no length.
            (&[DONE | 60 << 48], false),
            (&[DONE | length(60) | 1 << 24], true),
            (&[DONE | length(60) | 1 << 31], true),
            (&[DONE | RXD_ERRORS], true),
            (&[RXD_DD | length(2048), DONE | length(60)], true),
            (&[RXD_DD | length(2048), RXD_DD | length(0xFFFF), RXD_DD, DONE], true),
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
            // The buffers went back to the device: the ring is as full as before, and each descriptor has its address again.
            for number in 0..200 {
                assert!(rig.device.receive(&frame(number)));
                assert_eq!(rig.poll(), [frame(number)]);
            }
            rig.stop();
        }
    });
}

#[test]
fn what_else_the_chip_says_of_a_frame_is_no_error() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        // Wrong IP and TCP checksums, all of the status that is not DD and EOP, and a VLAN tag.
        rig.device.receive_raw(DONE | length(60) | 0x60 << 24 | 0xF_FFFC | 0xABCD << 48);
        assert_eq!(rig.poll().len(), 1);
        assert_eq!(rig.rx_stats().bytes, 60);
        rig.stop();
    });
}

#[test]
fn a_device_that_completes_without_end_does_not_hold_the_lcore() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        (0..64 * 3).for_each(|_| rig.device.receive_raw(DONE));
        assert!(rig.poll().is_empty());
        // A poll of the rig receives twice, and one descriptor has no buffer.
        assert_eq!(rig.rx_stats().device_errors, 2 * MAX_BURST as u64 - 1);
        rig.stop();
    });
}

#[test]
fn a_descriptor_that_is_completed_out_of_its_turn_waits_for_it() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        for round in 0..100 {
            rig.device.receive_raw_ahead(1, DONE | length(60));
            assert!(rig.poll().is_empty(), "{round}");
            assert!(rig.device.receive(&frame(round)));
            let got = rig.poll();
            assert_eq!((&got[0], got[1].len(), got.len()), (&frame(round), 60, 2));
            // That descriptor's turn is yet to come for the device, and over for the driver.
            rig.restart();
            assert!(rig.device.receive(&frame(round + 1)));
            assert_eq!(rig.poll(), [frame(round + 1)]);
        }
        rig.stop();
    });
}

#[test]
fn a_port_that_sends_nothing_for_a_second_is_restarted() {
    let mut rig = Rig::standard();
    rig.device.set_faults(Faults { never_done: true, ..Faults::default() });
    let mut sent = 0;
    let mut check = |rig: &mut Rig| {
        sent += rig.send(&frames(0..32));
        std::thread::sleep(Duration::from_millis(50));
        rig.port.check()
    };
    // Without a link the chip may keep what it has; the reason is gone with it.
    rig.device.plug(false, 0);
    assert!((0..40).all(|_| check(&mut rig).is_ok()));
    rig.device.plug(true, 0);
    let error = (0..200).find_map(|_| check(&mut rig).err()).unwrap();
    assert!(error.to_string().contains("nothing was sent for a second"), "{error}");
    assert_eq!(sent, 63);
    rig.device.set_faults(Faults::default());
    rig.restart();
    assert_eq!(rig.port.leftover().tx_unfinished, 63);
    rig.port.check().unwrap();
    assert_eq!(rig.send(&frames(0..32)), 32);
    assert_eq!(rig.device.transmitted(), frames(0..32));
    rig.stop();
}

#[test]
fn frames_of_several_buffers_are_dropped_whole() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        for round in 0..100 {
            assert!(rig.device.receive(&vec![0xEE; 2 * DATA_ROOM + 1 + round]));
            assert!(rig.device.receive(&frame(round)));
            assert_eq!([rig.poll(), rig.poll()].concat(), [frame(round)]);
        }
        assert_eq!(rig.rx_stats().errors, 100);
        rig.stop();
    });
}
