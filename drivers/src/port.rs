//! Ports and their queues: what every driver implements, and what it counts.

use std::fmt;
use std::ops::AddAssign;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, DmaMemory, PoolCache};
use vireo_eal::{Error, ErrorKind, Result};

/// Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether a station can have it: neither a group's nor all zero (IEEE 802, 8.2).
    pub fn is_valid_station(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    /// As DPDK prints it: `52:54:00:12:34:56`, hexadecimal in capitals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02X}:{b:02X}:{c:02X}:{d:02X}:{e:02X}:{g:02X}")
    }
}

impl FromStr for MacAddr {
    type Err = Error;

    /// Reads six pairs of hexadecimal digits between colons.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let mut bytes = [0; 6];
        let filled = bytes.iter_mut().all(|byte| {
            let digits = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'));
            digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).map(|value| *byte = value).is_some()
        });
        if filled && parts.next().is_none() {
            return Ok(Self(bytes));
        }
        Err(Error::new(
            ErrorKind::Usage,
            "cannot read an Ethernet address",
            "it is not of the form 52:54:00:12:34:56",
        ))
    }
}

/// What a device can do, and what it needs, as far as that concerns others than its driver.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// Highest device address that it can use: all of its memory must be below. A chip cuts off what is above, and says
    /// nothing.
    pub dma_mask: u64,
    /// Whether it may bring frames shorter than Ethernet's 60 bytes.
    pub receives_short_frames: bool,
    /// What a pair of its rings takes of DMA memory: bytes that the device writes, and bytes that it only reads.
    pub ring_bytes: fn(QueueSizes) -> [usize; 2],
}

impl Default for Capabilities {
    /// All addresses, no short frames, and no rings of its own.
    fn default() -> Self {
        Self { dma_mask: u64::MAX, receives_short_frames: false, ring_bytes: |_| [0, 0] }
    }
}

/// State of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whether a partner answers.
    pub up: bool,
    /// Speed in Mbit/s, where the device tells.
    pub speed: Option<u32>,
    /// Whether both directions work at once.
    pub full_duplex: bool,
    /// Whether both ends agree on speed and duplex by themselves.
    pub autoneg: bool,
}

/// Sizes of a port's queues, in descriptors; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSizes {
    /// Descriptors of the RX queue.
    pub rx: u16,
    /// Descriptors of the TX queue.
    pub tx: u16,
}

/// What a queue counted. The sums are the lcore's own; nothing here is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Packets received, or handed to the device.
    pub packets: u64,
    /// Their bytes, without frame check sequence.
    pub bytes: u64,
    /// Packets that the device marked bad, or that do not fit into a buffer; dropped.
    pub errors: u64,
    /// Times that no free buffer was there to receive into.
    pub no_buffer: u64,
    /// Completions that contradict our own record of the ring.
    pub device_errors: u64,
    /// Doorbell writes.
    pub doorbells: u64,
}

impl AddAssign for QueueStats {
    fn add_assign(&mut self, more: Self) {
        self.packets += more.packets;
        self.bytes += more.bytes;
        self.errors += more.errors;
        self.no_buffer += more.no_buffer;
        self.device_errors += more.device_errors;
        self.doorbells += more.doorbells;
    }
}

/// What was on its way when the queues of a port were stopped, and is lost: of all stops so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leftover {
    /// Buffers that the device had filled and nobody had received.
    pub rx_unread: u64,
    /// Packets handed to the device of which nothing says that it sent them.
    pub tx_unfinished: u64,
}

