//! Statistics registers. A read clears them on the chips (SDM 13.7). QEMU does not clear all of them on a
//! read, and its 8254x keep counting across resets too.

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::mmio::Bar;

use super::regs::*;
use crate::counters::PortCounters;

/// Counters of frames that the device dropped. RNBC is left out because its frames wait in the FIFO and may
/// still be received (SDM 13.7). RUC is left out because QEMU also counts frames that it pads and delivers.
const DROPS: [(&str, u64); 4] = [
    ("rx_missed_errors", MPC),
    ("rx_crc_errors", CRCERRS),
    ("rx_align_errors", ALGNERRC),
    ("rx_long_length_errors", ROC),
];

/// Counts of frames that the device dropped.
#[derive(Clone, Debug, Default, Serialize, Deserialize, Schema)]
pub(crate) struct Drops([Counter; DROPS.len()]);

impl Drops {
    /// Creates the counters of a port, including these device counters.
    pub(crate) fn port_counters() -> PortCounters {
        PortCounters::with_device(DROPS.map(|(name, _)| name))
    }

    /// Discards what the registers have counted so far.
    pub(super) fn begin(&mut self, bar: &Bar) {
        self.read(bar).for_each(drop);
    }

    /// Adds the counts since the last read to `counters`.
    pub(super) fn add_to(&mut self, counters: &PortCounters, bar: &Bar) {
        counters.device().zip(self.read(bar)).for_each(|(counter, more)| counter.add(more));
    }

    fn read(&mut self, bar: &Bar) -> impl Iterator<Item = u64> {
        let counters = DROPS.iter().zip(&mut self.0);
        counters.map(|((_, register), counter)| counter.read(|| bar.read32(*register)))
    }
}

/// Reader of a statistics register.
#[derive(Clone, Debug, Default, Serialize, Deserialize, Schema)]
struct Counter {
    /// Count that the last read left in the register; 0 if the read cleared it.
    kept: u32,
}

impl Counter {
    /// Returns the increase since the last read.
    fn read(&mut self, register: impl Fn() -> u32) -> u64 {
        // All ones mean that the device is gone and no longer counts.
        let present = || Some(register()).filter(|count| *count != u32::MAX);
        let Some(count) = present() else { return 0 };
        let mut more = u64::from(count.checked_sub(self.kept).unwrap_or(count));
        self.kept = 0;
        // A second read shows whether the first one cleared the register: less than a microsecond later, a
        // cleared register has counted next to nothing.
        if let Some(again) = present() {
            let is_kept = count != 0 && again >= count;
            more += u64::from(if is_kept { again - count } else { again });
            self.kept = if is_kept { again } else { 0 };
        }
        more
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Statistics register. If `clears`, a read sets it to 0.
    struct Register {
        count: Cell<u32>,
        clears: bool,
    }

    impl Register {
        fn new(count: u32, clears: bool) -> Self {
            Self { count: Cell::new(count), clears }
        }

        fn add(&self, more: u32) {
            self.count.set(self.count.get() + more);
        }

        fn read(&self) -> u32 {
            let count = self.count.get();
            if self.clears {
                self.count.set(0);
            }
            count
        }
    }

    #[test]
    fn what_is_counted_is_the_same_whether_reads_clear_the_register_or_not() {
        for clears in [false, true] {
            let (register, mut counter) = (Register::new(7, clears), Counter::default());
            assert_eq!(counter.read(|| register.read()), 7, "{clears}");
            assert_eq!(counter.read(|| register.read()), 0, "{clears}");
            register.add(5);
            assert_eq!(counter.read(|| register.read()), 5, "{clears}");
            assert_eq!(counter.read(|| register.read()), 0, "{clears}");
            register.add(2);
            register.add(1);
            assert_eq!(counter.read(|| register.read()), 3, "{clears}");
        }
    }

    #[test]
    fn a_register_that_a_reset_cleared_counts_from_0_again() {
        let (register, mut counter) = (Register::new(9, false), Counter::default());
        counter.read(|| register.read());
        register.count.set(4);
        assert_eq!(counter.read(|| register.read()), 4);
    }

    #[test]
    fn a_device_that_is_gone_counts_nothing() {
        let (register, mut counter) = (Register::new(3, false), Counter::default());
        assert_eq!(counter.read(|| register.read()), 3);
        assert_eq!(counter.read(|| u32::MAX), 0);
        register.add(1);
        assert_eq!(counter.read(|| register.read()), 1);
    }
}
