//! `vfio-bench run`: measures every mode on every NIC of this machine, interleaved.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use vireo_bus_pci::{Bus, PciInfo};
use vireo_drivers::ports::driver_of;
use vireo_eal::args::allowed_cpus;
use vireo_eal::bdf::Bdf;
use vireo_eal::lcore::StopFlag;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};

use crate::environment::environment;
use crate::measure::{Limits, Wiring, map_times, measure, null_forwarder};
use crate::record::{Ceiling, Recording, Run};

/// Measure VFIO modes on this machine's NICs and write a recording
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// File for the recording
    #[arg(long, value_name = "FILE")]
    json: PathBuf,
    /// Modes to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "container,cdev,compat")]
    modes: Vec<VfioMode>,
    /// Kinds of NIC; by default every kind of which four are bound to vfio-pci
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    nics: Vec<String>,
    /// The four NICs of one comparison: sender, forwarder's receiver, forwarder's sender, receiver; the
    /// first two and the last two are connected
    #[arg(long, value_name = "A,B,C,D", conflicts_with = "nics")]
    ports: Vec<String>,
    /// Rounds; each runs every mode once
    #[arg(long, value_name = "N", default_value_t = 6)]
    rounds: u32,
    /// Seconds that each stream lasts; there are two in a run
    #[arg(long, value_name = "SECONDS", default_value_t = 0.4)]
    seconds: f64,
    /// Size of the region whose mapping is timed, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    map_mib: usize,
}

/// Who runs where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    pub(crate) generator: usize,
    pub(crate) forwarder: usize,
    /// One that nobody polls on.
    pub(crate) idle: Option<usize>,
}

impl Cores {
    /// The first ones that this process may use.
    pub(crate) fn of_this_process() -> Result<Self> {
        match allowed_cpus()?[..] {
            [generator, forwarder, ref rest @ ..] => {
                Ok(Self { generator, forwarder, idle: rest.first().copied() })
            }
            _ => Err(Error::new(
                ErrorKind::Unavailable,
                "cannot measure on one core",
                "generator and forwarder poll a core each",
            )
            .mend("give the machine or the container a second one")),
        }
    }
}

pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let bus = Bus::default();
    let stop = StopFlag::on_signals()?;
    let wirings = wirings(&args.ports, &args.nics, &bus)?;
    let Cores { generator, forwarder, .. } = Cores::of_this_process()?;
    let limits = Limits { generator, forwarder, seconds: args.seconds, map_bytes: args.map_mib << 20 };
    let mut recording = Recording {
        environment: environment(args.rounds)?,
        runs: Vec::new(),
        maps: Vec::new(),
        ceilings: Vec::new(),
    };
    let total = args.rounds as usize * wirings.len() * (args.modes.len() + 2);
    let begin = Instant::now();
    for round in 0..args.rounds {
        for wiring in &wirings {
            for (pair, mode) in schedule(&args.modes, round) {
                let mut run = measure(&bus, wiring, mode, &limits, &stop)?;
                if stop.is_set() {
                    return Err(Error::new(ErrorKind::Unavailable, "stopped", "a signal came"));
                }
                (run.round, run.pair) = (round, pair.to_owned());
                recording.runs.push(run);
                eprintln!(
                    "{}/{total} {} {mode}{} {:.0} s",
                    recording.runs.len(),
                    wiring.nic,
                    if pair == Run::NOISE { " (noise)" } else { "" },
                    begin.elapsed().as_secs_f64()
                );
            }
            if let Some(&mode) = args.modes.first() {
                let pps = null_forwarder(&bus, wiring, mode, &limits, &stop)?;
                recording.ceilings.push(Ceiling { nic: wiring.nic.to_owned(), pps });
            }
        }
        if let Some(wiring) = wirings.first() {
            for &mode in &args.modes {
                recording.maps.extend(map_times(&bus, wiring, mode, &limits, round)?);
            }
        }
    }
    let text = serde_json::to_vec(&recording)
        .map_err(|error| Error::new(ErrorKind::Protocol, "cannot encode the recording", error.to_string()))?;
    std::fs::write(&args.json, text)
        .map_err(|error| Error::io(format!("cannot write {}", args.json.display()), &error))
}

/// The order of one round: forwards and backwards in turn (A B, B A), so that a drift of the machine's
/// speed touches all modes alike; and one mode twice, for the noise.
fn schedule(modes: &[VfioMode], round: u32) -> Vec<(&'static str, VfioMode)> {
    let mut order: Vec<_> = modes.iter().map(|mode| ("modes", *mode)).collect();
    if !round.is_multiple_of(2) {
        order.reverse();
    }
    let noise = modes.iter().cycle().nth(round as usize).map(|mode| (Run::NOISE, *mode));
    noise.into_iter().chain(noise).chain(order).collect()
}

/// The four NICs named in `ports`, or those of each kind in `nics`, or of every kind of which there are four.
pub(crate) fn wirings(ports: &[String], nics: &[String], bus: &Bus) -> Result<Vec<Wiring>> {
    if !ports.is_empty() {
        let addresses = ports.iter().flat_map(|list| list.split(','));
        let infos = addresses.map(|text| bus.find(text.parse::<Bdf>()?)).collect::<Result<Vec<_>>>()?;
        return Ok(vec![Wiring::new(infos)?]);
    }
    let mut kinds: Vec<(&'static str, Vec<PciInfo>)> = Vec::new();
    for info in bus.scan()?.into_iter().filter(|info| info.driver.as_deref() == Some("vfio-pci")) {
        let Some(kind) = kind(&info) else { continue };
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, infos)) => infos.push(info),
            None => kinds.push((kind, vec![info])),
        }
    }
    if let Some(missing) = nics.iter().find(|nic| !kinds.iter().any(|(kind, _)| kind == nic)) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("cannot measure {missing}"),
            "none is bound to vfio-pci",
        )
        .mend("run: vireo-devbind --status"));
    }
    let wirings: Vec<Wiring> = kinds
        .into_iter()
        .filter(|(kind, infos)| infos.len() == 4 && (nics.is_empty() || nics.iter().any(|n| n == kind)))
        .map(|(_, infos)| Wiring::new(infos))
        .collect::<Result<_>>()?;
    if wirings.is_empty() {
        return Err(Error::new(
            ErrorKind::Unavailable,
            "cannot measure",
            "a comparison takes four NICs of one kind on vfio-pci, connected in pairs",
        )
        .mend("name them: --ports SENDER,FORWARDER_IN,FORWARDER_OUT,RECEIVER; or run: scripts/lab compare"));
    }
    Ok(wirings)
}

/// What people call the NIC: QEMU's names, which are also those of the kernel's drivers.
pub(crate) fn kind(info: &PciInfo) -> Option<&'static str> {
    match (driver_of(info.id)?, info.id.device) {
        ("e1000", 0x10d3) => Some("e1000e"),
        (driver, _) => Some(driver),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_run_forwards_and_backwards() {
        let modes = [VfioMode::Container, VfioMode::Cdev];
        let order = |round| schedule(&modes, round).into_iter().map(|(_, mode)| mode).collect::<Vec<_>>();
        use VfioMode::{Cdev, Container};
        assert_eq!(order(0), [Container, Container, Container, Cdev]);
        assert_eq!(order(1), [Cdev, Cdev, Cdev, Container]);
        assert_eq!(schedule(&modes, 0)[0].0, Run::NOISE);
    }
}
