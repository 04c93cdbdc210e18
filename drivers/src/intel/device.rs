//! Port of a controller of any family: probe, start, stop, and queries in between.

use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::dma::{DescRing, DmaMemory, DmaRing, FreeBuffers, PoolCache};
use vireo_eal::handover::{Fds, decode, encode};
use vireo_eal::mmio::Doorbell;
use vireo_eal::{Error, ErrorKind, Result};

use super::counter::Drops;
use super::hardware::link;
use super::interrupt::{RxInterrupt, Vector, VectorRecord, Waiter};
use super::phy::{follow_link, wake};
use super::regs::*;
use super::reset::quiesce;
use super::rx::fill;
use super::tx::{RECLAIM, clear};
use super::{Chip, Hardware, QueueControl, RingRegisters, RxQueue, TxQueue};
use crate::counters::PortCounters;
use crate::driver::{Args, Facts, PciDriver};
use crate::handover::{HandOver, Resume, check_filter, contradiction, needs_reset};
use crate::port::{Capabilities, Fault, Link, MacAddr, Nic, PortConfig, Queues, QueuesOf, RxBurst, TxBurst};

/// Minimum size of a ring in descriptors: two reclaim batches of the TX queue.
const FEWEST: u16 = 2 * RECLAIM as u16;
/// Maximum size of a ring in descriptors: 64 KiB of RDLEN or TDLEN (SDM 13.4; Linux, `IGB_MAX_RXD`).
const MAX_DESCRIPTORS: u16 = 4096;
/// Size of a descriptor in bytes.
const DESCRIPTOR: usize = 16;

/// RX and TX queues of a port.
pub(super) type Pair<C> = (RxQueue<<C as Chip>::Format>, TxQueue<<C as Chip>::Format>);

/// A port of a controller.
#[derive(Debug)]
pub struct Device<C: Chip> {
    pub(crate) chip: C,
    pub(crate) hardware: Hardware,
    dma_mask: u64,
    /// Whether the driver pads short frames.
    pads: bool,
    /// Whether the device runs for another process, and this one has not touched it.
    is_attached: bool,
    /// Whether flow control has been set for the current link.
    linked: AtomicBool,
    mac: MacAddr,
    promiscuous: bool,
    /// Whether a frame may span several descriptors.
    scattered: bool,
    drops: Drops,
    fault: Fault,
    /// Interrupt, enabled by the first start that asks for it.
    vector: Option<Vector>,
    /// Who waits for the interrupt since the last start.
    waiter: Option<Waiter>,
    /// Memory that the device may write to, kept from `start` until the device confirms a reset.
    running: Option<Arc<DmaMemory>>,
    /// Queues of a failed stop, whose reset the device did not confirm.
    parked: Option<Box<Pair<C>>>,
    counters: PortCounters,
    /// Rings of the last run, kept for the next one because ring memory is never released.
    idle: Option<Box<Rings>>,
}

#[derive(Debug)]
struct Rings {
    memory: Arc<DmaMemory>,
    rx: DescRing,
    tx: DescRing,
}

/// What does not change while a device runs.
#[derive(Clone, Copy, Serialize, Deserialize, Schema)]
struct Fixed {
    dma_mask: u64,
    pads: bool,
    mac: MacAddr,
    promiscuous: bool,
}

/// State of a started device.
#[derive(Serialize, Deserialize, Schema)]
struct State {
    linked: bool,
    drops: Drops,
    rx_interrupts: bool,
}

impl<C: Chip> Device<C> {
    /// Takes ownership of the function, resets it and reads its station address. The function may not start
    /// DMA before `start`.
    ///
    /// # Errors
    /// `Unavailable` when the function's id is not in [`PciDriver::IDS`], it has no BAR 0, it cannot work in
    /// its slot, or its registers read as all ones. `Protocol` when it does not finish its reset or has no
    /// station address.
    pub fn probe(function: Box<dyn Function>) -> Result<Self> {
        let chip = Self::chip_of(&*function)?;
        function.set_command(false)?;
        let hardware = Hardware { bar: function.bar(0)?, function };
        quiesce(&chip, &hardware)?;
        let fixed = Fixed {
            dma_mask: chip.prepare(&hardware)?,
            pads: !chip.is_express(),
            mac: hardware.station_address()?,
            promiscuous: false,
        };
        Ok(Self::of(chip, hardware, fixed))
    }

