//! `vfio-bench run`: measures every mode on every NIC of this machine, interleaved.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use vireo_bus_pci::{Bus, PciInfo};
use vireo_drivers::ports::driver_of;
use vireo_eal::args::allowed_cpus;
use vireo_eal::bdf::Bdf;
use vireo_eal::lcore::StopFlag;
use vireo_eal::program::note;
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
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds that each stream lasts; there are two in a run
    #[arg(long, value_name = "SECONDS", default_value = "0.4", value_parser = seconds)]
    seconds: Duration,
    /// Size of the region whose mapping is timed, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    map_mib: u32,
}

/// How long something is measured, as an argument says it.
pub(crate) fn seconds(text: &str) -> std::result::Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "it is no number of seconds above 0".into())
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
    let wirings = wirings(&args.ports, &args.nics, &bus, note)?;
    let Cores { generator, forwarder, .. } = Cores::of_this_process()?;
    let limits =
        Limits { generator, forwarder, stream: args.seconds, map_bytes: (args.map_mib as usize) << 20 };
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
                let (number, seconds) = (recording.runs.len(), begin.elapsed().as_secs_f64());
                let noise = if pair == Run::NOISE { " (noise)" } else { "" };
                note(&format!("{number}/{total} {} {mode}{noise} {seconds:.0} s", wiring.nic));
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

/// The four NICs named in `ports`, or those of each kind in `nics`, or of every kind of which there are four;
/// then `say` gets a line for each other kind.
pub(crate) fn wirings(
    ports: &[String],
    nics: &[String],
    bus: &Bus,
    mut say: impl FnMut(&str),
) -> Result<Vec<Wiring>> {
    if !ports.is_empty() {
        let addresses = ports.iter().flat_map(|list| list.split(','));
        let infos = addresses.map(|text| bus.find(text.parse::<Bdf>()?)).collect::<Result<Vec<_>>>()?;
        return Ok(vec![Wiring::new(infos)?]);
    }
    let mut kinds: Vec<(&'static str, Vec<PciInfo>)> = Vec::new();
    for info in bus.scan()?.into_iter().filter(|info| bus.is_on_vfio(info)) {
        let Some(kind) = kind(&info) else { continue };
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, infos)) => infos.push(info),
            None => kinds.push((kind, vec![info])),
        }
    }
    let (fours, others): (Vec<_>, Vec<_>) = kinds.into_iter().partition(|(_, infos)| infos.len() == 4);
    if let Some(nic) = nics.iter().find(|nic| !fours.iter().any(|(kind, _)| kind == nic)) {
        let bound = others.iter().find(|(kind, _)| kind == nic).map_or(0, |(_, infos)| infos.len());
        return Err(not_four(nic, bound));
    }
    if nics.is_empty() {
        for (kind, infos) in &others {
            say(&format!("vireo-vfio-bench: left out: {}", not_four(kind, infos.len())));
        }
    }
    let wirings: Vec<Wiring> = fours
        .into_iter()
        .filter(|(kind, _)| nics.is_empty() || nics.iter().any(|nic| nic == kind))
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

/// Why `kind`, with `bound` NICs on vfio-pci, is not measured.
fn not_four(kind: &str, bound: usize) -> Error {
    let why = format!("{bound} on vfio-pci, and a comparison takes 4");
    Error::new(ErrorKind::Usage, format!("cannot measure {kind}"), why).mend(if bound < 4 {
        "run: vireo-devbind --status"
    } else {
        "name four: run --ports A,B,C,D; or give the others back: vireo-devbind --restore ADDRESS"
    })
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
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn rounds_run_forwards_and_backwards() {
        let modes = [VfioMode::Container, VfioMode::Cdev];
        let order = |round| schedule(&modes, round).into_iter().map(|(_, mode)| mode).collect::<Vec<_>>();
        use VfioMode::{Cdev, Container};
        assert_eq!(order(0), [Container, Container, Container, Cdev]);
        assert_eq!(order(1), [Cdev, Cdev, Cdev, Container]);
        assert_eq!(schedule(&modes, 0)[0].0, Run::NOISE);
    }

    const E1000: &str = "100e";
    const E1000E: &str = "10d3";

    /// A bus with one NIC on vfio-pci for each of `devices`, all of Intel.
    fn bus(devices: &[&str]) -> (tempfile::TempDir, Bus) {
        let dir = tempfile::tempdir().unwrap();
        for (slot, device) in devices.iter().enumerate() {
            let path = dir.path().join(format!("devices/0000:00:{slot:02x}.0"));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("vendor"), "0x8086\n").unwrap();
            fs::write(path.join("device"), format!("0x{device}\n")).unwrap();
            symlink("../../drivers/vfio-pci", path.join("driver")).unwrap();
        }
        let bus = Bus::new(dir.path());
        (dir, bus)
    }

    #[test]
    fn a_kind_that_was_named_has_four_nics_or_is_refused() {
        for (bound, cure) in [(0, "vireo-devbind --status"), (3, "vireo-devbind --status"), (5, "--ports")] {
            let (_dir, bus) = bus(&[vec![E1000; 4], vec![E1000E; bound]].concat());
            let nics = ["e1000".to_owned(), "e1000e".to_owned()];
            let error = wirings(&[], &nics, &bus, |_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            let text = error.to_string();
            assert!(text.starts_with(&format!("cannot measure e1000e: {bound} on vfio-pci")), "{text}");
            assert!(text.contains(cure), "{text}");
            let chosen = wirings(&[], &nics[..1], &bus, |_| ()).unwrap();
            assert_eq!(chosen.iter().map(|wiring| wiring.nic).collect::<Vec<_>>(), ["e1000"]);
        }
    }

    #[test]
    fn a_kind_that_is_left_out_is_said_unless_others_were_named() {
        let (_dir, bus) = bus(&[vec![E1000; 4], vec![E1000E; 5]].concat());
        let said = |nics: &[String]| {
            let mut said = Vec::new();
            assert_eq!(wirings(&[], nics, &bus, |line| said.push(line.to_owned())).unwrap().len(), 1);
            said.join("\n")
        };
        let text = said(&[]);
        assert!(
            text.starts_with("vireo-vfio-bench: left out: cannot measure e1000e: 5 on vfio-pci"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
        assert_eq!(said(&["e1000".to_owned()]), "");
    }
}
