//! Frames of several segments (virtio 1.2, 5.1.6): merged RX buffers, and indirect descriptors for TX. Used
//! only by ports that were started for long frames.
//!
//! A sent frame takes one descriptor of the ring, whatever its number of segments. Everything else about the
//! ring thus stays as for short frames: a slot of the avail ring always names its own descriptor, and one
//! descriptor is one completion. A chain within the ring would require both to be written and recorded per
//! frame. QEMU, the kernel's vhost and DPDK's vhost offer `VIRTIO_F_INDIRECT_DESC`.

use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;
use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::Result;
use vireo_eal::dma::{
    Burst, DescRing, DmaBlock, DmaMemory, DmaRing, FreeBuffers, MAX_SEGMENTS, Packet, PoolCache, first_frame,
    has_segments,
};

use super::HEADER;
use super::checksum::ask;
use super::rx::{REST_LEN, RxQueue, USED_LEN};
use super::split::{DESC_INDIRECT, DESC_NEXT, Violation, shape};
use super::tx::{TxQueue, blank};
use crate::frames::{ETHERNET, bytes, drop_long};
use crate::handover::contradiction;

/// Number of descriptors in an indirect table.
const TABLE: usize = MAX_SEGMENTS.next_power_of_two();
/// Size of a descriptor in bytes.
const DESCRIPTOR: usize = 16;
/// Size of an indirect table in bytes. Each descriptor of the ring has one table.
pub(super) const TABLE_BYTES: usize = TABLE * DESCRIPTOR;

/// Indirect tables for a TX ring, and the packets that they point to.
#[derive(Debug)]
pub(super) struct Chains {
    /// [`TABLE`] descriptors for each descriptor of the ring; the device only reads them.
    tables: DmaRing<u64, 2>,
    /// Segments after the first for each descriptor of the ring; the ring owns the first.
    rest: Box<[ArrayVec<Packet, MAX_SEGMENTS>]>,
    /// Number of packets in `rest`.
    held: usize,
    /// Maximum length of a frame in bytes.
    longest: usize,
}

/// State of [`Chains`].
#[derive(Serialize, Deserialize, Schema)]
pub(super) struct ChainsRecord {
    /// Device address of the first table.
    tables: u64,
    /// Buffers of the segments after the first, for each descriptor of the ring.
    rest: Vec<Vec<u32>>,
}

impl Chains {
    /// Allocates the tables for a ring of `size` descriptors.
    pub(super) fn new(memory: &Arc<DmaMemory>, size: u16) -> Result<Self> {
        let entries = usize::from(size);
        let tables =
            DmaBlock::read_only(memory, entries * TABLE_BYTES, DESCRIPTOR)?.carve(entries * TABLE)?;
        let rest = std::iter::repeat_with(ArrayVec::new).take(entries).collect();
        Ok(Self { tables, rest, held: 0, longest: 0 })
    }

    /// Returns these tables for frames of up to `longest` bytes.
    pub(super) fn for_frames(self, longest: usize) -> Self {
        Self { longest, ..self }
    }

    /// Returns the state of the chains.
    pub(super) fn record(&self) -> ChainsRecord {
        let rest = self.rest.iter().map(|rest| rest.iter().map(Packet::buffer).collect()).collect();
        ChainsRecord { tables: self.tables.iova(), rest }
    }

    /// Continues the chains of another process, whose tables the device reads. These hold no packets.
    pub(super) fn restore(&mut self, record: &ChainsRecord, free: &mut FreeBuffers) -> Result<()> {
        if record.tables != self.tables.iova() {
            return Err(contradiction("indirect tables are at another place in memory"));
        }
        if record.rest.len() != self.size() || record.rest.iter().any(|rest| rest.len() > MAX_SEGMENTS) {
            return Err(contradiction("its frames have more segments or its ring another size"));
        }
        for (own, record) in self.rest.iter_mut().zip(&record.rest) {
            for buffer in record {
                let packet = free.claim_packet(*buffer);
                own.push(packet.ok_or_else(|| contradiction("a segment is in a buffer of another packet"))?);
                self.held += 1;
            }
        }
        Ok(())
    }

    /// Number of descriptors in the ring.
    pub(super) fn size(&self) -> usize {
        self.rest.len()
    }

    /// Number of segments for which there is room. The ring holds no more packets than it has descriptors, as
    /// a ring of single-packet frames does; the pool has enough buffers for that.
    fn room(&self, ring: &DescRing) -> usize {
        ring.room().saturating_sub(self.held)
    }

    /// Makes the descriptor at `position` of `ring` indirect, so that it points to its buffer and to `rest`.
    /// The descriptor was filled with the first `len` bytes of a frame, header included, at device address
    /// `iova`.
    fn link(
        &mut self,
        ring: &mut DescRing,
        position: usize,
        (iova, len): (u64, usize),
        rest: ArrayVec<Packet, MAX_SEGMENTS>,
        cache: &PoolCache,
    ) {
        let slot = position & (self.size() - 1);
        let parts = rest.iter().map(|packet| (cache.iova(packet), packet.len()));
        for (i, (iova, len)) in std::iter::once((iova, len)).chain(parts).enumerate() {
            let (flags, next) = if i < rest.len() { (DESC_NEXT, i as u16 + 1) } else { (0, 0) };
            self.tables.store::<0>(slot * TABLE + i, iova);
            self.tables.store::<1>(slot * TABLE + i, shape(len as u32, flags, next));
        }
        let table = self.tables.iova() + (slot * TABLE_BYTES) as u64;
        let bytes = (rest.len() + 1) * DESCRIPTOR;
        ring.set(position, [table, shape(bytes as u32, DESC_INDIRECT, 0)]);
        self.held += rest.len();
        self.rest[slot] = rest;
    }