    fn chip_of(function: &dyn Function) -> Result<C> {
        C::of(function).ok_or_else(|| {
            let what = format!("cannot use {} as {}", function.address(), C::NAME);
            Error::new(ErrorKind::Unavailable, what, format!("it is a {}", function.id()))
        })
    }

    fn of(chip: C, hardware: Hardware, fixed: Fixed) -> Self {
        let Fixed { dma_mask, pads, mac, promiscuous } = fixed;
        Self {
            dma_mask,
            pads,
            is_attached: false,
            linked: AtomicBool::new(false),
            mac,
            promiscuous,
            scattered: false,
            drops: Drops::default(),
            fault: Fault::default(),
            vector: None,
            waiter: None,
            running: None,
            parked: None,
            counters: Drops::port_counters(),
            idle: None,
            chip,
            hardware,
        }
    }

    /// Decides who waits for the interrupt, and returns that of the RX queue, if `config` asks for it. If `config` asks
    /// for that of the link only, the interrupt may be missing, because the link is also polled.
    fn rx_interrupt(&mut self, config: &PortConfig) -> Result<Option<RxInterrupt>> {
        let is_wanted = config.rx_interrupts || config.link_interrupt;
        if is_wanted && self.vector.is_none() {
            match Vector::enable(&self.hardware, self.chip.is_express()) {
                Ok(vector) => self.vector = vector,
                Err(error) if config.rx_interrupts => return Err(error),
                Err(error) => tracing::debug!("the link is only polled: {error}"),
            }
        }
        let waiter = if config.rx_interrupts { Waiter::RxQueue } else { Waiter::Link };
        self.waiter = self.vector.clone().filter(|_| is_wanted).map(waiter);
        Ok(self.waiter.as_ref().and_then(|waiter| waiter.rx_interrupt(&self.hardware)))
    }

    fn usage(&self, what: &str, why: &str) -> Error {
        self.hardware.error(ErrorKind::Usage, what, why)
    }

    /// Returns rings of the configured sizes, reusing those of the last run if they fit.
    fn rings(&mut self, memory: &Arc<DmaMemory>, config: &PortConfig) -> Result<Box<Rings>> {
        let (rx, tx) = (usize::from(config.rx_descriptors), usize::from(config.tx_descriptors));
        if let Some(idle) = self.idle.take_if(|idle| {
            Arc::ptr_eq(&idle.memory, memory) && idle.rx.entries() == rx && idle.tx.entries() == tx
        }) {
            return Ok(idle);
        }
        let ring = |entries: usize| {
            DmaRing::new(memory, entries, C::ring_alignment(entries * DESCRIPTOR))
                .map(|words| DescRing::new(words, entries - 1))
        };
        Ok(Box::new(Rings { memory: Arc::clone(memory), rx: ring(rx)?, tx: ring(tx)? }))
    }

    /// Configures the chip for a start (SDM 14.4 and 14.5, DS 4.6, 82576 4.5), empties the TX ring and fills the RX
    /// ring with buffers.
    fn set_up(&self, config: &PortConfig, rings: &mut Rings, cache: &mut PoolCache) -> Result<()> {
        self.place(&rings.rx, C::RX);
        self.place(&rings.tx, C::TX);
        self.chip.set_up(&self.hardware, config)?;
        wake(&self.chip, &self.hardware)?;
        clear(&mut rings.tx);
        fill::<C::Format>(&mut rings.rx, cache)
    }

    /// Tells the chip where a ring is, and that it is empty.
    fn place(&self, ring: &DescRing, registers: RingRegisters) {
        let bar = &self.hardware.bar;
        bar.write32(registers.base_low, ring.iova() as u32);
        bar.write32(registers.base_high, (ring.iova() >> 32) as u32);
        bar.write32(registers.len, (ring.entries() * DESCRIPTOR) as u32);
        bar.write32(registers.head, 0);
        bar.write32(registers.tail, 0);
    }

    /// Disables the queue whose register is `control`, and waits until the chip has ended its accesses to the ring.
    fn halt(&self, control: impl Fn(QueueControl) -> u64) -> Result<()> {
        let queue = C::QUEUE_CONTROL.ok_or_else(needs_reset)?;
        self.hardware.change(control(queue), 0, queue.enable);
        self.hardware.wait("stop a queue of", control(queue), |value| value & queue.enable == 0).map(drop)
    }

