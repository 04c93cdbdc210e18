//! Two cores whose caches hold everything, under the MESI protocol.
//!
//! As no line is ever evicted, two states of a line are left: one core has it and may write it (M or E), or both
//! have it and may only read it (S).

use std::collections::HashMap;

/// Bytes in a cache line.
const LINE: u64 = 64;

/// One of the two cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Core {
    First,
    Second,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    One(Core),
    Both,
}

/// Lines that the caches hold.
#[derive(Default)]
pub(super) struct Caches(HashMap<u64, Holder>);

impl Caches {
    /// Accesses `len` bytes at `at`. Returns the number of lines for which `core` has to wait: those that it does
    /// not have, and those that it writes while the other core has them too.
    pub(super) fn access(&mut self, core: Core, at: u64, len: u64, writes: bool) -> u64 {
        let lines = at / LINE..=(at + len.max(1) - 1) / LINE;
        let mut events = 0;
        for line in lines {
            let before = self.0.get(&line).copied();
            let is_hit = before == Some(Holder::One(core)) || (before == Some(Holder::Both) && !writes);
            if !is_hit {
                let after = if writes || before.is_none() { Holder::One(core) } else { Holder::Both };
                self.0.insert(line, after);
                events += 1;
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::Core::{First, Second};
    use super::*;

    #[test]
    fn a_core_waits_for_what_the_other_has_written_and_for_what_it_shares() {
        let mut caches = Caches::default();
        let mut events = |accesses: &[(Core, bool)]| -> Vec<u64> {
            accesses.iter().map(|(core, writes)| caches.access(*core, 0, 8, *writes)).collect()
        };
        let (read, write) = (false, true);
        assert_eq!(events(&[(First, write), (First, read), (First, write)]), [1, 0, 0]);
        assert_eq!(events(&[(Second, read), (First, read), (Second, read)]), [1, 0, 0]);
        // An upgrade of a shared line, which the other core then lacks.
        assert_eq!(events(&[(Second, write), (Second, read), (First, read)]), [1, 0, 1]);
        // Without a read before it, a write takes one event instead of two.
        assert_eq!(events(&[(Second, write), (First, write), (Second, write)]), [1, 1, 1]);
    }

    #[test]
    fn an_access_counts_each_line_that_it_touches() {
        let mut caches = Caches::default();
        assert_eq!(caches.access(First, 60, 4, true), 1);
        assert_eq!(caches.access(Second, 60, 8, false), 2);
        assert_eq!(caches.access(First, 60, 8, false), 1);
        assert_eq!(caches.access(First, 0, 129, false), 1);
    }
}
