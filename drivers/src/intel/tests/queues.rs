//! Packets through the rings, and the device's completions, valid or not.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vireo_eal::dma::{Burst, DATA_ROOM, MAX_BURST};

use super::{CONFIG, Family, Rig, SILICON, frame, frames, in_both_modes};
use crate::fakedev::intel::Faults;
use crate::intel::Format;
use crate::port::{Nic, PortConfig, RxBurst, TxBurst};

pub(crate) fn packets_pass_in_order_over_many_turns_of_the_rings<F: Family>() {
    in_both_modes(|| {
        for id in F::CHIPS {
            let mut rig = Rig::<F>::new(*id, PortConfig::with_descriptors(128, 64), 512);
            for round in 0..1000 {
                let wanted = frames(round * 31..round * 31 + 31);
                assert!(wanted.iter().all(|frame| rig.device.receive(frame)));
                let got = rig.poll();
                assert_eq!(got, wanted);
                assert_eq!(rig.send(&got), 31);
                assert_eq!(rig.device.transmitted(), wanted);
            }
            let bytes: u64 = frames(0..31_000).iter().map(|frame| frame.len() as u64).sum();
            let (rx, tx) =
                rig.queues.as_ref().map(|(rx, tx)| (rx.counters().read(), tx.counters().read())).unwrap();
            assert_eq!((rx.packets, rx.bytes, rx.errors, rx.device_errors), (31_000, bytes, 0, 0));
            assert_eq!((tx.packets, tx.bytes, tx.doorbells), (31_000, bytes, 1000));
            rig.stop();
        }
    });
}

pub(crate) fn the_receive_doorbell_rings_once_for_32_packets<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        assert_eq!((rig.device.register(F::RX.tail), rig.device.armed()), (63, 63));
        for number in 0..320 {
            assert!(rig.device.receive(&frame(number)));
            assert_eq!(rig.poll().len(), 1);
        }
        // One doorbell arms the ring at the start.
        assert_eq!(rig.rx_stats().doorbells, 1 + 10);
        let before = rig.rx_stats();
        assert!(rig.poll().is_empty());
        assert_eq!(rig.rx_stats(), before);
        rig.stop();
    });
}

pub(crate) fn a_full_receive_ring_makes_the_device_drop<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        let taken = (0..100).filter(|number| rig.device.receive(&frame(*number))).count();
        assert_eq!(taken, 63);
        for _ in 0..2 {
            rig.port.check().unwrap();
            assert_eq!(rig.missed(), ("rx_missed_errors", 37), "the register clears itself, the sum stays");
        }
        assert_eq!([rig.poll().len(), rig.poll().len(), rig.poll().len()], [32, 31, 0]);
        assert!(rig.device.receive(&frame(0)));
        rig.stop();
    });
}

/// QEMU's 82540EM keeps its counts, even for the next process.
pub(crate) fn a_frame_that_was_dropped_counts_once<F: Family>() {
    in_both_modes(|| {
        for id in F::CHIPS {
            let mut rig = Rig::<F>::new(*id, CONFIG, 512);
            let mut sum = 0;
            for dropped in [37, 36] {
                (0..63 + dropped).for_each(|number| _ = rig.device.receive(&frame(number)));
                rig.pause();
                sum += dropped as u64;
                assert_eq!(rig.missed(), ("rx_missed_errors", sum), "{id}");
                rig.resume();
                rig.port.check().unwrap();
                assert_eq!(rig.missed().1, sum, "{id}");
            }
            rig.stop();
        }
    });
}

pub(crate) fn a_full_transmit_ring_takes_what_fits<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        assert_eq!([0, 32, 64].map(|start| rig.send(&frames(start..start + 32))), [32, 31, 0]);
        assert_eq!(rig.device.transmitted(), frames(0..63));
        // Descriptors 0 to 31 are known to be done. Descriptors 32 to 62 wait for the report of 63.
        assert_eq!(rig.send(&frames(63..95)), 32);
        assert_eq!(rig.device.transmitted(), frames(63..95));
        rig.stop();
    });
}

pub(crate) fn a_device_that_never_completes_tx_gets_one_ring_full<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        rig.device.set_faults(Faults { never_done: true, ..Faults::default() });
        let sent: usize = (0..10).map(|round| rig.send(&frames(round * 20..round * 20 + 20))).sum();
        assert_eq!(sent, 63);
        rig.stop();
    });
}

pub(crate) fn an_empty_pool_is_counted_and_recovered_from<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::new(F::STANDARD, CONFIG, 64 + 10);
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

/// Second word of a descriptor that received a whole frame of `len` bytes.
pub(crate) fn done<F: Family>(len: u64) -> u64 {
    F::Format::RXD_DD | F::Format::RXD_EOP | len << F::Format::RXD_LEN_SHIFT
}

