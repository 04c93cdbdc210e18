//! One run: a generator on one core, the forwarder of l2fwd on another, four NICs, one mode.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vireo_bus_pci::{Bus, PciInfo};
use vireo_drivers::memory::{self, MemoryNeed, PortMemory};
use vireo_drivers::port::{MacAddr, Nic, QueueSizes, RxBurst, RxQueue, TxBurst, TxQueue, counters};
use vireo_drivers::ports::{self, OpenPort};
use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, Packet, Pool, PoolCache};
use vireo_eal::ioctl;
use vireo_eal::iommufd::Access;
use vireo_eal::lcore::{StopFlag, pin_to};
use vireo_eal::mem::{Backing, Region, hugepages};
use vireo_eal::vfio::{AddressSpace, Vfio, VfioMode};
use vireo_eal::{Error, ErrorKind, Result};
use vireo_l2fwd::forward::{AnyLane, Lane, PairCounts, ethernet, forward_any};
use vireo_pktgen::frame::{self, SHORTEST, Tag};
use vireo_pktgen::generator::{self, End, Expect, KNOCKS, Outcome, Stream};

use crate::machine::Watch;
use crate::record::{Latency, MapTime, Run};
use crate::run::kind;

const SIZES: QueueSizes = QueueSizes { rx: 1024, tx: 1024 };
const BUFFERS: u32 = 8192;
/// Frames on their way at once: fewer than any queue between the ports holds.
const WINDOW: u64 = 128;
/// Longest wait for the first packet.
const FIRST_PACKET: Duration = Duration::from_secs(10);
/// Latency is measured at this part of the rate that went before: never at overload.
const LATENCY_LOAD: f64 = 0.1;

/// Four NICs of one kind: sender, forwarder's two, receiver.
#[derive(Debug)]
pub(crate) struct Wiring {
    pub(crate) nic: &'static str,
    pub(crate) sender: PciInfo,
    pub(crate) inner: [PciInfo; 2],
    pub(crate) receiver: PciInfo,
}

impl Wiring {
    /// The NICs in that order.
    pub(crate) fn new(infos: Vec<PciInfo>) -> Result<Self> {
        let wrong = |why: &str| Error::new(ErrorKind::Usage, "cannot wire the NICs", why);
        let [sender, inside, outside, receiver] = <[PciInfo; 4]>::try_from(infos)
            .map_err(|infos| wrong(&format!("{} are given, not 4", infos.len())))?;
        let nic = kind(&inside).ok_or_else(|| wrong(&format!("no driver here knows {}", inside.id)))?;
        Ok(Self { nic, sender, inner: [inside, outside], receiver })
    }
}

/// What bounds a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Core of the generator.
    pub(crate) generator: usize,
    /// Core of the forwarder.
    pub(crate) forwarder: usize,
    /// Length of a stream.
    pub(crate) stream: Duration,
    /// Size of the region whose mapping is timed.
    pub(crate) map_bytes: usize,
    /// Part by which the forwarder is made to take longer; 0 except where the method is tested.
    pub(crate) slower: f64,
}

/// Ports of one side, with memory of their own.
pub(crate) struct Side {
    ports: Vec<OpenPort>,
    queues: Vec<(RxQueue, TxQueue)>,
    cache: PoolCache,
    /// A cache of the same pool: the generator's two queues have one each.
    to_send: PoolCache,
    memory: PortMemory,
    /// What mapping the memory took.
    mapped: Duration,
}

impl Side {
    /// Opens and starts both.
    pub(crate) fn start(bus: &Bus, infos: [&PciInfo; 2], mode: VfioMode, promiscuous: bool) -> Result<Self> {
        let vfio = Vfio::new(None);
        let mut ports = infos
            .into_iter()
            .map(|info| ports::open_one(bus, &vfio, info.clone(), mode, &[]))
            .collect::<Result<Vec<_>>>()?;
        let need = MemoryNeed { buffers: BUFFERS, send_only: 0, sizes: SIZES, pairs: 1 };
        let opened: Vec<&OpenPort> = ports.iter().collect();
        let region = Region::new(need.bytes(&opened), Backing::HugeMemfd)?;
        let since = Instant::now();
        let memory = memory::map(region, &need, &opened)?;
        let mapped = since.elapsed();
        let pool = Pool::new(&memory.buffers, BUFFERS)?;
        let (mut cache, to_send) = (pool.cache(), pool.cache());
        let mut queues = Vec::with_capacity(ports.len());
        for open in &mut ports {
            open.port.set_promiscuous(promiscuous)?;
            queues.push(open.port.start(memory.of(open), &mut cache, SIZES)?);
        }
        Ok(Self { ports, queues, cache, to_send, memory, mapped })
    }

