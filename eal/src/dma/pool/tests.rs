use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::cache::CACHE;
use super::*;
use crate::dma::{DATA_ROOM, MemoryMap, Packet, Part};
use crate::mem::{Backing, Placement, Region};

fn pool(count: u32) -> Arc<Pool> {
    let memory = DmaMemory::map(Region::new(Pool::bytes(count), Backing::SmallPages).unwrap(), &[]).unwrap();
    Pool::new(&memory, count).unwrap()
}

#[test]
fn every_buffer_is_given_out_once_and_comes_back() {
    let pool = pool(1000);
    let mut cache = pool.cache();
    let mut packets: Vec<Packet> = std::iter::from_fn(|| cache.allocate()).collect();
    assert_eq!(packets.len(), 1000);
    packets.sort_by_key(Packet::slot);
    packets.dedup();
    assert_eq!(packets.len(), 1000);
    packets.into_iter().for_each(|packet| cache.free(packet));
    drop(cache);
    assert_eq!(pool.available(), 1000);
}

/// Compares the pool's device address of each buffer with that of its memory, which is found by the CPU's
/// address.
fn check_addresses(pool: &Arc<Pool>) {
    let mut cache = pool.cache();
    let packets: Vec<Packet> = std::iter::from_fn(|| cache.allocate()).collect();
    assert_eq!(packets.len(), pool.count() as usize);
    for packet in packets {
        let at = cache.data(&packet, 0, 1).addr();
        let holds = |node: &&NodeBuffers| {
            let start = node.start().addr().get();
            (start..start + node.numbers.len() * BUFFER_SIZE).contains(&at)
        };
        let node = pool.nodes.iter().find(holds).unwrap();
        let offset = at - node.memory.region().as_ptr().addr().get();
        assert_eq!(cache.iova(&packet), node.memory.iova(offset));
        cache.free(packet);
    }
}

#[test]
fn device_addresses_follow_the_pages() {
    let pages: Vec<u64> = (0..9).map(|page| 0x10_0000 + (page * 7 % 9) * 0x3000).collect();
    let region = Region::new(9 * 4096, Backing::SmallPages).unwrap();
    let memory = DmaMemory::with_addresses(region, 4096, &pages);
    for count in [1, 5, 10] {
        check_addresses(&Pool::new(&memory, count).unwrap());
    }
    let memory = DmaMemory::map(Region::new(1 << 20, Backing::SmallPages).unwrap(), &[]).unwrap();
    let pool = Pool::new(&memory, 100).unwrap();
    check_addresses(&pool);
    assert_eq!(pool.bases.len(), 1);
}

#[test]
fn an_exhausted_pool_is_told_once_a_second() {
    let (pool, second) = (pool(1), Tsc::hz());
    let told = [0, 1, second / 2, second, second + 1, 5 * second].map(|at| pool.may_warn(second + at));
    assert_eq!(told, [true, false, false, true, false, true]);
}

#[test]
fn what_is_not_taken_stays() {
    let pool = pool(40);
    let mut cache = pool.cache();
    let mut taking = cache.take(3);
    let taken = [taking.next(), taking.next()];
    drop(taking);
    assert_eq!((taken[0] == taken[1], cache.len()), (false, 30));
    let mut taking = cache.take(32);
    assert_eq!(std::iter::from_fn(|| taking.next()).count(), 32);
    drop(taking);
    let mut taking = cache.take(32);
    assert_eq!(std::iter::from_fn(|| taking.next()).count(), 6);
}

#[test]
fn a_count_takes_no_buffer_from_an_lcore() {
    let pool = pool(256);
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                std::hint::black_box(pool.available());
            }
        });
        let rounds = if cfg!(miri) { 100 } else { 100_000 };
        let found = (0..rounds).all(|_| {
            let mut cache = pool.cache();
            cache.allocate().map(|buffer| cache.free(buffer)).is_some()
        });
        is_done.store(true, Ordering::Relaxed);
        assert!(found, "an lcore saw an exhausted pool");
    });
    assert_eq!(pool.available(), 256);
}

