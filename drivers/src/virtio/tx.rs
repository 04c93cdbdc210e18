//! TX queue (virtio 1.2, 5.1.6.2).

use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::Result;
use vireo_eal::dma::{
    Burst, DescRing, FreeBuffers, PoolCache, SendWord, Slot, TiedPacket, TiedRings, dma_rmb,
};

use super::HEADER;
use super::chains::{Chains, ChainsRecord};
use super::checksum::ask;
use super::features::Features;
use super::split::{QueueRecord, Violation, Virtqueue};
use crate::counters::QueueCounters;
use crate::handover::contradiction;
use crate::port::{Offloads, TxBurst, Watchdog};
use crate::tied::{TieTx, TiedTx};

/// Shape of a descriptor that sends a packet of one buffer: the length, without flags.
const WHOLE: SendWord = SendWord { bits: 0, front: HEADER, second_len: None, written_by_device: false };

/// Header that requests nothing, and the bytes before it.
const BLANK: u128 = 0;

/// Whether a header requests nothing: `flags`, `gso_type` and `hdr_len` are 0. The other fields then mean nothing
/// to the device. The last of them, `num_buffers`, is 1 in a buffer that was filled by a device without
/// `VIRTIO_NET_F_MRG_RXBUF` (virtio 1.2, 5.1.6.4.1). `hdr_len` means nothing either, but Linux drops a frame that is
/// shorter (drivers/net/tun.c, `tun_get_user`).
#[inline(always)]
fn is_blank(header: [u8; HEADER]) -> bool {
    let [flags, gso_type, hdr_len @ .., _, _, _, _, _, _, _, _] = header;
    u32::from_ne_bytes([flags, gso_type, hdr_len[0], hdr_len[1]]) == 0
}

/// Writes a header that requests nothing in front of a packet, unless the packet already has one. Without the
/// write, the header stays in the cache of a device that is a process.
#[inline(always)]
pub(super) fn blank(slot: &mut Slot<'_>, mergeable: bool) {
    if mergeable || !is_blank(slot.read_header()) {
        slot.write_header(&BLANK.to_ne_bytes());
    }
}

/// TX queue of a virtio-net device.
#[derive(Debug)]
pub struct TxQueue<R = DescRing> {
    pub(super) queue: Virtqueue<R>,
    /// Whether the device uses descriptors in order, so that the used index alone identifies the returned
    /// ones.
    in_order: bool,
    /// Whether the device writes the header of each frame that it receives (5.1.6.4).
    pub(super) mergeable: bool,
    /// Number of free descriptors below which buffers are reclaimed. `usize::MAX` if packets need more than
    /// one buffer with a blank header; [`TxQueue::send_slow`] then sends them.
    reclaim_below: usize,
    /// Present if the device is hardware.
    watchdog: Option<Watchdog>,
    /// Number of packets that were completed when the device was last found late.
    late_at: Option<usize>,
    /// Indirect tables, present if the port was started for frames longer than a buffer.
    pub(super) chains: Option<Box<Chains>>,
    /// Whether the device computes checksums.
    pub(super) checksums: bool,
}

/// State of a TX queue.
#[derive(Serialize, Deserialize, Schema)]
pub(super) struct TxRecord {
    queue: QueueRecord,
    chains: Option<ChainsRecord>,
}

impl<R> TxQueue<R> {
    /// Whether the device violated the rules of the ring. The queue then sends nothing until the port is
    /// stopped and started.
    pub fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }

    /// Handles a ring without room for a burst. The specification sets no time limit: a healthy device stands
    /// still while its host is paused or the switch behind it restarts, and a restart of the port would lose
    /// what the port has received. The driver rings once more in case a doorbell was lost. A broken device
    /// reports that (`DEVICE_NEEDS_RESET`).
    #[cold]
    #[inline(never)]
    pub(super) fn full(&mut self) -> usize {
        let queue = &mut self.queue;
        // Not `last_used`, which wraps around to the same number.
        let completed = (queue.counters.packets.get() as usize).wrapping_sub(queue.in_flight().into());
        if !queue.is_broken() && self.watchdog.as_mut().is_some_and(|watchdog| watchdog.is_late(completed)) {
            queue.ring_late(self.late_at != Some(completed));
            self.late_at = Some(completed);
        }
        0
    }

    /// Exchanges the ring.
    fn with_ring<S>(self, ring: S) -> (R, TxQueue<S>) {
        let Self { queue, in_order, mergeable, reclaim_below, watchdog, late_at, chains, checksums } = self;
        let (before, queue) = queue.with_ring(ring);
        let queue =
            TxQueue { queue, in_order, mergeable, reclaim_below, watchdog, late_at, chains, checksums };
        (before, queue)
    }
}

