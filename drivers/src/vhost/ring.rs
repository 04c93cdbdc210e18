//! The device's side of a split virtqueue (virtio 1.2, 2.7) in a frontend's memory.
//!
//! Chains are used up in the order in which they come, all of a burst before the next begins: the position of
//! the next available chain is also that of the next used element. Every word is read once, and checked.

use std::sync::Arc;

use vireo_eal::Result;
use vireo_eal::dma::{
    Burst, DATA_ROOM, Packet, PeerEvent, PeerLog, PeerMemory, PeerRing, PeerSlice, PeerView, PoolCache,
    RingEntry, RingView, dma_rmb, dma_wmb, full_mb,
};

use crate::counters::QueueCounters;
use crate::virtio::{DESC_NEXT, DESC_WRITE, HEADER, need_event};

/// The driver wants no interrupt (`VIRTQ_AVAIL_F_NO_INTERRUPT`).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// The device wants no kick (`VIRTQ_USED_F_NO_NOTIFY`).
const USED_NO_NOTIFY: u16 = 1;

/// Shortest frame that is forwarded: two addresses, a length and an LLC header (IEEE 802.2). The 82574L, to which it may go,
/// sends none that is shorter (Linux, drivers/net/ethernet/intel/e1000e/netdev.c).
const SHORTEST: usize = 17;

/// Descriptors in a cache line.
const LINE: usize = 4;

/// How far an index may run before `avail_event` has to follow: a part of 2^16 that leaves room for a ring.
const AVAIL_EVENT_STRIDE: u16 = 1 << 14;

/// What a frontend did that breaks the rules of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lie {
    /// `avail.idx` counts more chains than there are descriptors.
    AvailIndex,
    /// A descriptor's index is beyond the table.
    Index,
    /// A descriptor is of the wrong direction, or indirect, which was not offered.
    Flags,
    /// A descriptor's memory is not within a memory region.
    Address,
    /// A chain does not end, or chains share descriptors.
    Loop,
    /// Buffers cross from one memory region into the next more often than there are descriptors.
    Borders,
    /// A chain is too short for the header.
    Header,
}

impl Lie {
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::AvailIndex => "avail.idx runs ahead by more than the ring",
            Self::Index => "a descriptor is beyond the table",
            Self::Flags => "a descriptor has flags that do not fit",
            Self::Address => "a descriptor's memory is outside of the memory regions",
            Self::Loop => "a chain of descriptors does not end, or shares some with another",
            Self::Borders => "buffers are scattered over too many memory regions",
            Self::Header => "a chain is too short for the header",
        }
    }
}

type Checked<T> = std::result::Result<T, Lie>;

/// Where a ring is, in the frontend's own addresses (`VHOST_USER_SET_VRING_ADDR`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// What was agreed on for a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// `VIRTIO_F_EVENT_IDX`.
    pub(super) event_idx: bool,
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub(super) mergeable: bool,
}

/// Where a ring marks what it writes, of a guest that migrates.
#[derive(Debug)]
pub(super) struct Marks {
    pub(super) log: Arc<PeerLog>,
    /// Guest address of the used ring, if that is marked too.
    pub(super) used: Option<u64>,
}

/// What is counted and said of a ring, by whoever holds its slot.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) counters: Arc<QueueCounters>,
    /// Of the port, for messages.
    pub(super) name: Arc<str>,
    /// A buffer that is too short was named.
    warned: bool,
}

impl Report {
    pub(super) fn new(name: &Arc<str>, counters: Arc<QueueCounters>) -> Self {
        Self { counters, name: Arc::clone(name), warned: false }
    }

    /// Says once that the next buffer, of `room` bytes, is too short for a frame of `len`: it stays the next one.
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

/// What became of a packet that needs more than one descriptor.
enum Spread {
    /// It took so many chains.
    Taken(u16),
    /// The chains that it needs are not there yet.
    Wait,
    /// It does not fit into a chain of so many bytes, and may not take another.
    TooLong(usize),
}

/// What may still be read in a burst. Chains that end and share nothing are as long as the table together; more is a
/// lie, which would keep the lcore for a table's length by each chain.
struct Budget {
    descriptors: usize,
    /// Borders of memory regions inside of buffers. One for each descriptor is enough: regions are larger than buffers.
    borders: usize,
}

impl Budget {
    fn new(descriptors: usize) -> Self {
        Self { descriptors, borders: descriptors }
    }

    fn spend(&mut self) -> Checked<()> {
        self.descriptors = self.descriptors.checked_sub(1).ok_or(Lie::Loop)?;
        Ok(())
    }

