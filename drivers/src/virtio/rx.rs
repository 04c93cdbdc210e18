//! RX queue (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vireo_eal::dma::{
    Burst, Completed, DATA_ROOM, DescRing, DmaRing, FreeBuffers, Limits, MAX_BURST, MAX_SEGMENTS, Moved,
    PoolCache, TiedPacket, TiedRings, dma_rmb,
};
use vireo_eal::event::Event;
use vireo_eal::{Error, ErrorKind, Result};

use super::HEADER;
use super::checksum::is_sound;
use super::features::Features;
use super::split::{DESC_WRITE, QueueRecord, Violation, Virtqueue, shape};
use crate::counters::QueueCounters;
use crate::port::{RxBurst, STANDARD_FRAME};
use crate::tied::{TieRx, TiedRx, TiedTx};

/// Valid used lengths of a frame's first buffer, which begins with the header.
pub(super) const USED_LEN: RangeInclusive<u32> = HEADER as u32..=(HEADER + DATA_ROOM) as u32;
/// Valid used lengths of a frame's later buffers.
pub(super) const REST_LEN: RangeInclusive<u32> = 1..=*USED_LEN.end();

/// Second word of a descriptor with a fresh buffer.
const FRESH: u64 = shape((HEADER + DATA_ROOM) as u32, DESC_WRITE, 0);

/// Whether a received packet's header says that its frame has one buffer.
#[inline(always)]
fn is_one_buffer(packet: &Completed<'_>) -> bool {
    u16::from_le_bytes(packet.read_header()) == 1
}

/// RX queue of a virtio-net device.
#[derive(Debug)]
pub struct RxQueue<R = DescRing> {
    pub(super) queue: Virtqueue<R>,
    pub(super) mergeable: bool,
    /// Whether headers are read for checksums.
    pub(super) checksums: bool,
    /// Whether completions bypass the fast path: headers are read for checksums, or the queue is within a
    /// batch. A single field, so that a poll makes one test.
    is_slow: bool,
    pub(super) in_order: bool,
    /// Refill threshold: number of descriptors that the device lacks when they are offered again.
    refill_threshold: usize,
    /// Tail position at which the ring has room for `refill_threshold` descriptors.
    refill_at: usize,
    /// Position after the invalid completion that ended the use of the queue.
    after_violation: Option<u16>,
    /// Maximum number of buffers per frame: 1, unless the port was started for long frames.
    pub(super) segments: usize,
    /// Maximum length of a frame in bytes.
    pub(super) longest: usize,
    /// Event that the device signals while the queue is armed.
    event: Option<Event>,
}

impl RxQueue {
    /// Creates the queue; frames have at most `longest` bytes. The device signals `event` for an interrupt.
    pub(super) fn new(
        mut queue: Virtqueue,
        counters: Arc<QueueCounters>,
        features: Features,
        longest: usize,
        event: Option<Event>,
    ) -> Self {
        queue.counters = counters;
        let checksums = features.contains(Features::GUEST_CSUM);
        let refill_threshold = (queue.ring.entries() / 4).clamp(1, MAX_BURST);
        Self {
            mergeable: features.contains(Features::MRG_RXBUF),
            checksums,
            is_slow: checksums,
            in_order: features.contains(Features::IN_ORDER),
            refill_threshold,
            refill_at: queue.ring.tail_with_room(refill_threshold),
            after_violation: None,
            segments: if longest > STANDARD_FRAME { MAX_SEGMENTS } else { 1 },
            longest,
            event,
            queue,
        }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        self.queue.name()
    }

    pub(super) fn queue_mut(&mut self) -> &mut Virtqueue {
        &mut self.queue
    }

    /// Continues a queue of another process; see [`Virtqueue::restore`].
    pub(super) fn restore(&mut self, record: &QueueRecord, free: &mut FreeBuffers) -> Result<()> {
        self.queue.restore(record, free)?;
        self.is_slow = self.checksums || self.queue.in_batch;
        self.refill_at = self.queue.ring.tail_with_room(self.refill_threshold);
        Ok(())
    }