impl Leftover {
    /// The counts by name, as [`counters`] gives its own.
    pub fn named(self) -> [(&'static str, u64); 2] {
        [("rx_unread", self.rx_unread), ("tx_unfinished", self.tx_unfinished)]
    }
}

/// Why a port must be stopped and started. Its queues, which are on lcores, tell its device, which is not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault(Arc<Mutex<Option<&'static str>>>);

impl Fault {
    /// Notes a reason, unless there is one already.
    pub(crate) fn raise(&self, why: &'static str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }

    /// Takes the reason, if there is one.
    pub(crate) fn take(&self) -> Option<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Sees a TX ring that stays full: asked only when it is, so that packets cost nothing.
#[derive(Debug, Default)]
pub(crate) struct Watchdog {
    stuck: Option<Stuck>,
}

#[derive(Debug)]
struct Stuck {
    /// Of the ring, when it was first found full.
    progress: usize,
    /// When it was last looked at, and how long it was watched, in TSC ticks.
    looked: u64,
    watched: u64,
}

impl Watchdog {
    /// Whether the ring is full and has completed nothing for a second; then not again for the next one.
    /// `progress` grows with each completion and never wraps.
    pub(crate) fn is_late(&mut self, progress: usize) -> bool {
        self.is_late_at(progress, Tsc::now(), Tsc::hz())
    }

    /// As [`Watchdog::is_late`] at `now`, of a clock with `second` ticks in a second. A longer time between two looks
    /// counts as a tenth of a second: where a machine was paused, the clock ran on and the device did not.
    fn is_late_at(&mut self, progress: usize, now: u64, second: u64) -> bool {
        match &mut self.stuck {
            Some(stuck) if stuck.progress == progress => {
                stuck.watched += now.wrapping_sub(stuck.looked).min(second / 10);
                stuck.looked = now;
                let late = stuck.watched > second;
                if late {
                    self.stuck = None;
                }
                late
            }
            _ => {
                self.stuck = Some(Stuck { progress, looked: now, watched: 0 });
                false
            }
        }
    }
}

/// Everything that a port counted, by name: of its queues, and of the device itself.
pub fn counters(
    rx: QueueStats,
    tx: QueueStats,
    device: Vec<(&'static str, u64)>,
) -> Vec<(&'static str, u64)> {
    let queues = [
        ("rx_packets", rx.packets),
        ("rx_bytes", rx.bytes),
        ("rx_errors", rx.errors),
        ("rx_no_buffer", rx.no_buffer),
        ("rx_device_errors", rx.device_errors),
        ("rx_doorbells", rx.doorbells),
        ("tx_packets", tx.packets),
        ("tx_bytes", tx.bytes),
        ("tx_errors", tx.errors),
        ("tx_device_errors", tx.device_errors),
        ("tx_doorbells", tx.doorbells),
    ];
    queues.into_iter().chain(device).collect()
}

/// The receiving half of a port, owned by one lcore.
pub trait RxBurst: Send {
    /// Receives packets into `burst` until it is full or none is left, and refills the ring from `cache`. Packets
    /// behind a bad one, or behind the end of the ring, may come with a later call.
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst);
    /// What was counted so far.
    fn stats(&self) -> QueueStats;
}

/// The sending half of a port, owned by one lcore.
pub trait TxBurst: Send {
    /// Hands packets from the front of `burst` to the device and gives their number; those that find no
    /// descriptor stay in `burst`. Buffers of packets that were sent go to `cache`.
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize;
    /// What was counted so far.
    fn stats(&self) -> QueueStats;
}

/// What the control plane does with a NIC. Its queues are separate values that move to lcores.
pub trait Nic {
    /// The receiving half.
    type Rx: RxBurst;
    /// The sending half.
    type Tx: TxBurst;

    /// Sets up `pairs` pairs of rings in `memory`, fills the RX rings from `cache` and starts DMA. If the last stop
    /// failed, that is made up for first. The device spreads what it receives over the pairs.
    ///
    /// # Errors
    /// When the device refuses or has fewer pairs, or memory or buffers are short.
    fn start_pairs(
        &mut self,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
        sizes: QueueSizes,
        pairs: u16,
    ) -> Result<Vec<(Self::Rx, Self::Tx)>>;

    /// Ends DMA by a reset, then gives every buffer that the rings own to `cache`; what the TX rings own to `sent`,
    /// where a port sends from a pool of its own.
    ///
    /// # Errors
    /// When the device does not confirm the reset. The buffers and their memory are then kept until it does.
    fn stop_pairs(
        &mut self,
        queues: Vec<(Self::Rx, Self::Tx)>,
        cache: &mut PoolCache,
        sent: Option<&mut PoolCache>,
    ) -> Result<()>;

    /// As [`Nic::start_pairs`], with one pair.
    ///
    /// # Errors
    /// As for [`Nic::start_pairs`].
    fn start(
        &mut self,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
        sizes: QueueSizes,
    ) -> Result<(Self::Rx, Self::Tx)> {
        self.start_pairs(memory, cache, sizes, 1)?.pop().ok_or_else(|| {
            Error::new(ErrorKind::Protocol, "cannot start a port", "its driver gave no pair of queues")
        })
    }

    /// As [`Nic::stop_pairs`], with one pair and one pool.
    ///
    /// # Errors
    /// As for [`Nic::stop_pairs`].
    fn stop(&mut self, rx: Self::Rx, tx: Self::Tx, cache: &mut PoolCache) -> Result<()> {
        self.stop_pairs(vec![(rx, tx)], cache, None)
    }

    /// Tries again a stop that the device did not confirm, and gives `cache` what it kept back; without one nothing
    /// happens.
    ///
    /// # Errors
    /// When it does not confirm it now either.
    fn retry_stop(&mut self, _cache: &mut PoolCache) -> Result<()> {
        Ok(())
    }

    /// The station address.
    fn mac(&self) -> MacAddr;

    /// What the device can do and needs.
    fn capabilities(&self) -> Capabilities;

    /// Pads short frames from the next start on, because a port of the application brings such: a driver whose device
    /// does it anyway has nothing to do.
    fn pad_short_frames(&mut self) {}

    /// State of the link now.
    fn link(&self) -> Link;

    /// Whether the port works, asked now and then. It reads a register or two, and more of a link that has come up.
    ///
    /// # Errors
    /// Why the port must be stopped and started: a queue met a lie or completes nothing, the device asks for a
    /// reset, or it is gone. A queue's reason is given once.
    fn check(&mut self) -> Result<()>;

    /// Receives every frame, or only those for this station.
    ///
    /// # Errors
    /// When the device refuses.
    fn set_promiscuous(&mut self, on: bool) -> Result<()>;

    /// Frames that the device itself dropped since start, by name.
    fn device_drops(&mut self) -> Vec<(&'static str, u64)>;

    /// What stops threw away so far.
    fn leftover(&self) -> Leftover;
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1000;

    #[test]
    fn a_ring_that_stays_full_for_a_second_is_late_once() {
        let mut watchdog = Watchdog::default();
        let late: Vec<u64> = (0..3 * SECOND).filter(|now| watchdog.is_late_at(7, *now, SECOND)).collect();
        assert!(matches!(late[..], [first, _] if first > SECOND && first < SECOND + 10), "{late:?}");
        let mut watchdog = Watchdog::default();
        assert!(!(0..3 * SECOND).any(|now| watchdog.is_late_at(now as usize / 900, now, SECOND)));
    }

    /// A machine that is stopped, or whose memory goes to another host: its clock runs on, its devices do not.
    #[test]
    fn time_in_which_nobody_looked_does_not_count() {
        let mut watchdog = Watchdog::default();
        for pause in 0..5 {
            let begin = pause * 100 * SECOND;
            assert!(!(begin..begin + SECOND / 10).any(|now| watchdog.is_late_at(7, now, SECOND)), "{pause}");
        }
    }
}