#[test]
fn chunks_that_are_not_whole_become_whole() {
    let free = FreeList::new(100);
    let chunk = |buffers: std::ops::Range<u32>| buffers.collect::<Chunk>();
    for first in (0..100).step_by(10) {
        assert!(free.push(chunk(first..first + 10)));
        assert_eq!(free.len(), first as usize + 10);
    }
    let all: Vec<Chunk> = std::iter::from_fn(|| free.pop()).collect();
    assert_eq!(all.iter().map(|chunk| chunk.len()).collect::<Vec<_>>(), [32, 32, 32, 4]);
    assert_eq!(all.into_iter().flatten().collect::<Vec<_>>(), (0..100).collect::<Vec<u32>>());
    assert_eq!((free.len(), free.pop()), (0, None));
}

/// Caches of two pools with `count` buffers each, in separate memory.
fn two_caches(count: u32) -> [PoolCache; 2] {
    [(); 2].map(|()| pool(count).cache())
}

#[test]
fn a_buffer_that_another_pool_frees_goes_home() {
    let [mut own, mut other] = two_caches(40);
    for _ in 0..3 {
        own.free(other.allocate().unwrap());
    }
    // Also from a thread whose cache belongs to another pool.
    let sent: Vec<Packet> = (0..20).map(|_| other.allocate().unwrap()).collect();
    let foreign = own.pool().cache();
    let freed = std::thread::spawn(move || {
        let mut foreign = foreign;
        sent.into_iter().for_each(|packet| foreign.free(packet));
        foreign.len()
    });
    assert_eq!(freed.join().unwrap(), 0);
    let held: Vec<Packet> = std::iter::from_fn(|| own.allocate()).collect();
    let places: HashSet<u64> = held.iter().map(|packet| own.iova(packet)).collect();
    assert_eq!((held.len(), places.len()), (40, 40), "none of the other pool is given out");
    held.into_iter().for_each(|packet| own.free(packet));
    let pools = [own, other].map(|cache| Arc::clone(cache.pool()));
    assert_eq!(pools.map(|pool| pool.available()), [40, 40]);
}

#[test]
fn handles_that_outlive_their_pool_keep_its_tag_until_they_are_freed() {
    let mut own = pool(1).cache();
    // More often than the number of tags.
    for _ in 0..100 {
        let mut cache = pool(40).cache();
        let strays: Vec<Packet> = std::iter::from_fn(|| cache.allocate()).collect();
        let tag = cache.tag();
        drop(cache);
        assert_ne!(pool(1).tag.get(), tag);
        strays.into_iter().for_each(|packet| own.free(packet));
    }
    assert!(own.is_empty());
}

#[test]
fn data_of_another_pool_is_out_of_reach() {
    let [mut own, mut other] = two_caches(4);
    let mut packet = other.allocate().unwrap().with_len(60);
    let mut refused = |access: &mut dyn FnMut(&mut PoolCache, &mut Packet)| {
        catch_unwind(AssertUnwindSafe(|| access(&mut own, &mut packet))).is_err()
    };
    assert!(refused(&mut |own, packet| own.write(packet, 0, &[1])));
    assert!(refused(&mut |own, packet| own.read(packet, 0, &mut [1])));
    assert!(refused(&mut |own, packet| own.write_each(std::slice::from_mut(packet), [1], [2])));
    assert!(refused(&mut |own, packet| {
        own.iova(packet);
    }));
    assert!(refused(&mut |own, packet| {
        own.read_header::<12>(packet);
    }));
    other.free(packet);
}

#[test]
fn an_offset_that_wraps_is_refused() {
    let mut cache = pool(1).cache();
    let mut packet = cache.allocate().unwrap().with_len(60);
    let mut bytes = [0; 8];
    for offset in [usize::MAX - 3, usize::MAX, DATA_ROOM + 1, DATA_ROOM - 7] {
        assert!(catch_unwind(AssertUnwindSafe(|| cache.write(&mut packet, offset, &bytes))).is_err());
        assert!(catch_unwind(AssertUnwindSafe(|| cache.read(&packet, offset, &mut bytes))).is_err());
    }
    cache.free(packet);
}

