//! Ports and their queues: the traits that every driver implements.

use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::clock::Tsc;
use vireo_eal::dma::{Burst, DmaMemory, PoolCache};
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::{PortCounters, QueueCounters};
use crate::frames::ETHERNET;

/// Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Schema)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether a station can have this address: it is neither a group address nor all zero (IEEE 802, 8.2).
    pub fn is_valid_station(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    /// Formats the address as DPDK does: `52:54:00:12:34:56`, with uppercase hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02X}:{b:02X}:{c:02X}:{d:02X}:{e:02X}:{g:02X}")
    }
}

impl FromStr for MacAddr {
    type Err = Error;

    /// Parses six pairs of hexadecimal digits separated by colons.
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

/// Longest frame in bytes, without the frame check sequence, that is one packet on every port: an MTU of 1500
/// bytes plus an Ethernet header and a VLAN tag. NICs accept it without configuration (SDM 13.4, RCTL.LPE).
pub const STANDARD_FRAME: usize = 1518;

/// Length in bytes of a frame check sequence, which devices add and remove.
pub const FCS: usize = 4;

bitflags::bitflags! {
    /// Packet processing that a port can leave to its device on request (DPDK's `RTE_ETH_RX_OFFLOAD_*` and
    /// `RTE_ETH_TX_OFFLOAD_*`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u8 {
        /// The device reports whether the TCP or UDP checksum of a received packet is
        /// [good](vireo_eal::dma::Packet::has_good_checksum) or
        /// [partial](vireo_eal::dma::Packet::has_partial_checksum). A frame from the same host that was never
        /// on a wire may have a partial checksum.
        const RX_CHECKSUM = 1 << 0;
        /// The device computes the checksum of each sent packet that has a partial one.
        const TX_CHECKSUM = 1 << 1;
    }
}

impl Offloads {
    /// Returns the name of each offload, in lower case with hyphens.
    pub fn names(self) -> impl Iterator<Item = String> {
        self.iter_names().map(|(name, _)| name.to_ascii_lowercase().replace('_', "-"))
    }
}

/// Capabilities and requirements of a device, as far as they concern code outside its driver.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Highest DMA address that the device can use. None of its memory may lie above it: NICs truncate higher
    /// addresses silently.
    pub dma_mask: u64,
    /// Longest frame in bytes, without the frame check sequence, that the port can be started for; at least
    /// [`STANDARD_FRAME`].
    pub max_frame: usize,
    /// Whether the device may deliver frames shorter than 17 bytes, which some NICs do not pad to Ethernet's
    /// minimum of 60 bytes.
    pub receives_short_frames: bool,
    /// Maximum number of RX queues.
    pub rx_queues: u16,
    /// Maximum number of TX queues.
    pub tx_queues: u16,
    /// Minimum and maximum number of descriptors per queue.
    pub descriptors: RangeInclusive<u16>,
    /// Offloads that the device supports.
    pub offloads: Offloads,
    /// Whether the port can be started with [`PortConfig::rx_interrupts`].
    pub rx_interrupts: bool,
    /// Bytes of DMA memory for the device's rings: those the device writes, and those it only reads. The
    /// function must account for alignments larger than a page.
    pub ring_bytes: fn(&PortConfig) -> [usize; 2],
}

impl Default for Capabilities {
    /// Any DMA address, frames of one buffer, no short frames, one queue of any size in each direction, no
    /// offloads, no interrupts, and no rings of its own.
    fn default() -> Self {
        Self {
            dma_mask: u64::MAX,
            max_frame: STANDARD_FRAME,
            receives_short_frames: false,
            rx_queues: 1,
            tx_queues: 1,
            descriptors: 1..=1 << 15,
            offloads: Offloads::empty(),
            rx_interrupts: false,
            ring_bytes: |_| [0, 0],
        }
    }
}

/// Link state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whether a link partner is present.
    pub up: bool,
    /// Speed in Mbit/s, if the device reports it.
    pub speed: Option<u32>,
    /// Whether the link is full duplex.
    pub full_duplex: bool,
    /// Whether both ends autonegotiate speed and duplex.
    pub autoneg: bool,
}

/// Configuration of a port from one start to the next stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Number of RX queues; the device distributes received packets among them.
    pub rx_queues: u16,
    /// Number of TX queues.
    pub tx_queues: u16,
    /// Number of descriptors of each RX queue; a power of two.
    pub rx_descriptors: u16,
    /// Number of descriptors of each TX queue; a power of two.
    pub tx_descriptors: u16,
    /// Longest frame in bytes, without the frame check sequence. Above [`STANDARD_FRAME`], a frame may span
    /// several packets, and the application must handle
    /// [`Packet::has_more`](vireo_eal::dma::Packet::has_more).
    pub max_frame: usize,
    /// Offloads to enable.
    pub offloads: Offloads,
    /// Whether each RX queue gets an interrupt, for lcores that [sleep](RxBurst::arm) (DPDK's `intr_conf.rxq`).
    pub rx_interrupts: bool,
    /// Whether the device signals changes of its link, if it can ([`Nic::link_event`]; DPDK's `intr_conf.lsc`).
    pub link_interrupt: bool,
}

