//! Split virtqueue (virtio 1.2, 2.7), as both packet queues use it.
//!
//! Slot i of the avail ring always names descriptor i, so that ring is written only once. A descriptor is
//! therefore offered again only when all descriptors offered before it have returned as well
//! ([`DescRing::tail`]). Devices that complete in order, as all known ones do, are not affected.

use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::dma::{
    DescRing, DmaBlock, DmaMemory, DmaRing, FreeBuffers, Packet, RingRecord, dma_wmb, full_mb,
};
use vireo_eal::event::Event;
use vireo_eal::mmio::Doorbell;
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::QueueCounters;
use crate::driver::cannot_hand_over;
use crate::handover::contradiction;
use crate::port::Fault;

/// Maximum queue size that the specification allows, in descriptors.
const MAX_SIZE: u16 = 1 << 15;
/// Message for an invalid ring size.
pub(super) const NOT_A_SIZE: &str = "the size is not a power of two from 1 to 32768";

/// Whether a ring can have `size` descriptors.
pub(super) fn is_size(size: u16) -> bool {
    size.is_power_of_two() && size <= MAX_SIZE
}
/// The device writes the descriptor's buffer (`VIRTQ_DESC_F_WRITE`).
pub(crate) const DESC_WRITE: u16 = 2;
/// The chain continues in the descriptor that `next` names (`VIRTQ_DESC_F_NEXT`).
pub(crate) const DESC_NEXT: u16 = 1;
/// The descriptor refers to a table of descriptors (`VIRTQ_DESC_F_INDIRECT`).
pub(super) const DESC_INDIRECT: u16 = 4;
/// The driver wants no interrupt (`VIRTQ_AVAIL_F_NO_INTERRUPT`).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// The device wants no doorbell (`VIRTQ_USED_F_NO_NOTIFY`).
const USED_NO_NOTIFY: u16 = 1;

/// Device behavior that contradicts the driver's record of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Violation {
    /// `used.idx` counts more completions than there are descriptors with the device.
    UsedIndex,
    /// `id` names no descriptor of the queue.
    Id,
    /// `id` names a descriptor that is not in flight.
    NotInFlight,
    /// `len` is shorter than the header or longer than the buffer.
    Length,
    /// `num_buffers` is 0 or exceeds the number of buffers that the device returned.
    NumBuffers,
}

impl Violation {
    fn reason(self) -> &'static str {
        match self {
            Self::UsedIndex => "used.idx is ahead of the buffers that the device owns",
            Self::Id => "a used id is beyond the queue",
            Self::NotInFlight => "a used id names a buffer that the device does not own",
            Self::Length => "a used length does not fit the buffer",
            Self::NumBuffers => "num_buffers does not match the used buffers",
        }
    }
}

/// Whether an index that moves from `old` to `new` passes `event`: one of `old..new` equals it, modulo 2^16
/// (virtio 1.2, 2.7.7.2 and 2.7.10).
#[inline(always)]
pub(crate) fn need_event(event: u16, old: u16, new: u16) -> bool {
    event.wrapping_sub(old) < new.wrapping_sub(old)
}

/// Packs the length in bytes, the flags and the next index of a descriptor.
#[inline(always)]
pub(super) const fn shape(len: u32, flags: u16, next: u16) -> u64 {
    len as u64 | (flags as u64) << 32 | (next as u64) << 48
}

/// Splits an element of the used ring into `id` and `len`.
fn used_element(element: u64) -> (u32, u32) {
    (element as u32, (element >> 32) as u32)
}

/// Returns the smaller size; rejects sizes that are invalid for a split virtqueue.
pub(super) fn negotiate_size(asked: u16, most: u16) -> Result<u16> {
    if !is_size(asked) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("cannot use queues of {asked} descriptors"),
            NOT_A_SIZE,
        ));
    }
    if !is_size(most) {
        return Err(Error::new(
            ErrorKind::Protocol,
            format!("cannot use the device's queues of {most} descriptors"),
            NOT_A_SIZE,
        ));
    }
    Ok(asked.min(most))
}

/// Rarely used fields, kept apart so that the fields of the packet path are close together.
#[derive(Debug)]
struct Rare {
    avail_flags: DmaRing<u16>,
    avail: DmaRing<u16>,
    used_flags: DmaRing<u16>,
    name: Arc<str>,
    fault: Fault,
    batch: Option<Batch>,
}

/// State of a queue.
#[derive(Serialize, Deserialize, Schema)]
pub(super) struct QueueRecord {
    ring: RingRecord,
    addresses: [u64; 3],
    offered: u16,
    last_used: u16,
    index: u16,
    event_idx: bool,
    batch: Option<Batch>,
}

