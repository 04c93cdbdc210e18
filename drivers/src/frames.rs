//! Frames of several packets, for drivers whose ports were started for them.

use vireo_eal::dma::{BUFFER_SIZE, Burst, Packet, PoolCache, first_frame, has_segments};

/// Length of an Ethernet header in bytes. Hooks cannot process a frame whose first segment is shorter.
pub(crate) const ETHERNET: usize = 14;

/// Shortest frame on a wire in bytes, without its check sequence (IEEE 802.3, 3.2.8).
pub(crate) const SHORTEST: usize = 60;

/// Length of a frame in bytes.
pub(crate) fn bytes(frame: &[Packet]) -> usize {
    frame.iter().map(Packet::len).sum()
}

/// Frees the frames of `burst` that have more than `longest` bytes or more than `most` segments; returns the
/// number of freed frames.
pub(crate) fn drop_long(burst: &mut Burst, longest: usize, most: usize, cache: &mut PoolCache) -> usize {
    let fit = longest >= BUFFER_SIZE || burst.iter().all(|packet| packet.len() <= longest);
    if fit && !has_segments(burst) {
        return 0;
    }
    let (mut at, mut dropped) = (0, 0);
    while at < burst.len() {
        let segments = first_frame(&burst[at..]);
        let frame = at..at + segments;
        if segments <= most && bytes(&burst[frame.clone()]) <= longest {
            at += segments;
        } else {
            burst.drain(frame).for_each(|packet| cache.free(packet));
            dropped += 1;
        }
    }
    dropped
}

#[cfg(test)]
pub(crate) mod tests {
    use vireo_eal::dma::{DATA_ROOM, DmaMemory, MAX_SEGMENTS, Pool};
    use vireo_eal::mem::{Backing, Region};

    use super::*;

    /// Appends `frame` to `burst`, in segments of `each` bytes.
    pub(crate) fn append(burst: &mut Burst, cache: &mut PoolCache, frame: &[u8], each: usize) {
        let mut segments = frame.chunks(each).peekable();
        while let Some(bytes) = segments.next() {
            let mut packet = cache.allocate().unwrap().with_len(bytes.len());
            cache.write(&mut packet, 0, bytes);
            packet.set_more(segments.peek().is_some());
            burst.push(packet);
        }
    }

    /// Removes all frames from `burst` and returns their bytes.
    pub(crate) fn take(burst: &mut Burst, cache: &mut PoolCache) -> Vec<Vec<u8>> {
        let (mut frames, mut open) = (Vec::<Vec<u8>>::new(), false);
        for packet in burst.drain(..) {
            let mut bytes = vec![0; packet.len()];
            cache.read(&packet, 0, &mut bytes);
            let more = packet.has_more();
            cache.free(packet);
            match frames.last_mut().filter(|_| open) {
                Some(frame) => frame.extend(bytes),
                None => frames.push(bytes),
            }
            open = more;
        }
        assert!(!open, "a frame without its end");
        frames
    }

    /// Returns a frame of `len` bytes whose content depends on `number`.
    pub(crate) fn frame(number: usize, len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 256 + number * 7) as u8).collect()
    }

    #[test]
    fn frames_that_are_too_long_are_dropped_whole() {
        let region = Region::new(Pool::bytes(64), Backing::SmallPages).unwrap();
        let pool = Pool::new(&DmaMemory::map(region, &[]).unwrap(), 64).unwrap();
        let (mut cache, mut burst) = (pool.cache(), Burst::new());
        for (len, each) in [(3000, DATA_ROOM), (3001, DATA_ROOM), (60, 60), (110, 10), (2500, 1024)] {
            append(&mut burst, &mut cache, &frame(len, len), each);
        }
        assert_eq!(drop_long(&mut burst, 3000, MAX_SEGMENTS, &mut cache), 2);
        assert_eq!(take(&mut burst, &mut cache), [3000, 60, 2500].map(|len| frame(len, len)));
        // Packets that are frames can be too long, too.
        for len in [60, 1601, 1600] {
            append(&mut burst, &mut cache, &frame(len, len), DATA_ROOM);
        }
        assert_eq!(drop_long(&mut burst, 1600, MAX_SEGMENTS, &mut cache), 1);
        assert_eq!(take(&mut burst, &mut cache), [60, 1600].map(|len| frame(len, len)));
        drop(cache);
        assert_eq!(pool.available(), 64);
    }
}
