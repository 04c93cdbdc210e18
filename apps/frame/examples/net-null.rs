//! An application with its own driver. Like the DPDK driver of the same name, `net_null` receives frames that
//! no one sent, and discards frames that are sent. None of Vireo's crates has to change for it.
//!
//! ```console
//! cargo run --release -p vireo-frame --example net-null -- --no-huge --no-pci -l 0 --vdev net_null0,size=64
//! ```
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use vireo_frame::drivers::counters::{PortCounters, QueueCounters};
use vireo_frame::drivers::driver::{Args, Vdev};
use vireo_frame::drivers::port::{Capabilities, Link, MacAddr, Nic, PortConfig, Queues, RxBurst, TxBurst};
use vireo_frame::drivers::ports::OpenPort;
use vireo_frame::drivers::table::Drivers;
use vireo_frame::eal::dma::{Burst, DATA_ROOM, DmaMemory, PoolCache};
use vireo_frame::eal::lcore::StopFlag;
use vireo_frame::eal::{Error, ErrorKind, Result, program};
use vireo_frame::{App, Config};

/// Packets that the first port receives before the application ends.
const PACKETS: u64 = 32_000;

/// Arguments after `--`: none
#[derive(Parser)]
#[command(name = "net-null", disable_help_flag = true)]
struct Nothing;

/// Arguments of `--vdev net_null0`.
#[derive(Clone, Copy, Debug)]
struct Options {
    /// Frame size in bytes (`size`).
    size: usize,
}

impl Vdev for Options {
    type Device = Null;
    const NAMES: [&'static str; 2] = ["net_null", "eth_null"];
    const KEYS: &'static [&'static str] = &["size"];

    fn parse(name: &str, args: Args<'_>) -> Result<Self> {
        let mut options = Self { size: 64 };
        for (_, value) in args {
            let size = value.parse().ok().filter(|size| (1..=DATA_ROOM).contains(size));
            options.size = size.ok_or_else(|| {
                let why = format!("it is not a number from 1 to {DATA_ROOM}");
                Error::new(ErrorKind::Usage, format!("cannot use size={value} of {name}"), why)
            })?;
        }
        Ok(options)
    }

    fn listens_at(&self) -> Option<&Path> {
        None
    }

    fn describe(&self) -> String {
        format!("(null) with frames of {} bytes", self.size)
    }

    fn open(&self, _name: &str, _stop: &StopFlag) -> Result<Null> {
        Ok(Null { size: self.size, counters: PortCounters::default() })
    }
}

/// A null device.
#[derive(Debug)]
struct Null {
    size: usize,
    counters: PortCounters,
}

#[derive(Debug)]
struct NullRx {
    size: usize,
    counters: Arc<QueueCounters>,
}

#[derive(Debug)]
struct NullTx(Arc<QueueCounters>);

impl RxBurst for NullRx {
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        let before = burst.len();
        while !burst.is_full() {
            let Some(buffer) = cache.allocate() else {
                self.counters.no_buffer.add(1);
                break;
            };
            burst.push(buffer.with_len(self.size));
        }
        let received = burst.len() - before;
        self.counters.packets.add(received as u64);
        self.counters.bytes.add((received * self.size) as u64);
    }

    fn counters(&self) -> &QueueCounters {
        &self.counters
    }
}

impl TxBurst for NullTx {
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let (sent, mut bytes) = (burst.len(), 0);
        for packet in burst.drain(..) {
            bytes += packet.len();
            cache.free(packet);
        }
        self.0.packets.add(sent as u64);
        self.0.bytes.add(bytes as u64);
        sent
    }

    fn counters(&self) -> &QueueCounters {
        &self.0
    }
}

impl Nic for Null {
    type Rx = NullRx;
    type Tx = NullTx;

    fn start(
        &mut self,
        config: &PortConfig,
        _memory: &Arc<DmaMemory>,
        _cache: &mut PoolCache,
    ) -> Result<Queues<NullRx, NullTx>> {
        let (size, counters) = (self.size, &self.counters);
        Ok(Queues {
            rx: (0..config.rx_queues.into())
                .map(|number| NullRx { size, counters: counters.rx(number) })
                .collect(),
            tx: (0..config.tx_queues.into()).map(|number| NullTx(counters.tx(number))).collect(),
        })
    }

    fn stop(&mut self, _queues: Queues<NullRx, NullTx>, _cache: &mut PoolCache) -> Result<()> {
        Ok(())
    }

    fn mac(&self) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, 0])
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn link(&self) -> Link {
        Link { up: true, speed: None, full_duplex: true, autoneg: false }
    }

    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    fn set_promiscuous(&mut self, _on: bool) -> Result<()> {
        Ok(())
    }

    fn counters(&self) -> &PortCounters {
        &self.counters
    }
}

fn run(app: &App, _: Nothing) -> Result<()> {
    let open = app.open_ports()?;
    let described: Vec<String> = open.iter().map(OpenPort::describe).collect();
    let back: Vec<(usize, usize)> = (0..open.len()).map(|port| (port, port)).collect();
    let mut ports = app.reserve(open, app.assign_lcores(&back, 1)?, &Config::default())?;
    ports.start_all(false)?;
    app.confine()?;
    let stop_when_done = |received| {
        if received >= PACKETS {
            app.stop.set()
        }
    };
    ports.forward(app, |_| (), &|_| (), |counts| stop_when_done(counts.of(0).received))?;
    ports.finish(|port, summary| {
        let (received, sent) = (summary.stats.rx_sum().packets, summary.stats.tx_sum().packets);
        program::print(&format!("{}: received {received} sent {sent}\n", described[port]))
    })
}

fn main() -> ExitCode {
    vireo_frame::main(Drivers::default().with_vdev::<Options>(), run)
}
