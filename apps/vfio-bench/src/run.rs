//! `vfio-bench run`: measures every mode on every NIC of this machine, interleaved.

mod nics;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use vireo_bus_pci::Bus;
use vireo_eal::clock::Tsc;
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::Region;
use vireo_eal::program::note;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};
use vireo_pktgen::frame::SHORTEST;

use self::nics::{left_out, references, setups};
use crate::compare::Comparison;
use crate::cores::Cores;
use crate::environment::environment;
use crate::measure::{Limits, Setup, Wiring, map_times, measure_reference, regions, straight};
use crate::perf::Counters;
use crate::record::{Ceiling, Environment, MapTime, Plan, Recorder, Recording, Run};
use crate::reference::Reference;
use crate::report::MARGIN;
use crate::stats::Random;
use crate::testpmd::TestpmdArgs;
pub(crate) use nics::{kind, wirings};

/// Length of the stream that checks whether a wire carries packets.
const WIRE_CHECK: Duration = Duration::from_millis(20);

/// Longest frame of a port that was not started for longer frames.
const LONGEST: usize = 1514;

/// Measure VFIO modes on this machine's NICs and write a recording
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// File for the recording
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// Modes to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "container,cdev,compat")]
    modes: Vec<VfioMode>,
    /// Kinds of NIC; by default every kind with four NICs bound to vfio-pci
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    nics: Vec<String>,
    /// The four NICs to measure: sender, forwarder's receiver, forwarder's sender, receiver, with the first
    /// two and the last two connected; or the forwarder's two, with an external generator that sends to one
    /// of them
    #[arg(long, value_name = "A,B[,C,D]", value_delimiter = ',', conflicts_with = "nics")]
    ports: Vec<String>,
    /// Other forwarders to compare with, run once per round on the same NICs; their start is not measured
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    references: Vec<Reference>,
    #[command(flatten)]
    testpmd: TestpmdArgs,
    /// Cores that poll; by default the first two that this process may use. With an external generator, only
    /// the forwarder's
    #[arg(long, value_name = "GENERATOR,FORWARDER", value_delimiter = ',')]
    cores: Vec<usize>,
    /// Minimum number of rounds; each runs every mode once, in random order, and one of them twice
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Add rounds until every interval reaches at most this far up and down
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, value_parser = percent)]
    width: f64,
    /// Stop adding rounds after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    limit: Duration,
    /// Seconds per stream; a run has two streams
    #[arg(long, value_name = "SECONDS", default_value = "0.2", value_parser = seconds)]
    seconds: Duration,
    /// Frame sizes in bytes, 60 to 1514, without the frame check sequence. Rate and latency are measured with
    /// the first size, throughput with each
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "60,1514", value_parser = frame_size)]
    frame_sizes: Vec<usize>,
    /// Highest loss at which a load counts as throughput; RFC 2544 has 0
    #[arg(long, value_name = "PERCENT", default_value_t = 0.1, value_parser = loss)]
    loss: f64,
    /// Seconds per trial of the throughput search
    #[arg(long, value_name = "SECONDS", default_value = "0.1", value_parser = seconds)]
    trial: Duration,
    /// Load at which latency is measured, relative to the rate
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0, value_parser = percent)]
    load: f64,
    /// Seed of the random orders; by default a new one each time
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Resume the recording in FILE after its last complete round
    #[arg(long)]
    resume: bool,
    /// To test the method: run the first mode under the names of all modes
    #[arg(long, hide = true)]
    null: bool,
    /// To test the method: slow the forwarder down by `--slower` in this mode
    #[arg(long, hide = true, value_name = "MODE", requires = "slower")]
    slow: Option<VfioMode>,
    /// Fraction by which the slow mode is slower: 0.2 means 20 %
    #[arg(long, hide = true, value_name = "PART")]
    slower: Option<f64>,
    /// Size of the region whose mapping is timed, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    map_mib: u32,
}

/// Parses a duration in seconds, above 0.
pub(crate) fn seconds(text: &str) -> std::result::Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "it is not a number of seconds above 0".into())
}

fn frame_size(text: &str) -> std::result::Result<usize, String> {
    text.parse()
        .ok()
        .filter(|size| (SHORTEST..=LONGEST).contains(size))
        .ok_or_else(|| format!("it is not a size from {SHORTEST} to {LONGEST}"))
}

