//! Tied rings: a packet that arrives in a descriptor of an RX ring leaves from a descriptor of a TX ring, in the
//! same buffer, and the buffer then returns to the first. No buffer passes through a pool, and no address is
//! written per packet.

use std::ptr::NonNull;
use std::sync::Arc;

use super::fill::write_fresh;
#[cfg(target_arch = "x86_64")]
use super::fill::x86::send_words;
use super::take::Lengths;
#[cfg(target_arch = "x86_64")]
use super::take::x86::total;
use super::used::UsedElements;
use super::words::Words;
use super::{DescRing, Descriptor, GoodWord, SendWord};
use crate::dma::packet::{DEVICE_HEADER, HEADROOM, MAX_BURST, Packet, SHORT};
use crate::dma::pool::{Buffers, Pool, PoolAddresses, PoolCache};
use crate::dma::ring::{DmaRing, RingView};

/// A run of packets ends at each multiple of this number, in positions of the TX ring.
const BATCH: usize = MAX_BURST;

/// An RX ring and a TX ring whose descriptors share buffers.
///
/// Each descriptor of the RX ring keeps its buffer, and the TX descriptor that sends what it receives points to
/// the same buffer. At any time each ring owns the buffers from its tail to its head, as a ring that is not tied
/// does. For each packet, the tail of the RX ring and the head of the TX ring move by one descriptor.
///
/// Packets move in runs. A run ends where the RX ring ends, at a multiple of 32 in the TX ring, and at the head
/// of the RX ring. Within a run, no index wraps and no check is needed.
#[derive(Debug)]
pub struct TiedRings {
    /// RX descriptor of the next packet, always within the ring.
    received: NonNull<Descriptor>,
    /// TX descriptor of the next packet.
    sent: NonNull<Descriptor>,
    /// Record of the buffer of both.
    record: NonNull<u32>,
    /// Number of packets until the end of the run.
    left: usize,
    /// Value of `left` at the start of the run.
    run: usize,
    addresses: PoolAddresses,
    /// Rings as of the start of the run.
    rx: DescRing,
    tx: DescRing,
    /// Whether the descriptor at the head of the RX ring has a buffer, which neither ring owns. There is one if
    /// a device must not own its whole ring.
    has_spare: bool,
    /// Keeps `addresses` valid.
    _pool: Arc<Pool>,
}

// SAFETY: all pointers are into memory that `rx`, `tx` and `_pool` keep, and that no thread owns.
unsafe impl Send for TiedRings {}

impl TiedRings {
    /// Ties `rx` to `tx`. Adds buffers from `cache` until both rings together own as many as the smaller of
    /// their capacities, and gives them to descriptors of `rx` as [`DescRing::refill`] does with `front` and
    /// `word`. The caller announces them to the device. TX descriptors are pointed `tx_front` bytes before the
    /// data of the packets that they will send.
    ///
    /// # Errors
    /// Both rings, if they differ in their number of descriptors, have fewer than 32 or an empty one, own too
    /// many buffers or buffers of another pool than that of `cache`, or if that has too few buffers.
    ///
    /// # Panics
    /// Panics if `front` or `tx_front` is more than 16.
    #[allow(clippy::result_large_err)]
    pub fn new(
        mut rx: DescRing,
        mut tx: DescRing,
        (front, word): (usize, u64),
        tx_front: usize,
        cache: &mut PoolCache,
    ) -> Result<Self, (DescRing, DescRing)> {
        assert!(front.max(tx_front) <= DEVICE_HEADER);
        let (entries, most) = (rx.entries(), rx.capacity.min(tx.capacity));
        let fits = |ring: &DescRing| {
            !ring.has_holes() && (ring.owned() == 0 || ring.fresh_bits == cache.fresh_bits())
        };
        let is_possible = tx.entries() == entries && entries >= BATCH && most + 1 >= entries;
        if !is_possible || !fits(&rx) || !fits(&tx) || rx.owned() + tx.owned() > most {
            return Err((rx, tx));
        }
        tx.use_pool(cache);
        while rx.owned() + tx.owned() < most {
            if rx.refill(most - rx.owned() - tx.owned(), front, word, cache) == 0 {
                return Err((rx, tx));
            }
        }
        let spare = if most < entries { cache.take(1).next() } else { None };
        if most < entries && spare.is_none() {
            return Err((rx, tx));
        }
        let buffers = cache.buffers();
        // Buffers that `tx` owns go behind those of `rx`, in the order in which they will come back.
        for behind in 1..=tx.owned() {
            let slot = tx.record[tx.head.wrapping_sub(behind) & tx.mask];
            rx.assign(rx.tail.wrapping_sub(behind), slot, front, word, buffers);
        }
        if let Some(slot) = spare {
            rx.assign(rx.head, slot, front, word, buffers);
        }
        for ahead in 0..rx.owned() + usize::from(spare.is_some()) {
            let slot = rx.record[rx.tail.wrapping_add(ahead) & rx.mask];
            tx.assign(tx.head.wrapping_add(ahead), slot, tx_front, 0, buffers);
        }
        let mut rings = Self {
            received: rx.desc,
            sent: tx.desc,
            record: NonNull::dangling(),
            left: 0,
            run: 0,
            addresses: cache.addresses(),
            rx,
            tx,
            has_spare: spare.is_some(),
            _pool: Arc::clone(cache.pool()),
        };
        rings.start_run();
        Ok(rings)
    }

