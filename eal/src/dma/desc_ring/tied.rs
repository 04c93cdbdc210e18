//! Tied rings: a packet that arrives in a descriptor of an RX ring leaves from a descriptor of a TX ring, in the
//! same buffer, and the buffer then returns to the first. No buffer passes through a pool, and no address is
//! written per packet.

mod packet;
#[cfg(test)]
mod tests;

use std::ptr::NonNull;
use std::sync::Arc;

pub use packet::TiedPacket;

use super::fill::write_fresh;
#[cfg(target_arch = "x86_64")]
use super::fill::x86::{send_lower, send_words, write_lower};
use super::take::Lengths;
#[cfg(target_arch = "x86_64")]
use super::take::x86::total;
use super::used::UsedElements;
use super::words::Words;
use super::{DescRing, Descriptor, GoodWord, SendWord};
use crate::dma::packet::{DATA_ROOM, DEVICE_HEADER, HEADROOM, MAX_BURST, Packet};
use crate::dma::pool::{Buffers, Pool, PoolAddresses, PoolCache};
use crate::dma::ring::{DmaRing, Place, RingEntry, RingView};

/// A run of packets ends at each multiple of this number, in positions of the TX ring.
const BATCH: usize = MAX_BURST;

/// Lengths in bytes that packets may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    shortest: usize,
    /// Difference between the longest and the shortest, for one comparison of both.
    range: usize,
}

impl Limits {
    /// Lengths of at least `shortest` bytes that fit into a buffer.
    ///
    /// # Panics
    /// Panics if `shortest` is more than [`DATA_ROOM`].
    pub const fn at_least(shortest: usize) -> Self {
        assert!(shortest <= DATA_ROOM);
        Self { shortest, range: DATA_ROOM - shortest }
    }

    /// Whether they include `len`.
    #[inline(always)]
    fn include(&self, len: usize) -> bool {
        len.wrapping_sub(self.shortest) <= self.range
    }
}

/// Packets that moved from an RX ring to a TX ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Number of packets, at least 1.
    pub count: usize,
    /// Sum of their lengths in bytes.
    pub bytes: u64,
    /// Whether the last of them ended a run.
    pub is_last: bool,
}

/// An RX ring and a TX ring whose descriptors share buffers.
///
/// Each descriptor of the RX ring keeps its buffer, and the TX descriptor that sends what it receives points to
/// the same buffer. At any time each ring owns the buffers from its tail to its head, as a ring that is not tied
/// does. For each packet, the tail of the RX ring and the head of the TX ring move by one descriptor.
///
/// Packets move in runs. A run ends where the RX ring ends, at a multiple of 32 in the TX ring, and behind the last
/// descriptor that was offered to the RX device. Within a run, no index wraps and no check is needed.
#[derive(Debug)]
pub struct TiedRings {
    /// RX descriptor behind the last one of the run. It is within the ring if the run is empty.
    rx_end: NonNull<Descriptor>,
    /// TX descriptor behind the last one of the run.
    tx_end: NonNull<Descriptor>,
    /// Record behind the last one of the run, of a buffer that descriptors of both rings have.
    record_end: NonNull<u32>,
    /// Used element behind the last one of the run, if completions are in a used ring.
    used_end: Option<NonNull<u64>>,
    /// Index of `rx_end`, at most the number of descriptors.
    index_end: usize,
    /// Place of the next packet, counted from the end of the run.
    next: Place,
    /// Place of the first packet of the run.
    first: Place,
    addresses: PoolAddresses,
    /// Rings as of the start of the run.
    rx: DescRing,
    tx: DescRing,
    /// Position in the RX ring up to which descriptors were offered to the device.
    offered: usize,
    /// Whether the descriptor at the head of the RX ring has a buffer, which neither ring owns. There is one if
    /// a device must not own its whole ring.
    has_spare: bool,
    /// Used ring of the RX ring, if it has one, with as many elements as that has descriptors.
    used: Option<DmaRing<u64>>,
    /// Keeps `addresses` valid.
    _pool: Arc<Pool>,
}

