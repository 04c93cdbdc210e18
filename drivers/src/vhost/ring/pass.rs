//! Passing: frames that one frontend transmits and another receives, in one copy.

use vireo_eal::dma::pass_copies;

use super::receive::whole_frame;
use super::send::{header, whole_space};
use super::{Ring, write_used};
use crate::counters::QueueCounters;
use crate::virtio::HEADER;

/// Minimum length in bytes of a frame that passes. Shorter ones are faster with two copies (docs/performance.md, "One
/// copy between vhost ports").
const LONG: usize = 1024;

impl Ring {
    /// Returns whether the next frame may be long enough to pass.
    #[inline(always)]
    pub(in crate::vhost) fn begins_with_long(&self) -> bool {
        let next = self.table().get(self.avail.load::<0>(self.next.into()));
        next.is_some_and(|descriptor| descriptor.len >= HEADER + LONG)
    }

    /// Passes up to `wanted` frames to the frontend that receives through `to`: as many chains are available in both
    /// rings. The first 12 bytes of each frame become `addresses`, if given. Ends before a frame that is short, is not
    /// alone and whole in one descriptor, or does not fit into one. Returns the number of frames. Wakes neither frontend.
    #[inline(always)]
    pub(in crate::vhost) fn pass(
        &mut self,
        to: &mut Ring,
        wanted: usize,
        addresses: Option<[u8; 12]>,
        (received, sent): (&QueueCounters, &QueueCounters),
    ) -> usize {
        let (old, to_old) = (self.next, to.next);
        let (table, avail, used) = (self.table(), self.avail.view(), self.used.view());
        let (to_table, to_avail, to_used) = (to.table(), to.avail.view(), to.used.view());
        let (mut view, mut to_view) = (self.memory.view(), to.memory.view());
        let mut bytes = 0;
        self.prefetch(wanted);
        to.prefetch(wanted);
        let passed = pass_copies(wanted, header(1), addresses, |i| {
            let (position, to_position) = (usize::from(old) + i, usize::from(to_old) + i);
            let (head, to_head) = (avail.load::<0>(position), to_avail.load::<0>(to_position));
            let frame = whole_frame(table, head, &mut view).filter(|frame| frame.len() >= LONG)?;
            let need = HEADER + frame.len();
            let space = whole_space(to_table, to_head, need, &mut to_view)?;
            write_used(used.entry(position), head, 0);
            write_used(to_used.entry(to_position), to_head, need);
            bytes += frame.len();
            Some((frame, space))
        });
        if passed > 0 {
            self.next = old.wrapping_add(passed as u16);
            to.next = to_old.wrapping_add(passed as u16);
            for counters in [received, sent] {
                counters.packets.add(passed as u64);
                counters.bytes.add(bytes as u64);
            }
            to.publish_silently(to_old);
            self.publish_silently(old);
        }
        passed
    }
}
