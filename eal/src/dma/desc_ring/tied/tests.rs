use proptest::prelude::*;

use super::super::tests::{pool, ring};
use super::*;
use crate::dma::DmaMemory;
use crate::dma::packet::{Burst, DATA_ROOM};
use crate::mem::{Backing, Region};

const GOOD: GoodWord = GoodWord { bits: 3 << 32, mask: 3 << 32 | 0x97 << 40, len_shift: 0 };
const SEND: SendWord = SendWord { bits: 1 << 40, front: 0, second_len: None, written_by_device: true };
const ENTRIES: usize = 64;
const ANY: Limits = Limits::at_least(1);

/// Rings whose device must leave one descriptor empty, as Intel's.
fn rings(capacity: usize, cache: &mut PoolCache) -> TiedRings {
    let [mut rx, mut tx] = [ring(ENTRIES), ring(ENTRIES)];
    (rx.capacity, tx.capacity) = (capacity, capacity);
    TiedRings::new(rx, tx, (0, 0), None, SEND, cache).unwrap()
}

/// Number of packets that can move in this run.
fn left(rings: &TiedRings) -> usize {
    Place::HERE.since(rings.next)
}

/// Number of packets that have moved in this run.
fn moved(rings: &TiedRings) -> usize {
    rings.next.since(rings.first)
}

/// Returns the buffers of `count` sent packets to the RX device.
fn give_back(rings: &mut TiedRings, count: usize) {
    rings.sync();
    rings.give_back(count, None, None);
    rings.offer();
}

/// Returns everything to `cache`.
fn release(rings: TiedRings, cache: &mut PoolCache) {
    let (mut rx, mut tx) = rings.untie(cache);
    rx.reclaim_all(cache);
    tx.reclaim_all(cache);
}

/// Second word of the `i`th descriptor from the next on.
fn receive(rings: &TiedRings, i: usize, word: u64) {
    rings.rx.view().store::<1>(rings.rx.tail + moved(rings) + i, word);
}

#[test]
fn a_buffer_goes_round_between_the_same_two_descriptors() {
    let pool = pool(ENTRIES as u32);
    let mut cache = pool.cache();
    let mut rings = rings(ENTRIES - 1, &mut cache);
    assert_eq!((rings.rx.owned(), rings.tx.owned(), rings.has_spare), (ENTRIES - 1, 0, true));
    let addresses: Vec<u64> = (0..ENTRIES).map(|i| rings.rx.load::<0>(i)).collect();
    for lap in 0..5 * ENTRIES {
        assert_eq!(rings.tx.load::<0>(lap), addresses[lap % ENTRIES]);
        receive(&rings, 0, GOOD.bits | 60);
        let word = rings.next_word();
        let moved =
            rings.forward_one((word, 1 << 32), GOOD, &ANY, SEND, |packet| packet.write([lap as u8], [2, 3]));
        assert_eq!(moved, Some(Moved { count: 1, bytes: 60, is_last: lap % 32 == 31 }));
        assert_eq!((rings.rx.load::<1>(lap), rings.tx.load::<1>(lap)), (0, SEND.bits | 60));
        give_back(&mut rings, 1);
    }
    assert_eq!((0..ENTRIES).map(|i| rings.rx.load::<0>(i)).collect::<Vec<_>>(), addresses);
    release(rings, &mut cache);
    assert_eq!(cache.len(), ENTRIES);
}

#[test]
fn addresses_that_a_device_overwrote_are_written_again() {
    let pool = pool(ENTRIES as u32);
    let mut cache = pool.cache();
    let mut rings = rings(ENTRIES - 1, &mut cache);
    let first = |ring: &DescRing, i: usize| ring.load::<0>(i);
    let before: Vec<u64> = (0..ENTRIES).map(|i| first(&rings.rx, i)).collect();
    for i in 0..32 {
        receive(&rings, i, GOOD.bits | 60);
    }
    let moved = rings.forward_words::<0>(GOOD, SEND, |_| ());
    assert_eq!(moved, Some(Moved { count: 32, bytes: 32 * 60, is_last: true }));
    rings.mark_last(1 << 50);
    assert_eq!(rings.tx.load::<1>(31), SEND.bits | 60 | 1 << 50);
    (0..ENTRIES).for_each(|i| rings.rx.view().store::<0>(i, 7));
    rings.tx.view().store::<0>(31, 7);
    rings.give_back(32, Some((0, 5)), Some(0));
    // The spare descriptor and those that were sent from, without the last of them, which is the new spare.
    for i in [63].into_iter().chain(0..31) {
        assert_eq!((first(&rings.rx, i), rings.rx.load::<1>(i)), (before[i], 5), "{i}");
    }
    assert_eq!((first(&rings.rx, 31), first(&rings.tx, 31)), (7, before[31]));
    release(rings, &mut cache);
    assert_eq!(cache.len(), ENTRIES);
}

