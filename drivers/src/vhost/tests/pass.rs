//! Tests of frames that pass from one frontend to another in one copy.

use super::hostile::{LIES, offer_lie};
use super::*;
use crate::tied::Polled;

const ADDRESSES: [u8; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

/// Two ports, and their guests: frames pass from the first to the second.
struct Pair {
    ports: [Bench; 2],
    guests: [Guest; 2],
}

impl Pair {
    fn new(features: Features) -> Self {
        let [(one, first), (other, mut second)] = [Bench::with(features), Bench::with(features)];
        second.provide_all();
        Self { ports: [one, other], guests: [first, second] }
    }

    fn pass(&mut self, addresses: Option<[u8; 12]>) -> Polled {
        let [from, to] = &mut self.ports;
        from.rx.pass(&mut to.tx, addresses)
    }

    /// Polls as a lane does, until nothing more happens, and returns the number of polls on the general path.
    fn poll(&mut self) -> usize {
        let (mut burst, mut odd) = (Burst::new(), 0);
        for _ in 0..10 {
            if self.pass(None) != Polled::Odd {
                continue;
            }
            odd += 1;
            let [from, to] = &mut self.ports;
            from.rx.rx_burst(&mut from.cache, &mut burst);
            let frames: Vec<_> = burst.iter().map(|packet| from.bytes(packet)).collect();
            burst.drain(..).for_each(|packet| from.cache.free(packet));
            to.send(&frames);
        }
        odd
    }

    /// Packets, bytes and errors of a queue.
    fn counts(counters: &crate::counters::QueueCounters) -> (u64, u64, u64) {
        (counters.packets.get(), counters.bytes.get(), counters.errors.get())
    }

    fn stop(self) {
        let Self { ports, guests } = self;
        assert_eq!(ports.map(Bench::stop), [BUFFERS; 2]);
        drop(guests);
    }
}

/// A frame that is long enough to pass.
fn long(number: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; 1024 + number * 37 % 800];
    frame[..8].copy_from_slice(&number.to_le_bytes());
    frame
}

#[test]
fn long_frames_pass_whole_and_in_order_with_new_addresses() {
    for (features, addresses) in
        [(PLAIN, None), (ALL, None), (PLAIN, Some(ADDRESSES)), (ALL, Some(ADDRESSES))]
    {
        let mut pair = Pair::new(features);
        let (mut number, mut bytes) = (0, 0);
        while number < 500 {
            let mut group: Vec<Vec<u8>> = (number..number + 1 + number % MAX_BURST).map(long).collect();
            group.iter().for_each(|frame| pair.guests[0].transmit(frame));
            assert_eq!(pair.pass(addresses), Polled::Busy);
            assert_eq!(pair.guests[0].reap_transmitted(), group.len());
            group.iter_mut().for_each(|frame| {
                if let Some(addresses) = addresses {
                    frame[..12].copy_from_slice(&addresses);
                }
            });
            assert_eq!(pair.guests[1].received(), group);
            assert!(pair.guests[1].last_num_buffers.iter().all(|buffers| *buffers == 1));
            number += group.len();
            bytes += group.iter().map(Vec::len).sum::<usize>();
        }
        let [from, to] = &pair.ports;
        let wanted = (number as u64, bytes as u64, 0);
        assert_eq!([from.rx.counters(), to.tx.counters()].map(Pair::counts), [wanted; 2]);
        pair.stop();
    }
}

/// Frontends that sleep are woken once per burst, or when no more frames come.
#[test]
fn frames_that_come_one_by_one_share_a_call() {
    let calls = |pair: &Pair| [pair.guests[0].take_call(TRANSMIT), pair.guests[1].take_call(RECEIVE)];
    let mut pair = Pair::new(PLAIN);
    pair.guests.iter().for_each(Guest::clear_calls);
    let transmit = |pair: &mut Pair, number: usize| {
        pair.guests[0].transmit(&long(number));
        assert_eq!(pair.pass(None), Polled::Busy);
    };
    for number in 1..MAX_BURST {
        transmit(&mut pair, number);
        assert_eq!(calls(&pair), [false; 2], "{number}");
    }
    transmit(&mut pair, MAX_BURST);
    assert_eq!(calls(&pair), [true; 2]);
    assert_eq!((pair.pass(None), calls(&pair)), (Polled::Idle, [false; 2]));
    pair.guests[1].received();
    transmit(&mut pair, 1);
    assert_eq!((pair.pass(None), calls(&pair)), (Polled::Busy, [true; 2]), "no more came");
    assert_eq!(pair.pass(None), Polled::Idle);
    // Also before what cannot pass, and when the lane ends.
    transmit(&mut pair, 2);
    pair.guests[0].transmit(&frame(0));
    assert_eq!((pair.pass(None), calls(&pair)), (Polled::Odd, [true; 2]));
    assert_eq!(pair.ports[0].receive().len(), 1);
    pair.guests.iter().for_each(Guest::clear_calls);
    transmit(&mut pair, 3);
    let [from, to] = &mut pair.ports;
    from.rx.wake(&mut to.tx);
    assert_eq!(calls(&pair), [true; 2]);
    pair.stop();
}

