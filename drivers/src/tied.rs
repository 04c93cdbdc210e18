//! Tied lanes: an RX queue and the TX queue that sends all of its packets share their buffers.
//!
//! A packet leaves from the buffer that it arrived in, and the buffer then returns to the RX queue. Nothing
//! passes through a pool, and no address is written per packet. [`TiedLane`] needs rings of the same size and
//! buffers of one pool. It handles packets and completions that are as expected. All others are for
//! [`rx_burst`](RxBurst::rx_burst) and [`tx_burst`](TxBurst::tx_burst) of the queues that
//! [`TiedLane::untie`] returns.
//!
//! If the TX device stalls, the RX queue runs out of buffers, and its NIC drops what arrives. The counter
//! `rx_starved` then grows, and with it the NIC's own counter of missed packets, if it has one. A lane that is
//! not tied counts such packets in `tx_dropped`.

use std::os::fd::BorrowedFd;

use vireo_eal::dma::{
    DescRing, DmaRing, Limits, MAX_BURST, Moved, PoolCache, SendWord, TiedPacket, TiedRings,
};

use crate::counters::QueueCounters;
use crate::frames::SHORTEST;
use crate::port::{RxBurst, TxBurst};

/// Number of packets that are sent with one doorbell, if so many arrive.
const BATCH: usize = MAX_BURST;

/// RX queue that can be tied.
pub trait TieRx: RxBurst + Sized {
    /// The queue without its ring.
    type Tied: TiedRx;

    /// Whether packets and completions can be as expected.
    fn can_tie(&self) -> bool;

    /// Ring of the queue.
    fn ring(&self) -> &DescRing;

    /// Used ring, if completions are in one.
    fn used(&self) -> Option<&DmaRing<u64>> {
        None
    }

    /// Takes the ring out.
    fn detach(self) -> (DescRing, Self::Tied);

    /// Undoes [`TieRx::detach`].
    fn attach(ring: DescRing, queue: Self::Tied) -> Self;

    /// Gives no buffers to the ring before half of it is empty.
    fn postpone_refill(&mut self);
}

/// TX queue that can be tied.
pub trait TieTx: TxBurst + Sized {
    /// The queue without its ring.
    type Tied: TiedTx;

    /// Whether packets and completions can be as expected.
    fn can_tie(&self) -> bool;

    /// Ring of the queue.
    fn ring(&self) -> &DescRing;

    /// Returns the buffers of sent packets to `cache`.
    fn reclaim(&mut self, cache: &mut PoolCache);

    /// Takes the ring out.
    fn detach(self) -> (DescRing, Self::Tied);

    /// Undoes [`TieTx::detach`].
    fn attach(ring: DescRing, queue: Self::Tied) -> Self;
}

/// RX queue of a tied lane.
pub trait TiedRx {
    /// What a descriptor with a fresh buffer holds: the number of bytes before the packet's data that the
    /// device may write, and the second word.
    const FRESH: (usize, u64);

    /// Whether the device overwrites the addresses in its descriptors.
    const OVERWRITES_ADDRESSES: bool;

    /// What [`TiedRx::received`] found.
    type Received: Copy;

    /// Returns whether there is a completion.
    fn received(&self, rings: &TiedRings) -> Option<Self::Received>;

    /// Whether a header in front of each packet tells if it is as expected.
    fn reads_headers(&self) -> bool {
        false
    }

