//! Receive queue (SDM 3.2, DS 7.1).

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::dma::{
    Burst, DATA_ROOM, DescRing, FreeBuffers, Limits, MAX_BURST, MAX_FRAME, MAX_SEGMENTS, Moved, PoolCache,
    RingRecord, TiedPacket, TiedRings, dma_rmb,
};
use vireo_eal::mmio::Doorbell;
use vireo_eal::{Error, ErrorKind, Result};

use super::format::Format;
use super::interrupt::RxInterrupt;
use crate::counters::QueueCounters;
use crate::port::RxBurst;
use crate::tied::{TieRx, TiedRx, TiedTx};

/// Bytes that the device fills per buffer on a port for long frames: the largest size that can be configured
/// and that fits after the headroom (RCTL.BSIZE, SRRCTL.BSIZEPACKET).
const SEGMENT: usize = 1024;
const _: () = assert!(SEGMENT <= DATA_ROOM && MAX_FRAME <= MAX_SEGMENTS * SEGMENT);

/// The receive queue of a port.
///
/// A descriptor without a buffer has DD set: either its packet was received, or it never had a buffer.
#[derive(Debug)]
pub struct RxQueue<F, R = DescRing> {
    ring: R,
    tail: Doorbell<u32>,
    /// Refill threshold: number of descriptors without a buffer that justify a refill and a write of RDT.
    refill_threshold: usize,
    /// Position of the tail at which the refill threshold is reached.
    refill_at: usize,
    /// Whether the next descriptor continues a frame that is dropped up to its end.
    skipping: bool,
    /// Maximum length in bytes of a frame that spans several descriptors; 0 if all such frames are dropped.
    longest: usize,
    counters: Arc<QueueCounters>,
    interrupt: Option<Box<RxInterrupt>>,
    _format: PhantomData<F>,
}

/// State of a queue.
#[derive(Serialize, Deserialize, Schema)]
pub(super) struct RxRecord {
    ring: RingRecord,
    skipping: bool,
}

/// Gives a buffer to every descriptor of `ring` except one, because RDT = RDH means an empty ring (SDM
/// 3.2.6). On failure no descriptor keeps a buffer.
///
/// # Errors
/// `Os` when the pool has too few free buffers.
pub(super) fn fill<F: Format>(ring: &mut DescRing, cache: &mut PoolCache) -> Result<()> {
    ring.restart(ring.entries() - 1, [0, F::RXD_DD]);
    while ring.refill(MAX_BURST, 0, 0, cache) > 0 {}
    if ring.room() == 0 {
        return Ok(());
    }
    let why = format!("only {} buffers are free", ring.owned());
    ring.reclaim_all(cache);
    let what = format!("cannot fill an RX ring of {} descriptors", ring.entries());
    Err(Error::new(ErrorKind::Os, what, why)
        .with_hint("ask for more memory with -m MB, or for a smaller ring"))
}

impl<F: Format> RxQueue<F> {
    /// Creates a queue on `ring`, which is as the device has it. If `long` is
    /// given, frames have up to `long` bytes and the device fills [`SEGMENT`] bytes per buffer.
    pub(super) fn new(
        ring: DescRing,
        tail: Doorbell<u32>,
        counters: Arc<QueueCounters>,
        long: Option<usize>,
        interrupt: Option<RxInterrupt>,
    ) -> Self {
        // At most three quarters of the ring wait for a refill, however small the ring.
        let refill_threshold = MAX_BURST.min(ring.entries() / 4 * 3);
        Self {
            refill_at: ring.tail_with_room(refill_threshold),
            ring,
            tail,
            refill_threshold,
            skipping: false,
            longest: long.unwrap_or(0),
            counters,
            interrupt: interrupt.map(Box::new),
            _format: PhantomData,
        }
    }

    /// Returns the state of the queue.
    pub(super) fn record(&self) -> RxRecord {
        RxRecord { ring: self.ring.record(), skipping: self.skipping }
    }

    /// Continues a queue of another process. This one owns no buffer.
    pub(super) fn restore(&mut self, record: &RxRecord, free: &mut FreeBuffers) -> Result<()> {
        self.ring.restore(&record.ring, free)?;
        self.refill_at = self.ring.tail_with_room(self.refill_threshold);
        self.skipping = record.skipping;
        Ok(())
    }

    /// Publishes to the device, through RDT, which descriptors have a buffer.
    pub(super) fn announce(&mut self) {
        self.tail.ring((self.ring.head() & (self.ring.entries() - 1)) as u32);
        self.counters.doorbells.add(1);
    }

    #[inline(never)]
    fn refill(&mut self, cache: &mut PoolCache) {
        if self.ring.refill(MAX_BURST, 0, 0, cache) > 0 {
            self.refill_at = self.ring.tail_with_room(self.refill_threshold);
            self.announce();
        } else {
            self.counters.no_buffer.add(1);
        }
    }

