//! Intel 8254x and 82574 Gigabit Ethernet: one driver, because both know the legacy descriptors.
//!
//! | chip | id | QEMU | reset |
//! |---|---|---|---|
//! | 82540EM, 82545EM, 82544GC | 8086:100e, 100f, 1008 | `e1000` | CTRL.RST and registers by hand |
//! | 82574L | 8086:10d3 | `e1000e` | CTRL.RST and function reset |
//!
//! Nothing is read from the EEPROM and no link is renegotiated: the station address is where the chip puts it,
//! and a link that is up stays up. Every wait ends after a second.

pub mod regs;
mod rx;
#[cfg(test)]
mod tests;
mod tx;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::dma::{DmaMemory, DmaRing, PoolCache};
use vireo_eal::mmio::Bar;
use vireo_eal::{Error, ErrorKind, Result};

use self::regs::*;
pub use self::rx::RxQueue;
pub use self::tx::TxQueue;
use crate::port::{Fault, Leftover, Link, MacAddr, Nic, QueueSizes};

/// Chips that this driver knows.
pub const IDS: &[(DeviceId, &str)] = &[
    (DeviceId { vendor: 0x8086, device: 0x100E }, "Intel 82540EM"),
    (DeviceId { vendor: 0x8086, device: 0x100F }, "Intel 82545EM"),
    (DeviceId { vendor: 0x8086, device: 0x1008 }, "Intel 82544GC"),
    (ID_82574L, "Intel 82574L"),
];
const ID_82574L: DeviceId = DeviceId { vendor: 0x8086, device: 0x10D3 };

/// Fewest descriptors of a ring: two batches that TX reclaims.
const FEWEST: u16 = 2 * tx::RECLAIM as u16;
/// Most descriptors of a ring: 64 KiB of RDLEN or TDLEN (SDM 13.4).
const MOST: u16 = 4096;
/// Alignment that RDBAL and TDBAL ask for is 16 bytes; a cache line keeps neighbours apart.
const ALIGNMENT: usize = 64;
/// Longest wait for the device.
const PATIENCE: Duration = Duration::from_secs(1);

/// Counters of frames that the device dropped. RNBC is none of them: its frames wait in the FIFO and may still
/// be received (SDM 13.7); nor is RUC, which QEMU counts for frames that it pads and delivers.
const DROPS: [(&str, u64); 4] = [
    ("rx_missed_errors", MPC),
    ("rx_crc_errors", CRCERRS),
    ("rx_align_errors", ALGNERRC),
    ("rx_long_length_errors", ROC),
];

/// A port of one of these chips.
#[derive(Debug)]
pub struct Device {
    function: OpaqueFunction,
    bar: Bar,
    mac: MacAddr,
    promiscuous: bool,
    drops: [u64; DROPS.len()],
    fault: Fault,
    /// What the device may write to: kept from `start` to a reset that the device confirmed.
    running: Option<Arc<DmaMemory>>,
    /// Queues of a stop whose reset the device did not confirm.
    parked: Option<Box<(RxQueue, TxQueue)>>,
    leftover: Leftover,
    /// Rings of the last run, because memory for rings is never given back.
    idle: Option<Rings>,
}

#[derive(Debug)]
struct Rings {
    memory: Arc<DmaMemory>,
    rx: DmaRing<u64, 2>,
    tx: DmaRing<u64, 2>,
}

/// Shows a function by its address.
struct OpaqueFunction(Box<dyn Function>);

impl std::fmt::Debug for OpaqueFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.address())
    }
}

impl Device {
    /// Takes the function, resets it and reads its station address. It may not start DMA before `start`.
    ///
    /// # Errors
    /// `Unavailable` when it is none of [`IDS`], has no BAR 0, or its registers read all ones; `Protocol` when
    /// it does not finish its reset or has no station address.
    pub fn probe(function: Box<dyn Function>) -> Result<Self> {
        let id = function.id();
        let what = || format!("cannot use {} as e1000", function.address());
        if !IDS.iter().any(|(known, _)| *known == id) {
            return Err(Error::new(ErrorKind::Unavailable, what(), format!("it is a {id}")));
        }
        function.set_command(false)?;
        let bar = function.bar(0)?;
        let mut device = Self {
            function: OpaqueFunction(function),
            bar,
            mac: MacAddr([0; 6]),
            promiscuous: false,
            drops: [0; DROPS.len()],
            fault: Fault::default(),
            running: None,
            parked: None,
            leftover: Leftover::default(),
            idle: None,
        };
        device.quiesce()?;
        device.mac = device.station_address()?;
        Ok(device)
    }

    fn is_82574(&self) -> bool {
        self.function.0.id() == ID_82574L
    }

    /// An error about this device.
    fn error(&self, kind: ErrorKind, what: &str, why: &str) -> Error {
        Error::new(kind, format!("cannot {what} {}", self.function.0.address()), why)
    }