    /// Forgets the queue's state, which another process continues. The buffers return to `cache`.
    pub(super) fn lend(&mut self, cache: &mut PoolCache) {
        self.queue.ring.reclaim_all(cache);
        self.queue.last_used = self.queue.offered;
    }

    /// Begins anew on the queue, which was restarted.
    pub(super) fn reopen(&mut self) {
        self.is_slow = self.checksums;
        self.after_violation = None;
        self.refill_at = self.queue.ring.tail_with_room(self.refill_threshold);
    }

    /// Number of buffers that the device has filled and the application has not received.
    pub(super) fn unread(&self) -> u16 {
        self.queue.pending_from(self.after_violation.unwrap_or(self.queue.last_used))
    }

    /// Returns the buffers to their pools. Call only after a reset of the device.
    pub(super) fn into_queue(mut self, cache: &mut PoolCache) -> Virtqueue {
        self.queue.ring.reclaim_all(cache);
        self.queue
    }

    /// Offers all descriptors.
    pub(super) fn prepare(&mut self, cache: &mut PoolCache) -> Result<()> {
        while self.refill(cache) > 0 {}
        match self.queue.ring.room() {
            0 => Ok(()),
            room => Err(Error::new(
                ErrorKind::Os,
                format!("cannot fill the RX ring of virtio NIC {}", self.queue.name()),
                format!("{room} of {} packet buffers are missing", self.queue.size()),
            )),
        }
    }

