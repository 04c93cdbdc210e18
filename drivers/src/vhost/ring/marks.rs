//! Marks of a ring in the log of a guest that migrates.

use std::sync::Arc;

use vireo_eal::dma::{Burst, PeerLog, PoolCache};

use super::chain::{Budget, Checked};
use super::{Report, Ring};
use crate::counters::QueueCounters;

/// Where a ring marks its writes while the guest migrates.
#[derive(Debug)]
pub(in crate::vhost) struct Marks {
    pub(in crate::vhost) log: Arc<PeerLog>,
    /// Guest address of the used ring, if that is marked too.
    pub(in crate::vhost) used: Option<u64>,
}

impl Ring {
    /// Receives as [`Ring::receive`] does, and marks what was written.
    #[cold]
    #[inline(never)]
    pub(in crate::vhost) fn receive_logged(
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

    /// Sends as [`Ring::send`] does, and marks what was written.
    #[cold]
    #[inline(never)]
    pub(in crate::vhost) fn send_logged(
        &mut self,
        cache: &mut PoolCache,
        burst: &mut Burst,
        report: &mut Report,
    ) -> Checked<()> {
        let old = self.next;
        // Marked before the chains return to the guest, which then reuses their descriptors.
        let sent = self.send_and(cache, burst, report, |ring| ring.mark_buffers(old));
        self.mark_used(old);
        sent
    }

    /// Marks the used elements from position `old` on, and the words that are written with them.
    pub(super) fn mark_used(&self, old: u16) {
        let Some(Marks { log, used: Some(used) }) = &self.marks else { return };
        let at = |offset: u64| used.wrapping_add(offset);
        let entries = self.desc.entries() as u64;
        // Flags and index, then `avail_event`, which follows the elements.
        log.mark(at(0), 4);
        if self.events.is_some() {
            log.mark(at(4 + 8 * entries), 2);
        }
        for i in 0..self.next.wrapping_sub(old) {
            log.mark(at(4 + 8 * (u64::from(old.wrapping_add(i)) % entries)), 8);
        }
    }

    /// Marks the buffers that were written in the chains from position `old` on.
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
}
