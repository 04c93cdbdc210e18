//! Copies packets between the pool and a peer's memory, and frames between two peers.

use std::mem::MaybeUninit;

use arrayvec::ArrayVec;

use super::packet::{Burst, DATA_ROOM, MAX_BURST, Packet};
use super::peer::PeerSlice;
use super::pool::PoolCache;
use crate::opaque;

impl PoolCache {
    /// Receives by copy: appends up to `wanted` packets to `burst`. `find` is called with each packet's
    /// number, starting at 0, and returns the bytes to copy. Bytes beyond [`DATA_ROOM`] are cut off. All
    /// calls of `find` precede the first copy, so that the peer's memory is prefetched.
    ///
    /// Stops when `find` returns `None`, `burst` is full or the pool is exhausted. Returns the number of
    /// packets.
    #[inline(always)]
    pub fn receive_copies<'a>(
        &mut self,
        wanted: usize,
        burst: &mut Burst,
        mut find: impl FnMut(usize) -> Option<PeerSlice<'a>>,
    ) -> usize {
        let before = burst.len();
        let packets = burst.as_mut_ptr();
        let fresh_bits = self.fresh_bits();
        let mut fresh = self.take(wanted.min(MAX_BURST - before));
        let mut found = [MaybeUninit::<PeerSlice<'a>>::uninit(); MAX_BURST];
        let mut count = 0;
        while count < fresh.remaining().min(MAX_BURST) {
            let Some(slice) = find(count) else { break };
            // A frontend receives into the buffer again, so this end will write it.
            slice.prefetch_to_write();
            found[count].write(slice);
            count += 1;
        }
        for (i, slice) in found[..count].iter().enumerate() {
            let Some(slot) = fresh.next() else { break };
            // SAFETY: the first `count` slices were written.
            let slice = unsafe { slice.assume_init() };
            let len = slice.len.min(DATA_ROOM);
            let packet = Packet::in_slot(slot, len, fresh_bits);
            // SAFETY: a slice is valid for its length, and a fresh packet's data for `DATA_ROOM` bytes.
            // `packet` is the only handle of its buffer. `burst` has room for all of these packets.
            unsafe {
                opaque::read(slice.at.as_ptr(), fresh.buffers.data(&packet).as_ptr(), len);
                packets.add(before + i).write(packet);
            }
        }
        // SAFETY: `count` packets were written, because `count` is at most the number of buffers.
        unsafe { burst.set_len(before + count) };
        count
    }

    /// Sends by copy: takes up to `most` packets from the front of `burst`. `find` is called with each
    /// packet's number and length, and returns where to write `header` (8 to 16 bytes) and the packet. The
    /// buffers return to the cache. All calls of `find` precede the first copy.
    ///
    /// Stops when `find` returns `None` or too few bytes. Returns the number of packets.
    #[inline(always)]
    pub fn send_copies<'a, const H: usize>(
        &mut self,
        most: usize,
        burst: &mut Burst,
        header: [u8; H],
        mut find: impl FnMut(usize, usize) -> Option<PeerSlice<'a>>,
    ) -> usize {
        let mut found = [MaybeUninit::<PeerSlice<'a>>::uninit(); MAX_BURST];
        let mut count = 0;
        for (packet, place) in burst.iter().zip(&mut found).take(most) {
            let Some(slice) = find(count, packet.len()) else { break };
            if slice.len < H + packet.len() {
                break;
            }
            let (front, data) = slice.split_at(H);
            data.prefetch_to_write();
            front.prefetch_to_read();
            place.write(slice);
            count += 1;
        }
        let buffers = self.buffers();
        for (packet, slice) in burst.iter().zip(&found[..count]) {
            // SAFETY: the first `count` slices were written.
            let to = unsafe { slice.assume_init() }.at.as_ptr();
            // SAFETY: the slice has room for the header and the packet, as just checked, and the packet's
            // data is valid for its length. The peer's mapping does not overlap the pool's, and is only
            // accessed by opaque copies and atomics.
            unsafe {
                // A header that does not change is not written, so its cache line stays in the peer's cache.
                opaque::write_changed(header, to);
                opaque::write(buffers.data(packet).as_ptr(), to.add(H), packet.len());
            }
        }
        for packet in burst.drain(..count) {
            self.free(packet);
        }
        count
    }

    /// Appends the bytes of `from` to the packet's data. Returns `None`, and changes nothing, if they do not
    /// fit into the buffer.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    pub fn append_from_peer(&mut self, packet: &mut Packet, from: PeerSlice<'_>) -> Option<()> {
        let offset = packet.len();
        packet.append(from.len)?;
        // SAFETY: the copy ends within the packet's data, and the buffer's only handle is borrowed.
        unsafe { opaque::read(from.at.as_ptr(), self.data(packet, offset, from.len), from.len) };
        Some(())
    }

    /// Copies the bytes of `packet` from `offset` on to `to`, as many as both have. Returns the number of
    /// bytes copied.
    ///
    /// # Panics
    /// Panics if `packet` belongs to another pool.
    pub fn copy_to_peer(&self, packet: &Packet, offset: usize, to: PeerSlice<'_>) -> usize {
        let len = packet.len().saturating_sub(offset).min(to.len);
        if len > 0 {
            // SAFETY: `offset + len` is not beyond the packet, and `to` has room for `len` bytes. The peer's
            // mapping is only accessed by opaque copies and atomics.
            unsafe {
                opaque::write(self.data(packet, offset, len), to.at.as_ptr(), len);
            }
        }
        len
    }
}

/// Number of bytes of a frame's Ethernet addresses.
const ADDRESSES: usize = 12;

