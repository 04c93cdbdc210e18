//! virtio-net (virtio 1.2): split virtqueues, with or without mergeable RX buffers and event index. The
//! device is on modern PCI (`pci`), or is another process that speaks vhost-user (`user`).

mod chains;
mod checksum;
mod ctrl;
mod features;
mod pci;
mod rx;
mod split;
#[cfg(test)]
mod tests;
mod transport;
mod tx;
mod user;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::os::fd::{AsFd, BorrowedFd};
use std::slice;
use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::dma::{DmaMemory, FreeBuffers, MAX_FRAME, MAX_SEGMENTS, PoolCache};
use vireo_eal::event::Event;
use vireo_eal::handover::{Fds, decode, encode};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::PortCounters;
use crate::driver::{Args, Facts, PciDriver, cannot_hand_over, flag};
use crate::handover::{HandOver, Resume, check_filter, contradiction};
use crate::port::{
    Capabilities, Fault, Link, MacAddr, Nic, Offloads, PortConfig, Queues, RxBurst, STANDARD_FRAME, TxBurst,
};
use chains::{Chains, TABLE_BYTES};
use ctrl::Control;
pub(crate) use features::Features;
use pci::Pci;
pub use rx::RxQueue;
pub(crate) use split::{DESC_NEXT, DESC_WRITE, need_event};
use split::{QueueRecord, Virtqueue};
use transport::Transport;
pub use tx::TxQueue;
use tx::TxRecord;
use user::User;
pub use user::UserOptions;

/// Virtqueue numbers: the pairs, the RX queue of each first, then the control queue (5.1.2).
const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;
const RINGS_PER_PAIR: u64 = 2;

/// Returns the pair of virtqueue `index`, if it is an RX queue. The control queue counts as that of a pair that does
/// not exist.
fn pair_of_rx(index: u16) -> Option<u16> {
    let rings = RINGS_PER_PAIR as u16;
    (index % rings == RX_QUEUE).then_some(index / rings)
}

/// Returns the index of the virtqueue of pair `number` that corresponds to `first` of the first pair.
fn index_of(first: u16, number: u16) -> u16 {
    first + RINGS_PER_PAIR as u16 * number
}

/// Maximum number of queue pairs to configure: as many as DPDK has lcores (`RTE_MAX_LCORE`).
const MAX_PAIRS: u16 = 128;

/// Parses the devarg `queues`.
pub(crate) fn pairs(value: &str) -> std::result::Result<u16, &'static str> {
    let pairs = value.parse().ok().filter(|pairs| (1..=MAX_PAIRS).contains(pairs));
    pairs.ok_or("it is not a number from 1 to 128")
}

/// The largest configuration, negotiated at probe to learn what the device supports.
const MAX_CONFIG: PortConfig = PortConfig::with_descriptors(1024, 1024)
    .with_pairs(MAX_PAIRS)
    .with_max_frame(MAX_FRAME)
    .with_offloads(Offloads::all());

/// Minimum number of descriptors of a ring for frames of several buffers. Half of the ring has room for the
/// longest frame, so that one is always in flight when the ring is full.
const MIN_RING_FOR_LONG_FRAMES: u16 = 2 * MAX_SEGMENTS.next_power_of_two() as u16;

/// Size in bytes of `struct virtio_net_hdr` with `num_buffers`, which precedes every packet (5.1.6).
pub(crate) const HEADER: usize = 12;

/// Hint on how to get a device that supports long frames.
const LONG_HINT: &str = "they need VIRTIO_NET_F_MRG_RXBUF, which mrg_rxbuf=1 asks for, and VIRTIO_F_INDIRECT_DESC; in QEMU: \
                         -device virtio-net-pci,mrg_rxbuf=on,indirect_desc=on, and host_mtu at least the frame's";

/// User options of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether to use mergeable RX buffers if the device offers them (devarg `mrg_rxbuf`).
    pub mrg_rxbuf: bool,
    /// Whether to rely on in-order completions if the device promises them (devarg `in_order`).
    pub in_order: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { mrg_rxbuf: true, in_order: true }
    }
}

impl Options {
    /// Parses the devargs of a PCI device.
    fn parse(args: Args<'_>) -> Result<Self> {
        let mut options = Self::default();
        for (key, value) in args {
            let option = if key == "in_order" { &mut options.in_order } else { &mut options.mrg_rxbuf };
            *option = flag(key, value)?;
        }
        Ok(options)
    }
}