    /// Frames from the first port to the second, until one arrives or for `patience`.
    pub(crate) fn knocks(&self, window: u64, patience: Duration) -> Stream {
        Stream {
            run: Tsc::now() as u32,
            // Every NIC's filter lets the broadcast address pass, whatever the forwarder's own address is.
            destination: MacAddr([0xff; 6]),
            source: self.ports[0].port.mac(),
            expect: Some(Expect { destination: Some(MacAddr([2, 0, 0, 0, 0, 1])), source: None }),
            sizes: SHORTEST..=SHORTEST,
            rate: Some(KNOCKS),
            window,
            end: End::FirstArrival(patience),
        }
    }

    /// Sends `stream` on the first port and receives it on the second.
    pub(crate) fn send(&mut self, stream: &Stream, stop: &StopFlag) -> Result<Outcome> {
        let (first, rest) = self.queues.split_at_mut(1);
        let tx = (&mut first[0].1, &mut self.to_send);
        generator::run(stream, tx, (&mut rest[0].0, &mut self.cache), stop)
    }

    /// The lanes between the two ports, in both directions. They take the queues; [`Self::take_back`] returns these.
    pub(crate) fn lanes(&mut self) -> Vec<AnyLane> {
        let (rx, tx): (Vec<_>, Vec<_>) = std::mem::take(&mut self.queues).into_iter().unzip();
        let pairs = rx.into_iter().enumerate().zip(tx.into_iter().rev());
        pairs
            .map(|((from, rx), tx)| {
                let to = 1 - from;
                Lane { rx, from, tx, to, ethernet: Some(ethernet(to, self.ports[to].port.mac())) }
            })
            .collect()
    }

    /// Takes the queues of [`Self::lanes`] back.
    pub(crate) fn take_back(&mut self, mut lanes: Vec<AnyLane>) {
        lanes.sort_by_key(|lane| lane.from);
        let (rx, tx): (Vec<_>, Vec<_>) = lanes.into_iter().map(|lane| (lane.rx, lane.tx)).unzip();
        self.queues = rx.into_iter().zip(tx.into_iter().rev()).collect();
    }

    /// A cache of its own for the lanes.
    pub(crate) fn cache(&self) -> PoolCache {
        self.cache.pool().cache()
    }

    /// Sends a full burst of shortest frames on the first port.
    pub(crate) fn send_burst(&mut self) {
        let mut burst = Burst::new();
        let mut bytes = [0; SHORTEST];
        let tag = Tag { run: 0, sequence: 0, ticks: 0 };
        frame::write(&mut bytes, MacAddr([0xff; 6]), self.ports[0].port.mac(), tag);
        while !burst.is_full()
            && let Some(buffer) = self.to_send.allocate()
        {
            let mut packet = Packet::new(buffer, bytes.len());
            self.to_send.write(&mut packet, 0, &bytes);
            burst.push(packet);
        }
        self.queues[0].1.tx_burst(&mut self.to_send, &mut burst);
        for packet in burst.drain(..) {
            self.to_send.free(packet.into_buffer());
        }
    }

    /// Throws away what has come on the second port.
    pub(crate) fn drain(&mut self) {
        let mut burst = Burst::new();
        self.queues[1].0.rx_burst(&mut self.cache, &mut burst);
        for packet in burst.drain(..) {
            self.cache.free(packet.into_buffer());
        }
    }