impl Default for PortConfig {
    /// One queue in each direction with 1024 descriptors, as in DPDK's l2fwd, for an MTU of 1500 bytes.
    fn default() -> Self {
        Self::with_descriptors(1024, 1024)
    }
}

impl PortConfig {
    /// Configures one queue in each direction, with `rx` and `tx` descriptors.
    pub const fn with_descriptors(rx: u16, tx: u16) -> Self {
        Self {
            rx_queues: 1,
            tx_queues: 1,
            rx_descriptors: rx,
            tx_descriptors: tx,
            max_frame: 1514,
            offloads: Offloads::empty(),
            rx_interrupts: false,
            link_interrupt: false,
        }
    }

    /// Returns the configuration for frames of up to `max_frame` bytes.
    #[must_use]
    pub const fn with_max_frame(self, max_frame: usize) -> Self {
        Self { max_frame, ..self }
    }

    /// Returns the configuration with `offloads`.
    #[must_use]
    pub const fn with_offloads(self, offloads: Offloads) -> Self {
        Self { offloads, ..self }
    }

    /// Returns the configuration with or without RX interrupts.
    #[must_use]
    pub const fn with_rx_interrupts(self, rx_interrupts: bool) -> Self {
        Self { rx_interrupts, ..self }
    }

    /// Returns the configuration with or without an interrupt for changes of the link.
    #[must_use]
    pub const fn with_link_interrupt(self, link_interrupt: bool) -> Self {
        Self { link_interrupt, ..self }
    }

    /// Longest payload of a frame in bytes.
    pub const fn mtu(&self) -> usize {
        self.max_frame.saturating_sub(ETHERNET)
    }

    /// Whether a frame may span several packets.
    pub const fn is_scattered(&self) -> bool {
        self.max_frame > STANDARD_FRAME
    }

    /// Returns the configuration with `pairs` queues in each direction.
    #[must_use]
    pub const fn with_pairs(self, pairs: u16) -> Self {
        Self { rx_queues: pairs, tx_queues: pairs, ..self }
    }

    /// Returns the number of descriptors of all queues.
    pub fn descriptors(&self) -> usize {
        let of = |queues: u16, descriptors: u16| usize::from(queues) * usize::from(descriptors);
        of(self.rx_queues, self.rx_descriptors) + of(self.tx_queues, self.tx_descriptors)
    }

    /// Returns why a device with `capabilities` cannot run this configuration. Drivers put this text into
    /// their error.
    pub(crate) fn unsupported_reason(&self, capabilities: &Capabilities) -> Option<String> {
        let Capabilities { rx_queues, tx_queues, descriptors, .. } = capabilities;
        let queues = [("RX", self.rx_queues, *rx_queues), ("TX", self.tx_queues, *tx_queues)];
        if let Some((kind, asked, most)) =
            queues.into_iter().find(|(_, asked, most)| !(1..=*most).contains(asked))
        {
            return Some(format!("{asked} {kind} queues are requested, but it has {most}"));
        }
        if self.max_frame > capabilities.max_frame {
            let (asked, most) = (self.max_frame, capabilities.max_frame);
            return Some(format!(
                "frames of {asked} bytes (without FCS) are requested, but it takes at most {most}"
            ));
        }
        let missing = self.offloads - capabilities.offloads;
        if !missing.is_empty() {
            let missing: Vec<_> = missing.names().collect();
            return Some(format!("it has no {}", missing.join(" and no ")));
        }
        if self.rx_interrupts && !capabilities.rx_interrupts {
            return Some("RX interrupts are requested, but it has none".to_owned());
        }
        let fits = |n: &u16| n.is_power_of_two() && descriptors.contains(n);
        (![self.rx_descriptors, self.tx_descriptors].iter().all(fits)).then(|| {
            let (fewest, most) = descriptors.clone().into_inner();
            format!("its rings must have {fewest} to {most} descriptors, a power of two")
        })
    }
}

/// Queues of a started port, which move to lcores individually.
#[derive(Debug)]
pub struct Queues<R, T> {
    /// RX queues, by number.
    pub rx: Vec<R>,
    /// TX queues, by number.
    pub tx: Vec<T>,
}

impl<R, T> Queues<R, T> {
    /// Creates a set of one queue in each direction.
    pub fn pair(rx: R, tx: T) -> Self {
        Self { rx: vec![rx], tx: vec![tx] }
    }