    /// Moves the next packet to the TX ring, if its length is within `limits` and it is the only one that was
    /// received, and calls `edit` with it.
    fn forward_one<T: TiedTx>(
        &mut self,
        received: Self::Received,
        rings: &mut TiedRings,
        tx: &T,
        limits: &Limits,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved>;

    /// Moves received packets, up to the first that is not as expected or has fewer than `SHORTEST` bytes, and calls
    /// `edit` with each of them. `HEADERS` is what [`TiedRx::reads_headers`] returns.
    fn forward_many<T: TiedTx, const HEADERS: bool, const SHORTEST: usize>(
        &mut self,
        received: Self::Received,
        rings: &mut TiedRings,
        tx: &T,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<Moved>;

    /// See [`RxBurst::event`].
    fn event(&self) -> Option<BorrowedFd<'_>>;

    /// Makes the device signal the event. Returns false if there is none.
    fn arm(&mut self) -> bool;

    /// See [`RxBurst::disarm`].
    fn disarm(&mut self);

    /// Announces all descriptors with a buffer to the device.
    fn offer(&mut self, ring: &DescRing);

    /// Counters of the queue.
    fn counters(&self) -> &QueueCounters;
}

/// TX queue of a tied lane.
pub trait TiedTx {
    /// Second word of a descriptor that sends a packet.
    const SEND: SendWord;

    /// Whether the device overwrites the address in a descriptor that reports a completion, which is then the last
    /// of those that [`TiedTx::completed`] returns.
    const OVERWRITES_ADDRESSES: bool;

    /// Length in bytes below which a packet must be padded, and is thus not as expected: 1 or 60.
    fn shortest(&self) -> usize {
        1
    }

    /// Returns a function that prepares a packet to be sent.
    fn header(&self) -> impl Fn(&mut TiedPacket<'_>) + Copy {
        |_| ()
    }

    /// Announces to the device all descriptors with a buffer.
    fn announce(&mut self, rings: &mut TiedRings);

    /// Returns the number of buffers, from the tail of the ring on, whose packets were sent: at least a batch,
    /// if there are so many. `None` if a completion is not as expected.
    fn completed(&mut self, ring: &DescRing) -> Option<usize>;

    /// Handles a ring without room.
    fn full(&mut self, ring: &DescRing);

    /// Counters of the queue.
    fn counters(&self) -> &QueueCounters;
}

/// Result of [`TiedLane::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    /// No packet was moved.
    Idle,
    /// Packets were received or sent.
    Busy,
    /// The next packet or completion is not as expected.
    Odd,
}

/// See [`TiedRx::Received`].
type Received<R> = <<R as TieRx>::Tied as TiedRx>::Received;

/// Returns a function that writes `addresses` to the front of a packet, in two stores. It is passed in two registers.
#[inline(always)]
fn write(addresses: [u8; 12]) -> impl Fn(&mut TiedPacket<'_>) + Copy {
    let [a, b, c, d, e, f, g, h, last @ ..] = addresses;
    let (first, last) = (u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u32::from_ne_bytes(last));
    move |packet| packet.write(first.to_ne_bytes(), last.to_ne_bytes())
}

/// An RX queue and a TX queue that are tied.
#[derive(Debug)]
pub struct TiedLane<R: TieRx, T: TieTx> {
    rings: TiedRings,
    rx: R::Tied,
    tx: T::Tied,
    /// Bytes of the packets that were not sent yet.
    bytes: u64,
    /// [`TiedRings::place`] at which a poll without packets has nothing else to do; `isize::MAX` if there is none.
    quiet_at: isize,
    /// Lengths of packets that are as expected.
    limits: Limits,
    /// Position in the TX ring up to which descriptors were announced, and packets counted.
    announced: usize,
    /// Number of descriptors that are announced to the RX device together, while it has as many.
    stride: usize,
}

/// Returns whether `rx` and `tx` can be tied now. They cannot if they do not fit each other. If they only hold more
/// buffers at the moment than they will together, `rx` receives no new ones before half of its ring is empty, so
/// that a later call returns true.
pub fn prepare(rx: &mut impl TieRx, tx: &mut impl TieTx, cache: &mut PoolCache) -> bool {
    let entries = rx.ring().entries();
    if !rx.can_tie() || !tx.can_tie() || tx.ring().entries() != entries {
        return false;
    }
    tx.reclaim(cache);
    let is_time = rx.ring().owned() + tx.ring().owned() <= entries;
    if !is_time {
        rx.postpone_refill();
    }
    is_time
}

impl<R: TieRx, T: TieTx> TiedLane<R, T> {
    /// Ties `rx` to `tx`, and takes missing buffers from `cache`.
    ///
    /// # Errors
    /// Both queues, if [`prepare`] returns false or `cache` has too few buffers.
    #[allow(clippy::result_large_err)]
    pub fn new(mut rx: R, mut tx: T, cache: &mut PoolCache) -> Result<Self, (R, T)> {
        if !prepare(&mut rx, &mut tx, cache) {
            return Err((rx, tx));
        }
        let (before, stride) = (rx.ring().head(), BATCH.min(rx.ring().entries() / 4));
        let used = rx.used().cloned();
        let ((rx_ring, mut rx), (tx_ring, tx)) = (rx.detach(), tx.detach());
        let rings = TiedRings::new(rx_ring, tx_ring, R::Tied::FRESH, used.as_ref(), T::Tied::SEND, cache);
        let ring = rings.as_ref().map_or_else(|rings| &rings.0, TiedRings::rx);
        if ring.head() != before {
            rx.offer(ring);
        }
        match rings {
            Ok(rings) => {
                rx.counters().tied.add(1);
                let (announced, limits) = (rings.tx().head(), Limits::at_least(tx.shortest()));
                let quiet_at = isize::MAX;
                Ok(Self { rings, rx, tx, bytes: 0, quiet_at, limits, announced, stride })
            }
            Err((rx_ring, tx_ring)) => {
                let mut rx = R::attach(rx_ring, rx);
                rx.postpone_refill();
                Err((rx, T::attach(tx_ring, tx)))
            }
        }
    }