    /// Ends the run, and starts the next.
    #[inline(never)]
    fn start_run(&mut self) {
        let moved = self.run - self.left;
        self.rx.tail = self.rx.tail.wrapping_add(moved);
        self.tx.head = self.tx.head.wrapping_add(moved);
        let first = self.rx.tail & self.rx.mask;
        let to_end = self.rx.entries() - first;
        let to_batch = BATCH - (self.tx.head & (BATCH - 1));
        self.run = to_end.min(to_batch).min(self.rx.owned());
        self.left = self.run;
        // SAFETY: the masked indices are below the number of descriptors and records.
        unsafe {
            self.received = self.rx.desc.add(first);
            self.sent = self.tx.desc.add(self.tx.head & self.tx.mask);
            self.record = NonNull::new_unchecked(self.rx.record.as_mut_ptr().add(first));
        }
    }

    /// Moves past `count` packets, of at most `left`. Returns whether they were the last of the run.
    #[inline(always)]
    fn advance(&mut self, count: usize) -> bool {
        // SAFETY: the run does not go beyond the end of either ring.
        unsafe {
            self.received = self.received.add(count);
            self.sent = self.sent.add(count);
            self.record = self.record.add(count);
        }
        self.left -= count;
        let is_last = self.left == 0;
        if is_last {
            self.start_run();
        }
        is_last
    }

    /// Whether no packet has moved in this run: the last one has ended, or [`TiedRings::sync`] was called.
    #[inline(always)]
    pub fn is_at_start(&self) -> bool {
        self.left == self.run
    }

    /// Number of packets that can move in this run.
    #[inline(always)]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Updates the tail of [`TiedRings::rx`] and the head of [`TiedRings::tx`].
    #[inline(always)]
    pub fn sync(&mut self) {
        if !self.is_at_start() {
            self.start_run();
        }
    }

    /// Second word of the next RX descriptor.
    #[inline(always)]
    pub fn next_word(&self) -> u64 {
        // SAFETY: `received` is always within the ring.
        unsafe { RingView::<u64, 2>::over(self.received.cast(), 0) }.load::<1>(0)
    }

    /// Second word of the RX descriptor after that, or 0 if it is in the next run. `None` if no packet is left in
    /// this run.
    #[inline(always)]
    pub fn word_after(&self) -> Option<u64> {
        if self.left > 1 {
            // SAFETY: the run does not end after its first packet.
            return Some(unsafe { RingView::<u64, 2>::over(self.received.add(1).cast(), 0) }.load::<1>(0));
        }
        (self.left == 1).then_some(0)
    }

    /// Returns the RX ring and the TX ring, each with the buffers that it owns.
    pub fn untie(mut self, cache: &mut PoolCache) -> (DescRing, DescRing) {
        self.start_run();
        if self.has_spare {
            let slot = self.rx.record[self.rx.head & self.rx.mask];
            cache.free(Packet::in_slot(slot, 0, self.rx.fresh_bits));
        }
        (self.rx, self.tx)
    }

    /// The RX ring, whose tail is that of the last [`TiedRings::sync`] or later.
    #[inline(always)]
    pub fn rx(&self) -> &DescRing {
        &self.rx
    }

    /// The TX ring, whose head is that of the last [`TiedRings::sync`] or later.
    #[inline(always)]
    pub fn tx(&self) -> &DescRing {
        &self.tx
    }