/// A virtio network device.
///
/// The device is reset before memory that it knows can be freed: on [`Nic::stop`], and on drop while started.
#[derive(Debug)]
pub struct Device {
    transport: Box<dyn Transport>,
    options: Options,
    features: Features,
    /// Maximum frame length in bytes that the port can be started for.
    max_frame: usize,
    /// Offloads that the port can be started with.
    offloads: Offloads,
    mac: MacAddr,
    promiscuous: bool,
    /// Whether the device runs for another process, and this one has not touched it.
    is_attached: bool,
    fault: Fault,
    started: Option<Started>,
    /// Maximum number of queue pairs.
    pairs: u16,
    /// Queues from a stop that the device did not confirm.
    parked: Option<Queues<RxQueue, TxQueue>>,
    /// Queues of earlier runs, reused where they fit: DMA memory is never freed in parts.
    spare: Option<Spare>,
    counters: PortCounters,
}

#[derive(Debug)]
struct Started {
    memory: Arc<DmaMemory>,
    /// Numbers of descriptors of RX and TX queues.
    descriptors: [u16; 2],
    control: Option<Box<Control>>,
}

/// RX queues, TX queues (with indirect tables if frames may be long), and the control queue.
type Rings = (Queues<Virtqueue, (Virtqueue, Option<Chains>)>, Option<Box<Control>>);

#[derive(Debug)]
struct Spare {
    memory: Arc<DmaMemory>,
    rings: Vec<Virtqueue>,
    chains: Vec<Chains>,
    control: Option<Box<Control>>,
}

