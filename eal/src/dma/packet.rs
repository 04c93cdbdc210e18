//! The 8-byte handle that owns a packet buffer.

use std::mem::{self, offset_of};

use arrayvec::ArrayVec;

/// Size of a buffer in bytes: a power of two, so that no buffer crosses a page.
pub const BUFFER_SIZE: usize = 2048;

/// Bytes before the data of a received packet: room to prepend headers. It puts the data on a cache line
/// boundary.
pub const HEADROOM: usize = 128;

/// Maximum length of a packet in a fresh buffer, in bytes.
pub const DATA_ROOM: usize = BUFFER_SIZE - HEADROOM;

/// Maximum number of packets in a [`Burst`].
pub const MAX_BURST: usize = 32;

/// Maximum number of packets in one frame: 9724 bytes in buffers that a device fills with 1024 bytes each. A
/// burst has room for three such frames.
pub const MAX_SEGMENTS: usize = 10;

/// Maximum frame length in bytes, without the frame check sequence: 9728 with it, which is the maximum of the
/// 82576.
pub const MAX_FRAME: usize = 9724;

/// Bytes at the start of a buffer for per-packet metadata. See [`metadata`](super::metadata).
pub(super) const METADATA: usize = 32;

/// Bytes before a packet's data that drivers can write: room for a virtio-net header.
pub(super) const DEVICE_HEADER: usize = 16;

/// Bytes at the start of a buffer that applications cannot access.
const RESERVED: usize = METADATA + DEVICE_HEADER;

/// Maximum data offset. It leaves [`SHORT`] bytes between the start of a packet's data and the end of its
/// buffer.
const MAX_OFFSET: usize = BUFFER_SIZE - SHORT;

/// Number of bytes at the start of a packet that can be accessed without a bounds check.
pub(super) const SHORT: usize = 64;

/// Packets that move together.
pub type Burst = ArrayVec<Packet, MAX_BURST>;

/// Bits of [`Packet::at`] that hold the data offset.
const OFFSET: u32 = BUFFER_SIZE as u32 - 1;

/// Bit of [`Packet::flags`]: the frame continues in the next packet.
const MORE: u8 = 1 << 0;
/// Bit of [`Packet::flags`]: a device found the checksum of the TCP or UDP header to be correct.
const CHECKSUM_GOOD: u8 = 1 << 1;
/// Bit of [`Packet::flags`]: the checksum is partial, and the metadata holds its place.
const CHECKSUM_PARTIAL: u8 = 1 << 2;

/// A packet: one buffer of a [`Pool`](super::Pool), and the part of it that is in use. Takes 8 bytes and is
/// moved by value.
///
/// Each buffer has exactly one handle. The handle moves into a descriptor ring, or returns to its pool
/// through the cache of any pool ([`PoolCache::free`](super::PoolCache::free)). If a handle is dropped, its
/// pool loses the buffer. A cache of another pool gives no access to the buffer: it panics.
///
/// The data begins at least 48 bytes after the start of the buffer and at least 64 bytes before its end, and
/// ends within the buffer.
///
/// A frame that is longer than a buffer consists of several packets, its segments, which follow each other in
/// one burst. [`Packet::has_more`] is true for all but the last. Only ports that were started for long frames
/// receive and send such frames.
#[derive(Debug, PartialEq, Eq)]
#[repr(C, align(8))]
#[must_use = "a dropped packet is lost to its pool; give it to `PoolCache::free`"]
pub struct Packet {
    /// Pool offset of the data: bytes from the pool's first byte, a multiple of [`BUFFER_SIZE`] plus the data
    /// offset.
    at: u32,
    /// Tag of the pool.
    tag: u8,
    flags: u8,
    len: u16,
}

const _: () = assert!(HEADROOM >= RESERVED && HEADROOM <= MAX_OFFSET && cfg!(target_endian = "little"));

/// Number of packets in the first frame of `packets`, 0 if there are none. A frame whose last packet is
/// missing extends to the end of `packets`.
pub fn first_frame(packets: &[Packet]) -> usize {
    frames(packets).next().map_or(0, <[_]>::len)
}