// SAFETY: all pointers are into memory that `rx`, `tx` and `_pool` keep, and that no thread owns.
unsafe impl Send for TiedRings {}

impl TiedRings {
    /// Ties `rx` to `tx`. Adds buffers from `cache` until both rings together own as many as the smaller of
    /// their capacities, and gives them to descriptors of `rx` as [`DescRing::refill`] does with `front` and
    /// `word`. The caller announces them to the device. `used` is the used ring of `rx`, if it has one. TX
    /// descriptors will have second words of `send`.
    ///
    /// # Errors
    /// Both rings, if they or `used` differ in their sizes, have fewer than 32 descriptors or an empty one, own too
    /// many buffers or buffers of another pool than that of `cache`, if that has too few buffers, or if packets on
    /// their way have second words that `send` does not return.
    ///
    /// # Panics
    /// Panics if `front` or `send.front` is more than 16.
    #[allow(clippy::result_large_err)]
    pub fn new(
        mut rx: DescRing,
        mut tx: DescRing,
        (front, word): (usize, u64),
        used: Option<&DmaRing<u64>>,
        send: SendWord,
        cache: &mut PoolCache,
    ) -> Result<Self, (DescRing, DescRing)> {
        assert!(front.max(send.front) <= DEVICE_HEADER);
        let (entries, most) = (rx.entries(), rx.capacity.min(tx.capacity));
        let fits = |ring: &DescRing| {
            !ring.has_holes() && (ring.owned() == 0 || ring.fresh_bits == cache.fresh_bits())
        };
        let fit = tx.entries() == entries && used.is_none_or(|used| used.entries() == entries);
        let is_possible = fit && entries >= BATCH && most + 1 >= entries;
        let is_sent = |i: usize| tx.load::<1>(tx.tail.wrapping_add(i)) >> 32 == send.bits >> 32;
        if !is_possible || !fits(&rx) || !fits(&tx) || rx.owned() + tx.owned() > most {
            return Err((rx, tx));
        }
        if send.is_lower_half() && !(0..tx.owned()).all(is_sent) {
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
            tx.assign(tx.head.wrapping_add(ahead), slot, send.front, send.bits, buffers);
        }
        let mut rings = Self {
            rx_end: rx.desc,
            tx_end: tx.desc,
            record_end: NonNull::dangling(),
            used_end: None,
            index_end: 0,
            next: Place::HERE,
            first: Place::HERE,
            addresses: cache.addresses(),
            offered: rx.head,
            rx,
            tx,
            has_spare: spare.is_some(),
            used: used.cloned(),
            _pool: Arc::clone(cache.pool()),
        };
        rings.start_run();
        Ok(rings)
    }

    /// Ends the run, and starts the next.
    #[inline(never)]
    fn start_run(&mut self) {
        let moved = self.next.since(self.first);
        self.rx.tail = self.rx.tail.wrapping_add(moved);
        self.tx.head = self.tx.head.wrapping_add(moved);
        let (received, sent) = (self.rx.tail & self.rx.mask, self.tx.head & self.tx.mask);
        let to_end = self.rx.entries() - received;
        let to_batch = BATCH - (self.tx.head & (BATCH - 1));
        let run = to_end.min(to_batch).min(self.offered.wrapping_sub(self.rx.tail));
        self.first = Place::HERE.back(run);
        self.next = self.first;
        self.index_end = received + run;
        // SAFETY: the run does not go beyond the end of either ring. The masked indices are below the number of
        // descriptors and records.
        unsafe {
            self.rx_end = self.rx.desc.add(received + run);
            self.tx_end = self.tx.desc.add(sent + run);
            self.record_end = NonNull::new_unchecked(self.rx.record.as_mut_ptr().add(received + run));
            self.used_end = self.used.as_ref().map(|used| used.start().add(received + run));
        }
    }

    /// Moves to `place`. Returns whether that is the end of the run.
    #[inline(always)]
    fn advance(&mut self, place: Place) -> bool {
        self.next = place;
        let is_last = place == Place::HERE;
        if is_last {
            self.start_run();
        }
        is_last
    }