#[test]
fn rings_are_tied_in_the_middle_of_traffic() {
    let pool = pool(3 * ENTRIES as u32);
    let (mut cache, mut burst) = (pool.cache(), Burst::new());
    let [mut rx, mut tx] = [ring(ENTRIES), ring(ENTRIES)];
    // 10 buffers are with the TX device, whose position differs from that of the RX device by 8.
    while rx.refill(32, 0, 0, &mut cache) > 0 {}
    for _ in 0..18 {
        assert!(rx.take_one(&mut burst, 60));
    }
    burst.drain(10..).for_each(|packet| cache.free(packet));
    tx.fill(10, 0, &cache, &mut burst, |_, len| len as u64);
    assert_eq!((rx.refill(9, 0, 0, &mut cache), rx.owned() + tx.owned()), (9, ENTRIES + 1));
    let (rx, mut tx) = TiedRings::new(rx, tx, (0, 0), None, SEND, &mut cache).unwrap_err();
    tx.reclaim(3, &mut cache);
    let in_flight: Vec<u64> = (3..10).map(|i| tx.load::<0>(i)).collect();
    let mut rings = TiedRings::new(rx, tx, (0, 0), None, SEND, &mut cache).unwrap();
    assert_eq!((rings.rx.owned(), rings.tx.owned(), rings.has_spare), (ENTRIES - 7, 7, false));
    for i in 0..30 {
        receive(&rings, i, GOOD.bits | 61);
    }
    // Up to position 32 of the TX ring.
    let moved = rings.forward_words::<60>(GOOD, SEND, |_| ());
    assert_eq!(moved, Some(Moved { count: 22, bytes: 22 * 61, is_last: true }));
    rings.give_back(7, None, None);
    // Their buffers are now those of the last descriptors of the RX ring.
    let given: Vec<u64> = (0..7).map(|i| rings.rx.load::<0>(rings.rx.head().wrapping_sub(7 - i))).collect();
    assert_eq!(given, in_flight);
    let (mut rx, mut tx) = rings.untie(&mut cache);
    assert_eq!((rx.owned(), tx.owned()), (ENTRIES - 22, 22));
    rx.reclaim_all(&mut cache);
    tx.reclaim_all(&mut cache);
    drop(cache);
    assert_eq!(pool.available(), 3 * ENTRIES as u32);
}

#[test]
fn rings_that_cannot_be_tied_come_back() {
    let pools = [pool(ENTRIES as u32 - 1), pool(200)];
    let mut caches = [0, 1].map(|i| pools[i].cache());
    let [small, cache] = &mut caches;
    let tie = |rx, tx, cache: &mut PoolCache| {
        let (mut rx, mut tx) = TiedRings::new(rx, tx, (0, 0), None, SEND, cache).unwrap_err();
        rx.reclaim_all(cache);
        tx.reclaim_all(cache);
    };
    tie(ring(64), ring(128), cache);
    tie(ring(16), ring(16), cache);
    tie(ring(64), ring(64), small);
    assert_eq!(small.len(), ENTRIES - 1, "buffers that were given to a ring came back");
    let mut foreign = ring(64);
    foreign.refill(5, 0, 0, small);
    tie(foreign, ring(64), cache);
    let mut emptied = ring(64);
    emptied.refill(5, 0, 0, cache);
    let packet = emptied.take_at(2).unwrap();
    tie(emptied, ring(64), cache);
    cache.free(packet);
    let mut full = [ring(64), ring(64)];
    full.iter_mut().for_each(|ring| while ring.refill(32, 0, 0, cache) > 0 {});
    let [rx, tx] = full;
    tie(rx, tx, cache);
    // A packet on its way whose upper half would have to be written again.
    let (mut tx, mut burst) = (ring(64), Burst::new());
    let (fresh_bits, slot) = (cache.fresh_bits(), cache.take(1).next().unwrap());
    burst.push(Packet::in_slot(slot, 60, fresh_bits));
    tx.fill(1, 0, cache, &mut burst, |_, len| len as u64);
    let send = SendWord { written_by_device: false, ..SEND };
    let (mut rx, mut tx) = TiedRings::new(ring(64), tx, (0, 0), None, send, cache).unwrap_err();
    rx.reclaim_all(cache);
    tx.reclaim_all(cache);
    drop(caches);
    assert_eq!(pools.map(|pool| pool.available()), [ENTRIES as u32 - 1, 200]);
}

