use std::thread;

use super::*;

#[test]
fn there_is_one_owner_at_a_time() {
    let lock = Arc::new(BiasedLock::new(0));
    let owner = lock.own().unwrap();
    assert!(owner.is_of(&lock) && !owner.is_of(&Arc::new(BiasedLock::new(0))));
    assert!(lock.own().is_none());
    drop(owner);
    assert!(lock.own().is_some());
}

#[test]
fn an_owner_that_panics_leaves_the_value_to_others() {
    let lock = Arc::new(BiasedLock::new(0));
    let mut owner = lock.own().unwrap();
    let ended = thread::spawn(move || {
        let _value = owner.try_lock();
        panic!("as the test wants");
    });
    assert!(ended.join().is_err());
    *lock.lock() += 1;
    assert_eq!(lock.own().unwrap().try_lock().as_deref(), Some(&1));
}

#[test]
fn no_change_is_lost_between_real_threads() {
    let rounds = if cfg!(miri) { 20 } else { 20_000 };
    for is_fenced in [true, cfg!(miri)] {
        let lock = Arc::new(BiasedLock { is_fenced, ..BiasedLock::new(0_u64) });
        let mut owner = lock.own().unwrap();
        let is_over = AtomicBool::new(false);
        let owned = thread::scope(|scope| {
            let owned = scope.spawn(|| {
                let mut owned = 0;
                while !is_over.load(Ordering::Relaxed) {
                    if let Some(mut value) = owner.try_lock() {
                        *value += 1;
                        owned += 1;
                    }
                }
                owned
            });
            (0..rounds).for_each(|_| *lock.lock() += 1);
            is_over.store(true, Ordering::Relaxed);
            owned.join().unwrap()
        });
        assert_eq!(*lock.lock(), owned + rounds);
    }
}
