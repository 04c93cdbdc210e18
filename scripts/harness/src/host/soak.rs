//! Soak of shared-memory rings between two processes on this machine, and of real NICs in the guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use fastrand::Rng;

use super::rings::{End, await_sockets, prefix};
use crate::agent::Request;
use crate::boot::{Lab, Lost, Session};
use crate::case::{Cases, Context, Report, run_once};
use crate::guest::{Boot, soak::Plan};
use crate::l2fwd::{L2fwd, Start};
use crate::process::Started;
use crate::soak::{Fault, Length, World, soak};
use crate::tap::{Progress, Tap};

/// Seconds that a guest's soak may take beyond the length of its steps.
const GUEST_END: u64 = 1200;

/// Subject of the soak
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Where {
    /// pktgen and l2fwd as two processes on this machine, on shared-memory virtio rings
    Native,
    /// Real NICs in the lab's guest, each kind in each VFIO mode
    Guest,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SoakArgs {
    #[arg(value_enum)]
    what: Where,
    /// Start no further step after N seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Start none after N packets came back; guest: for each kind of NIC in each mode
    #[arg(long, value_name = "N", default_value_t = 0)]
    packets: u64,
    /// Seed of the faults and their order [default: random; printed]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Kinds of NIC in the guest
    #[arg(long, value_name = "KINDS", value_delimiter = ',', default_value = "virtio-net,e1000,e1000e")]
    nics: Vec<String>,
    /// VFIO modes in the guest; noiommu-cdev only with --kernel edge
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "cdev,container,compat,noiommu")]
    modes: Vec<String>,
    /// Kernel of the guest: default, edge or a bzImage, as for the lab
    #[arg(long, value_name = "K", default_value = "default")]
    kernel: String,
    /// Write the figures to FILE, one JSON object per line
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Let apt install what is missing, and remove what conflicts with it, without asking
    #[arg(long)]
    yes: bool,
    /// The checkout
    #[arg(long, value_name = "DIR", default_value = ".", hide = true)]
    repo: PathBuf,
}

/// Runs the soaks that the user asks for, and returns the exit code.
pub(crate) fn run(args: &SoakArgs, programs: &Path) -> Result<u8> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1 << 31));
    let length = Length { seconds: args.seconds, packets: args.packets, seed };
    let what = if args.what == Where::Native { "native" } else { "guest" };
    eprintln!(
        "soak: seed {seed}; to repeat it: scripts/soak {what} --seed {seed} --seconds {} --packets {}",
        args.seconds, args.packets
    );
    let tap = Tap::default();
    let mut figures = Vec::new();
    let mut done = |report: Report, progress: &Progress| {
        figures.extend(report.notes.iter().cloned());
        tap.report(&report, progress.elapsed());
    };
    match args.what {
        Where::Native => {
            let mut progress = Progress::new("soak of rings");
            let report = run_once("soak of rings".into(), true, programs, &Started::default(), |context| {
                native(context, &length, &mut |line| progress.tick(|| line))
            });
            done(report, &progress);
        }
        Where::Guest => {
            let each = args.seconds / (args.nics.len() * args.modes.len()).max(1) as u64 + 1;
            let lab = Lab {
                repo: args.repo.clone(),
                options: args.yes.then(|| "--yes".into()).into_iter().collect(),
                full: true,
            };
            // VFIO offers devices without an IOMMU only on a machine that has none.
            let (physical, mapped): (Vec<_>, Vec<_>) =
                args.modes.iter().partition(|mode| mode.starts_with("noiommu"));
            for (boot, modes) in [(Boot::Iommu, mapped), (Boot::Noiommu, physical)] {
                if modes.is_empty() {
                    continue;
                }
                let mut session = Session::start(&lab, &args.kernel, boot)?;
                for (nic, mode) in modes.iter().flat_map(|mode| args.nics.iter().map(move |nic| (nic, *mode)))
                {
                    let length = Length { seconds: each, ..length };
                    let mut progress = Progress::new(&format!("soak of {nic}, {mode}"));
                    let request = Request::Soak(Plan { nic: nic.clone(), mode: mode.clone(), length });
                    let limit = Duration::from_secs(each + GUEST_END);
                    let report = match session.request(&request, limit, |line| progress.tick(|| line)) {
                        Ok(report) => report,
                        Err(Lost::Hung) => bail!("the soak of {nic}, {mode} hangs\n{}", session.stacks()),
                        Err(Lost::Ended(said)) => {
                            bail!("the guest ended in the soak of {nic}, {mode}\n{said}")
                        }
                    };
                    done(report, &progress);
                }
                session.finish()?;
            }
        }
    }
    if let Some(file) = &args.json {
        std::fs::write(file, figures.join("\n") + "\n")?;
    }
    Ok(tap.end())
}

