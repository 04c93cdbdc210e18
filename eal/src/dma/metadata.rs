//! Per-packet metadata that is not part of the packet's data. It is at the start of the packet's buffer, and
//! is valid if the packet has the flag for it, so that packets without metadata pay nothing.
//!
//! A device that may write packet buffers may also write the metadata, so each value that is read is checked
//! like any other input from the device.

use super::packet::Packet;
use super::pool::{Buffers, PoolCache};

/// Place of a checksum that is still to be computed, as in the kernel's `CHECKSUM_PARTIAL` and virtio's
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM` (`include/linux/skbuff.h`; virtio 1.2, 5.1.6.2).
///
/// The two bytes at `start + offset` hold the sum over the pseudo-header, not complemented. The checksum is
/// the complement of the sum over the bytes from `start` to the end of the frame, including these two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Offset of the TCP or UDP header from the start of the packet's data, in bytes.
    pub start: u16,
    /// Offset of the checksum in that header, in bytes: 16 for TCP, 6 for UDP.
    pub offset: u16,
}

/// Position of a partial checksum in the metadata: `start` as an offset from the buffer's first byte, so that
/// it stays valid when headers are prepended or removed, then `offset`.
const PARTIAL_CHECKSUM: usize = 0;

impl PartialChecksum {
    /// Returns whether the checksum is within the first `len` bytes of the data.
    pub fn fits(self, len: usize) -> bool {
        usize::from(self.start) + usize::from(self.offset) + 2 <= len
    }
}

impl Buffers<'_> {
    #[inline(always)]
    pub(super) fn partial_checksum(&self, packet: &Packet) -> Option<PartialChecksum> {
        if packet.has_partial_checksum() { self.read_partial_checksum(packet) } else { None }
    }

    fn read_partial_checksum(&self, packet: &Packet) -> Option<PartialChecksum> {
        let [s, t, o, p] = self.read_metadata::<PARTIAL_CHECKSUM, 4>(packet);
        let (start, offset) = (u16::from_ne_bytes([s, t]), u16::from_ne_bytes([o, p]));
        let partial = PartialChecksum { start: start.checked_sub(packet.offset() as u16)?, offset };
        partial.fits(packet.len()).then_some(partial)
    }
}

impl PoolCache {
    /// Returns the place of the packet's checksum if that is still to be computed. Returns `None` if it is
    /// not, or if its place is no longer in the packet's data. In a frame of several packets, the first
    /// packet has the place.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    #[inline(always)]
    pub fn partial_checksum(&self, packet: &Packet) -> Option<PartialChecksum> {
        self.buffers().partial_checksum(packet)
    }

    /// Sets the place of the packet's checksum that is still to be computed. With `None`, no checksum is to
    /// be computed. Returns `None`, and changes nothing, if the place is not in the packet's data.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    #[must_use]
    pub fn set_partial_checksum(
        &mut self,
        packet: &mut Packet,
        partial: Option<PartialChecksum>,
    ) -> Option<()> {
        if let Some(partial) = partial {
            if !partial.fits(packet.len()) {
                return None;
            }
            let ([s, t], [o, p]) =
                ((partial.start + packet.offset() as u16).to_ne_bytes(), partial.offset.to_ne_bytes());
            self.buffers().write_metadata::<PARTIAL_CHECKSUM, 4>(packet, [s, t, o, p]);
        }
        packet.set_partial(partial.is_some());
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dma::packet::{BUFFER_SIZE, MAX_BURST};
    use crate::dma::{DmaMemory, Pool};
    use crate::mem::{Backing, Region};

    fn cache() -> PoolCache {
        let buffers = MAX_BURST as u32;
        let region = Region::new(Pool::bytes(buffers), Backing::SmallPages).unwrap();
        Pool::new(&DmaMemory::map(region, &[]).unwrap(), buffers).unwrap().cache()
    }

    #[test]
    fn a_place_beyond_the_data_is_refused() {
        let mut cache = cache();
        let mut packet = cache.allocate().unwrap().with_len(60);
        for (start, offset, fits) in
            [(34, 16, true), (34, 24, true), (34, 25, false), (u16::MAX, u16::MAX, false)]
        {
            let partial = PartialChecksum { start, offset };
            let set = cache.set_partial_checksum(&mut packet, Some(partial));
            assert_eq!(set.is_some(), fits, "{partial:?}");
            assert_eq!(cache.partial_checksum(&packet), fits.then_some(partial));
            cache.set_partial_checksum(&mut packet, None).unwrap();
            assert_eq!((packet.has_partial_checksum(), cache.partial_checksum(&packet)), (false, None));
        }
        cache.free(packet);
    }

    /// A device may write the metadata of each buffer that it may write.
    #[test]
    fn what_the_buffer_says_is_checked() {
        let mut cache = cache();
        let mut packet = cache.allocate().unwrap().with_len(60);
        cache.set_partial_checksum(&mut packet, Some(PartialChecksum { start: 34, offset: 16 })).unwrap();
        for bytes in [[0; 4], [0xff; 4], [200, 0, 0, 0x80], [127, 0, 0, 0], [128 + 59, 0, 0, 0]] {
            cache.buffers().write_metadata::<PARTIAL_CHECKSUM, 4>(&mut packet, bytes);
            assert_eq!(cache.partial_checksum(&packet), None, "{bytes:?}");
        }
        cache.free(packet);
    }

    proptest! {
        /// Prepending and removing headers moves the place with its bytes and leaves `offset` unchanged.
        #[test]
        fn the_place_stays_with_its_bytes(
            start in 0..400_u16,
            steps in prop::collection::vec((any::<bool>(), 0..1800_usize), 0..20),
        ) {
            let mut cache = cache();
            let mut packet = cache.allocate().unwrap().with_len(1900);
            let partial = PartialChecksum { start: start + 1300, offset: 6 };
            cache.write(&mut packet, usize::from(partial.start), b"from here");
            cache.set_partial_checksum(&mut packet, Some(partial)).unwrap();
            for (front, count) in steps {
                let _ = if front { packet.prepend(count) } else { cache.adj(&mut packet, count) };
                prop_assert!(packet.offset() + packet.len() <= BUFFER_SIZE);
                let Some(now) = cache.partial_checksum(&packet) else { break };
                let mut bytes = [0; 9];
                cache.read(&packet, usize::from(now.start), &mut bytes);
                prop_assert_eq!((&bytes, now.offset), (b"from here", 6));
            }
            cache.free(packet);
        }
    }
}
