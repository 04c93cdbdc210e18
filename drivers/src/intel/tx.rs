//! Transmit queue (SDM 3.3, DS 7.2): one descriptor per packet.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::Result;
use vireo_eal::dma::{
    Burst, DescRing, FreeBuffers, MAX_BURST, MAX_SEGMENTS, PoolCache, RingRecord, SendWord, TiedRings,
    first_frame, has_segments,
};
use vireo_eal::mmio::Doorbell;

use super::format::Format;
use crate::counters::QueueCounters;
use crate::frames::{SHORTEST, bytes, drop_long};
use crate::handover::contradiction;
use crate::port::{Fault, TxBurst, Watchdog};
use crate::tied::{TieTx, TiedTx};

/// Number of descriptors in a reclaim batch. Only the last descriptor of a batch reports its completion, and
/// whole batches are reclaimed. The smallest ring holds two batches, so that one is always in flight when the
/// ring is full.
pub(super) const RECLAIM: usize = 32;
const _: () = assert!(MAX_BURST <= RECLAIM);

/// The transmit queue of a port.
#[derive(Debug)]
pub struct TxQueue<F, R = DescRing> {
    /// Ring whose tail is a multiple of [`RECLAIM`], if each frame is one packet.
    ring: R,
    tail: Doorbell<u32>,
    /// Number of free descriptors below which sent buffers are reclaimed. It is `usize::MAX` with
    /// [`Reports`], so that each burst takes the path for long frames.
    reclaim_below: usize,
    /// Whether the driver pads frames that are shorter than [`SHORTEST`]. PCI Express chips pad frames of 17
    /// bytes and more (82574 DS 10.2.6, TCTL.PSP; Linux, `igb_xmit_frame`), which includes every frame that
    /// came from a wire. PCI chips may pad with garbage, so the driver pads for them (Linux,
    /// drivers/net/ethernet/intel/e1000/e1000_main.c).
    pads: bool,
    counters: Arc<QueueCounters>,
    watchdog: Watchdog,
    fault: Fault,
    /// Completion reports of a port for long frames; none on other ports.
    reports: Option<Box<Reports>>,
    _format: PhantomData<F>,
}

/// State of a queue whose frames may span several descriptors. Whole frames are reclaimed, so a frame's last
/// descriptor has to report, which need not be every 32nd descriptor. Therefore the last descriptor of each
/// burst reports.
#[derive(Debug)]
struct Reports {
    /// Positions of reporting descriptors that were not yet found done.
    positions: VecDeque<usize>,
    /// Longest frame in bytes.
    longest: usize,
}

/// State of a queue.
#[derive(Serialize, Deserialize, Schema)]
pub(super) struct TxRecord {
    ring: RingRecord,
    /// [`Reports::positions`].
    reports: Vec<u64>,
}

/// Empties `ring`, which owns no buffer. TDT = TDH means an empty ring, so one descriptor stays free (SDM 3.4).
pub(super) fn clear(ring: &mut DescRing) {
    ring.restart(ring.entries() - 1, [0; 2]);
}

/// Raises a fault if `ring`, which is full, has made no progress for a second.
fn watch(watchdog: &mut Watchdog, ring: &DescRing, fault: &Fault) {
    if watchdog.is_late(ring.tail()) {
        fault.raise("nothing was sent for a second though the ring is full");
    }
}

impl<F: Format> TxQueue<F> {
    /// Creates a queue on `ring`, which is empty. If frames may be several packets, `long` is the longest frame in
    /// bytes.
    pub(super) fn new(
        ring: DescRing,
        tail: Doorbell<u32>,
        counters: Arc<QueueCounters>,
        pads: bool,
        long: Option<usize>,
        fault: Fault,
    ) -> Self {
        let positions = || VecDeque::with_capacity(ring.entries());
        let reports = long.map(|longest| Box::new(Reports { positions: positions(), longest }));
        let reclaim_below = if reports.is_some() { usize::MAX } else { ring.entries() / 2 };
        let watchdog = Watchdog::default();
        Self { ring, tail, reclaim_below, pads, counters, watchdog, fault, reports, _format: PhantomData }
    }

    /// Returns the state of the queue.
    pub(super) fn record(&self) -> TxRecord {
        let reports = self.reports.as_ref();
        let positions =
            reports.map(|reports| reports.positions.iter().map(|position| *position as u64).collect());
        TxRecord { ring: self.ring.record(), reports: positions.unwrap_or_default() }
    }