/// Frames of `packets`, in order. The last frame may lack packets, as in [`first_frame`].
pub fn frames(packets: &[Packet]) -> impl Iterator<Item = &[Packet]> {
    packets.split_inclusive(|packet| !packet.has_more())
}

/// Whether a packet of `packets` is followed by another segment of its frame.
#[inline(always)]
pub fn has_segments(packets: &[Packet]) -> bool {
    flags(packets) & MORE != 0
}

/// Whether a packet of `packets` has a [partial checksum](Packet::has_partial_checksum).
#[inline(always)]
pub fn has_partial_checksums(packets: &[Packet]) -> bool {
    flags(packets) & CHECKSUM_PARTIAL != 0
}

/// Flags of all packets combined. Whole packets are combined, without an early end, because the compiler turns
/// that into one instruction per packet.
#[inline(always)]
fn flags(packets: &[Packet]) -> u8 {
    let all = packets.iter().fold(0, |all, packet| all | packet.bits());
    (all >> (8 * offset_of!(Packet, flags))) as u8
}

impl Packet {
    /// All bits of a fresh packet except its buffer and length.
    #[inline(always)]
    pub(super) fn fresh_bits(tag: u8) -> u64 {
        u64::from(tag) << 32 | HEADROOM as u64
    }

    /// Tag in the result of [`Packet::fresh_bits`].
    #[inline(always)]
    pub(super) fn tag_in(fresh_bits: u64) -> u8 {
        (fresh_bits >> 32) as u8
    }

    /// Creates a packet of `len` bytes, at most [`DATA_ROOM`], in the buffer at the pool offset `slot`. It
    /// must be the buffer's only handle.
    #[inline(always)]
    pub(super) fn in_slot(slot: u32, len: usize, fresh_bits: u64) -> Self {
        // SAFETY: both types have 8 bytes, and any bits are a valid packet: `at` is the low half, the length
        // the top quarter. Built as one value, a packet takes one store.
        unsafe { mem::transmute(fresh_bits | (len as u64) << 48 | u64::from(slot)) }
    }

    /// Tag of the pool.
    #[inline(always)]
    pub(super) fn tag(&self) -> u8 {
        self.tag
    }

    #[inline(always)]
    fn bits(&self) -> u64 {
        // SAFETY: both have 8 bytes, and none of them is padding.
        unsafe { mem::transmute_copy(self) }
    }

    /// Tags of four packets combined. Every tag has the same number of bits set, so the result is a pool's tag
    /// only if all four packets belong to that pool.
    #[inline(always)]
    pub(super) fn tags(packets: &[Self; 4]) -> u8 {
        packets.iter().fold(0, |tags, packet| tags | packet.tag)
    }

    /// Pool offset of the data.
    #[inline(always)]
    pub(super) fn at(&self) -> u32 {
        self.at
    }

    /// Pool offset of the buffer.
    #[inline(always)]
    pub(super) fn slot(&self) -> u32 {
        self.at & !OFFSET
    }

    /// Number that identifies the buffer in its pool, in every process that has the pool's memory.
    pub fn buffer(&self) -> u32 {
        self.slot()
    }

    /// Offset of the data in the buffer.
    #[inline(always)]
    pub(super) fn offset(&self) -> usize {
        (self.at & OFFSET) as usize
    }

    fn replace(&mut self, offset: usize, len: usize) {
        debug_assert!((RESERVED..=MAX_OFFSET).contains(&offset) && offset + len <= BUFFER_SIZE);
        self.at = self.slot() | offset as u32;
        self.len = len as u16;
    }

