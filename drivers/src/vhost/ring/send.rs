//! Sending: frames that the frontend receives.

use vireo_eal::dma::{Burst, Packet, PeerSlice, PeerView, PoolCache};

use super::chain::{Budget, Checked, Table, Violation};
use super::{Report, Ring, write_used};
use crate::counters::QueueCounters;
use crate::virtio::{DESC_NEXT, DESC_WRITE, HEADER};

/// Outcome for a packet that needs more than one descriptor.
enum Spread {
    /// The packet took this number of chains.
    Taken(u16),
    /// The chains that the packet needs are not available yet.
    Wait,
    /// The packet does not fit into a chain of this many bytes, and may not take another one.
    TooLong(usize),
}

/// Returns the memory of the chain that begins at `head`, if its only descriptor has room for `need` bytes.
#[inline(always)]
pub(super) fn whole_space<'a>(
    table: Table<'_>,
    head: u16,
    need: usize,
    view: &mut PeerView<'a>,
) -> Option<PeerSlice<'a>> {
    let descriptor = table.get(head)?;
    if descriptor.flags != DESC_WRITE || descriptor.len < need {
        return None;
    }
    view.at(descriptor.address, descriptor.len)
}

impl Ring {
    /// Hands packets from the front of `burst` to the frontend.
    #[inline(always)]
    pub(in crate::vhost) fn send(
        &mut self,
        cache: &mut PoolCache,
        burst: &mut Burst,
        report: &mut Report,
    ) -> Checked<()> {
        self.send_and(cache, burst, report, |_| {})
    }

    /// Sends as `Ring::send` does. Calls `written` when packets are written but not yet handed to the
    /// frontend.
    #[inline(always)]
    pub(super) fn send_and(
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

    /// Sends packets as long as each fits into the only descriptor of its chain.
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
            let space = whole_space(table, head, HEADER + len, &mut view)?;
            write_used(used.entry(start + i), head, HEADER + len);
            bytes += len;
            Some(space)
        });
        self.next = self.next.wrapping_add(sent as u16);
        counters.packets.add(sent as u64);
        counters.bytes.add(bytes as u64);
        sent as u16
    }

    /// Sends through up to `left` chains of any shape; drops packets that fit into none.
    #[cold]
    #[inline(never)]
    fn send_any(
        &mut self,
        mut left: u16,
        cache: &mut PoolCache,
        burst: &mut Burst,
        report: &mut Report,
    ) -> Checked<()> {
        // A chain is read twice if it is too short for one packet and then long enough for another.
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

    /// Appends up to `need` bytes of the chain that begins at `head` to `room`; returns the number of
    /// appended bytes.
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
            let descriptor = table.get(index).ok_or(Violation::Index)?;
            if descriptor.flags & !DESC_NEXT != DESC_WRITE {
                return Err(Violation::Flags);
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

/// Returns `struct virtio_net_hdr` for a frame in `buffers` buffers, without offloads (5.1.6).
#[inline(always)]
pub(super) fn header(buffers: u16) -> [u8; HEADER] {
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
