//! The Internet checksum (RFC 1071), and the partial checksums that a device leaves to software.

use std::ops::Range;

use vireo_eal::dma::{Packet, PoolCache, first_frame, has_partial_checksums};

/// Running sum over data that arrives in parts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    sum: u64,
    /// Whether the next byte is the second of its 16-bit word.
    is_odd: bool,
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        let (low, words) = bytes.split_at(usize::from(self.is_odd).min(bytes.len()));
        let word = |word: &[u8]| u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
        self.sum += low.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        self.sum += words.chunks(2).map(word).map(u64::from).sum::<u64>();
        self.is_odd ^= bytes.len() % 2 == 1;
    }

    /// Adds `bytes`, a range within the packet's data.
    pub(crate) fn add_packet(&mut self, cache: &PoolCache, packet: &Packet, bytes: Range<usize>) {
        let mut chunk = [0; 64];
        for at in bytes.clone().step_by(chunk.len()) {
            let part = &mut chunk[..(bytes.end - at).min(64)];
            cache.read(packet, at, part);
            self.add(part);
        }
    }

    /// Returns the checksum if the summed checksum field is 0, or 0 if it holds the correct checksum.
    pub(crate) fn checksum(self) -> u16 {
        let mut sum = self.sum;
        while sum > u64::from(u16::MAX) {
            sum = (sum & u64::from(u16::MAX)) + (sum >> 16);
        }
        !(sum as u16)
    }
}

/// Completes the partial checksums in a burst. Returns the number of frames that had one.
pub(crate) fn complete(burst: &mut [Packet], cache: &mut PoolCache) -> usize {
    if !has_partial_checksums(burst) {
        return 0;
    }
    let (mut rest, mut completed) = (burst, 0);
    while !rest.is_empty() {
        let (frame, behind) = rest.split_at_mut(first_frame(rest));
        completed += usize::from(complete_frame(frame, cache));
        rest = behind;
    }
    completed
}

fn complete_frame(frame: &mut [Packet], cache: &mut PoolCache) -> bool {
    let [first, rest @ ..] = frame else { return false };
    let Some(partial) = cache.partial_checksum(first) else { return false };
    let start = usize::from(partial.start);
    let mut sum = Sum::default();
    sum.add_packet(cache, first, start..first.len());
    rest.iter().for_each(|packet| sum.add_packet(cache, packet, 0..packet.len()));
    // In a UDP header, 0 means that there is no checksum (RFC 768).
    let checksum = match sum.checksum() {
        0 => u16::MAX,
        checksum => checksum,
    };
    cache.write(first, start + usize::from(partial.offset), &checksum.to_be_bytes());
    cache.set_partial_checksum(first, None).is_some()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vireo_eal::dma::{Burst, DmaMemory, PartialChecksum, Pool};
    use vireo_eal::mem::{Backing, Region};

    use super::*;

    fn cache() -> PoolCache {
        let region = Region::new(Pool::bytes(64), Backing::SmallPages).unwrap();
        Pool::new(&DmaMemory::map(region, &[]).unwrap(), 64).unwrap().cache()
    }

    /// Creates a frame of `bytes`, in segments that end at `cuts`. The first segment carries the partial
    /// checksum.
    fn burst(cache: &mut PoolCache, bytes: &[u8], cuts: &[usize], partial: PartialChecksum) -> Burst {
        let ends = cuts.iter().copied().chain([bytes.len()]);
        let mut burst = Burst::new();
        let mut begin = 0;
        for end in ends {
            let mut packet = cache.allocate().unwrap().with_len(end - begin);
            cache.write(&mut packet, 0, &bytes[begin..end]);
            packet.set_more(end < bytes.len());
            burst.push(packet);
            begin = end;
        }
        cache.set_partial_checksum(&mut burst[0], Some(partial)).unwrap();
        burst
    }

    fn take(cache: &mut PoolCache, burst: Burst) -> Vec<u8> {
        let mut bytes = Vec::new();
        for packet in burst {
            assert!(!packet.has_partial_checksum());
            let from = bytes.len();
            bytes.resize(from + packet.len(), 0);
            cache.read(&packet, 0, &mut bytes[from..]);
            cache.free(packet);
        }
        bytes
    }

    /// The datagram has two bytes of data and goes from 192.0.2.1 to 192.0.2.2, from port 7 to port 9.
    #[test]
    fn udp_gets_the_checksum_of_rfc_768() {
        let sum = |words: &[u32]| words.iter().fold(0, |sum, word| (sum + word) % 0xffff);
        let pseudo = sum(&[0xc000, 0x0201, 0xc000, 0x0202, 17, 10]);
        // The second datagram sums to 0xffff, whose complement is 0.
        for (data, is_zero) in [(0xabcd, false), (0xffff - sum(&[pseudo, 7, 9, 10]), true)] {
            let mut cache = cache();
            let mut frame = vec![0x5a; 34];
            frame.extend([7, 9, 10, pseudo, data].iter().flat_map(|word| (*word as u16).to_be_bytes()));
            let mut burst = burst(&mut cache, &frame, &[], PartialChecksum { start: 34, offset: 6 });
            assert_eq!([complete(&mut burst, &mut cache), complete(&mut burst, &mut cache)], [1, 0]);
            let done = take(&mut cache, burst);
            let expected = if is_zero { 0xffff } else { !(sum(&[pseudo, 7, 9, 10, data]) as u16) };
            assert_eq!(done[40..42], expected.to_be_bytes());
            assert_eq!((&done[..40], &done[42..]), (&frame[..40], &frame[42..]));
        }
    }

    proptest! {
        /// However a frame is segmented, the bytes from `start` on then sum to the sum of the pseudo-header.
        #[test]
        fn segments_make_no_difference(
            bytes in proptest::collection::vec(any::<u8>(), 200..900),
            cuts in proptest::collection::btree_set(60_usize..199, 0..6),
        ) {
            let mut cache = cache();
            let partial = PartialChecksum { start: 35, offset: 16 };
            let cuts: Vec<_> = cuts.into_iter().collect();
            let one = burst(&mut cache, &bytes, &[], partial);
            let several = burst(&mut cache, &bytes, &cuts, partial);
            let [one, several] = [one, several].map(|mut burst| {
                assert_eq!(complete(&mut burst, &mut cache), 1);
                take(&mut cache, burst)
            });
            prop_assert_eq!(&one, &several);
            let mut sum = Sum::default();
            sum.add(&one[35..]);
            let pseudo = u16::from_be_bytes([bytes[51], bytes[52]]);
            // 0 and 0xffff are both zero in one's complement.
            let canonical = |sum: u16| if sum == u16::MAX { 0 } else { sum };
            prop_assert_eq!(canonical(sum.checksum()), canonical(pseudo));
        }
    }
}
