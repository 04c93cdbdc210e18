//! Ports and their queues: what every driver implements.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, DmaMemory, PoolCache};
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::{PortCounters, QueueCounters};

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

/// Longest frame in bytes, without frame check sequence, that is one packet on every port: of an MTU of 1500 bytes, with a VLAN
/// tag. Network cards take it without being told (SDM 13.4, RCTL.LPE).
pub const STANDARD_FRAME: usize = 1518;

/// Bytes of a frame check sequence, which devices add and remove.
pub const FCS: usize = 4;

bitflags::bitflags! {
    /// Work on packets that a port leaves to its device, if it is asked to (`RTE_ETH_RX_OFFLOAD_*` and `RTE_ETH_TX_OFFLOAD_*` of
    /// DPDK).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u8 {
        /// The device says of a received packet whether the checksum of its TCP or UDP header is
        /// [good](vireo_eal::dma::Packet::has_good_checksum), or [partial](vireo_eal::dma::Packet::has_partial_checksum), as a
        /// frame of the same host may have it that never was on a wire.
        const RX_CHECKSUM = 1 << 0;
        /// The device makes the checksum of each sent packet that has a partial one.
        const TX_CHECKSUM = 1 << 1;
    }
}

impl Offloads {
    /// The name of each, in lower case with hyphens.
    pub fn names(self) -> impl Iterator<Item = String> {
        self.iter_names().map(|(name, _)| name.to_ascii_lowercase().replace('_', "-"))
    }
}

/// What a device can do, and what it needs, as far as that concerns others than its driver.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Highest device address that it can use: all of its memory must be below. A chip cuts off what is above, and says
    /// nothing.
    pub dma_mask: u64,
    /// Longest frame in bytes, without frame check sequence, that it can be started for; at least [`STANDARD_FRAME`].
    pub max_frame: usize,
    /// Whether it may bring frames shorter than Ethernet's 60 bytes.
    pub receives_short_frames: bool,
    /// Most RX queues that it can be started with.
    pub rx_queues: u16,
    /// Most TX queues.
    pub tx_queues: u16,
    /// Fewest and most descriptors of a queue.
    pub descriptors: RangeInclusive<u16>,
    /// What it can do with packets.
    pub offloads: Offloads,
    /// What its rings take of DMA memory: bytes that the device writes, and bytes that it only reads. An
    /// alignment of more than a page has to be counted.
    pub ring_bytes: fn(&PortConfig) -> [usize; 2],
}

impl Default for Capabilities {
    /// All addresses, frames of one buffer, no short ones, a queue each way of any size, no offloads, and no rings of its own.
    fn default() -> Self {
        Self {
            dma_mask: u64::MAX,
            max_frame: STANDARD_FRAME,
            receives_short_frames: false,
            rx_queues: 1,
            tx_queues: 1,
            descriptors: 1..=1 << 15,
            offloads: Offloads::empty(),
            ring_bytes: |_| [0, 0],
        }
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

/// How a port is to run, from one start to the next stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// RX queues, over which the device spreads what it receives.
    pub rx_queues: u16,
    /// TX queues.
    pub tx_queues: u16,
    /// Descriptors of each RX queue; a power of two.
    pub rx_descriptors: u16,
    /// Descriptors of each TX queue; a power of two.
    pub tx_descriptors: u16,
    /// Longest frame in bytes, without frame check sequence. Above [`STANDARD_FRAME`] a frame may be several packets, and the
    /// application has to expect [`Packet::has_more`](vireo_eal::dma::Packet::has_more).
    pub max_frame: usize,
    /// What the device is to do with packets.
    pub offloads: Offloads,
}

impl Default for PortConfig {
    /// A queue each way with 1024 descriptors, as in DPDK's l2fwd, for frames of an MTU of 1500 bytes.
    fn default() -> Self {
        Self::with_descriptors(1024, 1024)
    }
}

impl PortConfig {
    /// A queue each way, with so many descriptors.
    pub const fn with_descriptors(rx: u16, tx: u16) -> Self {
        Self {
            rx_queues: 1,
            tx_queues: 1,
            rx_descriptors: rx,
            tx_descriptors: tx,
            max_frame: 1514,
            offloads: Offloads::empty(),
        }
    }