    /// Returns the first queue of each direction, or `None` if either direction has no queue.
    pub fn into_pair(mut self) -> Option<(R, T)> {
        (!self.rx.is_empty() && !self.tx.is_empty()).then(|| (self.rx.swap_remove(0), self.tx.swap_remove(0)))
    }

    /// Converts each queue with `rx` or `tx`.
    pub(crate) fn map<S, U>(self, rx: impl FnMut(R) -> S, tx: impl FnMut(T) -> U) -> Queues<S, U> {
        Queues { rx: self.rx.into_iter().map(rx).collect(), tx: self.tx.into_iter().map(tx).collect() }
    }

    /// Converts each queue with `rx` or `tx`; returns `None` if a conversion does.
    pub(crate) fn try_map<S, U>(
        self,
        rx: impl FnMut(R) -> Option<S>,
        tx: impl FnMut(T) -> Option<U>,
    ) -> Option<Queues<S, U>> {
        let rx = self.rx.into_iter().map(rx).collect::<Option<_>>()?;
        Some(Queues { rx, tx: self.tx.into_iter().map(tx).collect::<Option<_>>()? })
    }
}

/// Error of a port that is asked to stop queues of another driver.
pub(crate) fn queues_of_another() -> Error {
    Error::new(ErrorKind::Usage, "cannot stop the port", "the queues belong to another driver")
}

/// Queues of a port of driver `N`.
pub type QueuesOf<N> = Queues<<N as Nic>::Rx, <N as Nic>::Tx>;

/// Reason why a port must be restarted. Queues on lcores pass it to the port's device, which is not on an
/// lcore.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault(Arc<Mutex<Option<&'static str>>>);

impl Fault {
    /// Records a reason, unless one is already recorded.
    pub(crate) fn raise(&self, why: &'static str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }

    /// Takes the recorded reason, if any.
    pub(crate) fn take(&self) -> Option<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Detects a TX ring that stays full. It runs only while the ring is full, so the packet path pays nothing
/// otherwise.
#[derive(Debug, Default)]
pub(crate) struct Watchdog {
    stuck: Option<Stuck>,
}

#[derive(Debug)]
struct Stuck {
    /// Progress of the ring when it was first found full.
    progress: usize,
    /// When the ring was last checked, and for how long it has been watched, in TSC ticks.
    looked: u64,
    watched: u64,
}

impl Watchdog {
    /// Returns whether the full ring has completed nothing for a second; a positive result restarts the
    /// measurement. `progress` grows with each completion and never wraps.
    pub(crate) fn is_late(&mut self, progress: usize) -> bool {
        self.is_late_at(progress, Tsc::now(), Tsc::hz())
    }

    /// Implements [`Watchdog::is_late`] at `now`, with `second` clock ticks per second. A gap between two
    /// checks counts as at most a tenth of a second: while a machine is paused, its clock runs but its device
    /// does not.
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
    /// Receives packets into `burst` until it is full or none is left, and refills the ring from `cache`.
    /// Packets after a bad packet, or after the end of the ring, may be returned by a later call.
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst);
    /// Returns the queue's counters, which are part of [`Nic::counters`].
    fn counters(&self) -> &QueueCounters;

    /// Returns the event that the queue signals while it is armed, for
    /// [`wait_for_any`](vireo_eal::event::wait_for_any); `None` unless the port was started with
    /// [`PortConfig::rx_interrupts`].
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Makes the device signal [`RxBurst::event`] for each packet from now on, so that the lcore can sleep until
    /// then. Returns false if it must not: packets have arrived already, the ring waits for buffers, which only a
    /// poll gives it, or there is no event. Call [`RxBurst::disarm`] before the next poll in either case.
    fn arm(&mut self) -> bool {
        false
    }

    /// Ends what [`RxBurst::arm`] has begun, and takes the event.
    fn disarm(&mut self) {}
}

/// The sending half of a port, owned by one lcore.
pub trait TxBurst: Send {
    /// Hands packets from the front of `burst` to the device. Returns the number of packets that left
    /// `burst`: those sent, and those dropped as too long and counted as errors. Packets without a free
    /// descriptor stay in `burst`. Buffers of sent packets return to `cache`. Each packet must be a whole
    /// frame unless the port was started for long frames; otherwise each segment would be sent as a frame.
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize;
    /// Returns the queue's counters, which are part of [`Nic::counters`].
    fn counters(&self) -> &QueueCounters;
    /// Returns the offloads that the device applies to sent packets. If it does not compute partial
    /// checksums, they are sent as they are.
    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }
}

/// Control plane of a NIC. The queues are separate values that move to lcores.
pub trait Nic {
    /// RX queue.
    type Rx: RxBurst;
    /// TX queue.
    type Tx: TxBurst;