impl QueueRecord {
    /// Index of the queue in its device.
    pub(super) fn index(&self) -> u16 {
        self.index
    }
}

/// Completions for which an in-order device wrote only one element, that of the last (2.7.9).
#[derive(Clone, Copy, Debug, Serialize, Deserialize, Schema)]
struct Batch {
    /// Position of the last completion.
    last: u16,
    id: u32,
    len: u32,
    /// Length of the completions before the last, whose buffers were used whole.
    whole: u32,
}

/// Size in bytes of two cache lines, which processors fetch together.
const LINES: usize = 128;

/// Distance that the avail index may advance before `used_event` has to follow: a part of 2^16 that leaves
/// room for a ring.
const USED_EVENT_STRIDE: u16 = 1 << 14;

/// How the driver wakes the device.
#[derive(Debug)]
pub(super) enum Kick {
    /// No wake-up: the device is not live yet, or the control path wakes it.
    None,
    /// Writes the queue's index to a register.
    Register(Doorbell<u16>),
    /// Adds to the count of an eventfd, which takes a system call.
    Event(Event),
}

/// The driver's side of a split virtqueue.
///
/// Positions count descriptors since start, modulo 2^16. The low bits of a position are the index of its
/// descriptor.
#[derive(Debug)]
pub(super) struct Virtqueue<R = DescRing> {
    /// Descriptor table: for each descriptor its address, then its [`shape`].
    pub(super) ring: R,
    avail_idx: DmaRing<u16>,
    used_event: DmaRing<u16>,
    used_idx: DmaRing<u16>,
    /// Used ring elements: `id` in the lower half, `len` in the upper half.
    pub(super) used: DmaRing<u64>,
    avail_event: DmaRing<u16>,
    /// First position that was not offered to the device: the value of the avail index.
    pub(super) offered: u16,
    /// Position in the used ring of the next completion.
    pub(super) last_used: u16,
    /// Whether the next completion is inside a [`Batch`].
    pub(super) in_batch: bool,
    index: u16,
    event_idx: bool,
    kick: Kick,
    /// Whether the device misbehaved, which ends the use of the queue.
    is_broken: bool,
    pub(super) counters: Arc<QueueCounters>,
    rare: Box<Rare>,
}

impl Virtqueue {
    /// Creates a queue of `size` descriptors in `memory` for the device `name`. `fault` receives the reason
    /// when the queue detects misbehavior. Layout and alignment follow virtio 1.2, 2.7.
    pub(super) fn new(memory: &Arc<DmaMemory>, size: u16, name: &Arc<str>, fault: &Fault) -> Result<Self> {
        let entries = usize::from(size);
        // Queues of different lcores are neighbors in memory, so each one has cache lines of its own.
        let whole = |len: usize| len.next_multiple_of(LINES);
        // The device only reads what the driver writes.
        let mut driver = DmaBlock::read_only(memory, whole(16 * entries + 2 * (3 + entries)), LINES)?;
        let desc = driver.carve(entries)?;
        // Used elements begin 4 bytes after the start of the ring. QEMU 7.2 misplaces half of an element that
        // crosses a page of the IOMMU. Elements at multiples of 8 never cross one.
        let mut device = DmaBlock::new(memory, whole(4 + 2 * 3 + 8 * entries), LINES)?;
        let _: DmaRing<u16> = device.carve(2)?;
        let used_flags = device.carve(1)?;
        let avail_flags = driver.carve(1)?;
        let avail_idx = driver.carve(1)?;
        let avail = driver.carve(entries)?;
        Ok(Self {
            ring: DescRing::new(desc, entries),
            avail_idx,
            used_event: driver.carve(1)?,
            used_idx: device.carve(1)?,
            used: device.carve(entries)?,
            avail_event: device.carve(1)?,
            offered: 0,
            last_used: 0,
            in_batch: false,
            index: 0,
            event_idx: false,
            kick: Kick::None,
            is_broken: false,
            counters: Arc::default(),
            rare: Box::new(Rare {
                avail_flags,
                avail,
                used_flags,
                name: Arc::clone(name),
                fault: fault.clone(),
                batch: None,
            }),
        })
    }

