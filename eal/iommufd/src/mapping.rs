//! Mappings in an address space.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use crate::error::{Error, Operation, Result};
use crate::{Ioas, sys};

/// Physically contiguous bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Physical {
    /// Physical address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Memory that is mapped in an [`Ioas`]. On drop, the memory is unmapped, and then `K`, the owner of the
/// memory, is dropped.
///
/// If the unmap fails, an error is logged and `K` is never dropped, because a device may still access the memory.
#[must_use = "dropping it unmaps the memory"]
#[derive(Debug)]
pub struct Mapping<K = ()> {
    ioas: Arc<Ioas>,
    iova: u64,
    len: u64,
    is_mapped: bool,
    /// Dropped only after its memory is unmapped.
    keep: ManuallyDrop<K>,
}

impl<K> Mapping<K> {
    pub(crate) fn new(ioas: &Arc<Ioas>, iova: u64, len: u64, keep: K) -> Self {
        Self { ioas: Arc::clone(ioas), iova, len, is_mapped: true, keep: ManuallyDrop::new(keep) }
    }

    /// Returns the IOVA of the first byte.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Returns the length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the address space that contains the mapping.
    pub fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// Returns the owner of the memory.
    pub fn memory(&self) -> &K {
        &self.keep
    }

    /// Unmaps the memory and returns its owner. Dropping the mapping also unmaps it, but only logs errors.
    ///
    /// # Errors
    /// When the kernel does not unmap the memory. Its owner is then never dropped, so that the memory stays valid.
    pub fn unmap(mut self) -> Result<K> {
        self.release()?;
        // SAFETY: `is_mapped` is false, so drop does not use `keep`.
        Ok(unsafe { ManuallyDrop::take(&mut self.keep) })
    }

    /// Leaves the memory mapped for another process that uses the same open file, and returns its owner.
    pub fn leave(mut self) -> K {
        self.is_mapped = false;
        // SAFETY: `is_mapped` is false, so drop does not use `keep`.
        unsafe { ManuallyDrop::take(&mut self.keep) }
    }

    /// Unmaps the memory. Drop does not try again, even if this fails.
    fn release(&mut self) -> Result<()> {
        self.is_mapped = false;
        // SAFETY: the mapping is not used afterwards.
        let unmapped = unsafe { self.ioas.unmap(self.iova, self.len) }?;
        if unmapped == self.len {
            return Ok(());
        }
        let operation = Operation::Unmap { len: self.len, iova: self.iova };
        Err(Error::Protocol { operation, why: "the kernel unmapped a different number of bytes" })
    }

    /// Returns the physical address of byte `offset` of the mapping, and how many of the `len` bytes from
    /// there are contiguous. Intended for devices without an IOMMU (`IOMMU_IOAS_NOIOMMU_GET_PA`, Linux 7.3).
    /// The mapping pins the pages, so the address remains valid.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_RAWIO`; `EOPNOTSUPP` when no device without an IOMMU is attached.
    /// [`Error::Argument`] when `len` is 0 or the bytes exceed the mapping.
    pub fn physical(&self, offset: u64, len: u64) -> Result<Physical> {
        let operation = Operation::PhysicalAddress;
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::Argument { operation, why: "the range is empty or exceeds the mapping" });
        }
        let mut query = sys::iommu_ioas_noiommu_get_pa {
            ioas_id: self.ioas.id(),
            iova: self.iova + offset,
            length: len,
            ..Default::default()
        };
        // SAFETY: the argument has no addresses of this process.
        unsafe { self.ioas.iommufd().call(&mut query) }.map_err(|errno| operation.failed(errno))?;
        Ok(Physical { address: query.out_phys, len: query.length })
    }

    /// Returns the physical address of each page of `page_size` bytes, for devices without an IOMMU.
    ///
    /// # Errors
    /// As for [`Mapping::physical`]; [`Error::NotContiguous`] when a page is not physically contiguous.
    pub fn physical_pages(&self, page_size: u64) -> Result<Vec<u64>> {
        let pages = self.len.checked_div(page_size).unwrap_or(0);
        (0..pages).map(|page| self.physical_page(page * page_size, page_size)).collect()
    }

    /// Returns the physical address of the `page_size` bytes at `offset`. The kernel may stop at the end of a
    /// page table entry, so that the address of a huge page takes several calls.
    fn physical_page(&self, offset: u64, page_size: u64) -> Result<u64> {
        let first = self.physical(offset, page_size)?;
        let mut contiguous = first.len;
        while contiguous < page_size {
            let next = self.physical(offset + contiguous, page_size - contiguous)?;
            if next.len == 0 || next.address != first.address + contiguous {
                return Err(Error::NotContiguous { page: page_size, contiguous });
            }
            contiguous += next.len;
        }
        Ok(first.address)
    }
}

