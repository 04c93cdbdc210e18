//! Intel 8254x and 82574 Gigabit Ethernet: one driver, because both know the legacy descriptors.
//!
//! | chip | id | QEMU | reset |
//! |---|---|---|---|
//! | 82540, 82544, 82545, 82546 with copper | 8086:100e and others | `e1000` | CTRL.RST, through I/O space |
//! | 82574, 82583 | 8086:10d3, 10f6, 150c | `e1000e` | CTRL.RST, and the function's |
//!
//! Nothing is read from the EEPROM and no link is renegotiated: the station address is where the chip puts it,
//! and a link that is up stays up. Every wait ends after a second. What is done for QEMU's models alone says so.

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
use self::desc::Legacy;
use self::regs::*;
use crate::driver::{Args, PciDriver};
use crate::intel::{self, Drops, Hardware, OpaqueFunction, watermarks};
use crate::port::{Capabilities, Fault, Leftover, Link, MacAddr, Nic, PortConfig, Queues};

/// Fewest descriptors of a ring: two batches that TX reclaims.
const FEWEST: u16 = 2 * intel::RECLAIM as u16;
/// Most descriptors of a ring: 64 KiB of RDLEN or TDLEN (SDM 13.4).
const MOST: u16 = 4096;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// Link control, in the PCI Express capability, and its bits for ASPM's L0s and L1 (PCI Express 4.0, 7.5.3.7).
const LINK_CONTROL: u16 = 0x10;
const LINK_CONTROL_ASPM: u16 = 3;
/// Bytes of a step of FCRTL and FCRTH.
const WATERMARK_STEP: u32 = 8;

/// Receive queue of a port.
pub type RxQueue = intel::RxQueue<Legacy>;
/// Transmit queue of a port.
pub type TxQueue = intel::TxQueue<Legacy>;

