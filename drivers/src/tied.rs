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

use vireo_eal::dma::{DescRing, MAX_BURST, PoolCache, SendWord, TiedPacket, TiedRings};

use crate::counters::QueueCounters;
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

    /// Moves the next packet to the TX ring, if it has at least `shortest` bytes and is the only one that was
    /// received, and calls `edit` with it. Returns its length in bytes, and whether it ended a run of the
    /// rings.
    fn forward_one<T: TiedTx>(
        &mut self,
        received: Self::Received,
        rings: &mut TiedRings,
        tx: &T,
        shortest: u8,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> Option<(usize, bool)>;

    /// Moves received packets, up to the first that is not as expected, and calls `edit` with each of them.
    /// Returns the number of packets and the sum of their lengths in bytes.
    fn forward_many<T: TiedTx>(
        &mut self,
        received: Self::Received,
        rings: &mut TiedRings,
        tx: &T,
        shortest: u8,
        edit: impl FnMut(&mut TiedPacket<'_>),
    ) -> (usize, u64);

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
    fn shortest(&self) -> u8 {
        1
    }

    /// Returns a function that prepares a packet to be sent.
    fn header(&self) -> impl Fn(&mut TiedPacket<'_>) + Copy + use<Self> {
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

/// Returns a function that writes `addresses` to the front of a packet, in two stores.
#[inline(always)]
fn write(addresses: [u8; 12]) -> impl Fn(&mut TiedPacket<'_>) + Copy {
    let [a, b, c, d, e, f, g, h, last @ ..] = addresses;
    let first = [a, b, c, d, e, f, g, h];
    move |packet| packet.write(first, last)
}

/// An RX queue and a TX queue that are tied.
#[derive(Debug)]
pub struct TiedLane<R: TieRx, T: TieTx> {
    rings: TiedRings,
    rx: R::Tied,
    tx: T::Tied,
    /// Bytes of the packets that were not sent yet.
    bytes: u64,
    /// Number of packets left in the run at which a poll without packets has nothing else to do, if any.
    quiet_at: usize,
    /// See [`TiedTx::shortest`].
    shortest: u8,
    /// Position in the TX ring up to which descriptors were announced, and packets counted.
    announced: usize,
    /// Head of the RX ring when it was last announced.
    offered: usize,
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
        let ((rx_ring, mut rx), (tx_ring, tx)) = (rx.detach(), tx.detach());
        let rings = TiedRings::new(rx_ring, tx_ring, R::Tied::FRESH, T::Tied::SEND.front, cache);
        let ring = rings.as_ref().map_or_else(|rings| &rings.0, TiedRings::rx);
        let offered = ring.head();
        if offered != before {
            rx.offer(ring);
        }
        match rings {
            Ok(rings) => {
                rx.counters().tied.add(1);
                let (announced, shortest) = (rings.tx().head(), tx.shortest());
                let quiet_at = usize::MAX;
                Ok(Self { rings, rx, tx, bytes: 0, quiet_at, shortest, announced, offered, stride })
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
            return if self.rings.left() == self.quiet_at { Polled::Idle } else { self.flush() };
        };
        let Self { rings, rx, tx, shortest, .. } = self;
        let Some(bytes) = addresses() else { return self.forward_unchanged(received) };
        let Some((len, is_last)) = rx.forward_one(received, rings, tx, *shortest, write(bytes)) else {
            return self.forward_many(received, addresses);
        };
        self.bytes += len as u64;
        if is_last { self.flush() } else { Polled::Busy }
    }

    // Like the next function, kept out of the polling loop, where too few CPU registers are left for its loop.
    #[inline(never)]
    fn forward_unchanged(&mut self, received: Received<R>) -> Polled {
        let Self { rings, rx, tx, shortest, .. } = self;
        match rx.forward_one(received, rings, tx, *shortest, |_| ()) {
            Some((len, is_last)) => self.moved(1, len as u64, is_last),
            None => {
                let (count, bytes) = rx.forward_many(received, rings, tx, *shortest, |_| ());
                let is_last = rings.is_at_start();
                self.moved(count, bytes, is_last)
            }
        }
    }

    #[inline(never)]
    fn forward_many(&mut self, received: Received<R>, addresses: impl Fn() -> Option<[u8; 12]>) -> Polled {
        let Self { rings, rx, tx, shortest, .. } = self;
        let write = write(addresses().unwrap_or_default());
        let (count, bytes) = rx.forward_many(received, rings, tx, *shortest, write);
        let is_last = rings.is_at_start();
        self.moved(count, bytes, is_last)
    }

    /// Accounts for packets that were moved; `is_last` if they ended a run.
    #[inline(always)]
    fn moved(&mut self, count: usize, bytes: u64, is_last: bool) -> Polled {
        self.bytes += bytes;
        match (count, is_last) {
            (0, _) => Polled::Odd,
            (_, true) => self.flush(),
            (_, false) => Polled::Busy,
        }
    }

    /// Sends and counts the packets that were not sent yet, and returns buffers of sent packets to the RX queue.
    #[inline(never)]
    fn flush(&mut self) -> Polled {
        self.rings.sync();
        let head = self.rings.tx().head();
        let count = head.wrapping_sub(self.announced);
        if count > 0 {
            for counters in [self.rx.counters(), self.tx.counters()] {
                counters.packets.add(count as u64);
                counters.bytes.add(self.bytes);
            }
            (self.announced, self.bytes) = (head, 0);
            self.tx.announce(&mut self.rings);
        }
        let Some(sent) = self.tx.completed(self.rings.tx()) else { return Polled::Odd };
        let fresh = R::Tied::OVERWRITES_ADDRESSES.then_some(R::Tied::FRESH);
        let send_front = T::Tied::OVERWRITES_ADDRESSES.then_some(T::Tied::SEND.front);
        self.rings.give_back(sent, fresh, send_front);
        let ring = self.rings.rx();
        let (owned, waiting) = (ring.owned(), ring.head().wrapping_sub(self.offered));
        // In strides, and before the device has fewer than wait here.
        if waiting >= self.stride || 2 * waiting > owned {
            self.offered = ring.head();
            self.rx.offer(ring);
        }
        if owned == 0 {
            self.rx.counters().starved.add(1);
            self.tx.full(self.rings.tx());
        }
        let is_quiet = self.rings.tx().owned() < BATCH;
        self.quiet_at = if is_quiet { self.rings.left() } else { usize::MAX };
        if count > 0 { Polled::Busy } else { Polled::Idle }
    }

    /// Sends the packets that were not sent yet, and returns both queues.
    pub fn untie(mut self, cache: &mut PoolCache) -> (R, T) {
        self.flush();
        if self.rings.rx().head() != self.offered {
            self.rx.offer(self.rings.rx());
        }
        let (rx, tx) = self.rings.untie(cache);
        (R::attach(rx, self.rx), T::attach(tx, self.tx))
    }
}