    /// Continues a queue of another process. This one is empty.
    pub(super) fn restore(&mut self, record: &TxRecord, free: &mut FreeBuffers) -> Result<()> {
        self.ring.restore(&record.ring, free)?;
        match &mut self.reports {
            Some(reports) => {
                reports.positions = record.reports.iter().map(|position| *position as usize).collect();
            }
            None if !self.ring.tail().is_multiple_of(RECLAIM) => {
                return Err(contradiction("its TX ring was reclaimed in other batches"));
            }
            None => {}
        }
        Ok(())
    }

    /// Handles a burst that finds no room. Requests a restart once a full ring has made no progress for a
    /// second.
    #[cold]
    #[inline(never)]
    fn full(&mut self) -> usize {
        watch(&mut self.watchdog, &self.ring, &self.fault);
        0
    }

    /// Reclaims the buffers of all batches that the device has completed.
    #[inline(never)]
    fn reclaim(&mut self, cache: &mut PoolCache) {
        let start = self.ring.tail();
        // A batch that is not full yet still shows the state of its previous lap.
        let full = self.ring.owned() / RECLAIM;
        let last = |batch: usize| start.wrapping_add(batch * RECLAIM + RECLAIM - 1);
        let done = (0..full).take_while(|batch| self.ring.load::<1>(last(*batch)) & F::TXD_DD != 0);
        self.ring.reclaim(done.count() * RECLAIM, cache);
    }

    /// Number of descriptors from `head`, where the device is (TDH), to the last one that was filled. An
    /// impossible `head` counts every descriptor that may own a buffer.
    pub(super) fn unfinished(&self, head: u32) -> usize {
        let behind = self.ring.head().wrapping_sub(head as usize) & (self.ring.entries() - 1);
        behind.min(self.ring.owned())
    }

    /// Forgets the buffers, whose queue another process continues. They return to `cache`.
    pub(super) fn lend(&mut self, cache: &mut PoolCache) {
        self.ring.reclaim_all(cache);
    }

    /// Empties the queue, whose ring owns no buffer and which the device does not use.
    pub(super) fn clear(&mut self) {
        clear(&mut self.ring);
        if let Some(reports) = &mut self.reports {
            reports.positions.clear();
        }
    }

    pub(super) fn ring(&self) -> &DescRing {
        &self.ring
    }

    /// Returns every buffer to `cache`, and the ring to the caller. The device must have been reset.
    pub(super) fn release(mut self, cache: &mut PoolCache) -> DescRing {
        self.ring.reclaim_all(cache);
        self.ring
    }

    // Kept out of the forwarding loop, where too few CPU registers are left for this loop.
    #[inline(never)]
    fn transmit<const PAD_TO: usize>(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        // A burst always finds room until half of the ring is in use.
        if self.ring.room() < self.reclaim_below {
            if self.reports.is_some() {
                return self.transmit_frames(cache, burst);
            }
            self.reclaim(cache);
        }
        let count = burst.len().min(self.ring.room());
        if count == 0 {
            return if burst.is_empty() { 0 } else { self.full() };
        }
        let bytes = self.ring.fill_words::<PAD_TO>(count, F::SEND, cache, burst, |_| ());
        // A burst is no longer than RECLAIM, so at most one of its descriptors is the last of a batch.
        let last = (self.ring.head() & !(RECLAIM - 1)).wrapping_sub(1);
        if self.ring.head().wrapping_sub(last) <= count {
            self.report(last);
        }
        self.counters.packets.add(count as u64);
        self.counters.bytes.add(bytes);
        self.announce();
        count
    }

    /// Lets the descriptor at `last` report its completion. The device has not been told of it yet, so its word
    /// is the driver's own.
    #[inline(always)]
    fn report(&mut self, last: usize) {
        self.ring.set_word(last, self.ring.load::<1>(last) | F::TXD_RS);
    }

    /// Publishes to the device, through TDT, which descriptors it may send.
    #[inline(always)]
    fn announce(&mut self) {
        self.counters.doorbells.add(1);
        self.tail.ring((self.ring.head() & (self.ring.entries() - 1)) as u32);
    }

    /// Transmits like [`TxQueue::transmit`], on a port for long frames.
    #[inline(never)]
    fn transmit_frames(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let Some(reports) = &mut self.reports else { return 0 };
        if self.ring.room() < self.ring.entries() / 2 {
            let tail = self.ring.tail();
            let mut end = tail;
            while let Some(last) =
                reports.positions.pop_front_if(|last| self.ring.load::<1>(*last) & F::TXD_DD != 0)
            {
                end = last.wrapping_add(1);
            }
            self.ring.reclaim(end.wrapping_sub(tail), cache);
        }
        let before = burst.len();
        // The transmit FIFO must hold a whole frame (SDM 3.3.7).
        self.counters.errors.add(drop_long(burst, reports.longest, MAX_SEGMENTS, cache) as u64);
        let (frames, bytes) = if has_segments(burst) {
            self.fill_frames(cache, burst)
        } else {
            self.fill_packets(cache, burst)
        };
        if frames == 0 {
            let left = if burst.is_empty() { 0 } else { self.full() };
            return before - burst.len() + left;
        }
        let last = self.ring.head().wrapping_sub(1);
        self.report(last);
        if let Some(reports) = &mut self.reports {
            reports.positions.push_back(last);
        }
        self.counters.packets.add(frames);
        self.counters.bytes.add(bytes);
        self.announce();
        before - burst.len()
    }