    /// Sets `bits` in the second word of the last descriptor before the head of [`TiedRings::tx`].
    #[inline(always)]
    pub fn mark_last(&mut self, bits: u64) {
        let last = self.tx.head.wrapping_sub(1);
        self.tx.set_word(last, self.tx.load::<1>(last) | bits);
    }
}

impl DescRing {
    /// Records the buffer at the pool offset `slot` for a descriptor that the device does not use, and points
    /// the descriptor `front` bytes before the buffer's data.
    fn assign(&mut self, position: usize, slot: u32, front: usize, word: u64, buffers: Buffers<'_>) {
        self.record[position & self.mask] = slot;
        self.set(position, [buffers.iova_at(slot + (HEADROOM - front) as u32), word]);
    }

    /// Assigns the recorded buffers of `count` descriptors again.
    fn refresh(&mut self, start: usize, count: usize, front: usize, word: u64, buffers: Buffers<'_>) {
        assert!(front <= DEVICE_HEADER);
        let (mut position, mut rest) = (start, count);
        while rest > 0 {
            let first = position & self.mask;
            let run = rest.min(BATCH).min(self.mask + 1 - first);
            let mut slots = [0; BATCH];
            slots[..run].copy_from_slice(&self.record[first..first + run]);
            // SAFETY: the run does not go beyond the end of the ring.
            unsafe {
                let (desc, record) = (self.desc.add(first).as_ptr(), self.record.as_mut_ptr().add(first));
                write_fresh(&slots[..run], (HEADROOM - front) as u32, word, buffers, desc, record);
            }
            (position, rest) = (position.wrapping_add(run), rest - run);
        }
    }
}

/// Packet on its way between tied rings.
#[derive(Debug)]
pub struct TiedPacket<'a> {
    /// Pool offset of the buffer.
    slot: u32,
    buffers: Buffers<'a>,
}

impl<'a> TiedPacket<'a> {
    /// # Safety
    /// `slot` is the pool offset of a buffer of the pool of `buffers` that has no handle.
    #[inline(always)]
    unsafe fn new(slot: u32, buffers: Buffers<'a>) -> Self {
        Self { slot, buffers }
    }

    /// Address of the packet's data. The addition of a constant is part of each access.
    #[inline(always)]
    fn data(&self) -> *mut u8 {
        // SAFETY: by the contract of `new`, the buffer belongs to the pool.
        unsafe { self.buffers.at(self.slot).add(HEADROOM) }
    }

    /// Reads the bytes directly before the packet's data. See [`PoolCache::read_header`].
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        const { assert!(LEN <= DEVICE_HEADER) };
        // SAFETY: a tied ring owns the buffer, and is borrowed mutably. The data is `HEADROOM` bytes into it.
        unsafe { self.data().sub(LEN).cast::<[u8; LEN]>().read() }
    }

    /// Writes `bytes` directly before the packet's data. See [`PoolCache::write_header`].
    #[inline(always)]
    pub fn write_header<const LEN: usize>(&mut self, bytes: [u8; LEN]) {
        const { assert!(LEN <= DEVICE_HEADER) };
        // SAFETY: as above, in the other direction.
        unsafe { self.data().sub(LEN).cast::<[u8; LEN]>().write(bytes) }
    }

    /// Copies `first` and then `second` to the front of the packet's data. Both are values, so that they stay
    /// in registers for many packets.
    #[inline(always)]
    pub fn write<const N: usize, const M: usize>(&mut self, first: [u8; N], second: [u8; M]) {
        const { assert!(N + M <= SHORT) };
        // SAFETY: as above. Data starts at least `SHORT` bytes before the end of its buffer. Byte arrays need
        // no alignment.
        unsafe {
            self.data().cast::<[u8; N]>().write(first);
            self.data().add(N).cast::<[u8; M]>().write(second);
        }
    }
}

