use std::collections::HashSet;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::cache::CACHE;
use super::*;
use crate::dma::memory::Translation;
use crate::mem::{Backing, Region};

fn pool(count: u32) -> Arc<Pool> {
    let memory = DmaMemory::map(Region::new(Pool::bytes(count), Backing::SmallPages).unwrap(), &[]).unwrap();
    Pool::new(&memory, count).unwrap()
}

#[test]
fn every_buffer_is_given_out_once_and_comes_back() {
    let pool = pool(1000);
    let mut cache = pool.cache();
    let mut buffers: Vec<Buffer> = std::iter::from_fn(|| cache.allocate()).collect();
    assert_eq!(buffers.len(), 1000);
    buffers.sort_by_key(|buffer| buffer.0);
    buffers.dedup();
    assert_eq!(buffers.len(), 1000);
    buffers.into_iter().for_each(|buffer| cache.free(buffer));
    drop(cache);
    assert_eq!(pool.available(), 1000);
}

#[test]
fn device_addresses_follow_the_pages() {
    let pages: Vec<u64> = (0..9).map(|page| 0x10_0000 + (page * 7 % 9) * 0x3000).collect();
    let translation = Translation::paged(4096, &pages);
    for offset in [0, 2048, 4096, 3 * 2048] {
        let bases = place::bases(&translation, offset, 10);
        for index in 0..10_usize {
            let wanted = translation.iova(offset + index * BUFFER_SIZE + HEADROOM);
            assert_eq!(bases[index].wrapping_add((index * BUFFER_SIZE) as u64), wanted);
        }
    }
    let memory = DmaMemory::map(Region::new(1 << 20, Backing::SmallPages).unwrap(), &[]).unwrap();
    assert_eq!(Pool::new(&memory, 100).unwrap().bases.len(), 1);
}

#[test]
fn an_exhausted_pool_is_told_once_a_second() {
    let (pool, second) = (pool(1), Tsc::hz());
    let told = [0, 1, second / 2, second, second + 1, 5 * second].map(|at| pool.is_to_warn(second + at));
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
fn what_cannot_be_of_the_pool_does_not_come_back() {
    let pool = pool(3);
    let chunk = |distances: &[usize]| distances.iter().map(|index| (index * BUFFER_SIZE) as u32).collect();
    assert_eq!(pool.free.pop().unwrap(), chunk(&[0, 1, 2]));
    pool.take_back(chunk(&[5, 2, 3]));
    pool.take_back(chunk(&[3]));
    assert_eq!((pool.free.len(), pool.free.pop()), (1, Some(chunk(&[2]))));
    (0..2 * CHUNK).for_each(|_| pool.take_back(chunk(&[1])));
    assert_eq!(pool.available(), CHUNK as u32, "there is room for one chunk");
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

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "a buffer of another pool")]
fn a_buffer_beyond_the_end_is_not_freed() {
    let (large, small) = (pool(9), pool(3));
    let mut cache = large.cache();
    let mut buffers: Vec<Buffer> = std::iter::from_fn(|| cache.allocate()).collect();
    buffers.sort_by_key(|buffer| buffer.0);
    small.cache().free(buffers.pop().unwrap());
}

#[test]
fn data_and_header_do_not_touch() {
    let pool = pool(2);
    let mut cache = pool.cache();
    let mut buffer = cache.allocate().unwrap();
    cache.write_header(&mut buffer, &[7; 12]);
    let mut packet = Packet::new(buffer, 60);
    cache.write(&mut packet, 0, &[1; 60]);
    assert_eq!(cache.read_header::<12>(packet.buffer()), [7; 12]);
    let mut bytes = [0; 62];
    cache.read(&packet, 0, &mut bytes);
    assert_eq!((bytes[59], bytes[60]), (1, 0));
}

/// What an lcore does with its cache.
#[derive(Clone, Debug)]
enum Step {
    Allocate(usize),
    Free(usize),
    FreeAll(usize),
    /// The lcore ends, and another begins.
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
    /// The model is the set of buffers that the lcores hold: the others are free, wherever they are.
    #[test]
    fn caches_agree_with_a_set_of_buffers(
        count in 0..1300_u32,
        steps in prop::collection::vec((0..3_usize, step()), 1..20),
    ) {
        let pool = pool(count);
        let mut caches = [pool.cache(), pool.cache(), pool.cache()];
        let mut held: HashSet<u32> = HashSet::new();
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
                        let Some(buffer) = cache.allocate() else {
                            prop_assert_eq!((cache.len(), pool.available()), (0, 0));
                            break;
                        };
                        prop_assert!(held.insert(buffer.0), "it is given out twice");
                    }
                }
                Step::Free(most) => {
                    some(&mut held, most).into_iter().for_each(|index| cache.free(Buffer(index)));
                }
                Step::FreeAll(most) => cache.free_all(&some(&mut held, most)),
                Step::Renew => caches[lcore] = pool.cache(),
            }
            let cached: usize = caches.iter().map(PoolCache::len).sum();
            prop_assert_eq!(held.len() + cached + pool.available() as usize, count as usize);
        }
    }
}
