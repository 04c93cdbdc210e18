//! Division of a region by device access rights and by devices.

use std::ops::Range;
use std::sync::Arc;

use super::memory::too_small;
use crate::error::Result;
use crate::mem::page_size;
use crate::vfio::AddressSpace;

/// Size of a part of a region, and the devices that can access it.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Bytes that devices read and write.
    pub read_write: usize,
    /// Bytes that devices only read.
    pub read_only: usize,
    /// Address spaces that map the part.
    pub spaces: Vec<Arc<AddressSpace>>,
}

impl Part {
    /// Number of bytes that the part takes in a region.
    pub fn bytes(&self) -> usize {
        self.sizes().into_iter().sum()
    }

    fn sizes(&self) -> [usize; 2] {
        // Parts can begin on any page of the CPU, even inside a hugepage. The kernel allows no finer mapping,
        // and `AddressSpace` refuses an IOMMU that allows only coarser ones.
        [self.read_write, self.read_only].map(|len| len.next_multiple_of(page_size()))
    }
}

/// Byte ranges of each of `parts` in a region of `len` bytes: first those that devices write, then those that
/// they only read. The first part gets the rest of the region.
pub(super) fn layout(parts: &[Part], len: usize) -> Result<Vec<[Range<usize>; 2]>> {
    let need = parts.iter().map(Part::bytes).sum();
    let mut rest = len.checked_sub(need).ok_or_else(|| too_small("map memory for the ports", need, len))?;
    let mut next = 0;
    let mut take = |len| {
        next += len;
        next - len..next
    };
    Ok(parts
        .iter()
        .map(|part| {
            let [read_write, read_only] = part.sizes();
            [take(read_write + std::mem::take(&mut rest)), take(read_only)]
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_behind_each_other_and_the_first_gets_the_rest() {
        let part = |read_write, read_only| Part { read_write, read_only, ..Part::default() };
        let page = page_size();
        let parts = [part(2 * page + 1, 1), part(0, 0), part(page, page + 1)];
        assert_eq!(parts.iter().map(Part::bytes).sum::<usize>(), 7 * page);
        let pages = |range: &Range<usize>| [range.start, range.end].map(|at| at / page);
        let found: Vec<_> = layout(&parts, 9 * page).unwrap().iter().flatten().map(pages).collect();
        assert_eq!(found, [[0, 5], [5, 6], [6, 6], [6, 6], [6, 7], [7, 9]]);
        let [need, left] = [7, 6].map(|pages| (pages * page) >> 10);
        let error = layout(&parts, 6 * page).unwrap_err().to_string();
        assert!(error.contains(&format!("{need} KiB are needed and {left} KiB")), "{error}");
    }
}