    /// Calls `each` for the parts of a descriptor's memory, which are in one region each.
    fn parts<'a>(
        &mut self,
        descriptor: Descriptor,
        view: &mut PeerView<'a>,
        mut each: impl FnMut(PeerSlice<'a>),
    ) -> Checked<()> {
        let mut lie = Lie::Address;
        let mut borders = Some(self.borders + 1);
        let within = view.parts(descriptor.address, descriptor.len, |part| {
            borders = borders.and_then(|borders| borders.checked_sub(1));
            if borders.is_none() {
                lie = Lie::Borders;
            }
            borders.map(|_| each(part))
        });
        self.borders = borders.unwrap_or(0);
        within.ok_or(lie)
    }
}

/// The words behind the rings, which a driver that did not accept `VIRTIO_F_EVENT_IDX` may use for something else.
#[derive(Debug)]
struct Events {
    used_event: PeerRing<u16>,
    avail_event: PeerRing<u16>,
}

/// A started ring.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<PeerMemory>,
    /// Address; then length, flags and next, as in [`Descriptor`].
    desc: PeerRing<u64, 2>,
    avail_flags: PeerRing<u16>,
    avail_idx: PeerRing<u16>,
    avail: PeerRing<u16>,
    used_idx: PeerRing<u16>,
    /// Elements of `id` and `len`.
    used: PeerRing<u32, 2>,
    events: Option<Events>,
    /// Position of the next chain, modulo 2^16.
    next: u16,
    terms: Terms,
    /// None while the frontend polls.
    call: Option<Arc<PeerEvent>>,
    marks: Option<Marks>,
}

/// A descriptor, read at once.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: usize,
    flags: u16,
    next: u16,
}

/// The descriptor table, checked.
#[derive(Clone, Copy)]
struct Table<'a> {
    words: RingView<'a, u64, 2>,
    entries: usize,
}

impl Table<'_> {
    #[inline(always)]
    fn get(self, index: u16) -> Option<Descriptor> {
        if usize::from(index) >= self.entries {
            return None;
        }
        let entry = self.words.entry(index.into());
        let (address, shape) = (entry.load::<0>(), entry.load::<1>());
        let (len, flags, next) = (shape as u32 as usize, (shape >> 32) as u16, (shape >> 48) as u16);
        Some(Descriptor { address, len, flags, next })
    }
}

impl Ring {
    /// The ring of `size` descriptors at `at`, from where it was left: what is used is done (vhost-user, "Ring
    /// states").
    pub(super) fn new(
        memory: &Arc<PeerMemory>,
        size: u16,
        at: Addresses,
        terms: Terms,
        call: Option<Arc<PeerEvent>>,
        marks: Option<Marks>,
    ) -> Result<Self> {
        let entries = usize::from(size);
        let used_idx: PeerRing<u16> = memory.ring(at.used.wrapping_add(2), 1)?;
        let events = || -> Result<Events> {
            let used_event = memory.ring(at.avail.wrapping_add(4 + 2 * u64::from(size)), 1)?;
            let avail_event = memory.ring(at.used.wrapping_add(4 + 8 * u64::from(size)), 1)?;
            Ok(Events { used_event, avail_event })
        };
        let ring = Self {
            memory: Arc::clone(memory),
            desc: memory.ring(at.desc, entries)?,
            avail_flags: memory.ring(at.avail, 1)?,
            avail_idx: memory.ring(at.avail.wrapping_add(2), 1)?,
            avail: memory.ring(at.avail.wrapping_add(4), entries)?,
            next: used_idx.load::<0>(0),
            used_idx,
            used: memory.ring(at.used.wrapping_add(4), entries)?,
            events: terms.event_idx.then(events).transpose()?,
            terms,
            call,
            marks,
        };
        // With EVENT_IDX the flags stay 0 (2.7.10.1) and `avail_event` does the same.
        let flags: PeerRing<u16> = memory.ring(at.used, 1)?;
        flags.store::<0>(0, if terms.event_idx { 0 } else { USED_NO_NOTIFY });
        ring.ask_for_no_kick();
        ring.mark_used(ring.next);
        Ok(ring)
    }

    /// Position of the next chain (`VHOST_USER_GET_VRING_BASE`).
    pub(super) fn next(&self) -> u16 {
        self.next
    }

    /// The driver kicks when its index passes `avail_event`, which is behind it.
    fn ask_for_no_kick(&self) {
        if let Some(events) = &self.events {
            events.avail_event.store::<0>(0, self.next.wrapping_sub(1));
        }
    }