#[test]
fn nothing_moves_beyond_what_the_ring_owns() {
    let pool = pool(ENTRIES as u32);
    let mut cache = pool.cache();
    let mut rings = rings(ENTRIES - 1, &mut cache);
    // A device may mark every descriptor as done, and those that it does not own again.
    for _ in 0..4 {
        (0..ENTRIES).for_each(|i| receive(&rings, i, GOOD.bits | 60));
        rings.forward_words::<0>(GOOD, SEND, |_| ());
    }
    assert_eq!((rings.rx.owned(), rings.tx.owned(), left(&rings)), (0, ENTRIES - 1, 0));
    let word = rings.next_word();
    assert_eq!(rings.forward_one((word, 0), GOOD, &ANY, SEND, |_| ()), None);
    rings.give_back(ENTRIES - 1, None, None);
    let waits = (rings.rx_owned(), rings.waiting());
    assert_eq!((waits, left(&rings)), ((ENTRIES - 1, ENTRIES - 1), 0), "the device was not offered them yet");
    assert_eq!(rings.forward_words::<0>(GOOD, SEND, |_| ()), None);
    rings.offer();
    assert_eq!((rings.waiting(), left(&rings)), (0, 1), "the run ends with the ring");
    release(rings, &mut cache);
    assert_eq!(cache.len(), ENTRIES);
}

#[test]
fn a_packet_that_is_not_to_be_kept_ends_a_run_of_used_elements() {
    const FRONT: usize = 12;
    let pool = pool(ENTRIES as u32);
    let mut cache = pool.cache();
    let memory = DmaMemory::map(Region::new(8 * ENTRIES, Backing::SmallPages).unwrap(), &[]).unwrap();
    let used: DmaRing<u64> = DmaRing::new(&memory, ENTRIES, 8).unwrap();
    (0..ENTRIES).for_each(|i| used.store::<0>(i, i as u64 | 72 << 32));
    let send = SendWord { front: FRONT, ..SEND };
    let mut rings =
        TiedRings::new(ring(ENTRIES), ring(ENTRIES), (FRONT, 9), Some(&used), send, &mut cache).unwrap();
    let mut number = 0;
    // In the second lap, packet 37 has the header that it was given in the first.
    for expected in [32, 32, 32, 5, 0] {
        let keep = |packet: &TiedPacket<'_>| packet.read_header() == [0; FRONT];
        let edit = |packet: &mut TiedPacket<'_>| {
            packet.write_header([u8::from(number == 37); FRONT]);
            number += 1;
        };
        let moved = rings.forward_used::<0, false>((ENTRIES as u16, FRONT), send, keep, edit);
        assert_eq!(moved.map_or(0, |moved| moved.count), expected);
        give_back(&mut rings, expected);
    }
    let lone = |rings: &mut TiedRings, keeps: bool| {
        rings.forward_one_used((ANY, FRONT), send, |_| keeps, |_| ()).is_some()
    };
    assert!(!lone(&mut rings, false) && lone(&mut rings, true));
    release(rings, &mut cache);
    assert_eq!(cache.len(), ENTRIES);
}

/// A word that is mostly good, and a bit or a length away from it otherwise.
fn word() -> impl Strategy<Value = u64> {
    let good = (1..=DATA_ROOM as u64).prop_map(|len| GOOD.bits | len);
    let near = (0..=u64::from(u16::MAX)).prop_map(|len| GOOD.bits | len);
    let odd = (good.clone(), 0..64).prop_map(|(word, bit)| word ^ 1_u64 << bit);
    prop_oneof![20 => good, 1 => near, 1 => odd, 1 => any::<u64>()]
}

/// Number of packets and of their bytes.
fn sums(moved: Option<Moved>) -> (usize, u64) {
    moved.map_or((0, 0), |moved| (moved.count, moved.bytes))
}

