//! vhost-user transport: the device is another process, which reads and writes our packet memory. Titles in
//! quotes are sections of QEMU's "Vhost-user Protocol" (docs/interop/vhost-user.rst). Vireo is the front-end
//! and the peer is the back-end.

mod socket;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Error as PeerError, Frontend};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vireo_bus_pci::Function;
use vireo_eal::dma::{DmaMemory, Segment};
use vireo_eal::event::Event;
use vireo_eal::handover::{Fds, encode};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use super::features::Features;
use super::split::{Kick, NOT_A_SIZE, Virtqueue, is_size, negotiate_size};
use super::transport::{DEVICE_TIMEOUT, KEPT, Transport};
use super::{Device, Options, RINGS_PER_PAIR, pair_of_rx, pairs};
use crate::driver::{Args, Facts, Vdev, cannot_hand_over, flag, socket_path};
use crate::handover::needs_reset;
use crate::port::{MacAddr, PortConfig};

/// Time limit for all of a peer's answers to a start or a stop together. A queue pair takes about 18 answers,
/// from a process that may have to wait for its core.
const PEER_TIMEOUT: Duration = DEVICE_TIMEOUT.saturating_mul(3);
use socket::Listening;

/// Reason why a peer that was late gets no further request.
const SILENT: &str = "the peer left a request unanswered, so its use of our memory is unknown";

/// Maximum number of regions in a table to which regions can be added: every back-end accepts this many
/// (QEMU, `VHOST_MEMORY_BASELINE_NREGIONS`).
const IN_TABLE: usize = 8;
/// Number of descriptors of a ring, as in DPDK's virtio-user.
const QUEUE_SIZE: u16 = 256;
/// Features of a peer that are useful here. A peer filters nothing, has no link and no address, and accesses
/// our memory without an IOMMU.
const KNOWN: Features = Features::VERSION_1
    .union(Features::MRG_RXBUF)
    .union(Features::INDIRECT_DESC)
    .union(Features::EVENT_IDX)
    .union(Features::MQ)
    .union(Features::IN_ORDER);

/// Options of a vhost-user port: the keys of `--vdev net_virtio_user0`, which are DPDK's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserOptions {
    /// Path of the socket (`path`).
    pub path: PathBuf,
    /// Maximum number of queue pairs (`queues`).
    pub queues: u16,
    /// Maximum number of descriptors of a ring (`queue_size`).
    pub queue_size: u16,
    /// Station address (`mac`); random if not given.
    pub mac: Option<MacAddr>,
    /// Whether to create the socket and wait for the peer, instead of connecting to the peer's socket
    /// (`server`).
    pub server: bool,
    /// Offered features to use (`mrg_rxbuf`, `in_order`). Buffers are merged only on request: every frame
    /// fits into one buffer, and without merging neither side has to write or read headers.
    pub features: Options,
}

impl Vdev for UserOptions {
    type Device = Device;
    const NAMES: [&'static str; 2] = ["net_virtio_user", "virtio_user"];
    const KEYS: &'static [&'static str] =
        &["path", "queues", "queue_size", "mac", "server", "mrg_rxbuf", "in_order"];

    fn parse(name: &str, args: Args<'_>) -> Result<Self> {
        let mut options = Self {
            path: PathBuf::new(),
            queues: 1,
            queue_size: QUEUE_SIZE,
            mac: None,
            server: false,
            features: Options { mrg_rxbuf: false, ..Options::default() },
        };
        for (key, value) in args {
            let wrong =
                |why| Error::new(ErrorKind::Usage, format!("cannot use {key}={value} of {name}"), why);
            match key.as_str() {
                "path" => options.path = socket_path(name, key, value)?,
                "queue_size" => {
                    let size = value.parse().ok().filter(|size| is_size(*size));
                    options.queue_size = size.ok_or_else(|| wrong(NOT_A_SIZE))?;
                }
                "mac" => {
                    let mac: MacAddr = value.parse()?;
                    if !mac.is_valid_station() {
                        return Err(wrong("it is a group address or zero, which no station has")
                            .with_hint("use an address such as 02:00:00:00:00:01"));
                    }
                    options.mac = Some(mac);
                }
                "server" => options.server = flag(key, value)?,
                "mrg_rxbuf" => options.features.mrg_rxbuf = flag(key, value)?,
                "in_order" => options.features.in_order = flag(key, value)?,
                "queues" => options.queues = pairs(value).map_err(wrong)?,
                _ => return Err(wrong("there is no such key")),
            }
        }
        if options.path.as_os_str().is_empty() {
            return Err(Error::new(ErrorKind::Usage, format!("cannot use {name}"), "it has no socket")
                .with_hint(format!("give the peer's: --vdev {name},path=SOCKET")));
        }
        Ok(options)
    }

