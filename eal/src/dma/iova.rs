//! IOVA allocation for every mode with an IOMMU: first fit, aligned to 2 MiB or larger pages, above 4 GiB if
//! possible.

use std::ops::RangeInclusive;

/// Minimum alignment of a region's IOVA in bytes, so that the IOMMU can use 2 MiB pages.
const ALIGNMENT: u64 = 2 << 20;

/// Preferred minimum IOVA of a region: above the x86 MSI window and the holes for 32-bit devices, and within
/// reach of a 39-bit IOMMU.
const PREFERRED: u64 = 4 << 30;

/// Device addresses that may be mapped: sorted, disjoint, inclusive ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IovaRanges(Vec<RangeInclusive<u64>>);

impl IovaRanges {
    /// Normalizes the ranges that a kernel reports: sorts them, drops empty ones, and joins those that touch
    /// or overlap.
    pub fn new(ranges: impl IntoIterator<Item = RangeInclusive<u64>>) -> Self {
        let mut sorted: Vec<_> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
        sorted.sort_by_key(|range| *range.start());
        let mut joined: Vec<RangeInclusive<u64>> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match joined.last_mut() {
                Some(last) if *range.start() <= last.end().saturating_add(1) => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => joined.push(range),
            }
        }
        Self(joined)
    }

    /// All 64-bit addresses. A device without an IOMMU, or a fake device, accepts them.
    pub fn all() -> Self {
        Self(vec![0..=u64::MAX])
    }

    /// Ranges in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = &RangeInclusive<u64>> {
        self.0.iter()
    }

    /// Addresses that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self::new(
            self.0
                .iter()
                .flat_map(|a| other.0.iter().map(|b| *a.start().max(b.start())..=*a.end().min(b.end()))),
        )
    }

    /// These addresses without `hole`.
    #[must_use]
    pub fn without(&self, hole: &RangeInclusive<u64>) -> Self {
        Self::new(self.0.iter().flat_map(|range| {
            let (start, end) = (*range.start(), *range.end());
            let below = hole.start().checked_sub(1).map(|last| start..=end.min(last));
            let above = hole.end().checked_add(1).map(|first| start.max(first)..=end);
            below.into_iter().chain(above)
        }))
    }

    /// Lowest aligned address with room for `len` bytes, above 4 GiB if possible. The address is never 0,
    /// because some devices take 0 for no address (82574 datasheet, 3.2.1). `page_size` is the page size of
    /// the memory in bytes: for pages of 1 GiB, the IOMMU can use 1 GiB entries.
    pub fn fit(&self, len: u64, page_size: u64) -> Option<u64> {
        let alignment = page_size.max(ALIGNMENT);
        let first_from = |minimum: u64| {
            self.0.iter().find_map(|range| {
                let start = (*range.start()).max(minimum).checked_next_multiple_of(alignment)?;
                let last = start.checked_add(len.checked_sub(1)?)?;
                (last <= *range.end()).then_some(start)
            })
        };
        first_from(PREFERRED).or_else(|| first_from(alignment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ranges that an x86 machine with a 39-bit IOMMU reports. They exclude the MSI window.
    fn x86() -> IovaRanges {
        IovaRanges::new([0xfef0_0000..=(1 << 39) - 1, 0..=0xfedf_ffff])
    }

    #[test]
    fn prefers_addresses_above_four_gibibytes() {
        assert_eq!(x86().fit(2 << 20, 4096), Some(4 << 30));
        assert_eq!(IovaRanges::new([0x1000..=0xffff_ffff]).fit(4096, 4096), Some(2 << 20));
        assert_eq!(x86().fit(1 << 40, 4096), None);
        assert_eq!(x86().fit(0, 4096), None);
    }

    #[test]
    fn giant_pages_are_at_multiples_of_their_size() {
        const GIB: u64 = 1 << 30;
        let free = x86().without(&(4 * GIB..=4 * GIB));
        assert_eq!((free.fit(GIB, 4096), free.fit(GIB, GIB)), (Some(4 * GIB + (2 << 20)), Some(5 * GIB)));
        let low = IovaRanges::new([0..=u32::MAX.into()]);
        assert_eq!((low.fit(2 * GIB, GIB), low.fit(4 * GIB, GIB)), (Some(GIB), None));
    }

    #[test]
    fn a_device_with_32_address_bits_gets_what_is_below_four_gibibytes_and_not_0() {
        let reachable = x86().intersection(&IovaRanges::new([0..=u32::MAX.into()]));
        assert_eq!(reachable.fit(1 << 30, 4096), Some(2 << 20));
        assert_eq!(reachable.fit(4 << 30, 4096), None);
    }

    proptest! {
        #[test]
        fn what_fits_is_allowed_and_free(
            ranges in prop::collection::vec((any::<u64>(), any::<u32>()), 1..8),
            lens in prop::collection::vec(1_u64..1 << 34, 1..8),
        ) {
            let allowed = IovaRanges::new(
                ranges.iter().map(|(start, len)| *start..=start.saturating_add(u64::from(*len) << 8)),
            );
            let mut free = allowed.clone();
            let mut taken: Vec<RangeInclusive<u64>> = Vec::new();
            for len in lens {
                let Some(start) = free.fit(len, 4096) else { continue };
                let range = start..=start + (len - 1);
                prop_assert_eq!(start % ALIGNMENT, 0);
                prop_assert!(allowed.iter().any(|a| a.contains(range.start()) && a.contains(range.end())));
                prop_assert!(taken.iter().all(|t| range.end() < t.start() || t.end() < range.start()));
                free = free.without(&range);
                taken.push(range);
            }
        }

        /// The model tests single addresses, next to the ends of the ranges, where errors would be.
        #[test]
        fn ranges_are_sets(
            a in prop::collection::vec(range(), 0..6),
            b in prop::collection::vec(range(), 0..6),
            hole in range(),
        ) {
            let has = |ranges: &[RangeInclusive<u64>], at| ranges.iter().any(|range| range.contains(&at));
            let (one, other) = (IovaRanges::new(a.clone()), IovaRanges::new(b.clone()));
            let (both, holed) = (one.intersection(&other), one.without(&hole));
            let ends = a.iter().chain(&b).chain([&hole]).flat_map(|range| [*range.start(), *range.end()]);
            for at in ends.flat_map(|end| [end.saturating_sub(1), end, end.saturating_add(1)]) {
                prop_assert_eq!(has(&one.0, at), has(&a, at));
                prop_assert_eq!(has(&both.0, at), has(&a, at) && has(&b, at));
                prop_assert_eq!(has(&holed.0, at), has(&a, at) && !hole.contains(&at));
            }
            for ranges in [one, both, holed] {
                let apart = |low: &RangeInclusive<u64>, high: &RangeInclusive<u64>| *low.end() < high.start() - 1;
                prop_assert!(ranges.0.is_sorted_by(apart));
            }
        }
    }

    fn range() -> impl Strategy<Value = RangeInclusive<u64>> {
        let end = || prop_oneof![0..20_u64, u64::MAX - 20..=u64::MAX, any::<u64>()];
        (end(), end()).prop_map(|(a, b)| a.min(b)..=a.max(b))
    }
}
