use std::time::Instant;

use vireo_eal::dma::Burst;
use vireo_eal::event::is_signaled;

use super::*;
use crate::forward::{Polling, forward_any};
use crate::hook::Uniform;
use crate::tied::tests::{Bench, Choices, Device, KINDS, Kind, frame};

/// Time after which a packet counts as lost: nobody wakes the lcore.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns how many packets each lane of a test forwards.
fn packets() -> usize {
    std::env::var("VIREO_SLEEPS").ok().and_then(|count| count.parse().ok()).unwrap_or(300)
}

/// Sends packets one by one to an lcore that sleeps whenever it finds none, at any distance from the last one.
/// Returns the number of sleeps.
fn wakes(kinds: [Kind; 2], ties: bool, idle_polls: u32) -> u64 {
    let mut bench = Bench::new(kinds, [64, 64], Uniform::Unchanged);
    let (stop, counts) = (StopFlag::with_event().unwrap(), LcoreTicks::default());
    let [from, to] = bench.devices.clone();
    let mut choices = Choices(7);
    let mut cache = bench.pool.cache();
    let lanes = bench.lane.take().into_iter().collect();
    let polling =
        Polling { ties, sleep: Some(Sleep { idle_polls, longest: None, counts: &counts }), busy_ticks: None };
    let mut lanes = std::thread::scope(|scope| {
        let lcore = scope.spawn(|| forward_any(lanes, &mut cache, polling, &stop, || ()));
        for number in 0..packets() {
            for _ in 0..choices.below(2000) {
                std::hint::spin_loop();
            }
            assert!(from.receive(&frame(number, 60)));
            if !arrives(&to) {
                stop.set();
                panic!("{kinds:?}, ties {ties}: packet {number} woke nobody");
            }
        }
        stop.set();
        lcore.join().unwrap()
    });
    bench.lane = lanes.pop();
    drop(cache);
    bench.stop();
    counts.sleeps.get()
}

fn arrives(device: &Device) -> bool {
    let since = Instant::now();
    while device.transmitted().is_empty() {
        if since.elapsed() > PATIENCE {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// What [`RxBurst`] promises of each driver's queue.
#[test]
fn an_armed_queue_is_signaled_for_what_it_has_not_received() {
    for kind in KINDS {
        let mut bench = Bench::new([kind; 2], [64, 64], Uniform::Unchanged);
        let from = &bench.devices[0];
        let (mut cache, mut burst) = (bench.pool.cache(), Burst::new());
        let lane = bench.lane.as_mut().unwrap();
        for round in 0..100 {
            assert!(lane.arm(), "{kind:?}, {round}: nothing has arrived");
            assert!(from.receive(&frame(0, 60)));
            assert!(is_signaled(lane.event().unwrap()), "{kind:?}, {round}: no signal");
            lane.disarm();
            assert!(!lane.arm(), "{kind:?}, {round}: a packet has arrived");
            lane.disarm();
            for _ in 0..2 {
                assert!(from.receive(&frame(1, 60)));
                lane.rx.rx_burst(&mut cache, &mut burst);
            }
            lane.rx.rx_burst(&mut cache, &mut burst);
            assert_eq!(burst.len(), 3);
            burst.drain(..).for_each(|packet| cache.free(packet));
            assert!(!is_signaled(lane.event().unwrap()), "{kind:?}, {round}: a signal that nobody wants");
        }
        drop(cache);
        bench.stop();
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri does not support poll")]
fn each_packet_wakes_the_lcore() {
    for kind in KINDS {
        for (ties, idle_polls) in [(true, 1), (false, 1), (true, 20), (false, 20)] {
            let sleeps = wakes([kind, Kind::Virtio], ties, idle_polls);
            assert!(sleeps > 0, "{kind:?}, ties {ties}");
        }
    }
}