pub(crate) fn lies_about_received_frames_are_dropped_and_counted<F: Family>() {
    let part = |len| done::<F>(len) & !F::Format::RXD_EOP;
    let errors = F::Format::RXD_ERRORS;
    let (first_error, last_error) = (1 << errors.trailing_zeros(), 1 << errors.ilog2());
    in_both_modes(|| {
        // Completions of one frame, and whether they count as an error of the frame or of the device.
        let cases: [(&[u64], bool); 10] = [
            (&[done::<F>(0)], false),
            (&[done::<F>(0xFFFF)], false),
            (&[done::<F>(DATA_ROOM as u64 + 1)], false),
            // A VLAN tag is not a length.
            (&[done::<F>(0) | 60 << 48], false),
            (&[done::<F>(60) | first_error], true),
            (&[done::<F>(60) | last_error], true),
            (&[done::<F>(0) | errors], true),
            (&[part(2048), done::<F>(60)], true),
            (&[part(2048), part(0xFFFF), part(0), done::<F>(0)], true),
            (&[part(0); 33], true),
        ];
        for (words, frame_error) in cases {
            let mut rig = Rig::<F>::standard();
            assert!(rig.device.receive(&frame(1)));
            words.iter().for_each(|word| rig.device.receive_raw(*word));
            if words.last().is_some_and(|word| word & F::Format::RXD_EOP == 0) {
                rig.device.receive_raw(done::<F>(0));
            }
            assert!(rig.device.receive(&frame(2)));
            // A poll ends at the first bad descriptor, and the next poll gets past 32 of them.
            let got = [rig.poll(), rig.poll(), rig.poll()].concat();
            assert_eq!(got, [frame(1), frame(2)], "{words:x?}");
            let stats = rig.rx_stats();
            let wanted = if frame_error { (1, 0, 2) } else { (0, 1, 2) };
            assert_eq!((stats.errors, stats.device_errors, stats.packets), wanted, "{words:x?}");
            // The buffers returned to the device: the ring is as full as before, and each descriptor has its
            // address again.
            for number in 0..200 {
                assert!(rig.device.receive(&frame(number)));
                assert_eq!(rig.poll(), [frame(number)]);
            }
            rig.stop();
        }
    });
}

pub(crate) fn a_device_that_completes_without_end_does_not_hold_the_lcore<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        (0..64 * 3).for_each(|_| rig.device.receive_raw(done::<F>(0)));
        assert!(rig.poll().is_empty());
        // A poll of the rig receives twice, and one descriptor has no buffer.
        assert_eq!(rig.rx_stats().device_errors, 2 * MAX_BURST as u64 - 1);
        rig.stop();
    });
}

pub(crate) fn a_descriptor_that_is_completed_out_of_its_turn_waits_for_it<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        for round in 0..100 {
            rig.device.receive_raw_ahead(1, done::<F>(60));
            assert!(rig.poll().is_empty(), "{round}");
            assert!(rig.device.receive(&frame(round)));
            let got = rig.poll();
            assert_eq!((&got[0], got[1].len(), got.len()), (&frame(round), 60, 2));
            // The device has not reached that descriptor yet, but the driver has passed it.
            rig.restart();
            assert!(rig.device.receive(&frame(round + 1)));
            assert_eq!(rig.poll(), [frame(round + 1)]);
        }
        rig.stop();
    });
}

pub(crate) fn a_port_that_sends_nothing_for_a_second_is_restarted<F: Family>() {
    let mut rig = Rig::<F>::standard();
    rig.device.set_faults(Faults { never_done: true, ..Faults::default() });
    let mut sent = 0;
    let mut check = |rig: &mut Rig<F>| {
        sent += rig.send(&frames(0..32));
        std::thread::sleep(Duration::from_millis(50));
        rig.port.check()
    };
    // Without a link the chip may keep what is queued, and the fault is discarded.
    rig.device.plug(false, 0);
    assert!((0..40).all(|_| check(&mut rig).is_ok()));
    rig.device.plug(true, 0);
    let error = (0..200).find_map(|_| check(&mut rig).err()).unwrap();
    assert!(error.to_string().contains("nothing was sent for a second"), "{error}");
    assert_eq!(sent, 63);
    rig.device.set_faults(Faults::default());
    rig.restart();
    assert_eq!(rig.port.counters().read().tx_sum().unfinished, 63);
    rig.port.check().unwrap();
    assert_eq!(rig.send(&frames(0..32)), 32);
    assert_eq!(rig.device.transmitted(), frames(0..32));
    rig.stop();
}

pub(crate) fn frames_of_several_buffers_are_dropped_whole<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::standard();
        for round in 0..100 {
            assert!(rig.device.receive(&vec![0xEE; 2 * DATA_ROOM + 1 + round]));
            assert!(rig.device.receive(&frame(round)));
            assert_eq!([rig.poll(), rig.poll()].concat(), [frame(round)]);
        }
        assert_eq!(rig.rx_stats().errors, 100);
        rig.stop();
    });
}

/// Steps of [`order_and_number_are_kept`]: number of arriving frames, room in the burst, and whether the
/// device sends.
pub(crate) fn steps() -> impl Strategy<Value = Vec<(usize, usize, bool)>> {
    prop::collection::vec((0_usize..80, 1_usize..=MAX_BURST, any::<bool>()), 1..200)
}

/// For every pattern of bursts, no frame is lost, duplicated or reordered, except those that the wire drops.
pub(crate) fn order_and_number_are_kept<F: Family>(
    steps: Vec<(usize, usize, bool)>,
    silicon: bool,
) -> TestCaseResult {
    SILICON.set(silicon);
    let mut rig = Rig::<F>::standard();
    let (mut number, mut wire, mut queued) = (0, VecDeque::new(), VecDeque::new());
    for (arriving, burst_size, transmit) in steps {
        for _ in 0..arriving {
            if rig.device.receive(&frame(number)) {
                wire.push_back(frame(number));
            }
            number += 1;
        }
        // Occupies the rest of the burst, so that it has room for `burst_size` packets.
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
    Ok(())
}
