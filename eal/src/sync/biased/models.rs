//! Models of the orders in which an owner and other threads use a value. Loom reports accesses that race.

use loom::cell::Cell;

use super::super::{model, thread};
use super::*;

fn lock() -> Arc<BiasedLock<Cell<u64>>> {
    Arc::new(BiasedLock::new(Cell::new(0)))
}

fn add(value: &Cell<u64>) {
    value.set(value.get() + 1);
}

/// Starts an owner that tries to use the value `times` times; returns how often it did.
fn owner(lock: &Arc<BiasedLock<Cell<u64>>>, times: usize) -> thread::JoinHandle<u64> {
    let mut owner = lock.own().unwrap();
    thread::spawn(move || (0..times).filter_map(|_| owner.try_lock().map(|value| add(&value))).count() as u64)
}

#[test]
fn an_owner_and_another_thread_never_have_the_value_together() {
    model(None, || {
        let lock = lock();
        let owner = owner(&lock, 2);
        add(&lock.lock());
        let uses = owner.join().unwrap();
        assert_eq!(lock.lock().get(), uses + 1);
        // No thread waits any more, and there may be an owner again.
        assert!(lock.own().unwrap().try_lock().is_some());
    });
}

#[test]
fn other_threads_take_turns() {
    model(Some(3), || {
        let lock = lock();
        let owner = owner(&lock, 1);
        let other = {
            let lock = Arc::clone(&lock);
            thread::spawn(move || add(&lock.lock()))
        };
        add(&lock.lock());
        other.join().unwrap();
        let uses = owner.join().unwrap();
        assert_eq!(lock.lock().get(), uses + 2);
    });
}

#[test]
fn an_owner_does_not_wait() {
    model(None, || {
        let lock = lock();
        let guard = lock.lock();
        assert_eq!(owner(&lock, 1).join().unwrap(), 0);
        drop(guard);
    });
}

#[test]
fn who_waits_comes_before_the_owner_again() {
    model(None, || {
        let lock = lock();
        let mut owner = lock.own().unwrap();
        let held = Arc::clone(&lock);
        let owner = thread::spawn(move || {
            let Some(value) = owner.try_lock() else { return };
            if value.get() != 0 {
                return;
            }
            while !held.is_wanted() {
                thread::yield_now();
            }
            drop(value);
            let next = owner.try_lock().map(|value| value.get());
            assert_ne!(next, Some(0), "the owner came first again");
        });
        lock.lock().set(1);
        owner.join().unwrap();
    });
}

#[test]
fn an_owner_sees_what_the_one_before_did() {
    model(None, || {
        let lock = lock();
        let first = owner(&lock, 1);
        if let Some(mut next) = lock.own() {
            assert_eq!(next.try_lock().unwrap().get(), 1);
        }
        first.join().unwrap();
    });
}
