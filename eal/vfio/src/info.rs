//! Ioctl results of variable length: a structure followed by a chain of capabilities
//! (`struct vfio_info_cap_header` in `include/uapi/linux/vfio.h`).

use std::ops::RangeInclusive;

use crate::sys;

/// One capability of a chain: its id and the bytes after its header.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Capability<'a> {
    pub(crate) id: u16,
    pub(crate) body: &'a [u8],
}

/// Iterates over the chain that starts at `offset` of `answer`. The chain ends at an offset that is outside
/// of the answer or does not increase, so it is finite for any input.
pub(crate) fn capabilities(answer: &[u8], offset: u32) -> impl Iterator<Item = Capability<'_>> {
    const HEADER: usize = 8;
    let mut next = offset as usize;
    std::iter::from_fn(move || {
        let at = next;
        let header = answer.get(at..at.checked_add(HEADER)?).filter(|_| at != 0)?;
        let following = u32_at(header, 4)? as usize;
        let end = if following > at { following.min(answer.len()) } else { answer.len() };
        next = if following > at { following } else { 0 };
        Some(Capability {
            id: u16::from_ne_bytes([header[0], header[1]]),
            body: answer.get(at + HEADER..end).unwrap_or_default(),
        })
    })
}

/// Returns the allowed IOVA ranges in a `struct vfio_iommu_type1_info`, if it has any.
pub(crate) fn iova_ranges(answer: &[u8]) -> Option<Vec<RangeInclusive<u64>>> {
    let flags = u32_at(answer, 4)?;
    let offset = u32_at(answer, 16).filter(|_| flags & sys::VFIO_IOMMU_INFO_CAPS != 0)?;
    let ranges = capabilities(answer, offset)
        .find(|cap| u32::from(cap.id) == sys::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)?;
    let count = u32_at(ranges.body, 0).unwrap_or(0);
    Some(u64_pairs(ranges.body, 8, count).map(|(start, end)| start..=end).collect())
}

/// Returns the size in bytes of the smallest page that the IOMMU maps, if a `struct vfio_iommu_type1_info` reports it.
pub(crate) fn smallest_page(answer: &[u8]) -> Option<u64> {
    let flags = u32_at(answer, 4)?;
    let sizes = u64_at(answer, 8).filter(|sizes| flags & sys::VFIO_IOMMU_INFO_PGSIZES != 0 && *sizes != 0)?;
    Some(1 << sizes.trailing_zeros())
}

/// Returns the native-endian `u32` at `offset`, if `bytes` is long enough.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

/// Returns the native-endian `u64` at `offset`, if `bytes` is long enough.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?))
}

/// Iterates over `count` pairs of `u64` that start at `offset`, or fewer if `bytes` ends earlier.
pub(crate) fn u64_pairs(bytes: &[u8], offset: usize, count: u32) -> impl Iterator<Item = (u64, u64)> {
    (0..count as usize).map_while(move |i| {
        let at = offset.checked_add(i.checked_mul(16)?)?;
        Some((u64_at(bytes, at)?, u64_at(bytes, at + 8)?))
    })
}

/// Issues a query, and repeats it with a larger buffer if the result's `argsz` (its first word) exceeds the
/// buffer. `call` fills the buffer, which is aligned to 8 bytes and has at least `size` bytes.
pub(crate) fn query(
    size: usize,
    prepare: impl Fn(&mut [u64]),
    call: impl Fn(*mut u64) -> nix::Result<()>,
) -> nix::Result<Vec<u8>> {
    /// Larger than any result of the kernel. A larger `argsz` is an error, so that nothing that large is allocated.
    const MAX_ARGSZ: usize = 1 << 20;
    let mut size = size;
    loop {
        let mut answer = vec![0_u64; size.div_ceil(8)];
        prepare(&mut answer);
        let low = size as u64 & 0xffff_ffff;
        answer[0] = if cfg!(target_endian = "little") {
            answer[0] & !0xffff_ffff | low
        } else {
            answer[0] & 0xffff_ffff | low << 32
        };
        call(answer.as_mut_ptr())?;
        let bytes: Vec<u8> = answer.iter().flat_map(|word| word.to_ne_bytes()).take(size).collect();
        match u32_at(&bytes, 0).map(|argsz| argsz as usize) {
            Some(argsz) if argsz > MAX_ARGSZ => return Err(nix::errno::Errno::EPROTO),
            Some(argsz) if argsz > size => size = argsz,
            _ => return Ok(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chain(mut bytes: Vec<u8>, parts: &[(u16, &[u8])]) -> Vec<u8> {
        for (i, (id, body)) in parts.iter().enumerate() {
            let next = if i + 1 < parts.len() { (bytes.len() + 8 + body.len()) as u32 } else { 0 };
            bytes.extend(id.to_ne_bytes());
            bytes.extend(1_u16.to_ne_bytes());
            bytes.extend(next.to_ne_bytes());
            bytes.extend(*body);
        }
        bytes
    }

    #[test]
    fn bodies_end_where_the_next_begins() {
        let bytes = chain(vec![0; 16], &[(3, &[1, 2, 3, 4]), (1, &[5; 8])]);
        let found: Vec<_> = capabilities(&bytes, 16).map(|cap| (cap.id, cap.body.to_vec())).collect();
        assert_eq!(found, [(3, vec![1, 2, 3, 4]), (1, vec![5; 8])]);
        assert_eq!(capabilities(&bytes, 0).count(), 0);
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn ranges_are_found_among_other_capabilities() {
        let id = sys::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE as u16;
        // The capability announces three ranges, but contains only two.
        let body = words(&[3, 0, 0, 0, 0xfedf_ffff, 0, 0xfef0_0000, 0, u32::MAX, 0x7f]);
        let parts: [(u16, &[u8]); 2] = [(id + 1, &[1; 8]), (id, &body)];
        let answer = |flags| chain(words(&[0, flags, 0, 0, 24, 0]), &parts);
        let ranges = vec![0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff];
        assert_eq!(iova_ranges(&answer(sys::VFIO_IOMMU_INFO_CAPS)), Some(ranges));
        assert_eq!(iova_ranges(&answer(0)), None);
        assert_eq!(iova_ranges(&answer(sys::VFIO_IOMMU_INFO_CAPS)[..24]), None);
        assert_eq!(iova_ranges(&[]), None);
    }

    #[test]
    fn the_smallest_page_is_the_lowest_bit() {
        let answer = |flags| words(&[24, flags, 0x4020_0000, 1, 0, 0]);
        assert_eq!(smallest_page(&answer(sys::VFIO_IOMMU_INFO_PGSIZES)), Some(2 << 20));
        assert_eq!(smallest_page(&answer(0)), None);
        assert_eq!(smallest_page(&words(&[24, sys::VFIO_IOMMU_INFO_PGSIZES, 0, 0])), None);
        assert_eq!(smallest_page(&answer(sys::VFIO_IOMMU_INFO_PGSIZES)[..12]), None);
    }

    #[test]
    fn a_longer_answer_is_asked_for_again() {
        let bytes = query(
            16,
            |_| (),
            |at| {
                // SAFETY: `query` passes a buffer of at least two words.
                let words = unsafe { std::slice::from_raw_parts_mut(at, 2) };
                words[0] = words[0] & !0xffff_ffff | 40;
                Ok(())
            },
        );
        assert_eq!(bytes.unwrap().len(), 40);
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..256), offset in any::<u32>()) {
            prop_assert!(capabilities(&bytes, offset).count() <= 256);
            prop_assert!(capabilities(&bytes, offset % 256).count() <= 256);
        }
    }
}