    /// Frees the segments after the first of the descriptors at `positions`.
    pub(super) fn free(&mut self, positions: Range<usize>, cache: &mut PoolCache) {
        if self.held == 0 {
            return;
        }
        for position in positions {
            let slot = position & (self.size() - 1);
            self.held -= self.rest[slot].len();
            self.rest[slot].drain(..).for_each(|packet| cache.free(packet));
        }
    }
}

impl TxQueue {
    /// Implements [`TxBurst::tx_burst`](crate::port::TxBurst::tx_burst) for a port that was started for long
    /// frames.
    #[inline(never)]
    pub(super) fn send_frames(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        let Some(chains) = &self.chains else { return 0 };
        let longest = chains.longest;
        if chains.room(&self.queue.ring) < self.queue.ring.entries() / 2 || burst.is_empty() {
            let tail = self.queue.ring.tail();
            self.reclaim(cache);
            let reclaimed = tail..self.queue.ring.tail();
            if let Some(chains) = &mut self.chains {
                chains.free(reclaimed, cache);
            }
        }
        let before = burst.len();
        self.queue.counters.errors.add(drop_long(burst, longest, MAX_SEGMENTS, cache) as u64);
        let (queue, mergeable, checksums) = (&mut self.queue, self.mergeable, self.checksums);
        let Some(chains) = &mut self.chains else { return 0 };
        if !has_segments(burst) {
            let (dropped, room) = (before - burst.len(), chains.room(&queue.ring));
            let sent = if checksums {
                self.send::<true>(room, cache, burst)
            } else {
                self.send::<false>(room, cache, burst)
            };
            return dropped + sent;
        }
        let mut asked = 0;
        let begin = queue.ring.head();
        while !burst.is_empty() && first_frame(burst) <= chains.room(&queue.ring) {
            let rest: ArrayVec<Packet, MAX_SEGMENTS> = burst.drain(1..first_frame(burst)).collect();
            let (position, iova) = (queue.ring.head(), cache.iova(&burst[0]) - HEADER as u64);
            let mut first = 0;
            queue.ring.fill(1, HEADER, cache, burst, |slot, len| {
                if checksums {
                    asked += u64::from(ask(slot, mergeable));
                } else {
                    blank(slot, mergeable);
                }
                first = len;
                shape((HEADER + len) as u32, 0, 0)
            });
            queue.counters.packets.add(1);
            queue.counters.bytes.add((first + bytes(&rest)) as u64);
            if !rest.is_empty() {
                chains.link(&mut queue.ring, position, (iova, HEADER + first), rest, cache);
            }
        }
        queue.counters.checksum_offloaded.add(asked);
        if queue.ring.head() != begin {
            queue.publish(queue.ring.head() as u16);
        } else if !burst.is_empty() {
            self.full();
        }
        before - burst.len()
    }
}

impl RxQueue {
    /// Takes the remaining buffers of a frame that fills `buffers` buffers. `last` is the first of them, and
    /// completions are available up to `used_idx`. Drops the frame if it is not `sound`, if it is too long,
    /// or if the port was not started for it.
    pub(super) fn complete_frame(
        &mut self,
        mut last: Packet,
        buffers: u16,
        sound: bool,
        used_idx: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) -> std::result::Result<(), Violation> {
        let begin = burst.len();
        let mut taken = Ok(());
        // A device makes all buffers of a frame visible at once (5.1.6.4).
        if buffers == 0 || buffers - 1 > used_idx.wrapping_sub(self.queue.last_used) {
            taken = Err(Violation::NumBuffers);
        }
        // `burst` has room for this many segments at each call.
        let mut fits = sound && usize::from(buffers) <= self.segments && last.len() >= ETHERNET;
        let mut bytes = last.len();
        for _ in 1..if taken.is_ok() { buffers } else { 0 } {
            if self.in_order {
                let pending = used_idx.wrapping_sub(self.queue.last_used);
                self.queue.expect_batch(pending, *USED_LEN.end());
            }
            let (mut packet, len) = match self.queue.complete(REST_LEN) {
                Ok(completed) => completed,
                Err(violation) => {
                    taken = Err(violation);
                    break;
                }
            };
            bytes += len;
            // A later buffer has no header: its data begins where a first buffer has its header.
            fits &= packet.prepend(HEADER).is_some();
            let before = std::mem::replace(&mut last, packet.with_len(len));
            if fits {
                burst.push(before);
            } else {
                cache.free(before);
            }
        }
        if taken.is_ok() && fits && bytes <= self.longest {
            burst.push(last);
            if let [segments @ .., _] = &mut burst[begin..] {
                segments.iter_mut().for_each(|packet| packet.set_more(true));
            }
            self.queue.counters.packets.add(1);
            self.queue.counters.bytes.add(bytes as u64);
            return Ok(());
        }
        cache.free(last);
        burst.drain(begin..).for_each(|packet| cache.free(packet));
        self.queue.counters.errors.add(u64::from(taken.is_ok()));
        taken
    }
}
