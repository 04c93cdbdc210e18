//! `native`: runs Vireo and DPDK in turn on shared-memory virtio rings, with the same peer or at both ends.

mod distance;
mod echo;
mod forwarder;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;
use vireo_eal::program::{self, note};
use vireo_eal::{Error, ErrorKind, Result};

use crate::coherence;
use crate::cores::Cores;
use crate::environment::environment;
use crate::process::l2fwd;
use crate::record::Environment;
use crate::report::write_json;
use crate::run::seconds;
use crate::stats::{CONFIDENCE, Interval, median};
use distance::{ByDistance, Group, Range, round_trip};
use forwarder::{Ends, Program, Rig, Sample};

/// Compare Vireo with DPDK's testpmd on shared-memory virtio rings, at one end and at both
#[derive(Debug, Args)]
pub(crate) struct NativeArgs {
    /// Ends at which Vireo replaces testpmd, one comparison after the other
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "virtio-user,vhost,both")]
    sides: Vec<Replaced>,
    /// Pairs of runs; as many again compare DPDK with itself
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Seconds to measure in each run
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    seconds: Duration,
    /// Also count cache lines with this program; see coherence
    #[arg(long, value_name = "WORKLOAD")]
    coherence: Option<PathBuf>,
    /// Also write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Vireo's l2fwd; default: the one next to this program
    #[arg(long, value_name = "FILE")]
    l2fwd: Option<PathBuf>,
    /// DPDK's testpmd
    #[arg(long, value_name = "FILE", default_value = "dpdk-testpmd")]
    testpmd: PathBuf,
}

/// One end of a vhost-user connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The driver's end, which owns the memory and connects.
    VirtioUser,
    /// The device's end, which listens.
    Vhost,
}

/// Ends at which Vireo replaces testpmd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Replaced {
    /// The driver's end
    VirtioUser,
    /// The device's end
    Vhost,
    /// Both ends
    Both,
}

impl Replaced {
    /// The end at which the forwarder is.
    fn side(self) -> Side {
        if self == Self::Vhost { Side::Vhost } else { Side::VirtioUser }
    }

    /// Programs after the replacement.
    fn ends(self) -> Ends {
        let peer = if self == Self::Both { Program::Vireo } else { Program::Dpdk };
        Ends { forwarder: Program::Vireo, peer }
    }

    fn name(self) -> &'static str {
        if self == Self::Both { "both ends" } else { self.side().name() }
    }
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::VirtioUser => Self::Vhost,
            Self::Vhost => Self::VirtioUser,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::VirtioUser => "virtio-user",
            Self::Vhost => "vhost",
        }
    }
}

/// Contents of the JSON output.
#[derive(Debug, Serialize)]
struct Figures {
    environment: Environment,
    sides: Vec<Comparison>,
    /// Cache lines that move between the cores of both ends, if they were counted.
    coherence_events: Option<Vec<coherence::Row>>,
}

/// Comparison of Vireo with DPDK, at one end or at both. Ratios are Vireo's figure ÷ DPDK's.
#[derive(Debug, Serialize)]
struct Comparison {
    replaced: Replaced,
    pairs: usize,
    rate_ratio: Ratio,
    ticks_ratio: Ratio,
    /// Rate of DPDK compared with itself.
    noise: Ratio,
    noise_ticks: Ratio,
    dpdk: Medians,
    vireo: Medians,
    /// Round trip of a cache line between the two CPUs, before and after each run, in nanoseconds.
    line_ns: Range,
    /// Pairs grouped by that round trip, if it changed during the runs.
    by_distance: Option<ByDistance>,
}

/// Two consecutive runs.
#[derive(Clone, Copy, Debug)]
struct Pair {
    dpdk: Sample,
    other: Sample,
    /// Round trip of a cache line before, between and after the runs, in nanoseconds.
    line: [f64; 3],
}

/// An estimate and, if there are enough pairs, its own 95 % interval.
#[derive(Clone, Copy, Debug, Serialize)]
struct Ratio {
    estimate: f64,
    #[serde(flatten)]
    interval: Option<Interval>,
}

impl Ratio {
    fn of(pairs: &[Pair], of: fn(&Sample) -> f64) -> Result<Self> {
        let logs: Vec<f64> = ratios(pairs, of).map(f64::ln).collect();
        if logs.iter().all(|log| log.is_finite()) {
            let (estimate, interval) = crate::stats::ratio(&logs, 1.0 - CONFIDENCE);
            return Ok(Self { estimate, interval });
        }
        Err(Error::new(ErrorKind::Protocol, "cannot compare the runs", "in one of them, no packet came back"))
    }