impl TiedRings {
    /// Moves packets to the TX ring, as many as have a second word that is `good` and at least `SHORTEST`
    /// bytes, up to the end of the run. `edit` is called with each packet. TX descriptors get second words of
    /// `send`, and RX descriptors a second word of 0. Returns the number of packets and the sum of their lengths
    /// in bytes.
    #[inline(always)]
    pub fn forward_words<const SHORTEST: usize>(
        &mut self,
        good: GoodWord,
        send: SendWord,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> (usize, u64) {
        // SAFETY: the view is used for this run only, in which there are `left` descriptors.
        let first = unsafe { RingView::<u64, 2>::over(self.received.cast(), 0) }.entry(0);
        // SAFETY: as above.
        unsafe { self.forward::<true, SHORTEST>(self.left, &Words { first, good }, send, |_| true, edit) }
    }

    /// [`TiedRings::forward_words`] for one packet, with the second word `word` and at least `shortest` bytes, in
    /// fewer instructions. Returns its length in bytes and whether it was the last of the run, or `None` if it is
    /// not good or no packet is left.
    #[inline(always)]
    pub fn forward_one(
        &mut self,
        word: u64,
        good: GoodWord,
        shortest: u8,
        send: SendWord,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<(usize, bool)> {
        if self.left == 0 {
            return None;
        }
        let len = good.len_from(word, shortest)?;
        // SAFETY: a packet is left, and it has no more than `DATA_ROOM` bytes.
        unsafe { self.one::<true>(len, send, |_| true, edit) }
    }

    /// Moves up to `most` packets, for which `keep` returns true, to the TX ring, when completions are elements
    /// of a used ring. See [`DescRing::take_used`] and [`TiedRings::forward_words`]. RX descriptors do not
    /// change. Also ends where `used` ends.
    #[inline(always)]
    pub fn forward_used<const SHORTEST: usize>(
        &mut self,
        used: &DmaRing<u64>,
        (most, front): (usize, usize),
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> (usize, u64) {
        let elements = self.elements(used, front);
        let most = self.left.min(most).min(used.entries() - elements.index);
        // SAFETY: there are `most` descriptors in this run, and elements in `used`.
        unsafe { self.forward::<false, SHORTEST>(most, &elements, send, keep, edit) }
    }

    /// [`TiedRings::forward_used`] for one packet of at least `shortest` bytes, in fewer instructions. Returns
    /// its length in bytes and whether it was the last of the run, or `None` if there is none to move.
    #[inline(always)]
    pub fn forward_one_used(
        &mut self,
        used: &DmaRing<u64>,
        (shortest, front): (usize, usize),
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<(usize, bool)> {
        if self.left == 0 {
            return None;
        }
        // SAFETY: a packet is left, and an element of at most `DATA_ROOM` bytes.
        unsafe {
            let len = self.elements(used, front).len(0).filter(|len| *len >= shortest)?;
            self.one::<false>(len, send, keep, edit)
        }
    }

    /// Elements of `used` from the next on.
    #[inline(always)]
    fn elements<'a>(&self, used: &'a DmaRing<u64>, front: usize) -> UsedElements<'a> {
        let position = self.rx.tail.wrapping_add(self.run - self.left);
        let index = position & self.rx.mask & used.view().mask();
        UsedElements { first: used.view().entry(index), index, front }
    }

    /// Moves the next packet, which has `len` bytes, if `keep` returns true for it. Returns the length and whether
    /// the packet was the last of the run.
    ///
    /// # Safety
    /// `left` is not 0, and `len` is not above `DATA_ROOM`.
    #[inline(always)]
    unsafe fn one<const CLEARS: bool>(
        &mut self,
        len: usize,
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<(usize, bool)> {
        // SAFETY: a packet is left, so the RX ring owns the buffer, which belongs to the pool of `addresses`.
        let mut packet = unsafe { TiedPacket::new(self.record.read(), self.addresses.buffers()) };
        if !keep(&packet) {
            return None;
        }
        edit(&mut packet);
        // SAFETY: the descriptors are in this run. That of the TX ring has no buffer, because both rings own no
        // more than its capacity.
        unsafe {
            if CLEARS {
                (*self.received.as_ptr())[1] = 0;
            }
            (*self.sent.as_ptr())[1] = send.of(len).to_le();
        }
        Some((len, self.advance(1)))
    }

    /// Moves up to `most` packets, of `lengths`. Ends before a length that is `None` or less than `SHORTEST`,
    /// and before a packet for which `keep` returns false. Returns the number of packets and the sum of their
    /// lengths in bytes. With `CLEARS`, second words of RX descriptors become 0.
    ///
    /// A packet's data is written only after its completion was loaded, on which the write depends.
    ///
    /// # Safety
    /// `most` is not above `left`, and `lengths` has as many.
    #[inline(always)]
    unsafe fn forward<const CLEARS: bool, const SHORTEST: usize>(
        &mut self,
        most: usize,
        lengths: &impl Lengths,
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> (usize, u64) {
        let buffers = self.addresses.buffers();
        let (received, record, sent) = (self.received.as_ptr(), self.record.as_ptr(), self.sent.as_ptr());
        // SAFETY: called with less than `most`, so within the run; otherwise as in `one`.
        let packet = |i: usize| unsafe { TiedPacket::new(record.add(i).read(), buffers) };
        let clear = |i: usize| {
            if CLEARS {
                // SAFETY: as above.
                unsafe { (*received.add(i))[1] = 0 };
            }
        };
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86-64; otherwise as above.
        let (mut count, mut bytes, is_end) = unsafe {
            use std::arch::x86_64::*;
            let (mut count, mut is_end) = (0, false);
            let mut sum = _mm_setzero_si128();
            while most - count >= 4 {
                if !lengths.is_completed(count) {
                    is_end = true;
                    break;
                }
                let Some(four) = lengths.four(count) else {
                    is_end = lengths.len(count).is_none();
                    break;
                };
                let are_long = || {
                    let long = _mm_cmpgt_epi32(four, _mm_set1_epi32(SHORTEST as i32 - 1));
                    _mm_movemask_epi8(long) == 0xffff
                };
                let keep = |i: usize| keep(&packet(count + i));
                if !((SHORTEST == 0 || are_long()) && keep(0) && keep(1) && keep(2) && keep(3)) {
                    break;
                }
                let [low, high] = send_words(send, four);
                let (low, high) = (_mm_castsi128_pd(low), _mm_castsi128_pd(high));
                let second = |i: usize| (&raw mut (*sent.add(count + i))[1]).cast::<f64>();
                _mm_storel_pd(second(0), low);
                _mm_storeh_pd(second(1), low);
                _mm_storel_pd(second(2), high);
                _mm_storeh_pd(second(3), high);
                // Not a loop, for which the compiler checks that `count + 3` does not wrap.
                let mut finish = |i: usize| {
                    clear(count + i);
                    edit(&mut packet(count + i));
                };
                finish(0);
                finish(1);
                finish(2);
                finish(3);
                sum = _mm_add_epi32(sum, four);
                count += 4;
            }
            (count, total(sum), is_end)
        };
        #[cfg(not(target_arch = "x86_64"))]
        let (mut count, mut bytes, is_end) = (0, 0, false);
        while count < most && !is_end {
            // SAFETY: as above.
            let len = unsafe { lengths.len(count) };
            let mut packet = packet(count);
            let Some(len) = len.filter(|len| *len >= SHORTEST && keep(&packet)) else { break };
            // SAFETY: as above.
            unsafe { (*sent.add(count))[1] = send.of(len).to_le() };
            clear(count);
            edit(&mut packet);
            bytes += len as u64;
            count += 1;
        }
        if count > 0 {
            self.advance(count);
        }
        (count, bytes)
    }

    /// Returns the buffers of `count` sent packets, in order from the tail of the TX ring, to the RX ring. The
    /// caller announces them to the device. For a device that overwrites the address of a received descriptor,
    /// `fresh` is given, and for one that overwrites that of a descriptor that reports, `tx_front`. The former
    /// descriptors, and the last of the latter, are then written as in [`TiedRings::new`].
    ///
    /// # Panics
    /// Panics if the TX ring owns fewer than `count` buffers, or if `tx_front` or `fresh.0` is more than 16.
    #[inline(always)]
    pub fn give_back(&mut self, count: usize, fresh: Option<(usize, u64)>, tx_front: Option<usize>) {
        self.sync();
        assert!(count <= self.tx.head.wrapping_sub(self.tx.tail));
        let buffers = self.addresses.buffers();
        if let Some((front, word)) = fresh {
            self.rx.refresh(self.rx.head, count, front, word, buffers);
        }
        if let Some(front) = tx_front.filter(|_| count > 0) {
            self.tx.refresh(self.tx.tail.wrapping_add(count - 1), 1, front, 0, buffers);
        }
        self.tx.tail = self.tx.tail.wrapping_add(count);
        self.rx.head = self.rx.head.wrapping_add(count);
        if self.left == 0 {
            self.start_run();
        }
    }
}

#[cfg(test)]
mod tests;
