//! Measures one run: a generator on one core, l2fwd's forwarder on another, four NICs, one mode.

mod external;
mod maps;
mod reference;
mod side;
mod throughput;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use vireo_bus_pci::{Bus, PciInfo};
use vireo_drivers::counters::{Count, QueueCounters};
use vireo_eal::clock::Tsc;
use vireo_eal::lcore::{StopFlag, pin_to};
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};
use vireo_frame::forward::{Polling, forward_any};
use vireo_pktgen::generator::{End, Stream};

use crate::machine::Watch;
use crate::perf::{self, Counters, Counts};
use crate::record::{Latency, Run, Throughput};
use crate::run::kind;

pub(crate) use maps::{each_map, map_times, regions};
pub(crate) use reference::measure_reference;
pub(crate) use side::Side;
use side::Stopped;

/// Frames in flight at once: fewer than any queue between the ports holds.
const WINDOW: u64 = 128;
/// Longest wait for the first packet.
const FIRST_PACKET: Duration = Duration::from_secs(10);

/// Four NICs of one kind: the sender, the forwarder's two NICs, and the receiver.
#[derive(Debug)]
pub(crate) struct Wiring {
    pub(crate) nic: &'static str,
    pub(crate) sender: PciInfo,
    pub(crate) inner: [PciInfo; 2],
    pub(crate) receiver: PciInfo,
}

/// NICs of one kind, by the source of the packets.
#[derive(Debug)]
pub(crate) enum Setup {
    /// This process sends the packets and receives them.
    Wired(Wiring),
    /// An external generator sends to one of the forwarder's two NICs and receives from the other.
    External { nic: &'static str, inner: [PciInfo; 2] },
}

impl Setup {
    /// Takes two or four NICs, in the order of `--ports`.
    pub(crate) fn new(infos: Vec<PciInfo>) -> Result<Self> {
        let wrong = |why: String| Error::new(ErrorKind::Usage, "cannot wire the NICs", why);
        if !matches!(infos.len(), 2 | 4) {
            return Err(wrong(format!(
                "{} are given; 4 are needed, or with an external generator the forwarder's 2",
                infos.len()
            )));
        }
        let Some(nic) = infos.get(infos.len() / 2).and_then(kind) else {
            return Err(wrong(format!("no driver supports {}", infos[1].id)));
        };
        match <[PciInfo; 2]>::try_from(infos) {
            Ok(inner) => Ok(Self::External { nic, inner }),
            Err(infos) => Wiring::new(infos).map(Self::Wired),
        }
    }

    pub(crate) fn nic(&self) -> &'static str {
        match self {
            Self::Wired(Wiring { nic, .. }) | Self::External { nic, .. } => nic,
        }
    }

    /// The forwarder's NICs.
    pub(crate) fn inner(&self) -> &[PciInfo; 2] {
        match self {
            Self::Wired(Wiring { inner, .. }) | Self::External { inner, .. } => inner,
        }
    }

    /// Measures one mode.
    pub(crate) fn measure(&self, bus: &Bus, mode: VfioMode, limits: &Limits, stop: &StopFlag) -> Result<Run> {
        match self {
            Self::Wired(wiring) => measure(bus, wiring, mode, limits, stop),
            Self::External { nic, inner } => external::measure(bus, nic, inner, mode, limits, stop),
        }
    }
}

impl Wiring {
    /// Takes four NICs: the sender, the forwarder's two NICs, and the receiver.
    pub(crate) fn new(infos: Vec<PciInfo>) -> Result<Self> {
        let wrong = |why: &str| Error::new(ErrorKind::Usage, "cannot wire the NICs", why);
        let [sender, inside, outside, receiver] = <[PciInfo; 4]>::try_from(infos)
            .map_err(|infos| wrong(&format!("{} are given, not 4", infos.len())))?;
        let nic = kind(&inside).ok_or_else(|| wrong(&format!("no driver supports {}", inside.id)))?;
        Ok(Self { nic, sender, inner: [inside, outside], receiver })
    }
}

