//! Packet processing of an application, between receive and send.
//!
//! Packet data is copied in and out and never borrowed, because a misbehaving device may write to a buffer
//! that it has returned.

use std::ops::Range;

use vireo_eal::dma::{Burst, Packet, PartialChecksum, PoolCache, first_frame, has_segments};

use crate::checksum::{Sum, complete};

/// Packet processing of an application, for one lane. [`forward`](crate::forward::forward) is compiled for
/// each type of hook, so a call costs nothing.
pub trait Hook: Send {
    /// Processes packets that were received together, in place. Packets that remain in `packets` are sent.
    ///
    /// For a frame that is longer than a buffer, the hook sees only the first segment, which has all headers.
    /// The other segments are sent or freed with it. Such frames occur only if the application allows them
    /// with [`Config::port`](crate::Config::port).
    fn process(&mut self, packets: &mut Packets<'_>);

    /// Returns what [`Hook::process`] does, if it treats all packets alike. A lane with such a hook may forward
    /// packets without calling it. See [`tied`](crate::tied).
    #[inline(always)]
    fn uniform(&self) -> Option<Uniform> {
        None
    }
}

/// Processing that is the same for all packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uniform {
    /// Packets are sent unchanged.
    Unchanged,
    /// The first 12 bytes, the Ethernet addresses, become these.
    Addresses([u8; 12]),
}

/// Sends every packet unchanged.
impl Hook for () {
    #[inline(always)]
    fn process(&mut self, _packets: &mut Packets<'_>) {}

    #[inline(always)]
    fn uniform(&self) -> Option<Uniform> {
        Some(Uniform::Unchanged)
    }
}

/// Packets that were received together.
#[derive(Debug)]
pub struct Packets<'a> {
    burst: &'a mut Burst,
    cache: &'a mut PoolCache,
    /// Whether frames may consist of several packets, and have partial checksums. A constant where the hook
    /// is compiled into its lane.
    is_general: bool,
    /// Frames removed so far.
    consumed: usize,
}

impl<'a> Packets<'a> {
    #[inline(always)]
    pub(crate) fn new(burst: &'a mut Burst, cache: &'a mut PoolCache, is_general: bool) -> Self {
        Self { burst, cache, is_general, consumed: 0 }
    }

    /// Returns the number of frames removed so far.
    #[inline(always)]
    pub(crate) fn consumed(&self) -> usize {
        self.consumed
    }

    /// Copies `first` and then `second` to the front of each packet. Both are values, so that they stay in
    /// registers for the whole burst.
    #[inline(always)]
    pub fn write_each<const N: usize, const M: usize>(&mut self, first: [u8; N], second: [u8; M]) {
        if self.is_general && has_segments(self.burst) {
            return self.write_first(first, second);
        }
        self.cache.write_each(self.burst, first, second);
    }

    /// Copies both to the first segment of each frame.
    #[inline(never)]
    fn write_first<const N: usize, const M: usize>(&mut self, first: [u8; N], second: [u8; M]) {
        let mut at = 0;
        while at < self.burst.len() {
            self.cache.write_each(&mut self.burst[at..at + 1], first, second);
            at += first_frame(&self.burst[at..]);
        }
    }