/// Rings and tables are taken in the order in which they were allocated, because a successor, which allocates anew, must
/// find them in the same places.
impl Spare {
    /// Takes tables for `count` rings of `size` descriptors, as [`Spare::take`] takes rings.
    fn take_chains(&mut self, count: u16, size: u16) -> Result<Vec<Chains>> {
        let mut taken = Vec::new();
        for _ in 0..count {
            let chains = match self.chains.iter().position(|chains| chains.size() == usize::from(size)) {
                Some(at) => Ok(self.chains.remove(at)),
                None => Chains::new(&self.memory, size),
            };
            match chains {
                Ok(chains) => taken.push(chains),
                Err(error) => {
                    self.chains.append(&mut taken);
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// Takes a spare ring for each of `sizes`, or creates it with `make`. On failure, the rings taken so far
    /// become spare again.
    fn take(&mut self, sizes: &[u16], make: impl Fn(u16) -> Result<Virtqueue>) -> Result<Vec<Virtqueue>> {
        let mut taken = Vec::new();
        for size in sizes {
            let ring = match self.rings.iter().position(|ring| ring.size() == *size) {
                Some(at) => Ok(self.rings.remove(at)),
                None => make(*size),
            };
            match ring {
                Ok(ring) => taken.push(ring),
                Err(error) => {
                    self.rings.append(&mut taken);
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }
}

impl Device {
    /// Resets the function and negotiates features with the device.
    ///
    /// # Errors
    /// `Unavailable` when the device lacks what the driver needs, with the QEMU flag that adds it; `Protocol`
    /// when it violates the specification.
    pub fn probe(function: Box<dyn Function>) -> Result<Self> {
        Self::probe_with(function, Options::default())
    }

    /// Probes the device as [`Device::probe`] does, with the user's options.
    ///
    /// # Errors
    /// As for [`Device::probe`].
    pub fn probe_with(function: Box<dyn Function>, options: Options) -> Result<Self> {
        Self::on(Box::new(Pci::new(function)?), options)
    }

    /// Connects port `name` to a vhost-user peer, or waits for one until `stop` is set.
    ///
    /// # Errors
    /// `Unavailable` when no peer listens or the peer lacks what the driver needs; `Protocol` when the peer
    /// does not answer according to vhost-user.
    pub fn connect(name: &str, options: &UserOptions, stop: &StopFlag) -> Result<Self> {
        Self::on(Box::new(User::new(name, options, stop)?), options.features)
    }

    /// Attaches to a device that runs for another process, by the access path that `transport` makes of its record.
    fn attach_to(
        facts: Facts<'_>,
        options: Options,
        transport: impl FnOnce(Facts<'_>) -> Result<Box<dyn Transport>>,
    ) -> Result<Self> {
        let (fixed, record) = facts.decode::<(Fixed, Vec<u8>)>()?;
        let transport = transport(Facts { record: &record, ..facts })?;
        let mut device = Self::of(transport, options, fixed);
        device.is_attached = true;
        Ok(device)
    }

    fn on(mut transport: Box<dyn Transport>, options: Options) -> Result<Self> {
        let features = transport.negotiate(options, &MAX_CONFIG)?;
        let longest = if features.contains(Features::LONG) { MAX_FRAME } else { STANDARD_FRAME };
        let max_frame = longest.min(transport.longest_frame().unwrap_or(longest)).max(STANDARD_FRAME) as u32;
        // An invalid number of pairs is an error only for a start that requests several.
        let pairs = transport.pairs().unwrap_or(1);
        let mac = transport.mac()?.unwrap_or_else(random_mac);
        let (features, offloads) = (features.bits(), features.offloads().bits());
        let fixed = Fixed { features, max_frame, offloads, mac, pairs, promiscuous: false };
        Ok(Self::of(transport, options, fixed))
    }

    fn of(transport: Box<dyn Transport>, options: Options, fixed: Fixed) -> Self {
        let Fixed { features, max_frame, offloads, mac, pairs, promiscuous } = fixed;
        Self {
            transport,
            options,
            features: Features::from_bits_truncate(features),
            max_frame: max_frame as usize,
            offloads: Offloads::from_bits_truncate(offloads),
            mac,
            promiscuous,
            is_attached: false,
            fault: Fault::default(),
            started: None,
            pairs,
            parked: None,
            spare: None,
            counters: PortCounters::default(),
        }
    }

    /// Creates the queues on `rings`. Each of the first RX queues has one of `events`.
    fn assemble(
        &self,
        rings: Queues<Virtqueue, (Virtqueue, Option<Chains>)>,
        longest: usize,
        events: &[Event],
    ) -> Queues<RxQueue, TxQueue> {
        let (features, prompt) = (self.features, self.transport.owes_completions());
        let counters = &self.counters;
        let rx = |(number, ring)| {
            RxQueue::new(ring, counters.rx(number), features, longest, events.get(number).cloned())
        };
        let tx = |(number, (ring, chains))| {
            let chains: Option<Chains> = chains;
            let chains = chains.map(|chains| chains.for_frames(longest));
            TxQueue::new(ring, counters.tx(number), features, prompt, chains)
        };
        Queues {
            rx: rings.rx.into_iter().enumerate().map(rx).collect(),
            tx: rings.tx.into_iter().enumerate().map(tx).collect(),
        }
    }

    fn refuse(&self, kind: ErrorKind, why: &str) -> Error {
        Error::new(kind, format!("cannot use virtio NIC {}", self.transport.name()), why)
    }

    /// Reuses the queues of earlier runs and creates those that are missing. `control` is the index of the
    /// control queue, if there is one.
    fn queues(
        &mut self,
        memory: &Arc<DmaMemory>,
        config: &PortConfig,
        control: Option<u16>,
    ) -> Result<Rings> {
        if self.spare.as_ref().is_some_and(|spare| !Arc::ptr_eq(&spare.memory, memory)) {
            self.spare = None;
        }
        let spare = self.spare.get_or_insert_with(|| Spare {
            memory: Arc::clone(memory),
            rings: Vec::new(),
            chains: Vec::new(),
            control: None,
        });
        let name = self.transport.name();
        if let (Some(index), None) = (control, &spare.control) {
            spare.control = Some(Box::new(Control::new(memory, index, name)?));
        }
        let of = |queues: u16, descriptors| std::iter::repeat_n(descriptors, queues.into());
        let sizes: Vec<u16> = of(config.rx_queues, config.rx_descriptors)
            .chain(of(config.tx_queues, config.tx_descriptors))
            .collect();
        let long = if config.is_scattered() { config.tx_queues } else { 0 };
        let mut chains = spare.take_chains(long, config.tx_descriptors)?;
        let mut rx = match spare.take(&sizes, |size| Virtqueue::new(memory, size, name, &self.fault)) {
            Ok(rings) => rings,
            Err(error) => {
                spare.chains.append(&mut chains);
                return Err(error);
            }
        };
        let mut chains = chains.into_iter();
        let tx =
            rx.split_off(config.rx_queues.into()).into_iter().map(|ring| (ring, chains.next())).collect();
        let control = control.and_then(|index| {
            let mut control = spare.control.take()?;
            control.index = index;
            Some(control)
        });
        Ok((Queues { rx, tx }, control))
    }

    /// Passes a queue that the device has reset to the device again.
    fn renew(&mut self, index: u16, queue: &mut Virtqueue) -> Result<()> {
        queue.restart(index, self.features.contains(Features::EVENT_IDX));
        self.transport.enable_queue(index, queue)
    }

    /// Sets up the queues and starts the device (3.1.1, steps 7 and 8). The RX queues are filled from `caches` in turn.
    fn go_live(
        &mut self,
        memory: &DmaMemory,
        queues: &mut Queues<RxQueue, TxQueue>,
        mut control: Option<&mut Control>,
        caches: &mut [PoolCache],
    ) -> Result<()> {
        let event_idx = self.features.contains(Features::EVENT_IDX);
        self.transport.share(memory)?;
        for (index, queue) in numbered(queues) {
            queue.restart(index, event_idx);
            self.transport.enable_queue(index, queue)?;
        }
        if let Some(control) = &mut control {
            control.restart(&mut *self.transport, event_idx)?;
        }
        let count = caches.len();
        queues.rx.iter_mut().enumerate().try_for_each(|(n, rx)| rx.prepare(&mut caches[n % count]))?;
        let kicks =
            numbered(queues).map(|(index, _)| self.transport.kick(index)).collect::<Result<Vec<_>>>()?;
        self.transport.go_live()?;
        numbered(queues).zip(kicks).for_each(|((_, queue), kick)| queue.connect(kick));
        let Some(control) = control else { return Ok(()) };
        if self.features.contains(Features::MQ) {
            control.set_pairs(&*self.transport, queues.rx.len() as u16)?;
        }
        // After a reset QEMU receives every frame, other devices only their own: set the mode in any case.
        match self.features.contains(Features::CTRL_RX) {
            true => control.set_promiscuous(&*self.transport, self.promiscuous),
            false => Ok(()),
        }
    }
}

impl PciDriver for Device {
    const NAME: &'static str = "virtio-net";
    /// Supported device IDs. The transitional `1af4:1000` must have the modern interface.
    const IDS: &'static [(DeviceId, &'static str)] = &[
        (DeviceId { vendor: 0x1af4, device: 0x1041 }, "virtio-net"),
        (DeviceId { vendor: 0x1af4, device: 0x1000 }, "virtio-net (transitional)"),
    ];
    const KEYS: &'static [&'static str] = &["mrg_rxbuf", "in_order"];

    fn open(function: Box<dyn Function>, args: Args<'_>) -> Result<Self> {
        Self::probe_with(function, Options::parse(args)?)
    }
}

/// What does not change while a device runs.
#[derive(Serialize, Deserialize, Schema)]
struct Fixed {
    features: u64,
    max_frame: u32,
    offloads: u8,
    mac: MacAddr,
    pairs: u16,
    promiscuous: bool,
}

/// State of a started device.
#[derive(Serialize, Deserialize, Schema)]
struct State {
    features: u64,
    /// Numbers of descriptors of RX and TX queues.
    descriptors: [u16; 2],
    control: Option<QueueRecord>,
}

impl HandOver for Device {
    fn function(&self) -> Option<&dyn Function> {
        self.transport.function()
    }

    fn facts<'a>(&'a self, fds: &mut Fds<'a>) -> Result<Vec<u8>> {
        let Self { mac, pairs, promiscuous, .. } = *self;
        let max_frame = self.max_frame as u32;
        let (features, offloads) = (self.features.bits(), self.offloads.bits());
        let transport = self.transport.record(fds)?;
        encode(&(Fixed { features, max_frame, offloads, mac, pairs, promiscuous }, transport))
    }

    fn attach(function: Box<dyn Function>, args: Args<'_>, facts: Facts<'_>) -> Result<Self> {
        let options = Options::parse(args)?;
        Self::attach_to(facts, options, |facts| Ok(Box::new(Pci::attach(function, facts)?)))
    }

    fn record(&self, _fds: &mut Fds<'_>) -> Result<Vec<u8>> {
        let started = self.started.as_ref().ok_or_else(|| cannot_hand_over("it is not started"))?;
        let control = started.control.as_ref().map(|control| control.queue.record()).transpose()?;
        encode(&State { features: self.features.bits(), descriptors: started.descriptors, control })
    }

    fn rx_record(&self, rx: &RxQueue) -> Result<Vec<u8>> {
        encode(&rx.queue.record()?)
    }

    fn tx_record(&self, tx: &TxQueue) -> Result<Vec<u8>> {
        encode(&tx.record()?)
    }

    fn lend_rx(&self, rx: &mut RxQueue, cache: &mut PoolCache) -> Result<()> {
        rx.lend(cache);
        Ok(())
    }

    fn lend_tx(&self, tx: &mut TxQueue, cache: &mut PoolCache) -> Result<()> {
        tx.lend(cache);
        Ok(())
    }

    fn take_back_rx(&self, rx: &mut RxQueue, record: &[u8], free: &mut FreeBuffers) -> Result<()> {
        rx.restore(&decode(record)?, free)
    }

    fn take_back_tx(&self, tx: &mut TxQueue, record: &[u8], free: &mut FreeBuffers) -> Result<()> {
        tx.restore(&decode(record)?, free)
    }

    fn halt_rx(&mut self, number: u16) -> Result<()> {
        self.transport.reset_queue(index_of(RX_QUEUE, number))
    }

    fn halt_tx(&mut self, number: u16) -> Result<()> {
        self.transport.reset_queue(index_of(TX_QUEUE, number))
    }

    fn renew_rx(&mut self, number: u16, rx: &mut RxQueue, cache: &mut PoolCache) -> Result<()> {
        self.renew(index_of(RX_QUEUE, number), rx.queue_mut())?;
        rx.reopen();
        rx.prepare(cache)?;
        rx.queue_mut().connect(self.transport.kick(index_of(RX_QUEUE, number))?);
        Ok(())
    }

    fn renew_tx(&mut self, number: u16, tx: &mut TxQueue) -> Result<()> {
        let index = index_of(TX_QUEUE, number);
        self.renew(index, tx.queue_mut())?;
        tx.queue_mut().connect(self.transport.kick(index)?);
        Ok(())
    }

    fn take_fault(&mut self) -> Option<&'static str> {
        self.fault.take()
    }

    fn resume(&mut self, resume: Resume<'_>) -> Result<Queues<RxQueue, TxQueue>> {
        let State { features, descriptors, control: control_record } = resume.device()?;
        let [rx_descriptors, tx_descriptors] = descriptors;
        let config = PortConfig { rx_descriptors, tx_descriptors, ..*resume.config };
        let (rx_records, tx_records) = (resume.rx::<QueueRecord>()?, resume.tx::<TxRecord>()?);
        self.features = Features::from_bits_truncate(features);
        if let Some(why) = config.unsupported_reason(&self.capabilities()) {
            return Err(self.refuse(ErrorKind::Usage, &why));
        }
        let index = control_record.as_ref().map(QueueRecord::index);
        let (rings, mut control) = self.queues(resume.memory, &config, index)?;
        let events = self.transport.resume(self.features);
        if events.len() != if config.rx_interrupts { config.rx_queues.into() } else { 0 } {
            return Err(contradiction("only one of both programs uses RX interrupts"));
        }
        let mut queues = self.assemble(rings, config.max_frame, &events);
        for (rx, record) in queues.rx.iter_mut().zip(&rx_records) {
            record.as_ref().map_or(Ok(()), |record| rx.restore(record, resume.free))?;
        }
        for (tx, record) in queues.tx.iter_mut().zip(&tx_records) {
            record.as_ref().map_or(Ok(()), |record| tx.restore(record, resume.free))?;
        }
        if let (Some(control), Some(record)) = (&mut control, &control_record) {
            control.queue.restore(record, resume.free)?;
        }
        for (index, queue) in numbered(&mut queues) {
            queue.reconnect(self.transport.kick(index)?);
        }
        self.started = Some(Started { memory: Arc::clone(resume.memory), descriptors, control });
        self.is_attached = false;
        Ok(queues)
    }

    fn leave(&mut self) {
        if let Some(started) = self.started.take() {
            started.memory.keep();
        }
    }
}

impl Nic for Device {
    type Rx = RxQueue;
    type Tx = TxQueue;

    fn start(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
    ) -> Result<Queues<RxQueue, TxQueue>> {
        self.start_from(config, memory, slice::from_mut(cache))
    }

    fn start_from(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        caches: &mut [PoolCache],
    ) -> Result<Queues<RxQueue, TxQueue>> {
        let Some(first) = caches.first_mut() else {
            return Err(self.refuse(ErrorKind::Usage, "its RX queues get no buffers"));
        };
        self.retry_stop(first)?;
        if self.started.is_some() {
            return Err(self.refuse(ErrorKind::Usage, "it is already started"));
        }
        self.is_attached = false;
        self.features = self.transport.negotiate(self.options, config)?;
        let most = self.transport.pairs()?;
        self.pairs = self.pairs.max(most);
        if config.is_scattered()
            && (config.max_frame > self.max_frame || !self.features.contains(Features::LONG))
        {
            let (asked, most) = (config.max_frame, self.max_frame);
            let why =
                format!("frames of {asked} bytes (without FCS) are requested, but it takes at most {most}");
            return Err(self.refuse(ErrorKind::Unavailable, &why).with_hint(LONG_HINT));
        }
        let now = Capabilities {
            rx_queues: most,
            tx_queues: most,
            offloads: self.features.offloads(),
            ..self.capabilities()
        };
        if let Some(why) = config.unsupported_reason(&now) {
            let error = self.refuse(ErrorKind::Usage, &why);
            return Err(match config.rx_queues.max(config.tx_queues) > most {
                true => error.with_hint(
                    "give it more: queues=N of a --vdev and its peer, or in QEMU -device virtio-net-pci,mq=on",
                ),
                false => error,
            });
        }
        if config.rx_queues < config.tx_queues {
            let why = "it spreads what it receives over as many queues as it sends from (virtio 1.2, 5.1.6.5.5), so it needs \
                       at least as many RX as TX queues";
            return Err(self.refuse(ErrorKind::Usage, why));
        }
        let config = PortConfig {
            rx_descriptors: self.transport.queue_size(RX_QUEUE, config.rx_descriptors)?,
            tx_descriptors: self.transport.queue_size(TX_QUEUE, config.tx_descriptors)?,
            ..*config
        };
        if config.is_scattered()
            && config.rx_descriptors.min(config.tx_descriptors) < MIN_RING_FOR_LONG_FRAMES
        {
            let why = format!(
                "frames of several buffers need rings of at least {MIN_RING_FOR_LONG_FRAMES} descriptors"
            );
            return Err(self
                .refuse(ErrorKind::Usage, &why)
                .with_hint("give it longer rings: queue_size=256 of a --vdev"));
        }
        let controlled = self.features.intersects(Features::CTRL_RX)
            || self.features.contains(Features::CTRL_VQ | Features::MQ);
        let control = controlled.then_some(RINGS_PER_PAIR as u16 * most);
        let sleeping = if config.rx_interrupts { config.rx_queues } else { 0 };
        let events = self.transport.set_interrupts(sleeping, config.link_interrupt)?;
        let (rings, mut control) = self.queues(memory, &config, control)?;
        let mut queues = self.assemble(rings, config.max_frame, &events);
        self.fault.take();
        let live = self.go_live(memory, &mut queues, control.as_deref_mut(), caches);
        let descriptors = [config.rx_descriptors, config.tx_descriptors];
        self.started = Some(Started { memory: Arc::clone(memory), descriptors, control });
        match live {
            Ok(()) => Ok(queues),
            Err(error) => {
                if let Err(error) = self.stop(queues, &mut caches[0]) {
                    tracing::error!("{error}");
                }
                Err(error)
            }
        }
    }

    fn stop(&mut self, queues: Queues<RxQueue, TxQueue>, cache: &mut PoolCache) -> Result<()> {
        // Buffers of a running device must not return to the pool.
        let mut names = queues.rx.iter().map(RxQueue::name).chain(queues.tx.iter().map(TxQueue::name));
        if names.any(|name| name != self.transport.name()) {
            return Err(self.refuse(ErrorKind::Usage, "the queues to stop belong to another device"));
        }
        if let Err(error) = self.transport.stop() {
            self.parked = Some(queues);
            return Err(error);
        }
        let control = self.started.take().and_then(|started| started.control);
        let mut rings = Vec::with_capacity(queues.rx.len() + queues.tx.len());
        let mut chains = Vec::new();
        for rx in queues.rx {
            rx.counters().unread.add(rx.unread().into());
            rings.push(rx.into_queue(cache));
        }
        for tx in queues.tx {
            tx.counters().unfinished.add(tx.unfinished() as u64);
            let (ring, own) = tx.into_queue(cache);
            rings.push(ring);
            chains.extend(own);
        }
        // `spare` and these rings belong to the memory of the last start.
        if let Some(spare) = &mut self.spare {
            spare.rings.append(&mut rings);
            spare.chains.append(&mut chains);
            spare.control = control.or(spare.control.take());
        }
        Ok(())
    }

    /// Shares `memory` with a started device. A stopped port shares all memory when it starts.
    fn update_memory(&mut self, memory: &DmaMemory) -> Result<()> {
        match self.started {
            Some(_) => self.transport.share_more(memory),
            None => Ok(()),
        }
    }

    fn retry_stop(&mut self, cache: &mut PoolCache) -> Result<()> {
        match self.parked.take() {
            None => Ok(()),
            Some(parked) => self.stop(parked, cache),
        }
    }

    /// A peer may deliver frames of 0 to 16 bytes. In a split ring the device writes the used ring, and reads
    /// the descriptors, including indirect ones, and the avail ring (2.7).
    fn capabilities(&self) -> Capabilities {
        let ring_bytes = |config: &PortConfig| {
            let tables = if config.is_scattered() { TABLE_BYTES } else { 0 };
            let sent = usize::from(config.tx_queues) * usize::from(config.tx_descriptors);
            [config.descriptors() * 8, config.descriptors() * 18 + sent * tables]
        };
        let (rx_queues, tx_queues) = (self.pairs, self.pairs);
        Capabilities {
            max_frame: self.max_frame,
            offloads: self.offloads,
            receives_short_frames: true,
            rx_queues,
            tx_queues,
            ring_bytes,
            rx_interrupts: true,
            ..Capabilities::default()
        }
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn link_event(&self) -> Option<BorrowedFd<'_>> {
        self.transport.change_event().map(AsFd::as_fd)
    }

    fn link(&self) -> Link {
        if let Some(event) = self.transport.change_event() {
            event.take();
        }
        let up = self.transport.link_up();
        Link { up, speed: None, full_duplex: true, autoneg: true }
    }

    fn check(&mut self) -> Result<()> {
        self.transport.check_alive()?;
        match self.fault.take() {
            None => Ok(()),
            Some(why) => Err(Error::new(
                ErrorKind::Protocol,
                format!("cannot continue using virtio NIC {}", self.transport.name()),
                why,
            )),
        }
    }

    /// A device without `VIRTIO_NET_F_CTRL_RX` chooses what it receives. `true` then fails unless the device
    /// receives every frame anyway, as a vhost-user peer does; `false` changes nothing. Both hold whether or
    /// not the port is started.
    fn set_promiscuous(&mut self, on: bool) -> Result<()> {
        if self.is_attached {
            return check_filter(self.promiscuous, on);
        }
        let controlled = self.features.contains(Features::CTRL_RX);
        if on && !controlled {
            self.transport.receive_all()?;
        }
        self.promiscuous = on;
        match &mut self.started {
            Some(Started { control: Some(control), .. }) if controlled => {
                control.set_promiscuous(&*self.transport, on)
            }
            _ => Ok(()),
        }
    }

    fn counters(&self) -> &PortCounters {
        &self.counters
    }
}

/// Returns the virtqueues of a port with their indices; the queues of a pair have consecutive indices
/// (5.1.2).
fn numbered(queues: &mut Queues<RxQueue, TxQueue>) -> impl Iterator<Item = (u16, &mut Virtqueue)> {
    let indices = |first: u16| (first..).step_by(RINGS_PER_PAIR as usize);
    let rx = indices(RX_QUEUE).zip(queues.rx.iter_mut().map(RxQueue::queue_mut));
    rx.chain(indices(TX_QUEUE).zip(queues.tx.iter_mut().map(TxQueue::queue_mut)))
}

impl Drop for Device {
    fn drop(&mut self) {
        let Some(started) = self.started.take() else { return };
        if let Err(error) = self.transport.stop() {
            tracing::error!("{}", error.with_hint("its DMA memory is kept until the process ends"));
            started.memory.keep();
        }
    }
}

/// Returns a random, locally administered unicast address, for a device that has none.
pub(crate) fn random_mac() -> MacAddr {
    let mut bytes = RandomState::new().build_hasher().finish().to_le_bytes();
    bytes[0] = bytes[0] & !1 | 2;
    MacAddr([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]])
}