/// What cannot pass takes the general path, and what follows passes again.
#[test]
fn odd_frames_and_odd_buffers_keep_their_place() {
    for features in [PLAIN, ALL] {
        let mut pair = Pair::new(features);
        for round in 0..3 {
            let numbers = 8 * round..8 * round + 8;
            let frames: Vec<_> = numbers.map(|i| if i % 8 == 5 { frame(0) } else { long(i) }).collect();
            for (i, frame) in frames.iter().enumerate() {
                // Linux without VIRTIO_F_ANY_LAYOUT has a descriptor for the header.
                let cuts: &[usize] = if i == 3 { &[HEADER] } else { &[] };
                pair.guests[0].transmit_chain(frame, cuts);
            }
            assert!(pair.poll() > 0);
            assert_eq!(pair.guests[1].received(), frames);
            assert_eq!(pair.guests[0].reap_transmitted(), frames.len());
        }
        pair.stop();
        // A buffer of two descriptors.
        let [(mut from, mut sender), (mut to, mut receiver)] = [Bench::with(features), Bench::with(features)];
        receiver.provide(&[64, BUFFER as u32]);
        receiver.provide(&[BUFFER as u32]);
        [1, 2].iter().for_each(|number| sender.transmit(&long(*number)));
        assert_eq!(from.rx.pass(&mut to.tx, None), Polled::Odd);
        assert!(receiver.received().is_empty() && sender.reap_transmitted() == 0, "nothing has moved");
        let frames = from.receive();
        assert_eq!(to.send(&frames), 2);
        assert_eq!(receiver.received(), [long(1), long(2)]);
    }
}

/// Without room, frames are received and dropped, as from any port, and the frontend that transmits does not wait.
#[test]
fn a_frontend_that_takes_nothing_does_not_stop_the_other() {
    let [(mut from, mut sender), (mut to, mut receiver)] = [Bench::with(ALL), Bench::with(ALL)];
    receiver.provide(&[BUFFER as u32]);
    receiver.provide(&[BUFFER as u32]);
    (0..3).for_each(|number| sender.transmit(&long(number)));
    assert_eq!(from.rx.pass(&mut to.tx, None), Polled::Busy);
    assert_eq!((sender.reap_transmitted(), receiver.received().len()), (2, 2));
    // `received` offers buffers only to a device that still has some.
    assert_eq!(from.rx.pass(&mut to.tx, None), Polled::Odd);
    let frames = from.receive();
    assert_eq!((frames.len(), to.send(&frames)), (1, 0));
}

/// Rings that stop, are disabled, or whose frontend misbehaves are left to the general path, which ends them.
#[test]
fn only_running_rings_pass() {
    let (mut pair, mut burst) = (Pair::new(ALL), Burst::new());
    pair.guests[0].transmit(&long(1));
    for (guest, ring) in [(0, TRANSMIT), (1, RECEIVE)] {
        pair.guests[guest].enable(ring, false);
        assert_eq!(pair.pass(None), Polled::Odd);
        pair.guests[guest].enable(ring, true);
    }
    pair.guests[1].rings[RECEIVE].avail_idx += SIZE + 1;
    pair.guests[1].rings[RECEIVE].publish();
    assert_eq!(pair.pass(None), Polled::Odd);
    let to = &mut pair.ports[1];
    to.send(&[frame(2)]);
    assert_eq!(to.tx.counters().device_errors.get(), 1);
    pair.guests[0].rings[TRANSMIT].avail_idx += SIZE + 1;
    pair.guests[0].rings[TRANSMIT].publish();
    assert_eq!(pair.pass(None), Polled::Odd);
    let from = &mut pair.ports[0];
    from.rx.rx_burst(&mut from.cache, &mut burst);
    assert_eq!((from.rx.counters().device_errors.get(), burst.len()), (1, 0));
}

#[test]
fn chains_that_no_frontend_may_offer_do_not_pass() {
    for (table, why) in LIES {
        for ring in [TRANSMIT, RECEIVE] {
            let [(mut from, mut sender), (mut to, mut receiver)] = [Bench::with(ALL), Bench::with(ALL)];
            if ring == TRANSMIT {
                receiver.provide_all();
                offer_lie(&mut sender, ring, table);
            } else {
                [1, 2].iter().for_each(|number| sender.transmit(&long(*number)));
                offer_lie(&mut receiver, ring, table);
            }
            // The chain before it passes.
            let polls = [0; 2].map(|_| from.rx.pass(&mut to.tx, None));
            assert_eq!(polls, [Polled::Busy, Polled::Odd], "{why}");
            assert_eq!((sender.reap_transmitted(), receiver.received().len()), (1, 1), "{why}");
        }
    }
}

/// A ring may be disabled, and a migration may begin, between two polls.
#[test]
fn a_frontend_is_woken_whatever_its_ring_has_become() {
    let mut pair = Pair::new(PLAIN);
    pair.guests.iter().for_each(Guest::clear_calls);
    pair.guests[0].transmit(&long(1));
    assert_eq!(pair.pass(None), Polled::Busy);
    pair.guests[1].enable(RECEIVE, false);
    pair.pass(None);
    assert!(pair.guests[0].take_call(TRANSMIT) && pair.guests[1].take_call(RECEIVE));
}
