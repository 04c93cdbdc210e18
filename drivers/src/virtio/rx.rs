//! Receive queue (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::ops::RangeInclusive;
use std::sync::Arc;

use vireo_eal::dma::{Burst, DATA_ROOM, MAX_BURST, Packet, PoolCache, dma_rmb};
use vireo_eal::{Error, ErrorKind, Result};

use super::HEADER;
use super::features::Features;
use super::split::{DESC_WRITE, Lie, Virtqueue, shape};
use crate::port::{QueueStats, RxBurst};

/// What a used length may be: of a frame's first buffer, which begins with the header.
const USED_LEN: RangeInclusive<u32> = HEADER as u32..=(HEADER + DATA_ROOM) as u32;
/// Of a later buffer of the same frame.
const REST_LEN: RangeInclusive<u32> = 1..=*USED_LEN.end();

/// Receiving half of a virtio-net device.
#[derive(Debug)]
pub struct RxQueue {
    queue: Virtqueue,
    mergeable: bool,
    in_order: bool,
    /// Descriptors are offered again when the device lacks so many.
    offer_at: u16,
    /// Position behind the lie that ended the use of the queue.
    behind_lie: Option<u16>,
}

impl RxQueue {
    pub(super) fn new(queue: Virtqueue, features: Features) -> Self {
        Self {
            mergeable: features.contains(Features::MRG_RXBUF),
            in_order: features.contains(Features::IN_ORDER),
            offer_at: (queue.size() / 4).clamp(1, MAX_BURST as u16),
            behind_lie: None,
            queue,
        }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        self.queue.name()
    }

    pub(super) fn queue_mut(&mut self) -> &mut Virtqueue {
        &mut self.queue
    }

    /// Buffers that the device has filled and nobody has received.
    pub(super) fn unread(&self) -> u16 {
        self.queue.untaken(self.behind_lie.unwrap_or(self.queue.next))
    }

    /// Gives the buffers back; only after a reset of the device.
    pub(super) fn into_queue(mut self, cache: &mut PoolCache) -> Virtqueue {
        self.queue.release_all(cache);
        self.queue
    }

    /// Writes what never changes of the descriptors and offers all of them.
    pub(super) fn prepare(&mut self, cache: &mut PoolCache) -> Result<()> {
        for slot in 0..self.queue.size() {
            self.queue.desc.store::<1>(slot.into(), shape((HEADER + DATA_ROOM) as u32, DESC_WRITE, 0));
        }
        while self.queue.room() > 0 {
            let room = self.queue.room();
            self.offer(cache);
            if self.queue.room() == room {
                return Err(Error::new(
                    ErrorKind::Os,
                    format!("cannot fill the RX ring of virtio NIC {}", self.queue.name()),
                    format!("{room} of {} packet buffers are missing", self.queue.size()),
                ));
            }
        }
        Ok(())
    }