/// Parameters of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits<'a> {
    /// Core of the generator.
    pub(crate) generator: usize,
    /// Core of the forwarder.
    pub(crate) forwarder: usize,
    /// Length of a stream.
    pub(crate) stream: Duration,
    /// Length of a trial of the throughput search.
    pub(crate) trial: Duration,
    /// Frame sizes in bytes, without the frame check sequence. Rate and latency are measured with the first
    /// size, throughput with each.
    pub(crate) frames: &'a [usize],
    /// Highest loss at which a load counts as throughput, as a fraction of the frames sent.
    pub(crate) loss: f64,
    /// Load at which latency is measured, as a fraction of the rate.
    pub(crate) load: f64,
    /// Fraction by which the forwarder is slowed down; 0 unless the method is being tested.
    pub(crate) slower: f64,
}

/// Result of the forwarder.
struct Forwarded {
    stopped: Stopped,
    phases: BTreeMap<&'static str, Duration>,
    /// Packets that the forwarder received.
    received: u64,
    /// Packets that the forwarder's TX queues accepted.
    sent: u64,
}

impl Forwarded {
    /// Converts to a run with phases and counters, and releases the NICs.
    fn into_run(self, nic: &str, mode: VfioMode) -> Run {
        let ms = |name: &str| self.phases.get(name).map_or(0.0, |took| took.as_secs_f64() * 1e3);
        Run {
            nic: nic.to_owned(),
            mode: mode.name().to_owned(),
            open_ms: ms("open"),
            bind_ms: ms("bind"),
            attach_ms: ms("attach"),
            start_map_ms: ms("map"),
            doorbells: self.stopped.doorbells,
            drops: self.stopped.drops,
            ..Run::default()
        }
    }
}

/// Result of the generator.
struct Generated {
    sent: u64,
    received: u64,
    /// When the first packet returned, in TSC ticks.
    first: u64,
    forward_pps: f64,
    counters: Counts,
    counted_packets: u64,
    throughput: Vec<Throughput>,
    latency: Histogram<u64>,
}

/// Measures one mode on one wiring.
fn measure(bus: &Bus, wiring: &Wiring, mode: VfioMode, limits: &Limits<'_>, stop: &StopFlag) -> Result<Run> {
    pin_to(limits.generator)?;
    let watch = Watch::begin();
    let mut side = Side::start(bus, [&wiring.sender, &wiring.receiver], mode, true)?;
    let counters = OnceLock::new();
    let ((began, forwarded), generated) = beside(
        |done, polling| {
            // Opening the counters takes time that does not belong to any mode.
            counters.get_or_init(|| Mutex::new(Counters::begin()));
            let began = Tsc::now();
            let forwarded = forward(bus, &wiring.inner, mode, limits, done, |_| {
                if polling.load(Ordering::Relaxed) == 0 {
                    polling.store(Tsc::now(), Ordering::Release);
                }
            });
            Ok((began, forwarded?))
        },
        |polling| {
            let first = side.probes(WINDOW, FIRST_PACKET);
            generate(wiring, &mut side, first, limits, stop, polling, &counters)
        },
    )?;
    let Stopped { ports, drops, .. } = side.stop("generator")?;
    drop(ports);
    let run = forwarded.into_run(wiring.nic, mode);
    let Generated { sent, received, first, forward_pps, counters, counted_packets, throughput, latency } =
        generated;
    Ok(Run {
        forward_pps,
        counters,
        counted_packets,
        throughput,
        latency_ns: Latency::from(&latency),
        latency_counts: counts(&latency),
        first_packet_ms: millis(first.saturating_sub(began)),
        sent,
        received,
        drops: run.drops.into_iter().chain(drops).collect(),
        machine: Some(watch.end()),
        ..run
    })
}

/// Returns every recorded value with its count.
fn counts(latency: &Histogram<u64>) -> Vec<(u64, u64)> {
    let steps = latency.iter_recorded();
    steps.map(|step| (step.value_iterated_to(), step.count_since_last_iteration())).collect()
}

fn millis(ticks: u64) -> f64 {
    Tsc::to_nanos(ticks) as f64 / 1e6
}

/// Calls a closure at the end of the scope, even if it ends by a panic.
struct AtEnd<F: Fn()>(F);