    /// Forwards received packets. The first 12 bytes of each become what `addresses` returns, if anything.
    /// Packets are sent when there are 32 of them or nothing more arrived.
    #[inline(always)]
    pub fn poll(&mut self, addresses: impl Fn() -> Option<[u8; 12]>) -> Polled {
        let Some(received) = self.rx.received(&self.rings) else {
            return if self.rings.place() == self.quiet_at { Polled::Idle } else { self.flush() };
        };
        match addresses() {
            Some(addresses) => self.forward(received, write(addresses)),
            None => self.forward_unchanged(received),
        }
    }

    #[inline(never)]
    fn forward_unchanged(&mut self, received: Received<R>) -> Polled {
        self.forward(received, |_| ())
    }

    #[inline(always)]
    fn forward(&mut self, received: Received<R>, edit: impl Fn(&mut TiedPacket<'_>) + Copy) -> Polled {
        let Self { rings, rx, tx, limits, .. } = self;
        if let Some(moved) = rx.forward_one(received, rings, tx, limits, edit) {
            return self.moved(moved);
        }
        match (rx.reads_headers(), tx.shortest() < SHORTEST) {
            (false, true) => self.forward_many::<false, 0>(received, edit),
            (false, false) => self.forward_many::<false, SHORTEST>(received, edit),
            (true, true) => self.forward_many::<true, 0>(received, edit),
            (true, false) => self.forward_many::<true, SHORTEST>(received, edit),
        }
    }

    // Kept out of the polling loop, where too few CPU registers are left for the loop in here.
    #[inline(never)]
    fn forward_many<const HEADERS: bool, const SHORTEST: usize>(
        &mut self,
        received: Received<R>,
        edit: impl Fn(&mut TiedPacket<'_>) + Copy,
    ) -> Polled {
        let Self { rings, rx, tx, .. } = self;
        match rx.forward_many::<_, HEADERS, SHORTEST>(received, rings, tx, edit) {
            Some(moved) => self.moved(moved),
            None => Polled::Odd,
        }
    }

    /// Accounts for packets that were moved.
    #[inline(always)]
    fn moved(&mut self, moved: Moved) -> Polled {
        self.bytes += moved.bytes;
        if moved.is_last { self.flush() } else { Polled::Busy }
    }

    /// Sends and counts the packets that were not sent yet, and returns buffers of sent packets to the RX queue.
    #[inline(never)]
    fn flush(&mut self) -> Polled {
        self.rings.sync();
        let head = self.rings.tx().head();
        let count = head.wrapping_sub(self.announced);
        if count > 0 {
            let bytes = std::mem::take(&mut self.bytes);
            for counters in [self.rx.counters(), self.tx.counters()] {
                counters.packets.add(count as u64);
                counters.bytes.add(bytes);
            }
            self.announced = head;
            self.tx.announce(&mut self.rings);
        }
        let Some(sent) = self.tx.completed(self.rings.tx()) else { return Polled::Odd };
        let fresh = R::Tied::OVERWRITES_ADDRESSES.then_some(R::Tied::FRESH);
        let send_front = T::Tied::OVERWRITES_ADDRESSES.then_some(T::Tied::SEND.front);
        self.rings.give_back(sent, fresh, send_front);
        let (owned, waiting) = (self.rings.rx_owned(), self.rings.waiting());
        // In strides, and before the device has fewer than wait here.
        if waiting >= self.stride || 2 * waiting > owned {
            self.rx.offer(self.rings.offer());
        }
        if owned == 0 {
            self.rx.counters().starved.add(1);
            self.tx.full(self.rings.tx());
        }
        let is_quiet = self.rings.tx_owned() < BATCH;
        self.quiet_at = if is_quiet { self.rings.place() } else { isize::MAX };
        if count > 0 { Polled::Busy } else { Polled::Idle }
    }

    /// Does what [`RxBurst::event`] does.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.rx.event()
    }

    /// Does what [`RxBurst::arm`] does. Also returns false while many packets are still being sent, because a device
    /// does not signal that it has sent them and the RX queue needs their buffers.
    pub fn arm(&mut self) -> bool {
        let is_quiet = self.rings.place() == self.quiet_at && self.rings.rx_owned() > 0;
        self.rx.arm() && is_quiet && self.rx.received(&self.rings).is_none()
    }

    /// Does what [`RxBurst::disarm`] does.
    pub fn disarm(&mut self) {
        self.rx.disarm();
    }

    /// Sends the packets that were not sent yet, and returns both queues.
    pub fn untie(mut self, cache: &mut PoolCache) -> (R, T) {
        self.flush();
        if self.rings.waiting() > 0 {
            self.rx.offer(self.rings.offer());
        }
        let (rx, tx) = self.rings.untie(cache);
        (R::attach(rx, self.rx), T::attach(tx, self.tx))
    }
}
