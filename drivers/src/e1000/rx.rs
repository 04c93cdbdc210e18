//! Receive queue: legacy descriptors (SDM 3.2.3), refilled in place.

use vireo_eal::dma::{BufferRing, Burst, DATA_ROOM, DmaRing, MAX_BURST, PoolCache, dma_rmb};
use vireo_eal::mmio::Doorbell;
use vireo_eal::{Error, ErrorKind, Result};

use super::regs::{RXD_DD, RXD_EOP, RXD_ERRORS};
use crate::port::{QueueStats, RxBurst};

/// Length of the packet that a descriptor's second word speaks of, if it is done, whole, free of errors and
/// fits into its buffer.
#[inline(always)]
fn good(word: u64) -> Option<u16> {
    const GOOD: u32 = ((RXD_DD | RXD_EOP) >> 32) as u32;
    const JUDGED: u32 = ((RXD_DD | RXD_EOP | RXD_ERRORS) >> 32) as u32;
    let len = word as u16;
    ((word >> 32) as u32 & JUDGED == GOOD && len.wrapping_sub(1) < DATA_ROOM as u16).then_some(len)
}

/// The receive queue of a port. Every descriptor owns a buffer at all times.
#[derive(Debug)]
pub struct RxQueue {
    ring: DmaRing<u64, 2>,
    buffers: BufferRing,
    tail: Doorbell<u32>,
    /// Next descriptor to look at; counts up without end, as `announced` does.
    next: usize,
    /// What `next` was at the last write of RDT.
    announced: usize,
    /// Refilled descriptors that are worth a write of RDT.
    worthwhile: usize,
    /// Inside a frame of several descriptors, which is dropped up to its end.
    skipping: bool,
    stats: QueueStats,
}

/// Buffers for a ring of `entries` descriptors, all of them or none.
pub(super) fn filled(entries: usize, cache: &mut PoolCache) -> Result<BufferRing> {
    let mut buffers = BufferRing::new(entries);
    for index in 0..entries {
        let Some(buffer) = cache.allocate() else {
            buffers.release_all(cache);
            let what = format!("cannot fill an RX ring of {entries} descriptors");
            return Err(Error::new(ErrorKind::Os, what, format!("only {index} buffers are free"))
                .mend("ask for more memory with -m MB, or for a smaller ring"));
        };
        let _ = buffers.replace(index, buffer);
    }
    Ok(buffers)
}

impl RxQueue {
    /// A queue on `ring`, which the device may not write yet. `buffers` has one for each descriptor.
    pub(super) fn new(
        ring: DmaRing<u64, 2>,
        buffers: BufferRing,
        tail: Doorbell<u32>,
        cache: &PoolCache,
    ) -> Self {
        // At most three quarters of the ring wait for a write of RDT, whatever its size.
        let worthwhile = MAX_BURST.min(ring.entries() / 4 * 3);
        let stats = QueueStats::default();
        let mut queue =
            Self { ring, buffers, tail, next: 0, announced: 0, worthwhile, skipping: false, stats };
        for index in 0..queue.ring.entries() {
            queue.arm(index, cache);
        }
        queue
    }

    /// Writes the descriptor at `index` anew, with the buffer that it owns.
    fn arm(&mut self, index: usize, cache: &PoolCache) {
        if let Some(buffer) = self.buffers.take(index) {
            self.ring.store::<0>(index, cache.iova(&buffer));
            let _ = self.buffers.replace(index, buffer);
        }
        self.ring.store::<1>(index, 0);
    }

    /// Tells the device of every descriptor but one: RDT = RDH means an empty ring (SDM 3.2.6).
    pub(super) fn announce(&mut self) {
        self.announced = self.next;
        self.tail.ring((self.next.wrapping_sub(1) & (self.ring.entries() - 1)) as u32);
        self.stats.doorbells += 1;
    }

    /// Receives until `burst` is full or no good descriptor is next; if that one is bad, gives its second word.
    #[inline(always)]
    fn receive(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> Option<u64> {
        let ring = self.ring.view();
        let start = self.next;
        let first = ring.load::<1>(start);
        if first & RXD_DD == 0 || burst.is_full() {
            return None;
        }
        if self.skipping {
            return Some(first);
        }
        let mut bytes = 0;
        let mut stopped = None;
        let done = |index| {
            let word = ring.load::<1>(index);
            let len = good(word);
            match len {
                Some(len) => bytes += u64::from(len),
                None => stopped = Some(word),
            }
            len
        };
        let received = self.buffers.exchange(start, cache, burst, done, |index, iova| {
            ring.store::<0>(index, iova);
            ring.store::<1>(index, 0);
        });
        // Each length came with its DD in one load; packet data is read after this.
        dma_rmb();
        self.next = start.wrapping_add(received);
        self.stats.packets += received as u64;
        self.stats.bytes += bytes;
        if self.next.wrapping_sub(self.announced) >= self.worthwhile {
            self.announce();
        }
        if stopped.is_none() && !burst.is_full() {
            self.stats.no_buffer += u64::from(good(self.ring.load::<1>(self.next)).is_some());
        }
        stopped.filter(|word| word & RXD_DD != 0)
    }

    /// Gives the next descriptor, which is bad and says `word`, back to the device with the same buffer, and
    /// counts its frame.
    fn discard(&mut self, cache: &PoolCache, word: u64) {
        let last = word & RXD_EOP != 0;
        if !self.skipping {
            if last && word & RXD_ERRORS == 0 {
                self.stats.device_errors += 1;
            } else {
                self.stats.errors += 1;
            }
        }
        self.skipping = !last;
        self.arm(self.next, cache);
        self.next = self.next.wrapping_add(1);
        if self.next.wrapping_sub(self.announced) >= self.worthwhile {
            self.announce();
        }
    }

    /// Receives past bad descriptors, the first of which says `word`. The bound keeps a device that completes
    /// them without end from holding the lcore.
    #[cold]
    #[inline(never)]
    fn receive_around(&mut self, cache: &mut PoolCache, burst: &mut Burst, mut word: u64) {
        for _ in 0..MAX_BURST {
            self.discard(cache, word);
            let Some(next) = self.receive(cache, burst) else { return };
            word = next;
        }
    }

    /// Gives every buffer to `cache` and the ring back; the device was reset.
    pub(super) fn release(mut self, cache: &mut PoolCache) -> DmaRing<u64, 2> {
        self.buffers.release_all(cache);
        self.ring
    }
}

impl RxBurst for RxQueue {
    #[inline(always)]
    fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        if let Some(word) = self.receive(cache, burst) {
            self.receive_around(cache, burst, word);
        }
    }

    fn stats(&self) -> QueueStats {
        self.stats
    }
}