    /// Stops the ports, and counts; `side` is the name that lost packets are counted under.
    pub(crate) fn stop(mut self, side: &str) -> Result<Stopped> {
        let (mut drops, mut doorbells) = (BTreeMap::new(), 0);
        for (open, (rx, tx)) in self.ports.iter_mut().zip(self.queues) {
            let (rx_stats, tx_stats) = (rx.stats(), tx.stats());
            doorbells += rx_stats.doorbells + tx_stats.doorbells;
            open.port.stop(rx, tx, &mut self.cache)?;
            let device = open.port.device_drops();
            let lost: Vec<&str> =
                device.iter().map(|(name, _)| *name).chain(["rx_errors", "tx_errors"]).collect();
            for (name, count) in counters(rx_stats, tx_stats, device.clone()) {
                if lost.contains(&name) {
                    *drops.entry(format!("{side}_{name}")).or_default() += count;
                }
            }
        }
        drop(self.memory);
        Ok(Stopped { ports: self.ports, drops, doorbells })
    }
}

/// A side that has stopped.
pub(crate) struct Stopped {
    ports: Vec<OpenPort>,
    /// What each port counted as lost, by name.
    drops: BTreeMap<String, u64>,
    /// Doorbell writes of all queues.
    doorbells: u64,
}

/// What the forwarder's thread gives back.
struct Forwarded {
    stopped: Stopped,
    phases: BTreeMap<&'static str, Duration>,
}

/// Runs one mode on one wiring.
pub(crate) fn measure(
    bus: &Bus,
    wiring: &Wiring,
    mode: VfioMode,
    limits: &Limits,
    stop: &StopFlag,
) -> Result<Run> {
    pin_to(limits.generator)?;
    let watch = Watch::begin();
    let mut side = Side::start(bus, [&wiring.sender, &wiring.receiver], mode, true)?;
    let began = Tsc::now();
    let (forwarded, streams) = beside(
        |done, polling| forward(bus, wiring, mode, limits, done, polling),
        |polling| generate(wiring, &mut side, limits, stop, polling),
    )?;
    let Stopped { ports: generator_ports, mut drops, .. } = side.stop("generator")?;
    let Forwarded { stopped: forwarder, phases } = forwarded;
    drops.extend(forwarder.drops);
    drop((generator_ports, forwarder.ports));
    let ms = |name: &str| phases.get(name).map_or(0.0, |took| took.as_secs_f64() * 1e3);
    let [first, rate, latency] = &streams;
    let counts = latency.latency.iter_recorded();
    Ok(Run {
        nic: wiring.nic.to_owned(),
        mode: mode.name().to_owned(),
        round: 0,
        pair: String::new(),
        forward_pps: rate.rate(),
        latency_ns: Latency::from(&latency.latency),
        latency_counts: counts
            .map(|step| (step.value_iterated_to(), step.count_since_last_iteration()))
            .collect(),
        open_ms: ms("open"),
        bind_ms: ms("bind"),
        attach_ms: ms("attach"),
        start_map_ms: ms("map"),
        first_packet_ms: first.first.map_or(0.0, |at| Tsc::to_nanos(at.saturating_sub(began)) as f64 / 1e6),
        sent: streams.iter().map(|stream| stream.sent).sum(),
        received: streams.iter().map(|stream| stream.received).sum(),
        doorbells: forwarder.doorbells,
        drops,
        machine: Some(watch.end()),
    })
}

/// Calls it when the scope ends, by a panic too.
struct AtEnd<F: Fn()>(F);

impl<F: Fn()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Runs `forward` in a thread beside `generate`. The one polls until its flag is set and the other waits for its word,
/// so each end, by an error or a panic too, has to reach the other.
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

/// The forwarder's side, from opening to the reset: what `l2fwd -p 3` does.
fn forward(
    bus: &Bus,
    wiring: &Wiring,
    mode: VfioMode,
    limits: &Limits,
    done: &StopFlag,
    polling: &AtomicU64,
) -> Result<Forwarded> {
    pin_to(limits.forwarder)?;
    let mut side = Side::start(bus, [&wiring.inner[0], &wiring.inner[1]], mode, false)?;
    let mut phases = BTreeMap::from([("map", side.mapped)]);
    for phase in side.ports.iter().filter_map(|open| open.report.as_ref()).flat_map(|report| &report.phases) {
        let longer = phase.took.mul_f64(limits.slower);
        spin_until(Tsc::now() + Tsc::from_nanos(longer.as_nanos() as u64));
        *phases.entry(phase.name).or_default() += phase.took + longer;
    }
    let lanes = side.lanes();
    let counts: [PairCounts; 2] = Default::default();
    let mut cache = side.cache();
    let (mut polled, mut since) = (false, Tsc::now());
    let lanes = forward_any(lanes, &mut cache, &counts, None, done, || {
        if !polled {
            polling.store(Tsc::now(), Ordering::Release);
            polled = true;
        }
        if limits.slower > 0.0 {
            let now = Tsc::now();
            spin_until(now + ((now - since) as f64 * limits.slower) as u64);
            since = Tsc::now();
        }
    });
    drop(cache);
    side.take_back(lanes);
    let mut stopped = side.stop("forwarder")?;
    stopped.drops.insert("forwarder_tx_full".into(), counts.iter().map(|count| count.dropped.get()).sum());
    Ok(Forwarded { stopped, phases })
}

