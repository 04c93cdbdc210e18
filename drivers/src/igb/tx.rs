//! Transmit queue: advanced data descriptors (DS 7.2.2), one for each packet.

use vireo_eal::dma::{BufferRing, Burst, DmaRing, MAX_BURST, PoolCache};
use vireo_eal::mmio::Doorbell;

use super::regs::{TXD_DD, TXD_DEXT, TXD_DTYP_DATA, TXD_EOP, TXD_IFCS, TXD_PAYLEN_SHIFT, TXD_RS};
use crate::port::{Fault, QueueStats, TxBurst, Watchdog};

/// Every descriptor of this many reports its completion, and as many are reclaimed at a time. The smallest
/// ring holds two of them, so that one is always under way when the ring is full.
pub(super) const RECLAIM: usize = 32;
const _: () = assert!(MAX_BURST <= RECLAIM);

/// Shortest frame, in bytes without its check sequence. The chip pads what has 17 bytes and more (Linux, `igb_xmit_frame`), and so
/// all that came from a wire.
const SHORTEST: usize = 60;

/// Second word of the descriptor for a packet of `len` bytes.
#[inline(always)]
fn data(len: u64) -> u64 {
    len | TXD_DTYP_DATA | TXD_DEXT | TXD_EOP | TXD_IFCS | len << TXD_PAYLEN_SHIFT
}

/// The transmit queue of a port.
#[derive(Debug)]
pub struct TxQueue {
    ring: DmaRing<u64, 2>,
    buffers: BufferRing,
    tail: Doorbell<u32>,
    /// Whether short frames are padded by us.
    pads: bool,
    /// Next descriptor to fill; counts up without end, as `reclaimed` does.
    next: usize,
    /// First descriptor that may still own a buffer; a multiple of [`RECLAIM`].
    reclaimed: usize,
    stats: QueueStats,
    watchdog: Watchdog,
    fault: Fault,
}

impl TxQueue {
    pub(super) fn new(ring: DmaRing<u64, 2>, tail: Doorbell<u32>, pads: bool, fault: Fault) -> Self {
        ring.fill(0);
        let buffers = BufferRing::new(ring.entries());
        let (stats, watchdog) = (QueueStats::default(), Watchdog::default());
        Self { ring, buffers, tail, pads, next: 0, reclaimed: 0, stats, watchdog, fault }
    }

    /// Finds no room for a burst; asks for a restart after a second of it.
    #[cold]
    #[inline(never)]
    fn full(&mut self) -> usize {
        if self.watchdog.is_late(self.reclaimed) {
            self.fault.raise("nothing was sent for a second though the ring is full");
        }
        0
    }

    /// Takes back the buffers of all descriptors that the device is done with.
    #[inline(never)]
    fn reclaim(&mut self, cache: &mut PoolCache) {
        let start = self.reclaimed;
        // A batch that is not full yet shows the state of its last turn.
        let full = self.next.wrapping_sub(start) / RECLAIM;
        let last = |batch: usize| start.wrapping_add(batch * RECLAIM + RECLAIM - 1);
        let done = (0..full).take_while(|batch| self.ring.load::<1>(last(*batch)) & TXD_DD != 0);
        let count = done.count() * RECLAIM;
        self.buffers.release(start, count, cache);
        self.reclaimed = start.wrapping_add(count);
    }

    /// Descriptors from `head` on, where the device says it is (TDH), to the last one that was filled; all that may
    /// own a buffer when it says what cannot be.
    pub(super) fn unfinished(&self, head: u32) -> usize {
        let behind = self.next.wrapping_sub(head as usize) & (self.ring.entries() - 1);
        behind.min(self.next.wrapping_sub(self.reclaimed))
    }

    /// Gives every buffer to `cache` and the ring back; the device was reset.
    pub(super) fn release(mut self, cache: &mut PoolCache) -> DmaRing<u64, 2> {
        self.buffers.release_all(cache);
        self.ring
    }

    // Apart from the forwarding loop, where too few registers are left for the loop in here.
    #[inline(never)]
    fn transmit<const PADS: bool>(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let mask = self.ring.entries() - 1;
        let start = self.next;
        let mut count = burst.len();
        // Until half of the ring is in use a burst finds room.
        if start.wrapping_sub(self.reclaimed) > mask / 2 {
            self.reclaim(cache);
            count = count.min(mask - start.wrapping_sub(self.reclaimed));
        }
        if count == 0 {
            return if burst.is_empty() { 0 } else { self.full() };
        }
        // A burst is no longer than RECLAIM, so at most one of its descriptors is the last of a batch.
        let reports = start | (RECLAIM - 1);
        let shortest = if PADS { SHORTEST } else { 0 };
        let reporting = burst[..count].get(reports - start).map(|packet| packet.len().max(shortest) as u64);
        let mut bytes = 0;
        self.buffers.keep(&self.ring, start, count, cache, burst, |slot, len| {
            let len = if PADS && len < SHORTEST { slot.pad::<SHORTEST>(len) } else { len };
            slot.entry.store::<0>(slot.iova());
            slot.entry.store::<1>(data(len as u64));
            bytes += len as u64;
        });
        if let Some(len) = reporting {
            self.ring.store::<1>(reports, data(len) | TXD_RS);
        }
        let next = start.wrapping_add(count);
        self.next = next;
        self.stats.packets += count as u64;
        self.stats.bytes += bytes;
        self.stats.doorbells += 1;
        self.tail.ring((next & mask) as u32);
        count
    }
}

impl TxBurst for TxQueue {
    #[inline(always)]
    fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.pads { self.transmit::<true>(cache, burst) } else { self.transmit::<false>(cache, burst) }
    }

    fn stats(&self) -> QueueStats {
        self.stats
    }
}