    /// Whether no packet can move before further descriptors are offered.
    #[inline(always)]
    fn is_empty(&self) -> bool {
        self.next == Place::HERE
    }

    /// Number, at most 0, that tells whether a packet has moved since an earlier call in the same run.
    #[inline(always)]
    pub fn place(&self) -> isize {
        self.next.number()
    }

    /// Updates the tail of [`TiedRings::rx`] and the head of [`TiedRings::tx`].
    #[inline(always)]
    pub fn sync(&mut self) {
        if self.next != self.first {
            self.start_run();
        }
    }

    /// RX descriptors up to the end of the run.
    #[inline(always)]
    fn words(&self) -> RingEntry<'_, u64, 2> {
        // SAFETY: the descriptors are those of the RX ring, and their places are within the run.
        unsafe { RingView::<u64, 2>::over(self.rx_end.cast(), 0) }.entry(0)
    }

    /// Second word of the next RX descriptor.
    #[inline(always)]
    pub fn next_word(&self) -> u64 {
        // SAFETY: the descriptor is within the ring, also if the run is empty.
        unsafe { self.words().at(self.next) }.load::<1>()
    }

    /// [`DescRing::owned`] of [`TiedRings::rx`], which has no empty descriptor in between.
    #[inline(always)]
    pub fn rx_owned(&self) -> usize {
        self.rx.head.wrapping_sub(self.rx.tail)
    }

    /// [`DescRing::owned`] of [`TiedRings::tx`], which has no empty descriptor in between.
    #[inline(always)]
    pub fn tx_owned(&self) -> usize {
        self.tx.head.wrapping_sub(self.tx.tail)
    }

    /// Number of descriptors with a buffer that were not offered to the RX device yet.
    #[inline(always)]
    pub fn waiting(&self) -> usize {
        self.rx.head.wrapping_sub(self.offered)
    }

    /// Returns the RX ring, whose descriptors up to its head the caller offers to the device.
    #[inline(always)]
    pub fn offer(&mut self) -> &DescRing {
        self.offered = self.rx.head;
        if self.is_empty() {
            self.start_run();
        }
        &self.rx
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

impl TiedRings {
    /// Moves packets to the TX ring, as many as have a second word that is `good` and at least `SHORTEST`
    /// bytes, up to the end of the run. `edit` is called with each packet. TX descriptors get second words of
    /// `send`, and RX descriptors a second word of 0. Returns `None` if none moved.
    #[inline(always)]
    pub fn forward_words<const SHORTEST: usize>(
        &mut self,
        good: GoodWord,
        send: SendWord,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        // SAFETY: this borrows the ring for longer than `self`, and is used for this run only.
        let first = unsafe { RingView::<u64, 2>::over(self.rx_end.cast(), 0) }.entry(0);
        // SAFETY: there are descriptors up to the end of the run.
        unsafe {
            self.forward::<true, SHORTEST, true>(Place::HERE, &Words { first, good }, send, |_| true, edit)
        }
    }

    /// [`TiedRings::forward_words`] for one packet, with the second word `word` and a length within `limits`, in
    /// fewer instructions. The packet does not move if it is not good, and if one of the bits `more` is set in the
    /// second word of the RX descriptor after it, unless that is in the next run.
    #[inline(always)]
    pub fn forward_one(
        &mut self,
        (word, more): (u64, u64),
        good: GoodWord,
        limits: &Limits,
        send: SendWord,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        if self.next.is_before(Place::HERE, 2) {
            // SAFETY: the run does not end after its first packet.
            if unsafe { self.words().at(self.next.ahead(1)) }.load::<1>() & more != 0 {
                return None;
            }
        } else if self.is_empty() {
            return None;
        }
        let len = good.len_or_more(word);
        if !limits.include(len) {
            return None;
        }
        // SAFETY: a packet is left. The limits do not exceed `DATA_ROOM`.
        unsafe { self.one::<true>(len, send, |_| true, edit) }
    }

    /// Moves up to `most` packets, for which `keep` returns true, to the TX ring, when completions are elements
    /// of a used ring. See [`DescRing::take_used`] and [`TiedRings::forward_words`]. RX descriptors do not
    /// change. Without `REWRITES`, most TX descriptors that are right already are not written, so that their cache
    /// lines stay in the cache of a device that is a process.
    #[inline(always)]
    pub fn forward_used<const SHORTEST: usize, const REWRITES: bool>(
        &mut self,
        (most, front): (u16, usize),
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        let elements = self.elements(front)?;
        let end = self.next.ahead(most.into()).min(Place::HERE);
        // SAFETY: there are descriptors and elements up to the end of the run.
        unsafe { self.forward::<false, SHORTEST, REWRITES>(end, &elements, send, keep, edit) }
    }

    /// [`TiedRings::forward_used`] for one packet with a length within `limits`, in fewer instructions.
    #[inline(always)]
    pub fn forward_one_used(
        &mut self,
        (limits, front): (Limits, usize),
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        if self.is_empty() {
            return None;
        }
        let elements = self.elements(front)?;
        // SAFETY: a packet is left, and thus an element. The limits do not exceed `DATA_ROOM`.
        unsafe {
            let len = elements.len_or_more(self.next);
            if !limits.include(len) {
                return None;
            }
            self.one::<false>(len, send, keep, edit)
        }
    }

    /// Used elements up to the end of the run, if there is a used ring.
    #[inline(always)]
    fn elements<'a>(&self, front: usize) -> Option<UsedElements<'a>> {
        // SAFETY: this borrows the ring for longer than `self`, and is used for this run only.
        let first = unsafe { RingView::<u64>::over(self.used_end?, 0) }.entry(0);
        Some(UsedElements { first, index: self.index_end, front })
    }

    /// Moves the next packet, which has `len` bytes, if `keep` returns true for it.
    ///
    /// # Safety
    /// The run is not empty, and `len` is not above `DATA_ROOM`.
    #[inline(always)]
    unsafe fn one<const CLEARS: bool>(
        &mut self,
        len: usize,
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        // SAFETY: a packet is left, so the RX ring owns the buffer, which belongs to the pool of `addresses`. The
        // descriptors are in this run. That of the TX ring has no buffer, because both rings own no more than its
        // capacity.
        unsafe {
            let at = self.next;
            let (received, sent) = (second_word(self.rx_end, at), second_word(self.tx_end, at));
            let mut packet = TiedPacket::new(at.of(self.record_end).read(), self.addresses.buffers());
            if !keep(&packet) {
                return None;
            }
            edit(&mut packet);
            if CLEARS {
                received.write(0);
            }
            sent.write(send.of(len).to_le());
            Some(Moved { count: 1, bytes: len as u64, is_last: self.advance(at.ahead(1)) })
        }
    }

    /// Moves packets of `lengths` up to the place `end`. Ends before a length that is `None` or less than
    /// `SHORTEST`, and before a packet for which `keep` returns false. With `CLEARS`, second words of RX
    /// descriptors become 0. For `REWRITES`, see [`TiedRings::forward_used`].
    ///
    /// A packet's data is written only after its completion was loaded, on which the write depends.
    ///
    /// # Safety
    /// `end` is within the run or its end, and `lengths` has the places up to there.
    #[inline(always)]
    unsafe fn forward<const CLEARS: bool, const SHORTEST: usize, const REWRITES: bool>(
        &mut self,
        mut end: Place,
        lengths: &impl Lengths,
        send: SendWord,
        keep: impl Fn(&TiedPacket<'_>) -> bool,
        mut edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved> {
        let buffers = self.addresses.buffers();
        let (rx_end, tx_end, record_end) = (self.rx_end, self.tx_end, self.record_end);
        // SAFETY: called with places before `end`, so within the run; otherwise as in `one`.
        let packet = |at: Place| unsafe { TiedPacket::new(at.of(record_end).read(), buffers) };
        // SAFETY: as above.
        let mut finish = |at: Place| unsafe {
            if CLEARS {
                second_word(rx_end, at).write(0);
            }
            edit(&mut packet(at));
        };
        let mut at = self.next;
        #[cfg(not(target_arch = "x86_64"))]
        let mut bytes = 0;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86-64; otherwise as above.
        let mut bytes = unsafe {
            use std::arch::x86_64::*;
            let (mut sum, mut fours) = (_mm_setzero_si128(), lengths.fours(at));
            while at.is_before(end, 4) {
                if !lengths.is_completed(at) {
                    end = at;
                    break;
                }
                let Some(four) = lengths.four(at, SHORTEST, &mut fours) else {
                    if lengths.len(at).is_none() {
                        end = at;
                    }
                    break;
                };
                let keep = |i: usize| keep(&packet(at.ahead(i)));
                if !(keep(0) && keep(1) && keep(2) && keep(3)) {
                    break;
                }
                let second = |i: usize| second_word(tx_end, at.ahead(i));
                if send.is_lower_half() {
                    let words = [second(0), second(1), second(2), second(3)];
                    write_lower::<REWRITES>(send_lower(send, four), words);
                } else {
                    let [low, high] = send_words(send, four);
                    let (low, high) = (_mm_castsi128_pd(low), _mm_castsi128_pd(high));
                    _mm_storel_pd(second(0).cast(), low);
                    _mm_storeh_pd(second(1).cast(), low);
                    _mm_storel_pd(second(2).cast(), high);
                    _mm_storeh_pd(second(3).cast(), high);
                }
                // Not a loop, for which the compiler would add checks.
                finish(at);
                finish(at.ahead(1));
                finish(at.ahead(2));
                finish(at.ahead(3));
                sum = _mm_add_epi32(sum, four);
                at = at.ahead(4);
            }
            total(sum)
        };
        while at < end {
            // SAFETY: as above.
            let len = unsafe { lengths.len(at) };
            let Some(len) = len.filter(|len| *len >= SHORTEST && keep(&packet(at))) else { break };
            // SAFETY: as above.
            unsafe { second_word(tx_end, at).write(send.of(len).to_le()) };
            finish(at);
            bytes += len as u64;
            at = at.ahead(1);
        }
        if at == self.next {
            return None;
        }
        Some(Moved { count: at.since(self.next), bytes, is_last: self.advance(at) })
    }

    /// Returns the buffers of `count` sent packets, in order from the tail of the TX ring, to the RX ring. The
    /// caller announces them to the device. For a device that overwrites the address of a received descriptor,
    /// `fresh` is given, and for one that overwrites that of a descriptor that reports, `tx_front`. The former
    /// descriptors, and the last of the latter, are then written as in [`TiedRings::new`].
    ///
    /// # Panics
    /// Panics if the TX ring owned fewer than `count` buffers at the last [`TiedRings::sync`], or if `tx_front` or `fresh.0` is more than 16.
    #[inline(always)]
    pub fn give_back(&mut self, count: usize, fresh: Option<(usize, u64)>, tx_front: Option<usize>) {
        assert!(count <= self.tx_owned());
        let buffers = self.addresses.buffers();
        if let Some((front, word)) = fresh {
            self.rx.refresh(self.rx.head, count, front, word, buffers);
        }
        if let Some(front) = tx_front.filter(|_| count > 0) {
            self.tx.refresh(self.tx.tail.wrapping_add(count - 1), 1, front, 0, buffers);
        }
        self.tx.tail = self.tx.tail.wrapping_add(count);
        self.rx.head = self.rx.head.wrapping_add(count);
    }
}

/// Second word of the descriptor at a place.
///
/// # Safety
/// The descriptor is within the ring of `end`.
#[inline(always)]
unsafe fn second_word(end: NonNull<Descriptor>, at: Place) -> *mut u64 {
    // SAFETY: by the caller's contract.
    unsafe { &raw mut (*at.of(end).as_ptr())[1] }
}