    /// Receives the packet of the next descriptor, whose second word is `word`, if the packet is good and
    /// `burst` has room. This is a separate path because starting the loop of [`RxQueue::receive`] takes as
    /// many instructions as a lone packet takes in total.
    #[inline(always)]
    fn receive_one(&mut self, word: u64, burst: &mut Burst) -> bool {
        let Some(len) = F::GOOD.len(word).filter(|_| !self.skipping) else { return false };
        if !self.ring.take_one(burst, len) {
            return false;
        }
        dma_rmb();
        self.counters.packets.add(1);
        self.counters.bytes.add(len as u64);
        true
    }

    /// Receives completed packets into `burst`. Kept out of the forwarding loop, where too few CPU registers
    /// are left for this loop.
    #[inline(never)]
    fn receive_many(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        if self.skipping || self.receive(burst) == 0 {
            self.receive_around(cache, burst);
        }
    }

    /// Receives until `burst` is full or the next descriptor is not good. Returns the number of packets.
    #[inline(always)]
    fn receive(&mut self, burst: &mut Burst) -> usize {
        let (received, bytes) = self.ring.take_words(F::GOOD, burst);
        // Each length was loaded together with its DD. Packet data is read after this barrier.
        dma_rmb();
        self.counters.packets.add(received as u64);
        self.counters.bytes.add(bytes);
        received
    }

    /// Drops the contents of the next descriptor, a frame or a part of one. The descriptor is bad, and its
    /// second word is `word`.
    fn discard(&mut self, cache: &mut PoolCache, word: u64) {
        let last = word & F::RXD_EOP != 0;
        if !self.skipping {
            if last && word & F::RXD_ERRORS == 0 {
                self.counters.device_errors.add(1);
            } else {
                self.counters.errors.add(1);
            }
        }
        self.skipping = !last;
        self.ring.reclaim(1, cache);
    }

    /// Receives the frame whose first descriptor is next. Returns false if the frame stays in the ring
    /// because its last descriptor is not completed yet or `burst` has no room for the whole frame. Returns
    /// true and sets `skipping` if the frame is damaged or too long and [`RxQueue::discard`] must drop it.
    fn receive_frame(&mut self, burst: &mut Burst) -> bool {
        let (mut lens, mut bytes) = ([0; MAX_SEGMENTS], 0);
        for segments in 1..=MAX_SEGMENTS {
            let word = self.ring.load::<1>(self.ring.tail().wrapping_add(segments - 1));
            if word & F::RXD_DD == 0 || self.ring.owned() < segments {
                return false;
            }
            let (len, is_last) = (F::len(word), word & F::RXD_EOP != 0);
            lens[segments - 1] = len;
            bytes += len;
            // Every buffer except the last must be full.
            if len == 0 || len > SEGMENT || len < SEGMENT && !is_last {
                self.counters.device_errors.add(1);
                break;
            }
            if bytes > self.longest || is_last && word & F::RXD_ERRORS != 0 {
                self.counters.errors.add(1);
                break;
            }
            if is_last {
                let taken = self.ring.take_frame(burst, &lens[..segments]);
                dma_rmb();
                self.counters.packets.add(u64::from(taken));
                self.counters.bytes.add(if taken { bytes as u64 } else { 0 });
                return taken;
            }
        }
        self.skipping = true;
        true
    }

    /// Drops bad descriptors up to the next good ones, and receives those. The loop is bounded, so that a
    /// device that completes bad descriptors without end cannot hold the lcore.
    #[cold]
    #[inline(never)]
    fn receive_around(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        for _ in 0..MAX_BURST {
            let word = self.ring.load::<1>(self.ring.tail());
            if word & F::RXD_DD == 0 || burst.is_full() || self.ring.owned() == 0 {
                return;
            }
            if !self.skipping && F::GOOD.len(word).is_some() {
                self.receive(burst);
                return;
            }
            if self.longest > 0 && !self.skipping && word & F::RXD_EOP == 0 {
                if !self.receive_frame(burst) {
                    return;
                }
                if !self.skipping {
                    continue;
                }
            }
            self.discard(cache, word);
        }
    }

    /// Number of descriptors that the device has filled and that were not received.
    pub(super) fn unread(&self) -> usize {
        let done = |i: &usize| self.ring.load::<1>(self.ring.tail().wrapping_add(*i)) & F::RXD_DD != 0;
        (0..self.ring.owned()).take_while(done).count()
    }

    /// Forgets the buffers, whose queue another process continues. They return to `cache`.
    pub(super) fn lend(&mut self, cache: &mut PoolCache) {
        self.ring.reclaim_all(cache);
    }

    /// Fills the ring, which owns no buffer and which the device does not use, anew.
    pub(super) fn refill_all(&mut self, cache: &mut PoolCache) -> Result<()> {
        fill::<F>(&mut self.ring, cache)?;
        self.refill_at = self.ring.tail_with_room(self.refill_threshold);
        self.skipping = false;
        Ok(())
    }

