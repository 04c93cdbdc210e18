//! The workload that `scripts/bench insn` counts: l2fwd's loop on the real drivers, against devices that this
//! process simulates.
//!
//! Prints one line of JSON per case. Callgrind collects inside [`counted_loop`] but not inside
//! [`device_half`], and writes a profile each time [`whole_case`] returns. Nothing here depends on time,
//! chance or the environment.
#![forbid(unsafe_code)]

use std::sync::Arc;

use serde_json::{Value, json};
use vireo_drivers::fakedev::e1000::{FakeE1000, ID_82540EM, ID_82574L};
use vireo_drivers::fakedev::igb::{FakeIgb, ID_82576};
use vireo_drivers::fakedev::virtio::{Behaviour, VirtioNet, feature};
use vireo_drivers::port::{MacAddr, Nic, Offloads, PortConfig};
use vireo_drivers::tied::{TieRx, TieTx};
use vireo_drivers::{e1000, igb, virtio};
use vireo_eal::Result;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DmaMemory, Pool, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};
use vireo_frame::Hook;
use vireo_frame::forward::{Lane, forward, forward_general};
use vireo_frame::tied::TiedLanes;
use vireo_l2fwd::rewrite::Rewrite;

/// Descriptors of each ring, as in the measurements of DPDK.
const RING: u16 = 256;
const FRAME: [u8; 60] = [0x5a; 60];
/// Number of frames that arrive before each poll, repeated in turn. If one frame arrives before every poll,
/// 32 frames share a send. The row with an empty poll after each frame shows what a packet that arrives alone
/// costs in both directions.
const BURSTS: [&[usize]; 7] = [&[0], &[1, 0], &[1], &[4], &[8], &[16], &[32]];

/// As DPDK's figures were counted.
const PLAIN: PortConfig = PortConfig::with_descriptors(RING, RING);

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const ADDRESS: Bdf = Bdf::new(0, 0, 3, 0).expect("a device number below 32");

/// Packets counted in each case, or empty polls if there are no packets: whole turns of the ring.
const COUNT: usize = 8 * RING as usize;
/// Bytes that are contiguous where addresses are physical.
const PAGE: usize = 64 << 10;
/// Packet buffers for two rings in flight and a cache that never runs short.
const BUFFERS: u32 = 1024;

/// The far end of the device's wire: delivers frames to the device and takes those that it sends.
struct Wire<'a> {
    receive: &'a dyn Fn(&[u8]) -> bool,
    transmit: &'a dyn Fn(),
    burst: &'a [usize],
    /// Polls so far, out of `end`.
    polls: usize,
    end: usize,
    stop: StopFlag,
}

impl Wire<'_> {
    /// Takes the sent frames and lets the next burst arrive.
    fn step(&mut self) {
        (self.transmit)();
        for _ in 0..self.burst[self.polls % self.burst.len()] {
            assert!((self.receive)(&FRAME), "the RX ring is full");
        }
        self.polls += 1;
        if self.polls == self.end {
            self.stop.set();
        }
    }
}

/// Simulates the device between two polls. Not counted.
#[inline(never)]
fn device_half(wire: &mut Wire<'_>) {
    wire.step();
}

/// Runs the counted code. The closure is defined elsewhere, so that no other function has this function's
/// name in its own.
#[inline(never)]
fn counted_loop(run: impl FnOnce()) {
    run();
}

fn memory(physical: bool) -> Result<Arc<DmaMemory>> {
    let region =
        Region::new((Pool::bytes(BUFFERS) + (256 << 10)).next_multiple_of(PAGE), Backing::SmallPages)?;
    if !physical {
        return DmaMemory::map(region, &[]);
    }
    // An odd factor modulo a power of two gives each page an address of its own, and none directly follows
    // the previous one.
    let addresses: Vec<u64> =
        (0..region.len() / PAGE).map(|page| (page * 0x2_6001 % (1 << 20) * PAGE) as u64).collect();
    Ok(DmaMemory::with_addresses(region, PAGE, &addresses))
}

