//! net_vhost: the device side of virtio-net over vhost-user (virtio 1.2, 5.1; back-end of the
//! [vhost-user protocol](https://qemu-project.gitlab.io/qemu/interop/vhost-user.html)). The port listens on a
//! socket, to which a QEMU guest, DPDK's virtio-user or another Vireo connects. With `client=1` it connects
//! to their socket instead, and connects again whenever the connection ends.
//!
//! A thread of the port communicates with the frontend. It maps the frontend's memory and places the rings
//! where the lcores find them. The lcores copy between the frontend's buffers and their own. A frontend that
//! connects, disconnects or misbehaves stops only its own rings, and no call waits for it. The exception is
//! the call eventfd, which the frontend shares with Vireo: a frontend that makes it blocking again after
//! Vireo made it nonblocking, and fills it, halts the lcore that wakes the frontend.

mod backend;
mod queues;
mod ring;
mod server;
mod shared;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vireo_eal::dma::{DmaMemory, MAX_FRAME, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_eal::sync::atomic::{AtomicBool, Ordering};
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::PortCounters;
use crate::driver::{Args, Vdev, flag, socket_path};
use crate::handover::HandOver;
use crate::port::{Capabilities, Link, MacAddr, Nic, PortConfig, Queues};
use crate::virtio::{self, random_mac};
pub use queues::{RxQueue, TxQueue};
use ring::Report;
use server::Server;
use shared::{RingState, Shared};

/// Rings of a pair (virtio 1.2, 5.1.2), named from the frontend's view.
const RINGS_PER_PAIR: usize = 2;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// User options of a port: the keys of `--vdev net_vhost0`, which are DPDK's, and `mac`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Path of the socket (`iface`).
    pub path: PathBuf,
    /// Station address (`mac`); random if not given.
    pub mac: Option<MacAddr>,
    /// Number of queue pairs that a frontend may use (`queues`).
    pub queues: u16,
    /// Whether to connect to the frontend's socket, and again when the connection ends, instead of creating a
    /// socket (`client`).
    pub client: bool,
}

impl Vdev for Options {
    type Device = Device;
    const NAMES: [&'static str; 2] = ["net_vhost", "eth_vhost"];
    const KEYS: &'static [&'static str] = &["iface", "queues", "client", "mac"];

    fn parse(name: &str, args: Args<'_>) -> Result<Self> {
        let mut options = Self { path: PathBuf::new(), mac: None, queues: 1, client: false };
        for (key, value) in args {
            let wrong =
                |why| Error::new(ErrorKind::Usage, format!("cannot use {key}={value} of {name}"), why);
            match key.as_str() {
                "iface" => options.path = socket_path(name, key, value)?,
                "mac" => options.mac = Some(value.parse()?),
                "client" => options.client = flag(key, value)?,
                "queues" => options.queues = virtio::pairs(value).map_err(wrong)?,
                _ => return Err(wrong("there is no such key")),
            }
        }
        if options.path.as_os_str().is_empty() {
            return Err(Error::new(ErrorKind::Usage, format!("cannot use {name}"), "it has no socket")
                .with_hint(format!("give its path: --vdev {name},iface=SOCKET")));
        }
        Ok(options)
    }

    fn listens_at(&self) -> Option<&Path> {
        (!self.client).then_some(&self.path)
    }

    fn describe(&self) -> String {
        format!("(vhost-user back-end) at {}", self.path.display())
    }

    fn open(&self, name: &str, _stop: &StopFlag) -> Result<Device> {
        Device::open(name, self)
    }
}

/// A port whose other end is the virtio-net driver of a frontend.
#[derive(Debug)]
pub struct Device {
    name: Arc<str>,
    mac: MacAddr,
    rings: Vec<Arc<Shared>>,
    /// Whether lcores may use the rings of the first pair.
    link: Vec<Arc<AtomicBool>>,
    counters: PortCounters,
    started: bool,
    _server: Server,
}

