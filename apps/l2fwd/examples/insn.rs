//! What `scripts/bench insn` counts: l2fwd's loop on the real drivers, against devices that this process plays.
//!
//! Prints a line of JSON for each case. Callgrind collects inside [`counted_loop`] but not inside [`device_half`],
//! and writes a profile each time the former returns. Nothing here depends on time, chance or the environment.
#![forbid(unsafe_code)]

use std::sync::Arc;

use serde_json::{Value, json};
use vireo_drivers::fakedev::e1000::{FakeE1000, ID_82540EM, ID_82574L};
use vireo_drivers::fakedev::igb::{FakeIgb, ID_82576};
use vireo_drivers::fakedev::virtio::{Behaviour, VirtioNet, feature};
use vireo_drivers::port::{MacAddr, Nic, PortConfig};
use vireo_drivers::{e1000, igb, virtio};
use vireo_eal::Result;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DmaMemory, Pool};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};
use vireo_frame::forward::{Lane, forward};
use vireo_l2fwd::rewrite::Rewrite;

/// As DPDK's figures were counted.
const RING: u16 = 256;
const FRAME: [u8; 60] = [0x5a; 60];
/// Frames that arrive before each poll, in turn. Where one comes before every poll, 32 share a send: what a packet costs that
/// comes alone, in both directions, is in the row with an empty poll after each.
const BURSTS: [&[usize]; 7] = [&[0], &[1, 0], &[1], &[4], &[8], &[16], &[32]];

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const ADDRESS: Bdf = Bdf::new(0, 0, 3, 0).expect("a device number below 32");

/// Packets counted in each case, and empty polls where there are none: whole turns of the ring.
const COUNT: usize = 32 * RING as usize;
/// Contiguous bytes where addresses are physical.
const PAGE: usize = 64 << 10;
/// Two rings in flight and a cache that is never short.
const BUFFERS: u32 = 1024;

/// The other end of the device: how frames arrive there and how they leave.
struct Wire<'a> {
    receive: &'a dyn Fn(&[u8]) -> bool,
    transmit: &'a dyn Fn(),
    burst: &'a [usize],
    /// Polls so far, and in all.
    polls: usize,
    end: usize,
    stop: StopFlag,
}

impl Wire<'_> {
    /// Takes what was sent and lets the next burst arrive.
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

/// Not counted.
#[inline(never)]
fn device_half(wire: &mut Wire<'_>) {
    wire.step();
}

/// Counted. The closure comes from elsewhere, so that no other function has this one's name in its own.
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
    // An odd multiple modulo a power of two: each page has an address of its own, and none follows the other.
    let addresses: Vec<u64> =
        (0..region.len() / PAGE).map(|page| (page * 0x2_6001 % (1 << 20) * PAGE) as u64).collect();
    Ok(DmaMemory::with_addresses(region, PAGE, &addresses))
}

/// What a row is called: `32`, or `1+0`.
fn name(burst: &[usize]) -> Value {
    match burst {
        [size] => json!(size),
        sizes => json!(sizes.iter().map(usize::to_string).collect::<Vec<_>>().join("+")),
    }
}

/// One line of the output; callgrind writes its profile at the end.
#[inline(never)]
fn whole_case<N: Nic>(
    names: (&str, &str, &str),
    nic: &mut N,
    memory: &Arc<DmaMemory>,
    burst: &[usize],
    receive: &dyn Fn(&[u8]) -> bool,
    transmit: &dyn Fn(),
) -> Result<()> {
    let mut cache = Pool::new(memory, BUFFERS)?.cache();
    let (rx, tx) = nic.start_pair(&PortConfig::with_descriptors(RING, RING), memory, &mut cache)?;
    let mut lanes = [Lane { rx, from: 0, tx, to: 0, hook: Rewrite::of(0, nic.mac()) }];
    let mut bursts = [Burst::new()];
    let counters = (nic.counters().rx(0), nic.counters().tx(0));
    let arrive: usize = burst.iter().sum();
    let turns = COUNT / arrive.max(1);
    let packets = (turns * arrive) as u64;
    let wire =
        || Wire { receive, transmit, burst, polls: 0, end: turns * burst.len(), stop: StopFlag::new() };

    let mut warm = wire();
    let stop = warm.stop.clone();
    forward(&mut lanes, &mut bursts, &mut cache, &stop, &mut (), || warm.step());
    let before = (counters.0.read(), counters.1.read());

    let mut hot = wire();
    let stop = hot.stop.clone();
    counted_loop(|| {
        forward(&mut lanes, &mut bursts, &mut cache, &stop, &mut (), || device_half(&mut hot));
    });

    let [Lane { rx, tx, .. }] = lanes;
    let after = (counters.0.read(), counters.1.read());
    let (received, sent) = (after.0.packets - before.0.packets, after.1.packets - before.1.packets);
    assert_eq!((received, sent), (packets, packets), "packets got lost");
    let (driver, path, addresses) = names;
    println!(
        "{}",
        json!({
            "driver": driver, "path": path, "burst": name(burst), "addresses": addresses,
            "count": COUNT,
            "rx_doorbells": after.0.doorbells - before.0.doorbells,
            "tx_doorbells": after.1.doorbells - before.1.doorbells,
        })
    );
    nic.stop_pair(rx, tx, &mut cache)
}

fn main() -> Result<()> {
    for (physical, addresses) in [(false, "iommu"), (true, "physical")] {
        let bursts = || BURSTS.into_iter().filter(move |burst| !physical || matches!(burst, [1 | 32]));
        for (id, path) in [(ID_82540EM, "82540EM"), (ID_82574L, "82574L")] {
            for burst in bursts() {
                let memory = memory(physical)?;
                let (function, device) = FakeE1000::new(ADDRESS, id, MAC);
                device.attach(memory.device_view()?);
                let mut port = e1000::Device::probe(function)?;
                let (receive, transmit) =
                    (|frame: &[u8]| device.receive(frame), || drop(device.transmitted()));
                whole_case(("e1000", path, addresses), &mut port, &memory, burst, &receive, &transmit)?;
            }
        }
        for burst in bursts() {
            let memory = memory(physical)?;
            let (function, device) = FakeIgb::new(ADDRESS, ID_82576, MAC);
            device.attach(memory.device_view()?);
            let mut port = igb::Device::probe(function)?;
            let (receive, transmit) = (|frame: &[u8]| device.receive(frame), || drop(device.transmitted()));
            whole_case(("igb", "82576", addresses), &mut port, &memory, burst, &receive, &transmit)?;
        }
        let paths = [
            (true, false, "split mergeable"),
            (false, false, "split non-mergeable"),
            (true, true, "split mergeable in-order"),
        ];
        for (mrg_rxbuf, in_order, path) in paths {
            for burst in bursts() {
                let memory = memory(physical)?;
                let mut behaviour = Behaviour::default();
                behaviour.features |= feature::IN_ORDER;
                let device = VirtioNet::new(behaviour);
                device.attach(memory.device_view()?);
                let mut port =
                    virtio::Device::probe_with(device.function(), virtio::Options { mrg_rxbuf, in_order })?;
                let (receive, transmit) =
                    (|frame: &[u8]| device.receive(frame), || drop(device.transmitted()));
                whole_case(("virtio-net", path, addresses), &mut port, &memory, burst, &receive, &transmit)?;
            }
        }
    }
    Ok(())
}