    /// Enables the queue whose register is `control` on `ring`, after [`Device::halt`].
    fn renew(
        &self,
        control: impl Fn(QueueControl) -> u64,
        ring: &DescRing,
        registers: RingRegisters,
    ) -> Result<()> {
        let queue = C::QUEUE_CONTROL.ok_or_else(needs_reset)?;
        self.place(ring, registers);
        self.hardware.change(control(queue), queue.enable, 0);
        self.hardware.wait("start a queue of", control(queue), |value| value & queue.enable != 0).map(drop)
    }

    /// Returns the doorbells of both queues.
    fn tails(&self) -> Result<[Doorbell<u32>; 2]> {
        let bar = &self.hardware.bar;
        Ok([bar.doorbell32(C::RX.tail)?, bar.doorbell32(C::TX.tail)?])
    }

    /// Creates the queues on `rings`, which are as the chip has them.
    fn queues(
        &self,
        rings: Rings,
        tails: [Doorbell<u32>; 2],
        max_frame: usize,
        interrupt: Option<RxInterrupt>,
    ) -> Pair<C> {
        let (long, [rx_tail, tx_tail]) = (self.scattered.then_some(max_frame), tails);
        let rx = RxQueue::new(rings.rx, rx_tail, self.counters.rx(0), long, interrupt);
        let (counters, fault) = (self.counters.tx(0), self.fault.clone());
        (rx, TxQueue::new(rings.tx, tx_tail, counters, self.pads, long, fault))
    }

    /// Lets the chip start DMA.
    fn enable(&self) -> Result<()> {
        self.hardware.function.set_command(true)?;
        if self.waiter.as_ref().is_some_and(Waiter::is_line) {
            self.hardware.function.allow_intx()?;
        }
        self.chip.enable(&self.hardware, self.rctl())?;
        if let Some(waiter) = &self.waiter {
            waiter.watch(&self.hardware.bar);
        }
        Ok(())
    }

    fn rctl(&self) -> u32 {
        let all = if self.promiscuous { RCTL_UPE | RCTL_MPE } else { 0 };
        let long = if self.scattered { RCTL_LPE | RCTL_BSIZE_1024 } else { 0 };
        // A switch must not forward PAUSE frames, even in promiscuous mode (IEEE 802.1Q, 8.6.3).
        RCTL_EN | RCTL_BAM | RCTL_DPF | RCTL_SECRC | all | long
    }
}

impl<C: Chip> PciDriver for Device<C> {
    const NAME: &'static str = C::NAME;
    const IDS: &'static [(DeviceId, &'static str)] = C::IDS;
    const KEYS: &'static [&'static str] = &[];

    fn open(function: Box<dyn Function>, _args: Args<'_>) -> Result<Self> {
        Self::probe(function)
    }
}

impl<C: Chip> HandOver for Device<C> {
    fn function(&self) -> Option<&dyn Function> {
        Some(&*self.hardware.function)
    }

