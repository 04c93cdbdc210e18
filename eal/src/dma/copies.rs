//! Packets copied between the pool and a peer's memory.

use std::mem::MaybeUninit;

use super::peer::PeerSlice;
use super::pool::{Buffer, Burst, DATA_ROOM, MAX_BURST, Packet, PoolCache};

/// Copies `len` bytes. Packets are mostly short, and a call of memcpy costs as much as they do: two blocks of
/// a fixed size that overlap in the middle need no loop and no byte beyond the end. None of it goes by way of the
/// stack: stores are done in order, so one to the stack between two to a peer's lines has these come one by one.
///
/// # Safety
/// `from` and `to` are valid for `len` bytes and do not overlap.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    /// # Safety
    /// As for `copy`; `len` is from `N` to `2 * N`.
    #[inline(always)]
    unsafe fn ends<const N: usize>(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: both blocks are within the `len` bytes.
        unsafe {
            from.copy_to_nonoverlapping(to, N);
            from.add(len - N).copy_to_nonoverlapping(to.add(len - N), N);
        }
    }
    // SAFETY: the caller's contract, and the lengths as each arm has them.
    unsafe {
        match len {
            32..=64 => ends::<32>(from, to, len),
            16..32 => ends::<16>(from, to, len),
            65..=128 => ends::<64>(from, to, len),
            _ => from.copy_to_nonoverlapping(to, len),
        }
    }
}

impl PoolCache {
    /// Receives by copy: appends up to `wanted` packets to `burst`, each a copy of what `find` gives for its
    /// number. What is longer than [`DATA_ROOM`] is cut to it. `find` is called for all packets before the first
    /// is copied, so that the peer's memory is on its way.
    ///
    /// Ends where `find` gives none, when `burst` is full or the pool exhausted; gives the number of packets.
    #[inline(always)]
    pub fn receive_copies<'a>(
        &mut self,
        wanted: usize,
        burst: &mut Burst,
        mut find: impl FnMut(usize) -> Option<PeerSlice<'a>>,
    ) -> usize {
        let before = burst.len();
        let packets = burst.as_mut_ptr();
        let mut fresh = self.take(wanted.min(MAX_BURST - before));
        let mut found = [MaybeUninit::<PeerSlice<'a>>::uninit(); MAX_BURST];
        let mut count = 0;
        while count < fresh.remaining().min(MAX_BURST) {
            let Some(slice) = find(count) else { break };
            slice.prefetch();
            found[count].write(slice);
            count += 1;
        }
        for (i, slice) in found[..count].iter().enumerate() {
            let Some(buffer) = fresh.next() else { break };
            // SAFETY: the first `count` slices were written.
            let slice = unsafe { slice.assume_init() };
            let len = slice.len.min(DATA_ROOM);
            // SAFETY: a slice is valid for its length and a buffer's data for `DATA_ROOM` bytes; the buffer's only
            // handle is here. There are no more packets than `burst` has room for.
            unsafe {
                copy(slice.at.as_ptr(), fresh.buffers.data(&buffer).as_ptr(), len);
                packets.add(before + i).write(Packet::new(buffer, len));
            }
        }
        // SAFETY: as many packets were written: `count` is not above the number of buffers.
        unsafe { burst.set_len(before + count) };
        count
    }

    /// Sends by copy: takes up to `most` packets from the front of `burst` and writes `header` and the packet to
    /// what `find` gives for its number and length; their buffers go back to the cache. `find` is called for
    /// all packets before the first is copied.
    ///
    /// Ends where `find` gives none or too little; gives the number of packets.
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
            data.prefetch_write();
            front.prefetch();
            place.write(slice);
            count += 1;
        }
        let buffers = self.buffers();
        for (packet, slice) in burst.iter().zip(&found[..count]) {
            // SAFETY: the first `count` slices were written.
            let to = unsafe { slice.assume_init() }.at.as_ptr();
            // SAFETY: the slice has room for the header and the packet, as just checked, and the packet's data is
            // valid for its length. The peer's mapping does not overlap the pool's.
            unsafe {
                let front = to.cast::<[u8; H]>();
                // A header that stays the same stays in the peer's cache too.
                if front.read() != header {
                    front.write(header);
                }
                copy(buffers.data(packet.buffer()).as_ptr(), to.add(H), packet.len());
            }
        }
        for packet in burst.drain(..count) {
            self.free(packet.into_buffer());
        }
        count
    }

    /// Copies `from` into `buffer` at `offset`; none when it does not fit into [`DATA_ROOM`].
    ///
    /// # Panics
    /// When the buffer is of another pool.
    pub fn copy_from_peer(&mut self, buffer: &mut Buffer, offset: usize, from: PeerSlice<'_>) -> Option<()> {
        if offset.checked_add(from.len)? > DATA_ROOM {
            return None;
        }
        // SAFETY: the copy ends within the buffer, as just checked; the buffer's only handle is borrowed.
        unsafe { copy(from.at.as_ptr(), self.buffers().data(buffer).as_ptr().add(offset), from.len) };
        Some(())
    }

    /// Copies the bytes of `packet` from `offset` on to `to`, as many as both have; gives their number.
    ///
    /// # Panics
    /// When the packet is of another pool.
    pub fn copy_to_peer(&self, packet: &Packet, offset: usize, to: PeerSlice<'_>) -> usize {
        let len = packet.len().saturating_sub(offset).min(to.len);
        if len > 0 {
            // SAFETY: `offset + len` is not beyond the packet, and `to` has room for `len`.
            unsafe { copy(self.buffers().data(packet.buffer()).as_ptr().add(offset), to.at.as_ptr(), len) };
        }
        len
    }
}