impl Device {
    /// Listens for a frontend, or starts to connect to one (`client`). `name` is the name of the port in
    /// messages.
    ///
    /// # Errors
    /// `Busy` when another process listens there, otherwise when the socket cannot be created.
    pub fn open(name: &str, options: &Options) -> Result<Self> {
        let name: Arc<str> = name.into();
        let counters = PortCounters::default();
        // Each pair has `RECEIVE`, which the port sends to, and `TRANSMIT`, named from the frontend's view.
        let states: Vec<RingState> = (0..options.queues.into())
            .flat_map(|number| [counters.tx(number), counters.rx(number)])
            .map(|counters| RingState::new(Report::new(&name, counters)))
            .collect();
        let link = states.iter().take(RINGS_PER_PAIR).map(RingState::is_up).collect();
        let rings: Vec<_> = states.into_iter().map(|state| Arc::new(Shared::new(state))).collect();
        let server = match options.client {
            true => Server::connect(&options.path, &name, &rings)?,
            false => Server::listen(&options.path, &name, &rings)?,
        };
        let mac = options.mac.unwrap_or_else(random_mac);
        Ok(Self { name, mac, rings, link, counters, started: false, _server: server })
    }

    /// Returns the ring [`RECEIVE`] or [`TRANSMIT`] of each pair.
    fn rings_of(&self, kind: usize) -> impl Iterator<Item = &Arc<Shared>> {
        self.rings.iter().skip(kind).step_by(RINGS_PER_PAIR)
    }

    fn refuse(&self, why: &str) -> Error {
        Error::new(ErrorKind::Usage, format!("cannot use vhost port {}", self.name), why)
    }
}

/// A vhost port cannot be handed over: its frontend would have to start its rings again.
impl HandOver for Device {}

impl Nic for Device {
    type Rx = RxQueue;
    type Tx = TxQueue;

    /// Does not wait for a frontend, and needs no DMA memory: rings and buffers are the frontend's.
    fn start(
        &mut self,
        config: &PortConfig,
        _memory: &Arc<DmaMemory>,
        _cache: &mut PoolCache,
    ) -> Result<Queues<RxQueue, TxQueue>> {
        if let Some(why) = config.unsupported_reason(&self.capabilities()) {
            let pairs = config.rx_queues.max(config.tx_queues);
            let hint = format!("give it more: --vdev {},iface=SOCKET,queues={pairs}", self.name);
            let error = self.refuse(&why);
            return Err(if pairs > self.capabilities().rx_queues { error.with_hint(hint) } else { error });
        }
        if self.started {
            return Err(self.refuse("it is already started"));
        }
        let rx = self.rings_of(TRANSMIT).take(config.rx_queues.into());
        let tx = self.rings_of(RECEIVE).take(config.tx_queues.into());
        let tx = tx.map(|ring| TxQueue::new(ring, config.is_scattered()));
        let (Some(rx), Some(tx)) = (rx.map(RxQueue::new).collect(), tx.collect()) else {
            return Err(self.refuse("queues of an earlier start still exist"));
        };
        self.started = true;
        Ok(Queues { rx, tx })
    }

    /// Leaves the frontend connected; its rings wait for the next start. The rings own no buffers of the
    /// port, because packets are copied.
    fn stop(&mut self, queues: Queues<RxQueue, TxQueue>, _cache: &mut PoolCache) -> Result<()> {
        let own_rx = self.rings_of(TRANSMIT).zip(&queues.rx).all(|(ring, rx)| rx.is_of(ring));
        let own_tx = self.rings_of(RECEIVE).zip(&queues.tx).all(|(ring, tx)| tx.is_of(ring));
        if !(own_rx && own_tx) {
            return Err(self.refuse("the queues to stop belong to another port"));
        }
        self.started = false;
        Ok(())
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    /// Rings and buffers are the frontend's. The port drops short frames that it receives, and drops frames
    /// of several packets instead of sending them.
    fn capabilities(&self) -> Capabilities {
        let pairs = (self.rings.len() / RINGS_PER_PAIR) as u16;
        Capabilities { max_frame: MAX_FRAME, rx_queues: pairs, tx_queues: pairs, ..Capabilities::default() }
    }

    /// Reports the link as up while a frontend has started and enabled both rings of the first pair.
    fn link(&self) -> Link {
        let up = self.link.iter().all(|is_up| is_up.load(Ordering::Acquire));
        Link { up, speed: None, full_duplex: true, autoneg: false }
    }

    /// Always succeeds: a ring whose frontend misbehaved waits for that frontend to start it again.
    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    /// Has no effect: there is no filter, and whatever the frontend sends is received.
    fn set_promiscuous(&mut self, _on: bool) -> Result<()> {
        Ok(())
    }

    /// Never counts unread or unfinished packets: what is in a ring stays with the frontend.
    fn counters(&self) -> &PortCounters {
        &self.counters
    }
}
