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
mod waker;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::dma::{DmaMemory, MAX_FRAME, PoolCache};
use vireo_eal::handover::{Fds, encode};
use vireo_eal::lcore::StopFlag;
use vireo_eal::sync::atomic::{AtomicBool, Ordering};
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::PortCounters;
use crate::driver::{Args, Facts, Vdev, flag, socket_path};
use crate::handover::{HandOver, Resume, contradiction};
use crate::port::{Capabilities, Link, MacAddr, Nic, PortConfig, Queues};
use crate::virtio::{self, random_mac};
pub use queues::{RxQueue, TxQueue};
use ring::Report;
use server::Server;
use shared::{RingState, Shared};
use waker::Waker;

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

    fn attach(&self, name: &str, facts: Facts<'_>) -> Result<Device> {
        let Fixed { mac, is_up, listener } = facts.decode()?;
        if listener.is_some() == self.client {
            return Err(contradiction("only one of both programs uses client=1"));
        }
        let listener = listener.map(|number| facts.fds.get(number)).transpose()?;
        let attach = |name: &_, rings: &_| Server::attach(&self.path, listener, name, rings);
        Ok(Device { attached: Some(is_up), ..Device::with(name, self, mac, attach)? })
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
    /// Whether the link is up of the port that runs in another process, until this one continues it.
    attached: Option<bool>,
    server: Server,
}

impl Device {
    /// Listens for a frontend, or starts to connect to one (`client`). `name` is the name of the port in
    /// messages.
    ///
    /// # Errors
    /// `Busy` when another process listens there, otherwise when the socket cannot be created.
    pub fn open(name: &str, options: &Options) -> Result<Self> {
        let mac = options.mac.unwrap_or_else(random_mac);
        Self::with(name, options, mac, |name, rings| match options.client {
            true => Server::connect(&options.path, name, rings),
            false => Server::listen(&options.path, name, rings),
        })
    }

    fn with(
        name: &str,
        options: &Options,
        mac: MacAddr,
        serve: impl FnOnce(&Arc<str>, &[Arc<Shared>]) -> Result<Server>,
    ) -> Result<Self> {
        let name: Arc<str> = name.into();
        let counters = PortCounters::default();
        // Each pair has `RECEIVE`, which the port sends to, and `TRANSMIT`, named from the frontend's view.
        let states: Vec<RingState> = (0..options.queues.into())
            .flat_map(|number| [counters.tx(number), counters.rx(number)])
            .map(|counters| RingState::new(Report::new(&name, counters)))
            .collect();
        let link = states.iter().take(RINGS_PER_PAIR).map(RingState::is_up).collect();
        let rings: Vec<_> = states.into_iter().map(|state| Arc::new(Shared::new(state))).collect();
        let server = serve(&name, &rings)?;
        Ok(Self { name, mac, rings, link, counters, started: false, attached: None, server })
    }

    /// Returns the ring [`RECEIVE`] or [`TRANSMIT`] of each pair.
    fn rings_of(&self, kind: usize) -> impl Iterator<Item = &Arc<Shared>> {
        self.rings.iter().skip(kind).step_by(RINGS_PER_PAIR)
    }

    /// Returns queues of all rings that `config` uses.
    fn queues(&self, config: &PortConfig) -> Result<Queues<RxQueue, TxQueue>> {
        if let Some(why) = config.unsupported_reason(&self.capabilities()) {
            let pairs = config.rx_queues.max(config.tx_queues);
            let hint = format!("give it more: --vdev {},iface=SOCKET,queues={pairs}", self.name);
            let error = self.refuse(&why);
            return Err(if pairs > self.capabilities().rx_queues { error.with_hint(hint) } else { error });
        }
        let waker = |_| config.rx_interrupts.then(Waker::new).transpose();
        let wakers = (0..config.rx_queues).map(waker).collect::<Result<Vec<_>>>()?;
        let rx = self.rings_of(TRANSMIT).zip(wakers).map(|(ring, waker)| RxQueue::new(ring, waker));
        let tx = self.rings_of(RECEIVE).take(config.tx_queues.into());
        let tx = tx.map(|ring| TxQueue::new(ring, config.is_scattered()));
        let (Some(rx), Some(tx)) = (rx.collect(), tx.collect()) else {
            return Err(self.refuse("queues of an earlier start still exist"));
        };
        Ok(Queues { rx, tx })
    }

    fn refuse(&self, why: &str) -> Error {
        Error::new(ErrorKind::Usage, format!("cannot use vhost port {}", self.name), why)
    }
}

/// What does not change while the port runs.
#[derive(Serialize, Deserialize, Schema)]
struct Fixed {
    mac: MacAddr,
    is_up: bool,
    /// Number of the descriptor, unless the frontend listens.
    listener: Option<u32>,
}

/// The connection moves, with the frontend's memory and eventfds. What its rings hold stays with the frontend, and so do
/// the positions in them.
impl HandOver for Device {
    fn facts<'a>(&'a self, fds: &mut Fds<'a>) -> Result<Vec<u8>> {
        let listener = self.server.listener().map(|fd| fds.add(fd));
        encode(&Fixed { mac: self.mac, is_up: self.link().up, listener })
    }

    fn record(&self, fds: &mut Fds<'_>) -> Result<Vec<u8>> {
        encode(&self.server.record(fds)?)
    }

    fn rx_record(&self, _rx: &RxQueue) -> Result<Vec<u8>> {
        encode(&())
    }

    fn tx_record(&self, _tx: &TxQueue) -> Result<Vec<u8>> {
        encode(&())
    }

    fn resume(&mut self, resume: Resume<'_>) -> Result<Queues<RxQueue, TxQueue>> {
        // Positions in the rings are the frontend's, so this only checks the number of queues.
        resume.rx::<()>()?;
        resume.tx::<()>()?;
        let queues = self.queues(resume.config)?;
        if let Some(connection) = resume.device()? {
            self.server.resume(&connection, &self.name, &self.rings, resume.fds)?;
        }
        (self.started, self.attached) = (true, None);
        Ok(queues)
    }

    fn keep(&mut self) {
        self.server.keep();
    }

    fn leave(&mut self) {
        self.server.leave();
    }
}

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
        if self.started {
            return Err(self.refuse("it is already started"));
        }
        let queues = self.queues(config)?;
        // Another process may have served the frontends before it ended.
        self.server.keep();
        (self.started, self.attached) = (true, None);
        Ok(queues)
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
        Capabilities {
            max_frame: MAX_FRAME,
            rx_queues: pairs,
            tx_queues: pairs,
            rx_interrupts: true,
            ..Capabilities::default()
        }
    }

    /// Reports the link as up while a frontend has started and enabled both rings of the first pair.
    fn link(&self) -> Link {
        let is_up = || self.link.iter().all(|is_up| is_up.load(Ordering::Acquire));
        let up = self.attached.unwrap_or_else(is_up);
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
