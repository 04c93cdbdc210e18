//! Loom models: threads that use the stop flag concurrently, and threads that claim the same lcore.

use loom::cell::UnsafeCell;

use super::*;
use crate::sync::{model, thread};

#[test]
fn a_stop_is_not_lost_between_calls() {
    model(None, || {
        let stop = StopFlag::new();
        let caller = stop.clone();
        let caller = thread::spawn(move || {
            for _ in 0..2 {
                caller.interrupt();
                caller.resume();
            }
        });
        stop.set();
        caller.join().unwrap();
        assert_eq!((stop.is_set(), stop.signal()), (true, None));
    });
}

/// An lcore that sleeps waits for the event and then looks at the flag.
#[test]
fn the_event_of_a_raised_flag_is_signaled_however_calls_end() {
    model(None, || {
        let stop = StopFlag::with_event().unwrap();
        let caller = stop.clone();
        let caller = thread::spawn(move || {
            caller.interrupt();
            caller.resume();
        });
        stop.set();
        caller.join().unwrap();
        assert!(stop.is_set());
        assert!(stop.event().unwrap().take());
    });
}

#[test]
fn the_first_signal_is_told_from_the_second() {
    model(None, || {
        let stop = StopFlag::new();
        stop.interrupt();
        let signals = [SIGINT, SIGTERM].map(|signal| {
            let stop = stop.clone();
            thread::spawn(move || stop.signalled(signal))
        });
        stop.set();
        stop.resume();
        assert!(stop.is_set());
        let mut second = signals.map(|signal| signal.join().unwrap());
        second.sort_unstable();
        assert_eq!(second, [false, true]);
        assert!(stop.signal().is_some());
    });
}

/// Work of a function on its lcore. Loom detects whether another function does it at the same time.
struct Work(UnsafeCell<()>);

// SAFETY: loom stops the model if two threads are in the cell at once.
unsafe impl Sync for Work {}

#[test]
fn an_lcore_has_one_function_at_a_time() {
    model(None, || {
        let lcore = Arc::new((Busy::default(), Work(UnsafeCell::new(()))));
        let run = |lcore: &(Busy, Work)| {
            let release = lcore.0.claim();
            release.is_some_and(|_release| lcore.1.0.with_mut(|_| true))
        };
        let others = [(); 2].map(|()| {
            let lcore = Arc::clone(&lcore);
            thread::spawn(move || run(&lcore))
        });
        let own = run(&lcore);
        let others = others.map(|other| other.join().unwrap());
        assert!(own || others.contains(&true), "nobody had it");
        assert!(run(&lcore), "it is not free though all have ended");
    });
}