    /// Moves as many packets to descriptors as there is room for; each is a frame. Returns the number of frames
    /// and of their bytes.
    fn fill_packets(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> (u64, u64) {
        let count = burst.len().min(self.ring.room());
        let bytes = if self.pads {
            self.ring.fill_words::<SHORTEST>(count, F::SEND, cache, burst, |_| ())
        } else {
            self.ring.fill_words::<0>(count, F::SEND, cache, burst, |_| ())
        };
        (count as u64, bytes)
    }

    /// As [`TxQueue::fill_packets`], of frames that may have several segments.
    fn fill_frames(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> (u64, u64) {
        let (mut words, mut frames, mut sum) = ([0; MAX_BURST], 0, 0);
        let mut count = 0;
        while count < burst.len() {
            let segments = first_frame(&burst[count..]);
            if segments > self.ring.room() - count {
                break;
            }
            let frame = &mut burst[count..count + segments];
            if self.pads && segments == 1 {
                frame.iter_mut().for_each(|packet| cache.pad::<SHORTEST>(packet));
            }
            let whole = bytes(frame) as u64;
            for (i, packet) in frame.iter().enumerate() {
                let is_last = i + 1 == segments;
                words[count + i] = F::segment(packet.len() as u64, if i == 0 { whole } else { 0 }, is_last);
            }
            count += segments;
            frames += 1;
            sum += whole;
        }
        let mut words = words.into_iter();
        self.ring.fill(count, 0, cache, burst, |_, _| words.next().unwrap_or_default());
        (frames, sum)
    }
}

impl<F: Format> TxBurst for TxQueue<F> {
    #[inline(always)]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.pads { self.transmit::<SHORTEST>(cache, burst) } else { self.transmit::<0>(cache, burst) }
    }

    fn counters(&self) -> &QueueCounters {
        &self.counters
    }
}

impl<F, R> TxQueue<F, R> {
    /// Exchanges the ring.
    fn with_ring<S>(self, ring: S) -> (R, TxQueue<F, S>) {
        let Self { ring: before, tail, reclaim_below, pads, counters, watchdog, fault, reports, _format } =
            self;
        let queue = TxQueue { ring, tail, reclaim_below, pads, counters, watchdog, fault, reports, _format };
        (before, queue)
    }
}

impl<F: Format> TieTx for TxQueue<F> {
    type Tied = TxQueue<F, ()>;

    fn can_tie(&self) -> bool {
        self.reports.is_none()
    }

    fn ring(&self) -> &DescRing {
        &self.ring
    }

    fn reclaim(&mut self, cache: &mut PoolCache) {
        self.reclaim(cache);
    }

    fn detach(self) -> (DescRing, Self::Tied) {
        self.with_ring(())
    }

    fn attach(ring: DescRing, queue: Self::Tied) -> Self {
        queue.with_ring(ring).1
    }
}

impl<F: Format> TiedTx for TxQueue<F, ()> {
    const SEND: SendWord = F::SEND;
    const OVERWRITES_ADDRESSES: bool = F::TXD_OVERWRITES_ADDRESS;

    fn shortest(&self) -> usize {
        if self.pads { SHORTEST } else { 1 }
    }

    #[inline(always)]
    fn announce(&mut self, rings: &mut TiedRings) {
        let head = rings.tx().head();
        if head.is_multiple_of(RECLAIM) {
            rings.mark_last(F::TXD_RS);
        }
        self.counters.doorbells.add(1);
        self.tail.ring((head & (rings.tx().entries() - 1)) as u32);
    }

    #[inline(always)]
    fn completed(&mut self, ring: &DescRing) -> Option<usize> {
        let last = ring.tail().wrapping_add(RECLAIM - 1);
        let is_done = ring.owned() >= RECLAIM && ring.load::<1>(last) & F::TXD_DD != 0;
        Some(if is_done { RECLAIM } else { 0 })
    }

    fn full(&mut self, ring: &DescRing) {
        watch(&mut self.watchdog, ring, &self.fault);
    }

    fn counters(&self) -> &QueueCounters {
        &self.counters
    }
}