    /// Whether the device broke the rules of the ring. The queue then receives nothing until the port is
    /// stopped and started.
    pub fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }

    /// Offers what was filled again, after up to a burst of descriptors that have no buffer.
    #[inline]
    fn offer(&mut self, cache: &mut PoolCache) {
        if self.queue.room() > 0 {
            self.refill(cache);
        }
        if self.queue.waiting() > 0 {
            self.queue.publish();
        }
    }

    #[cold]
    #[inline(never)]
    fn refill(&mut self, cache: &mut PoolCache) {
        let queue = &mut self.queue;
        // A ring that is filled goes the fast way, which looks at every element.
        if queue.is_in_batch() {
            return;
        }
        for _ in 0..queue.room().min(MAX_BURST as u16) {
            let Some(buffer) = cache.allocate() else {
                queue.stats.no_buffer += 1;
                return;
            };
            let position = usize::from(queue.filled);
            queue.desc.store::<0>(position, cache.iova(&buffer) - HEADER as u64);
            queue.slots.put(position, buffer);
            queue.filled = queue.filled.wrapping_add(1);
        }
    }

    /// Takes completions that are as expected: in order, one buffer each, of a ring whose descriptors are all
    /// filled, so that fresh buffers go where the old ones were. Anything else is for [`RxQueue::receive_any`].
    #[inline(always)]
    fn receive<const MERGEABLE: bool>(&mut self, used_idx: u16, cache: &mut PoolCache, burst: &mut Burst) {
        let queue = &mut self.queue;
        let pending = used_idx.wrapping_sub(queue.next);
        if pending > queue.in_flight() || queue.filled.wrapping_sub(queue.next) != queue.size() {
            return self.receive_any(used_idx, cache, burst);
        }
        dma_rmb();
        let mut bytes = 0;
        let received = queue.slots.exchange(
            &queue.desc,
            &queue.used,
            queue.next.into(),
            pending.into(),
            cache,
            burst,
            |slot, completion| {
                let len = (completion.load::<1>() as usize).wrapping_sub(HEADER);
                let good = completion.load::<0>() as usize == slot.index
                    && len <= DATA_ROOM
                    && (!MERGEABLE || u16::from_le_bytes(slot.read_header()) == 1);
                good.then_some(len).inspect(|len| bytes += len)
            },
            |slot| slot.entry.store::<0>(slot.iova() - HEADER as u64),
        );
        queue.next = queue.next.wrapping_add(received as u16);
        queue.tail = queue.next;
        queue.filled = queue.filled.wrapping_add(received as u16);
        queue.stats.packets += received as u64;
        queue.stats.bytes += bytes as u64;
        if received == 0 {
            self.receive_any(used_idx, cache, burst);
        }
    }

    /// Takes completions in any order and drops frames that fill several buffers.
    #[cold]
    #[inline(never)]
    fn receive_any(&mut self, used_idx: u16, cache: &mut PoolCache, burst: &mut Burst) {
        if self.queue.is_broken() {
            return;
        }
        let completed = self.try_receive_any(used_idx, cache, burst);
        if completed.is_err_and(|lie| lie != Lie::UsedIndex) {
            self.behind_lie = Some(self.queue.next);
        }
        self.queue.settle(completed);
    }

    fn try_receive_any(
        &mut self,
        used_idx: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) -> std::result::Result<(), Lie> {
        self.queue.check_used(used_idx)?;
        self.queue.withdraw(cache);
        dma_rmb();
        while self.queue.next != used_idx && !burst.is_full() {
            let pending = used_idx.wrapping_sub(self.queue.next);
            if self.in_order {
                self.queue.expect_batch(pending, *USED_LEN.end());
            }
            let (buffer, len) = self.queue.complete(USED_LEN)?;
            let buffers = if self.mergeable { u16::from_le_bytes(cache.read_header(&buffer)) } else { 1 };
            if buffers == 1 {
                self.queue.stats.packets += 1;
                self.queue.stats.bytes += (len - HEADER) as u64;
                burst.push(Packet::new(buffer, len - HEADER));
                continue;
            }
            cache.free(buffer);
            // A device shows all buffers of a frame at once (5.1.6.4).
            if buffers == 0 || buffers > pending {
                return Err(Lie::NumBuffers);
            }
            for _ in 1..buffers {
                cache.free(self.queue.complete(REST_LEN)?.0);
            }
            self.queue.stats.errors += 1;
        }
        Ok(())
    }
}

impl RxBurst for RxQueue {
    #[inline(always)]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        let used_idx = self.queue.used_idx();
        if used_idx != self.queue.next {
            if self.mergeable {
                self.receive::<true>(used_idx, cache, burst);
            } else {
                self.receive::<false>(used_idx, cache, burst);
            }
        }
        if self.queue.size().wrapping_sub(self.queue.in_flight()) >= self.offer_at {
            self.offer(cache);
        }
    }

    fn stats(&self) -> QueueStats {
        self.queue.stats
    }
}