    fn table(&self) -> Table<'_> {
        Table { words: self.desc.view(), entries: self.desc.entries() }
    }

    /// Chains that the frontend has made available.
    #[inline(always)]
    fn pending(&self) -> Checked<u16> {
        let pending = self.avail_idx.load::<0>(0).wrapping_sub(self.next);
        if usize::from(pending) > self.desc.entries() {
            return Err(Lie::AvailIndex);
        }
        dma_rmb();
        Ok(pending)
    }

    /// Asks for the descriptors of the next `chains` chains at once, not one cache line after the other, as far as
    /// they are in order.
    #[inline(always)]
    fn prefetch(&self, chains: usize) {
        let (desc, avail) = (self.desc.view(), self.avail.view());
        for i in (0..chains).step_by(LINE) {
            desc.entry(avail.load::<0>(usize::from(self.next) + i).into()).prefetch();
        }
    }

    /// Gives the frontend its chains from `old` on back, and wakes it if it wants that.
    #[inline(always)]
    fn publish(&mut self, old: u16, counters: &QueueCounters) {
        dma_wmb();
        self.used_idx.store::<0>(0, self.next);
        if (old ^ self.next) & !(AVAIL_EVENT_STRIDE - 1) != 0 {
            self.ask_for_no_kick();
        }
        if let Some(call) = &self.call {
            // Without it the driver could go to sleep between our read of its wish and our write of the index.
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

    /// Takes what the frontend sends.
    #[inline(always)]
    pub(super) fn receive(
        &mut self,
        cache: &mut PoolCache,
        burst: &mut Burst,
        counters: &QueueCounters,
    ) -> Checked<()> {
        let pending = self.pending()?;
        if pending == 0 {
            return Ok(());
        }
        let old = self.next;
        let wanted = usize::from(pending).min(burst.remaining_capacity());
        let (table, avail, used) = (self.table(), self.avail.view(), self.used.view());
        let mut view = self.memory.view();
        let mut bytes = 0;
        self.prefetch(wanted);
        // One descriptor for header and frame. Nothing in the header matters where no offload was offered.
        let taken = cache.receive_copies(wanted, burst, |i| {
            let position = usize::from(old) + i;
            let head = avail.load::<0>(position);
            let descriptor = table.get(head)?;
            let len = descriptor.len.wrapping_sub(HEADER);
            if descriptor.flags != 0 || len.wrapping_sub(SHORTEST) > DATA_ROOM - SHORTEST {
                return None;
            }
            let (_, slice) = view.at(descriptor.address, descriptor.len)?.split_at(HEADER);
            write_used(used.entry(position), head, 0);
            bytes += len;
            Some(slice)
        });
        self.next = old.wrapping_add(taken as u16);
        counters.packets.add(taken as u64);
        counters.bytes.add(bytes as u64);
        let received =
            if taken == wanted { Ok(()) } else { self.receive_any(wanted - taken, cache, burst, counters) };
        if self.next != old {
            self.publish(old, counters);
        }
        received
    }

    /// Takes `wanted` chains of any shape, as long as there are buffers.
    #[cold]
    #[inline(never)]
    fn receive_any(
        &mut self,
        wanted: usize,
        cache: &mut PoolCache,
        burst: &mut Burst,
        counters: &QueueCounters,
    ) -> Checked<()> {
        let mut budget = Budget::new(self.desc.entries());
        for _ in 0..wanted {
            let Some(mut packet) = cache.allocate() else {
                counters.no_buffer.add(1);
                return Ok(());
            };
            let head = self.avail.load::<0>(self.next.into());
            match self.gather(head, &mut packet, cache, &mut budget) {
                Ok(true) => {
                    counters.packets.add(1);
                    counters.bytes.add(packet.len() as u64);
                    burst.push(packet);
                }
                Ok(false) => {
                    counters.errors.add(1);
                    cache.free(packet);
                }
                Err(lie) => {
                    cache.free(packet);
                    return Err(lie);
                }
            }
            write_used(self.used.view().entry(self.next.into()), head, 0);
            self.next = self.next.wrapping_add(1);
        }
        Ok(())
    }

    /// Copies the frame in the chain that begins at `head` into `packet`; false when it is too long or too short for a
    /// frame.
    fn gather(
        &self,
        head: u16,
        packet: &mut Packet,
        cache: &mut PoolCache,
        budget: &mut Budget,
    ) -> Checked<bool> {
        let (table, mut view) = (self.table(), self.memory.view());
        let (mut index, mut header) = (head, HEADER);
        loop {
            budget.spend()?;
            let descriptor = table.get(index).ok_or(Lie::Index)?;
            if descriptor.flags & !DESC_NEXT != 0 {
                return Err(Lie::Flags);
            }
            let mut fits = true;
            budget.parts(descriptor, &mut view, |data| {
                let (skipped, data) = data.split_at(header);
                header -= skipped.len();
                fits = fits && cache.append_from_peer(packet, data).is_some();
            })?;
            if !fits {
                return Ok(false);
            }
            if descriptor.flags & DESC_NEXT == 0 {
                return if header > 0 { Err(Lie::Header) } else { Ok(packet.len() >= SHORTEST) };
            }
            index = descriptor.next;
        }
    }

    /// Position behind the last chain that the frontend has made available.
    pub(super) fn end(&self) -> Checked<u16> {
        self.pending().map(|pending| self.next.wrapping_add(pending))
    }

    /// Uses what the frontend sends by a disabled ring, without a look at it: chains before `end`, as [`Ring::end`] gave it.
    pub(super) fn discard(&mut self, end: u16, counters: &QueueCounters) {
        let old = self.next;
        // Counted when the frontend sees that they are used.
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

    /// As [`Ring::receive`], and marks what it wrote.
    #[cold]
    #[inline(never)]
    pub(super) fn receive_logged(
        &mut self,
        cache: &mut PoolCache,
        burst: &mut Burst,
        counters: &QueueCounters,
    ) -> Checked<()> {
        let old = self.next;
        let received = self.receive(cache, burst, counters);
        self.mark_used(old);
        received
    }

    /// As [`Ring::send`], and marks what it wrote.
    #[cold]
    #[inline(never)]
    pub(super) fn send_logged(
        &mut self,
        cache: &mut PoolCache,
        burst: &mut Burst,
        report: &mut Report,
    ) -> Checked<()> {
        let old = self.next;
        // Before the chains are the guest's again, which then uses the descriptors for others.
        let sent = self.send_and(cache, burst, report, |ring| ring.mark_buffers(old));
        self.mark_used(old);
        sent
    }

    /// Marks the used elements from position `old` on, and what is written with them.
    fn mark_used(&self, old: u16) {
        let Some(Marks { log, used: Some(used) }) = &self.marks else { return };
        let at = |offset: u64| used.wrapping_add(offset);
        let entries = self.desc.entries() as u64;
        // Flags and index; behind the elements `avail_event`.
        log.mark(at(0), 4);
        if self.events.is_some() {
            log.mark(at(4 + 8 * entries), 2);
        }
        for i in 0..self.next.wrapping_sub(old) {
            log.mark(at(4 + 8 * (u64::from(old.wrapping_add(i)) % entries)), 8);
        }
    }

    /// Marks what was written to the chains from position `old` on.
    fn mark_buffers(&self, old: u16) {
        let Some(Marks { log, .. }) = &self.marks else { return };
        let (table, mut budget) = (self.table(), Budget::new(2 * self.desc.entries()));
        for i in 0..self.next.wrapping_sub(old) {
            let element = self.used.view().entry(old.wrapping_add(i).into());
            let (mut index, mut written) = (element.load::<0>() as u16, element.load::<1>() as usize);
            while written > 0
                && budget.spend().is_ok()
                && let Some(descriptor) = table.get(index)
            {
                let part = written.min(descriptor.len);
                log.mark(descriptor.address, part);
                written -= part;
                index = descriptor.next;
            }
        }
    }

    /// Gives packets from the front of `burst` to the frontend.
    #[inline(always)]
    pub(super) fn send(
        &mut self,
        cache: &mut PoolCache,
        burst: &mut Burst,
        report: &mut Report,
    ) -> Checked<()> {
        self.send_and(cache, burst, report, |_| {})
    }

    /// Calls `written` when packets were written and the frontend does not have them yet.
    #[inline(always)]
    fn send_and(
        &mut self,
        cache: &mut PoolCache,
        burst: &mut Burst,
        report: &mut Report,
        written: impl FnOnce(&Self),
    ) -> Checked<()> {
        let mut left = self.pending()?;
        if left == 0 {
            return Ok(());
        }
        let old = self.next;
        left -= self.send_fast(left, cache, burst, &report.counters);
        let sent = if burst.is_empty() { Ok(()) } else { self.send_any(left, cache, burst, report) };
        if self.next != old {
            written(self);
            self.publish(old, &report.counters);
        }
        sent
    }

    /// Sends while each packet fits into the first descriptor of a chain that has only one.
    #[inline(always)]
    fn send_fast(
        &mut self,
        left: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
        counters: &QueueCounters,
    ) -> u16 {
        let (table, avail, used) = (self.table(), self.avail.view(), self.used.view());
        let mut view = self.memory.view();
        let start = usize::from(self.next);
        let mut bytes = 0;
        self.prefetch(burst.len().min(left.into()));
        let sent = cache.send_copies(left.into(), burst, header(1), |i, len| {
            let head = avail.load::<0>(start + i);
            let descriptor = table.get(head)?;
            let need = HEADER + len;
            if descriptor.flags != DESC_WRITE || descriptor.len < need {
                return None;
            }
            let slice = view.at(descriptor.address, descriptor.len)?;
            write_used(used.entry(start + i), head, need);
            bytes += len;
            Some(slice)
        });
        self.next = self.next.wrapping_add(sent as u16);
        counters.packets.add(sent as u64);
        counters.bytes.add(bytes as u64);
        sent as u16
    }

    /// Sends by up to `left` chains of any shape; drops what fits into none.
    #[cold]
    #[inline(never)]
    fn send_any(
        &mut self,
        mut left: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
        report: &mut Report,
    ) -> Checked<()> {
        // A chain is read twice when it is too short for one packet and then long enough for another.
        let mut budget = Budget::new(2 * self.desc.entries());
        while left > 0
            && let Some(packet) = burst.first()
        {
            match self.spread(left, packet, cache, &mut budget)? {
                Spread::Wait => break,
                Spread::TooLong(room) => {
                    report.too_short(room, packet.len());
                    while burst.first().is_some_and(|packet| HEADER + packet.len() > room) {
                        report.counters.errors.add(1);
                        cache.free(burst.remove(0));
                    }
                }
                Spread::Taken(chains) => {
                    self.next = self.next.wrapping_add(chains);
                    left -= chains;
                    report.counters.packets.add(1);
                    report.counters.bytes.add(packet.len() as u64);
                    cache.free(burst.remove(0));
                }
            }
            left -= self.send_fast(left, cache, burst, &report.counters);
        }
        Ok(())
    }

    /// Writes `packet` to one chain or, with `VIRTIO_NET_F_MRG_RXBUF`, to as many as it needs (5.1.6.4).
    fn spread(&self, left: u16, packet: &Packet, cache: &PoolCache, budget: &mut Budget) -> Checked<Spread> {
        let mut view = self.memory.view();
        let need = HEADER + packet.len();
        let (mut room, mut chains) = (Vec::new(), 0);
        let mut found = 0;
        while found < need {
            if chains == 1 && !self.terms.mergeable {
                return Ok(Spread::TooLong(found));
            }
            if chains == left {
                return Ok(Spread::Wait);
            }
            let position = usize::from(self.next.wrapping_add(chains));
            let head = self.avail.load::<0>(position);
            let len = self.writable_chain(head, need - found, &mut view, &mut room, budget)?;
            write_used(self.used.view().entry(position), head, len);
            found += len;
            chains += 1;
        }
        fill(&room, &header(chains), packet, cache);
        Ok(Spread::Taken(chains))
    }

    /// Appends up to `need` bytes of the chain that begins at `head` to `room`; gives their number.
    fn writable_chain<'a>(
        &self,
        head: u16,
        need: usize,
        view: &mut PeerView<'a>,
        room: &mut Vec<PeerSlice<'a>>,
        budget: &mut Budget,
    ) -> Checked<usize> {
        let table = self.table();
        let (mut index, mut found) = (head, 0);
        loop {
            budget.spend()?;
            let descriptor = table.get(index).ok_or(Lie::Index)?;
            if descriptor.flags & !DESC_NEXT != DESC_WRITE {
                return Err(Lie::Flags);
            }
            budget.parts(descriptor, view, |part| {
                let (part, _) = part.split_at(need - found);
                found += part.len();
                room.extend(Some(part).filter(|part| !part.is_empty()));
            })?;
            if descriptor.flags & DESC_NEXT == 0 || found == need {
                return Ok(found);
            }
            index = descriptor.next;
        }
    }
}

/// Writes a used element, unless it is the same as in the round before: then its cache line stays the frontend's too.
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

/// `struct virtio_net_hdr` of a frame in `buffers` buffers, without offloads (5.1.6).
#[inline(always)]
fn header(buffers: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[HEADER - 2..].copy_from_slice(&buffers.to_le_bytes());
    header
}

/// Writes `header` and then `packet` to the slices of `room`, which have space for both.
fn fill(room: &[PeerSlice<'_>], header: &[u8; HEADER], packet: &Packet, cache: &PoolCache) {
    let (mut header, mut sent) = (&header[..], 0);
    for slice in room {
        let (front, data) = slice.split_at(header.len());
        front.write(header);
        header = &header[front.len()..];
        sent += cache.copy_to_peer(packet, sent, data);
    }
}
