//! Models of lcores that share a pool, for loom. The queue is [`crate::sync`]'s stand-in for crossbeam's.

use std::collections::HashSet;
use std::sync::Mutex;

use super::cache::CACHE;
use super::*;
use crate::dma::{MAX_BURST, Packet};
use crate::mem::{Backing, Region};
use crate::sync::{model, thread};

fn pool(count: u32) -> Arc<Pool> {
    let region = Region::new(Pool::bytes(count), Backing::SmallPages).unwrap();
    Pool::new(&DmaMemory::map(region, &[]).unwrap(), count).unwrap()
}

/// Takes buffers in `rounds` rounds, records them as held, and returns all of them. The second half returns
/// through another cache, so that there are more chunks and they are not full.
fn work(pool: &Arc<Pool>, held: &Mutex<HashSet<u32>>, rounds: usize) -> usize {
    let mut cache = pool.cache();
    let mut slots: Vec<u32> = Vec::new();
    for _ in 0..rounds {
        slots.extend(cache.take(MAX_BURST).all());
    }
    for slot in &slots {
        assert!(held.lock().unwrap().insert(*slot), "it is given out twice");
    }
    let count = slots.len();
    for (number, slot) in slots.into_iter().enumerate() {
        if number == count / 2 {
            drop(std::mem::replace(&mut cache, pool.cache()));
        }
        assert!(held.lock().unwrap().remove(&slot));
        cache.free(Packet::in_slot(slot, 0, Packet::fresh_bits(pool.tag.get())));
    }
    count
}

#[test]
fn buffers_are_neither_lost_nor_doubled() {
    model(None, || {
        // The last chunk is not full.
        let (pool, held) = (pool(80), Arc::new(Mutex::default()));
        let others = [2, 1].map(|rounds| {
            let (pool, held) = (Arc::clone(&pool), Arc::clone(&held));
            thread::spawn(move || work(&pool, &held, rounds))
        });
        let counts = others.map(|other| other.join().unwrap());
        assert!(counts[0] > 0 && counts[0] <= 64 && counts[1] <= 32, "{counts:?}");
        assert_eq!(pool.available(), 80);
    });
}

#[test]
fn a_full_cache_spills_what_another_lcore_gets() {
    model(None, || {
        let pool = pool(CACHE as u32 + 1);
        let held = Arc::new(Mutex::default());
        let mut cache = pool.cache();
        let buffers: Vec<Packet> = std::iter::from_fn(|| cache.allocate()).collect();
        let other = {
            let (pool, held) = (Arc::clone(&pool), Arc::clone(&held));
            thread::spawn(move || work(&pool, &held, 1))
        };
        buffers.into_iter().for_each(|buffer| cache.free(buffer));
        assert!(other.join().unwrap() <= MAX_BURST);
        drop(cache);
        assert_eq!(pool.available(), CACHE as u32 + 1);
    });
}

#[test]
fn one_lcore_says_that_the_pool_is_exhausted() {
    model(None, || {
        let (pool, now) = (pool(1), Tsc::hz());
        let others = [(); 2].map(|()| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.may_warn(now))
        });
        let own = pool.may_warn(now);
        let told = others.map(|other| other.join().unwrap());
        assert_eq!([own, told[0], told[1]].iter().filter(|told| **told).count(), 1);
    });
}