/// Passes up to `wanted` frames from one peer's memory to another's, at most a burst, in one copy each. `find` is
/// called with each frame's number, starting at 0, and returns its bytes and where to write `header` (8 to 16 bytes)
/// and the frame, whose first 12 bytes become `addresses`, if given. All calls of `find` precede the first copy, so
/// that both memories are prefetched.
///
/// Stops when `find` returns `None`, fewer than 12 bytes or too little space. Returns the number of frames.
#[inline(always)]
pub fn pass_copies<'a, const H: usize>(
    wanted: usize,
    header: [u8; H],
    addresses: Option<[u8; ADDRESSES]>,
    mut find: impl FnMut(usize) -> Option<(PeerSlice<'a>, PeerSlice<'a>)>,
) -> usize {
    let mut found = ArrayVec::<_, MAX_BURST>::new();
    while found.len() < wanted.min(MAX_BURST) {
        let Some((frame, space)) = find(found.len()) else { break };
        if frame.len < ADDRESSES || space.len < H + frame.len {
            break;
        }
        // See `PoolCache::receive_copies`.
        frame.prefetch_to_write();
        let (front, data) = space.split_at(H);
        data.prefetch_to_write();
        front.prefetch_to_read();
        found.push((frame, space));
    }
    for (frame, space) in &found {
        let (from, to) = (frame.at.as_ptr(), space.at.as_ptr());
        // SAFETY: both are valid for their lengths, and the space has room for the header and the frame, which has
        // the bytes of its addresses, as just checked. A peer's mapping is only accessed by opaque copies and atomics.
        unsafe {
            // See `PoolCache::send_copies`.
            opaque::write_changed(header, to);
            opaque::pass(from, to.add(H), frame.len);
            if let Some(addresses) = addresses {
                opaque::write_short(addresses, to.add(H));
            }
        }
    }
    found.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::{DmaMemory, PeerMemory, Pool};
    use crate::mem::{Backing, Region};

    #[test]
    fn a_frame_passes_if_it_has_addresses_and_there_is_space() {
        let peers = [PeerMemory::anonymous(4096), PeerMemory::anonymous(4096)];
        let [mut from, mut to] = peers.each_ref().map(|peer| peer.view());
        let longest = if cfg!(miri) { 130 } else { 2000 };
        for (len, space) in
            (11..=longest).step_by(17).flat_map(|len| [(len, 11 + len), (len, 12 + len), (len, 2020)])
        {
            let frame: Vec<u8> = (0..len).map(|at| at as u8).collect();
            from.at(5, len).unwrap().write(&frame);
            to.at(0, 4096).unwrap().write(&[0xee; 4096]);
            let addresses = (len % 2 == 0).then_some([7; ADDRESSES]);
            let passed = pass_copies(40, [9; 12], addresses, |i| {
                from.at(5, len).zip(to.at(3, space)).filter(|_| i == 0)
            });
            let mut wanted = vec![0xee; 4096];
            if len >= ADDRESSES && space >= 12 + len {
                assert_eq!(passed, 1);
                wanted[3..][..12].fill(9);
                wanted[15..][..len].copy_from_slice(&frame);
                addresses.iter().for_each(|addresses| wanted[15..][..ADDRESSES].copy_from_slice(addresses));
            } else {
                assert_eq!(passed, 0);
            }
            let mut found = vec![0; 4096];
            // SAFETY: the memory has these bytes, and nothing else accesses it.
            unsafe { opaque::read(to.at(0, 4096).unwrap().at.as_ptr(), found.as_mut_ptr(), 4096) };
            assert!(found == wanted, "{len} {space}");
        }
    }

    /// Before copies were opaque, Miri reported a data race here.
    #[test]
    fn threads_that_a_peer_leads_to_the_same_bytes_do_not_race() {
        let peer = PeerMemory::anonymous(4096);
        let memory = DmaMemory::map(Region::new(Pool::bytes(64), Backing::SmallPages).unwrap(), &[]).unwrap();
        let pool = Pool::new(&memory, 64).unwrap();
        let copy = |fill: u8| {
            let (mut cache, mut view) = (pool.cache(), peer.view());
            let mut at = |len| view.at(8, len);
            for len in [3, 60, 200] {
                let mut packet = cache.allocate().unwrap().with_len(len);
                cache.write(&mut packet, 0, &vec![fill; len]);
                assert_eq!(cache.copy_to_peer(&packet, 0, at(len).unwrap()), len);
                let mut burst: Burst = [packet].into_iter().collect();
                assert_eq!(cache.send_copies(1, &mut burst, [fill; 12], |_, len| at(12 + len)), 1);
                assert_eq!(cache.receive_copies(1, &mut burst, |_| at(12 + len)), 1);
                let mut bytes = vec![0; 12 + len];
                cache.read(&burst[0], 0, &mut bytes);
                assert!(bytes.iter().all(|byte| matches!(byte, 1 | 2)), "{bytes:?}");
                // From bytes to a place that overlaps them.
                let passed = pass_copies(1, [fill; 12], Some([fill; 12]), |_| at(len).zip(at(12 + len)));
                assert_eq!(passed, usize::from(len >= 12));
                at(len).unwrap().write(&[fill; 5]);
                let mut packet = burst.remove(0);
                cache.append_from_peer(&mut packet, at(len).unwrap()).unwrap();
                cache.free(packet);
            }
        };
        std::thread::scope(|scope| {
            [1, 2].map(|fill| scope.spawn(move || copy(fill))).map(|thread| thread.join().unwrap())
        });
    }
}
