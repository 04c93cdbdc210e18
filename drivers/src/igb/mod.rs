//! Intel 82576 and I350 Gigabit Ethernet: advanced descriptors, one pair of queues of the eight or more that there are.
//!
//! | chip | id | QEMU | reset |
//! |---|---|---|---|
//! | 82576 with copper | 8086:10c9, 10e8, 150a, 1526 | `igb`, from 8.0 on | CTRL.RST, and the function's |
//! | I350 with copper | 8086:1521 | | the same |
//!
//! Nothing is read from the EEPROM: the station address is where the chip puts it. A link that is up stays up. RSS, VMDq and
//! SR-IOV are off, and frames are those of Ethernet: up to 1518 bytes, or 1522 with a VLAN tag. Every wait ends after a second.
//! What is done for QEMU's model alone says so.

mod chip;
mod desc;
mod phy;
pub mod regs;
mod reset;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vireo_bus_pci::{CAP_ID_EXPRESS, DeviceId, Function, capabilities};
use vireo_eal::dma::{DescRing, DmaMemory, DmaRing, PoolCache};
use vireo_eal::mmio::Bar;
use vireo_eal::{Error, ErrorKind, Result};

use self::chip::{Chip, IDS};
use self::desc::Advanced;
use self::regs::*;
use crate::driver::{Args, PciDriver};
use crate::intel::{self, Drops, Hardware, OpaqueFunction, watermarks};
use crate::port::{Capabilities, Fault, Leftover, Link, MacAddr, Nic, PortConfig, Queues};

/// Fewest descriptors of a ring: two batches that TX reclaims.
const FEWEST: u16 = 2 * intel::RECLAIM as u16;
/// Most descriptors of a ring (Linux, `IGB_MAX_RXD`).
const MOST: u16 = 4096;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// A ring's address and size are multiples of so many bytes (DS 8.10, RDBAL and RDLEN).
const ALIGN: usize = 128;
/// Bytes of a step of FCRTL and FCRTH.
const WATERMARK_STEP: u32 = 16;
/// Device Control 2, in the PCI Express capability, and its value for completions of 16 ms to 55 ms (PCI Express 4.0,
/// 7.5.3.16).
const DEVICE_CONTROL_2: u16 = 0x28;
const COMPLETION_TIMEOUT_16MS: u16 = 5;

/// Receive queue of a port.
pub type RxQueue = intel::RxQueue<Advanced>;
/// Transmit queue of a port.
pub type TxQueue = intel::TxQueue<Advanced>;

/// A port of one of these chips.
#[derive(Debug)]
pub struct Device {
    chip: Chip,
    bar: Bar,
    /// Goes after its registers.
    function: OpaqueFunction,
    /// Whether the driver pads short frames.
    pads: bool,
    /// Whether flow control is set for the link that is up.
    linked: AtomicBool,
    mac: MacAddr,
    promiscuous: bool,
    drops: Drops,
    fault: Fault,
    /// What the device may write to: kept from `start` to a reset that the device confirmed.
    running: Option<Arc<DmaMemory>>,
    /// Queues of a stop whose reset the device did not confirm.
    parked: Option<Box<(RxQueue, TxQueue)>>,
    leftover: Leftover,
    /// Rings of the last run, because memory for rings is never given back.
    idle: Option<Box<Rings>>,
}

#[derive(Debug)]
struct Rings {
    memory: Arc<DmaMemory>,
    rx: DescRing,
    tx: DescRing,
}

impl Device {
    /// Takes the function, resets it and reads its station address. It may not start DMA before `start`.
    ///
    /// # Errors
    /// `Unavailable` when it is none of [`PciDriver::IDS`], has no BAR 0, or its registers read all ones; `Protocol` when
    /// it does not finish its reset or has no station address.
    pub fn probe(function: Box<dyn Function>) -> Result<Self> {
        let id = function.id();
        let Some(chip) = Chip::of(id) else {
            let what = format!("cannot use {} as igb", function.address());
            return Err(Error::new(ErrorKind::Unavailable, what, format!("it is a {id}")));
        };
        function.set_command(false)?;
        let bar = function.bar(0)?;
        let mut device = Self {
            function: OpaqueFunction(function),
            chip,
            bar,
            pads: false,
            linked: AtomicBool::new(false),
            mac: MacAddr([0; 6]),
            promiscuous: false,
            drops: Drops::default(),
            fault: Fault::default(),
            running: None,
            parked: None,
            leftover: Leftover::default(),
            idle: None,
        };
        device.quiesce()?;
        // A killed process may have left it taken; no other process may use this port.
        device.disown_phy();
        device.mac = device.hardware().station_address()?;
        Ok(device)
    }