    fn listens_at(&self) -> Option<&Path> {
        self.server.then_some(&self.path)
    }

    fn describe(&self) -> String {
        format!("(virtio-net, vhost-user) at {}", self.path.display())
    }

    fn open(&self, name: &str, stop: &StopFlag) -> Result<Device> {
        Device::connect(name, self, stop)
    }

    fn attach(&self, name: &str, facts: Facts<'_>) -> Result<Device> {
        Device::attach_to(facts, self.features, |facts| Ok(Box::new(User::attach(name, self, facts)?)))
    }
}

/// A vhost-user peer.
pub(super) struct User {
    name: Arc<str>,
    options: UserOptions,
    /// Second descriptor of the connection, to check and to end it.
    socket: UnixStream,
    peer: Frontend,
    /// Whether `peer` has negotiated the connection. If not, another process has.
    knows_connection: bool,
    offered: Features,
    /// Number of queue pairs that the peer has.
    pairs: u16,
    /// Whether rings are enabled individually (`VHOST_USER_F_PROTOCOL_FEATURES`).
    protocol_features: bool,
    /// Whether memory is added region by region (`VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`).
    memory_slots: bool,
    features: Features,
    /// Events that wake the peer, by ring, for each ring that the peer was told to start.
    kicks: Vec<Event>,
    /// Events that the peer signals for RX queues with an interrupt, by pair.
    calls: Vec<Event>,
    /// Deadline for all answers to a start or a stop: a slow peer holds up every port.
    deadline: Instant,
    /// Whether the peer left a request without an answer. What it does with our memory is then unknown.
    silent: bool,
    /// Socket for the next peer to connect to, while there is none.
    listening: Option<Listening>,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.name, self.options.path.display())
    }
}

impl User {
    /// Connects to the peer of port `name` and queries its features.
    ///
    /// # Errors
    /// When there is no peer, or it does not answer, or lacks what the driver needs.
    pub(super) fn new(name: &str, options: &UserOptions, stop: &StopFlag) -> Result<Self> {
        let name: Arc<str> = name.into();
        let socket = match options.server {
            true => socket::accept(&name, &options.path, stop)?,
            false => socket::connect(&name, &options.path)?,
        };
        let second = socket.try_clone().map_err(|error| Error::io(format!("cannot use {name}"), &error))?;
        let mut user = Self {
            name,
            options: options.clone(),
            socket: second,
            peer: Frontend::from_stream(socket, RINGS_PER_PAIR * u64::from(options.queues)),
            knows_connection: true,
            offered: Features::empty(),
            pairs: 1,
            protocol_features: false,
            memory_slots: false,
            features: Features::empty(),
            kicks: Vec::new(),
            calls: Vec::new(),
            deadline: Instant::now() + PEER_TIMEOUT,
            silent: false,
            listening: None,
        };
        user.introduce()?;
        Ok(user)
    }