    fn ends(&self) -> String {
        self.interval.map_or("none".to_owned(), |ends| format!("{:.2} to {:.2}", ends.low, ends.high))
    }
}

#[derive(Debug, Serialize)]
struct Medians {
    /// Packets per second in each direction, as counted by the peer.
    pps: f64,
    /// Time stamp counter ticks per packet, in polls that moved packets.
    ticks_per_packet: f64,
    /// The same of the peer.
    peer_ticks_per_packet: f64,
    /// Packets per second in each direction that the peer would reach if it were busy all of the time.
    peer_ceiling_pps: f64,
}

pub(crate) fn native(args: &NativeArgs) -> Result<()> {
    let cores = Cores::of_this_process()?;
    let rig = Rig {
        testpmd: args.testpmd.clone(),
        l2fwd: l2fwd(args.l2fwd.as_deref())?,
        cores,
        seconds: args.seconds,
    };
    let mut sides = Vec::new();
    for replaced in &args.sides {
        let comparison = compare(&rig, *replaced, args.pairs)?;
        print(&comparison)?;
        sides.push(comparison);
    }
    let coherence_events =
        args.coherence.as_deref().map(|workload| coherence::count(workload, false)).transpose()?;
    if let Some(rows) = &coherence_events {
        program::print(&format!("\nVireo at both ends\n{}", coherence::text(rows)))?;
    }
    let figures = Figures { environment: environment(args.pairs)?, sides, coherence_events };
    match &args.json {
        Some(path) => write_json(path, &figures),
        None => Ok(()),
    }
}

fn compare(rig: &Rig, replaced: Replaced, pairs: u32) -> Result<Comparison> {
    let noise = run_pairs(rig, replaced, pairs, Ends::DPDK)?;
    let runs = run_pairs(rig, replaced, pairs, replaced.ends())?;
    let medians = |of: fn(&Pair) -> Sample| Medians {
        pps: median_of(runs.iter().map(|pair| of(pair).pps)),
        ticks_per_packet: median_of(runs.iter().map(|pair| of(pair).ticks)),
        peer_ticks_per_packet: median_of(runs.iter().map(|pair| of(pair).peer_ticks)),
        peer_ceiling_pps: median_of(runs.iter().map(|pair| of(pair).peer_ceiling())),
    };
    let line_ns = Range::of(runs.iter().flat_map(|pair| pair.line));
    Ok(Comparison {
        replaced,
        pairs: runs.len(),
        rate_ratio: Ratio::of(&runs, |sample| sample.pps)?,
        ticks_ratio: Ratio::of(&runs, |sample| sample.ticks)?,
        noise: Ratio::of(&noise, |sample| sample.pps)?,
        noise_ticks: Ratio::of(&noise, |sample| sample.ticks)?,
        dpdk: medians(|pair| pair.dpdk),
        vireo: medians(|pair| pair.other),
        line_ns,
        by_distance: line_ns.border().map(|border| ByDistance::of(&runs, border)),
    })
}

fn median_of(values: impl Iterator<Item = f64>) -> f64 {
    median(&values.collect::<Vec<_>>()).unwrap_or(f64::NAN)
}

/// Runs DPDK and `second` in turn, in the order A B B A.
fn run_pairs(rig: &Rig, replaced: Replaced, pairs: u32, second: Ends) -> Result<Vec<Pair>> {
    let mut last = round_trip(rig.cores)?;
    let since = Instant::now();
    (0..pairs)
        .map(|pair| {
            let run = |ends| Ok::<_, Error>((rig.run(replaced.side(), ends)?, round_trip(rig.cores)?));
            let before = last;
            let (dpdk, other, between);
            if pair % 2 == 0 {
                (dpdk, between) = run(Ends::DPDK)?;
                (other, last) = run(second)?;
            } else {
                (other, between) = run(second)?;
                (dpdk, last) = run(Ends::DPDK)?;
            }
            let what = if second == Ends::DPDK { "DPDK against itself" } else { "Vireo against DPDK" };
            let (number, seconds) = (pair + 1, since.elapsed().as_secs());
            note(&format!("{}: {what}, pair {number}/{pairs}, {seconds} s", replaced.name()));
            Ok(Pair { dpdk, other, line: [before, between, last] })
        })
        .collect()
}

fn ratios(pairs: &[Pair], of: fn(&Sample) -> f64) -> impl Iterator<Item = f64> {
    pairs.iter().map(move |pair| of(&pair.other) / of(&pair.dpdk))
}

fn print(comparison: &Comparison) -> Result<()> {
    program::print(&text(comparison))
}