    fn hardware(&self) -> Hardware<'_> {
        Hardware { bar: &self.bar, address: self.function.0.address() }
    }

    fn error(&self, kind: ErrorKind, what: &str, why: &str) -> Error {
        self.hardware().error(kind, what, why)
    }

    /// Rings of these sizes: those of the last run if they fit.
    fn rings(&mut self, memory: &Arc<DmaMemory>, config: &PortConfig) -> Result<Box<Rings>> {
        let (rx, tx) = (usize::from(config.rx_descriptors), usize::from(config.tx_descriptors));
        if let Some(idle) = self.idle.take_if(|idle| {
            Arc::ptr_eq(&idle.memory, memory) && idle.rx.entries() == rx && idle.tx.entries() == tx
        }) {
            return Ok(idle);
        }
        let ring = |entries: usize| {
            DmaRing::new(memory, entries, ALIGN).map(|words| DescRing::new(words, entries - 1))
        };
        Ok(Box::new(Rings { memory: Arc::clone(memory), rx: ring(rx)?, tx: ring(tx)? }))
    }

    /// Writes what the chip must know before it may start (DS 4.5).
    fn set_up(&self, rx: &DescRing, tx: &DescRing) -> Result<()> {
        let (bar, hardware) = (&self.bar, self.hardware());
        for (ring, [low, high, len, head, tail]) in
            [(rx, [RDBAL, RDBAH, RDLEN, RDH, RDT]), (tx, [TDBAL, TDBAH, TDLEN, TDH, TDT])]
        {
            bar.write32(low, ring.iova() as u32);
            bar.write32(high, (ring.iova() >> 32) as u32);
            bar.write32(len, (ring.entries() * DESCRIPTOR) as u32);
            bar.write32(head, 0);
            bar.write32(tail, 0);
        }
        bar.write32(SRRCTL, SRRCTL_BSIZEPACKET_2K | SRRCTL_DESCTYPE_ADVANCED);
        bar.write32(RXDCTL, QUEUE_THRESHOLDS | QUEUE_ENABLE);
        bar.write32(TXDCTL, QUEUE_THRESHOLDS | QUEUE_ENABLE);
        for word in 0..MTA_WORDS {
            bar.write32(MTA + 4 * word, 0);
        }
        // Queue 0 receives everything: neither RSS nor VMDq.
        bar.write32(MRQC, 0);
        bar.write32(VT_CTL, 0);
        bar.write32(RXCSUM, 0);
        if self.chip == Chip::I82576 {
            self.lengthen_completion_timeout()?;
        }
        let cleared = CTRL_FRCSPD | CTRL_FRCDPX | CTRL_VME | CTRL_RFCE | CTRL_TFCE | CTRL_GIO_MASTER_DISABLE;
        hardware.change(CTRL, CTRL_SLU, cleared);
        hardware.change(CTRL_EXT, CTRL_EXT_DRV_LOAD, 0);
        hardware.prepare_flow_control(watermarks(self.chip.fifo_kib(bar.read32(RXPBS)), WATERMARK_STEP));
        Ok(())
    }

    /// Sets the completion timeout that PCI Express recommends, instead of the chip's millisecond, and disables resending, which
    /// repeats a request that the IOMMU refuses without end (Linux, `igb_set_pcie_completion_timeout`).
    fn lengthen_completion_timeout(&self) -> Result<()> {
        let gcr = self.bar.read32(GCR);
        let mut wanted = gcr & !GCR_COMPLETION_RESEND;
        if gcr & GCR_COMPLETION_TIMEOUT == 0 {
            if gcr & GCR_CAP_VER2 == 0 {
                wanted |= GCR_COMPLETION_TIMEOUT_10MS;
            } else {
                let function = &self.function.0;
                let express = capabilities(&**function)?.into_iter().find(|found| found.id == CAP_ID_EXPRESS);
                if let Some(control) = express.map(|found| found.offset + DEVICE_CONTROL_2) {
                    let value = function.config16(control) | COMPLETION_TIMEOUT_16MS;
                    function.write_config(control, &value.to_le_bytes())?;
                }
            }
        }
        self.bar.write32(GCR, wanted);
        Ok(())
    }

    fn rctl(&self) -> u32 {
        let all = if self.promiscuous { RCTL_UPE | RCTL_MPE } else { 0 };
        // A switch must not forward PAUSE frames, also if it receives all others (IEEE 802.1Q, 8.6.3).
        RCTL_EN | RCTL_BAM | RCTL_DPF | RCTL_SECRC | all
    }

    /// Enables receiver and transmitter, and waits until the chip confirms that its queues are enabled.
    fn enable(&self) -> Result<()> {
        self.function.0.set_command(true)?;
        self.hardware().change(TCTL, TCTL_EN | TCTL_PSP, 0);
        self.bar.write32(RCTL, self.rctl());
        for queue in [RXDCTL, TXDCTL] {
            self.hardware().wait("start", queue, |control| control & QUEUE_ENABLE != 0)?;
        }
        Ok(())
    }
}