    fn facts<'a>(&'a self, fds: &mut Fds<'a>) -> Result<Vec<u8>> {
        let Self { dma_mask, pads, mac, promiscuous, .. } = *self;
        let vector = self.vector.as_ref().map(|vector| vector.record(fds));
        encode(&(Fixed { dma_mask, pads, mac, promiscuous }, vector))
    }

    fn attach(function: Box<dyn Function>, _args: Args<'_>, facts: Facts<'_>) -> Result<Self> {
        let chip = Self::chip_of(&*function)?;
        let (fixed, vector) = facts.decode::<(Fixed, Option<VectorRecord>)>()?;
        let hardware = Hardware { bar: function.bar(0)?, function };
        let vector = vector.map(|record| Vector::of(&record, facts.fds)).transpose()?;
        let mut device = Self::of(chip, hardware, fixed);
        (device.vector, device.is_attached) = (vector, true);
        Ok(device)
    }

    fn record(&self, _fds: &mut Fds<'_>) -> Result<Vec<u8>> {
        let rx_interrupts = self.waiter.as_ref().is_some_and(Waiter::is_rx_queue);
        let linked = self.linked.load(Ordering::Relaxed);
        encode(&State { linked, drops: self.drops.clone(), rx_interrupts })
    }

    fn rx_record(&self, rx: &Self::Rx) -> Result<Vec<u8>> {
        encode(&rx.record())
    }

    fn tx_record(&self, tx: &Self::Tx) -> Result<Vec<u8>> {
        encode(&tx.record())
    }

    fn lend_rx(&self, rx: &mut Self::Rx, cache: &mut PoolCache) -> Result<()> {
        rx.lend(cache);
        Ok(())
    }

    fn lend_tx(&self, tx: &mut Self::Tx, cache: &mut PoolCache) -> Result<()> {
        tx.lend(cache);
        Ok(())
    }

    fn take_back_rx(&self, rx: &mut Self::Rx, record: &[u8], free: &mut FreeBuffers) -> Result<()> {
        rx.restore(&decode(record)?, free)
    }

    fn take_back_tx(&self, tx: &mut Self::Tx, record: &[u8], free: &mut FreeBuffers) -> Result<()> {
        tx.restore(&decode(record)?, free)
    }

    fn halt_rx(&mut self, _number: u16) -> Result<()> {
        self.halt(|queue| queue.rx)
    }

    fn halt_tx(&mut self, _number: u16) -> Result<()> {
        self.halt(|queue| queue.tx)
    }

    fn renew_rx(&mut self, _number: u16, rx: &mut Self::Rx, cache: &mut PoolCache) -> Result<()> {
        rx.refill_all(cache)?;
        self.renew(|queue| queue.rx, rx.ring(), C::RX)?;
        rx.announce();
        Ok(())
    }

    fn renew_tx(&mut self, _number: u16, tx: &mut Self::Tx) -> Result<()> {
        tx.clear();
        self.renew(|queue| queue.tx, tx.ring(), C::TX)
    }

    fn take_fault(&mut self) -> Option<&'static str> {
        self.fault.take()
    }

    fn resume(&mut self, resume: Resume<'_>) -> Result<QueuesOf<Self>> {
        let config = *resume.config;
        if let Some(why) = config.unsupported_reason(&self.capabilities()) {
            return Err(self.usage("continue", &why));
        }
        let State { linked, drops, rx_interrupts } = resume.device()?;
        if config.rx_interrupts != rx_interrupts {
            return Err(contradiction("only one of both programs uses RX interrupts"));
        }
        let (mut rx_records, mut tx_records) = (resume.rx()?, resume.tx()?);
        let (Some(rx_record), Some(tx_record)) = (rx_records.pop(), tx_records.pop()) else {
            return Err(self.usage("continue", "it has no queues"));
        };
        self.scattered = config.is_scattered();
        let (tails, rings) = (self.tails()?, self.rings(resume.memory, &config)?);
        let (memory, interrupt) = (Arc::clone(&rings.memory), self.rx_interrupt(&config)?);
        let (mut rx, mut tx) = self.queues(*rings, tails, config.max_frame, interrupt);
        rx_record.map_or(Ok(()), |record| rx.restore(&record, resume.free))?;
        tx_record.map_or(Ok(()), |record| tx.restore(&record, resume.free))?;
        self.drops = drops;
        self.linked.store(linked, Ordering::Relaxed);
        self.running = Some(memory);
        self.is_attached = false;
        Ok(Queues::pair(rx, tx))
    }

    fn leave(&mut self) {
        if let Some(memory) = self.running.take() {
            memory.keep();
        }
    }
}

impl<C: Chip> Nic for Device<C> {
    type Rx = RxQueue<C::Format>;
    type Tx = TxQueue<C::Format>;

    fn start(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
    ) -> Result<QueuesOf<Self>> {
        self.retry_stop(cache)?;
        if self.running.is_some() {
            return Err(self.usage("start", "it is already running"));
        }
        if let Some(why) = config.unsupported_reason(&self.capabilities()) {
            return Err(self.usage("start", &why));
        }
        if std::mem::take(&mut self.is_attached) {
            quiesce(&self.chip, &self.hardware)?;
        }
        self.scattered = config.is_scattered();
        if self.scattered && self.chip.make_room(&self.hardware, config.max_frame) {
            quiesce(&self.chip, &self.hardware)?;
        }
        let interrupt = self.rx_interrupt(config)?;
        let (tails, mut rings) = (self.tails()?, self.rings(memory, config)?);
        if let Err(error) = self.set_up(config, &mut rings, cache) {
            self.idle = Some(rings);
            return Err(error);
        }
        self.drops.begin(&self.hardware.bar);
        self.fault.take();
        let (mut rx, tx) = self.queues(*rings, tails, config.max_frame, interrupt);
        self.running = Some(Arc::clone(memory));
        self.linked.store(false, Ordering::Relaxed);
        if let Err(error) = self.enable() {
            self.stop_pair(rx, tx, cache)?;
            return Err(error);
        }
        rx.announce();
        // Sets flow control if the link is already up.
        self.link();
        Ok(Queues::pair(rx, tx))
    }

