//! Distance between two CPUs, which matters because the ends of a ring exchange cache lines.
//!
//! The CPUs of a virtual machine move between those of its host. The distance is therefore short at one
//! moment and long a second later, and both programs pay for it according to what they share.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use crossbeam::utils::CachePadded;
use serde::Serialize;
use vireo_eal::Result;
use vireo_eal::lcore::pin_to;

use super::{Pair, median_of, ratios};
use crate::cores::Cores;
use crate::stats::median;

/// Round trips that are timed together in a batch.
const TRIPS: u32 = 1000;
/// Number of batches. Their median leaves out batches during which something else ran.
const BATCHES: usize = 9;

/// A word that two threads write in turn.
#[derive(Debug, Default)]
struct Line {
    turn: CachePadded<AtomicU64>,
    over: CachePadded<AtomicBool>,
}

impl Line {
    /// Waits for `turn` and passes the word on. Returns false if the other thread has ended.
    fn pass(&self, turn: u64) -> bool {
        while self.turn.load(Ordering::Acquire) != turn {
            if self.over.load(Ordering::Relaxed) {
                return false;
            }
        }
        self.turn.store(turn + 1, Ordering::Release);
        true
    }

    /// Runs `body` on `cpu`, and notifies the other thread when it has ended.
    fn on<T>(&self, cpu: usize, body: impl FnOnce() -> T) -> Result<T> {
        let done = pin_to(cpu).map(|()| body());
        self.over.store(true, Ordering::Relaxed);
        done
    }
}

/// Nanoseconds that a cache line takes from the forwarder's CPU to the generator's and back.
///
/// # Errors
/// If a thread cannot be pinned.
pub(super) fn round_trip(cores: Cores) -> Result<f64> {
    let line = Line::default();
    let back = || (1..).step_by(2).take_while(|turn| line.pass(*turn)).for_each(drop);
    let forth = || {
        let mut turns = (0..).step_by(2);
        let batches: Vec<f64> = (0..BATCHES)
            .map(|_| {
                let since = Instant::now();
                turns.by_ref().take(TRIPS as usize).all(|turn| line.pass(turn));
                since.elapsed().as_secs_f64() * 1e9 / f64::from(TRIPS)
            })
            .collect();
        median(&batches).unwrap_or(f64::NAN)
    };
    thread::scope(|scope| {
        let threads =
            (scope.spawn(|| line.on(cores.generator, back)), scope.spawn(|| line.on(cores.forwarder, forth)));
        threads.0.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        threads.1.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Smallest and largest of some values.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Range {
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Range {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let none = Self { low: f64::INFINITY, high: f64::NEG_INFINITY };
        values.fold(none, |range, value| Self { low: range.low.min(value), high: range.high.max(value) })
    }

    /// Border between near and far values: the geometric mean of the ends. `None` unless the ends differ by a
    /// factor of at least two.
    pub(super) fn border(self) -> Option<f64> {
        (self.high >= 2.0 * self.low).then(|| (self.low * self.high).sqrt())
    }
}

/// Pairs whose CPUs were near each other from start to end, and pairs whose CPUs were far apart. Other pairs
/// had both.
#[derive(Debug, Serialize)]
pub(super) struct ByDistance {
    pub(super) border_ns: f64,
    pub(super) near: Option<Group>,
    pub(super) far: Option<Group>,
    pub(super) mixed_pairs: usize,
}

/// Medians of a group of pairs.
#[derive(Debug, Serialize)]
pub(super) struct Group {
    pub(super) pairs: usize,
    pub(super) rate_ratio: f64,
    pub(super) ticks_ratio: f64,
}

impl ByDistance {
    pub(super) fn of(runs: &[Pair], border: f64) -> Self {
        let group = |with: &dyn Fn(f64) -> bool| {
            let pairs: Vec<Pair> =
                runs.iter().copied().filter(|pair| pair.line.iter().all(|line| with(*line))).collect();
            (!pairs.is_empty()).then(|| Group {
                pairs: pairs.len(),
                rate_ratio: median_of(ratios(&pairs, |sample| sample.pps)),
                ticks_ratio: median_of(ratios(&pairs, |sample| sample.ticks)),
            })
        };
        let (near, far) = (group(&|line| line < border), group(&|line| line >= border));
        let sorted: usize = [&near, &far].into_iter().flatten().map(|group| group.pairs).sum();
        Self { border_ns: border, near, far, mixed_pairs: runs.len() - sorted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::forwarder::Sample;

    #[test]
    fn a_line_goes_there_and_back() {
        match Cores::of_this_process() {
            Ok(cores) => assert!(round_trip(cores).unwrap() > 0.0),
            Err(error) => assert!(error.to_string().contains("on one core"), "{error}"),
        }
    }

    #[test]
    fn a_cpu_that_is_not_there_is_an_error_and_no_wait() {
        let cores = Cores { generator: 0, forwarder: 4095, idle: None };
        assert!(round_trip(cores).unwrap_err().to_string().contains("4095"));
        let cores = Cores { generator: 4095, forwarder: 0, idle: None };
        assert!(round_trip(cores).is_err());
    }

    #[test]
    fn pairs_are_told_apart_by_how_far_the_cpus_were() {
        let pair = |other, line| Pair {
            dpdk: Sample { pps: 2e6, ticks: 100.0, peer_ticks: 200.0 },
            other: Sample { pps: other, ticks: 40.0, peer_ticks: 200.0 },
            line,
        };
        let runs = [
            pair(4e6, [60.0, 80.0, 60.0]),
            pair(4e6, [60.0, 60.0, 60.0]),
            pair(6e6, [340.0, 320.0, 360.0]),
            pair(9e6, [60.0, 360.0, 360.0]),
        ];
        let range = Range::of(runs.iter().flat_map(|pair| pair.line));
        assert_eq!((range.low, range.high), (60.0, 360.0));
        let groups = ByDistance::of(&runs, range.border().unwrap());
        let (near, far) = (groups.near.unwrap(), groups.far.unwrap());
        assert_eq!((near.pairs, near.rate_ratio), (2, 2.0));
        assert_eq!((far.pairs, far.rate_ratio, groups.mixed_pairs), (1, 3.0, 1));
        assert!(Range::of([60.0, 80.0].into_iter()).border().is_none());
    }
}