impl PciDriver for Device {
    const NAME: &'static str = "igb";
    const IDS: &'static [(DeviceId, &'static str)] = IDS;
    const KEYS: &'static [&'static str] = &[];

    fn open(function: Box<dyn Function>, _args: Args<'_>) -> Result<Self> {
        Self::probe(function)
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
        self.retry_stop(cache)?;
        if self.running.is_some() {
            return Err(self.error(ErrorKind::Usage, "start", "it runs already"));
        }
        if let Some(why) = config.unfit(&self.capabilities()) {
            return Err(self.error(ErrorKind::Usage, "start", &why));
        }
        let tails = (self.bar.doorbell32(RDT)?, self.bar.doorbell32(TDT)?);
        let mut rings = self.rings(memory, config)?;
        let set_up = self
            .set_up(&rings.rx, &rings.tx)
            .and_then(|()| self.wake_phy())
            .and_then(|()| intel::fill::<Advanced>(&mut rings.rx, cache));
        if let Err(error) = set_up {
            self.idle = Some(rings);
            return Err(error);
        }
        self.drops.begin(&self.bar);
        self.fault.take();
        let mut rx = RxQueue::new(rings.rx, tails.0);
        let tx = TxQueue::new(rings.tx, tails.1, self.pads, self.fault.clone());
        self.running = Some(rings.memory);
        self.linked.store(false, Ordering::Relaxed);
        if let Err(error) = self.enable() {
            self.stop_pair(rx, tx, cache)?;
            return Err(error);
        }
        rx.announce();
        // Sets flow control for a link that is up already.
        self.link();
        Ok(Queues::pair(rx, tx))
    }

    fn stop(
        &mut self,
        queues: Queues<RxQueue, TxQueue>,
        cache: &mut PoolCache,
        sent: Option<&mut PoolCache>,
    ) -> Result<()> {
        let Some((rx, tx)) = queues.into_pair() else { return Ok(()) };
        let Some(memory) = self.running.clone() else {
            return Err(self.error(ErrorKind::Usage, "stop", "it does not run"));
        };
        self.device_drops();
        // The reset clears it.
        let head = self.bar.read32(TDH);
        if let Err(error) = self.quiesce() {
            // A later start gets one cache, for buffers of one pool.
            self.parked = sent.is_none().then(|| Box::new((rx, tx)));
            return Err(error);
        }
        self.leftover.rx_unread += rx.unread() as u64;
        self.leftover.tx_unfinished += tx.unfinished(head) as u64;
        self.running = None;
        let rx = rx.release(cache);
        self.idle = Some(Box::new(Rings { memory, rx, tx: tx.release(sent.unwrap_or(cache)) }));
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

    /// Completions are written into the descriptors.
    fn capabilities(&self) -> Capabilities {
        let ring_bytes = |config: &PortConfig| [config.descriptors() * DESCRIPTOR + 2 * ALIGN, 0];
        Capabilities { descriptors: FEWEST..=MOST, ring_bytes, ..Capabilities::default() }
    }

    /// The chip does not pad frames of less than 17 bytes.
    fn pad_short_frames(&mut self) {
        self.pads = true;
    }

    /// Sets flow control, too, if the link has just come up.
    fn link(&self) -> Link {
        let status = self.bar.read32(STATUS);
        let link = intel::link(status);
        if self.running.is_some() && self.linked.swap(link.up, Ordering::Relaxed) != link.up && link.up {
            self.follow_link(status);
        }
        link
    }

    fn check(&mut self) -> Result<()> {
        self.hardware().wait("reach", STATUS, |_| true)?;
        let link = self.link();
        match self.fault.take() {
            // Without a link the chip keeps what it has to send.
            Some(why) if link.up => Err(self.error(ErrorKind::Protocol, "go on with", why)),
            _ => Ok(()),
        }
    }

    fn set_promiscuous(&mut self, on: bool) -> Result<()> {
        if self.promiscuous != on {
            self.promiscuous = on;
            if self.running.is_some() {
                self.bar.write32(RCTL, self.rctl());
            }
        }
        Ok(())
    }

    fn device_drops(&mut self) -> Vec<(&'static str, u64)> {
        self.drops.read(&self.bar)
    }

    fn leftover(&self) -> Leftover {
        self.leftover
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let Some(memory) = self.running.take() else { return };
        if let Err(error) = self.quiesce() {
            tracing::error!("{error}; its memory is kept");
            memory.keep();
        }
    }
}