/// Returns the name of a row: `32`, or `1+0`.
fn name(burst: &[usize]) -> Value {
    match burst {
        [size] => json!(size),
        sizes => json!(sizes.iter().map(usize::to_string).collect::<Vec<_>>().join("+")),
    }
}

/// The loops of l2fwd.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Path {
    Tied,
    General,
    /// Of ports that were started for long frames or with offloads.
    Extended,
}

impl Path {
    fn name(self) -> &'static str {
        if self == Self::Tied { "tied" } else { "general" }
    }
}

/// A lane on its path.
enum Running<R: TieRx, T: TieTx, H> {
    Tied(TiedLanes<R, T, H>),
    General([Lane<R, T, H>; 1], [Burst; 1]),
    Extended([Lane<R, T, H>; 1], [Burst; 1]),
}

impl<R: TieRx, T: TieTx, H: Hook> Running<R, T, H> {
    fn new(path: Path, lane: Lane<R, T, H>, cache: &mut PoolCache) -> Self {
        match path {
            Path::Tied => Self::Tied(TiedLanes::new(vec![lane], cache)),
            Path::General => Self::General([lane], [Burst::new()]),
            Path::Extended => Self::Extended([lane], [Burst::new()]),
        }
    }

    #[inline(always)]
    fn run(&mut self, cache: &mut PoolCache, stop: &StopFlag, tick: impl FnMut()) {
        match self {
            Self::Tied(lanes) => lanes.forward(cache, stop, &mut (), tick),
            Self::General(lanes, bursts) => forward(lanes, bursts, cache, stop, &mut (), tick),
            Self::Extended(lanes, bursts) => forward_general(lanes, bursts, cache, stop, &mut (), tick),
        }
    }

    fn into_queues(self, cache: &mut PoolCache) -> Option<(R, T)> {
        let lane = match self {
            Self::Tied(lanes) => lanes.into_lanes(cache).pop()?,
            Self::General([lane], _) | Self::Extended([lane], _) => lane,
        };
        Some((lane.rx, lane.tx))
    }
}

/// Runs a case and prints its line of the output. Callgrind writes its profile when this returns.
#[inline(never)]
fn whole_case<N: Nic<Rx: TieRx, Tx: TieTx>>(
    names: (&str, &str, &str),
    (path, config): (Path, &PortConfig),
    nic: &mut N,
    memory: &Arc<DmaMemory>,
    burst: &[usize],
    receive: &dyn Fn(&[u8]) -> bool,
    transmit: &dyn Fn(),
) -> Result<()> {
    let mut cache = Pool::new(memory, BUFFERS)?.cache();
    let (rx, tx) = nic.start_pair(config, memory, &mut cache)?;
    let lane = Lane { rx, from: 0, tx, to: 0, hook: Rewrite::of(0, nic.mac()) };
    let mut running = Running::new(path, lane, &mut cache);
    let counters = (nic.counters().rx(0), nic.counters().tx(0));
    let arrive: usize = burst.iter().sum();
    let turns = COUNT / arrive.max(1);
    let packets = (turns * arrive) as u64;
    let wire =
        || Wire { receive, transmit, burst, polls: 0, end: turns * burst.len(), stop: StopFlag::new() };

    let mut warm = wire();
    let stop = warm.stop.clone();
    running.run(&mut cache, &stop, || warm.step());
    let before = (counters.0.read(), counters.1.read());

    let mut hot = wire();
    let stop = hot.stop.clone();
    counted_loop(|| running.run(&mut cache, &stop, || device_half(&mut hot)));

    let after = (counters.0.read(), counters.1.read());
    let (received, sent) = (after.0.packets - before.0.packets, after.1.packets - before.1.packets);
    assert_eq!((received, sent), (packets, packets), "packets were lost");
    assert_eq!(after.0.tied - after.0.untied, u64::from(path == Path::Tied));
    let (driver, device, addresses) = names;
    println!(
        "{}",
        json!({
            "driver": driver, "device": device, "path": path.name(), "burst": name(burst),
            "addresses": addresses,
            "count": COUNT,
            "rx_doorbells": after.0.doorbells - before.0.doorbells,
            "tx_doorbells": after.1.doorbells - before.1.doorbells,
        })
    );
    let Some((rx, tx)) = running.into_queues(&mut cache) else { return Ok(()) };
    nic.stop_pair(rx, tx, &mut cache)
}

