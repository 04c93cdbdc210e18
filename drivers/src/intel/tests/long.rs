//! Frames that span several descriptors, on ports that were started for them.

use std::collections::VecDeque;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vireo_eal::dma::{Burst, DATA_ROOM, MAX_BURST, MAX_SEGMENTS};

use super::{CONFIG, Family, Rig, SILICON, done, frame as short, in_both_modes};
use crate::fakedev::intel::Faults;
use crate::frames::tests::{append, frame, take};
use crate::intel::Format;
use crate::intel::regs::{RCTL, RCTL_BSIZE_1024, RCTL_LPE};
use crate::port::{Nic, PortConfig, RxBurst, TxBurst};

const LONGEST: usize = 9000;
const LONG: PortConfig = CONFIG.with_max_frame(LONGEST);

impl<F: Family> Rig<F> {
    /// Receives one burst and returns its frames.
    fn poll_frames(&mut self) -> Vec<Vec<u8>> {
        let mut burst = Burst::new();
        let (rx, _) = self.queues.as_mut().unwrap();
        rx.rx_burst(&mut self.cache, &mut burst);
        take(&mut burst, &mut self.cache)
    }

    /// Sends frames in segments of `each` bytes. Returns the number of frames that were not sent.
    fn send_frames(&mut self, frames: &[Vec<u8>], each: usize) -> usize {
        let mut burst = Burst::new();
        frames.iter().for_each(|frame| append(&mut burst, &mut self.cache, frame, each));
        let before = burst.len();
        let sent = self.queues.as_mut().unwrap().1.tx_burst(&mut self.cache, &mut burst);
        assert_eq!(sent, before - burst.len());
        take(&mut burst, &mut self.cache).len()
    }
}

pub(crate) fn long_frames_pass_between_short_ones<F: Family>() {
    in_both_modes(|| {
        for id in F::KINDS {
            let mut rig = Rig::<F>::new(*id, LONG, 512);
            rig.port.set_promiscuous(true).unwrap();
            let rctl = rig.device.register(RCTL);
            assert_eq!(rctl & (RCTL_LPE | RCTL_BSIZE_1024 | 3 << 16), RCTL_LPE | RCTL_BSIZE_1024);
            let lens = [60, 9000, 1024, 1025, 2048, 61, 1514, 5000];
            let mut bytes = 0;
            for round in 0..400 {
                let frames: Vec<_> =
                    (0..round % 5 + 1).map(|i| frame(round + i, lens[(round + i) % 8])).collect();
                bytes += frames.iter().map(|frame| frame.len() as u64).sum::<u64>();
                assert!(frames.iter().all(|frame| rig.device.receive(frame)), "{id} {round}");
                let mut got = Vec::new();
                while got.len() < frames.len() {
                    let more = rig.poll_frames();
                    assert!(!more.is_empty(), "{id} {round}");
                    got.extend(more);
                }
                assert_eq!(got, frames);
                for frame in &frames {
                    assert_eq!(rig.send_frames(std::slice::from_ref(frame), [1024, DATA_ROOM][round % 2]), 0);
                }
                assert_eq!(rig.device.transmitted(), frames, "{id} {round}");
            }
            let (rx, tx) =
                rig.queues.as_ref().map(|(rx, tx)| (rx.counters().read(), tx.counters().read())).unwrap();
            assert_eq!((rx.packets, rx.bytes, rx.errors, rx.device_errors), (1200, bytes, 0, 0));
            assert_eq!((tx.packets, tx.bytes, tx.errors), (1200, bytes, 0));
            rig.stop();
        }
    });
}

