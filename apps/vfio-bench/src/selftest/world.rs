//! Simulated machines: values spread, some are outliers, the machine drifts, and another program comes and
//! goes.

use std::f64::consts::TAU;

use crate::compare::{Comparison, Metric, Pair};
use crate::record::{Latency, MapTime, Plan, Recording, Run, Throughput};
use crate::report::MARGIN;
use crate::run::{enough, schedule};
use crate::stats::Random;

const MODES: [&str; 3] = ["container", "cdev", "compat"];
const NICS: [&str; 3] = ["virtio-net", "e1000", "e1000e"];
/// Simulated seconds of a round.
const ROUND: f64 = 20.0;

/// A machine, and the truth about its modes.
#[derive(Clone, Debug)]
pub(crate) struct World {
    random: Random,
    /// Standard deviation of a value's logarithm.
    spread: f64,
    /// Probability that a value is up to ten times too large.
    outliers: f64,
    /// Standard deviation of the drift that all values share, from run to run.
    drift: f64,
    /// Probability that another program, which halves the machine's speed, comes or goes.
    intrusions: f64,
    /// A mode, and the factor by which its times are longer and its rates lower. The other modes do not
    /// differ.
    effect: Option<(&'static str, f64)>,
    /// Logarithm of the machine's slowness.
    slowness: f64,
    intruded: bool,
}

impl World {
    /// Creates a machine on which modes do not differ.
    pub(crate) fn null(random: &mut Random) -> Self {
        let mut up_to = |most: f64| random.unit() * most;
        let (spread, outliers, drift, intrusions) =
            (0.01 + up_to(0.25), up_to(0.1), up_to(0.05), up_to(0.05));
        let random = random.clone();
        Self { random, spread, outliers, drift, intrusions, effect: None, slowness: 0.0, intruded: false }
    }

    /// Creates a machine, in half of the cases a quiet one, on which one mode takes 5 to 50 % longer or is
    /// faster by the same factor.
    pub(crate) fn with_effect(random: &mut Random) -> Self {
        let mode = MODES[(random.unit() * MODES.len() as f64) as usize];
        let times = 1.05 + random.unit() * 0.45;
        let times = if random.unit() < 0.5 { times } else { 1.0 / times };
        let quiet = random.unit() < 0.5;
        let mut world = Self { effect: Some((mode, times)), ..Self::null(random) };
        if quiet {
            world =
                Self { spread: world.spread.min(0.05), outliers: 0.0, drift: 0.0, intrusions: 0.0, ..world };
        }
        world
    }

    /// Returns whether the machine is undisturbed except for a spread of at most 5 %.
    pub(crate) fn is_quiet(&self) -> bool {
        self.spread <= 0.05 && self.outliers + self.drift + self.intrusions == 0.0
    }

    /// Returns the true ratio of a pair.
    pub(crate) fn ratio(&self, pair: &Pair) -> f64 {
        let ratio = self.times(&pair.mode) / self.times(&pair.baseline);
        match pair.metric {
            Metric::Doorbells => 1.0,
            Metric::ForwardPps | Metric::Throughput => 1.0 / ratio,
            _ => ratio,
        }
    }

    fn times(&self, mode: &str) -> f64 {
        self.effect.filter(|(changed, _)| *changed == mode).map_or(1.0, |(_, times)| times)
    }

    /// Records and reports, as `run` and `report` do.
    pub(crate) fn report(mut self) -> Comparison {
        let plan = Plan {
            modes: MODES.map(str::to_owned).into(),
            seed: 0,
            rounds: 12,
            width: 0.05,
            limit: 300.0,
            stream: 0.2,
            map_mib: 128,
            ..Plan::default()
        };
        let mut recording = Recording { plan: Some(plan), ..Recording::default() };
        for round in 0.. {
            self.round(&mut recording, round);
            let (end, _) = enough(&recording, round + 1, f64::from(round + 1) * ROUND);
            if end.is_some() {
                break;
            }
        }
        Comparison::of(&[recording], MARGIN)
    }

    fn round(&mut self, recording: &mut Recording, round: u32) {
        for nic in NICS {
            for (pair, mode) in schedule(&MODES, round, &mut self.random) {
                self.pass_time();
                let times = self.times(mode);
                let mut time = |of: f64| of * times * self.value();
                let (latency, open, first) = (time(4000.0), time(50.0), time(100.0));
                let forward_pps = 1e6 / time(5.0);
                // The search finds the throughput to within one step.
                let steps = (1e6 / time(4.5) / forward_pps).ln() / 1.05_f64.ln();
                let throughput = Throughput {
                    frame: 60,
                    pps: forward_pps * 1.05_f64.powf(steps.floor()),
                    ..Throughput::default()
                };
                let received = 100_000;
                recording.runs.push(Run {
                    nic: nic.to_owned(),
                    mode: mode.to_owned(),
                    round,
                    pair: pair.to_owned(),
                    forward_pps,
                    throughput: vec![throughput],
                    latency_ns: Latency { p50: latency as u64, ..Latency::default() },
                    open_ms: open,
                    first_packet_ms: first,
                    sent: received,
                    received,
                    doorbells: (16_000.0 * self.value()) as u64,
                    ..Run::default()
                });
            }
        }
        let mut modes = MODES;
        self.random.shuffle(&mut modes);
        for mode in modes {
            self.pass_time();
            for (memory, ms) in [("4 KiB", 40.0), ("2 MiB", 4.0)] {
                let times = self.times(mode);
                recording.maps.push(MapTime {
                    mode: mode.to_owned(),
                    memory: memory.to_owned(),
                    call: "map".to_owned(),
                    bytes: 128 << 20,
                    round,
                    map_ms: ms * times * self.value(),
                    unmap_ms: ms * times * self.value(),
                    ..MapTime::default()
                });
            }
        }
    }

    /// Changes the machine from one run to the next.
    fn pass_time(&mut self) {
        self.slowness = 0.95 * self.slowness + self.drift * self.normal();
        self.intruded ^= self.random.unit() < self.intrusions;
    }

    /// Returns the random factor of a value.
    fn value(&mut self) -> f64 {
        let mut log = self.spread * self.normal() + self.slowness;
        if self.intruded {
            log += 2.0_f64.ln();
        }
        if self.random.unit() < self.outliers {
            log += self.random.unit() * 10.0_f64.ln();
        }
        log.exp()
    }

    /// Returns a normally distributed value (Box and Muller).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.random.unit()).ln()).sqrt();
        radius * (TAU * self.random.unit()).cos()
    }
}