impl<K> Drop for Mapping<K> {
    fn drop(&mut self) {
        if !self.is_mapped {
            return;
        }
        match self.release() {
            // SAFETY: the memory is unmapped, and `keep` is dropped once, here.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.keep) },
            Err(error) => tracing::error!("{error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{mock_kernel, read, write};
    use nix::errno::Errno;

    /// Returns a mapping of 4 KiB pages that start at 0x8000_0000, with a hole after the fourth page.
    fn mapping() -> Mapping {
        let iommufd = mock_kernel(|name, bytes| {
            if name == "IOMMU_IOAS_NOIOMMU_GET_PA" {
                let mut query: sys::iommu_ioas_noiommu_get_pa = read(bytes);
                assert_eq!((query.size, query.flags, query.ioas_id), (40, 0, 0));
                let offset = query.iova - 0x10_0000;
                query.out_phys = 0x8000_0000 + offset + if offset < 0x4000 { 0 } else { 0x1000 };
                if offset < 0x4000 {
                    query.length = query.length.min(0x4000 - offset);
                }
                // A page table entry covers 8 KiB.
                query.length = query.length.min(0x2000 - offset % 0x2000);
                write(bytes, &query);
            }
            Ok(())
        });
        Mapping::new(&iommufd.ioas_alloc().unwrap(), 0x10_0000, 0x8000, ())
    }

    #[test]
    fn physical_addresses_are_those_of_contiguous_bytes() {
        let mapping = mapping();
        assert_eq!(mapping.physical(0x3000, 0x3000), Ok(Physical { address: 0x8000_3000, len: 0x1000 }));
        let pages = mapping.physical_pages(0x2000).unwrap();
        assert_eq!(pages, [0x8000_0000, 0x8000_2000, 0x8000_5000, 0x8000_7000]);
        assert_eq!(mapping.physical_pages(0x4000).unwrap(), [0x8000_0000, 0x8000_5000]);
        assert_eq!(
            mapping.physical_pages(0x8000),
            Err(Error::NotContiguous { page: 0x8000, contiguous: 0x4000 })
        );
        assert_eq!(mapping.physical_pages(0), Ok(vec![]));
        for (offset, len) in [(0, 0), (0x7fff, 2), (u64::MAX, 1)] {
            assert!(matches!(mapping.physical(offset, len), Err(Error::Argument { .. })));
        }
    }

    #[test]
    fn a_count_of_unmapped_bytes_that_is_wrong_is_an_error() {
        let iommufd = mock_kernel(|name, bytes| {
            if name == "IOMMU_IOAS_UNMAP" {
                let unmap: sys::iommu_ioas_unmap = read(bytes);
                write(bytes, &sys::iommu_ioas_unmap { length: 1, ..unmap });
            }
            if name == "IOMMU_IOAS_MAP" { Err(Errno::EEXIST) } else { Ok(()) }
        });
        let ioas = iommufd.ioas_alloc().unwrap();
        let error = Mapping::new(&ioas, 0, 4096, ()).unmap().unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}");
    }
}