    /// Polls until `done`, a second at most. A device that is gone reads all ones, which is an error at once.
    fn wait(&self, what: &str, register: u64, done: impl Fn(u32) -> bool) -> Result<u32> {
        let start = Instant::now();
        loop {
            let value = self.bar.read32(register);
            if value == u32::MAX {
                return Err(self
                    .error(ErrorKind::Unavailable, what, "its registers read all ones")
                    .mend("see whether it is still there: lspci"));
            }
            if done(value) {
                return Ok(value);
            }
            if start.elapsed() > PATIENCE {
                let why = format!("register {register:#x} stays {value:#x} for a second");
                return Err(self.error(ErrorKind::Protocol, what, &why));
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Ends all DMA and brings the registers that matter to their reset values. Once it succeeds, memory that
    /// the device knew can be used for something else.
    fn quiesce(&self) -> Result<()> {
        let (function, bar) = (&self.function.0, &self.bar);
        function.set_command(false)?;
        self.wait("reset", STATUS, |_| true)?;
        bar.write32(IMC, u32::MAX);
        bar.write32(RCTL, 0);
        bar.write32(TCTL, 0);
        if self.is_82574() {
            // Requests that are under way when CTRL.RST comes can hang PCI Express (DS 10.2.2, CTRL).
            bar.write32(CTRL, bar.read32(CTRL) | CTRL_GIO_MASTER_DISABLE);
            if let Err(error) = self.wait("pause", STATUS, |status| status & STATUS_GIO_MASTER_ENABLE == 0) {
                tracing::warn!("{error}");
            }
        }
        bar.write32(CTRL, bar.read32(CTRL) | CTRL_RST);
        // The chips want a microsecond of rest before the next access (SDM 13.4, CTRL.RST).
        std::thread::sleep(Duration::from_micros(1));
        if let Err(error) = self.wait("reset", CTRL, |ctrl| ctrl & CTRL_RST == 0) {
            // The function's own reset takes 100 ms, so it is for a chip that does not answer.
            if !function.reset()? {
                return Err(error);
            }
            function.set_command(false)?;
        }
        // The rest of it: QEMU's 82540EM clears CTRL.RST and nothing else.
        bar.write32(IMC, u32::MAX);
        for register in [RCTL, TCTL, RDH, RDT, TDH, TDT, RDLEN, TDLEN] {
            bar.write32(register, 0);
        }
        Ok(())
    }

    /// What the chip loaded from its EEPROM, a moment after the reset.
    fn station_address(&self) -> Result<MacAddr> {
        let what = "read the station address of";
        let high = self.wait(what, RAH0, |high| high & RAH_AV != 0)?.to_le_bytes();
        let low = self.bar.read32(RAL0).to_le_bytes();
        let mac = [low[0], low[1], low[2], low[3], high[0], high[1]];
        if mac[0] & 1 != 0 || mac == [0; 6] {
            let why = format!("{} is no address of a station", MacAddr(mac));
            return Err(self.error(ErrorKind::Protocol, what, &why));
        }
        Ok(MacAddr(mac))
    }

    /// Rings of these sizes: those of the last run if they fit.
    fn rings(&mut self, memory: &Arc<DmaMemory>, sizes: QueueSizes) -> Result<Rings> {
        let (rx, tx) = (usize::from(sizes.rx), usize::from(sizes.tx));
        if let Some(idle) = self.idle.take_if(|idle| {
            Arc::ptr_eq(&idle.memory, memory) && idle.rx.entries() == rx && idle.tx.entries() == tx
        }) {
            return Ok(idle);
        }
        Ok(Rings {
            memory: Arc::clone(memory),
            rx: DmaRing::new(memory, rx, ALIGNMENT)?,
            tx: DmaRing::new(memory, tx, ALIGNMENT)?,
        })
    }

    /// Writes what the chip must know before it may start (SDM 14.4 and 14.5, DS 4.6).
    fn set_up(&self, rx: &DmaRing<u64, 2>, tx: &DmaRing<u64, 2>) {
        let bar = &self.bar;
        for (ring, [low, high, len, head, tail]) in
            [(rx, [RDBAL, RDBAH, RDLEN, RDH, RDT]), (tx, [TDBAL, TDBAH, TDLEN, TDH, TDT])]
        {
            bar.write32(low, ring.iova() as u32);
            bar.write32(high, (ring.iova() >> 32) as u32);
            bar.write32(len, (ring.entries() * 16) as u32);
            bar.write32(head, 0);
            bar.write32(tail, 0);
        }
        for word in 0..MTA_WORDS {
            bar.write32(MTA + 4 * word, 0);
        }
        bar.write32(RXCSUM, 0);
        bar.write32(TIPG, TIPG_COPPER);
        if self.is_82574() {
            // Legacy descriptors and one queue, whatever the last driver chose.
            bar.write32(RFCTL, 0);
            bar.write32(MRQC, 0);
            bar.write32(TXDCTL, bar.read32(TXDCTL) | TXDCTL_COUNT_DESC);
        }
        let forced = CTRL_GIO_MASTER_DISABLE | CTRL_FRCSPD | CTRL_FRCDPX | CTRL_VME;
        bar.write32(CTRL, bar.read32(CTRL) & !forced | CTRL_SLU);
    }

    /// Wakes a PHY that the kernel's driver put to sleep; it then negotiates by itself.
    fn wake_phy(&self) -> Result<()> {
        if self.wait("start", STATUS, |_| true)? & STATUS_LU != 0 {
            return Ok(());
        }
        let mdic = |operation: u32| {
            self.bar.write32(MDIC, operation | PHY_CONTROL << MDIC_REG_SHIFT | MDIC_PHY);
            self.wait("reach the PHY of", MDIC, |mdic| mdic & (MDIC_READY | MDIC_ERROR) != 0)
        };
        let read = mdic(MDIC_OP_READ)?;
        let control = read as u16;
        if read & MDIC_ERROR == 0 && control & PHY_CONTROL_POWER_DOWN != 0 {
            mdic(MDIC_OP_WRITE | u32::from(control & !PHY_CONTROL_POWER_DOWN))?;
        }
        Ok(())
    }

    fn rctl(&self) -> u32 {
        let all = if self.promiscuous { RCTL_UPE | RCTL_MPE } else { 0 };
        RCTL_EN | RCTL_BAM | RCTL_SECRC | all
    }
}

impl Nic for Device {
    type Rx = RxQueue;
    type Tx = TxQueue;

    /// Ring sizes are 64 to 4096. There is one pair.
    fn start_pairs(
        &mut self,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
        sizes: QueueSizes,
        pairs: u16,
    ) -> Result<Vec<(RxQueue, TxQueue)>> {
        self.retry_stop(cache)?;
        if pairs != 1 {
            return Err(self.error(ErrorKind::Usage, "start", "e1000 has one pair of queues"));
        }
        if self.running.is_some() {
            return Err(self.error(ErrorKind::Usage, "start", "it runs already"));
        }
        if [sizes.rx, sizes.tx].iter().any(|n| !n.is_power_of_two() || !(FEWEST..=MOST).contains(n)) {
            let why = format!("its rings have {FEWEST} to {MOST} descriptors, a power of two");
            return Err(self.error(ErrorKind::Usage, "start", &why));
        }
        let tails = (self.bar.doorbell32(RDT)?, self.bar.doorbell32(TDT)?);
        let rings = self.rings(memory, sizes)?;
        self.set_up(&rings.rx, &rings.tx);
        let buffers = match self.wake_phy().and_then(|()| rx::filled(rings.rx.entries(), cache)) {
            Ok(buffers) => buffers,
            Err(error) => {
                self.idle = Some(rings);
                return Err(error);
            }
        };
        self.device_drops();
        self.drops = [0; DROPS.len()];
        let mut rx = RxQueue::new(rings.rx, buffers, tails.0, cache);
        self.fault.take();
        let tx = TxQueue::new(rings.tx, tails.1, !self.is_82574(), self.fault.clone());
        self.running = Some(Arc::clone(memory));
        if let Err(error) = self.function.0.set_command(true) {
            self.stop(rx, tx, cache)?;
            return Err(error);
        }
        let mulr = if self.is_82574() { TCTL_MULR } else { 0 };
        self.bar.write32(TCTL, TCTL_EN | TCTL_PSP | TCTL_COLLISION | mulr);
        self.bar.write32(RCTL, self.rctl());
        rx.announce();
        Ok(vec![(rx, tx)])
    }

    fn stop_pairs(
        &mut self,
        mut queues: Vec<(RxQueue, TxQueue)>,
        cache: &mut PoolCache,
        sent: Option<&mut PoolCache>,
    ) -> Result<()> {
        let Some((rx, tx)) = queues.pop() else { return Ok(()) };
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
        self.idle = Some(Rings { memory, rx, tx: tx.release(sent.unwrap_or(cache)) });
        Ok(())
    }

    fn retry_stop(&mut self, cache: &mut PoolCache) -> Result<()> {
        match self.parked.take() {
            Some(parked) => self.stop(parked.0, parked.1, cache),
            None => Ok(()),
        }
    }

    fn mac(&self) -> MacAddr {
        self.mac
    }

    fn link(&self) -> Link {
        let status = self.bar.read32(STATUS);
        let up = status != u32::MAX && status & STATUS_LU != 0;
        let speed = [10, 100, 1000, 1000][(status >> STATUS_SPEED_SHIFT & 3) as usize];
        Link { up, speed: up.then_some(speed), full_duplex: up && status & STATUS_FD != 0 }
    }

    fn check(&mut self) -> Result<()> {
        self.wait("reach", STATUS, |_| true)?;
        match self.fault.take() {
            // Without a link the chip keeps what it has to send.
            Some(why) if self.link().up => Err(self.error(ErrorKind::Protocol, "go on with", why)),
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
        DROPS
            .iter()
            .zip(&mut self.drops)
            .map(|((name, register), sum)| {
                let count = self.bar.read32(*register);
                // All ones: the device is gone and counts no more.
                *sum += if count == u32::MAX { 0 } else { u64::from(count) };
                (*name, *sum)
            })
            .collect()
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