    /// Whether the device violated the rules of the ring. The queue then receives nothing until the port is
    /// stopped and started.
    pub fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }

    /// Offers up to a burst of descriptors with fresh buffers; returns their number.
    #[inline(never)]
    fn refill(&mut self, cache: &mut PoolCache) -> usize {
        let queue = &mut self.queue;
        let filled = queue.ring.refill(MAX_BURST, HEADER, FRESH, cache);
        if filled > 0 {
            self.refill_at = queue.ring.tail_with_room(self.refill_threshold);
            queue.publish(queue.ring.head() as u16);
        }
        filled
    }

    /// Takes the next completion if it is the expected one. It has a path of its own, because the loop of
    /// [`RxQueue::receive`] takes as many instructions to start as a single packet takes here.
    #[inline(always)]
    fn receive_one(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> bool {
        let (queue, mergeable) = (&mut self.queue, self.mergeable);
        if self.is_slow {
            return false;
        }
        dma_rmb();
        let taken = queue
            .ring
            .take_one_used(&queue.used, HEADER, cache, burst, |packet| !mergeable || is_one_buffer(packet));
        let Some(len) = taken else { return false };
        queue.last_used = queue.last_used.wrapping_add(1);
        queue.counters.packets.add(1);
        queue.counters.bytes.add(len as u64);
        true
    }

    /// Takes all completions that fit into `burst`. Not inlined into the forwarding loop, which would leave too few
    /// registers for the loop in here.
    #[inline(never)]
    fn receive_many(&mut self, used_idx: u16, cache: &mut PoolCache, burst: &mut Burst) {
        if self.mergeable {
            self.receive::<true, false>(used_idx, cache, burst);
        } else {
            self.receive::<false, false>(used_idx, cache, burst);
        }
    }

    /// Takes the expected completions: in order, one buffer each. [`RxQueue::receive_any`] takes all others.
    #[inline(always)]
    pub(super) fn receive<const MERGEABLE: bool, const CHECKSUMS: bool>(
        &mut self,
        used_idx: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) {
        let queue = &mut self.queue;
        let pending = used_idx.wrapping_sub(queue.last_used);
        let is_slow = if CHECKSUMS { queue.in_batch } else { self.is_slow };
        if pending > queue.in_flight() || is_slow {
            return self.receive_slow::<CHECKSUMS>(used_idx, cache, burst);
        }
        dma_rmb();
        let (received, bytes) =
            queue.ring.take_used(&queue.used, pending.into(), HEADER, cache, burst, |packet| {
                (!MERGEABLE || is_one_buffer(packet))
                    && (!CHECKSUMS || is_sound(packet.read_header(), packet.len))
            });
        queue.last_used = queue.last_used.wrapping_add(received as u16);
        queue.counters.packets.add(received as u64);
        queue.counters.bytes.add(bytes);
        if received == 0 {
            self.receive_any(used_idx, cache, burst);
        }
    }

    /// Takes the completions that [`RxQueue::receive`] does not.
    #[cold]
    #[inline(never)]
    fn receive_slow<const CHECKSUMS: bool>(
        &mut self,
        used_idx: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) {
        if self.checksums && !CHECKSUMS {
            self.receive_checksums(used_idx, cache, burst);
        } else {
            self.receive_any(used_idx, cache, burst);
        }
    }

    /// Takes completions in any order, and frames that fill several buffers.
    #[cold]
    #[inline(never)]
    fn receive_any(&mut self, used_idx: u16, cache: &mut PoolCache, burst: &mut Burst) {
        if self.queue.is_broken() {
            return;
        }
        let completed = self.try_receive_any(used_idx, cache, burst);
        if completed.is_err_and(|violation| violation != Violation::UsedIndex) {
            self.after_violation = Some(self.queue.last_used);
        }
        self.queue.settle(completed);
        self.is_slow = self.checksums || self.queue.in_batch;
        // The position changes when `settle` closes the ring of a misbehaving device.
        self.refill_at = self.queue.ring.tail_with_room(self.refill_threshold);
    }

    fn try_receive_any(
        &mut self,
        used_idx: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) -> std::result::Result<(), Violation> {
        self.queue.check_used(used_idx)?;
        dma_rmb();
        // A frame is never split over two bursts; an empty burst has room for any frame.
        while self.queue.last_used != used_idx && burst.remaining_capacity() >= self.segments {
            let pending = used_idx.wrapping_sub(self.queue.last_used);
            if self.in_order {
                self.queue.expect_batch(pending, *USED_LEN.end());
            }
            let (packet, len) = self.queue.complete(USED_LEN)?;
            let buffers = if self.mergeable { u16::from_le_bytes(cache.read_header(&packet)) } else { 1 };
            let packet = packet.with_len(len - HEADER);
            let sound = !self.checksums || is_sound(cache.read_header(&packet), packet.len());
            if buffers != 1 {
                self.complete_frame(packet, buffers, sound, used_idx, cache, burst)?;
            } else if sound {
                self.queue.counters.packets.add(1);
                self.queue.counters.bytes.add(packet.len() as u64);
                burst.push(packet);
            } else {
                self.queue.counters.errors.add(1);
                cache.free(packet);
            }
        }
        Ok(())
    }
}

impl RxBurst for RxQueue {
    #[inline(always)]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        let used_idx = self.queue.used_idx();
        match used_idx.wrapping_sub(self.queue.last_used) {
            0 => {}
            1 if self.receive_one(cache, burst) => {}
            _ => self.receive_many(used_idx, cache, burst),
        }
        if self.queue.ring.has_reached(self.refill_at) && self.refill(cache) == 0 {
            self.queue.counters.no_buffer.add(1);
        }
    }

    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(AsFd::as_fd)
    }

    fn arm(&mut self) -> bool {
        self.enable_interrupt() && !self.queue.ring.has_reached(self.refill_at)
    }

    fn disarm(&mut self) {
        self.disable_interrupt();
    }
}

impl<R> RxQueue<R> {
    /// Exchanges the ring.
    fn with_ring<S>(self, ring: S) -> (R, RxQueue<S>) {
        let Self {
            queue,
            mergeable,
            checksums,
            is_slow,
            in_order,
            refill_threshold,
            refill_at,
            after_violation,
            segments,
            longest,
            event,
        } = self;
        let (before, queue) = queue.with_ring(ring);
        let queue = RxQueue {
            queue,
            mergeable,
            checksums,
            is_slow,
            in_order,
            refill_threshold,
            refill_at,
            after_violation,
            segments,
            longest,
            event,
        };
        (before, queue)
    }

