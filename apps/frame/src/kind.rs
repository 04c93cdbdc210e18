//! Kinds of lanes, by what their packets can be.

use vireo_drivers::port::{RxBurst, TxBurst};
use vireo_drivers::tied::Polled;
use vireo_drivers::vhost;
use vireo_eal::dma::{Burst, Packet, PoolCache, frames, has_segments};

use crate::forward::{Lane, poll, send};
use crate::hook::{Hook, Uniform};

/// Kind of a lane. [`forward`](crate::forward) is compiled for each kind, so that none pays for another.
pub(crate) trait Kind {
    /// Whether frames may consist of several packets, and have partial checksums.
    const GENERAL: bool;

    /// Returns the number of frames in `packets`.
    fn count(packets: &[Packet]) -> usize;
}

/// Lanes between ports for single-buffer frames: each packet is a frame without a partial checksum.
#[derive(Debug)]
pub(crate) enum Plain {}

/// Lanes between vhost ports. As in [`Plain`] ones, each packet is a frame, but long frames are copied from one
/// frontend to the other and are never packets.
#[derive(Debug)]
pub(crate) enum Direct {}

/// Lanes between ports that are started for long frames or with offloads.
#[derive(Debug)]
pub(crate) enum General {}

/// Kind whose lanes may be between queues of the types `R` and `T`.
pub(crate) trait Between<R: RxBurst, T: TxBurst, H: Hook>: Kind + Sized {
    /// Polls a lane. See [`poll`].
    #[inline(always)]
    fn poll(lane: &mut Lane<R, T, H>, cache: &mut PoolCache, burst: &mut Burst) -> bool {
        poll::<Self, _, _, _>(lane, cache, burst)
    }

    /// Ends what a lane has postponed to later polls. Leaves `burst` empty.
    #[inline(always)]
    fn end(lane: &mut Lane<R, T, H>, cache: &mut PoolCache, burst: &mut Burst) {
        send::<Self, _, _, _>(lane, cache, burst);
    }
}

impl<R: RxBurst, T: TxBurst, H: Hook> Between<R, T, H> for Plain {}
impl<R: RxBurst, T: TxBurst, H: Hook> Between<R, T, H> for General {}

impl<H: Hook> Between<vhost::RxQueue, vhost::TxQueue, H> for Direct {
    #[inline(always)]
    fn poll(
        lane: &mut Lane<vhost::RxQueue, vhost::TxQueue, H>,
        cache: &mut PoolCache,
        burst: &mut Burst,
    ) -> bool {
        // Packets in `burst` arrived before those that wait.
        let addresses = match lane.hook.uniform().filter(|_| burst.is_empty()) {
            Some(Uniform::Addresses(addresses)) => Some(addresses),
            Some(Uniform::Unchanged) => None,
            None => return poll::<Self, _, _, _>(lane, cache, burst),
        };
        match lane.rx.pass(&mut lane.tx, addresses) {
            Polled::Idle => false,
            Polled::Busy => true,
            Polled::Odd => poll::<Self, _, _, _>(lane, cache, burst),
        }
    }

    fn end(lane: &mut Lane<vhost::RxQueue, vhost::TxQueue, H>, cache: &mut PoolCache, burst: &mut Burst) {
        lane.rx.wake(&mut lane.tx);
        send::<Self, _, _, _>(lane, cache, burst);
    }
}

impl Kind for Plain {
    const GENERAL: bool = false;

    #[inline(always)]
    fn count(packets: &[Packet]) -> usize {
        packets.len()
    }
}

impl Kind for Direct {
    const GENERAL: bool = false;

    #[inline(always)]
    fn count(packets: &[Packet]) -> usize {
        Plain::count(packets)
    }
}

impl Kind for General {
    const GENERAL: bool = true;

    fn count(packets: &[Packet]) -> usize {
        if has_segments(packets) { frames(packets).count() } else { packets.len() }
    }
}