    /// Reinitializes the queue for a device that was reset. The caller has removed the buffers.
    pub(super) fn restart(&mut self, index: u16, event_idx: bool) {
        self.ring.restart(self.ring.entries(), [0; 2]);
        for slot in 0..self.size() {
            self.rare.avail.store::<0>(slot.into(), slot);
        }
        // With EVENT_IDX the flags stay 0 (2.7.7.1), and `used_event` suppresses interrupts instead.
        self.rare.avail_flags.store::<0>(0, if event_idx { 0 } else { AVAIL_NO_INTERRUPT });
        for word in
            [&self.avail_idx, &self.used_event, &self.rare.used_flags, &self.used_idx, &self.avail_event]
        {
            word.store::<0>(0, 0);
        }
        self.used.fill(0);
        self.end_batch();
        (self.offered, self.last_used) = (0, 0);
        self.is_broken = false;
        (self.index, self.event_idx, self.kick) = (index, event_idx, Kick::None);
        self.suppress_interrupts();
    }

    /// Returns the state of the queue.
    ///
    /// # Errors
    /// `Unavailable` when the device misbehaved.
    pub(super) fn record(&self) -> Result<QueueRecord> {
        if self.is_broken {
            return Err(cannot_hand_over("its device has misbehaved, and it waits for a restart"));
        }
        Ok(QueueRecord {
            ring: self.ring.record(),
            addresses: self.addresses(),
            offered: self.offered,
            last_used: self.last_used,
            index: self.index,
            event_idx: self.event_idx,
            batch: self.rare.batch,
        })
    }

    /// Continues a queue of another process, which the device uses. This one is fresh, and nothing of it was written.
    pub(super) fn restore(&mut self, record: &QueueRecord, free: &mut FreeBuffers) -> Result<()> {
        if record.addresses != self.addresses() {
            return Err(contradiction("a virtqueue is at another place in memory"));
        }
        self.ring.restore(&record.ring, free)?;
        (self.offered, self.last_used) = (record.offered, record.last_used);
        (self.index, self.event_idx) = (record.index, record.event_idx);
        self.rare.batch = record.batch;
        self.in_batch = record.batch.is_some();
        Ok(())
    }

    /// Device addresses of the descriptor table, the avail ring and the used ring.
    pub(super) fn addresses(&self) -> [u64; 3] {
        [self.ring.iova(), self.rare.avail_flags.iova(), self.rare.used_flags.iova()]
    }

    /// Takes the next completion, in any order; returns its packet and length in bytes. An invalid completion
    /// is consumed as well.
    pub(super) fn complete(
        &mut self,
        len: std::ops::RangeInclusive<u32>,
    ) -> std::result::Result<(Packet, usize), Violation> {
        let position = self.last_used;
        self.last_used = position.wrapping_add(1);
        let (id, used) = match self.rare.batch {
            None => used_element(self.used.load::<0>(position.into())),
            Some(batch) if batch.last == position => {
                self.end_batch();
                (batch.id, batch.len)
            }
            Some(batch) => (u32::from(position & (self.size() - 1)), batch.whole),
        };
        if id >= u32::from(self.size()) {
            return Err(Violation::Id);
        }
        if !len.contains(&used) {
            return Err(Violation::Length);
        }
        let packet = self.ring.take_at(id as usize).ok_or(Violation::NotInFlight)?;
        Ok((packet, used as usize))
    }

    /// Ends the use of the queue if the device misbehaved.
    ///
    /// An ended queue has nothing in flight and no room, so that the packet path finds nothing to do without
    /// a test of its own. Its buffers stay until the reset because the device may still write to them.
    pub(super) fn settle(&mut self, completed: std::result::Result<(), Violation>) {
        if let Err(violation) = completed {
            self.give_up(violation.reason());
            self.last_used = self.offered;
            self.ring.close();
        }
    }
}

impl<R> Virtqueue<R> {
    /// Suppresses interrupts. The device interrupts when the used index passes `used_event`. The driver
    /// places that word one behind the last used index, so that the used index reaches it only after 2^16
    /// completions, and moves it every [`USED_EVENT_STRIDE`].
    #[inline(always)]
    fn suppress_interrupts(&self) {
        self.used_event.store::<0>(0, self.last_used.wrapping_sub(1));
    }

    /// Lets the device interrupt when it uses the next descriptor (2.7.7 and 2.7.10). Returns whether it has used
    /// none until then: it then looks for the driver's request after it has used the next one.
    pub(super) fn enable_interrupt(&self) -> bool {
        match self.event_idx {
            true => self.used_event.store::<0>(0, self.last_used),
            false => self.rare.avail_flags.store::<0>(0, 0),
        }
        full_mb();
        self.used_idx() == self.last_used
    }

    /// Ends what [`Virtqueue::enable_interrupt`] has begun. A late interrupt may still arrive.
    pub(super) fn disable_interrupt(&self) {
        match self.event_idx {
            true => self.suppress_interrupts(),
            false => self.rare.avail_flags.store::<0>(0, AVAIL_NO_INTERRUPT),
        }
    }

