//! Addresses of this process, reserved before regions are mapped there.

use std::alloc::Layout;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::no_pages;
use crate::error::{Error, ErrorKind, Result};

/// Addresses of this process that one region after the other receives. The rest is unmapped on drop.
#[derive(Debug)]
pub(super) struct Addresses {
    next: NonNull<u8>,
    left: usize,
}

impl Addresses {
    /// Reserves addresses without pages. The first address is a multiple of `align`.
    pub(super) fn reserve(len: usize, align: usize) -> Result<Self> {
        let what = "cannot reserve addresses for packet memory";
        let all = len
            .checked_add(align)
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| Error::os(what, Errno::ENOMEM))?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no memory of this process.
        let start = unsafe { mmap_anonymous(None, all, ProtFlags::PROT_NONE, flags) }
            .map_err(|errno| Error::os(what, errno))?
            .cast::<u8>();
        let mut all = Self { next: start, left: all.get() };
        drop(Self { next: start, left: all.skip(start.align_offset(align)) });
        let behind = all.left - len;
        all.left = len;
        // SAFETY: the mapping has `behind` more bytes.
        drop(Self { next: unsafe { all.next.add(len) }, left: behind });
        Ok(all)
    }

    /// Allocates hugepages that no other process can map.
    pub(super) fn of_anonymous(len: usize, page_size: usize) -> Result<Self> {
        let what = "cannot reserve anonymous hugepages";
        let layout = Layout::from_size_align(len, page_size)
            .map_err(|_| Error::new(ErrorKind::Os, what, "the size is too large"))?;
        // SAFETY: `len` is at least one page, so the layout's size is not zero.
        let pointer = unsafe { hugepage_rs::alloc(layout) };
        let next =
            NonNull::new(pointer).ok_or_else(|| no_pages(Error::os(what, Errno::ENOMEM), len, page_size))?;
        Ok(Self { next, left: len })
    }

    /// Allocates ordinary pages that no other process can map.
    pub(super) fn of_private(len: usize) -> Result<Self> {
        let what = "cannot reserve private memory";
        let length = NonZeroUsize::new(len).ok_or_else(|| Error::os(what, Errno::EINVAL))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no memory of this process.
        let address = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }
            .map_err(|errno| Error::os(what, errno))?;
        Ok(Self { next: address.cast(), left: len })
    }

    /// Advances by `len` bytes, at most to the end. Returns how far.
    pub(super) fn skip(&mut self, len: usize) -> usize {
        let len = len.min(self.left);
        // SAFETY: the mapping has at least `len` bytes left.
        self.next = unsafe { self.next.add(len) };
        self.left -= len;
        len
    }

    /// Returns the address of the next `len` bytes. After [`Addresses::skip`], the caller owns them and
    /// unmaps them.
    pub(super) fn next(&self, len: usize) -> Result<NonNull<u8>> {
        let fits = (len <= self.left).then_some(self.next);
        fits.ok_or_else(|| Error::os("cannot reserve addresses for packet memory", Errno::ENOMEM))
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        if self.left > 0 {
            // SAFETY: these bytes are the rest of a mapping of this value, and no caller received them.
            let _ = unsafe { munmap(self.next.cast::<c_void>(), self.left) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_addresses_are_aligned_and_used_up() {
        let mut addresses = Addresses::reserve(3 << 20, 1 << 20).unwrap();
        let start = addresses.next;
        assert!(start.addr().get().is_multiple_of(1 << 20));
        let pages = [1, 2].map(|pages| {
            let next = addresses.next(pages << 20).unwrap();
            assert_eq!(
                (addresses.next(pages << 20).unwrap(), addresses.skip(pages << 20)),
                (next, pages << 20)
            );
            next
        });
        assert_eq!(pages[1].addr().get() - start.addr().get(), 1 << 20);
        assert!(addresses.next(1).is_err());
        // SAFETY: the test owns the addresses that it took.
        unsafe { munmap(start.cast(), 3 << 20) }.unwrap();
    }
}
