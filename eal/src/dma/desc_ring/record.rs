//! State of a ring as a record, by which another process continues the ring.

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};

use super::{DescRing, EMPTY};
use crate::dma::pool::FreeBuffers;
use crate::error::{Error, ErrorKind, Result};

/// State of a [`DescRing`]. Buffers are pool offsets, so the process that continues the ring may have mapped the
/// memory anywhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Schema)]
pub struct RingRecord {
    /// Device address of the first descriptor.
    iova: u64,
    /// Number of descriptors.
    entries: u32,
    head: u64,
    capacity: u32,
    /// Buffer of each descriptor from the tail to the head, or [`EMPTY`].
    buffers: Vec<u32>,
}

impl DescRing {
    /// Returns the state of the ring.
    pub fn record(&self) -> RingRecord {
        let buffer = |position: usize| self.record[position & self.mask];
        let owned = self.head.wrapping_sub(self.tail);
        RingRecord {
            iova: self.iova(),
            entries: self.entries() as u32,
            head: self.head as u64,
            capacity: self.capacity as u32,
            buffers: (0..owned).map(|i| buffer(self.tail.wrapping_add(i))).collect(),
        }
    }

    /// Continues a ring of another process on the same descriptors, which are not touched. Its buffers are claimed
    /// from `free`. This ring owns no buffer.
    ///
    /// # Errors
    /// `Protocol` if the record is not that of a ring at this place, or claims a buffer that is not free. The ring then
    /// owns no buffer.
    ///
    /// # Panics
    /// Panics if this ring owns a buffer.
    pub fn restore(&mut self, record: &RingRecord, free: &mut FreeBuffers) -> Result<()> {
        assert!(self.owned() == 0, "the buffers of this ring would be lost");
        let refused = |why| Err(Error::new(ErrorKind::Protocol, "cannot continue a ring", why));
        let RingRecord { iova, buffers, .. } = record;
        let [entries, capacity] = [record.entries, record.capacity].map(|count| count as usize);
        let head = record.head as usize;
        if (*iova, entries) != (self.iova(), self.entries()) {
            return refused("it has another place or size in memory");
        }
        // The descriptor at the tail is never empty.
        if capacity > entries || buffers.len() > entries || buffers.first() == Some(&EMPTY) {
            return refused("its positions contradict each other");
        }
        let is_claimed = |slot: &&u32| **slot == EMPTY || free.claim(**slot);
        let claimed = buffers.iter().take_while(is_claimed).count();
        if claimed < buffers.len() {
            let owned = buffers[..claimed].iter().filter(|slot| **slot != EMPTY);
            owned.for_each(|slot| free.give_back(*slot));
            return refused("it owns a buffer that another ring owns or that does not exist");
        }
        (self.head, self.tail) = (head, head.wrapping_sub(buffers.len()));
        self.capacity = capacity;
        self.holes = buffers.iter().filter(|slot| **slot == EMPTY).count();
        self.fresh_bits = free.fresh_bits();
        for (i, slot) in buffers.iter().enumerate() {
            self.record[self.tail.wrapping_add(i) & self.mask] = *slot;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dma::desc_ring::tests::{pool, ring};
    use crate::dma::packet::Burst;

    /// Positions beyond which a record's own are not checked: they wrap.
    fn positions() -> impl Strategy<Value = u64> {
        prop_oneof![Just(0), Just(u64::MAX - 3), any::<u64>()]
    }

    proptest! {
        /// A ring that continues another one returns the same buffers in the same order, and no buffer is lost.
        #[test]
        fn a_continued_ring_owns_what_the_other_owned(
            at in 0_usize..40, filled in 0_usize..=16, emptied in proptest::collection::vec(0_usize..16, 0..8),
        ) {
            let pool = pool(64);
            let (mut cache, mut before) = (pool.cache(), ring(16));
            for _ in 0..at {
                before.refill(1, 0, 0, &mut cache);
                before.reclaim(1, &mut cache);
            }
            before.refill(filled, 0, 0, &mut cache);
            for index in emptied {
                if let Some(packet) = before.take_at(index) {
                    cache.free(packet);
                }
            }
            let record = before.record();
            // The other process's pool: all buffers are free there.
            let successor = super::super::tests::pool(64);
            let mut free = successor.take_free();
            prop_assert_eq!(successor.available(), 0);
            let mut after = ring(16);
            let place = RingRecord { iova: after.iova(), ..record.clone() };
            after.restore(&place, &mut free).unwrap();
            drop(free);
            prop_assert_eq!(after.record(), place);
            prop_assert_eq!(after.room(), before.room());
            prop_assert_eq!(successor.available() as usize, 64 - after.owned());
            let mut own = successor.cache();
            while before.owned() > 0 {
                let (mut one, mut other) = (Burst::new(), Burst::new());
                prop_assert!(before.take_one(&mut one, 1) && after.take_one(&mut other, 1));
                prop_assert_eq!(one[0].buffer(), other[0].buffer());
                one.drain(..).for_each(|packet| cache.free(packet));
                other.drain(..).for_each(|packet| own.free(packet));
            }
            prop_assert_eq!(after.refill(16, 0, 0, &mut own), before.refill(16, 0, 0, &mut cache));
            after.reclaim_all(&mut own);
            before.reclaim_all(&mut cache);
            drop((own, cache));
            prop_assert_eq!((successor.available(), pool.available()), (64, 64));
        }

        /// Whatever a record says, each buffer has one owner afterwards.
        #[test]
        fn a_record_that_contradicts_itself_is_refused_or_harmless(
            head in positions(), capacity in 0_u32..20,
            buffers in proptest::collection::vec(prop_oneof![0_u32..80, Just(EMPTY)], 0..20),
        ) {
            let pool = pool(64);
            let buffers = buffers.iter().map(|number| number.saturating_mul(2048)).collect();
            let (mut free, mut ring) = (pool.take_free(), ring(16));
            let record = RingRecord { iova: ring.iova(), entries: 16, head, capacity, buffers };
            let restored = ring.restore(&record, &mut free);
            drop(free);
            prop_assert_eq!(pool.available() as usize, 64 - ring.owned());
            prop_assert!(restored.is_ok() || ring.owned() == 0);
            let mut cache = pool.cache();
            ring.reclaim_all(&mut cache);
            drop(cache);
            prop_assert_eq!(pool.available(), 64);
        }
    }

    #[test]
    fn a_record_of_another_ring_is_refused() {
        let pool = pool(64);
        let (mut free, mut one) = (pool.take_free(), ring(16));
        let record =
            RingRecord { iova: one.iova() + 16, entries: 16, head: 0, capacity: 16, buffers: vec![] };
        for wrong in [record.clone(), RingRecord { iova: one.iova(), entries: 32, ..record }] {
            assert_eq!(one.restore(&wrong, &mut free).unwrap_err().kind(), ErrorKind::Protocol);
        }
    }
}