    /// Makes every slot of the avail ring name the first descriptor, for chains as long as the table.
    pub(super) fn point_all_at_first(&mut self) {
        self.rare.avail.fill(0);
    }

    /// Allows doorbells from now on (3.1.1: not before `DRIVER_OK`), and rings if descriptors were offered.
    pub(super) fn connect(&mut self, kick: Kick) {
        self.kick = kick;
        if self.offered != self.last_used {
            self.ring();
        }
    }

    /// Allows doorbells of a device that is live already, and rings none.
    pub(super) fn reconnect(&mut self, kick: Kick) {
        self.kick = kick;
    }

    /// Marks the queue as broken and requests a restart of the port.
    pub(super) fn give_up(&mut self, why: &'static str) {
        tracing::error!("virtio NIC {}: virtqueue {} stopped: {why}", self.rare.name, self.index);
        self.is_broken = true;
        self.counters.device_errors.add(1);
        self.rare.fault.raise(why);
    }

    /// Name of the device that the queue belongs to.
    pub(super) fn name(&self) -> &Arc<str> {
        &self.rare.name
    }

    /// Number of descriptors.
    #[inline(always)]
    pub(super) fn size(&self) -> u16 {
        self.used.entries() as u16
    }

    /// Used index that the device wrote last.
    #[inline(always)]
    pub(super) fn used_idx(&self) -> u16 {
        self.used_idx.load::<0>(0)
    }

    /// Number of descriptors that the device holds.
    #[inline(always)]
    pub(super) fn in_flight(&self) -> u16 {
        self.offered.wrapping_sub(self.last_used)
    }

    /// Number of completions from position `next` on that are not processed yet; 0 if the used index is
    /// impossible.
    pub(super) fn pending_from(&self, next: u16) -> u16 {
        let pending_from = self.used_idx().wrapping_sub(next);
        if pending_from > self.offered.wrapping_sub(next) { 0 } else { pending_from }
    }

    /// Offers the descriptors up to position `new`, and rings if the device requests it.
    #[inline(always)]
    pub(super) fn publish(&mut self, new: u16) {
        let old = std::mem::replace(&mut self.offered, new);
        dma_wmb();
        self.avail_idx.store::<0>(0, new);
        // Without the barrier, the driver could read the device's request before it writes the index, and the
        // device could go to sleep in between.
        full_mb();
        let wanted = if self.event_idx {
            if (old ^ new) & !(USED_EVENT_STRIDE - 1) != 0 {
                self.suppress_interrupts();
            }
            need_event(self.avail_event.load::<0>(0), old, new)
        } else {
            self.rare.used_flags.load::<0>(0) & USED_NO_NOTIFY == 0
        };
        if wanted {
            self.ring();
        }
    }

    #[inline(always)]
    fn ring(&mut self) {
        if let Kick::Register(doorbell) = &self.kick {
            doorbell.ring(self.index);
            self.counters.doorbells.add(1);
        } else {
            self.ring_event();
        }
    }

    /// Rings although the device did not request it; logs a warning if `warn` is set.
    pub(super) fn ring_late(&mut self, warn: bool) {
        if warn {
            tracing::warn!(
                "virtio NIC {}: virtqueue {} is full and the device has used no buffer for a second; ringing its doorbell again",
                self.rare.name,
                self.index
            );
        }
        self.ring();
    }

    /// Kept out of the packet path, where a call that most devices never need would cost registers.
    #[cold]
    #[inline(never)]
    fn ring_event(&mut self) {
        if let Kick::Event(event) = &self.kick {
            event.signal();
            self.counters.doorbells.add(1);
        }
    }

    /// Checks whether the next element stands for several of the `pending` completions. A device that
    /// completes in order may write one such element, with the id of the last. [`Virtqueue::complete`] then
    /// returns each completion; the buffers before the last were used whole.
    pub(super) fn expect_batch(&mut self, pending: u16, whole: u32) {
        if self.in_batch {
            return;
        }
        let next = usize::from(self.last_used);
        let (id, len) = used_element(self.used.load::<0>(next));
        let mask = u32::from(self.size() - 1);
        let left_out = (id.wrapping_sub(u32::from(self.last_used)) & mask) as u16;
        if left_out > 0 && left_out < pending && id <= mask {
            self.rare.batch = Some(Batch { last: self.last_used.wrapping_add(left_out), id, len, whole });
            self.in_batch = true;
        }
    }

    fn end_batch(&mut self) {
        self.rare.batch = None;
        self.in_batch = false;
    }