/// Soak of two processes on this machine, on shared-memory rings. The machine itself cannot be disturbed.
struct Rings {
    dir: PathBuf,
    forwarder: End,
    kills: bool,
}

impl World for Rings {
    /// A forwarder with its own rings (virtio-user) gets, at random, barely more buffers than the rings take.
    fn forwarder(&self, rng: &mut Rng) -> Start {
        let few = if self.forwarder == End::VirtioUser && rng.bool() { "--total-num-mbufs 2200" } else { "" };
        Start::new(format!(
            "-l 1 {} {} -- -p 3 -q 2 -T 0.2 {few}",
            prefix("soak-fwd"),
            self.devices(self.forwarder)
        ))
    }

    fn generator(&self) -> String {
        format!(
            "-l 0 {} {} -- --dst-mac 02:00:00:00:00:99 --expect-dst 02:00:00:00:00:01 --window 900",
            prefix("soak-gen"),
            self.devices(self.forwarder.other())
        )
    }

    /// Selects epochs without and with SIGKILL, each with the forwarder at each kind of end. The first epoch
    /// has no SIGKILL, so that every soak compares at least one.
    fn begin(&mut self, number: u64) -> Result<()> {
        (self.forwarder, self.kills) = match number % 4 {
            0 => (End::Vhost, false),
            1 => (End::VirtioUser, true),
            2 => (End::VirtioUser, false),
            _ => (End::Vhost, true),
        };
        for port in ["0", "1"] {
            // A killed process leaves its socket's file.
            let _ = std::fs::remove_file(self.dir.join(port));
        }
        Ok(())
    }

    fn faults(&self) -> &[Fault] {
        const ALL: [Fault; 6] = [
            Fault::None,
            Fault::StopGenerator,
            Fault::StopForwarder,
            Fault::RestartForwarder,
            Fault::KillGenerator,
            Fault::KillForwarder,
        ];
        if self.kills { &ALL } else { &ALL[..4] }
    }

    fn forwarder_is_first(&self) -> bool {
        self.forwarder == End::Vhost
    }

    fn await_forwarder(&self, _: &mut L2fwd) -> Result<()> {
        await_sockets(&self.dir, 2)
    }

    fn await_generator(&self) -> Result<()> {
        await_sockets(&self.dir, 2)
    }

    fn disturb(&self, fault: Fault, _: &mut L2fwd) -> Result<()> {
        bail!("{fault:?} is not a fault of rings")
    }

    /// Every frame that was sent came back or is counted as lost.
    fn expected_loss(&self, named: u64) -> Option<u64> {
        Some(named)
    }

    fn keeps_order(&self) -> bool {
        true
    }
}

impl Rings {
    fn devices(&self, end: End) -> String {
        let devargs = if end == End::VirtioUser { ",queue_size=1024" } else { "" };
        end.devices(&self.dir, 2, devargs)
    }
}

fn native(context: &Context, length: &Length, say: &mut dyn FnMut(String)) -> Result<()> {
    let mut rings = Rings { dir: context.dir.clone(), forwarder: End::Vhost, kills: false };
    let figures = soak(context, &mut rings, length, say)?;
    context.note(serde_json::to_string(&figures)?);
    Ok(())
}

pub(super) fn cases(cases: &mut Cases) {
    let soak = |seconds| {
        move |context: &Context| native(context, &Length { seconds, packets: 0, seed: 1 }, &mut |_| ())
    };
    cases.add("half a minute of soak", soak(30)).limit(600).not_in_full();
    cases.add("ten minutes of soak", soak(600)).limit(1800).in_full();
}
