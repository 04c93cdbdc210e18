//! Transmit queue (virtio 1.2, 5.1.6.2).

use std::sync::Arc;

use vireo_eal::dma::{Burst, PoolCache, Slot, dma_rmb};

use super::HEADER;
use super::chains::Chains;
use super::checksum::ask;
use super::features::Features;
use super::split::{Lie, Virtqueue, shape};
use crate::counters::QueueCounters;
use crate::port::{Offloads, TxBurst, Watchdog};

/// Writes a header that asks for nothing in front of a packet, if it is not there. One that is not written stays in the cache
/// of a device that is a process.
#[inline(always)]
pub(super) fn blank(slot: &mut Slot<'_>, mergeable: bool) {
    const BLANK: u128 = 0;
    if mergeable || u128::from_ne_bytes(slot.read_header()) != BLANK {
        slot.write_header(&BLANK.to_ne_bytes());
    }
}

/// Sending half of a virtio-net device.
#[derive(Debug)]
pub struct TxQueue {
    pub(super) queue: Virtqueue,
    /// The device uses descriptors in order, so that the used index alone tells which are back.
    in_order: bool,
    /// The device writes the header of each frame that it receives (5.1.6.4).
    pub(super) mergeable: bool,
    /// Buffers are taken back when fewer descriptors than this can be filled. `usize::MAX` where packets are more than a buffer
    /// with a blank header: they are for [`TxQueue::send_aside`].
    reclaim_below: usize,
    /// Of a device that is hardware.
    watchdog: Option<Watchdog>,
    /// Packets that were completed when the device was last found late.
    late_at: Option<usize>,
    /// Of a port that was started for frames that are longer than a buffer.
    pub(super) chains: Option<Box<Chains>>,
    /// Whether the device makes checksums.
    pub(super) checksums: bool,
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

    /// Packets that the device was given and has not completed.
    pub(super) fn unfinished(&self) -> usize {
        self.queue.ring.owned().saturating_sub(self.queue.untaken(self.queue.last_used).into())
    }

    /// Gives the buffers back; only after a reset of the device.
    pub(super) fn into_queue(mut self, cache: &mut PoolCache) -> (Virtqueue, Option<Chains>) {
        self.queue.ring.reclaim_all(cache);
        if let Some(chains) = &mut self.chains {
            chains.free(0..chains.size(), cache);
        }
        (self.queue, self.chains.map(|chains| *chains))
    }

    /// Whether the device broke the rules of the ring. The queue then sends nothing until the port is stopped and
    /// started.
    pub fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }

    /// Finds no room for a burst. The specification sets a device no time limit: a healthy device stands still while its
    /// host is paused or the switch behind it is restarted, and a restart of the port would lose what it has received.
    /// The driver rings once more, in case a doorbell was lost. A broken device says so (`DEVICE_NEEDS_RESET`).
    #[cold]
    #[inline(never)]
    pub(super) fn full(&mut self) -> usize {
        let queue = &mut self.queue;
        // Not `last_used`, which comes to the same number again.
        let completed = (queue.counters.packets.get() as usize).wrapping_sub(queue.in_flight().into());
        if !queue.is_broken() && self.watchdog.as_mut().is_some_and(|watchdog| watchdog.is_late(completed)) {
            queue.ring_late(self.late_at != Some(completed));
            self.late_at = Some(completed);
        }
        0
    }

    /// Hands packets of one buffer each to the device, as far as descriptors are free.
    #[inline(always)]
    pub(super) fn send<const CHECKSUMS: bool>(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let count = self.queue.ring.room().min(burst.len());
        if count == 0 {
            return if burst.is_empty() { 0 } else { self.full() };
        }
        let (queue, mergeable) = (&mut self.queue, self.mergeable);
        let (mut bytes, mut asked) = (0, 0);
        queue.ring.fill(count, HEADER, cache, burst, |slot, len| {
            if CHECKSUMS {
                asked += u64::from(ask(slot, mergeable));
            } else {
                blank(slot, mergeable);
            }
            bytes += len;
            shape((HEADER + len) as u32, 0, 0)
        });
        queue.counters.packets.add(count as u64);
        queue.counters.bytes.add(bytes as u64);
        if CHECKSUMS {
            queue.counters.checksum_offloaded.add(asked);
        }
        queue.publish(queue.ring.head() as u16);
        count
    }

    /// Sends what has segments or checksums.
    #[cold]
    #[inline(never)]
    fn send_aside(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.chains.is_some() { self.send_frames(cache, burst) } else { self.send_checksums(cache, burst) }
    }

    /// Takes back the buffers of completed descriptors.
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
            // It may leave out elements in between (2.7.9), and a promise that it breaks harms its own frames only.
            queue.ring.reclaim(pending.into(), cache);
            queue.last_used = used_idx;
            return;
        }
        while queue.last_used != used_idx {
            let rest = used_idx.wrapping_sub(queue.last_used);
            let run = queue.used.view().run(queue.last_used.into(), rest.into());
            let wanted = run.len();
            let count = run.take_while(|(index, used)| used.load::<0>() as u32 == *index as u32).count();
            queue.ring.reclaim(count, cache);
            queue.last_used = queue.last_used.wrapping_add(count as u16);
            if count != wanted {
                return self.reclaim_any(used_idx, cache);
            }
        }
    }

    /// As [`TxQueue::reclaim`], with completions in any order.
    #[cold]
    #[inline(never)]
    fn reclaim_any(&mut self, used_idx: u16, cache: &mut PoolCache) {
        if self.queue.is_broken() {
            return;
        }
        let completed = self.try_reclaim_any(used_idx, cache);
        self.queue.settle(completed);
    }

    fn try_reclaim_any(&mut self, used_idx: u16, cache: &mut PoolCache) -> std::result::Result<(), Lie> {
        self.queue.check_used(used_idx)?;
        dma_rmb();
        while self.queue.last_used != used_idx {
            // The device writes nothing, so its length says nothing (2.7.8.2).
            cache.free(self.queue.complete(0..=u32::MAX)?.0);
        }
        Ok(())
    }
}

impl TxBurst for TxQueue {
    /// An empty burst takes back every buffer that the device is done with.
    // Apart from the forwarding loop, where too few registers are left for the loop in here.
    #[inline(never)]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.queue.ring.room() < self.reclaim_below || burst.is_empty() {
            // A field for it would take the loop below two instructions for each packet, by the registers it gets.
            if self.reclaim_below == usize::MAX {
                return self.send_aside(cache, burst);
            }
            self.reclaim(cache);
        }
        self.send::<false>(cache, burst)
    }

    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }

    fn offloads(&self) -> Offloads {
        if self.checksums { Offloads::TX_CHECKSUM } else { Offloads::empty() }
    }
}
