use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;

use super::*;
use std::sync::Arc;

use crate::dma::packet::{HEADROOM, MAX_BURST};
use crate::dma::{DmaMemory, Pool};
use crate::mem::{Backing, Region};

pub(super) fn pool(count: u32) -> Arc<Pool> {
    let region = Region::new(Pool::bytes(count), Backing::SmallPages).unwrap();
    Pool::new(&DmaMemory::map(region, &[]).unwrap(), count).unwrap()
}

pub(super) fn ring(entries: usize) -> DescRing {
    let region = Region::new(16 * entries, Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    DescRing::new(DmaRing::new(&memory, entries, 16).unwrap(), entries)
}

/// Takes up to `most` packets. The second word of a descriptor is the packet's length, and 0 if it is not
/// complete.
fn take(ring: &mut DescRing, most: usize, burst: &mut Burst) -> usize {
    let mut rest = Burst::new();
    let room = MAX_BURST - most.min(burst.remaining_capacity());
    // These packets only fill the burst and own no buffer.
    (0..room).for_each(|_| rest.push(Packet::in_slot(0, 0, 0)));
    let (count, bytes) = ring.take_words(GoodWord { bits: 0, mask: 0, len_shift: 0 }, &mut rest);
    assert_eq!(bytes, rest[room..].iter().map(|packet| packet.len() as u64).sum::<u64>());
    burst.extend(rest.drain(room..));
    count
}

fn packet(cache: &mut PoolCache, len: usize) -> Packet {
    cache.allocate().unwrap().with_len(len)
}

#[test]
fn a_ring_takes_no_more_than_there_is() {
    let pool = pool(12);
    let (mut cache, mut ring, mut burst) = (pool.cache(), ring(8), Burst::new());
    assert_eq!(take(&mut ring, 8, &mut burst), 0, "no descriptor owns a buffer");
    assert_eq!((ring.refill(5, 0, 7, &mut cache), ring.room()), (5, 3));
    assert_eq!((ring.load::<1>(4), ring.load::<1>(5)), (7, 0));
    ring.set_word(0, 3);
    ring.set_word(1, DATA_ROOM as u64);
    ring.set_word(2, DATA_ROOM as u64 + 1);
    assert_eq!(take(&mut ring, 8, &mut burst), 2);
    assert_eq!([0, 1].map(|i| burst[i].len()), [3, DATA_ROOM]);
    ring.set_word(2, 1);
    // The ring wraps within this refill.
    assert_eq!((ring.refill(9, 0, 7, &mut cache), ring.owned()), (5, 8));
    assert_eq!((take(&mut ring, 9, &mut burst), take(&mut ring, 9, &mut burst)), (6, 2));
    assert_eq!((ring.refill(9, 0, 7, &mut cache), burst.len()), (2, 10), "12 buffers are all");
    burst.drain(..).for_each(|packet| cache.free(packet));
    ring.reclaim_all(&mut cache);
    drop(cache);
    assert_eq!(pool.available(), 12);
}

#[test]
fn what_is_sent_leaves_the_burst() {
    let pool = pool(8);
    let (mut cache, mut ring) = (pool.cache(), ring(4));
    let mut burst: Burst = (1..4).map(|len| packet(&mut cache, len)).collect();
    let wanted: Vec<u64> = burst.iter().map(|packet| cache.iova(packet) - 12).collect();
    ring.fill(2, 12, &cache, &mut burst, |_, len| len as u64 + 100);
    assert_eq!((burst.len(), burst[0].len()), (1, 3));
    ring.fill(1, 12, &cache, &mut burst, |_, len| len as u64 + 100);
    assert_eq!([0, 1, 2].map(|i| ring.load::<0>(i)).to_vec(), wanted);
    assert_eq!([0, 1, 2, 3].map(|i| ring.load::<1>(i)), [101, 102, 103, 0]);
    ring.reclaim(3, &mut cache);
    assert_eq!((cache.len(), ring.owned()), (8, 0));
}

#[test]
fn the_data_offset_is_part_of_the_address() {
    let pool = pool(2);
    let (mut cache, mut ring) = (pool.cache(), ring(2));
    let mut packet = packet(&mut cache, 60);
    let iova = cache.iova(&packet);
    packet.prepend(14).unwrap();
    let mut burst: Burst = [packet].into_iter().collect();
    ring.fill(1, 0, &cache, &mut burst, |_, len| len as u64);
    assert_eq!((ring.load::<0>(0), ring.load::<1>(0)), (iova - 14, 74));
    ring.reclaim(1, &mut cache);
    // A buffer that comes back from the ring has its data at the offset of a fresh packet.
    let held: Vec<Packet> = std::iter::from_fn(|| cache.allocate()).collect();
    assert!(held.len() == 2 && held.iter().all(|packet| cache.iova(packet) % 2048 == HEADROOM as u64));
}

#[test]
fn descriptors_that_are_emptied_out_of_order_are_given_back_in_order() {
    let pool = pool(8);
    let (mut cache, mut ring, mut burst) = (pool.cache(), ring(4), Burst::new());
    ring.refill(4, 0, 60, &mut cache);
    assert_eq!(take(&mut ring, 1, &mut burst), 1);
    assert!(ring.take_at(0).is_none(), "its buffer is a packet");
    burst.push(ring.take_at(2).unwrap());
    assert!(ring.take_at(2).is_none() && ring.take_at(6).is_none());
    assert_eq!((ring.room(), ring.owned(), ring.has_holes()), (1, 2, true));
    assert_eq!(take(&mut ring, 4, &mut burst), 0, "the second of them is not there");
    burst.push(ring.take_at(1).unwrap());
    assert_eq!((ring.tail(), ring.room(), ring.has_holes()), (3, 3, false));
    assert!(ring.take_one(&mut burst, 60));
    assert_eq!(ring.refill(4, 0, 0, &mut cache), 4);
    burst.push(ring.take_at(1).unwrap());
    ring.reclaim_all(&mut cache);
    burst.drain(..).for_each(|packet| cache.free(packet));
    assert_eq!((cache.len(), ring.owned(), ring.room()), (8, 0, 4));
}

#[test]
fn a_frame_of_several_descriptors_is_taken_whole_or_not() {
    let pool = pool(40);
    let (mut cache, mut ring, mut burst) = (pool.cache(), ring(4), Burst::new());
    ring.refill(3, 0, 60, &mut cache);
    assert!(!ring.take_frame(&mut burst, &[1; 4]), "three descriptors own a buffer");
    assert!(ring.take_frame(&mut burst, &[1024, DATA_ROOM + 1, 7]));
    assert!(ring.take_frame(&mut burst, &[]));
    let taken: Vec<_> = burst.iter().map(|packet| (packet.len(), packet.has_more())).collect();
    assert_eq!(taken, [(1024, true), (DATA_ROOM, true), (7, false)]);
    // Frames across the end of the ring, after an empty descriptor, and into a burst that is nearly full.
    ring.refill(4, 0, 60, &mut cache);
    burst.push(ring.take_at(4).unwrap());
    assert!(ring.has_holes() && !ring.take_frame(&mut burst, &[9; 2]));
    assert!(ring.take_one(&mut burst, 60) && !ring.has_holes());
    burst.extend((0..MAX_BURST - 6).map(|_| packet(&mut cache, 1)));
    assert_eq!((burst.remaining_capacity(), ring.owned()), (1, 2));
    assert!(!ring.take_frame(&mut burst, &[9; 2]) && ring.take_frame(&mut burst, &[9]));
    assert!(!burst[MAX_BURST - 1].has_more());
    burst.drain(..).for_each(|packet| cache.free(packet));
    ring.reclaim_all(&mut cache);
    drop(cache);
    assert_eq!(pool.available(), 40);
}

#[test]
fn a_closed_ring_has_no_room() {
    let pool = pool(8);
    let (mut cache, mut ring) = (pool.cache(), ring(4));
    ring.refill(2, 0, 0, &mut cache);
    ring.close();
    assert_eq!((ring.room(), ring.refill(4, 0, 0, &mut cache), ring.owned()), (0, 0, 2));
    ring.reclaim_all(&mut cache);
    ring.restart(3, [1, 2]);
    assert_eq!((ring.room(), ring.load::<0>(3), ring.load::<1>(3)), (3, 1, 2));
}

#[test]
fn the_tail_shows_the_room_where_positions_wrap() {
    let pool = pool(8);
    let (mut cache, mut ring, mut burst) = (pool.cache(), ring(8), Burst::new());
    for capacity in [8, 7] {
        ring.restart(capacity, [0; 2]);
        let start = usize::MAX - 20;
        (ring.head, ring.tail) = (start, start);
        for _ in 0..40 {
            ring.refill(3, 0, 60, &mut cache);
            let positions: Vec<usize> = (0..=8).map(|room| ring.tail_with_room(room)).collect();
            for _ in 0..4 {
                for (room, position) in positions.iter().enumerate() {
                    assert_eq!(ring.has_reached(*position), ring.room() >= room, "{room} at {}", ring.tail);
                }
                ring.take_one(&mut burst, 60);
            }
            burst.drain(..).for_each(|packet| cache.free(packet));
        }
        assert!(ring.tail < start, "it did not wrap");
        ring.close();
        assert!(!ring.has_reached(ring.tail_with_room(1)));
        ring.reclaim_all(&mut cache);
    }
}

fn used_ring(entries: usize) -> DmaRing<u64> {
    let region = Region::new(8 * entries, Backing::SmallPages).unwrap();
    DmaRing::new(&DmaMemory::map(region, &[]).unwrap(), entries, 8).unwrap()
}

/// Used element of the descriptor at `index`.
fn element(index: usize, len: usize) -> u64 {
    index as u64 | (len as u64) << 32
}

#[test]
fn completions_are_found_by_the_index_of_their_descriptors() {
    let pool = pool(8);
    let (mut cache, mut descriptors, mut burst) = (pool.cache(), ring(4), Burst::new());
    let used = used_ring(4);
    (0..4).for_each(|index| used.store::<0>(index, element(index, 12 + index)));
    for _ in 0..6 {
        descriptors.refill(3, 12, 0, &mut cache);
        let (first, mut taken) = (descriptors.tail(), 0);
        while taken < 3 {
            taken += descriptors
                .take_used(&used, 3 - taken, 12, &cache, &mut burst, |packet| {
                    packet.read_header::<2>().len() == 2
                })
                .0;
        }
        let lens: Vec<_> = burst.iter().map(Packet::len).collect();
        assert_eq!(lens, [0, 1, 2].map(|i| (first + i) % 4));
        burst.drain(..).for_each(|packet| cache.free(packet));
    }
    // A smaller used ring ends the run earlier.
    let few = used_ring(2);
    few.store::<0>(1, element(1, 1));
    descriptors.refill(4, 0, 0, &mut cache);
    assert_eq!(descriptors.take_used(&few, 4, 0, &cache, &mut burst, |_| true), (2, 1));
    burst.drain(..).for_each(|packet| cache.free(packet));
    descriptors.reclaim_all(&mut cache);
}

#[test]
fn one_completion_is_taken_if_it_is_the_expected_one() {
    let pool = pool(8);
    let (mut cache, mut ring, mut burst) = (pool.cache(), ring(4), Burst::new());
    let used = used_ring(4);
    let take = |ring: &mut DescRing, element, keep: bool, burst: &mut Burst| {
        used.store::<0>(ring.tail(), element);
        ring.take_one_used(&used, 12, &pool.cache(), burst, |_| keep)
    };
    assert_eq!(take(&mut ring, element(0, 72), true, &mut burst), None, "no descriptor owns a buffer");
    ring.refill(4, 12, 0, &mut cache);
    for bad in
        [element(1, 72), element(4, 72), element(0, 11), element(0, 13 + DATA_ROOM), element(1 << 31, 72)]
    {
        assert_eq!(take(&mut ring, bad, true, &mut burst), None, "{bad:#x}");
    }
    assert_eq!(take(&mut ring, element(0, 72), false, &mut burst), None);
    assert_eq!(take(&mut ring, element(0, 72), true, &mut burst), Some(60));
    assert_eq!(take(&mut ring, element(1, 12), true, &mut burst), Some(0));
    assert_eq!(take(&mut ring, element(2, 12 + DATA_ROOM), true, &mut burst), Some(DATA_ROOM));
    burst.push(ring.take_at(3).unwrap());
    ring.refill(2, 12, 0, &mut cache);
    burst.push(ring.take_at(5).unwrap());
    assert_eq!(take(&mut ring, element(0, 72), true, &mut burst), None, "a hole is between tail and head");
    burst.drain(..).for_each(|packet| cache.free(packet));
    ring.reclaim_all(&mut cache);
    ring.refill(1, 12, 0, &mut cache);
    burst.extend((0..MAX_BURST).map(|_| Packet::in_slot(0, 0, 0)));
    let next = element(ring.tail() & 3, 72);
    assert_eq!(take(&mut ring, next, true, &mut burst), None, "the burst is full");
    ring.reclaim_all(&mut cache);
}

/// A safe caller that sends buffers of another pool loses them, and has no other effect.
#[test]
fn buffers_of_two_pools_do_not_meet() {
    let [pool, other] = [pool(8), pool(8)];
    let (mut cache, mut foreign, mut ring) = (pool.cache(), other.cache(), ring(4));
    ring.refill(1, 0, 0, &mut cache);
    assert!(catch_unwind(AssertUnwindSafe(|| ring.refill(1, 0, 0, &mut foreign))).is_err());
    let mut burst: Burst = [packet(&mut cache, 1), packet(&mut foreign, 2)].into_iter().collect();
    let sent = catch_unwind(AssertUnwindSafe(|| ring.fill(2, 0, &cache, &mut burst, |_, _| 0)));
    assert!(sent.is_err() && ring.owned() == 1);
    let word = SendWord { bits: 0, front: 0, second_len: None, written_by_device: true };
    let places = if cfg!(miri) { 3..5 } else { 0..6 };
    for (at, front) in places.flat_map(|at| [(at, 0), (at, 12)]) {
        let mut packets: Vec<_> = (0..5).map(|_| Packet::in_slot(0, 60, cache.fresh_bits())).collect();
        packets.insert(at, Packet::in_slot(0, 60, foreign.fresh_bits()));
        let mut burst: Burst = packets.into_iter().collect();
        let mut ring = self::ring(8);
        let sent = catch_unwind(AssertUnwindSafe(|| {
            ring.fill_words::<0>(6, SendWord { front, ..word }, &mut cache, &mut burst, |_| ());
        }));
        assert!(sent.is_err() && ring.owned() == 0 && burst.is_empty(), "{at} {front}");
        let mut packets = [0; 6].map(|_| Packet::in_slot(0, 60, cache.fresh_bits()));
        packets[at] = Packet::in_slot(0, 60, foreign.fresh_bits());
        let written = catch_unwind(AssertUnwindSafe(|| cache.write_each(&mut packets, [1; 8], [2; 4])));
        assert!(written.is_err(), "{at}");
    }
    ring.reclaim(1, &mut foreign);
    assert_eq!((foreign.len(), ring.owned(), pool.available()), (7, 0, 1), "it goes home");
    // An empty ring accepts buffers of another pool.
    assert_eq!(ring.refill(4, 0, 0, &mut foreign), 4);
    ring.reclaim_all(&mut foreign);
    assert_eq!(foreign.len(), 7);
}

proptest! {
    /// The model is a queue: the ring returns buffers in the order in which it received them.
    #[test]
    fn a_ring_that_receives_is_a_queue(
        shift in 0..7_u32,
        spare in 0..40_u32,
        steps in prop::collection::vec((0..MAX_BURST, 0..MAX_BURST, 0..40_usize, 0..=MAX_BURST), 1..40),
    ) {
        let entries = 1_usize << shift;
        let pool = pool(entries as u32 + spare);
        let (mut cache, mut ring, mut burst) = (pool.cache(), ring(entries), Burst::new());
        let mut model: VecDeque<u64> = VecDeque::new();
        for (asked, done, wanted, freed) in steps {
            let head = ring.head();
            let count = ring.refill(wanted, 0, 60, &mut cache);
            prop_assert!(count == wanted.min(MAX_BURST).min(entries - model.len()) || cache.is_empty());
            model.extend((head..head + count).map(|index| ring.load::<0>(index)));
            let (before, tail) = (burst.len(), ring.tail());
            // Descriptors from `tail + done` on are not complete.
            (tail + done..ring.head()).for_each(|index| ring.set_word(index, 0));
            let got = take(&mut ring, asked, &mut burst);
            (tail + done..ring.head()).for_each(|index| ring.set_word(index, 60));
            let room = (MAX_BURST - before).min(entries - tail % entries).min(model.len());
            prop_assert_eq!(got, done.min(asked).min(room));
            for packet in &burst[before..] {
                prop_assert_eq!(Some(cache.iova(packet)), model.pop_front());
            }
            prop_assert_eq!((ring.owned(), ring.room()), (model.len(), entries - model.len()));
            let freed = freed.min(burst.len());
            burst.drain(..freed).for_each(|packet| cache.free(packet));
        }
        burst.drain(..).for_each(|packet| cache.free(packet));
        ring.reclaim_all(&mut cache);
        drop(cache);
        prop_assert_eq!(pool.available(), pool.count());
    }

    /// The model is a queue of the packets that were sent and have not come back. Some of them come back out
    /// of order.
    #[test]
    fn a_ring_that_sends_is_a_queue(
        shift in 0..7_u32,
        steps in prop::collection::vec((0..=MAX_BURST, 0..=300_usize, any::<usize>()), 1..60),
    ) {
        let entries = 1_usize << shift;
        let pool = pool(entries as u32 + 40);
        let (mut cache, mut ring) = (pool.cache(), ring(entries));
        let mut model: VecDeque<u64> = VecDeque::new();
        for (packets, back, odd) in steps {
            let mut burst: Burst = (0..packets).map(|len| packet(&mut cache, len)).collect();
            let iovas: Vec<u64> = burst.iter().map(|packet| cache.iova(packet)).collect();
            let count = packets.min(ring.room());
            let (head, mut number) = (ring.head(), 0);
            ring.fill(count, 0, &cache, &mut burst, |_, len| {
                number += 1;
                (len << 8 | number) as u64
            });
            for (i, iova) in iovas[..count].iter().enumerate() {
                prop_assert_eq!(ring.load::<0>(head + i), *iova);
                prop_assert_eq!(ring.load::<1>(head + i), (i << 8 | (i + 1)) as u64);
            }
            let rest: Vec<u64> = burst.iter().map(|packet| cache.iova(packet)).collect();
            prop_assert_eq!(&rest[..], &iovas[count..]);
            burst.drain(..).for_each(|packet| cache.free(packet));
            model.extend(&iovas[..count]);
            if odd % 3 == 0 && !model.is_empty() {
                let at = odd % model.len();
                let packet = ring.take_at(ring.tail() + at).unwrap();
                prop_assert_eq!(Some(cache.iova(&packet)), model.remove(at));
                cache.free(packet);
                while ring.has_holes() {
                    cache.free(ring.take_at(ring.tail()).unwrap());
                    model.pop_front();
                }
            }
            let back = back.min(model.len());
            ring.reclaim(back, &mut cache);
            model.drain(..back);
            prop_assert_eq!(ring.owned(), model.len());
            prop_assert_eq!(cache.len() + pool.available() as usize + model.len(), pool.count() as usize);
        }
        ring.reclaim_all(&mut cache);
    }

    /// The model checks one element at a time.
    #[test]
    fn used_elements_are_taken_up_to_the_first_unexpected_one(
        start in 0..64_usize,
        lens in prop::collection::vec(prop_oneof![0..70_usize, 0..=DATA_ROOM], 0..40),
        odd in prop::collection::vec((0..40_usize, any::<u64>()), 0..3),
        full in 0..MAX_BURST,
        kept in 0..60_usize,
    ) {
        let pool = pool(160);
        let (mut cache, mut ring, used, mut burst) = (pool.cache(), ring(64), used_ring(64), Burst::new());
        (0..start).for_each(|_| {
            ring.refill(1, 12, 0, &mut cache);
            ring.reclaim(1, &mut cache);
        });
        while ring.refill(MAX_BURST, 12, 0, &mut cache) > 0 {}
        let offered: Vec<u64> = (0..64).map(|i| ring.load::<0>(start + i) + 12).collect();
        for (i, len) in lens.iter().enumerate() {
            used.store::<0>(start + i, element((start + i) % 64, 12 + len));
        }
        for (i, value) in odd {
            // A difference in a single bit is the hardest to see.
            let changed = used.load::<0>(start + i) ^ 1 << (value % 64);
            used.store::<0>(start + i, if value % 3 == 0 { value } else { changed });
        }
        burst.extend((0..full).map(|_| Packet::in_slot(0, 0, 0)));
        let is_good = |i: usize| {
            let element = used.load::<0>(start + i);
            let len = (element >> 32) as usize;
            element as u32 as usize == (start + i) % 64 && (12..=12 + DATA_ROOM).contains(&len)
        };
        let len = |i: usize| (used.load::<0>(start + i) >> 32) as usize - 12;
        let most = lens.len().min(MAX_BURST - full).min(64 - start);
        let wanted = (0..most).take_while(|i| is_good(*i) && len(*i) != kept).count();
        let (count, bytes) = ring.take_used(&used, lens.len(), 12, &cache, &mut burst, |packet| packet.len != kept);
        prop_assert_eq!(count, wanted);
        prop_assert_eq!(bytes, (0..count).map(len).sum::<usize>() as u64);
        for (i, packet) in burst[full..].iter().enumerate() {
            prop_assert_eq!((cache.iova(packet), packet.len()), (offered[i], len(i)));
        }
        prop_assert_eq!(burst.len(), full + count);
        burst.drain(full..).for_each(|packet| cache.free(packet));
        let rest = lens.len() - count;
        let run = rest.min(64 - (start + count) % 64);
        let in_order = (count..count + run).all(|i| used.load::<0>(start + i) as u32 as usize == (start + i) % 64);
        prop_assert_eq!(ring.reclaim_used(&used, rest, &mut cache), if in_order { run } else { 0 });
        ring.reclaim_all(&mut cache);
        drop(cache);
        prop_assert_eq!(pool.available(), pool.count());
    }

    /// The model is [`DescRing::fill`], one packet at a time.
    #[test]
    fn words_and_addresses_of_sent_packets_are_those_of_the_formula(
        start in 0..16_usize,
        lens in prop::collection::vec((0..=DATA_ROOM, 0..60_usize), 0..=MAX_BURST),
        left in 0..3_usize,
        front in prop::sample::select(vec![0, 12]),
        second_len in prop::sample::select(vec![None, Some(32), Some(46)]),
        bits in any::<u32>(),
        pads in any::<bool>(),
        page in prop::sample::select(vec![4096, 65536]),
    ) {
        let region = Region::new(Pool::bytes(128).next_multiple_of(65536), Backing::SmallPages).unwrap();
        let addresses: Vec<u64> =
            (0..region.len() / page).map(|number| ((number * 7 + 3) % 512 * page) as u64 + (1 << 40)).collect();
        let pool = Pool::new(&DmaMemory::with_addresses(region, page, &addresses), 128).unwrap();
        let (mut cache, mut rings) = (pool.cache(), [ring(16), ring(16)]);
        for ring in &mut rings {
            (0..start).for_each(|_| {
                ring.refill(1, 0, 0, &mut cache);
                ring.reclaim(1, &mut cache);
            });
        }
        let mut packets = || -> Burst {
            lens.iter().map(|(len, offset)| {
                let mut packet = packet(&mut cache, *len);
                packet.prepend(*offset).unwrap();
                packet
            }).collect()
        };
        let mut bursts = [packets(), packets()];
        let count = lens.len().saturating_sub(left).min(16);
        let word = SendWord { bits: u64::from(bits) << 24 & !0xffff, front, second_len, written_by_device: true };
        let addresses = bursts.each_ref().map(|burst| -> Vec<u64> {
            burst.iter().map(|packet| cache.iova(packet)).collect()
        });
        let [model, subject] = &mut rings;
        let [first, second] = &mut bursts;
        let mut wanted_bytes = 0;
        let shortest = if pads { 60 } else { 0 };
        model.fill(count, front, &cache, first, |slot, len| {
            let len = len.max(shortest);
            wanted_bytes += len as u64;
            slot.write_header(&[len as u8; 12]);
            word.of(len)
        });
        let header = |slot: &mut Slot<'_>| slot.write_header(&[9; 12]);
        let bytes = match pads {
            true => subject.fill_words::<60>(count, word, &mut cache, second, header),
            false => subject.fill_words::<0>(count, word, &mut cache, second, header),
        };
        prop_assert_eq!((bytes, second.len()), (wanted_bytes, lens.len() - count));
        for (i, (of_model, of_subject)) in addresses[0].iter().zip(&addresses[1]).enumerate().take(count) {
            prop_assert_eq!(model.load::<0>(start + i) + front as u64, *of_model);
            prop_assert_eq!(subject.load::<0>(start + i) + front as u64, *of_subject);
            prop_assert_eq!(model.load::<1>(start + i), subject.load::<1>(start + i));
        }
        for (ring, header) in rings.iter_mut().zip([None, (front > 0).then_some([9; 12])]) {
            for (i, (_, offset)) in lens[..count].iter().enumerate() {
                let mut packet = ring.take_at(start + i).unwrap();
                packet.prepend(*offset).unwrap();
                prop_assert!(header.is_none_or(|header| cache.read_header::<12>(&packet) == header));
                cache.free(packet);
            }
        }
        bursts.iter_mut().flat_map(|burst| burst.drain(..)).for_each(|packet| cache.free(packet));
        prop_assert_eq!(cache.len() + pool.available() as usize, 128);
    }
}
