//! Dirty tracking: which memory devices have written.

use crate::error::{Error, Operation, Result};
use crate::{Hwpt, sys};

/// Number of words in a 64 KiB page, the CPU's largest base page.
const PAGE: usize = (64 << 10) / size_of::<u64>();

impl Hwpt {
    /// Starts or stops tracking of the pages that devices write (`IOMMU_HWPT_SET_DIRTY_TRACKING`). The table
    /// must have [`HwptFlags::DIRTY_TRACKING`](crate::HwptFlags::DIRTY_TRACKING).
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the table does not have the flag.
    pub fn set_dirty_tracking(&self, on: bool) -> Result<()> {
        const ENABLE: u32 = sys::iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
        let mut argument = sys::iommu_hwpt_set_dirty_tracking {
            flags: if on { ENABLE } else { 0 },
            hwpt_id: self.id(),
            ..Default::default()
        };
        // SAFETY: the argument has no addresses.
        unsafe { self.iommufd().call(&mut argument) }.map_err(|errno| Operation::DirtyTracking.failed(errno))
    }

    /// Sets the bits of the pages that devices have written, among the `len` bytes at `iova`
    /// (`IOMMU_HWPT_GET_DIRTY_BITMAP`). Bit `n % 64` of word `n / 64` stands for page `n`, counted from
    /// `iova` in pages of `page_size` bytes. Other bits are unchanged.
    ///
    /// If `clear` is true, the kernel also clears the dirty state of the pages. Pass false before an unmap of
    /// the same range, because the unmap discards the state anyway.
    ///
    /// # Errors
    /// [`Error::Argument`] when `page_size` is not a power of two, when the range is empty, wraps around or
    /// does not consist of whole pages, and when `bitmap` has fewer words than [`bitmap_words`].
    pub fn dirty_bitmap(
        &self,
        iova: u64,
        len: u64,
        page_size: u64,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<()> {
        let operation = Operation::DirtyBitmap;
        // These values determine how many bits the kernel writes, and older kernels check fewer of them.
        let is_paged = page_size.is_power_of_two()
            && len > 0
            && iova.is_multiple_of(page_size)
            && len.is_multiple_of(page_size)
            && iova.checked_add(len - 1).is_some();
        if !is_paged {
            return Err(Error::Argument { operation, why: "the range does not consist of whole pages" });
        }
        let words = usize::try_from(bitmap_words(len, page_size)).unwrap_or(usize::MAX);
        let Some(bitmap) = bitmap.get_mut(..words) else {
            return Err(Error::Argument { operation, why: "the bitmap is too short" });
        };
        // If a huge IOMMU page is dirty, the kernel sets all of its bits, including those past the end of the
        // range. It writes only to CPU pages that contain the bitmap, so the buffer has to own these pages
        // entirely.
        let room = words.next_multiple_of(PAGE);
        let mut own = vec![0_u64; room + PAGE];
        let address = own.as_ptr().addr();
        let first = (address.next_multiple_of(PAGE * size_of::<u64>()) - address) / size_of::<u64>();
        let own = &mut own[first..first + room];
        const NO_CLEAR: u32 = sys::iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;
        let mut argument = sys::iommu_hwpt_get_dirty_bitmap {
            hwpt_id: self.id(),
            flags: if clear { 0 } else { NO_CLEAR },
            iova,
            length: len,
            page_size,
            data: own.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the slice has a bit for each page of the range. The kernel sets these bits, and beyond them
        // at most the bits in the rest of the CPU page that contains the last one, which is also part of the
        // slice.
        unsafe { self.iommufd().call(&mut argument) }.map_err(|errno| operation.failed(errno))?;
        let bits_of_last = (len / page_size - 1) % 64 + 1;
        own[words - 1] &= u64::MAX >> (64 - bits_of_last);
        for (word, dirty) in bitmap.iter_mut().zip(own) {
            *word |= *dirty;
        }
        Ok(())
    }
}

/// Number of words in a bitmap with one bit per page of `page_size` bytes, for `len` bytes.
pub const fn bitmap_words(len: u64, page_size: u64) -> u64 {
    len.div_ceil(page_size).div_ceil(64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{mock_kernel, read};
    use crate::{DeviceId, HwptFlags, HwptOptions};

    #[test]
    fn the_kernel_gets_a_bit_for_each_page() {
        let iommufd = mock_kernel(|name, bytes| {
            match name {
                "IOMMU_HWPT_SET_DIRTY_TRACKING" => {
                    assert_eq!(read::<sys::iommu_hwpt_set_dirty_tracking>(bytes).flags, 1);
                }
                "IOMMU_HWPT_GET_DIRTY_BITMAP" => {
                    let asked: sys::iommu_hwpt_get_dirty_bitmap = read(bytes);
                    assert_eq!((asked.size, asked.flags, asked.iova), (48, 1, 0x10_0000));
                    let last = (asked.length / asked.page_size - 1) as usize;
                    // The last page is part of a huge IOMMU page.
                    for page in last..last + 512 {
                        // SAFETY: the caller owns the whole CPU page that contains the bit of the last page.
                        unsafe { *(asked.data as *mut u64).add(page / 64) |= 1 << (page % 64) };
                    }
                }
                _ => {}
            }
            Ok(())
        });
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { iommufd.ioas_from_id(1) };
        let options = HwptOptions::new(HwptFlags::DIRTY_TRACKING);
        let hwpt = ioas.hwpt_alloc(DeviceId(1), &options).unwrap();
        hwpt.set_dirty_tracking(true).unwrap();
        let mut bitmap = [1, 0, 0];
        hwpt.dirty_bitmap(0x10_0000, 65 << 12, 4096, false, &mut bitmap).unwrap();
        assert_eq!(bitmap, [1, 1, 0]);
        hwpt.dirty_bitmap(0x10_0000, 64 << 12, 4096, false, &mut bitmap).unwrap();
        assert_eq!(bitmap, [1 | 1 << 63, 1, 0]);
        let refused =
            [(0, 1 << 12, 4095), (1, 1 << 12, 4096), (0, 1, 4096), (0, 0, 4096), (0, 193 << 12, 4096)];
        for (iova, len, page_size) in refused {
            let error = hwpt.dirty_bitmap(iova, len, page_size, true, &mut bitmap).unwrap_err();
            assert!(matches!(error, Error::Argument { .. }), "{error}");
        }
        let last = u64::MAX - 4095;
        assert!(hwpt.dirty_bitmap(last, 2 << 12, 4096, true, &mut bitmap).is_err());
    }

    #[test]
    fn a_bitmap_has_whole_words() {
        assert_eq!([1, 64 << 12, (64 << 12) + 1].map(|len| bitmap_words(len, 4096)), [1, 1, 2]);
    }
}
