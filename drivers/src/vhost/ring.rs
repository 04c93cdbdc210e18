//! The device's side of a split virtqueue (virtio 1.2, 2.7) in a frontend's memory.
//!
//! Chains are used in the order in which they arrive, and all of a burst before the next burst begins. The
//! position of the next available chain is therefore also that of the next used element. Every word is read
//! once and checked.

mod chain;
mod marks;
mod pass;
mod receive;
mod send;

use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::Result;
use vireo_eal::dma::{PeerEvent, PeerMemory, PeerRing, RingEntry, dma_rmb, dma_wmb, full_mb};

use self::chain::{Checked, Table};
use crate::counters::QueueCounters;
use crate::virtio::{HEADER, need_event};
pub(super) use chain::Violation;
pub(super) use marks::Marks;

/// The driver wants no interrupt (`VIRTQ_AVAIL_F_NO_INTERRUPT`).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// The device wants no kick (`VIRTQ_USED_F_NO_NOTIFY`).
const USED_NO_NOTIFY: u16 = 1;

/// Number of descriptors in a cache line.
const LINE: usize = 4;

/// Distance that an index may advance before `avail_event` has to follow: a part of 2^16 that leaves room for
/// a ring.
const AVAIL_EVENT_STRIDE: u16 = 1 << 14;

/// Location of a ring, in the frontend's own addresses (`VHOST_USER_SET_VRING_ADDR`).
#[derive(Clone, Copy, Debug, Serialize, Deserialize, Schema)]
pub(super) struct Addresses {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// Features negotiated for a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingFeatures {
    /// `VIRTIO_F_EVENT_IDX`.
    pub(super) event_idx: bool,
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub(super) mergeable: bool,
}

/// A ring's counters, and the state of its messages. The thread that holds the ring's slot writes them.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) counters: Arc<QueueCounters>,
    /// Name of the port, for messages.
    pub(super) name: Arc<str>,
    /// Whether a buffer that is too short was reported.
    warned: bool,
}

impl Report {
    pub(super) fn new(name: &Arc<str>, counters: Arc<QueueCounters>) -> Self {
        Self { counters, name: Arc::clone(name), warned: false }
    }

    /// Logs once that the next buffer, of `room` bytes, is too short for a frame of `len` bytes. That buffer
    /// remains the next one.
    fn too_short(&mut self, room: usize, len: usize) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                "{}: frames are dropped: the frontend's next receive buffer has {room} bytes, a frame of {len} bytes \
                 needs {}, and without VIRTIO_NET_F_MRG_RXBUF a frame takes one buffer",
                self.name,
                HEADER + len
            );
        }
    }
}

/// The event words after the rings. A driver that did not accept `VIRTIO_F_EVENT_IDX` may use them for
/// something else.
#[derive(Debug)]
struct Events {
    used_event: PeerRing<u16>,
    avail_event: PeerRing<u16>,
}

/// A started ring.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<PeerMemory>,
    /// Descriptor table: address, then length, flags and next, as in [`chain::Descriptor`].
    desc: PeerRing<u64, 2>,
    avail_flags: PeerRing<u16>,
    avail_idx: PeerRing<u16>,
    avail: PeerRing<u16>,
    used_flags: PeerRing<u16>,
    used_idx: PeerRing<u16>,
    /// Used ring elements: `id`, then `len`.
    used: PeerRing<u32, 2>,
    events: Option<Events>,
    /// Position of the next chain, modulo 2^16.
    next: u16,
    /// Position up to which the frontend was woken for used chains, if it requested that.
    woken: u16,
    terms: RingFeatures,
    notifiers: Notifiers,
    marks: Option<Marks>,
}

/// How the two ends of a ring wake each other.
#[derive(Clone, Debug, Default)]
pub(super) struct Notifiers {
    /// Wakes the frontend; `None` while it polls.
    pub(super) call: Option<Arc<PeerEvent>>,
    /// Wakes this process; `None` if the frontend expects it to poll.
    pub(super) kick: Option<Arc<PeerEvent>>,
}

impl Ring {
    /// Creates the ring of `size` descriptors at `at`, which continues where it was left: used chains are
    /// done (vhost-user, "Ring states").
    pub(super) fn new(
        memory: &Arc<PeerMemory>,
        size: u16,
        at: Addresses,
        terms: RingFeatures,
        notifiers: Notifiers,
        marks: Option<Marks>,
    ) -> Result<Self> {
        let entries = usize::from(size);
        let used_idx: PeerRing<u16> = memory.ring(at.used.wrapping_add(2), 1)?;
        let events = || -> Result<Events> {
            let used_event = memory.ring(at.avail.wrapping_add(4 + 2 * u64::from(size)), 1)?;
            let avail_event = memory.ring(at.used.wrapping_add(4 + 8 * u64::from(size)), 1)?;
            Ok(Events { used_event, avail_event })
        };
        let next = used_idx.load::<0>(0);
        let ring = Self {
            memory: Arc::clone(memory),
            desc: memory.ring(at.desc, entries)?,
            avail_flags: memory.ring(at.avail, 1)?,
            avail_idx: memory.ring(at.avail.wrapping_add(2), 1)?,
            avail: memory.ring(at.avail.wrapping_add(4), entries)?,
            next,
            woken: next,
            used_flags: memory.ring(at.used, 1)?,
            used_idx,
            used: memory.ring(at.used.wrapping_add(4), entries)?,
            events: terms.event_idx.then(events).transpose()?,
            terms,
            notifiers,
            marks,
        };
        ring.used_flags.store::<0>(0, 0);
        ring.suppress_kicks();
        ring.mark_used(ring.next);
        Ok(ring)
    }