    /// The same for frames of up to `max_frame` bytes.
    #[must_use]
    pub const fn with_max_frame(self, max_frame: usize) -> Self {
        Self { max_frame, ..self }
    }

    /// The same with `offloads`.
    #[must_use]
    pub const fn with_offloads(self, offloads: Offloads) -> Self {
        Self { offloads, ..self }
    }

    /// Whether frames may be several packets.
    pub const fn is_scattered(&self) -> bool {
        self.max_frame > STANDARD_FRAME
    }

    /// The same with so many queues each way.
    #[must_use]
    pub const fn with_pairs(self, pairs: u16) -> Self {
        Self { rx_queues: pairs, tx_queues: pairs, ..self }
    }

    /// Descriptors of all queues.
    pub fn descriptors(&self) -> usize {
        let of = |queues: u16, descriptors: u16| usize::from(queues) * usize::from(descriptors);
        of(self.rx_queues, self.rx_descriptors) + of(self.tx_queues, self.tx_descriptors)
    }

    /// Why a device with `capabilities` cannot run so; drivers refuse it with this.
    pub(crate) fn unfit(&self, capabilities: &Capabilities) -> Option<String> {
        let Capabilities { rx_queues, tx_queues, descriptors, .. } = capabilities;
        let queues = [("RX", self.rx_queues, *rx_queues), ("TX", self.tx_queues, *tx_queues)];
        if let Some((kind, asked, most)) =
            queues.into_iter().find(|(_, asked, most)| !(1..=*most).contains(asked))
        {
            return Some(format!("{asked} {kind} queues are asked for, and it has {most}"));
        }
        if self.max_frame > capabilities.max_frame {
            let (asked, most) = (self.max_frame, capabilities.max_frame);
            return Some(format!(
                "frames of {asked} bytes without check sequence are asked for, and it takes {most} at most"
            ));
        }
        let missing = self.offloads - capabilities.offloads;
        if !missing.is_empty() {
            let missing: Vec<_> = missing.names().collect();
            return Some(format!("it has no {}", missing.join(" and no ")));
        }
        let fits = |n: &u16| n.is_power_of_two() && descriptors.contains(n);
        (![self.rx_descriptors, self.tx_descriptors].iter().all(fits)).then(|| {
            let (fewest, most) = descriptors.clone().into_inner();
            format!("its rings have {fewest} to {most} descriptors, a power of two")
        })
    }
}

/// The queues of a started port, which move to lcores one by one.
#[derive(Debug)]
pub struct Queues<R, T> {
    /// RX queues, by number.
    pub rx: Vec<R>,
    /// TX queues, by number.
    pub tx: Vec<T>,
}

impl<R, T> Queues<R, T> {
    /// One queue each way.
    pub fn pair(rx: R, tx: T) -> Self {
        Self { rx: vec![rx], tx: vec![tx] }
    }

    /// The first queue each way, if there are both.
    pub fn into_pair(mut self) -> Option<(R, T)> {
        (!self.rx.is_empty() && !self.tx.is_empty()).then(|| (self.rx.swap_remove(0), self.tx.swap_remove(0)))
    }

