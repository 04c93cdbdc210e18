//! Models of the orders in which an lcore and the port's thread access a ring. `Broken` with a number
//! represents a ring.

use std::sync::Arc;

use vireo_eal::sync::{model, thread};

use super::*;

fn number(slot: &Slot) -> Option<u16> {
    match slot {
        Slot::Broken(number) => Some(*number),
        _ => None,
    }
}

/// Returns a ring that starts at 0.
fn shared() -> Arc<Shared> {
    let shared = Shared::default();
    shared.lock().slot = Slot::Broken(0);
    Arc::new(shared)
}

#[test]
fn a_ring_is_taken_away_once_and_whole() {
    model(None, || {
        let shared = shared();
        let lcore = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let mut bursts = 0;
                for _ in 0..2 {
                    let Some(mut state) = shared.try_lock() else { continue };
                    let Slot::Broken(next) = &mut state.slot else { continue };
                    *next += 1;
                    bursts += 1;
                }
                bursts
            })
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || number(&shared.lock().slot))
        };
        let taken = std::mem::take(&mut shared.lock().slot);
        let bursts = lcore.join().unwrap();
        other.join().unwrap();
        assert_eq!(number(&taken), Some(bursts));
        // No thread waits any more.
        assert!(matches!(shared.try_lock().as_deref(), Some(RingState { slot: Slot::Stopped, .. })));
    });
}

#[test]
fn an_lcore_does_not_wait() {
    model(None, || {
        let shared = shared();
        let state = shared.lock();
        let lcore = Arc::clone(&shared);
        let lcore = thread::spawn(move || lcore.try_lock().is_none());
        assert!(lcore.join().unwrap());
        drop(state);
    });
}

#[test]
fn who_waits_comes_before_the_next_burst() {
    model(None, || {
        let shared = shared();
        let lcore = Arc::clone(&shared);
        let lcore = thread::spawn(move || {
            let Some(state) = lcore.try_lock() else { return };
            if number(&state.slot) != Some(0) {
                return;
            }
            while lcore.waiting.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            drop(state);
            let next = lcore.try_lock().and_then(|state| number(&state.slot));
            assert_ne!(next, Some(0), "the lcore came first again");
        });
        shared.lock().slot = Slot::Broken(1);
        lcore.join().unwrap();
    });
}

/// The lcore counts what it receives from the ring, and the port's thread counts what it discards.
#[test]
fn a_count_is_neither_lost_nor_doubled_when_a_ring_changes_hands() {
    model(None, || {
        let shared = shared();
        let counters = Arc::clone(&shared.lock().report.counters);
        let lcore = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let mut bursts = 0;
                for _ in 0..2 {
                    let Some(state) = shared.try_lock() else { continue };
                    state.report.counters.errors.add(1);
                    bursts += 1;
                }
                bursts
            })
        };
        let reader = {
            let counters = Arc::clone(&counters);
            thread::spawn(move || {
                let first = counters.errors.get();
                assert!(counters.errors.get() >= first, "a count went back");
            })
        };
        shared.lock().report.counters.errors.add(1);
        let bursts: u64 = lcore.join().unwrap();
        reader.join().unwrap();
        assert_eq!(counters.errors.get(), bursts + 1);
    });
}