impl<F: Fn()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Runs `forward` in a thread alongside `generate`. `forward` polls until its flag is set, and `generate`
/// waits until `polling` is set, so each must signal its end to the other, even if it ends by an error or a
/// panic.
fn beside<F: Send, G>(
    forward: impl FnOnce(&StopFlag, &AtomicU64) -> Result<F> + Send,
    generate: impl FnOnce(&AtomicU64) -> Result<G>,
) -> Result<(F, G)> {
    let (done, polling) = (StopFlag::new(), AtomicU64::new(0));
    let (forwarded, generated) = std::thread::scope(|scope| {
        let forwarder = scope.spawn(|| {
            let _ended = AtEnd(|| polling.store(u64::MAX, Ordering::Release));
            forward(&done, &polling)
        });
        let generated = {
            let _done = AtEnd(|| done.set());
            generate(&polling)
        };
        (forwarder.join(), generated)
    });
    let forwarded = forwarded.map_err(|_| {
        Error::new(ErrorKind::Protocol, "the forwarder ended early", "it panicked; its message is above")
    })??;
    Ok((forwarded, generated?))
}

/// Runs the forwarder on this thread until `done`, from opening the NICs to resetting them, as `l2fwd -p 3`
/// does.
fn forward(
    bus: &Bus,
    [inside, outside]: &[PciInfo; 2],
    mode: VfioMode,
    limits: &Limits<'_>,
    done: &StopFlag,
    mut each_poll: impl FnMut(&side::Counters),
) -> Result<Forwarded> {
    pin_to(limits.forwarder)?;
    let mut side = Side::start(bus, [inside, outside], mode, false)?;
    let mut phases = BTreeMap::from([("map", side.mapped)]);
    for phase in side.reports().flat_map(|report| &report.phases) {
        let longer = phase.took.mul_f64(limits.slower);
        spin_until(Tsc::now() + Tsc::from_nanos(longer.as_nanos() as u64));
        *phases.entry(phase.name).or_default() += phase.took + longer;
    }
    let lanes = side.lanes()?;
    let counters = side.counters();
    let mut cache = side.cache();
    let mut since = Tsc::now();
    let lanes = forward_any(lanes, &mut cache, Polling::default(), done, || {
        each_poll(&counters);
        if limits.slower > 0.0 {
            let now = Tsc::now();
            spin_until(now + ((now - since) as f64 * limits.slower) as u64);
            since = Tsc::now();
        }
    });
    drop(cache);
    side.take_back(lanes);
    let mut stopped = side.stop("forwarder")?;
    let sum = |queues: &[Arc<QueueCounters>], of: fn(&QueueCounters) -> &Count| -> u64 {
        queues.iter().map(|queue| of(queue).get()).sum()
    };
    stopped.drops.insert("forwarder_tx_full".into(), sum(&counters.tx, |queue| &queue.dropped));
    let received = sum(&counters.rx, |queue| &queue.packets);
    let sent = sum(&counters.tx, |queue| &queue.packets) + sum(&counters.tx, |queue| &queue.errors);
    Ok(Forwarded { stopped, phases, received, sent })
}

fn spin_until(ticks: u64) {
    while Tsc::now() < ticks {
        std::hint::spin_loop();
    }
}

/// Sends `first` until the first packet returns, then streams like it: as fast as possible, in search of the
/// throughput, and at a load that queues nothing.
fn generate(
    wiring: &Wiring,
    side: &mut Side,
    first: Stream,
    limits: &Limits<'_>,
    stop: &StopFlag,
    polling: &AtomicU64,
    counters: &OnceLock<Mutex<Counters>>,
) -> Result<Generated> {
    while polling.load(Ordering::Acquire) == 0 {
        std::hint::spin_loop();
    }
    if polling.load(Ordering::Acquire) == u64::MAX {
        return Err(Error::new(ErrorKind::Protocol, "the forwarder ended early", "see its own error"));
    }
    let (mut sent, mut received) = (0, 0);
    let mut send = |stream: &Stream| {
        let outcome = side.send(stream, stop)?;
        sent += outcome.sent;
        received += outcome.received + outcome.late;
        Ok(outcome)
    };
    let mut stream = Stream { sizes: limits.frames[0]..=limits.frames[0], ..first };
    let probes = send(&stream)?;
    let Some(first) = probes.first else {
        return Err(silent(&wiring.inner, probes.sent));
    };
    let read = || {
        let counters = counters.get().map(|counters| counters.lock().unwrap_or_else(PoisonError::into_inner));
        counters.map(|mut counters| counters.read()).unwrap_or_default()
    };
    let before = read();
    let closed = send(after(&mut stream, None, limits.stream))?;
    let (counters, counted_packets, forward_pps) =
        (perf::between(&before, read()), closed.received, closed.rate());
    let mut throughput = Vec::with_capacity(limits.frames.len());
    for &frame in limits.frames {
        throughput.push(throughput::search(frame, forward_pps, limits.loss, |load| {
            let trial = after(&mut stream, Some(load), limits.trial);
            send(&throughput::open_loop(trial, frame))
                .map(|outcome| throughput::trial(load, limits.trial, &outcome))
        })?);
    }
    let latency =
        send(after(&mut stream, Some((forward_pps * limits.load).max(1.0)), limits.stream))?.latency;
    Ok(Generated { sent, received, first, forward_pps, counters, counted_packets, throughput, latency })
}