fn loss(text: &str) -> std::result::Result<f64, String> {
    text.parse()
        .ok()
        .filter(|percent| (0.0..100.0).contains(percent))
        .ok_or_else(|| "it is not a percentage from 0 to below 100".into())
}

/// Parses a percentage above 0.
pub(crate) fn percent(text: &str) -> std::result::Result<f64, String> {
    text.parse()
        .ok()
        .filter(|percent: &f64| percent.is_finite() && *percent > 0.0)
        .ok_or_else(|| "it is not a percentage above 0".into())
}

pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let bus = Bus::default();
    let stop = StopFlag::on_signals()?;
    let setups = setups(args, &bus)?;
    let external = setups.iter().any(|setup| matches!(setup, Setup::External { .. }));
    let cores = if external { Cores::of_forwarder(&args.cores)? } else { Cores::choose(&args.cores)? };
    let plan = args.plan();
    let limits = Limits {
        generator: cores.generator,
        forwarder: cores.forwarder,
        stream: args.seconds,
        trial: args.trial,
        frames: &args.frame_sizes,
        loss: plan.loss,
        load: plan.load,
        slower: 0.0,
    };
    let mut here = environment(args.rounds)?;
    here.0.push(("cores".into(), cores.fact(Path::new(SYSFS))));
    here.0.push(("perf counters".into(), Counters::fact()));
    for warning in cores.warnings(Path::new(SYSFS), setups.iter().flat_map(Setup::inner)) {
        note(&format!("vireo-vfio-bench: {warning}"));
    }
    // Map the same pages in all modes: the cost differs between sets of pages, possibly by how scattered they
    // are.
    let regions = regions((args.map_mib as usize) << 20)?;
    let references = references(args, &setups, note)?;
    let mut bench = Bench { bus: &bus, setups, references, args, limits, regions, stop };
    let mut recorder = bench.begin(here, plan)?;
    // Only the time of the modes counts toward the limit, so that references do not cost them rounds.
    let begin = Instant::now();
    let mut with_references = Duration::ZERO;
    let first = recorder.recording.runs.iter().map(|run| run.round + 1).max().unwrap_or(0);
    for round in first.. {
        with_references += bench.record(round, &mut recorder)?;
        let seconds = begin.elapsed().saturating_sub(with_references).as_secs_f64();
        let (end, so_far) = enough(&recorder.recording, round + 1, seconds);
        note(&format!("round {} {seconds:.0} s: {so_far}", round + 1));
        if let Some(end) = end {
            return recorder.end(end);
        }
    }
    Ok(())
}

impl RunArgs {
    fn plan(&self) -> Plan {
        Plan {
            modes: self.modes.iter().map(|mode| mode.name().to_owned()).collect(),
            references: self.references.iter().map(|reference| reference.name().to_owned()).collect(),
            seed: self.seed.unwrap_or_else(Tsc::now),
            rounds: self.rounds,
            width: self.width / 100.0,
            limit: self.limit.as_secs_f64(),
            stream: self.seconds.as_secs_f64(),
            trial: self.trial.as_secs_f64(),
            frames: self.frame_sizes.clone(),
            loss: self.loss / 100.0,
            load: self.load / 100.0,
            map_mib: self.map_mib,
        }
    }
}

/// Mount point of sysfs.
const SYSFS: &str = "/sys";

/// Everything that a round needs.
struct Bench<'a> {
    bus: &'a Bus,
    setups: Vec<Setup>,
    /// References, each with the index of the setup on which it is measured.
    references: Vec<(usize, Reference)>,
    args: &'a RunArgs,
    limits: Limits<'a>,
    regions: Vec<(&'static str, Arc<Region>)>,
    stop: StopFlag,
}

