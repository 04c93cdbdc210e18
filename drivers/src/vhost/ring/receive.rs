//! Receiving: frames that the frontend transmits.

use vireo_eal::dma::{Burst, DATA_ROOM, Packet, PeerSlice, PeerView, PoolCache};

use super::chain::{Budget, Checked, Table, Violation};
use super::{Ring, write_used};
use crate::counters::QueueCounters;
use crate::virtio::{DESC_NEXT, HEADER};

/// Minimum length of a frame that is forwarded: two addresses, a length and an LLC header (IEEE 802.2). The
/// 82574L, which may have to send the frame, transmits none that is shorter (Linux,
/// drivers/net/ethernet/intel/e1000e/netdev.c).
const SHORTEST: usize = 17;

/// Returns the frame in the chain that begins at `head`, if its only descriptor holds header and frame. The header is
/// ignored because no offload was offered.
#[inline(always)]
pub(super) fn whole_frame<'a>(table: Table<'_>, head: u16, view: &mut PeerView<'a>) -> Option<PeerSlice<'a>> {
    let descriptor = table.get(head)?;
    let len = descriptor.len.wrapping_sub(HEADER);
    if descriptor.flags != 0 || len.wrapping_sub(SHORTEST) > DATA_ROOM - SHORTEST {
        return None;
    }
    Some(view.at(descriptor.address, descriptor.len)?.split_at(HEADER).1)
}

impl Ring {
    /// Receives the frames that the frontend transmits.
    #[inline(always)]
    pub(in crate::vhost) fn receive(
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
        let taken = cache.receive_copies(wanted, burst, |i| {
            let position = usize::from(old) + i;
            let head = avail.load::<0>(position);
            let frame = whole_frame(table, head, &mut view)?;
            write_used(used.entry(position), head, 0);
            bytes += frame.len();
            Some(frame)
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

    /// Takes `wanted` chains of any shape, as long as buffers are available.
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
                Err(violation) => {
                    cache.free(packet);
                    return Err(violation);
                }
            }
            write_used(self.used.view().entry(self.next.into()), head, 0);
            self.next = self.next.wrapping_add(1);
        }
        Ok(())
    }

    /// Copies the frame in the chain that begins at `head` into `packet`. Returns false if the frame is too
    /// long or too short.
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
            let descriptor = table.get(index).ok_or(Violation::Index)?;
            if descriptor.flags & !DESC_NEXT != 0 {
                return Err(Violation::Flags);
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
                return if header > 0 { Err(Violation::Header) } else { Ok(packet.len() >= SHORTEST) };
            }
            index = descriptor.next;
        }
    }
}