    /// Attaches to the connection of another process, which has made the record in `facts`. Sends nothing.
    ///
    /// # Errors
    /// `Protocol` when the record does not fit; `Os` when the process has too many open files.
    pub(super) fn attach(name: &str, options: &UserOptions, facts: Facts<'_>) -> Result<Self> {
        let record: UserRecord = facts.decode()?;
        let socket = UnixStream::from(facts.fds.get(record.socket)?);
        let second = socket.try_clone().map_err(|error| Error::io(format!("cannot use {name}"), &error))?;
        let event = |number: &u32| facts.fds.get(*number).map(Event::from_fd);
        Ok(Self {
            name: name.into(),
            options: options.clone(),
            socket: second,
            peer: Frontend::from_stream(socket, RINGS_PER_PAIR * u64::from(record.pairs)),
            knows_connection: false,
            offered: Features::from_bits_truncate(record.offered),
            pairs: record.pairs,
            protocol_features: record.protocol_features,
            memory_slots: record.memory_slots,
            features: Features::empty(),
            kicks: record.kicks.iter().map(event).collect::<Result<_>>()?,
            calls: record.calls.iter().map(event).collect::<Result<_>>()?,
            deadline: Instant::now() + PEER_TIMEOUT,
            silent: false,
            listening: None,
        })
    }