impl TxQueue {
    pub(super) fn new(
        mut queue: Virtqueue,
        counters: Arc<QueueCounters>,
        features: Features,
        watched: bool,
        chains: Option<Chains>,
    ) -> Self {
        queue.counters = counters;
        let checksums = features.contains(Features::CSUM);
        let is_plain = chains.is_none() && !checksums;
        Self {
            in_order: features.contains(Features::IN_ORDER),
            mergeable: features.contains(Features::MRG_RXBUF),
            reclaim_below: if is_plain { queue.ring.entries() / 2 } else { usize::MAX },
            watchdog: watched.then(Watchdog::default),
            late_at: None,
            chains: chains.map(Box::new),
            checksums,
            queue,
        }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        self.queue.name()
    }

    pub(super) fn queue_mut(&mut self) -> &mut Virtqueue {
        &mut self.queue
    }

    /// Returns the state of the queue.
    ///
    /// # Errors
    /// As for [`Virtqueue::record`].
    pub(super) fn record(&self) -> Result<TxRecord> {
        let chains = self.chains.as_ref().map(|chains| chains.record());
        Ok(TxRecord { queue: self.queue.record()?, chains })
    }

    /// Continues a queue of another process; see [`Virtqueue::restore`].
    pub(super) fn restore(&mut self, record: &TxRecord, free: &mut FreeBuffers) -> Result<()> {
        self.queue.restore(&record.queue, free)?;
        match (&mut self.chains, &record.chains) {
            (Some(chains), Some(record)) => chains.restore(record, free),
            (None, None) => Ok(()),
            _ => Err(contradiction("only one of both programs sends long frames")),
        }
    }

    /// Forgets the queue's state, which another process continues. The buffers return to `cache`.
    pub(super) fn lend(&mut self, cache: &mut PoolCache) {
        self.queue.ring.reclaim_all(cache);
        if let Some(chains) = &mut self.chains {
            chains.free(0..chains.size(), cache);
        }
        self.queue.last_used = self.queue.offered;
    }

    /// Number of packets that the device was given and has not completed.
    pub(super) fn unfinished(&self) -> usize {
        self.queue.ring.owned().saturating_sub(self.queue.pending_from(self.queue.last_used).into())
    }

    /// Returns the buffers to their pools. Call only after a reset of the device.
    pub(super) fn into_queue(mut self, cache: &mut PoolCache) -> (Virtqueue, Option<Chains>) {
        self.lend(cache);
        (self.queue, self.chains.map(|chains| *chains))
    }

    /// Hands up to `room` packets of one buffer each to the device. The ring has as many free descriptors.
    #[inline(always)]
    pub(super) fn send<const CHECKSUMS: bool>(
        &mut self,
        room: usize,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) -> usize {
        let count = room.min(burst.len());
        if count == 0 {
            return if burst.is_empty() { 0 } else { self.full() };
        }
        let (queue, mergeable) = (&mut self.queue, self.mergeable);
        let mut asked = 0;
        let bytes = queue.ring.fill_words::<0>(count, WHOLE, cache, burst, |slot| {
            if CHECKSUMS {
                asked += u64::from(ask(slot, mergeable));
            } else {
                blank(slot, mergeable);
            }
        });
        queue.counters.packets.add(count as u64);
        queue.counters.bytes.add(bytes);
        if CHECKSUMS {
            queue.counters.checksum_offloaded.add(asked);
        }
        queue.publish(queue.ring.head() as u16);
        count
    }

    /// Sends packets that have segments or need checksums.
    #[cold]
    #[inline(never)]
    fn send_slow(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.chains.is_some() { self.send_frames(cache, burst) } else { self.send_checksums(cache, burst) }
    }