/// A frame is not received before its last descriptor is completed, nor while the burst has no room for it.
pub(crate) fn a_frame_waits_for_its_end_and_for_room<F: Family>() {
    let part = done::<F>(1024) & !F::Format::RXD_EOP;
    in_both_modes(|| {
        let mut rig = Rig::<F>::new(F::STANDARD, LONG, 512);
        for round in 0..100 {
            for _ in 0..3 {
                rig.device.receive_raw(part);
                assert!(rig.poll_frames().is_empty());
            }
            rig.device.receive_raw(done::<F>(100));
            let mut burst: Burst = (0..MAX_BURST - 3).map(|_| rig.cache.allocate().unwrap()).collect();
            let rx = &mut rig.queues.as_mut().unwrap().0;
            rx.rx_burst(&mut rig.cache, &mut burst);
            assert_eq!(burst.len(), MAX_BURST - 3, "{round}");
            burst.drain(..).for_each(|packet| rig.cache.free(packet));
            assert_eq!(rig.poll_frames().concat().len(), 3 * 1024 + 100);
        }
        assert_eq!(
            (rig.rx_stats().packets, rig.rx_stats().errors, rig.rx_stats().device_errors),
            (100, 0, 0)
        );
        rig.stop();
    });
}

pub(crate) fn lies_about_long_frames_are_dropped_and_counted<F: Family>() {
    let part = |len| done::<F>(len) & !F::Format::RXD_EOP;
    let error = 1 << F::Format::RXD_ERRORS.trailing_zeros();
    in_both_modes(|| {
        // Completions of one frame, and whether they count as an error of the frame or of the device.
        let too_long = [&[part(1024); 8][..], &[done::<F>(809)]].concat();
        let endless = vec![part(1024); 40];
        let cases: [(&[u64], bool); 9] = [
            (&[part(1024), done::<F>(0)], false),
            (&[part(1024), done::<F>(1025)], false),
            (&[part(1023), done::<F>(60)], false),
            (&[part(1025), done::<F>(60)], false),
            (&[part(0), done::<F>(60)], false),
            (&[part(1024), part(0xFFFF), part(0), done::<F>(60)], false),
            (&[part(1024), done::<F>(60) | error], true),
            (&too_long, true),
            (&endless, true),
        ];
        for (words, frame_error) in cases {
            let mut rig = Rig::<F>::new(F::STANDARD, LONG, 512);
            assert!(rig.device.receive(&short(1)));
            words.iter().for_each(|word| rig.device.receive_raw(*word));
            if words.last().is_some_and(|word| word & F::Format::RXD_EOP == 0) {
                rig.device.receive_raw(done::<F>(60));
            }
            assert!(rig.device.receive(&frame(2, 3000)));
            let got: Vec<_> = (0..5).flat_map(|_| rig.poll_frames()).collect();
            assert_eq!(got, [short(1), frame(2, 3000)], "{words:x?}");
            let stats = rig.rx_stats();
            let wanted = if frame_error { (1, 0, 2) } else { (0, 1, 2) };
            assert_eq!((stats.errors, stats.device_errors, stats.packets), wanted, "{words:x?}");
            for number in 0..100 {
                assert!(rig.device.receive(&frame(number, LONGEST)));
                assert_eq!(rig.poll_frames(), [frame(number, LONGEST)]);
            }
            rig.stop();
        }
    });
}

pub(crate) fn a_full_transmit_ring_keeps_whole_frames<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::new(F::STANDARD, LONG, 512);
        let frames: Vec<_> = (0..12).map(|number| frame(number, LONGEST)).collect();
        // Each frame has five segments, so twelve frames take 60 of 63 descriptors.
        frames.chunks(6).for_each(|six| assert_eq!(rig.send_frames(six, DATA_ROOM), 0));
        assert_eq!(rig.send_frames(&[short(3), frame(4, 3000), short(5)], DATA_ROOM), 1);
        assert_eq!(rig.send_frames(&[short(3)], DATA_ROOM), 1);
        assert_eq!(rig.device.transmitted(), [&frames[..], &[short(3), frame(4, 3000)]].concat());
        rig.stop();
    });
}