proptest! {
    /// Compares with one packet at a time.
    #[test]
    fn words_are_moved_up_to_the_first_unexpected_one(
        words in proptest::collection::vec(word(), 1..200), skip in 0..40_usize, pads in any::<bool>(),
    ) {
        let pool = pool(ENTRIES as u32);
        let mut cache = pool.cache();
        let mut rings = rings(ENTRIES - 1, &mut cache);
        let shortest = if pads { 60 } else { 1 };
        for _ in 0..skip {
            receive(&rings, 0, GOOD.bits | 60);
            prop_assert!(rings.forward_one((GOOD.bits | 60, 0), GOOD, &ANY, SEND, |_| ()).is_some());
            give_back(&mut rings, 1);
        }
        let mut rest = &words[..];
        while !rest.is_empty() {
            let (first, received) = (rings.tx.head + moved(&rings), rings.rx.tail + moved(&rings));
            let most = left(&rings).min(rest.len());
            (0..ENTRIES).for_each(|i| receive(&rings, i, rest.get(i).copied().unwrap_or(0)));
            let good: Vec<u64> = rest[..most].iter()
                .map_while(|word| GOOD.len(*word).filter(|len| *len >= shortest).map(|len| len as u64)).collect();
            let mut edited = 0;
            let edit = |packet: &mut TiedPacket<'_>| { edited += 1; packet.write([1], [2]) };
            let moved = if pads {
                rings.forward_words::<60>(GOOD, SEND, edit)
            } else {
                rings.forward_words::<0>(GOOD, SEND, edit)
            };
            prop_assert_eq!(sums(moved), (good.len(), good.iter().sum::<u64>()));
            prop_assert_eq!(edited, good.len());
            for (i, len) in good.iter().enumerate() {
                prop_assert_eq!(rings.tx.load::<1>(first + i), SEND.bits | *len);
                prop_assert_eq!(rings.rx.load::<1>(received + i), 0);
            }
            give_back(&mut rings, good.len());
            rest = &rest[good.len().max(1)..];
        }
        release(rings, &mut cache);
        prop_assert_eq!(cache.len(), ENTRIES);
    }

    #[test]
    fn used_elements_are_moved_up_to_the_first_unexpected_one(
        lens in proptest::collection::vec((12..=12 + DATA_ROOM as u64, 0..40_u8), 1..200), skip in 0..40_usize,
        written_by_device in any::<bool>(), rewrites in any::<bool>(),
    ) {
        const FRONT: usize = 12;
        let send = SendWord { front: FRONT, written_by_device, ..SEND };
        let pool = pool(ENTRIES as u32);
        let mut cache = pool.cache();
        let memory = DmaMemory::map(Region::new(8 * ENTRIES, Backing::SmallPages).unwrap(), &[]).unwrap();
        let used: DmaRing<u64> = DmaRing::new(&memory, ENTRIES, 8).unwrap();
        let rings = TiedRings::new(ring(ENTRIES), ring(ENTRIES), (FRONT, 9), Some(&used), send, &mut cache);
        let mut rings = rings.unwrap();
        let mut position = 0;
        let mut give = |rings: &mut TiedRings, rest: &[(u64, u8)]| {
            for (i, (len, odd)) in rest.iter().enumerate() {
                let element = ((position + i) % ENTRIES) as u64 | len << 32;
                let element = match odd { 0 => element ^ 1, 1 => element ^ 1 << 63, _ => element };
                used.store::<0>(position + i, element);
            }
            let keeps = |packet: &TiedPacket<'_>| packet.read_header() == [0; 16];
            let good: Vec<u64> = rest.iter().take(left(rings)).map_while(|(len, odd)| (*odd > 1).then_some(*len)).collect();
            let moved = if rest.len() == 1 {
                rings.forward_one_used((Limits::at_least(0), FRONT), send, keeps, |_| ())
            } else if rewrites {
                rings.forward_used::<0, true>((rest.len() as u16, FRONT), send, keeps, |_| ())
            } else {
                rings.forward_used::<0, false>((rest.len() as u16, FRONT), send, keeps, |_| ())
            };
            assert_eq!(sums(moved), (good.len(), good.iter().sum::<u64>() - 12 * good.len() as u64));
            for (i, len) in good.iter().enumerate() {
                assert_eq!(rings.tx.load::<1>(position + i), SEND.bits | *len);
            }
            rings.sync();
            assert_eq!(rings.tx.used_in_order(&used, good.len()), rings.tx.run(ENTRIES - 1).min(good.len()));
            give_back(rings, good.len());
            position += good.len();
            good.len()
        };
        for _ in 0..skip {
            prop_assert_eq!(give(&mut rings, &[(72, 9)]), 1);
        }
        let mut rest = &lens[..];
        while !rest.is_empty() {
            let moved = give(&mut rings, &rest[..rest.len().min(ENTRIES)]);
            if moved == 0 {
                // An element that is as expected takes the place of the other.
                prop_assert_eq!(give(&mut rings, &[(72, 9)]), 1);
            }
            rest = &rest[moved.max(1)..];
        }
        release(rings, &mut cache);
        prop_assert_eq!(cache.len(), ENTRIES);
    }
}