    /// Length of the data in bytes, without the frame check sequence.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len.into()
    }

    /// Returns whether the frame continues in the next packet of the burst.
    #[inline(always)]
    pub fn has_more(&self) -> bool {
        self.flags & MORE != 0
    }

    /// Sets whether the frame continues in the next packet of the burst.
    pub fn set_more(&mut self, more: bool) {
        self.set_flag(MORE, more);
    }

    /// Returns whether the device that received the packet found the checksum of its TCP or UDP header to be
    /// correct. Later changes by the application do not affect the result.
    #[inline(always)]
    pub fn has_good_checksum(&self) -> bool {
        self.flags & CHECKSUM_GOOD != 0
    }

    /// Sets whether the checksum of the TCP or UDP header was found to be correct.
    pub fn set_good_checksum(&mut self, good: bool) {
        self.set_flag(CHECKSUM_GOOD, good);
    }

    /// Returns whether the checksum of the TCP or UDP header is still to be computed.
    /// [`PoolCache::partial_checksum`](super::PoolCache::partial_checksum) returns its place.
    #[inline(always)]
    pub fn has_partial_checksum(&self) -> bool {
        self.flags & CHECKSUM_PARTIAL != 0
    }

    pub(super) fn set_partial(&mut self, partial: bool) {
        self.set_flag(CHECKSUM_PARTIAL, partial);
    }

    fn set_flag(&mut self, flag: u8, on: bool) {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
    }

    /// Number of bytes before the data that [`Packet::prepend`] can take.
    pub fn headroom(&self) -> usize {
        self.offset() - RESERVED
    }

    /// Number of bytes after the data that [`Packet::append`] can take.
    pub fn tailroom(&self) -> usize {
        BUFFER_SIZE - self.offset() - self.len()
    }

    /// Returns the packet with `len` bytes of data from the same offset on, cut to what fits into the buffer.
    #[inline(always)]
    pub fn with_len(mut self, len: usize) -> Self {
        self.len = len.min(BUFFER_SIZE - self.offset()) as u16;
        self
    }

    /// Extends the data by `count` bytes at the front, with unspecified content. Returns `None`, and changes
    /// nothing, if [`Packet::headroom`] is less.
    #[must_use]
    pub fn prepend(&mut self, count: usize) -> Option<()> {
        let offset = self.offset().checked_sub(count).filter(|offset| *offset >= RESERVED)?;
        self.replace(offset, self.len() + count);
        Some(())
    }

    /// Extends the data by `count` bytes at the end, with unspecified content. Returns `None`, and changes
    /// nothing, if [`Packet::tailroom`] is less.
    #[must_use]
    pub fn append(&mut self, count: usize) -> Option<()> {
        let len = self.len().checked_add(count).filter(|len| *len <= BUFFER_SIZE - self.offset())?;
        self.replace(self.offset(), len);
        Some(())
    }

    /// Removes `count` bytes from the end of the data. Returns `None`, and changes nothing, if there are
    /// fewer.
    #[must_use]
    pub fn trim(&mut self, count: usize) -> Option<()> {
        self.replace(self.offset(), self.len().checked_sub(count)?);
        Some(())
    }

    /// Removes `count` bytes from the front of the data. Returns `None`, and changes nothing, if there are
    /// fewer, or if the rest would be too close to the end of the buffer. In that case,
    /// [`PoolCache::adj`](super::PoolCache::adj) moves the data.
    pub(super) fn advance(&mut self, count: usize) -> Option<()> {
        let len = self.len().checked_sub(count)?;
        let offset = Some(self.offset() + count).filter(|offset| *offset <= MAX_OFFSET)?;
        self.replace(offset, len);
        Some(())
    }

    /// Moves the data offset back to that of a fresh packet, and sets the length to `len`.
    pub(super) fn rewind(&mut self, len: usize) {
        self.replace(HEADROOM, len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_handle_says_where_and_how_much() {
        let packet = Packet::in_slot(5 * BUFFER_SIZE as u32, 60, Packet::fresh_bits(0xa5));
        assert_eq!(
            (packet.len(), packet.headroom(), packet.tailroom()),
            (60, HEADROOM - RESERVED, DATA_ROOM - 60)
        );
        assert_eq!((packet.slot(), packet.at()), (5 * 2048, 5 * 2048 + HEADROOM as u32));
        assert_eq!((packet.tag(), Packet::tag_in(Packet::fresh_bits(0xa5))), (0xa5, 0xa5));
        assert_eq!(packet.with_len(usize::MAX).len(), DATA_ROOM);
    }

    fn burst(more: &[bool]) -> Vec<Packet> {
        let segment = |(i, more): (usize, &bool)| {
            let mut packet = Packet::in_slot((i * BUFFER_SIZE) as u32, i + 1, Packet::fresh_bits(0x0f));
            packet.set_more(*more);
            packet
        };
        more.iter().enumerate().map(segment).collect()
    }

    #[test]
    fn frames_end_with_the_packet_that_has_no_more() {
        let lens = |more: &[bool]| frames(&burst(more)).map(<[_]>::len).collect::<Vec<_>>();
        assert_eq!(lens(&[false, true, true, false, false]), [1, 3, 1]);
        assert_eq!((lens(&[]), first_frame(&[])), (vec![], 0));
        assert_eq!((lens(&[false, true, true]), first_frame(&burst(&[true, true]))), (vec![1, 2], 2));
    }

    #[test]
    fn flags_of_any_packet_are_found_and_nothing_else() {
        let all = || Packet::in_slot(!OFFSET, DATA_ROOM, Packet::fresh_bits(0xff));
        let found = |packets: &[Packet]| (has_segments(packets), has_partial_checksums(packets));
        assert_eq!(found(&[]), (false, false));
        for at in 0..7 {
            let mut packets: Vec<_> = (0..7).map(|_| all()).collect();
            packets[at].set_good_checksum(true);
            assert_eq!(found(&packets), (false, false));
            packets[at].set_partial(true);
            assert_eq!(found(&packets), (false, true));
            packets[(at + 3) % 7].set_more(true);
            assert_eq!(found(&packets), (true, true));
        }
    }

    #[test]
    fn what_moves_the_data_leaves_the_rest() {
        let mut packet = burst(&[true]).remove(0);
        packet.prepend(3).unwrap();
        packet = packet.with_len(900);
        packet.rewind(5);
        assert!(packet.has_more());
        packet.set_good_checksum(true);
        packet.set_partial(true);
        packet.set_more(false);
        assert_eq!(
            (packet.has_more(), packet.has_good_checksum(), packet.has_partial_checksum()),
            (false, true, true)
        );
        packet.set_good_checksum(false);
        assert_eq!((packet.has_good_checksum(), packet.has_partial_checksum()), (false, true));
        assert_eq!((packet.tag(), packet.len(), packet.slot()), (0x0f, 5, 0));
    }

    proptest! {
        /// The model is a byte range within a buffer.
        #[test]
        fn data_stays_within_its_buffer(
            slot in 0..1_u32 << 21,
            steps in prop::collection::vec((0..4, 0..2200_usize), 0..40),
        ) {
            let mut packet = Packet::in_slot(slot * BUFFER_SIZE as u32, 0, Packet::fresh_bits(0x0f));
            let (mut start, mut end) = (HEADROOM, HEADROOM);
            for (step, count) in steps {
                let (to, done) = match step {
                    0 => ((start.checked_sub(count), Some(end)), packet.prepend(count)),
                    1 => ((Some(start), Some(end + count)), packet.append(count)),
                    2 => ((Some(start), end.checked_sub(count)), packet.trim(count)),
                    _ => ((Some(start + count), Some(end)), packet.advance(count)),
                };
                let allowed = |s: &usize, e: &usize| (RESERVED..=MAX_OFFSET).contains(s) && s <= e && *e <= BUFFER_SIZE;
                let wanted = to.0.zip(to.1).filter(|(s, e)| allowed(s, e));
                prop_assert_eq!(done.is_some(), wanted.is_some());
                (start, end) = wanted.unwrap_or((start, end));
                prop_assert_eq!((packet.offset(), packet.len()), (start, end - start));
                prop_assert_eq!((packet.slot(), packet.tag()), (slot * 2048, 0x0f));
            }
        }
    }
}