impl Bench<'_> {
    /// Begins the recording or resumes it. The wires are checked first, so that a wrong argument or a loose
    /// cable is found before an older recording is replaced.
    fn begin(&self, here: Environment, plan: Plan) -> Result<Recorder> {
        self.check_wires()?;
        if self.args.resume {
            Recorder::resume(&self.args.json, &here, &plan)
        } else {
            Recorder::begin(&self.args.json, here, plan)
        }
    }

    /// Checks that both wires of each setup carry packets, before anything is recorded.
    fn check_wires(&self) -> Result<()> {
        let Some(&mode) = self.args.modes.first() else { return Ok(()) };
        let limits = Limits { stream: WIRE_CHECK, ..self.limits };
        for setup in &self.setups {
            if let Setup::Wired(Wiring { sender, inner: [inside, outside], receiver, .. }) = setup {
                for wire in [[sender, inside], [outside, receiver]] {
                    straight(self.bus, wire, mode, &limits, &self.stop)?;
                    check_stop(&self.stop)?;
                }
            }
        }
        Ok(())
    }

    /// Records one round: every NIC in every mode and with every reference, and the maps of every mode, each
    /// in an order of this round. Returns the time that the references took.
    fn record(&mut self, round: u32, recorder: &mut Recorder) -> Result<Duration> {
        let Self { bus, setups, references, args, limits, regions, stop } = self;
        let modes = &args.modes;
        let runs_as = |mode| if args.null { modes[0] } else { mode };
        let mut random = order_of(&recorder.recording, round);
        let mut with_references = Duration::ZERO;
        for (place, setup) in setups.iter().enumerate() {
            let of_modes = schedule(modes, round, &mut random).into_iter().map(Turn::Mode);
            let describe_references = references.iter().filter(|(at, _)| *at == place);
            let mut turns: Vec<Turn> =
                of_modes.chain(describe_references.map(|turn| Turn::Reference(turn.1))).collect();
            random.shuffle(&mut turns);
            for turn in turns {
                let began = Instant::now();
                let run = match (turn, setup) {
                    (Turn::Mode((pair, mode)), _) => {
                        let slower = args.slower.filter(|_| args.slow == Some(mode)).unwrap_or_default();
                        let run = setup.measure(bus, runs_as(mode), &Limits { slower, ..*limits }, stop);
                        run.map(|run| Run { pair: pair.to_owned(), mode: mode.name().to_owned(), ..run })
                    }
                    (Turn::Reference(reference), Setup::Wired(wiring)) => {
                        let with = (reference, &args.testpmd);
                        let run = measure_reference(bus, wiring, with, runs_as(modes[0]), limits, stop);
                        with_references += began.elapsed();
                        run
                    }
                    (Turn::Reference(_), Setup::External { .. }) => continue,
                };
                check_stop(stop)?;
                match (run, turn) {
                    (Ok(run), _) => recorder.run(Run { round, ..run })?,
                    // The recording is about the modes, so a reference that fails is left out.
                    (Err(error), Turn::Reference(reference)) => {
                        note(&left_out(reference, setup.nic(), error));
                        references.retain(|known| *known != (place, reference));
                    }
                    (Err(error), Turn::Mode(_)) => return Err(error),
                }
            }
            if let (Some(&mode), Setup::Wired(Wiring { nic, sender, inner: [inside, _], .. })) =
                (modes.first(), setup)
            {
                let pps = straight(bus, [sender, inside], mode, limits, stop)?;
                check_stop(stop)?;
                recorder.ceiling(Ceiling { nic: (*nic).to_owned(), round, pps })?;
            }
        }
        if let Some(setup) = setups.first() {
            let mut modes = modes.clone();
            random.shuffle(&mut modes);
            for mode in modes {
                for map in map_times(bus, &setup.inner()[0], runs_as(mode), regions, round)? {
                    recorder.map(MapTime { mode: mode.name().to_owned(), ..map })?;
                }
            }
        }
        Ok(with_references)
    }
}