/// A port of one of these chips.
#[derive(Debug)]
pub struct Device {
    chip: Chip,
    bar: Bar,
    /// I/O ports, of the chips that are reset through them.
    io: Option<Bar>,
    /// Goes after its registers.
    function: OpaqueFunction,
    dma_mask: u64,
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
            let what = format!("cannot use {} as e1000", function.address());
            return Err(Error::new(ErrorKind::Unavailable, what, format!("it is a {id}")));
        };
        function.set_command(false)?;
        let bar = function.bar(0)?;
        let io = chip.resets_through_io().then(|| reset::io_bar(&*function)).flatten();
        let mut device = Self {
            function: OpaqueFunction(function),
            chip,
            bar,
            io,
            dma_mask: u64::MAX,
            pads: !chip.is_82574(),
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
        device.dma_mask = device.reach()?;
        if chip.is_82574() {
            device.disable_aspm()?;
        }
        device.mac = device.hardware().station_address()?;
        Ok(device)
    }

    /// Highest address that the chip gives out. On conventional PCI the 8254x have 32 address lines that work: Linux
    /// saw transmitters hang with more (e1000_main.c, `e1000_probe`).
    ///
    /// # Errors
    /// `Unavailable` for an 82544 on PCI-X, which hangs at buffers that end where ours may (82544 specification update;
    /// Linux, `pcix_82544`).
    fn reach(&self) -> Result<u64> {
        let pcix = !self.chip.is_82574() && self.bar.read32(STATUS) & STATUS_PCIX_MODE != 0;
        if pcix && self.chip == Chip::I82544 {
            let why = "it is in a PCI-X slot, where an 82544 hangs; in a slot of conventional PCI it works";
            return Err(self.error(ErrorKind::Unavailable, "use", why));
        }
        Ok(if pcix || self.chip.is_82574() { u64::MAX } else { u32::MAX.into() })
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
        // Aligned to its size, a ring crosses no 64 KiB, at which the first 82545 and 82546 fail (erratum 23; Linux,
        // `e1000_check_64k_bound`). Packet buffers are aligned so, too.
        let ring = |entries: usize| {
            DmaRing::new(memory, entries, entries * DESCRIPTOR).map(|words| DescRing::new(words, entries - 1))
        };
        Ok(Box::new(Rings { memory: Arc::clone(memory), rx: ring(rx)?, tx: ring(tx)? }))
    }

    /// Writes what the chip must know before it may start (SDM 14.4 and 14.5, DS 4.6).
    fn set_up(&self, rx: &DescRing, tx: &DescRing) {
        let bar = &self.bar;
        for (ring, [low, high, len, head, tail]) in
            [(rx, [RDBAL, RDBAH, RDLEN, RDH, RDT]), (tx, [TDBAL, TDBAH, TDLEN, TDH, TDT])]
        {
            bar.write32(low, ring.iova() as u32);
            bar.write32(high, (ring.iova() >> 32) as u32);
            bar.write32(len, (ring.entries() * DESCRIPTOR) as u32);
            bar.write32(head, 0);
            bar.write32(tail, 0);
        }
        for word in 0..MTA_WORDS {
            bar.write32(MTA + 4 * word, 0);
        }
        bar.write32(RXCSUM, 0);
        bar.write32(TIPG, TIPG_COPPER);
        let mut cleared = CTRL_FRCSPD | CTRL_FRCDPX | CTRL_VME | CTRL_RFCE | CTRL_TFCE;
        if self.chip.is_82574() {
            cleared |= CTRL_GIO_MASTER_DISABLE | CTRL_82574_CLEAR;
            self.set_up_82574();
        }
        bar.write32(CTRL, bar.read32(CTRL) & !cleared | CTRL_SLU);
        self.hardware().prepare_flow_control(watermarks(bar.read32(PBA) & PBA_RXA, WATERMARK_STEP));
    }

    /// What is the 82574's alone.
    fn set_up_82574(&self) {
        let bar = &self.bar;
        // Legacy descriptors and one queue, whatever the last driver chose (DS 10.2.5).
        bar.write32(RFCTL, 0);
        bar.write32(MRQC, 0);
        // Bits that the manual reserves and the errata want, each with its source in `regs`.
        let change = |register, set, clear| self.hardware().change(register, set, clear);
        change(TXDCTL, TXDCTL_COUNT_DESC, 0);
        change(TARC0, TARC0_82574_SET, TARC0_82574_CLEAR);
        change(CTRL_EXT, CTRL_EXT_82574_SET, CTRL_EXT_82574_CLEAR);
        change(GCR, GCR_82574_SET, 0);
        change(GCR2, GCR2_82574_SET, 0);
    }

    /// Turns ASPM off, with which the 82574 loses completions and then sends nothing more (82574 specification update;
    /// Linux, `FLAG2_DISABLE_ASPM_L0S` and `_L1`). VFIO lets nobody write link control, so it may be root's to do.
    fn disable_aspm(&self) -> Result<()> {
        let function = &self.function.0;
        let express = capabilities(&**function)?.into_iter().find(|found| found.id == CAP_ID_EXPRESS);
        let Some(control) = express.map(|found| found.offset + LINK_CONTROL) else { return Ok(()) };
        let old = function.config16(control);
        if old & LINK_CONTROL_ASPM == 0 {
            return Ok(());
        }
        function.write_config(control, &(old & !LINK_CONTROL_ASPM).to_le_bytes())?;
        if function.config16(control) & LINK_CONTROL_ASPM != 0 {
            let address = function.address();
            tracing::warn!(
                "{address} may stop sending: ASPM is on, and an 82574 loses completions with it; run: echo 0 | tee \
                 /sys/bus/pci/devices/{address}/link/l*_aspm"
            );
        }
        Ok(())
    }

    fn rctl(&self) -> u32 {
        let all = if self.promiscuous { RCTL_UPE | RCTL_MPE } else { 0 };
        // A switch must not forward PAUSE frames, also if it receives all others (IEEE 802.1Q, 8.6.3).
        RCTL_EN | RCTL_BAM | RCTL_DPF | RCTL_SECRC | all
    }
}

impl PciDriver for Device {
    const NAME: &'static str = "e1000";
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
        self.set_up(&rings.rx, &rings.tx);
        if let Err(error) = self.wake_phy().and_then(|()| intel::fill::<Legacy>(&mut rings.rx, cache)) {
            self.idle = Some(rings);
            return Err(error);
        }
        self.drops.begin(&self.bar);
        self.fault.take();
        let mut rx = RxQueue::new(rings.rx, tails.0);
        let tx = TxQueue::new(rings.tx, tails.1, self.pads, self.fault.clone());
        self.running = Some(rings.memory);
        self.linked.store(false, Ordering::Relaxed);
        if let Err(error) = self.function.0.set_command(true) {
            self.stop_pair(rx, tx, cache)?;
            return Err(error);
        }
        let mulr = if self.chip.is_82574() { TCTL_MULR } else { 0 };
        self.bar.write32(TCTL, TCTL_EN | TCTL_PSP | TCTL_COLLISION | mulr);
        self.bar.write32(RCTL, self.rctl());
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

    /// Completions are written into the descriptors. A ring is aligned to its size, which may cost as much again.
    fn capabilities(&self) -> Capabilities {
        let ring_bytes = |config: &PortConfig| [config.descriptors() * DESCRIPTOR * 2, 0];
        let descriptors = FEWEST..=MOST;
        Capabilities { dma_mask: self.dma_mask, descriptors, ring_bytes, ..Capabilities::default() }
    }

    /// An 82574 does not pad frames of less than 17 bytes.
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

    /// QEMU's 82540EM receives nothing for a second after each write of RCTL, so this is best called before
    /// `start`, and writes only what changes.
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