#[test]
fn a_tag_is_used_again_when_all_buffers_are_home() {
    let tags = |lost: usize| {
        let tag_of = |_| {
            let pool = pool(2);
            let mut cache = pool.cache();
            let packets: Vec<Packet> = std::iter::from_fn(|| cache.allocate()).collect();
            packets.into_iter().skip(lost).for_each(|packet| cache.free(packet));
            pool.tag.get()
        };
        (0..10).map(tag_of).collect::<HashSet<u8>>()
    };
    // Other tests create pools at the same time.
    assert_eq!(tags(1).len(), 10, "a handle that is somewhere is of a pool that is gone");
    (0..300).for_each(|_| drop(pool(1)));
    assert!(tags(0).iter().all(|tag| tag.count_ones() == 4), "the OR of two tags is neither of them");
}

#[test]
fn data_and_header_do_not_touch() {
    let pool = pool(2);
    let mut cache = pool.cache();
    let mut packet = cache.allocate().unwrap().with_len(60);
    cache.write_header(&mut packet, &[7; 12]);
    cache.write(&mut packet, 0, &[1; 60]);
    assert_eq!(cache.read_header::<12>(&packet), [7; 12]);
    let mut bytes = [0; 62];
    cache.read(&packet, 0, &mut bytes);
    assert_eq!((bytes[59], bytes[60]), (1, 0));
}

/// One action of an lcore with its cache.
#[derive(Clone, Debug)]
enum Step {
    Allocate(usize),
    Free(usize),
    FreeAll(usize),
    /// The lcore ends, and another one begins.
    Renew,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..600_usize).prop_map(Step::Allocate),
        (0..600_usize).prop_map(Step::Free),
        (0..=CACHE / 2).prop_map(Step::FreeAll),
        Just(Step::Renew),
    ]
}

proptest! {
    /// The model is the set of buffers that the lcores hold. All others are free, wherever they are.
    #[test]
    fn caches_agree_with_a_set_of_buffers(
        count in 0..1300_u32,
        steps in prop::collection::vec((0..3_usize, step()), 1..20),
    ) {
        let pool = pool(count);
        let mut caches = [pool.cache(), pool.cache(), pool.cache()];
        let mut held: HashSet<u32> = HashSet::new();
        let packet = |slot| Packet::in_slot(slot, 0, Packet::fresh_bits(pool.tag.get()));
        for (lcore, step) in steps {
            let cache = &mut caches[lcore];
            let some = |held: &mut HashSet<u32>, most| {
                let some: Vec<u32> = held.iter().copied().take(most).collect();
                held.retain(|index| !some.contains(index));
                some
            };
            match step {
                Step::Allocate(wanted) => {
                    for _ in 0..wanted {
                        let Some(packet) = cache.allocate() else {
                            prop_assert_eq!((cache.len(), pool.available()), (0, 0));
                            break;
                        };
                        prop_assert!(held.insert(packet.slot()), "it is given out twice");
                    }
                }
                Step::Free(most) => {
                    some(&mut held, most).into_iter().for_each(|slot| cache.free(packet(slot)));
                }
                // SAFETY: each slot in `held` was that of a packet of this pool, which no longer exists.
                Step::FreeAll(most) => unsafe { cache.free_slots(&some(&mut held, most)) },
                Step::Renew => caches[lcore] = pool.cache(),
            }
            let cached: usize = caches.iter().map(PoolCache::len).sum();
            prop_assert_eq!(held.len() + cached + pool.available() as usize, count as usize);
        }
        held.into_iter().for_each(|slot| caches[0].free(packet(slot)));
    }
}