fn text(comparison: &Comparison) -> String {
    let Comparison { replaced, pairs, dpdk, vireo, .. } = comparison;
    let peer = match replaced {
        Replaced::Both => String::new(),
        _ => format!(", with testpmd's {} as its peer", replaced.side().other().name()),
    };
    let mut text = format!("\n{} replaced{peer} ({pairs} pairs)\n", replaced.name());
    for (name, medians) in [("DPDK", dpdk), ("Vireo", vireo)] {
        let Medians { pps, ticks_per_packet, peer_ticks_per_packet, peer_ceiling_pps } = medians;
        let _ = writeln!(
            text,
            "  {name:<6} {:>6.2} Mpps in each direction  {ticks_per_packet:>6.1} ticks per packet\n         its peer: \
             {peer_ticks_per_packet:.1} ticks per packet, which allows {:.2} Mpps",
            pps / 1e6,
            peer_ceiling_pps / 1e6
        );
    }
    for (name, ratio, noise) in [
        ("rate ", comparison.rate_ratio, comparison.noise),
        ("ticks", comparison.ticks_ratio, comparison.noise_ticks),
    ] {
        let _ = writeln!(
            text,
            "  {name}  {:.2} × DPDK (95 % interval {}; DPDK against itself {})",
            ratio.estimate,
            ratio.ends(),
            noise.ends()
        );
    }
    let Range { low, high } = comparison.line_ns;
    let _ = writeln!(
        text,
        "  in these pairs, a cache line went from CPU to CPU and back in {low:.0} to {high:.0} ns"
    );
    if let Some(ByDistance { border_ns, near, far, mixed_pairs }) = &comparison.by_distance {
        for (when, group) in [("less", near), ("more", far)] {
            if let Some(Group { pairs, rate_ratio, ticks_ratio }) = group {
                let _ = writeln!(
                    text,
                    "    {when} than {border_ns:.0} ns in {pairs} of them: rate {rate_ratio:.2} × DPDK, ticks {ticks_ratio:.2} ×"
                );
            }
        }
        let _ = writeln!(text, "    sometimes less and sometimes more in {mixed_pairs} of them");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_ours_over_theirs() {
        let sample = |pps, ticks| Sample { pps, ticks, peer_ticks: 200.0 };
        let pair = Pair { dpdk: sample(2e6, 100.0), other: sample(3e6, 50.0), line: [60.0, 80.0, 70.0] };
        let pairs = [pair; 6];
        let rate = Ratio::of(&pairs, |sample| sample.pps).unwrap();
        let ticks = Ratio::of(&pairs, |sample| sample.ticks).unwrap();
        assert!((rate.estimate - 1.5).abs() < 1e-12 && (ticks.estimate - 0.5).abs() < 1e-12);
        let noise = |low, high| Ratio { estimate: 1.0, interval: Some(Interval { low, high }) };
        let medians = |pps, ticks_per_packet| Medians {
            pps,
            ticks_per_packet,
            peer_ticks_per_packet: 200.0,
            peer_ceiling_pps: 6.5e6,
        };
        let comparison = Comparison {
            replaced: Replaced::Vhost,
            pairs: 6,
            rate_ratio: rate,
            ticks_ratio: ticks,
            noise: noise(0.98, 1.02),
            noise_ticks: noise(0.9, 1.1),
            dpdk: medians(2e6, 100.0),
            vireo: medians(3e6, 50.0),
            line_ns: Range { low: 60.0, high: 340.0 },
            by_distance: Some(ByDistance {
                border_ns: 142.8,
                near: Some(Group { pairs: 4, rate_ratio: 1.5, ticks_ratio: 0.4 }),
                far: None,
                mixed_pairs: 2,
            }),
        };
        let said = text(&comparison);
        assert!(said.contains("vhost replaced, with testpmd's virtio-user as its peer (6 pairs)"), "{said}");
        assert!(said.contains("its peer: 200.0 ticks per packet, which allows 6.50 Mpps"), "{said}");
        assert!(
            said.contains(
                "rate   1.50 × DPDK (95 % interval 1.50 to 1.50; DPDK against itself 0.98 to 1.02)"
            ),
            "{said}"
        );
        let distance = "back in 60 to 340 ns\n    less than 143 ns in 4 of them: rate 1.50 × DPDK, ticks 0.40 ×\n    sometimes";
        assert!(said.contains(distance), "{said}");
        let both = text(&Comparison { replaced: Replaced::Both, by_distance: None, ..comparison });
        assert!(both.contains("both ends replaced (6 pairs)"), "{both}");
        let still = Pair { dpdk: sample(0.0, 1.0), other: sample(0.0, 1.0), ..pair };
        assert!(Ratio::of(&[still], |sample| sample.pps).is_err());
    }
}
