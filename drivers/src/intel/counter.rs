//! Statistics registers. A read clears them (SDM 13.7), but not all of QEMU's, of which the 8254x count on over resets too.

use vireo_eal::mmio::Bar;

use super::regs::*;
use crate::counters::PortCounters;

/// Counters of frames that the device dropped. RNBC is none of them: its frames wait in the FIFO and may still
/// be received (SDM 13.7); nor is RUC, which QEMU counts for frames that it pads and delivers.
const DROPS: [(&str, u64); 4] = [
    ("rx_missed_errors", MPC),
    ("rx_crc_errors", CRCERRS),
    ("rx_align_errors", ALGNERRC),
    ("rx_long_length_errors", ROC),
];

/// Frames that the device dropped.
#[derive(Debug, Default)]
pub(crate) struct Drops([Counter; DROPS.len()]);

impl Drops {
    /// Counters of a port that has these.
    pub(crate) fn port_counters() -> PortCounters {
        PortCounters::with_device(DROPS.map(|(name, _)| name))
    }

    /// Forgets what the registers have now.
    pub(super) fn begin(&mut self, bar: &Bar) {
        self.read(bar).for_each(drop);
    }

    /// Adds what was counted since the last read to `counters`.
    pub(super) fn add_to(&mut self, counters: &PortCounters, bar: &Bar) {
        counters.device().zip(self.read(bar)).for_each(|(counter, more)| counter.add(more));
    }

    fn read(&mut self, bar: &Bar) -> impl Iterator<Item = u64> {
        let counters = DROPS.iter().zip(&mut self.0);
        counters.map(|((_, register), counter)| counter.read(|| bar.read32(*register)))
    }
}

/// Reader of a statistics register.
#[derive(Debug, Default)]
struct Counter {
    /// What the register had at the last read, and has still because that did not clear it.
    kept: u32,
}

impl Counter {
    /// What was counted since the last read.
    fn read(&mut self, register: impl Fn() -> u32) -> u64 {
        // All ones: the device is gone and counts no more.
        let present = || Some(register()).filter(|count| *count != u32::MAX);
        let Some(count) = present() else { return 0 };
        let mut more = u64::from(count.checked_sub(self.kept).unwrap_or(count));
        self.kept = 0;
        // Less than a microsecond later a register that was cleared has next to nothing.
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

    /// A register; `clears` when it is read.
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