fn spin_until(ticks: u64) {
    while Tsc::now() < ticks {
        std::hint::spin_loop();
    }
}

/// Three streams: until the first packet is back, as fast as it goes, and at a load that queues nothing.
fn generate(
    wiring: &Wiring,
    side: &mut Side,
    limits: &Limits,
    stop: &StopFlag,
    polling: &AtomicU64,
) -> Result<[Outcome; 3]> {
    while polling.load(Ordering::Acquire) == 0 {
        std::hint::spin_loop();
    }
    if polling.load(Ordering::Acquire) == u64::MAX {
        return Err(Error::new(ErrorKind::Protocol, "the forwarder ended early", "see its own error"));
    }
    let mut stream = side.knocks(WINDOW, FIRST_PACKET);
    let mut next = |rate: Option<f64>, end: End| send_next(&mut stream, rate, end, side, stop);
    let first = next(Some(KNOCKS), End::FirstArrival(FIRST_PACKET))?;
    if first.received == 0 {
        return Err(Error::new(
            ErrorKind::Unavailable,
            format!("nothing came back through {} and {}", wiring.inner[0].address, wiring.inner[1].address),
            format!("{} frames were sent in {} s", first.sent, FIRST_PACKET.as_secs()),
        )
        .mend("see that the first two and the last two NICs are connected"));
    }
    let rate = next(None, End::After(limits.stream))?;
    let latency = next(Some((rate.rate() * LATENCY_LOAD).max(1.0)), End::After(limits.stream))?;
    Ok([first, rate, latency])
}

/// Packets per second without a forwarder, from the sender to the NIC that its wire ends at: the devices' own
/// ceiling, with half of the hops that a forwarded packet takes.
pub(crate) fn null_forwarder(
    bus: &Bus,
    wiring: &Wiring,
    mode: VfioMode,
    limits: &Limits,
    stop: &StopFlag,
) -> Result<f64> {
    pin_to(limits.generator)?;
    let mut side = Side::start(bus, [&wiring.sender, &wiring.inner[0]], mode, true)?;
    let mut stream = side.knocks(WINDOW, FIRST_PACKET);
    stream.expect = None;
    send_next(&mut stream, Some(KNOCKS), End::FirstArrival(FIRST_PACKET), &mut side, stop)?;
    let rate = send_next(&mut stream, None, End::After(limits.stream), &mut side, stop)?.rate();
    side.stop("generator")?;
    Ok(rate)
}

/// Sends the next stream, which tells its frames from those of the last one.
fn send_next(
    stream: &mut Stream,
    rate: Option<f64>,
    end: End,
    side: &mut Side,
    stop: &StopFlag,
) -> Result<Outcome> {
    (stream.rate, stream.end) = (rate, end);
    stream.run = stream.run.wrapping_add(1);
    side.send(stream, stop)
}

/// How memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// By address: `VFIO_IOMMU_MAP_DMA` or `IOMMU_IOAS_MAP`.
    Map,
    /// By file: `IOMMU_IOAS_MAP_FILE`.
    MapFile,
    /// By address, with 4 KiB pages in the I/O page table only: `IOMMU_OPTION_HUGE_PAGES` = 0.
    MapSmall,
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::MapFile => "map-file",
            Self::MapSmall => "map, huge pages off",
        }
    }
}