    /// Position of the next chain (`VHOST_USER_GET_VRING_BASE`).
    pub(super) fn next(&self) -> u16 {
        self.next
    }

    /// Lets the driver kick for the next chain, or for none. With EVENT_IDX it kicks when its index passes
    /// `avail_event`, and the flags stay 0 (2.7.10.1).
    fn want_kicks(&self, wanted: bool) {
        match &self.events {
            Some(events) => events.avail_event.store::<0>(0, self.next.wrapping_sub((!wanted).into())),
            None => self.used_flags.store::<0>(0, if wanted { 0 } else { USED_NO_NOTIFY }),
        }
    }

    pub(super) fn suppress_kicks(&self) {
        self.want_kicks(false);
    }

    /// Eventfd by which the frontend wakes this process, if it has one.
    pub(super) fn kick(&self) -> Option<&Arc<PeerEvent>> {
        self.notifiers.kick.as_ref()
    }

    /// Lets the driver kick for the next chain. Returns false if that is there already.
    pub(super) fn request_kick(&self) -> bool {
        self.want_kicks(true);
        // Without the barrier, this thread could miss a chain of a driver that does not see the request yet.
        full_mb();
        matches!(self.pending(), Ok(0))
    }

    fn table(&self) -> Table<'_> {
        Table { words: self.desc.view(), entries: self.desc.entries() }
    }

    /// Number of chains that the frontend has made available.
    #[inline(always)]
    pub(super) fn pending(&self) -> Checked<u16> {
        let pending = self.avail_idx.load::<0>(0).wrapping_sub(self.next);
        if usize::from(pending) > self.desc.entries() {
            return Err(Violation::AvailIndex);
        }
        dma_rmb();
        Ok(pending)
    }

    /// Prefetches the descriptors of the next `chains` chains together, instead of one cache line after the
    /// other, as far as they are in order.
    #[inline(always)]
    fn prefetch(&self, chains: usize) {
        let (desc, avail) = (self.desc.view(), self.avail.view());
        for i in (0..chains).step_by(LINE) {
            desc.entry(avail.load::<0>(usize::from(self.next) + i).into()).prefetch();
        }
    }

    /// Returns the chains from position `old` on to the frontend, and wakes the frontend if it requests that.
    #[inline(always)]
    fn publish(&mut self, old: u16, counters: &QueueCounters) {
        self.publish_silently(old);
        self.wake(counters);
    }

    /// Returns the chains from position `old` on to the frontend, which [`Ring::wake`] wakes later.
    #[inline(always)]
    fn publish_silently(&mut self, old: u16) {
        dma_wmb();
        self.used_idx.store::<0>(0, self.next);
        if (old ^ self.next) & !(AVAIL_EVENT_STRIDE - 1) != 0 {
            self.suppress_kicks();
        }
    }

    /// Wakes the frontend if it has requested that for a chain that was used since the last call of this.
    #[inline(always)]
    pub(super) fn wake(&mut self, counters: &QueueCounters) {
        let old = std::mem::replace(&mut self.woken, self.next);
        if let Some(call) = &self.notifiers.call {
            // Without the barrier, the device could read the driver's request before it writes the index, and
            // the driver could go to sleep in between.
            full_mb();
            let wanted = match &self.events {
                Some(events) => need_event(events.used_event.load::<0>(0), old, self.next),
                None => self.avail_flags.load::<0>(0) & AVAIL_NO_INTERRUPT == 0,
            };
            if wanted {
                counters.doorbells.add(1);
                call.signal();
            }
        }
    }

    /// Position after the last chain that the frontend has made available.
    pub(super) fn end(&self) -> Checked<u16> {
        self.pending().map(|pending| self.next.wrapping_add(pending))
    }

    /// Uses what the frontend transmits through a disabled ring, without reading it: the chains before `end`,
    /// which [`Ring::end`] returned.
    pub(super) fn discard(&mut self, end: u16, counters: &QueueCounters) {
        let old = self.next;
        // Counted before the frontend sees that the chains are used.
        counters.errors.add(end.wrapping_sub(old).into());
        while self.next != end {
            let position = usize::from(self.next);
            write_used(self.used.view().entry(position), self.avail.load::<0>(position), 0);
            self.next = self.next.wrapping_add(1);
        }
        if self.next != old {
            self.publish(old, counters);
            self.mark_used(old);
        }
    }
}

/// Writes a used element, unless it is the same as in the previous round: then its cache line stays shared
/// with the frontend.
#[inline(always)]
fn write_used(element: RingEntry<'_, u32, 2>, head: u16, len: usize) {
    let (id, len) = (u32::from(head), len as u32);
    if element.load::<0>() != id {
        element.store::<0>(id);
    }
    if element.load::<1>() != len {
        element.store::<1>(len);
    }
}
