//! Port of a controller of any family: probe, start, stop, and queries in between.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vireo_bus_pci::{DeviceId, Function, Interrupt};
use vireo_eal::dma::{DescRing, DmaMemory, DmaRing, PoolCache};
use vireo_eal::{Error, ErrorKind, Result};

use super::counter::Drops;
use super::hardware::link;
use super::interrupt::{self, RxInterrupt};
use super::phy::{follow_link, wake};
use super::regs::*;
use super::reset::quiesce;
use super::rx::fill;
use super::tx::RECLAIM;
use super::{Chip, Hardware, RxQueue, TxQueue};
use crate::counters::PortCounters;
use crate::driver::{Args, PciDriver};
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
    /// Whether flow control has been set for the current link.
    linked: AtomicBool,
    mac: MacAddr,
    promiscuous: bool,
    /// Whether a frame may span several descriptors.
    scattered: bool,
    drops: Drops,
    fault: Fault,
    /// Interrupt, enabled by the first start that asks for it.
    interrupt: Option<Interrupt>,
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

impl<C: Chip> Device<C> {
    /// Takes ownership of the function, resets it and reads its station address. The function may not start
    /// DMA before `start`.
    ///
    /// # Errors
    /// `Unavailable` when the function's id is not in [`PciDriver::IDS`], it has no BAR 0, it cannot work in
    /// its slot, or its registers read as all ones. `Protocol` when it does not finish its reset or has no
    /// station address.
    pub fn probe(function: Box<dyn Function>) -> Result<Self> {
        let Some(chip) = C::of(&*function) else {
            let what = format!("cannot use {} as {}", function.address(), C::NAME);
            return Err(Error::new(ErrorKind::Unavailable, what, format!("it is a {}", function.id())));
        };
        function.set_command(false)?;
        let hardware = Hardware { bar: function.bar(0)?, function };
        quiesce(&chip, &hardware)?;
        let dma_mask = chip.prepare(&hardware)?;
        Ok(Self {
            dma_mask,
            pads: !chip.is_express(),
            linked: AtomicBool::new(false),
            mac: hardware.station_address()?,
            promiscuous: false,
            scattered: false,
            drops: Drops::default(),
            fault: Fault::default(),
            interrupt: None,
            running: None,
            parked: None,
            counters: Drops::port_counters(),
            idle: None,
            chip,
            hardware,
        })
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

    /// Configures the chip for a start (SDM 14.4 and 14.5, DS 4.6, 82576 4.5), and fills the RX ring with
    /// buffers.
    fn set_up(&self, config: &PortConfig, rings: &mut Rings, cache: &mut PoolCache) -> Result<()> {
        let bar = &self.hardware.bar;
        for (ring, registers) in [(&rings.rx, C::RX), (&rings.tx, C::TX)] {
            bar.write32(registers.base_low, ring.iova() as u32);
            bar.write32(registers.base_high, (ring.iova() >> 32) as u32);
            bar.write32(registers.len, (ring.entries() * DESCRIPTOR) as u32);
            bar.write32(registers.head, 0);
            bar.write32(registers.tail, 0);
        }
        self.chip.set_up(&self.hardware, config)?;
        wake(&self.chip, &self.hardware)?;
        fill::<C::Format>(&mut rings.rx, cache)
    }

    /// Lets the chip start DMA.
    fn enable(&self) -> Result<()> {
        self.hardware.function.set_command(true)?;
        if self.interrupt.as_ref().is_some_and(Interrupt::is_line) {
            self.hardware.function.allow_intx()?;
        }
        self.chip.enable(&self.hardware, self.rctl())
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
        self.scattered = config.is_scattered();
        if self.scattered && self.chip.make_room(&self.hardware, config.max_frame) {
            quiesce(&self.chip, &self.hardware)?;
        }
        if config.rx_interrupts && self.interrupt.is_none() {
            self.interrupt = interrupt::enable(&self.hardware, self.chip.is_express())?;
        }
        let interrupt = self.interrupt.clone().filter(|_| config.rx_interrupts);
        let interrupt = interrupt.map(|interrupt| RxInterrupt::new(interrupt, &self.hardware));
        let bar = &self.hardware.bar;
        let tails = (bar.doorbell32(C::RX.tail)?, bar.doorbell32(C::TX.tail)?);
        let mut rings = self.rings(memory, config)?;
        if let Err(error) = self.set_up(config, &mut rings, cache) {
            self.idle = Some(rings);
            return Err(error);
        }
        self.drops.begin(&self.hardware.bar);
        self.fault.take();
        let long = self.scattered.then_some(config.max_frame);
        let mut rx = RxQueue::new(rings.rx, tails.0, self.counters.rx(0), long, interrupt);
        let tx = TxQueue::new(rings.tx, tails.1, self.counters.tx(0), self.pads, long, self.fault.clone());
        self.running = Some(rings.memory);
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
        // The reset clears TDH.
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

    /// Returns the link state, and sets flow control if the link has just come up.
    fn link(&self) -> Link {
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