pub(crate) fn frames_that_no_fifo_holds_are_not_sent<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::new(F::STANDARD, LONG, 512);
        let frames = [frame(1, LONGEST + 1), short(2), frame(3, 10 * (MAX_SEGMENTS + 1))];
        assert_eq!((rig.send_frames(&frames[..2], DATA_ROOM), rig.send_frames(&frames[2..], 10)), (0, 0));
        assert_eq!(rig.device.transmitted(), frames[1..2]);
        let tx = rig.queues.as_ref().unwrap().1.counters().read();
        assert_eq!((tx.packets, tx.errors), (1, 2));
        // A segment is padded only if it is the whole frame.
        rig.port.pad_short_frames();
        let (rx, tx) = rig.queues.take().unwrap();
        rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap();
        rig.queues = Some(rig.port.start_pair(&LONG, &rig.memory, &mut rig.cache).unwrap());
        assert_eq!(rig.send_frames(&[vec![7; 20], frame(1, 1030)], 1024), 0);
        assert_eq!(rig.device.transmitted(), [[[7; 20].as_slice(), &[0; 40]].concat(), frame(1, 1030)]);
        // Without segments, a burst takes another path.
        assert_eq!(rig.send_frames(&[vec![8; 20], short(2)], 1024), 0);
        assert_eq!(rig.device.transmitted(), [[[8; 20].as_slice(), &[0; 40]].concat(), short(2)]);
        rig.stop();
    });
}

pub(crate) fn a_device_that_reports_nothing_gets_one_ring_full_of_segments<F: Family>() {
    in_both_modes(|| {
        let mut rig = Rig::<F>::new(F::STANDARD, LONG, 512);
        rig.device.set_faults(Faults { never_done: true, ..Faults::default() });
        let left: usize =
            (0..10).map(|number| rig.send_frames(&vec![frame(number, 4000); 5], DATA_ROOM)).sum();
        assert_eq!((left, rig.queues.as_ref().unwrap().1.counters().read().packets), (50 - 21, 21));
        rig.stop();
    });
}

pub(crate) fn frames_beyond_what_the_chip_takes_are_refused<F: Family>() {
    let mut rig = Rig::<F>::standard();
    let most = rig.port.capabilities().max_frame;
    rig.pause();
    let mut start = |max_frame| {
        let started = rig.port.start_pair(&CONFIG.with_max_frame(max_frame), &rig.memory, &mut rig.cache);
        started.map(|(rx, tx)| rig.port.stop_pair(rx, tx, &mut rig.cache).unwrap())
    };
    start(most).unwrap();
    let error = start(most + 1).unwrap_err().to_string();
    assert!(error.contains(&format!("it takes at most {most}")), "{error}");
    // A start for short frames restores the standard receive settings.
    rig.resume();
    assert_eq!(rig.device.register(RCTL) & (RCTL_LPE | 3 << 16), 0);
    rig.stop();
}

/// Steps of [`lengths_are_kept`]: lengths of arriving frames, and whether the device sends.
pub(crate) fn long_steps() -> impl Strategy<Value = Vec<(Vec<usize>, bool)>> {
    prop::collection::vec((prop::collection::vec(60..=LONGEST, 0..8), any::<bool>()), 1..100)
}

/// No frame is lost, duplicated, cut or reordered, except those that the wire drops or that find no
/// descriptor.
pub(crate) fn lengths_are_kept<F: Family>(steps: Vec<(Vec<usize>, bool)>, silicon: bool) -> TestCaseResult {
    SILICON.set(silicon);
    let mut rig = Rig::<F>::new(F::STANDARD, LONG, 512);
    let (mut number, mut wire, mut queued) = (0, VecDeque::new(), VecDeque::new());
    for (lens, transmit) in steps {
        for len in lens {
            if rig.device.receive(&frame(number, len)) {
                wire.push_back(frame(number, len));
            }
            number += 1;
        }
        let got = rig.poll_frames();
        prop_assert!(!got.is_empty() || wire.is_empty());
        prop_assert_eq!(&got, &wire.drain(..got.len()).collect::<Vec<_>>());
        // The segments differ from those in which the frames were received.
        let left = rig.send_frames(&got, DATA_ROOM);
        queued.extend(got.iter().take(got.len() - left).cloned());
        if transmit {
            prop_assert_eq!(rig.device.transmitted(), queued.drain(..).collect::<Vec<_>>());
        }
    }
    prop_assert_eq!(rig.device.transmitted(), queued.into_iter().collect::<Vec<_>>());
    rig.stop();
    Ok(())
}