    /// Sets up the rings of `config` in `memory`, fills the RX rings from `cache` and starts DMA. If the last
    /// stop failed, first retries it.
    ///
    /// # Errors
    /// `Usage` when `config` exceeds [`Nic::capabilities`]. Otherwise when the device refuses, or memory or
    /// buffers are insufficient.
    fn start(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        cache: &mut PoolCache,
    ) -> Result<QueuesOf<Self>>;

    /// Starts the port as [`Nic::start`] does, and fills RX queue n from `caches[n % caches.len()]`, for queues that
    /// different processes poll.
    ///
    /// # Errors
    /// As for [`Nic::start`]; `Unavailable` when the driver fills all of several queues from the same cache.
    fn start_from(
        &mut self,
        config: &PortConfig,
        memory: &Arc<DmaMemory>,
        caches: &mut [PoolCache],
    ) -> Result<QueuesOf<Self>> {
        match caches {
            [cache] => self.start(config, memory, cache),
            [cache, ..] if config.rx_queues == 1 => self.start(config, memory, cache),
            _ => {
                let why = "its driver gives all queues buffers of one pool";
                Err(Error::new(ErrorKind::Unavailable, "cannot share a port among processes", why))
            }
        }
    }

    /// Ends DMA with a reset, then returns every buffer owned by the rings to `cache`, or to the pool that
    /// the buffer came from.
    ///
    /// # Errors
    /// When the device does not confirm the reset. The buffers and their memory are then kept until it does.
    fn stop(&mut self, queues: QueuesOf<Self>, cache: &mut PoolCache) -> Result<()>;

    /// Starts the port as [`Nic::start`] does, with one queue in each direction, whatever numbers `config`
    /// has.
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
            Error::new(ErrorKind::Protocol, "cannot start a port", "its driver returned no pair of queues")
        })
    }

    /// Stops the port as [`Nic::stop`] does, with one queue in each direction.
    ///
    /// # Errors
    /// As for [`Nic::stop`].
    fn stop_pair(&mut self, rx: Self::Rx, tx: Self::Tx, cache: &mut PoolCache) -> Result<()> {
        self.stop(Queues::pair(rx, tx), cache)
    }

    /// Retries a stop that the device did not confirm, and returns the retained buffers to `cache`. Does
    /// nothing if there is no such stop.
    ///
    /// # Errors
    /// When the device still does not confirm the stop.
    fn retry_stop(&mut self, _cache: &mut PoolCache) -> Result<()> {
        Ok(())
    }

    /// Informs the device of `memory`, whose region was added to the [map](vireo_eal::dma::MemoryMap) of the
    /// port's memory. A device that already has the region mapped needs no notice; a device in another
    /// process must map it first.
    ///
    /// # Errors
    /// When the device refuses the memory or cannot share it. The device then cannot reach it.
    fn update_memory(&mut self, _memory: &DmaMemory) -> Result<()> {
        Ok(())
    }

    /// Returns the station address.
    fn mac(&self) -> MacAddr;

    /// Returns the capabilities and requirements of the device.
    fn capabilities(&self) -> Capabilities;

    /// Pads short frames from the next start on, because another port of the application may deliver them. A
    /// driver whose device always pads does nothing.
    fn pad_short_frames(&mut self) {}

    /// Returns the current state of the link, and takes [`Nic::link_event`].
    fn link(&self) -> Link;

    /// Returns the event that the port signals when the state of its link, or what [`Nic::check`] returns, may have
    /// changed; `None` unless the port was started with [`PortConfig::link_interrupt`] and its device has such an
    /// interrupt. A device may signal late, so call [`Nic::link`] periodically too.
    fn link_event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Checks whether the port works, and adds what the device itself has counted since the last call. Call
    /// it periodically. It reads a few registers, and more if the link has come up.
    ///
    /// # Errors
    /// Why the port must be stopped and started: a queue detected device misbehavior or completes nothing,
    /// the device requests a reset, or the device is gone. A queue's reason is returned once.
    fn check(&mut self) -> Result<()>;

    /// Receives every frame, or only those for this station.
    ///
    /// # Errors
    /// When the device refuses.
    fn set_promiscuous(&mut self, on: bool) -> Result<()>;

    /// Returns the port's counters, which any thread may read. They continue when the port is started again.
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

    /// While a machine is paused or its memory migrates to another host, its clock runs but its devices do
    /// not.
    #[test]
    fn time_in_which_nobody_looked_does_not_count() {
        let mut watchdog = Watchdog::default();
        for pause in 0..5 {
            let begin = pause * 100 * SECOND;
            assert!(!(begin..begin + SECOND / 10).any(|now| watchdog.is_late_at(7, now, SECOND)), "{pause}");
        }
    }
}