    /// Repeats the negotiation of a connection that another process has made, because the front-end of the `vhost` crate
    /// accepts only what it has seen itself. The peer gets the same answers.
    fn learn_connection(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.knows_connection, true) {
            self.agree_and_ask_for_replies()?;
        }
        Ok(())
    }

    /// Negotiates features, and asks for replies to requests if the peer can send them.
    fn agree_and_ask_for_replies(&mut self) -> Result<VhostUserProtocolFeatures> {
        let used = self.agree()?;
        if used.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.peer.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(used)
    }

    /// Replaces a connection that has ended, if the peer is back.
    fn reconnect(&mut self) -> Result<()> {
        let (name, path) = (Arc::clone(&self.name), self.options.path.clone());
        let socket = match self.options.server {
            false => socket::connect(&name, &path)?,
            true => {
                let listening = match self.listening.take() {
                    Some(listening) => listening,
                    None => Listening::at(&name, &path)?,
                };
                match listening.accept()? {
                    Some(socket) => socket,
                    None => {
                        self.listening = Some(listening);
                        return Err(self.error(ErrorKind::Unavailable, "no peer has connected"));
                    }
                }
            }
        };
        self.socket =
            socket.try_clone().map_err(|error| Error::io(format!("cannot use {}", self.name), &error))?;
        self.peer = Frontend::from_stream(socket, RINGS_PER_PAIR * u64::from(self.options.queues));
        (self.silent, self.knows_connection) = (false, true);
        self.introduce()
    }

    /// Sends the first requests of a connection ("Communication", "Feature negotiation").
    fn introduce(&mut self) -> Result<()> {
        self.pairs = 1;
        self.ask("SET_OWNER", |peer| peer.set_owner())?;
        let used = self.agree_and_ask_for_replies()?;
        if used.contains(VhostUserProtocolFeatures::MQ) && self.options.queues > 1 {
            let pairs = self.ask("GET_QUEUE_NUM", |peer| peer.get_queue_num())?;
            self.pairs = pairs.clamp(1, self.options.queues.into()) as u16;
            // The peer reports pairs, but the `vhost` crate takes their number for that of rings. A new
            // front-end discards it.
            let again = self.socket.try_clone();
            let again = again.map_err(|error| Error::io(format!("cannot use {}", self.name), &error))?;
            self.peer = Frontend::from_stream(again, RINGS_PER_PAIR * u64::from(self.pairs));
            self.agree_and_ask_for_replies()?;
        }
        Ok(())
    }

    /// Reads the offered features and negotiates protocol features.
    fn agree(&mut self) -> Result<VhostUserProtocolFeatures> {
        let offered = self.ask("GET_FEATURES", |peer| peer.get_features())?;
        self.offered = Features::from_bits_truncate(offered) & KNOWN;
        self.protocol_features = offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        self.memory_slots = false;
        if !self.protocol_features {
            return Ok(VhostUserProtocolFeatures::empty());
        }
        let offered = self.ask("GET_PROTOCOL_FEATURES", |peer| peer.get_protocol_features())?;
        let used = offered
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        self.memory_slots = used.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        self.ask("SET_PROTOCOL_FEATURES", |peer| peer.set_protocol_features(used))?;
        Ok(used)
    }

    fn error(&self, kind: ErrorKind, why: impl Into<String>) -> Error {
        Error::new(kind, format!("cannot use {} at {}", self.name, self.options.path.display()), why)
    }

    /// Sends a request and waits for the answer until the deadline: the `vhost` crate would wait forever,
    /// even with a timeout on the socket. A peer that was late gets no further request, and the driver only
    /// checks whether the peer has closed the connection.
    fn ask<T>(&mut self, request: &str, ask: impl FnOnce(&mut Frontend) -> vhost::Result<T>) -> Result<T> {
        if self.silent {
            return Err(self.error(ErrorKind::Protocol, SILENT));
        }
        let (done, answered) = channel::<()>();
        let (peer, socket) = (&mut self.peer, &self.socket);
        let rest = self.deadline.saturating_duration_since(Instant::now());
        let asked = std::thread::scope(|scope| {
            let watchdog = Builder::new().name("vireo-watchdog".into()).spawn_scoped(scope, move || {
                let late = answered.recv_timeout(rest) == Err(RecvTimeoutError::Timeout);
                if late {
                    // Ends the wait. A shutdown of both directions would hide that the peer closes its side.
                    // Fails only when the connection has already ended.
                    let _ = socket.shutdown(std::net::Shutdown::Read);
                }
                late
            })?;
            let answer = ask(peer);
            drop(done);
            Ok((answer, watchdog.join().unwrap_or(true)))
        });
        let (answer, late) =
            asked.map_err(|error| Error::io(format!("cannot send {request} to {}", self.name), &error))?;
        self.silent |= late;
        answer.map_err(|error| {
            let why = match error {
                _ if late => format!("the peer did not answer all requests up to {request} within 3 s"),
                _ if self.is_closed() => format!("the peer closed the connection during {request}"),
                vhost::Error::VhostUserProtocol(PeerError::BackendInternalError) => {
                    format!("the peer refuses {request}")
                }
                error => format!("{request}: {error}"),
            };
            self.error(ErrorKind::Protocol, why).with_hint("see the peer's messages, and restart both")
        })
    }

    /// Stops the rings with `GET_VRING_BASE`, which a peer answers when it has stopped a ring ("Ring
    /// states"). The end of the connection stops them too: a killed process loses its memory before its
    /// files.
    fn stop_rings(&mut self) -> Result<()> {
        for ring in 0..self.kicks.len() {
            let stopped = self.ask("GET_VRING_BASE", |peer| peer.get_vring_base(ring));
            if self.is_closed() {
                break;
            }
            stopped?;
        }
        // Not earlier: a failed request is repeated.
        self.kicks.clear();
        Ok(())
    }

    /// Whether the peer has ended the connection: every process that had the peer's side has closed it.
    fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLHUP)];
        poll(&mut fds, PollTimeout::ZERO).is_err() || fds[0].any().unwrap_or(true)
    }

    /// Returns the event that wakes the peer for ring `index`. The peer shares its eventfd and can make it blocking, which
    /// halts the lcore that rings when the peer has filled the count: no write to an eventfd is safe from that.
    fn event(&self, index: u16) -> Result<&Event> {
        self.kicks.get(usize::from(index)).ok_or_else(|| {
            self.error(ErrorKind::Usage, format!("the peer was not told of virtqueue {index}"))
        })
    }

    /// Sends the table of all `segments`, which replaces the peer's table. Segments that cannot be shared are
    /// left out.
    fn set_mem_table(&mut self, segments: &[Arc<Segment>]) -> Result<()> {
        let mut ranges = Vec::with_capacity(segments.len());
        for segment in segments {
            match self.range(segment) {
                Ok(range) => ranges.push(range),
                Err(error) => {
                    tracing::warn!("{error}; the peer cannot reach {} bytes", segment.region().len())
                }
            }
        }
        let rest = ranges.split_off(ranges.len().min(if self.memory_slots { IN_TABLE } else { usize::MAX }));
        self.ask("SET_MEM_TABLE", |peer| peer.set_mem_table(&ranges))?;
        rest.iter().try_for_each(|range| self.ask("ADD_MEM_REG", |peer| peer.add_mem_region(range)).map(drop))
    }

    /// Waits until the peer has read all messages so far: it answers them in order.
    fn settle(&mut self) -> Result<()> {
        self.ask("GET_FEATURES", |peer| peer.get_features()).map(drop)
    }

    /// Describes a segment as one range, whose device addresses are also the user addresses in messages.
    fn range(&self, memory: &Segment) -> Result<VhostUserMemoryRegionInfo> {
        let refuse = |why: &str, hint: &str| Err(self.error(ErrorKind::Usage, why).with_hint(hint));
        let Some(iova) = memory.linear_iova() else {
            return refuse(
                "a port without an IOMMU makes all ports use physical addresses, which the peer cannot map",
                "use the no-IOMMU ports in another process",
            );
        };
        let Some(fd) = memory.region().fd() else {
            return refuse(
                "anonymous memory cannot be shared with the peer",
                "add --no-huge, or leave --in-memory out",
            );
        };
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: iova,
            memory_size: memory.region().len() as u64,
            userspace_addr: iova,
            mmap_offset: 0,
            mmap_handle: fd.as_raw_fd(),
        })
    }
}