fn e1000_case(
    name: &str,
    path: (Path, &PortConfig),
    (physical, addresses): (bool, &str),
    burst: &[usize],
) -> Result<()> {
    let memory = memory(physical)?;
    let id = if name.starts_with("82574L") { ID_82574L } else { ID_82540EM };
    let (function, device) = FakeE1000::new(ADDRESS, id, MAC);
    device.attach(memory.device_view()?);
    let mut port = e1000::Device::probe(function)?;
    let (receive, transmit) = (|frame: &[u8]| device.receive(frame), || drop(device.transmitted()));
    let names = ("e1000", name, addresses);
    whole_case(names, path, &mut port, &memory, burst, &receive, &transmit)
}

fn igb_case(path: Path, (physical, addresses): (bool, &str), burst: &[usize]) -> Result<()> {
    let memory = memory(physical)?;
    let (function, device) = FakeIgb::new(ADDRESS, ID_82576, MAC);
    device.attach(memory.device_view()?);
    let mut port = igb::Device::probe(function)?;
    let (receive, transmit) = (|frame: &[u8]| device.receive(frame), || drop(device.transmitted()));
    let names = ("igb", "82576", addresses);
    whole_case(names, (path, &PLAIN), &mut port, &memory, burst, &receive, &transmit)
}

fn virtio_case(
    (mrg_rxbuf, in_order, name): (bool, bool, &str),
    path: (Path, &PortConfig),
    (physical, addresses): (bool, &str),
    burst: &[usize],
) -> Result<()> {
    let memory = memory(physical)?;
    let mut behaviour = Behaviour::default();
    behaviour.features |= feature::IN_ORDER | feature::INDIRECT_DESC | feature::CSUM | feature::GUEST_CSUM;
    let device = VirtioNet::new(behaviour);
    device.attach(memory.device_view()?);
    let mut port = virtio::Device::probe_with(device.function(), virtio::Options { mrg_rxbuf, in_order })?;
    let (receive, transmit) = (|frame: &[u8]| device.receive(frame), || drop(device.transmitted()));
    let names = ("virtio-net", name, addresses);
    whole_case(names, path, &mut port, &memory, burst, &receive, &transmit)
}

fn main() -> Result<()> {
    let long = PLAIN.with_max_frame(9000);
    let offloads = PLAIN.with_offloads(Offloads::all());
    for memory in [(false, "iommu"), (true, "physical")] {
        let (physical, _) = memory;
        let bursts = || BURSTS.into_iter().filter(move |burst| !physical || matches!(burst, [1 | 32]));
        for path in [Path::Tied, Path::General] {
            for burst in bursts() {
                e1000_case("82540EM", (path, &PLAIN), memory, burst)?;
            }
            for burst in bursts() {
                e1000_case("82574L", (path, &PLAIN), memory, burst)?;
            }
            for burst in bursts() {
                igb_case(path, memory, burst)?;
            }
            let devices = [
                (true, false, "split mergeable"),
                (false, false, "split non-mergeable"),
                (true, true, "split mergeable in-order"),
            ];
            for (device, burst) in
                devices.into_iter().flat_map(|device| bursts().map(move |burst| (device, burst)))
            {
                virtio_case(device, (path, &PLAIN), memory, burst)?;
            }
        }
        for burst in bursts().filter(|burst| matches!(burst, [1 | 8 | 32])) {
            let (long, offloads) = ((Path::Extended, &long), (Path::Extended, &offloads));
            e1000_case("82574L long frames", long, memory, burst)?;
            virtio_case((true, false, "split mergeable long frames"), long, memory, burst)?;
            virtio_case((true, false, "split mergeable checksums"), offloads, memory, burst)?;
        }
    }
    Ok(())
}