    pub(super) fn ring(&self) -> &DescRing {
        &self.ring
    }

    /// Returns every buffer to `cache`, and the ring to the caller. The device must have been reset.
    pub(super) fn release(mut self, cache: &mut PoolCache) -> DescRing {
        self.ring.reclaim_all(cache);
        self.ring
    }
}

impl<F: Format> RxBurst for RxQueue<F> {
    #[inline(always)]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        let tail = self.ring.tail();
        let word = self.ring.load::<1>(tail);
        if word & F::RXD_DD == 0 {
            return;
        }
        let is_lone = self.ring.load::<1>(tail.wrapping_add(1)) & F::RXD_DD == 0;
        if !(is_lone && self.receive_one(word, burst)) {
            self.receive_many(cache, burst);
        }
        if self.ring.has_reached(self.refill_at) {
            self.refill(cache);
        }
    }

    fn counters(&self) -> &QueueCounters {
        &self.counters
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.interrupt_event()
    }

    fn arm(&mut self) -> bool {
        // DD is also set where there is no buffer.
        self.enable_interrupt() && self.ring.load::<1>(self.ring.tail()) & F::RXD_DD == 0
    }

    fn disarm(&mut self) {
        self.disable_interrupt();
    }
}

impl<F, R> RxQueue<F, R> {
    /// Exchanges the ring.
    fn with_ring<S>(self, ring: S) -> (R, RxQueue<F, S>) {
        let Self {
            ring: before,
            tail,
            refill_threshold,
            refill_at,
            skipping,
            longest,
            counters,
            interrupt,
            _format,
        } = self;
        let queue = RxQueue {
            ring,
            tail,
            refill_threshold,
            refill_at,
            skipping,
            longest,
            counters,
            interrupt,
            _format,
        };
        (before, queue)
    }

    /// Lets the chip interrupt. Returns false if the port was started without interrupts.
    fn enable_interrupt(&self) -> bool {
        self.interrupt.as_ref().inspect(|interrupt| interrupt.arm()).is_some()
    }

    fn disable_interrupt(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.disarm();
        }
    }

    fn interrupt_event(&self) -> Option<BorrowedFd<'_>> {
        self.interrupt.as_ref().map(|interrupt| interrupt.event().as_fd())
    }
}

impl<F: Format> TieRx for RxQueue<F> {
    type Tied = RxQueue<F, ()>;

    fn can_tie(&self) -> bool {
        self.longest == 0 && !self.skipping
    }

    fn ring(&self) -> &DescRing {
        &self.ring
    }

    fn detach(self) -> (DescRing, Self::Tied) {
        self.with_ring(())
    }

    fn attach(ring: DescRing, queue: Self::Tied) -> Self {
        let ((), mut queue) = queue.with_ring(ring);
        queue.refill_at = queue.ring.tail_with_room(queue.refill_threshold);
        queue
    }

    fn postpone_refill(&mut self) {
        self.refill_at = self.ring.tail_with_room(self.ring.entries() / 2);
    }
}

impl<F: Format> TiedRx for RxQueue<F, ()> {
    const FRESH: (usize, u64) = (0, 0);
    const OVERWRITES_ADDRESSES: bool = F::RXD_OVERWRITES_ADDRESS;

    /// Second word of the next descriptor.
    type Received = u64;

    #[inline(always)]
    fn received(&self, rings: &TiedRings) -> Option<u64> {
        let word = rings.next_word();
        (word & F::RXD_DD != 0).then_some(word)
    }

    #[inline(always)]
    fn forward_one<T: TiedTx>(
        &mut self,
        word: u64,
        rings: &mut TiedRings,
        tx: &T,
        limits: &Limits,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        let header = tx.header();
        rings.forward_one((word, F::RXD_DD), F::GOOD, limits, T::SEND, |packet| {
            header(packet);
            edit(packet);
        })
    }

    #[inline(always)]
    fn forward_many<T: TiedTx, const HEADERS: bool, const SHORTEST: usize>(
        &mut self,
        _word: u64,
        rings: &mut TiedRings,
        tx: &T,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        let header = tx.header();
        rings.forward_words::<SHORTEST>(F::GOOD, T::SEND, |packet| {
            header(packet);
            edit(packet);
        })
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.interrupt_event()
    }

    fn arm(&mut self) -> bool {
        self.enable_interrupt()
    }

    fn disarm(&mut self) {
        self.disable_interrupt();
    }

    fn offer(&mut self, ring: &DescRing) {
        self.counters.doorbells.add(1);
        self.tail.ring((ring.head() & (ring.entries() - 1)) as u32);
    }

    fn counters(&self) -> &QueueCounters {
        &self.counters
    }
}
