//! Soak. An epoch is the life of a generator, a forwarder and their successors. At its end, when all have
//! ended normally, no frame may differ from what was sent, and those that did not come back must be accounted
//! for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fastrand::Rng;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::case::{Context, read};
use crate::l2fwd::{L2fwd, Start};
use crate::pktgen::Pktgen;

/// Time for which packets may stand still before the soak fails. It is long, because other work may share the
/// machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
const STEPS_PER_EPOCH: u32 = 6;
/// KiB by which the private memory of a forwarder may grow in its life: noise of the allocator.
const GROWTH: u64 = 1024;

/// What happens to the programs while packets pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The generator is stopped for a while.
    StopGenerator,
    /// The forwarder is stopped for a while.
    StopForwarder,
    /// The forwarder is ended and started again.
    RestartForwarder,
    /// The generator is killed.
    KillGenerator,
    /// The forwarder is killed.
    KillForwarder,
    /// A NIC may no longer do DMA.
    LoseBusMaster,
    /// The link of a NIC goes down.
    LoseLink,
}

/// Length of a soak, and its seed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Length {
    /// Seconds after which no step begins.
    pub(crate) seconds: u64,
    /// Number of returned packets after which no step begins; 0: no limit.
    pub(crate) packets: u64,
    /// Seed of the faults, their order and their times.
    pub(crate) seed: u64,
}

/// Subject of a soak.
pub(crate) trait World {
    /// Start of the forwarder.
    fn forwarder(&self, rng: &mut Rng) -> Start;
    /// Arguments of the generator.
    fn generator(&self) -> String;
    /// Prepares epoch `number`.
    fn begin(&mut self, number: u64) -> Result<()>;
    /// Faults of this epoch.
    fn faults(&self) -> &[Fault];
    /// Whether the forwarder starts before the generator.
    fn forwarder_is_first(&self) -> bool;
    /// Waits until the generator can reach a forwarder that starts first.
    fn await_forwarder(&self, forwarder: &mut L2fwd) -> Result<()>;
    /// Waits until the forwarder can reach a generator that starts first.
    fn await_generator(&self) -> Result<()>;
    /// Breaks the machine according to `fault`, and repairs it.
    fn disturb(&self, fault: Fault, forwarder: &mut L2fwd) -> Result<()>;
    /// Number of frames that an epoch must have lost if counters account for `named` lost ones. `None`: not
    /// checked.
    fn expected_loss(&self, named: u64) -> Option<u64>;
    /// Whether no frame of an epoch may overtake another.
    fn keeps_order(&self) -> bool;
}

/// Sums over all epochs. Programs that were killed reported nothing and are left out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Seed of the soak.
    pub(crate) seed: u64,
    /// Duration in seconds.
    pub(crate) seconds: u64,
    /// Number of epochs.
    pub(crate) epochs: u64,
    /// Epochs in which lost frames were checked against [`World::expected_loss`].
    pub(crate) epochs_compared: u64,
    /// Frames that were lost in the compared epochs.
    pub(crate) lost_in_those_compared: u64,
    /// Number of faults by name.
    pub(crate) faults: BTreeMap<String, u64>,
    /// Number of lives of both programs by name, including killed ones.
    pub(crate) lives: BTreeMap<String, u64>,
    /// Sums of pktgen's figures by name.
    pub(crate) frames: BTreeMap<String, u64>,
    /// Lost frames that counters account for.
    pub(crate) lost_by_name: u64,
    /// Number of port restarts.
    pub(crate) port_restarts: u64,
    /// Polls that found no buffer.
    pub(crate) rx_no_buffer: u64,
    /// Times that a lane was tied. Half of the forwarders untie theirs every second.
    pub(crate) rx_tied: u64,
    /// Times that a lane was untied by a packet or a completion.
    pub(crate) rx_untied: u64,
    /// Maximum growth of a forwarder's private memory in KiB.
    pub(crate) most_growth_kib: u64,
}

struct Soak<'a, W> {
    context: &'a Context,
    world: &'a mut W,
    rng: Rng,
    until: Instant,
    packets: u64,
    forwarder: Option<L2fwd>,
    generator: Option<Pktgen>,
    /// Open descriptors and private memory in KiB of the forwarder at its first step.
    first: Option<(usize, u64)>,
    figures: Figures,
    say: &'a mut dyn FnMut(String),
}