    /// See [`RxBurst::arm`]. Does not look whether the ring waits for buffers.
    fn enable_interrupt(&self) -> bool {
        self.event.is_some() && self.queue.enable_interrupt()
    }

    /// See [`RxBurst::disarm`].
    fn disable_interrupt(&self) {
        self.queue.disable_interrupt();
        if let Some(event) = &self.event {
            event.take();
        }
    }
}

impl TieRx for RxQueue {
    type Tied = RxQueue<()>;

    fn can_tie(&self) -> bool {
        !self.is_slow && self.segments == 1 && !self.is_broken()
    }

    fn ring(&self) -> &DescRing {
        &self.queue.ring
    }

    fn used(&self) -> Option<&DmaRing<u64>> {
        Some(&self.queue.used)
    }

    fn detach(self) -> (DescRing, Self::Tied) {
        self.with_ring(())
    }

    fn attach(ring: DescRing, queue: Self::Tied) -> Self {
        let ((), mut queue) = queue.with_ring(ring);
        queue.refill_at = queue.queue.ring.tail_with_room(queue.refill_threshold);
        queue
    }

    fn postpone_refill(&mut self) {
        self.refill_at = self.queue.ring.tail_with_room(self.queue.ring.entries() / 2);
    }
}

/// [`is_one_buffer`] for a tied lane.
#[inline(always)]
fn is_one_tied_buffer(packet: &TiedPacket<'_>) -> bool {
    u16::from_le_bytes(packet.read_header()) == 1
}

impl TiedRx for RxQueue<()> {
    const FRESH: (usize, u64) = (HEADER, FRESH);
    const OVERWRITES_ADDRESSES: bool = false;

    /// Number of completions.
    type Received = u16;

    #[inline(always)]
    fn received(&self, _rings: &TiedRings) -> Option<u16> {
        let pending = self.queue.used_idx().wrapping_sub(self.queue.last_used);
        (pending != 0).then_some(pending)
    }

    #[inline(always)]
    fn reads_headers(&self) -> bool {
        self.mergeable
    }

    #[inline(always)]
    fn forward_one<T: TiedTx>(
        &mut self,
        pending: u16,
        rings: &mut TiedRings,
        tx: &T,
        limits: &Limits,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        let Self { queue, mergeable, .. } = self;
        if pending != 1 {
            return None;
        }
        dma_rmb();
        let moved = rings.forward_one_used(
            (*limits, HEADER),
            T::SEND,
            |packet| !*mergeable || is_one_tied_buffer(packet),
            |packet| {
                tx.header()(packet);
                edit(packet);
            },
        )?;
        queue.last_used = queue.last_used.wrapping_add(1);
        Some(moved)
    }

    #[inline(always)]
    fn forward_many<T: TiedTx, const HEADERS: bool, const SHORTEST: usize>(
        &mut self,
        pending: u16,
        rings: &mut TiedRings,
        tx: &T,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        let (queue, header) = (&mut self.queue, tx.header());
        if pending > queue.in_flight() {
            return None;
        }
        dma_rmb();
        // A device that merges buffers writes each header anyway; one that does not is often a process.
        let moved = rings.forward_used::<SHORTEST, HEADERS>(
            (pending, HEADER),
            T::SEND,
            |packet| !HEADERS || is_one_tied_buffer(packet),
            |packet| {
                header(packet);
                edit(packet);
            },
        )?;
        queue.last_used = queue.last_used.wrapping_add(moved.count as u16);
        Some(moved)
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(AsFd::as_fd)
    }

    fn arm(&mut self) -> bool {
        self.enable_interrupt()
    }

    fn disarm(&mut self) {
        self.disable_interrupt();
    }

    fn offer(&mut self, ring: &DescRing) {
        self.queue.publish(ring.head() as u16);
    }

    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }
}
