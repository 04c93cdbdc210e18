//! Transmit queue: legacy descriptors (SDM 3.3.3), one for each packet.

use vireo_eal::dma::{BufferRing, Burst, DmaRing, MAX_BURST, PoolCache};
use vireo_eal::mmio::Doorbell;

use super::regs::{TXD_DD, TXD_EOP, TXD_IFCS, TXD_RS};
use crate::port::{QueueStats, TxBurst};

/// Every descriptor of this many reports its completion, and as many are reclaimed at a time. The smallest
/// ring holds two of them, so that one is always under way when the ring is full.
pub(super) const RECLAIM: usize = 32;
const _: () = assert!(MAX_BURST <= RECLAIM);

/// The transmit queue of a port. The device pads frames to 60 bytes (TCTL.PSP).
#[derive(Debug)]
pub struct TxQueue {
    ring: DmaRing<u64, 2>,
    buffers: BufferRing,
    tail: Doorbell<u32>,
    /// Next descriptor to fill; counts up without end, as `reclaimed` does.
    next: usize,
    /// First descriptor that may still own a buffer; a multiple of [`RECLAIM`].
    reclaimed: usize,
    stats: QueueStats,
}

impl TxQueue {
    pub(super) fn new(ring: DmaRing<u64, 2>, tail: Doorbell<u32>) -> Self {
        ring.fill(0);
        let buffers = BufferRing::new(ring.entries());
        Self { ring, buffers, tail, next: 0, reclaimed: 0, stats: QueueStats::default() }
    }

    /// Takes buffers of completed descriptors back when half of the ring is used, or less is free than `wanted`.
    #[inline(always)]
    fn reclaim(&mut self, cache: &mut PoolCache, wanted: usize) {
        let most = (self.ring.entries() / 2).min(self.ring.entries() - 1 - wanted);
        while self.next.wrapping_sub(self.reclaimed) > most {
            let reports = self.reclaimed.wrapping_add(RECLAIM - 1);
            if self.ring.load::<1>(reports) & TXD_DD == 0 {
                return;
            }
            self.buffers.release(self.reclaimed, RECLAIM, cache);
            self.reclaimed = self.reclaimed.wrapping_add(RECLAIM);
        }
    }

    /// Gives every buffer to `cache` and the ring back; the device was reset.
    pub(super) fn release(mut self, cache: &mut PoolCache) -> DmaRing<u64, 2> {
        self.buffers.release_all(cache);
        self.ring
    }
}

impl TxBurst for TxQueue {
    #[inline(always)]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        self.reclaim(cache, burst.len());
        let mask = self.ring.entries() - 1;
        let start = self.next;
        let free = mask - start.wrapping_sub(self.reclaimed);
        let count = burst.len().min(free);
        if count == 0 {
            return 0;
        }
        let (ring, mut slots, buffers) = (self.ring.view(), self.buffers.view(), cache.buffers());
        // A burst is no longer than RECLAIM, so at most one of its descriptors is at the end of a batch.
        let reports = start | (RECLAIM - 1);
        let mut next = start;
        let mut bytes = 0;
        for packet in burst.drain(..count) {
            let len = packet.len() as u64;
            let buffer = packet.into_buffer();
            let command = if next == reports { TXD_EOP | TXD_IFCS | TXD_RS } else { TXD_EOP | TXD_IFCS };
            ring.store::<0>(next, buffers.iova(&buffer));
            ring.store::<1>(next, len | command);
            slots.put(next, buffer);
            bytes += len;
            next = next.wrapping_add(1);
        }
        self.next = next;
        self.stats.packets += count as u64;
        self.stats.bytes += bytes;
        self.stats.doorbells += 1;
        self.tail.ring((next & mask) as u32);
        count
    }

    fn stats(&self) -> QueueStats {
        self.stats
    }
}