/// A connection to a peer. Descriptors are numbers.
#[derive(Serialize, Deserialize, Schema)]
struct UserRecord {
    socket: u32,
    offered: u64,
    pairs: u16,
    protocol_features: bool,
    memory_slots: bool,
    kicks: Vec<u32>,
    calls: Vec<u32>,
}

impl Transport for User {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn function(&self) -> Option<&dyn Function> {
        None
    }

    fn record<'a>(&'a self, fds: &mut Fds<'a>) -> Result<Vec<u8>> {
        if self.silent {
            return Err(cannot_hand_over(SILENT));
        }
        encode(&UserRecord {
            socket: fds.add(self.socket.as_fd()),
            offered: self.offered.bits(),
            pairs: self.pairs,
            protocol_features: self.protocol_features,
            memory_slots: self.memory_slots,
            kicks: self.kicks.iter().map(|kick| fds.add(kick.as_fd())).collect(),
            calls: self.calls.iter().map(|call| fds.add(call.as_fd())).collect(),
        })
    }

    fn resume(&mut self, features: Features) -> Vec<Event> {
        self.features = features;
        self.calls.clone()
    }

    /// Sends nothing to a connected peer: its offer holds as long as the connection, and the chosen features
    /// are sent with the memory.
    fn negotiate(&mut self, options: Options, config: &PortConfig) -> Result<Features> {
        self.deadline = Instant::now() + PEER_TIMEOUT;
        // The last stop is complete, so a silent peer was told of no ring or has ended.
        if self.silent || self.is_closed() {
            self.reconnect()?;
        }
        self.learn_connection()?;
        if !self.offered.contains(Features::VERSION_1) {
            let why = "the peer does not offer VIRTIO_F_VERSION_1";
            return Err(self
                .error(ErrorKind::Unavailable, why)
                .with_hint("start one that does, such as dpdk-testpmd --vdev net_vhost0,iface=SOCKET"));
        }
        self.features = self.offered.wanted(options, config);
        Ok(self.features)
    }

    fn pairs(&self) -> Result<u16> {
        Ok(if self.features.contains(Features::MQ) { self.pairs } else { 1 })
    }

    fn mac(&self) -> Result<Option<MacAddr>> {
        Ok(self.options.mac)
    }

    fn longest_frame(&self) -> Option<usize> {
        None
    }

    fn link_up(&self) -> bool {
        !self.silent && self.check_alive().is_ok()
    }

    fn owes_completions(&self) -> bool {
        false
    }

    /// Succeeds because a peer filters nothing.
    fn receive_all(&self) -> Result<()> {
        Ok(())
    }

    fn queue_size(&self, _index: u16, asked: u16) -> Result<u16> {
        negotiate_size(asked, self.options.queue_size)
    }

    fn share(&mut self, memory: &DmaMemory) -> Result<()> {
        let segments = memory.memory_map().segments();
        // Checked before the first message: the peer stays unchanged if the memory of its rings cannot be
        // shared.
        self.range(memory.segment())?;
        let mut features = self.features.bits();
        if self.protocol_features {
            features |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        }
        self.ask("SET_FEATURES", |peer| peer.set_features(features))?;
        self.set_mem_table(&segments)
    }

    fn share_more(&mut self, memory: &DmaMemory) -> Result<()> {
        self.deadline = Instant::now() + PEER_TIMEOUT;
        self.learn_connection()?;
        let segments = memory.memory_map().segments();
        let range = self.range(memory.segment())?;
        if !self.memory_slots {
            self.set_mem_table(&segments)?;
            return self.settle();
        }
        let slots = self.ask("GET_MAX_MEM_SLOTS", |peer| peer.get_max_mem_slots())?;
        if segments.len() as u64 > slots {
            let why =
                format!("the peer maps at most {slots} regions of memory, but {} are needed", segments.len());
            return Err(self
                .error(ErrorKind::Unavailable, why)
                .with_hint("add memory in fewer, larger regions"));
        }
        self.ask("ADD_MEM_REG", |peer| peer.add_mem_region(&range))?;
        // The rings run, and no packet in that memory may reach the peer before the message.
        self.settle()
    }

    fn set_interrupts(&mut self, count: u16, _changes: bool) -> Result<Vec<Event>> {
        self.calls = (0..count).map(|_| Event::new()).collect::<Result<_>>()?;
        Ok(self.calls.clone())
    }

    fn enable_queue(&mut self, index: u16, queue: &Virtqueue) -> Result<()> {
        let ring = usize::from(index);
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = queue.addresses();
        let place = VringConfigData {
            queue_max_size: queue.size(),
            queue_size: queue.size(),
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            ..VringConfigData::default()
        };
        let call = match pair_of_rx(index).and_then(|pair| self.calls.get(usize::from(pair))) {
            Some(call) => call.to_vmm()?,
            // Nothing reads the peer's calls on a ring that requests no interrupt. DPDK does not start without a
            // call eventfd.
            None => Event::new()?.to_vmm()?,
        };
        let kick = Event::new()?;
        let to_peer = kick.to_vmm()?;
        self.ask("SET_VRING_NUM", |peer| peer.set_vring_num(ring, queue.size()))?;
        self.ask("SET_VRING_BASE", |peer| peer.set_vring_base(ring, 0))?;
        self.ask("SET_VRING_ADDR", |peer| peer.set_vring_addr(ring, &place))?;
        self.ask("SET_VRING_CALL", |peer| peer.set_vring_call(ring, &call))?;
        let told = self.ask("SET_VRING_KICK", |peer| peer.set_vring_kick(ring, &to_peer));
        self.kicks.push(kick);
        told
    }

    /// Fails: processes do not share this port, whose connection belongs to one of them.
    fn reset_queue(&mut self, _index: u16) -> Result<()> {
        Err(needs_reset())
    }

    fn kick(&self, index: u16) -> Result<Kick> {
        self.event(index).cloned().map(Kick::Event)
    }

    fn notify(&self, index: u16) -> Result<()> {
        self.event(index).map(Event::signal)
    }

    fn go_live(&mut self) -> Result<()> {
        // Without protocol features, a ring is enabled from its first kick on.
        let rings = if self.protocol_features { self.kicks.len() } else { 0 };
        (0..rings).try_for_each(|ring| self.ask("SET_VRING_ENABLE", |peer| peer.set_vring_enable(ring, true)))
    }

    fn stop(&mut self) -> Result<()> {
        self.deadline = Instant::now() + PEER_TIMEOUT;
        self.stop_rings().map_err(|error| match self.silent {
            true => {
                error.with_hint("end the peer: the memory that it mapped is kept until its connection closes")
            }
            false => error.with_hint(KEPT),
        })
    }

    fn check_alive(&self) -> Result<()> {
        match self.is_closed() {
            true => Err(self.error(ErrorKind::Unavailable, "the peer closed the connection")),
            false => Ok(()),
        }
    }
}
