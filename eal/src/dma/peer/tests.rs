use super::*;
use crate::dma::{Burst, DATA_ROOM, DmaMemory, Pool};
use crate::mem::{Backing, Region};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const LEN: u64 = 4 * PAGE;

fn file(len: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file.into()
}

fn region(guest: u64, user: u64, offset: u64) -> PeerRegion {
    PeerRegion { guest, user, len: LEN - offset, offset, fd: file(LEN) }
}

fn pool() -> Arc<Pool> {
    let memory = DmaMemory::map(Region::new(Pool::bytes(64), Backing::SmallPages).unwrap(), &[]).unwrap();
    Pool::new(&memory, 64).unwrap()
}

#[test]
fn regions_outside_of_their_file_are_refused() {
    let short = |len, offset, guest| PeerRegion { guest, user: 0, len, offset, fd: file(LEN) };
    for bad in [
        short(LEN + 1, 0, 0),
        short(LEN, 1, 0),
        short(u64::MAX, 2, 0),
        short(0, 0, 0),
        short(LEN, 0, u64::MAX - PAGE),
    ] {
        assert_eq!(PeerMemory::map(vec![bad]).unwrap_err().kind(), ErrorKind::Protocol);
    }
    assert_eq!(PeerMemory::map(vec![]).unwrap_err().kind(), ErrorKind::Protocol);
    for (first, second) in [(0, LEN - 1), (LEN - 1, 0), (0, 0)] {
        let error = PeerMemory::map(vec![region(first, 0, 0), region(second, 0, 0)]).unwrap_err();
        assert!(error.to_string().contains("overlap"), "{error}");
    }
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let fd = socket.into();
    let error = PeerMemory::map(vec![PeerRegion { guest: 0, user: 0, len: 1, offset: 0, fd }]).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

#[test]
fn regions_come_and_go_one_by_one() {
    let at = |i: u64| region(i * LEN, 0x7000_0000 + i * LEN, 0);
    // Regions are in order even if they are added from the highest down.
    let mut memory = PeerMemory::map(vec![at(508)]).unwrap();
    for i in (0..508).rev() {
        memory = memory.with(at(i)).unwrap();
        memory.view().at(i * LEN, 1).unwrap().write(&[i as u8]);
    }
    let error = memory.with(at(600)).unwrap_err().to_string();
    assert!(error.contains("510 regions, not 1 to 509"), "{error}");
    let mut view = memory.view();
    assert!((0..509).all(|i| view.at(i * LEN + 5, LEN as usize - 5).is_some()));
    assert!(view.at(509 * LEN, 1).is_none());

    // A removed region stays until the memory is settled, but yields to a region that has its addresses.
    for wrong in [(LEN, 0, LEN), (LEN, 0x7000_0000 + LEN, LEN - 1), (1, 0x7000_0000, LEN)] {
        assert_eq!(memory.without(wrong.0, wrong.1, wrong.2).unwrap_err().kind(), ErrorKind::Protocol);
    }
    let memory = memory.without(LEN, 0x7000_0000 + LEN, LEN).unwrap();
    assert!(!memory.is_settled() && memory.without(LEN, 0x7000_0000 + LEN, LEN).is_err());
    memory.ring::<u64, 1>(0x7000_0000 + LEN, 1).unwrap();
    let half = PeerRegion { guest: LEN, user: 0x9000_0000, len: LEN / 2, offset: 0, fd: file(LEN) };
    let memory = memory.with(half).unwrap();
    let mut view = memory.view();
    let mut found = Vec::new();
    view.parts(LEN - 1, LEN as usize + 2, |part| {
        found.push(part.len());
        Some(())
    });
    assert_eq!(found, [1, LEN as usize / 2, LEN as usize / 2, 1]);
    let settled = memory.settled().unwrap();
    assert!(settled.is_settled() && settled.view().at(LEN + LEN / 2, 1).is_none());
    assert!(settled.view().at(LEN, 1).is_some());
    assert!(settled.ring::<u64, 1>(0x7000_0000 + LEN, 1).is_err());
    let none = PeerMemory::map(vec![at(0)]).unwrap().without(0, 0x7000_0000, LEN).unwrap();
    assert!(none.view().at(0, 1).is_some() && none.settled().is_none());
}

#[test]
fn rings_are_found_by_user_address_and_data_by_guest_address() {
    let regions = vec![region(0, 0x7000_0000, 0), region(0x10_0000, 0x9000_0000, 100)];
    let memory = PeerMemory::map(regions).unwrap();
    let ring: PeerRing<u32, 2> = memory.ring(0x9000_0000, 8).unwrap();
    ring.store::<1>(9, 0x0403_0201);
    let mut view = memory.view();
    let pool = pool();
    let mut cache = pool.cache();
    let mut burst = Burst::new();
    assert_eq!(cache.receive_copies(9, &mut burst, |i| view.at(0x10_000c, 4).filter(|_| i < 2)), 2);
    let mut bytes = [0; 4];
    cache.read(&burst[1], 0, &mut bytes);
    assert_eq!((bytes, burst[1].len()), ([1, 2, 3, 4], 4));
    let end = 0x10_0000 + LEN - 100;
    let inside = [(0, 1), (LEN, 0), (0x10_0000, LEN as usize - 100), (end - 1, 1), (end, 0)];
    assert!(inside.iter().all(|(guest, len)| view.at(*guest, *len).is_some()));
    let outside = [(LEN - 1, 2), (LEN, 1), (u64::MAX, 1), (end - 1, 2), (0x10_0000, usize::MAX), (end, 1)];
    assert!(outside.iter().all(|(guest, len)| view.at(*guest, *len).is_none()));
    burst.into_iter().for_each(|packet| cache.free(packet));

    let refused = |ring: Result<PeerRing<u64>>| ring.unwrap_err().kind();
    assert_eq!(refused(memory.ring(0x7000_0000, 3)), ErrorKind::Usage);
    for (user, entries) in [(0x7000_0004, 2), (0x7000_0000 + LEN - 8, 2), (0x6fff_fff8, 2), (0, 1 << 40)] {
        assert_eq!(refused(memory.ring(user, entries)), ErrorKind::Protocol);
    }
    memory.ring::<u64, 1>(0x7000_0000 + LEN - 8, 1).unwrap();
}

#[test]
fn a_byte_is_given_to_one_ring_at_a_time() {
    let memory = PeerMemory::map(vec![region(0, 0x7000_0000, 0)]).unwrap();
    let ring: PeerRing<u32, 2> = memory.ring(0x7000_0010, 4).unwrap();
    let refused = |user, entries| {
        let error = memory.ring::<u16, 1>(user, entries).unwrap_err();
        assert!(error.kind() == ErrorKind::Protocol && error.why() == "it overlaps another ring", "{error}");
    };
    for (user, entries) in
        [(0x7000_0010, 1), (0x7000_0000, 16), (0x7000_002e, 1), (0x7000_002e, 32), (0x7000_0000, 64)]
    {
        refused(user, entries);
    }
    // Rings that touch the ring do not overlap it, nor does a ring without words.
    let around =
        [(0x7000_000e, 1), (0x7000_0030, 2)].map(|(user, n)| memory.ring::<u16, 1>(user, n).unwrap());
    drop(memory.ring::<u32, 0>(0x7000_0010, 4).unwrap());
    refused(0x7000_0010, 1);
    // A region that stays is the same mapping in another memory. A region that is mapped again is a different
    // mapping.
    let grown = memory.with(region(LEN, 0x8000_0000, 0)).unwrap();
    assert!(grown.ring::<u64, 1>(0x7000_0010, 1).is_err());
    let again = memory.without(0, 0x7000_0000, LEN).unwrap();
    assert!(again.ring::<u64, 1>(0x7000_0010, 1).is_err());
    PeerMemory::map(vec![region(0, 0x7000_0000, 0)]).unwrap().ring::<u64, 1>(0x7000_0010, 1).unwrap();

    drop(ring);
    let ring: PeerRing<u64> = grown.ring(0x7000_0010, 4).unwrap();
    refused(0x7000_0028, 1);
    drop((ring, around));
    memory.ring::<u16, 1>(0x7000_0000, 64).unwrap();
}

#[test]
fn a_ring_whose_size_overflows_is_in_no_region() {
    let memory = PeerMemory::map(vec![region(0, 0x7000_0000, 0)]).unwrap();
    let error = memory.ring::<u64, { 1 << 61 }>(0x7000_0000, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
}

proptest! {
    /// The model finds the region of an address without wrapping arithmetic.
    #[test]
    fn an_address_leads_into_its_region_or_nowhere(
        cuts in proptest::collection::btree_set(
            prop_oneof![0..4 * PAGE, u64::MAX - 4 * PAGE..u64::MAX], 2..=16,
        ),
        probes in proptest::collection::vec((any::<prop::sample::Index>(), -3..3_i64, prop_oneof![
            0..5_usize, 0..LEN as usize, any::<usize>(),
        ]), 1..40),
    ) {
        let cuts: Vec<u64> = cuts.into_iter().collect();
        let pairs = cuts.chunks_exact(2).filter(|pair| pair[1] - pair[0] <= LEN);
        let regions: Vec<PeerRegion> = pairs
            .map(|pair| (pair[0], pair[1] - pair[0]))
            .map(|(guest, len)| PeerRegion { guest, user: guest, len, offset: LEN - len, fd: file(LEN) })
            .collect();
        prop_assume!(!regions.is_empty());
        let memory = PeerMemory::map(regions).unwrap();
        let mut view = memory.view();
        for (cut, distance, len) in probes {
            let guest = cut.get(&cuts).saturating_add_signed(distance);
            let at = u128::from(guest);
            let inside = |area: &&Area| {
                let start = u128::from(area.guest);
                (start..=start + u128::from(area.len)).contains(&at)
                    && at + len as u128 <= start + u128::from(area.len)
            };
            let slice = view.at(guest, len).map(|slice| (slice.at, slice.len));
            // An empty slice may be at the end of one region, where the next begins.
            let wanted = memory.areas.iter().filter(inside).map(|area| {
                // SAFETY: the model found the address inside the area.
                (unsafe { area.base.add((guest - area.guest) as usize) }, len)
            });
            let wanted: Vec<_> = wanted.collect();
            prop_assert!(slice.map_or(wanted.is_empty() || len == 0, |slice| wanted.contains(&slice)));
        }
    }

    /// The model has one byte for each address that is in a region.
    #[test]
    fn a_buffer_in_regions_that_touch_is_all_of_its_parts(
        lens in proptest::collection::vec((1..100_u64, prop_oneof![3 => Just(0), 1 => 1..9_u64]), 1..=8),
        probes in proptest::collection::vec((0..1000_u64, 0..300_usize), 1..40),
    ) {
        let (mut guest, mut regions, mut bytes) = (PAGE, Vec::new(), std::collections::HashMap::new());
        for (len, gap) in lens {
            regions.push(PeerRegion { guest, user: guest, len, offset: guest % 100, fd: file(LEN) });
            bytes.extend((guest..guest + len).map(|at| (at, (at % 251) as u8)));
            guest += len + gap;
        }
        let memory = PeerMemory::map(regions).unwrap();
        let mut view = memory.view();
        bytes.iter().for_each(|(at, byte)| view.at(*at, 1).unwrap().write(&[*byte]));
        let (pool, at) = (pool(), PAGE - 10);
        let mut cache = pool.cache();
        for (offset, len) in probes {
            let wanted: Option<Vec<u8>> =
                (at + offset..at + offset + len as u64).map(|at| bytes.get(&at).copied()).collect();
            let mut packet = cache.allocate().unwrap();
            let whole = view.parts(at + offset, len, |part| cache.append_from_peer(&mut packet, part));
            let mut read = vec![0; packet.len()];
            cache.read(&packet, 0, &mut read);
            cache.free(packet);
            // An empty range may be outside of all regions, or at an end.
            prop_assert!(len == 0 || whole.map(|()| read) == wanted);
        }
    }

    #[test]
    fn packets_go_there_and_back_unchanged(lens in proptest::collection::vec(0_usize..=DATA_ROOM, 1..8)) {
        let memory = PeerMemory::map(vec![region(0, 0, 0)]).unwrap();
        let (pool, mut burst) = (pool(), Burst::new());
        let mut cache = pool.cache();
        for (i, len) in lens.iter().enumerate() {
            let mut packet = cache.allocate().unwrap().with_len(*len);
            let bytes: Vec<u8> = (0..*len).map(|at| (at * 7 + i) as u8).collect();
            cache.write(&mut packet, 0, &bytes);
            burst.push(packet);
        }
        let mut view = memory.view();
        let (all, mut round) = (lens.len(), Burst::new());
        while round.len() < all {
            let (len, number) = (lens[round.len()], round.len());
            let before = [view.at(0, 1).unwrap(), view.at(13 + len as u64, 1).unwrap()];
            before.iter().for_each(|guard| guard.write(&[0xee]));
            prop_assert_eq!(cache.send_copies(9, &mut burst, [5; 12], |i, len| {
                view.at(1, 12 + len).filter(|_| i == 0)
            }), 1);
            cache.receive_copies(1, &mut round, |_| view.at(13, len));
            let mut bytes = vec![0; len];
            cache.read(&round[number], 0, &mut bytes);
            prop_assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == (at * 7 + number) as u8));
            for at in [0, 13 + len as u64] {
                let mut guard = Burst::new();
                cache.receive_copies(1, &mut guard, |_| view.at(at, 1));
                let mut byte = [0];
                let guard = guard.remove(0);
                cache.read(&guard, 0, &mut byte);
                cache.free(guard);
                prop_assert_eq!(byte, [0xee]);
            }
        }
        round.into_iter().for_each(|packet| cache.free(packet));
        drop(cache);
        prop_assert_eq!(pool.available(), 64);
    }
}
