//! Checksums that driver and device leave to each other (virtio 1.2, 5.1.6.2 and 5.1.6.4). Used only by
//! queues of ports that were started with these offloads.

use vireo_eal::dma::{Burst, Packet, PartialChecksum, PoolCache, Slot};

use super::HEADER;
use super::rx::RxQueue;
use super::tx::{TxQueue, blank};

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum is partial; `csum_start` and `csum_offset` locate it.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`: the device verified the checksum as correct.
const DATA_VALID: u8 = 2;

/// Number of bytes written in front of a sent packet: four bytes of the buffer, then the header.
const SENT: usize = size_of::<u128>();

/// Extracts the checksum fields from a header: `flags`, `csum_start` and `csum_offset` of `struct
/// virtio_net_hdr`.
fn read([flags, _, _, _, _, _, s, t, o, p, _, _]: [u8; HEADER]) -> (u8, PartialChecksum) {
    (flags, PartialChecksum { start: u16::from_le_bytes([s, t]), offset: u16::from_le_bytes([o, p]) })
}

/// Returns a header that requests `partial`.
fn request(partial: PartialChecksum) -> [u8; SENT] {
    let ([s, t], [o, p]) = (partial.start.to_le_bytes(), partial.offset.to_le_bytes());
    [0, 0, 0, 0, NEEDS_CSUM, 0, 0, 0, 0, 0, s, t, o, p, 0, 0]
}

/// Whether a partial checksum in the header, if any, lies within the packet's `len` bytes.
#[inline(always)]
pub(super) fn is_sound(header: [u8; HEADER], len: usize) -> bool {
    let (flags, partial) = read(header);
    flags & NEEDS_CSUM == 0 || partial.fits(len)
}

/// Writes the header in front of a packet: one that requests the packet's checksum if it is partial,
/// otherwise as [`blank`] does. Returns whether the header requests a checksum.
#[inline(always)]
pub(super) fn ask(slot: &mut Slot<'_>, mergeable: bool) -> bool {
    let partial = slot.partial_checksum();
    match partial {
        Some(partial) => slot.write_header(&request(partial)),
        None => blank(slot, mergeable),
    }
    partial.is_some()
}

impl RxQueue {
    /// Receives as [`RxQueue::receive`] does, and records the checksum information of the headers.
    #[inline(never)]
    pub(super) fn receive_checksums(&mut self, used_idx: u16, cache: &mut PoolCache, burst: &mut Burst) {
        let before = burst.len();
        if self.mergeable {
            self.receive::<true, true>(used_idx, cache, burst);
        } else {
            self.receive::<false, true>(used_idx, cache, burst);
        }
        let (mut good, mut partial) = (0, 0);
        let mut is_first = true;
        for packet in &mut burst[before..] {
            // The later segments of a frame have no header.
            if std::mem::replace(&mut is_first, !packet.has_more()) {
                let (is_good, is_partial) = note(packet, cache);
                good += u64::from(is_good);
                partial += u64::from(is_partial);
            }
        }
        self.queue.counters.checksum_good.add(good);
        self.queue.counters.checksum_partial.add(partial);
    }
}

/// Records the checksum information of a packet's header; returns whether the checksum is good and whether it
/// is partial.
fn note(packet: &mut Packet, cache: &mut PoolCache) -> (bool, bool) {
    let (flags, partial) = read(cache.read_header(packet));
    if flags & (DATA_VALID | NEEDS_CSUM) == 0 {
        return (false, false);
    }
    let good = flags & DATA_VALID != 0;
    packet.set_good_checksum(good);
    let is_partial = flags & NEEDS_CSUM != 0 && cache.set_partial_checksum(packet, Some(partial)).is_some();
    (good, is_partial)
}

impl TxQueue {
    /// Implements [`TxBurst::tx_burst`](crate::port::TxBurst::tx_burst) for a port that was started with the
    /// offload.
    #[inline(never)]
    pub(super) fn send_checksums(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
        if self.queue.ring.room() < self.queue.ring.entries() / 2 || burst.is_empty() {
            self.reclaim(cache);
        }
        self.send::<true>(self.queue.ring.room(), cache, burst)
    }
}