/// One run of a round.
#[derive(Clone, Copy)]
enum Turn {
    /// A run of a mode, with its `Run::pair`.
    Mode((&'static str, VfioMode)),
    Reference(Reference),
}

/// Fails if a signal has stopped the run, whose results or error then mean nothing.
fn check_stop(stop: &StopFlag) -> Result<()> {
    if stop.is_set() {
        return Err(Error::new(
            ErrorKind::Unavailable,
            "cannot complete the recording",
            "stopped by a signal",
        )
        .with_hint("to resume it, add --resume to the same arguments"));
    }
    Ok(())
}

/// Random numbers of a round, which do not depend on what ran before it.
fn order_of(recording: &Recording, round: u32) -> Random {
    let seed = recording.plan.as_ref().map_or(0, |plan| plan.seed);
    Random(seed.wrapping_add(u64::from(round).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// Returns why `rounds` rounds in `seconds` seconds are enough, or `None`, and how far they have come. Only
/// the width of the intervals decides, never what they show.
pub(crate) fn enough(recording: &Recording, rounds: u32, seconds: f64) -> (Option<String>, String) {
    let Some(plan) = &recording.plan else { return (None, String::new()) };
    let widest = Comparison::of(std::slice::from_ref(recording), MARGIN).widest();
    let so_far = match widest {
        None => "there is nothing to compare".to_owned(),
        Some(widest) if widest.is_finite() => {
            format!("the widest interval is ±{} %", crate::words::percent(widest))
        }
        Some(_) => "too few rounds for an interval".to_owned(),
    };
    let end = match (rounds, widest) {
        _ if rounds < plan.rounds => None,
        (_, None) => Some(format!("after {rounds} rounds; {so_far}")),
        (_, Some(widest)) if widest <= plan.width => {
            let width = crate::words::round(plan.width);
            Some(format!("after {rounds} rounds, every interval within ±{width} %"))
        }
        _ if seconds >= plan.limit => {
            Some(format!("after {rounds} rounds, at the limit of {} s; {so_far}", plan.limit))
        }
        _ => None,
    };
    (end, so_far)
}

/// Schedule of one round: every mode once, and one of them twice for the comparison of a mode with itself, in
/// random order. Either mode of a pair then comes first with the same probability, whatever the machine does.
/// For modes that do not differ, the intervals assume nothing else.
pub(crate) fn schedule<T: Copy>(modes: &[T], round: u32, random: &mut Random) -> Vec<(&'static str, T)> {
    let twin = modes.iter().cycle().nth(round as usize).map(|mode| (Run::TWIN, *mode));
    let mut order: Vec<_> = modes.iter().map(|mode| (Run::COMPARED, *mode)).chain(twin).collect();
    random.shuffle(&mut order);
    order
}

#[cfg(test)]
mod tests {
    use super::nics::tests::{E1000, bus};
    use super::*;
    use clap::FromArgMatches as _;

    #[test]
    fn a_round_has_every_mode_once_and_each_mode_has_a_twin_in_turn() {
        let modes = [VfioMode::Container, VfioMode::Cdev];
        let (mut random, mut orders) = (Random(1), std::collections::BTreeMap::new());
        for round in 0..3000 {
            let order = schedule(&modes, round, &mut random);
            let of = |kind| order.iter().filter(move |(pair, _)| *pair == kind).map(|(_, mode)| *mode);
            assert_eq!(of(Run::TWIN).collect::<Vec<_>>(), [modes[round as usize % 2]]);
            let compared: Vec<_> = of(Run::COMPARED).collect();
            assert_eq!(compared.len(), 2);
            *orders.entry(compared[0].name()).or_insert(0) += 1;
        }
        assert!(orders.len() == 2 && orders.values().all(|count| (1400..1600).contains(count)), "{orders:?}");
    }

    #[test]
    fn a_start_that_fails_leaves_the_older_recording() {
        let (dir, bus) = bus(&[E1000; 4]);
        let json = dir.path().join("run.json");
        std::fs::write(&json, "older").unwrap();
        let command = RunArgs::augment_args(clap::Command::new("run").no_binary_name(true));
        let words = ["--json", json.to_str().unwrap()];
        let args = RunArgs::from_arg_matches(&command.get_matches_from(words)).unwrap();
        let plan = args.plan();
        let cpu = vireo_eal::args::allowed_cpus().unwrap()[0];
        let limits = Limits {
            generator: cpu,
            forwarder: cpu,
            stream: args.seconds,
            trial: args.trial,
            frames: &args.frame_sizes,
            loss: plan.loss,
            load: plan.load,
            slower: 0.0,
        };
        let setups = wirings(&[], &bus, |_| ()).unwrap().into_iter().map(Setup::Wired).collect();
        let (references, regions) = (Vec::new(), Vec::new());
        let bench =
            Bench { bus: &bus, setups, references, args: &args, limits, regions, stop: StopFlag::new() };
        // The NICs are plain directories, so none can be opened.
        bench.begin(Environment::default(), plan.clone()).unwrap_err();
        assert_eq!(std::fs::read_to_string(&json).unwrap(), "older");
        let bench = Bench { setups: Vec::new(), ..bench };
        drop(bench.begin(Environment::default(), plan).unwrap());
        assert!(std::fs::read_to_string(&json).unwrap().starts_with("{\"begin\":"));
    }
}
