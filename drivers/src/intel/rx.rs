//! Receive queue (SDM 3.2, DS 7.1).

use std::marker::PhantomData;
use std::sync::Arc;

use vireo_eal::dma::{Burst, DATA_ROOM, DescRing, MAX_BURST, MAX_FRAME, MAX_SEGMENTS, PoolCache, dma_rmb};
use vireo_eal::mmio::Doorbell;
use vireo_eal::{Error, ErrorKind, Result};

use super::format::Format;
use crate::counters::QueueCounters;
use crate::port::RxBurst;

/// Bytes of a buffer that the device fills on a port for long frames: the most that it can be told and that fit behind the
/// headroom (RCTL.BSIZE, SRRCTL.BSIZEPACKET).
const SEGMENT: usize = 1024;
const _: () = assert!(SEGMENT <= DATA_ROOM && MAX_FRAME <= MAX_SEGMENTS * SEGMENT);

/// The receive queue of a port.
///
/// A descriptor without a buffer has DD set: either it is done and its packet was received, or it never had a buffer.
#[derive(Debug)]
pub struct RxQueue<F> {
    ring: DescRing,
    tail: Doorbell<u32>,
    /// Descriptors without a buffer that are worth a refill and a write of RDT.
    refill_threshold: usize,
    /// Position of the tail with room for so many.
    refill_at: usize,
    /// Inside a frame of several descriptors, which is dropped up to its end.
    skipping: bool,
    /// Most bytes of a frame of several descriptors; 0 where each is dropped.
    longest: usize,
    counters: Arc<QueueCounters>,
    _format: PhantomData<F>,
}

/// Gives the descriptors of `ring` their buffers, all but one or none: RDT = RDH means an empty ring (SDM 3.2.6).
///
/// # Errors
/// `Os` when there are too few buffers.
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
    /// A queue on `ring`, which is filled and which the device may not write yet. The device fills [`SEGMENT`] bytes of a
    /// buffer if `long` frames are to be received, which have up to so many bytes.
    pub(super) fn new(
        ring: DescRing,
        tail: Doorbell<u32>,
        counters: Arc<QueueCounters>,
        long: Option<usize>,
    ) -> Self {
        // At most three quarters of the ring wait for a refill, whatever its size.
        let refill_threshold = MAX_BURST.min(ring.entries() / 4 * 3);
        Self {
            refill_at: ring.tail_with_room(refill_threshold),
            ring,
            tail,
            refill_threshold,
            skipping: false,
            longest: long.unwrap_or(0),
            counters,
            _format: PhantomData,
        }
    }

    /// Tells the device which descriptors have a buffer.
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

    /// Receives the packet of the next descriptor, which says `word`, if it is a good one and there is room for it. A path of its
    /// own, because the loop of [`RxQueue::receive`] takes as many instructions to begin as a lone packet takes in all.
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

    /// Receives all that there is for `burst`. Apart from the forwarding loop, where too few registers are left for the
    /// loop in here.
    #[inline(never)]
    fn receive_many(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        if self.skipping || self.receive(burst) == 0 {
            self.receive_around(cache, burst);
        }
    }

    /// Receives until `burst` is full or no good descriptor is next; gives the number of packets.
    #[inline(always)]
    fn receive(&mut self, burst: &mut Burst) -> usize {
        let (received, bytes) = self.ring.take_words(F::GOOD, burst);
        // Each length came with its DD in one load; packet data is read after this.
        dma_rmb();
        self.counters.packets.add(received as u64);
        self.counters.bytes.add(bytes);
        received
    }

    /// Drops the frame, or the part of one, in the next descriptor, which is bad and says `word`.
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

    /// Receives the frame whose first descriptor is next. It stays in the ring until its last descriptor is there, too, and
    /// until a burst has room for all; then false. If it is damaged or too long, true, and it is for [`RxQueue::discard`].
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
            // All buffers but the last are full.
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

    /// Drops what is bad, up to the next good descriptors, and receives those. The bound keeps a device that
    /// completes bad ones without end from holding the lcore.
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

    /// Descriptors that the device has filled and nobody has received.
    pub(super) fn unread(&self) -> usize {
        let done = |i: &usize| self.ring.load::<1>(self.ring.tail().wrapping_add(*i)) & F::RXD_DD != 0;
        (0..self.ring.owned()).take_while(done).count()
    }

    /// Gives every buffer to `cache` and the ring back; the device was reset.
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
}