    /// Reclaims the buffers of completed descriptors.
    #[inline(never)]
    pub(super) fn reclaim(&mut self, cache: &mut PoolCache) {
        let queue = &mut self.queue;
        let used_idx = queue.used_idx();
        let pending = used_idx.wrapping_sub(queue.last_used);
        if pending > queue.in_flight() || queue.ring.has_holes() {
            return self.reclaim_any(used_idx, cache);
        }
        dma_rmb();
        if self.in_order {
            // The device may skip elements in between (2.7.9). If it breaks its promise of order, only its
            // own frames suffer.
            queue.ring.reclaim(pending.into(), cache);
            queue.last_used = used_idx;
            return;
        }
        while queue.last_used != used_idx {
            let rest = used_idx.wrapping_sub(queue.last_used);
            let count = queue.ring.reclaim_used(&queue.used, rest.into(), cache);
            if count == 0 {
                return self.reclaim_any(used_idx, cache);
            }
            queue.last_used = queue.last_used.wrapping_add(count as u16);
        }
    }

    /// Reclaims as [`TxQueue::reclaim`] does, with completions in any order.
    #[cold]
    #[inline(never)]
    fn reclaim_any(&mut self, used_idx: u16, cache: &mut PoolCache) {
        if self.queue.is_broken() {
            return;
        }
        let completed = self.try_reclaim_any(used_idx, cache);
        self.queue.settle(completed);
    }

    fn try_reclaim_any(
        &mut self,
        used_idx: u16,
        cache: &mut PoolCache,
    ) -> std::result::Result<(), Violation> {
        self.queue.check_used(used_idx)?;
        dma_rmb();
        while self.queue.last_used != used_idx {
            // The device writes no data, so the length has no meaning (2.7.8.2).
            cache.free(self.queue.complete(0..=u32::MAX)?.0);
        }
        Ok(())
    }
}

impl TxBurst for TxQueue {
    /// Sends a burst. An empty burst reclaims every buffer that the device has completed.
    // Not inlined: the forwarding loop leaves too few registers for the loop in here.
    #[inline(never)]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.queue.ring.room() < self.reclaim_below || burst.is_empty() {
            // A separate field would cost the loop below two instructions per packet through its register
            // allocation.
            if self.reclaim_below == usize::MAX {
                return self.send_slow(cache, burst);
            }
            self.reclaim(cache);
        }
        self.send::<false>(self.queue.ring.room(), cache, burst)
    }

    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }

    fn offloads(&self) -> Offloads {
        if self.checksums { Offloads::TX_CHECKSUM } else { Offloads::empty() }
    }
}

impl TieTx for TxQueue {
    type Tied = TxQueue<()>;

    fn can_tie(&self) -> bool {
        self.chains.is_none() && !self.checksums && !self.is_broken()
    }

    fn ring(&self) -> &DescRing {
        &self.queue.ring
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

impl TiedTx for TxQueue<()> {
    const SEND: SendWord = WHOLE;
    const OVERWRITES_ADDRESSES: bool = false;

    /// Does what `blank` does on the general path.
    #[inline(always)]
    fn header(&self) -> impl Fn(&mut TiedPacket<'_>) + Copy {
        let mergeable = self.mergeable;
        move |packet| {
            if mergeable || !is_blank(packet.read_header()) {
                packet.write_header(BLANK.to_ne_bytes());
            }
        }
    }

    #[inline(always)]
    fn announce(&mut self, rings: &mut TiedRings) {
        self.queue.publish(rings.tx().head() as u16);
    }

    #[inline(always)]
    fn completed(&mut self, ring: &DescRing) -> Option<usize> {
        let queue = &mut self.queue;
        let used_idx = queue.used_idx();
        let pending = used_idx.wrapping_sub(queue.last_used);
        if pending > queue.in_flight() {
            return None;
        }
        dma_rmb();
        let count = match self.in_order {
            true => pending.into(),
            false => ring.used_in_order(&queue.used, pending.into()),
        };
        queue.last_used = queue.last_used.wrapping_add(count as u16);
        (count > 0 || pending == 0).then_some(count)
    }

    fn full(&mut self, _ring: &DescRing) {
        self.full();
    }

    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }
}