/// Turns `stream` into the next stream, whose frames can be told from those of earlier streams.
fn after(stream: &mut Stream, rate: Option<f64>, time: Duration) -> &Stream {
    (stream.rate, stream.end) = (rate, End::After(time));
    stream.run += 1;
    stream.earlier.end = stream.run;
    stream
}

fn silent([inside, outside]: &[PciInfo; 2], sent: u64) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        format!("no frame came back through {} and {}", inside.address, outside.address),
        format!("{sent} frames were sent in {} s", FIRST_PACKET.as_secs()),
    )
    .with_hint("check that the first two and the last two NICs are connected")
}

/// Measures packets per second from a NIC to the NIC at the other end of its wire: the limit of the devices
/// themselves, with half of the hops of a forwarded packet.
///
/// # Errors
/// `Unavailable` if nothing arrives.
pub(crate) fn straight(
    bus: &Bus,
    [from, to]: [&PciInfo; 2],
    mode: VfioMode,
    limits: &Limits<'_>,
    stop: &StopFlag,
) -> Result<f64> {
    pin_to(limits.generator)?;
    let mut side = Side::start(bus, [from, to], mode, true)?;
    let mut stream = Stream { expect: None, ..side.probes(WINDOW, FIRST_PACKET) };
    let probes = side.send(&stream, stop)?;
    if probes.received == 0 && !stop.is_set() {
        return Err(Error::new(
            ErrorKind::Unavailable,
            format!("no frame from {} arrives at {}", from.address, to.address),
            format!("{} frames were sent in {} s", probes.sent, FIRST_PACKET.as_secs()),
        )
        .with_hint("connect them, or give the NICs in another order: --ports SENDER,FORWARDER_IN,FORWARDER_OUT,RECEIVER"));
    }
    let rate = side.send(after(&mut stream, None, limits.stream), stop)?.rate();
    side.stop("generator")?;
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc;

    /// Returns the result of `call`, or `None` if it panics. Fails if `call` does not end.
    fn ends<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(catch_unwind(AssertUnwindSafe(call)).ok()));
        receiver.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    fn poll_until_done(done: &StopFlag, polling: &AtomicU64) -> Result<()> {
        polling.store(1, Ordering::Release);
        while !done.is_set() {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn wait_for_word(polling: &AtomicU64) -> Result<u64> {
        loop {
            match polling.load(Ordering::Acquire) {
                0 => std::thread::yield_now(),
                word => return Ok(word),
            }
        }
    }

    #[test]
    fn the_forwarder_ends_when_the_generator_does() {
        assert!(matches!(ends(|| beside(poll_until_done, wait_for_word)), Some(Ok(((), _)))));
        assert!(ends(|| beside(poll_until_done, |_| -> Result<()> { panic!("in the generator") })).is_none());
    }

    #[test]
    fn the_generator_ends_when_the_forwarder_does() {
        let failed = || Err::<(), _>(Error::new(ErrorKind::Unavailable, "cannot open", "of an error"));
        let error = ends(move || beside(|_, _| failed(), wait_for_word)).unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let panics = || beside(|_, _| -> Result<()> { panic!("in the forwarder") }, wait_for_word);
        assert!(ends(panics).unwrap().unwrap_err().to_string().contains("it panicked"));
    }
}