    /// Checks that `used_idx` counts no more completions than there are descriptors in flight.
    pub(super) fn check_used(&self, used_idx: u16) -> std::result::Result<(), Violation> {
        if used_idx.wrapping_sub(self.last_used) > self.in_flight() {
            Err(Violation::UsedIndex)
        } else {
            Ok(())
        }
    }

    /// Whether the device misbehaved.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// Exchanges the descriptor table.
    pub(super) fn with_ring<S>(self, ring: S) -> (R, Virtqueue<S>) {
        let Self {
            ring: before,
            avail_idx,
            used_event,
            used_idx,
            used,
            avail_event,
            offered,
            last_used,
            in_batch,
            index,
            event_idx,
            kick,
            is_broken,
            counters,
            rare,
        } = self;
        let queue = Virtqueue {
            ring,
            avail_idx,
            used_event,
            used_idx,
            used,
            avail_event,
            offered,
            last_used,
            in_batch,
            index,
            event_idx,
            kick,
            is_broken,
            counters,
            rare,
        };
        (before, queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vireo_eal::mem::{Backing, Region};

    #[test]
    fn used_elements_cross_no_page() {
        let region = Region::new(1 << 16, Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        for size in [2, 256, 64] {
            let queue = Virtqueue::new(&memory, size, &"test".into(), &Fault::default()).unwrap();
            assert_eq!((queue.used.iova() % 8, queue.addresses()[2] + 4), (0, queue.used.iova()));
        }
    }

    /// Memory that one lcore or device writes shares no cache line, nor the adjacent line that is fetched
    /// with it, with memory that another writes.
    #[test]
    fn queues_share_no_cache_lines() {
        let region = Region::new(1 << 18, Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        let mut taken = std::collections::HashMap::new();
        for (number, size) in [256, 256, 64, 512, 2, 2].into_iter().enumerate() {
            let queue = Virtqueue::new(&memory, size, &"test".into(), &Fault::default()).unwrap();
            let [desc, avail, used] = queue.addresses();
            let (size, idx) = (u64::from(size), queue.used_idx.iova());
            let parts = [
                ("descriptors", desc, 16 * size),
                ("avail", avail, 4 + 2 * size + 2),
                ("used", used, 4 + 8 * size + 2),
            ];
            assert!((used..used + 4).contains(&idx));
            for (part, start, len) in parts {
                for line in start / 128..(start + len).div_ceil(128) {
                    // The driver writes both the descriptors and the avail ring of a queue, in turn.
                    let owner = (number, part == "used");
                    assert_eq!(*taken.entry(line).or_insert(owner), owner, "{part} of queue {number}");
                }
            }
        }
    }

    /// However far the index advances, no used index of the device passes `used_event`, which is rarely
    /// written.
    #[test]
    fn the_device_is_asked_for_no_interrupt_without_a_write_for_each_burst() {
        let region = Region::new(1 << 20, Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        for size in [64, 1 << 15] {
            let mut queue = Virtqueue::new(&memory, size, &"test".into(), &Fault::default()).unwrap();
            queue.restart(0, true);
            let (mut writes, mut event, mut used) = (0, queue.used_event.load::<0>(0), 0_u16);
            for step in 0..20_000_u16 {
                let room = size - queue.in_flight();
                queue.publish(queue.offered.wrapping_add(room.min(1 + step % 40)));
                let now = queue.used_event.load::<0>(0);
                writes += u32::from(now != event);
                event = now;
                // The device completes all offered descriptors, or some of them, before the driver checks.
                let new = used.wrapping_add(queue.offered.wrapping_sub(used) / (1 + step % 3));
                assert!(!need_event(event, used, new), "{step}");
                used = new;
                if step % 7 == 0 {
                    queue.last_used = used;
                }
            }
            assert!(writes < 40, "{writes}");
        }
    }

    #[test]
    fn sizes_that_no_queue_has_are_refused() {
        assert_eq!(negotiate_size(256, 1024).unwrap(), 256);
        assert_eq!(negotiate_size(1024, 256).unwrap(), 256);
        assert_eq!(negotiate_size(100, 256).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(negotiate_size(0, 256).unwrap_err().kind(), ErrorKind::Usage);
        for most in [0, 100, 40_000] {
            assert_eq!(negotiate_size(256, most).unwrap_err().kind(), ErrorKind::Protocol);
        }
    }

    proptest! {
        #[test]
        fn need_event_agrees_with_indices_that_do_not_wrap(
            old in 0_u64..1 << 40, added in 0_u64..=u64::from(MAX_SIZE), event in any::<u16>(),
        ) {
            let passed = (old..old + added).any(|index| index as u16 == event);
            prop_assert_eq!(need_event(event, old as u16, (old + added) as u16), passed);
        }
    }
}