/// Maps and unmaps a region while the device is attached; none where the mode maps nothing.
fn time_map(space: &Arc<AddressSpace>, region: &Arc<Region>, call: Call) -> Result<Option<MapTime>> {
    if space.is_physical() && space.ioas().is_none() {
        return Ok(None);
    }
    let iova = if space.is_physical() { None } else { space.free_ranges().fit(region.len() as u64) };
    if let (Call::MapSmall, Some(ioas)) = (call, space.ioas()) {
        ioas.set_huge_pages(false)?;
    }
    // By the clock of `ioctl::time`: where the kernel's is slow to read, as in an emulator, the difference of the two
    // would be its cost.
    let elapsed = |since: u64| Duration::from_nanos(Tsc::to_nanos(Tsc::now().saturating_sub(since)));
    let (before, in_kernel, since) = (ioctl::calls(), ioctl::time(), Tsc::now());
    let mapping: Box<dyn std::fmt::Debug> = match (call, space.ioas()) {
        (Call::MapFile, Some(ioas)) => match ioas.map_file(region, iova, Access::ReadWrite) {
            Ok(mapping) => Box::new(mapping),
            Err(error) if error.errno() == Some(nix::errno::Errno::ENOTTY) => return Ok(None),
            Err(error) => return Err(error),
        },
        (Call::MapFile | Call::MapSmall, None) => return Ok(None),
        (Call::Map | Call::MapSmall, _) => Box::new(space.map(region, iova)?),
    };
    let (mapped, map_ioctls) = (elapsed(since), ioctl::calls() - before);
    let in_kernel = ioctl::time().saturating_sub(in_kernel);
    let (before, since) = (ioctl::calls(), Tsc::now());
    drop(mapping);
    let (unmapped, unmap_ioctls) = (elapsed(since), ioctl::calls() - before);
    Ok(Some(MapTime {
        mode: String::new(),
        memory: String::new(),
        call: call.name().to_owned(),
        bytes: region.len() as u64,
        round: 0,
        map_ms: mapped.as_secs_f64() * 1e3,
        map_ioctl_ms: in_kernel.as_secs_f64() * 1e3,
        unmap_ms: unmapped.as_secs_f64() * 1e3,
        map_ioctls,
        unmap_ioctls,
    }))
}

/// The DMA-map table of one mode: page sizes and calls, one NIC attached.
pub(crate) fn map_times(
    bus: &Bus,
    wiring: &Wiring,
    mode: VfioMode,
    regions: &[(&'static str, Arc<Region>)],
    round: u32,
) -> Result<Vec<MapTime>> {
    let vfio = Vfio::new(None);
    let device = bus.open(&wiring.inner[0], &vfio, mode)?;
    let times = map_table(device.vfio().space(), regions)?;
    Ok(times.into_iter().map(|time| MapTime { mode: mode.name().to_owned(), round, ..time }).collect())
}

/// A region of `bytes` for each size of page that this machine has, with its name.
pub(crate) fn regions(bytes: usize) -> Result<Vec<(&'static str, Arc<Region>)>> {
    let mut regions = vec![("4 KiB", Backing::SmallPages), ("2 MiB", Backing::HugeMemfd)];
    if hugepages(Path::new("/sys")).iter().any(|pages| pages.page_size == 1 << 30 && pages.free > 0) {
        regions.push(("1 GiB", Backing::GiantMemfd));
    }
    regions.into_iter().map(|(name, backing)| Ok((name, Arc::new(Region::new(bytes, backing)?)))).collect()
}

/// Each call on each of `regions`. The last row changes the address space for good.
pub(crate) fn map_table(
    space: &Arc<AddressSpace>,
    regions: &[(&'static str, Arc<Region>)],
) -> Result<Vec<MapTime>> {
    let by_size = regions.iter().flat_map(|region| [Call::Map, Call::MapFile].map(|call| (region, call)));
    let large = regions.iter().filter(|(_, region)| region.page_size() == 2 << 20);
    let mut times = Vec::new();
    for ((memory, region), call) in by_size.chain(large.map(|region| (region, Call::MapSmall))) {
        if let Some(time) = time_map(space, region, call)? {
            times.push(MapTime { memory: (*memory).to_owned(), ..time });
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc;

    /// What `call` gives, unless it panics; fails when it does not end.
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
