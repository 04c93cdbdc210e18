//! Receive queue: advanced descriptors with one buffer (DS 7.1.5), refilled in place. A descriptor that was received is
//! written over from its first word on, so a refill writes both words.

use vireo_eal::dma::{BufferRing, Burst, DATA_ROOM, DmaRing, MAX_BURST, PoolCache, dma_rmb};
use vireo_eal::mmio::Doorbell;
use vireo_eal::{Error, ErrorKind, Result};

use super::regs::{RXD_DD, RXD_EOP, RXD_ERRORS, RXD_LEN_SHIFT};
use crate::port::{QueueStats, RxBurst};

/// Length of the packet that a descriptor's second word speaks of, if it is done, whole, free of errors and
/// fits into its buffer.
#[inline(always)]
fn good(word: u64) -> Option<usize> {
    const GOOD: u64 = RXD_DD | RXD_EOP;
    const CHECKED: u64 = GOOD | RXD_ERRORS | (u16::MAX as u64) << RXD_LEN_SHIFT;
    // Whatever is not as it should be makes the length too large: it goes above it.
    let len = ((word ^ GOOD) & CHECKED).rotate_right(RXD_LEN_SHIFT);
    (len.wrapping_sub(1) < DATA_ROOM as u64).then_some(len as usize)
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
    refill_threshold: usize,
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
                .with_hint("ask for more memory with -m MB, or for a smaller ring"));
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
        let refill_threshold = MAX_BURST.min(ring.entries() / 4 * 3);
        let stats = QueueStats::default();
        let mut queue =
            Self { ring, buffers, tail, next: 0, announced: 0, refill_threshold, skipping: false, stats };
        for index in 0..queue.ring.entries() {
            queue.arm(index, cache);
        }
        queue
    }

    /// Writes the descriptor at `index` anew, with the buffer that it owns and no buffer for a header.
    fn arm(&mut self, index: usize, cache: &PoolCache) {
        if let Some(buffer) = self.buffers.take(index) {
            self.ring.store::<0>(index, cache.iova(&buffer));
            let _ = self.buffers.replace(index, buffer);
        }
        self.ring.store::<1>(index, 0);
    }

    /// Tells the device of every descriptor but one: RDT = RDH means an empty ring (DS 7.1.4).
    pub(super) fn announce(&mut self) {
        self.announced = self.next;
        self.tail.ring((self.next.wrapping_sub(1) & (self.ring.entries() - 1)) as u32);
        self.stats.doorbells += 1;
    }

    /// Receives until `burst` is full or no good descriptor is next; gives the number of packets.
    #[inline(always)]
    fn receive(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let start = self.next;
        let mut bytes = 0;
        let received = self.buffers.exchange(
            &self.ring,
            &self.ring,
            start,
            MAX_BURST,
            cache,
            burst,
            |_, completion| good(completion.load::<1>()).inspect(|len| bytes += len),
            |slot| {
                slot.entry.store::<0>(slot.iova());
                slot.entry.store::<1>(0);
            },
        );
        // Each length came with its DD in one load; packet data is read after this.
        dma_rmb();
        self.next = start.wrapping_add(received);
        self.stats.packets += received as u64;
        self.stats.bytes += bytes as u64;
        if self.next.wrapping_sub(self.announced) >= self.refill_threshold {
            self.announce();
        }
        received
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
        if self.next.wrapping_sub(self.announced) >= self.refill_threshold {
            self.announce();
        }
    }

    /// Drops what is bad, up to the next good descriptors, and receives those. The bound keeps a device that
    /// completes bad ones without end from holding the lcore.
    #[cold]
    #[inline(never)]
    fn receive_around(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
        for _ in 0..MAX_BURST {
            let word = self.ring.load::<1>(self.next);
            if word & RXD_DD == 0 || burst.is_full() {
                return;
            }
            if !self.skipping && good(word).is_some() {
                if self.receive(cache, burst) == 0 {
                    self.stats.no_buffer += 1;
                }
                return;
            }
            self.discard(cache, word);
        }
    }

    /// Descriptors that the device has filled and nobody has received.
    pub(super) fn unread(&self) -> usize {
        let done = |i: &usize| self.ring.load::<1>(self.next.wrapping_add(*i)) & RXD_DD != 0;
        (0..self.ring.entries()).take_while(done).count()
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
        if self.ring.load::<1>(self.next) & RXD_DD == 0 {
            return;
        }
        if self.skipping || self.receive(cache, burst) == 0 {
            self.receive_around(cache, burst);
        }
    }

    fn stats(&self) -> QueueStats {
        self.stats
    }
}
