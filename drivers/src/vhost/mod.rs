//! net_vhost: the device's side of virtio-net over vhost-user (virtio 1.2, 5.1; the
//! [vhost-user protocol](https://qemu-project.gitlab.io/qemu/interop/vhost-user.html), back-end). The port
//! listens at a socket, to which a QEMU guest, DPDK's virtio-user or another Vireo connects; or it connects to theirs
//! (`client=1`), again and again.
//!
//! A thread of the port talks with the frontend. It maps the frontend's memory and puts the rings where the
//! lcores find them; the lcores copy between the frontend's buffers and their own. A frontend that comes, goes, or
//! lies stops its own rings only, and no call waits for it, but for what it shares with us: one that makes its call
//! eventfd block after we have seen to that, and fills it, stops the lcore that wakes it.

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
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::PortCounters;
use crate::driver::{Args, Vdev, flag, socket_path};
use crate::port::{Capabilities, Link, MacAddr, Nic, PortConfig, Queues};
use crate::virtio::{self, random_mac};
pub use queues::{RxQueue, TxQueue};
use ring::Report;
use server::Server;
use shared::{Shared, Slot};

/// Rings of a pair (virtio 1.2, 5.1.2), named as the frontend sees them.
const RINGS_PER_PAIR: usize = 2;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// What the user may ask of a port: the keys of `--vdev net_vhost0`, which are DPDK's, and `mac`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The socket (`iface`).
    pub path: PathBuf,
    /// Station address (`mac`); without it a random one.
    pub mac: Option<MacAddr>,
    /// Pairs of rings that a frontend may use (`queues`).
    pub queues: u16,
    /// Connect to the frontend's socket, and again when that ends, instead of making one (`client`).
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
                .with_hint(format!("say where it is: --vdev {name},iface=SOCKET")));
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

/// A port whose other end is a frontend's virtio-net driver.
#[derive(Debug)]
pub struct Device {
    name: Arc<str>,
    mac: MacAddr,
    rings: Vec<Arc<Shared>>,
    counters: PortCounters,
    started: bool,
    _server: Server,
}

impl Device {
    /// Listens for a frontend, or begins to look for one (`client`). `name` is that of the port, for messages.
    ///
    /// # Errors
    /// `Busy` when somebody listens there, else when the socket cannot be made.
    pub fn open(name: &str, options: &Options) -> Result<Self> {
        let name: Arc<str> = name.into();
        let counters = PortCounters::default();
        // `RECEIVE` and `TRANSMIT` of each pair, by the frontend's names.
        let rings: Vec<Arc<Shared>> = (0..options.queues.into())
            .flat_map(|number| [counters.tx(number), counters.rx(number)])
            .map(|counters| Arc::new(Shared::new(Report::new(&name, counters))))
            .collect();
        let server = match options.client {
            true => Server::connect(&options.path, &name, &rings)?,
            false => Server::listen(&options.path, &name, &rings)?,
        };
        let mac = options.mac.unwrap_or_else(random_mac);
        Ok(Self { name, mac, rings, counters, started: false, _server: server })
    }

    /// Of each pair the ring [`RECEIVE`] or [`TRANSMIT`].
    fn rings_of(&self, kind: usize) -> impl Iterator<Item = &Arc<Shared>> {
        self.rings.iter().skip(kind).step_by(RINGS_PER_PAIR)
    }

    fn refuse(&self, why: &str) -> Error {
        Error::new(ErrorKind::Usage, format!("cannot use vhost port {}", self.name), why)
    }
}

impl Nic for Device {
    type Rx = RxQueue;
    type Tx = TxQueue;

    /// Waits for no frontend, and needs nothing of `memory`: rings and buffers are the frontend's.
    fn start(
        &mut self,
        config: &PortConfig,
        _memory: &Arc<DmaMemory>,
        _cache: &mut PoolCache,
    ) -> Result<Queues<RxQueue, TxQueue>> {
        if let Some(why) = config.unfit(&self.capabilities()) {
            let pairs = config.rx_queues.max(config.tx_queues);
            let hint = format!("give it more: --vdev {},iface=SOCKET,queues={pairs}", self.name);
            let error = self.refuse(&why);
            return Err(if pairs > self.capabilities().rx_queues { error.with_hint(hint) } else { error });
        }
        if std::mem::replace(&mut self.started, true) {
            return Err(self.refuse("it is started already"));
        }
        let rx = self.rings_of(TRANSMIT).take(config.rx_queues.into());
        let tx = self.rings_of(RECEIVE).take(config.tx_queues.into());
        let tx = tx.map(|ring| TxQueue::new(ring, config.is_scattered()));
        Ok(Queues { rx: rx.map(RxQueue::new).collect(), tx: tx.collect() })
    }

    /// The frontend stays connected; its rings wait for the next start.
    /// The rings own no buffers of ours: packets were copied.
    fn stop(&mut self, queues: Queues<RxQueue, TxQueue>, _cache: &mut PoolCache) -> Result<()> {
        let own_rx = self.rings_of(TRANSMIT).zip(&queues.rx).all(|(ring, rx)| rx.is_of(ring));
        let own_tx = self.rings_of(RECEIVE).zip(&queues.tx).all(|(ring, tx)| tx.is_of(ring));
        if !(own_rx && own_tx) {
            return Err(self.refuse("the queues to stop are of another port"));
        }
        self.started = false;
        Ok(())
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    /// Rings and buffers are the frontend's. It receives no short frames, and sends none of several packets: those are
    /// dropped.
    fn capabilities(&self) -> Capabilities {
        let pairs = (self.rings.len() / RINGS_PER_PAIR) as u16;
        Capabilities { max_frame: MAX_FRAME, rx_queues: pairs, tx_queues: pairs, ..Capabilities::default() }
    }

    /// Up while a frontend has both rings of the first pair started and enabled.
    fn link(&self) -> Link {
        let up = self
            .rings
            .iter()
            .take(RINGS_PER_PAIR)
            .all(|ring| matches!(ring.lock().slot, Slot::Running(_) | Slot::Logged(_)));
        Link { up, speed: None, full_duplex: true, autoneg: false }
    }

    /// It does: a ring whose frontend lied waits for that frontend to start it anew.
    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    /// There is no filter: whatever the frontend sends is received.
    fn set_promiscuous(&mut self, _on: bool) -> Result<()> {
        Ok(())
    }

    /// Nothing is unread or unfinished: what is in a ring stays with the frontend.
    fn counters(&self) -> &PortCounters {
        &self.counters
    }
}