    /// Removes and frees the packets for which `keep` returns false. `keep` may change each packet.
    #[inline]
    pub fn retain(&mut self, mut keep: impl FnMut(&mut PacketMut<'_>) -> bool) {
        if self.is_general && has_segments(self.burst) {
            return self.retain_frames(keep);
        }
        for mut packet in std::mem::take(self.burst) {
            if keep(&mut PacketMut { packet: &mut packet, cache: self.cache, is_general: self.is_general }) {
                self.burst.push(packet);
            } else {
                self.consumed += 1;
                self.cache.free(packet);
            }
        }
    }

    /// Calls `keep` with the first segment of each frame.
    fn retain_frames(&mut self, mut keep: impl FnMut(&mut PacketMut<'_>) -> bool) {
        let (mut is_first, mut keeps) = (true, true);
        for mut packet in std::mem::take(self.burst) {
            if is_first {
                keeps = keep(&mut PacketMut {
                    packet: &mut packet,
                    cache: self.cache,
                    is_general: self.is_general,
                });
                self.consumed += usize::from(!keeps);
            }
            is_first = !packet.has_more();
            if keeps {
                self.burst.push(packet);
            } else {
                self.cache.free(packet);
            }
        }
    }

    /// Frees all packets.
    #[inline(always)]
    pub(crate) fn free(self) {
        for packet in self.burst.drain(..) {
            self.cache.free(packet);
        }
    }
}

/// One packet, and access to its bytes. Offsets and lengths are in bytes, from the start of the Ethernet header.
#[derive(Debug)]
pub struct PacketMut<'a> {
    packet: &'a mut Packet,
    cache: &'a mut PoolCache,
    is_general: bool,
}

impl PacketMut<'_> {
    /// Returns the length without the frame check sequence. For a frame of several segments, this is the
    /// length of the first segment.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.packet.len()
    }

    /// Returns whether the frame continues after this packet, in a segment that the hook does not see.
    pub fn has_more(&self) -> bool {
        self.packet.has_more()
    }

    /// Copies the `N` bytes at `at` out of the packet. Returns `None` if the packet is too short.
    #[inline]
    pub fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read_into(at, &mut bytes)?;
        Some(bytes)
    }

    /// Copies the bytes at `at` into `bytes`. Returns `None`, and copies nothing, if the packet is too short.
    #[inline]
    pub fn read_into(&self, at: usize, bytes: &mut [u8]) -> Option<()> {
        self.contains(at, bytes.len())?;
        self.cache.read(self.packet, at, bytes);
        Some(())
    }

    /// Copies `bytes` into the packet at `at`. Returns `None`, and copies nothing, if the packet is too
    /// short.
    #[inline]
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> Option<()> {
        self.contains(at, bytes.len())?;
        self.cache.write(self.packet, at, bytes);
        Some(())
    }

    /// Extends the packet by `count` bytes at the front, with unspecified content, to make room for a header.
    /// Returns `None`, and changes nothing, if the buffer has less headroom. A received packet has 80 bytes
    /// of headroom.
    #[must_use]
    pub fn prepend(&mut self, count: usize) -> Option<()> {
        self.packet.prepend(count)
    }

    /// Removes `count` bytes from the front. Returns `None`, and changes nothing, if the packet is shorter.
    #[must_use]
    pub fn adj(&mut self, count: usize) -> Option<()> {
        self.cache.adj(self.packet, count)
    }

    /// Extends the packet by `count` bytes at the end, with unspecified content. Returns `None`, and changes
    /// nothing, if the buffer has less tailroom or the frame continues in another segment.
    #[must_use]
    pub fn append(&mut self, count: usize) -> Option<()> {
        if self.has_more() { None } else { self.packet.append(count) }
    }

    /// Removes `count` bytes from the end. Returns `None`, and changes nothing, if the packet is shorter or
    /// the frame continues in another segment.
    #[must_use]
    pub fn trim(&mut self, count: usize) -> Option<()> {
        if self.has_more() { None } else { self.packet.trim(count) }
    }

    #[inline]
    fn contains(&self, at: usize, count: usize) -> Option<()> {
        (at.checked_add(count)? <= self.len()).then_some(())
    }

    /// Computes the Internet checksum (RFC 1071) of `bytes`. The result is the checksum if the checksum field
    /// in `bytes` is 0, or 0 if it holds the correct checksum. Returns `None` if the packet is too short.
    pub fn checksum(&self, bytes: Range<usize>) -> Option<u16> {
        self.contains(bytes.start, bytes.end.checked_sub(bytes.start)?)?;
        let mut sum = Sum::default();
        sum.add_packet(self.cache, self.packet, bytes);
        Some(sum.checksum())
    }

    /// Returns whether the receiving device found the TCP or UDP checksum of the packet correct. `false`
    /// means unknown, not wrong. Ports that are started with
    /// [`Offloads::RX_CHECKSUM`](vireo_drivers::port::Offloads::RX_CHECKSUM) report this, if their devices
    /// support it.
    pub fn has_good_checksum(&self) -> bool {
        self.packet.has_good_checksum()
    }

    /// Returns the location of a TCP or UDP checksum that is still to be computed; `None` if it is complete
    /// or there is none. The lane ensures that it is computed before the packet is sent.
    pub fn partial_checksum(&self) -> Option<PartialChecksum> {
        self.cache.partial_checksum(self.packet)
    }

    /// Requests a checksum. The sending device computes it if its port was started with
    /// [`Offloads::TX_CHECKSUM`](vireo_drivers::port::Offloads::TX_CHECKSUM), otherwise the lane does. On
    /// ports started with neither offloads nor long frames, it is computed at once. Returns `None`, and
    /// changes nothing, if the checksum's location is not in the packet.
    #[must_use]
    pub fn complete_checksum(&mut self, partial: PartialChecksum) -> Option<()> {
        self.cache.set_partial_checksum(self.packet, Some(partial))?;
        if !self.is_general {
            complete(std::slice::from_mut(self.packet), self.cache);
        }
        Some(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use vireo_eal::dma::{DmaMemory, Pool};
    use vireo_eal::mem::{Backing, Region};

    use super::*;

    /// Calls `test` with a packet that contains `bytes`.
    pub(crate) fn with_packet<T>(bytes: &[u8], test: impl FnOnce(&mut PacketMut<'_>) -> T) -> T {
        let region = Region::new(Pool::bytes(32), Backing::SmallPages).unwrap();
        let pool = Pool::new(&DmaMemory::map(region, &[]).unwrap(), 32).unwrap();
        let mut cache = pool.cache();
        let mut packet = cache.allocate().unwrap().with_len(bytes.len());
        cache.write(&mut packet, 0, bytes);
        let result = test(&mut PacketMut { packet: &mut packet, cache: &mut cache, is_general: false });
        cache.free(packet);
        result
    }

    #[test]
    fn no_byte_behind_the_end_is_reached() {
        with_packet(&[1, 2, 3, 4], |packet| {
            assert_eq!(packet.read(1), Some([2, 3, 4]));
            assert_eq!(packet.read::<4>(1), None);
            assert_eq!(packet.read::<1>(usize::MAX), None);
            assert_eq!(packet.write(3, &[5, 6]), None);
            assert_eq!(packet.write(2, &[5, 6]), Some(()));
            assert_eq!(packet.read(0), Some([1, 2, 5, 6]));
            assert_eq!(packet.checksum(0..5), None);
            assert_eq!(packet.checksum(2..usize::MAX), None);
            assert_eq!(packet.checksum(4..4), Some(0xffff));
        });
    }

    #[test]
    fn headers_come_and_go_in_front_of_the_data() {
        with_packet(&[1, 2, 3, 4], |packet| {
            packet.prepend(2).unwrap();
            packet.write(0, &[8, 9]).unwrap();
            assert_eq!((packet.len(), packet.read(0)), (6, Some([8, 9, 1, 2, 3, 4])));
            packet.adj(3).unwrap();
            packet.append(1).unwrap();
            packet.write(3, &[7]).unwrap();
            packet.trim(1).unwrap();
            assert_eq!(packet.read(0), Some([2, 3, 4]));
            // Removed bytes become headroom again, of which metadata and a virtio-net header need 48 bytes.
            assert_eq!((packet.prepend(82), packet.prepend(81), packet.len()), (None, Some(()), 84));
            assert_eq!((packet.adj(85), packet.trim(85), packet.append(2000)), (None, None, None));
        });
        // Near the end of the buffer, the remaining data moves to the front.
        with_packet(&[0; 1920], |packet| {
            packet.write(1910, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).unwrap();
            packet.adj(1911).unwrap();
            assert_eq!((packet.len(), packet.read(0)), (9, Some([2, 3, 4, 5, 6, 7, 8, 9, 10])));
            packet.prepend(50).unwrap();
        });
    }

    #[test]
    fn a_frame_that_goes_on_is_changed_in_front_only() {
        with_packet(&[1, 2, 3, 4], |packet| {
            packet.packet.set_more(true);
            assert_eq!((packet.has_more(), packet.append(1), packet.trim(1)), (true, None, None));
            packet.prepend(2).unwrap();
            packet.adj(3).unwrap();
            assert_eq!((packet.len(), packet.read(0), packet.has_more()), (3, Some([2, 3, 4]), true));
        });
    }

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        let bytes = [0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(with_packet(&bytes, |packet| packet.checksum(0..8)), Some(!0xddf2));
        assert_eq!(with_packet(&bytes, |packet| packet.checksum(0..7)), Some(!0xdcfb));
    }

    #[test]
    fn a_checksum_is_made_at_once_where_nobody_makes_it_later() {
        let place = PartialChecksum { start: 4, offset: 2 };
        for is_general in [false, true] {
            with_packet(&[9, 9, 9, 9, 0, 1, 0xf2, 3, 0xf4, 0xf5], |packet| {
                packet.is_general = is_general;
                assert_eq!(packet.complete_checksum(PartialChecksum { offset: 5, ..place }), None);
                assert_eq!((packet.partial_checksum(), packet.complete_checksum(place)), (None, Some(())));
                let sum = !(0x0001_u32 + 0xf203 + 0xf4f5 - 0x1_0000 + 1) as u16;
                let (left, bytes) = if is_general { (Some(place), 0xf203) } else { (None, sum) };
                assert_eq!((packet.partial_checksum(), packet.read(6)), (left, Some(bytes.to_be_bytes())));
                assert!(!packet.has_good_checksum());
            });
        }
    }

    proptest! {
        #[test]
        fn bytes_with_their_checksum_sum_to_nothing(mut bytes in proptest::collection::vec(any::<u8>(), 4..1500)) {
            bytes[2..4].fill(0);
            let end = bytes.len();
            let sum = with_packet(&bytes, |packet| packet.checksum(0..end)).unwrap();
            bytes[2..4].copy_from_slice(&sum.to_be_bytes());
            prop_assert_eq!(with_packet(&bytes, |packet| packet.checksum(0..end)), Some(0));
        }
    }
}