/// Memory for `EACH` buffers and a little more, labeled as node 4, no node, and node 7. Each is at the device
/// address that `at` returns for its number, if it returns one.
fn three_nodes(at: impl Fn(u64) -> Option<u64>) -> Vec<Arc<DmaMemory>> {
    // The machine may lack these nodes and then refuses pages on them, so all pages come from node 0.
    let parts = [(); 3].map(|()| (None, EACH * BUFFER_SIZE + 4096));
    let regions = Region::adjoining(&parts, Backing::SmallPages, Placement::Preferred).unwrap();
    let regions =
        [Some(4), None, Some(7)].into_iter().zip(regions).map(|(node, region)| region.with_node(node));
    let map = MemoryMap::without_spaces();
    match at(0) {
        None => {
            let all = map.add_all(regions.map(|region| (region, vec![Part::default()])).collect()).unwrap();
            all.into_iter().flatten().collect()
        }
        Some(_) => (0..)
            .zip(regions)
            .map(|(number, region)| {
                let len = region.len();
                let pages: Vec<u64> =
                    (0..len as u64 / 4096).map(|page| at(number).unwrap() + page * 4096).collect();
                map.add_at(region, 4096, &pages)
            })
            .collect(),
    }
}

const EACH: usize = 64;

fn on_three_nodes(memory: &[Arc<DmaMemory>]) -> Arc<Pool> {
    // The order differs from that of the memory.
    let shares = [2, 0, 1].map(|index: usize| (Arc::clone(&memory[index]), EACH as u32 - 10 * index as u32));
    Pool::on_nodes(&shares).unwrap()
}

#[test]
#[cfg_attr(miri, ignore = "Miri cannot unmap part of a mapping")]
fn a_cache_takes_buffers_of_its_node_first() {
    let memory = three_nodes(|_| None);
    let (pool, count) = (on_three_nodes(&memory), 64 + 54 + 44);
    assert_eq!((pool.count(), pool.bases.len()), (count as u32, 1));
    let node_of = |packet: &Packet| {
        let is_there = |node: &&NodeBuffers| node.numbers.contains(&(packet.slot() / BUFFER_SIZE as u32));
        pool.nodes.iter().find(is_there).unwrap().node()
    };
    for round in 0..3 {
        let mut near = pool.cache_near(Some(7));
        let taken: Vec<Packet> = std::iter::from_fn(|| near.allocate()).collect();
        assert_eq!(taken.len(), count);
        let nodes: Vec<Option<u32>> = taken.iter().map(node_of).collect();
        // The second chunk of node 7 is partial, so the cache mixes its buffers with those of another node.
        assert!(nodes[..32].iter().all(|node| *node == Some(7)), "{round}: {nodes:?}");
        assert_eq!(nodes.iter().filter(|node| **node == Some(7)).count(), 44);
        // The buffers return through a cache of another node, on another thread.
        let mut other = pool.cache_near(Some(4));
        std::thread::scope(|scope| {
            scope.spawn(move || taken.into_iter().rev().for_each(|packet| other.free(packet)));
        });
        drop(near);
        assert_eq!(pool.available() as usize, count);
        let own: Vec<usize> = pool.nodes.iter().map(|node| node.free.len()).collect();
        assert_eq!(own, [64, 54, 44]);
    }
    let mut nowhere = pool.cache_near(Some(1));
    let first = nowhere.allocate().unwrap();
    assert_eq!(node_of(&first), Some(4));
    nowhere.free(first);
}

#[test]
#[cfg_attr(miri, ignore = "Miri cannot unmap part of a mapping")]
fn buffers_of_all_nodes_are_at_the_addresses_of_their_memory() {
    check_addresses(&on_three_nodes(&three_nodes(|_| None)));
    let apart = on_three_nodes(&three_nodes(|number| Some([9, 3, 70][number as usize] << 32)));
    assert_eq!(apart.bases.len(), 256);
    check_addresses(&apart);
}

#[test]
fn memory_that_does_not_adjoin_is_refused() {
    let none: [(Arc<DmaMemory>, u32); 0] = [];
    assert_eq!(Pool::on_nodes(&none).unwrap_err().kind(), ErrorKind::Usage);
    let memory = || DmaMemory::map(Region::new(Pool::bytes(1), Backing::SmallPages).unwrap(), &[]).unwrap();
    let error = Pool::on_nodes(&[(memory(), 1), (memory(), 1)]).unwrap_err();
    assert_eq!((error.kind(), error.why()), (ErrorKind::Usage, "their regions are not adjacent"));
}