    fn stop(&mut self, queues: QueuesOf<Self>, cache: &mut PoolCache) -> Result<()> {
        let Some(memory) = self.running.clone() else {
            return Err(self.usage("stop", "it is not running"));
        };
        // Buffers of a running device must not return to the pool.
        let is_own = |(rx, tx): &Pair<C>| {
            let own = (self.counters.rx(0), self.counters.tx(0));
            ptr::eq(rx.counters(), &*own.0) && ptr::eq(tx.counters(), &*own.1)
        };
        let Some((rx, tx)) = queues.into_pair().filter(is_own) else {
            return Err(self.usage("stop", "the queues belong to another port"));
        };
        self.drops.add_to(&self.counters, &self.hardware.bar);
        // The reset masks the interrupt.
        self.waiter = None;
        // It also clears TDH.
        let head = self.hardware.bar.read32(C::TX.head);
        if let Err(error) = quiesce(&self.chip, &self.hardware) {
            self.parked = Some(Box::new((rx, tx)));
            return Err(error);
        }
        rx.counters().unread.add(rx.unread() as u64);
        tx.counters().unfinished.add(tx.unfinished(head) as u64);
        self.running = None;
        let rx = rx.release(cache);
        self.idle = Some(Box::new(Rings { memory, rx, tx: tx.release(cache) }));
        Ok(())
    }

    fn retry_stop(&mut self, cache: &mut PoolCache) -> Result<()> {
        match self.parked.take() {
            Some(parked) => self.stop_pair(parked.0, parked.1, cache),
            None => Ok(()),
        }
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    /// Reports no read-only ring memory, because the device writes completions into the descriptors. Sizes
    /// include the padding for a ring's alignment.
    fn capabilities(&self) -> Capabilities {
        let ring_bytes = |config: &PortConfig| {
            let of = |queues: u16, descriptors: u16| {
                let len = usize::from(descriptors) * DESCRIPTOR;
                usize::from(queues) * (len + C::ring_alignment(len))
            };
            let rx = of(config.rx_queues, config.rx_descriptors);
            [rx + of(config.tx_queues, config.tx_descriptors), 0]
        };
        let descriptors = FEWEST..=MAX_DESCRIPTORS;
        let (dma_mask, max_frame) = (self.dma_mask, self.chip.max_frame());
        Capabilities {
            dma_mask,
            max_frame,
            descriptors,
            ring_bytes,
            rx_interrupts: true,
            ..Capabilities::default()
        }
    }

    /// Makes the driver pad short frames. PCI Express chips do not pad frames shorter than 17 bytes.
    fn pad_short_frames(&mut self) {
        self.pads = true;
    }

    fn link_event(&self) -> Option<BorrowedFd<'_>> {
        self.waiter.as_ref().map(Waiter::link_event)
    }

    /// Returns the link state, and sets flow control if the link has just come up.
    fn link(&self) -> Link {
        if let Some(waiter) = &self.waiter {
            waiter.take(&self.hardware.bar);
        }
        let status = self.hardware.bar.read32(STATUS);
        let link = link(status);
        if self.running.is_some() && self.linked.swap(link.up, Ordering::Relaxed) != link.up && link.up {
            follow_link(&self.chip, &self.hardware, status);
        }
        link
    }

    fn check(&mut self) -> Result<()> {
        self.hardware.wait("reach", STATUS, |_| true)?;
        self.drops.add_to(&self.counters, &self.hardware.bar);
        let link = self.link();
        match self.fault.take() {
            // Without a link the chip cannot send what is queued, so a full TX ring is not an error.
            Some(why) if link.up => Err(self.hardware.error(ErrorKind::Protocol, "continue using", why)),
            _ => Ok(()),
        }
    }

    /// Sets promiscuous mode, and writes RCTL only if the mode changes. QEMU's 82540EM receives nothing for a
    /// second after each write of RCTL, so this is best called before `start`.
    fn set_promiscuous(&mut self, on: bool) -> Result<()> {
        if self.is_attached {
            return check_filter(self.promiscuous, on);
        }
        if self.promiscuous != on {
            self.promiscuous = on;
            if self.running.is_some() {
                self.hardware.bar.write32(RCTL, self.rctl());
            }
        }
        Ok(())
    }

    fn counters(&self) -> &PortCounters {
        &self.counters
    }
}

impl<C: Chip> Drop for Device<C> {
    fn drop(&mut self) {
        let Some(memory) = self.running.take() else { return };
        if let Err(error) = quiesce(&self.chip, &self.hardware) {
            tracing::error!("{error}; its DMA memory is kept");
            memory.keep();
        }
    }
}
