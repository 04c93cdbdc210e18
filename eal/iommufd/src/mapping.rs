//! What is mapped in an address space.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use crate::error::{Error, Operation, Result};
use crate::{Ioas, sys};

/// Bytes that follow each other in physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Physical {
    /// Physical address of the first one.
    pub address: u64,
    /// How many there are.
    pub len: u64,
}

/// Memory that is mapped in an [`Ioas`]. Unmapped on drop, before `K`, the owner of the memory, is dropped.
///
/// If the kernel refuses to unmap, an error is logged and `K` is never dropped: a device may still reach the memory.
#[must_use = "dropping it unmaps the memory"]
#[derive(Debug)]
pub struct Mapping<K = ()> {
    ioas: Arc<Ioas>,
    iova: u64,
    len: u64,
    is_mapped: bool,
    /// Dropped only when nothing maps its memory.
    keep: ManuallyDrop<K>,
}

impl<K> Mapping<K> {
    pub(crate) fn new(ioas: &Arc<Ioas>, iova: u64, len: u64, keep: K) -> Self {
        Self { ioas: Arc::clone(ioas), iova, len, is_mapped: true, keep: ManuallyDrop::new(keep) }
    }

    /// Device address of the first byte.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// How many bytes there are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where it is mapped.
    pub fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// The owner of the memory.
    pub fn memory(&self) -> &K {
        &self.keep
    }

    /// Unmaps, and gives the owner of the memory back. Dropping does the same and logs what fails.
    ///
    /// # Errors
    /// When the kernel refuses. The owner is never dropped then, so that the memory stays as it is.
    pub fn unmap(mut self) -> Result<K> {
        self.release()?;
        // SAFETY: `is_mapped` is false, so drop leaves the owner alone.
        Ok(unsafe { ManuallyDrop::take(&mut self.keep) })
    }

    /// Tries once; whatever comes of it, drop does not try again.
    fn release(&mut self) -> Result<()> {
        self.is_mapped = false;
        // SAFETY: the mapping is used no more.
        let unmapped = unsafe { self.ioas.unmap(self.iova, self.len) }?;
        if unmapped == self.len {
            return Ok(());
        }
        let operation = Operation::Unmap { len: self.len, iova: self.iova };
        Err(Error::Protocol { operation, why: "the kernel unmapped another number of bytes" })
    }

    /// Physical address of the byte `offset` of the mapping, and how many of the following `len` bytes are contiguous with
    /// it, for devices without an IOMMU (`IOMMU_IOAS_NOIOMMU_GET_PA`, Linux 7.3). The mapping pins the pages, so the address
    /// stays right.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_RAWIO`; `EOPNOTSUPP` when no device without IOMMU is attached. [`Error::Argument`] when the
    /// mapping has no such bytes.
    pub fn physical(&self, offset: u64, len: u64) -> Result<Physical> {
        let operation = Operation::PhysicalAddress;
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::Argument { operation, why: "the mapping has no such bytes" });
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

    /// Physical address of each page of `page_size` bytes, for devices without an IOMMU.
    ///
    /// # Errors
    /// As for [`Mapping::physical`]; [`Error::NotContiguous`] when a page is not contiguous.
    pub fn physical_pages(&self, page_size: u64) -> Result<Vec<u64>> {
        let pages = self.len.checked_div(page_size).unwrap_or(0);
        (0..pages).map(|page| self.physical_page(page * page_size, page_size)).collect()
    }

    /// Physical address of the `page_size` bytes from `offset` on. The kernel may look no further than an entry of its
    /// table, and give the address of a large page in pieces.
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
            // SAFETY: dropped once, here: the memory is unmapped.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.keep) },
            Err(error) => tracing::error!("{error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{answers, read, write};
    use nix::errno::Errno;

    /// Pages of 4 KiB from 0x8000_0000 on, with a hole behind the fourth.
    fn mapping() -> Mapping {
        let iommufd = answers(|name, bytes| {
            if name == "IOMMU_IOAS_NOIOMMU_GET_PA" {
                let mut query: sys::iommu_ioas_noiommu_get_pa = read(bytes);
                assert_eq!((query.size, query.flags, query.ioas_id), (40, 0, 0));
                let offset = query.iova - 0x10_0000;
                query.out_phys = 0x8000_0000 + offset + if offset < 0x4000 { 0 } else { 0x1000 };
                if offset < 0x4000 {
                    query.length = query.length.min(0x4000 - offset);
                }
                // As an entry of 8 KiB gives it.
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
        let iommufd = answers(|name, bytes| {
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