/// Runs a soak of `world`.
pub(crate) fn soak<W: World>(
    context: &Context,
    world: &mut W,
    length: &Length,
    say: &mut dyn FnMut(String),
) -> Result<Figures> {
    let begun = Instant::now();
    let mut soak = Soak {
        context,
        world,
        rng: Rng::with_seed(length.seed),
        until: begun + Duration::from_secs(length.seconds),
        packets: length.packets,
        forwarder: None,
        generator: None,
        first: None,
        figures: Figures { seed: length.seed, ..Figures::default() },
        say,
    };
    while soak.goes_on() {
        let epoch = soak.figures.epochs;
        soak.epoch().with_context(|| format!("seed {}, epoch {epoch}", length.seed))?;
    }
    ensure!(soak.figures.epochs_compared > 0, "lost frames were not compared in any epoch");
    soak.figures.seconds = begun.elapsed().as_secs();
    Ok(soak.figures)
}

impl<W: World> Soak<'_, W> {
    fn frames(&self, name: &str) -> u64 {
        self.figures.frames.get(name).copied().unwrap_or_default()
    }

    fn goes_on(&self) -> bool {
        Instant::now() < self.until && (self.packets == 0 || self.frames("received") < self.packets)
    }

    fn epoch(&mut self) -> Result<()> {
        self.world.begin(self.figures.epochs)?;
        self.figures.epochs += 1;
        let (sent, received, named) =
            (self.frames("sent"), self.frames("received"), self.figures.lost_by_name);
        let mut killed = false;
        if self.world.forwarder_is_first() {
            self.start_forwarder()?;
            self.start_generator()?;
        } else {
            self.start_generator()?;
            self.start_forwarder()?;
        }
        for _ in 0..STEPS_PER_EPOCH {
            if !self.goes_on() {
                break;
            }
            self.passes()?;
            self.measure()?;
            let faults = self.world.faults();
            let fault = faults[self.rng.usize(..faults.len())];
            killed |= matches!(fault, Fault::KillGenerator | Fault::KillForwarder);
            self.pause(3000);
            let (epoch, received) = (self.figures.epochs, self.frames("received"));
            (self.say)(format!("epoch {epoch}: {fault:?}; {received} packets came back"));
            *self.figures.faults.entry(format!("{fault:?}")).or_default() += 1;
            self.make(fault).with_context(|| format!("after {fault:?}"))?;
        }
        self.passes()?;
        self.end_generator()?;
        self.end_forwarder()?;
        let lost = (self.frames("sent") - sent) - (self.frames("received") - received);
        let expected_loss = self.world.expected_loss(self.figures.lost_by_name - named);
        if let Some(expected) = expected_loss.filter(|_| !killed) {
            ensure!(lost == expected, "{lost} frames did not come back, but {expected} are accounted for");
            self.figures.epochs_compared += 1;
            self.figures.lost_in_those_compared += lost;
        }
        Ok(())
    }

    /// Lets traffic pass for a random time.
    fn pause(&mut self, milliseconds: u64) {
        std::thread::sleep(Duration::from_millis(self.rng.u64(..milliseconds)));
    }

    fn make(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::None => Ok(()),
            Fault::StopGenerator | Fault::StopForwarder => {
                let milliseconds = self.rng.u64(..1500);
                let process = match fault {
                    Fault::StopGenerator => self.generator.as_ref().map(|generator| &generator.0),
                    _ => self.forwarder.as_ref().map(|forwarder| &forwarder.process),
                };
                let process = process.context("no program")?;
                process.signal(Signal::SIGSTOP)?;
                std::thread::sleep(Duration::from_millis(milliseconds));
                process.signal(Signal::SIGCONT)
            }
            Fault::KillGenerator => {
                drop(self.generator.take());
                self.start_generator()
            }
            Fault::KillForwarder | Fault::RestartForwarder => {
                match fault {
                    Fault::KillForwarder => self.forwarder.take().context("no forwarder")?.kill()?,
                    _ => self.end_forwarder()?,
                }
                // The generator's virtio-user port has no control thread, so the generator must end with its
                // peer.
                if !self.world.forwarder_is_first() {
                    return self.start_forwarder();
                }
                self.end_generator()?;
                self.start_forwarder()?;
                self.start_generator()
            }
            Fault::LoseBusMaster | Fault::LoseLink => {
                self.world.disturb(fault, self.forwarder.as_mut().context("no forwarder")?)
            }
        }
    }

    fn start_forwarder(&mut self) -> Result<()> {
        let start = self.world.forwarder(&mut self.rng).patience(PATIENCE);
        let start = if self.rng.bool() { start.with("--untie-period 1") } else { start };
        let forwarder = self.forwarder.insert(start.spawn(self.context)?);
        self.first = None;
        *self.figures.lives.entry("l2fwd".into()).or_default() += 1;
        if self.world.forwarder_is_first() { self.world.await_forwarder(forwarder) } else { Ok(()) }
    }

    fn start_generator(&mut self) -> Result<()> {
        let size = ["60", "60-1514", "1514", "60-128"][self.rng.usize(..4)];
        let arguments = format!("{} --duration 1e9 --size {size}", self.world.generator());
        self.generator = Some(Pktgen::spawn(self.context, &arguments)?);
        *self.figures.lives.entry("pktgen".into()).or_default() += 1;
        if self.world.forwarder_is_first() { Ok(()) } else { self.world.await_generator() }
    }

    /// Waits until further packets pass.
    fn passes(&mut self) -> Result<()> {
        let received = |port: &serde_json::Value| port["received"].as_u64().unwrap_or_default();
        let forwarder = self.forwarder.as_mut().context("no forwarder")?;
        let before =
            forwarder.latest_statistics().map(|ports| ports.iter().map(received).max().unwrap_or_default());
        let passed = forwarder
            .await_statistics("that packets pass", |port| received(port) > before.unwrap_or_default());
        if self.generator.as_mut().is_none_or(|generator| generator.0.has_ended()) {
            bail!("pktgen ended by itself");
        }
        passed
    }

    fn measure(&mut self) -> Result<()> {
        let pid = self.forwarder.as_ref().context("no forwarder")?.process.pid();
        let status = read(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        let anon: u64 = line.trim().trim_end_matches(" kB").parse()?;
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        let (first_open, first_anon) = *self.first.get_or_insert((open, anon));
        ensure!(open <= first_open, "l2fwd has {open} open descriptors, up from {first_open}");
        let growth = anon.saturating_sub(first_anon);
        ensure!(growth <= GROWTH, "l2fwd has {anon} KiB of private memory, up from {first_anon}");
        self.figures.most_growth_kib = self.figures.most_growth_kib.max(growth);
        Ok(())
    }

    fn end_generator(&mut self) -> Result<()> {
        let generator = self.generator.take().context("no generator")?;
        generator.0.signal(Signal::SIGINT)?;
        let stream = generator.wait(PATIENCE)?;
        if self.world.keeps_order() {
            stream.expect_in_order()?
        } else {
            stream.intact()?
        }
        for name in
            ["sent", "received", "lost", "duplicates", "reordered", "wrong_address", "corrupt", "strays"]
        {
            *self.figures.frames.entry(name.into()).or_default() += stream.figure(name);
        }
        let named = [(0, "tx_unfinished"), (1, "rx_unread"), (1, "rx_errors")];
        self.figures.lost_by_name += named.map(|(port, name)| stream.counter(port, name)).iter().sum::<u64>();
        Ok(())
    }

    /// Ends the forwarder. It exits with another code if its own checks fail: buffers that did not come back,
    /// packets that do not add up.
    fn end_forwarder(&mut self) -> Result<()> {
        let ended = self.forwarder.take().context("no forwarder")?.end(Signal::SIGINT)?;
        ensure!(ended.code == 0, "l2fwd exited with {}", ended.code);
        let balance =
            ended.events.iter().find(|event| event["event"] == "balance" && event["balance"]["from"] == 0);
        let balance =
            |name: &str| balance.and_then(|event| event["balance"][name].as_u64()).unwrap_or_default();
        self.figures.lost_by_name += ended.counter(0, "rx_unread")?
            + ended.counter(0, "rx_errors")?
            + balance("dropped")
            + balance("tx_errors")
            + ended.counter(1, "tx_unfinished")?;
        for port in [0, 1] {
            self.figures.port_restarts += ended.counter(port, "restarts")?;
            self.figures.rx_no_buffer += ended.counter(port, "rx_no_buffer")?;
            self.figures.rx_tied += ended.counter(port, "rx_tied")?;
            self.figures.rx_untied += ended.counter(port, "rx_untied")?;
        }
        Ok(())
    }
}