    /// The same with other types of queues, as far as `rx` and `tx` give them.
    pub(crate) fn try_map<S, U>(
        self,
        rx: impl FnMut(R) -> Option<S>,
        tx: impl FnMut(T) -> Option<U>,
    ) -> Option<Queues<S, U>> {
        let rx = self.rx.into_iter().map(rx).collect::<Option<_>>()?;
        Some(Queues { rx, tx: self.tx.into_iter().map(tx).collect::<Option<_>>()? })
    }
}

/// The error of a port that is to stop queues of another driver.
pub(crate) fn queues_of_another() -> Error {
    Error::new(ErrorKind::Usage, "cannot stop the port", "the queues belong to another driver")
}

/// The queues of a driver's port.
pub type QueuesOf<N> = Queues<<N as Nic>::Rx, <N as Nic>::Tx>;

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

/// The receiving half of a port, owned by one lcore.
pub trait RxBurst: Send {
    /// Receives packets into `burst` until it is full or none is left, and refills the ring from `cache`. Packets
    /// behind a bad one, or behind the end of the ring, may come with a later call.
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst);
    /// Its counters, which are among those of [`Nic::counters`].
    fn counters(&self) -> &QueueCounters;
}

/// The sending half of a port, owned by one lcore.
pub trait TxBurst: Send {
    /// Hands packets from the front of `burst` to the device and gives the number of those that left it: sent, or dropped as
    /// too long and counted as errors. Those that find no descriptor stay in `burst`. Buffers of packets that were sent go to
    /// `cache`. Each packet must be a frame, unless the port was started for long frames: a segment would be sent as one.
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize;
    /// Its counters, which are among those of [`Nic::counters`].
    fn counters(&self) -> &QueueCounters;
    /// What the device does with the packets that it is given. A partial checksum that it does not make goes out as it is.
    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }
}

/// What the control plane does with a NIC. Its queues are separate values that move to lcores.
pub trait Nic {
    /// The receiving half.
    type Rx: RxBurst;
    /// The sending half.
    type Tx: TxBurst;

    /// Sets up the rings of `config` in `memory`, fills the RX rings from `cache` and starts DMA. If the last stop failed,
    /// that is made up for first.
    ///
    /// # Errors
    /// `Usage` when `config` is beyond [`Nic::capabilities`]; else when the device refuses, or memory or buffers are short.
    fn start(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
    ) -> Result<QueuesOf<Self>>;

    /// Ends DMA by a reset, then gives every buffer that the rings own to `cache`, or to the pool that it came from.
    ///
    /// # Errors
    /// When the device does not confirm the reset. The buffers and their memory are then kept until it does.
    fn stop(&mut self, queues: QueuesOf<Self>, cache: &mut PoolCache) -> Result<()>;

    /// As [`Nic::start`] with a queue each way, whatever `config` says of their number.
    ///
    /// # Errors
    /// As for [`Nic::start`].
    fn start_pair(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
    ) -> Result<(Self::Rx, Self::Tx)> {
        self.start(&config.with_pairs(1), memory, cache)?.into_pair().ok_or_else(|| {
            Error::new(ErrorKind::Protocol, "cannot start a port", "its driver gave no pair of queues")
        })
    }

    /// As [`Nic::stop`], with a queue each way and one pool.
    ///
    /// # Errors
    /// As for [`Nic::stop`].
    fn stop_pair(&mut self, rx: Self::Rx, tx: Self::Tx, cache: &mut PoolCache) -> Result<()> {
        self.stop(Queues::pair(rx, tx), cache)
    }

    /// Tries again a stop that the device did not confirm, and gives `cache` what it kept back; without one nothing
    /// happens.
    ///
    /// # Errors
    /// When it does not confirm it now either.
    fn retry_stop(&mut self, _cache: &mut PoolCache) -> Result<()> {
        Ok(())
    }

    /// Tells the device of `memory`, whose region was added to the [map](vireo_eal::dma::MemoryMap) of the port's memory. A
    /// device that finds the region mapped needs to be told nothing; one that runs in another process has to map it first.
    ///
    /// # Errors
    /// When the device refuses, or cannot share such memory. It does not reach the memory then.
    fn update_memory(&mut self, _memory: &DmaMemory) -> Result<()> {
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

    /// Whether the port works, asked now and then; adds what the device itself has counted since. It reads a few registers, and
    /// more of a link that has come up.
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

    /// The port's counters, for any thread. They go on when the port is started again.
    fn counters(&self) -> &PortCounters;
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
