//! PeerMapping of a file that a peer has sent.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::{SFlag, fstat};

use crate::error::{Error, ErrorKind, Result};
use crate::mem::page_size;

/// A part of a file, mapped until the value is dropped, and the bytes of it that belong to rings.
#[derive(Debug)]
pub(super) struct PeerMapping {
    address: NonNull<c_void>,
    len: usize,
    /// Addresses of the bytes that belong to rings, one range per ring.
    rings: Mutex<Vec<Range<usize>>>,
}

// SAFETY: a mapping belongs to the process, not to a thread. The value gives no access to it and only unmaps
// it. A mutex protects the rest.
unsafe impl Send for PeerMapping {}
// SAFETY: as above.
unsafe impl Sync for PeerMapping {}

impl Drop for PeerMapping {
    fn drop(&mut self) {
        // SAFETY: `address` and `len` describe a mapping that this value made and that nothing else unmaps.
        // Everything that points into the mapping holds this value, or borrows an owner of it.
        if let Err(errno) = unsafe { munmap(self.address, self.len) } {
            tracing::error!("cannot unmap {} bytes of a frontend's memory: {errno}", self.len);
        }
    }
}

impl PeerMapping {
    /// Maps `len` bytes of a file from `offset` on, shared. Returns the mapping and the address of the first
    /// byte.
    pub(super) fn shared(fd: &OwnedFd, offset: u64, len: u64) -> Result<(Self, NonNull<u8>)> {
        let what = || format!("cannot map {} KiB of a frontend's memory", len >> 10);
        let refused = |why: &str| Error::new(ErrorKind::Protocol, what(), why);
        let stat = fstat(fd).map_err(|errno| Error::os(what(), errno))?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(refused("its descriptor is not a regular file"));
        }
        let end = offset.checked_add(len).filter(|_| len > 0);
        let end = end.filter(|end| *end <= stat.st_size as u64).ok_or_else(|| {
            refused("its file is shorter than the region: an access beyond its end would raise SIGBUS")
        })?;
        // A hugetlb file is mapped in whole pages of its own size, which is its block size.
        let small = page_size() as u64;
        let page =
            Some(stat.st_blksize as u64).filter(|size| size.is_power_of_two()).unwrap_or(small).max(small);
        let start = offset & !(page - 1);
        let length = end.checked_next_multiple_of(page).and_then(|end| usize::try_from(end - start).ok());
        let length = length.and_then(NonZeroUsize::new).ok_or_else(|| refused("it is too large"))?;
        let from = i64::try_from(start).map_err(|_| refused("its offset is too large"))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no memory of this process.
        let address = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, from) }
            .map_err(|errno| Error::os(what(), errno))?;
        // SAFETY: `start` is not above `offset`, and the mapping extends from `start` to `end` or beyond.
        let base = unsafe { address.cast::<u8>().add((offset - start) as usize) };
        Ok((Self { address, len: length.get(), rings: Mutex::default() }, base))
    }

    /// Anonymous counterpart of [`PeerMapping::shared`]. Miri cannot map files.
    #[cfg(test)]
    pub(super) fn anonymous(len: u64) -> (Self, NonNull<u8>) {
        let length = NonZeroUsize::new(len as usize).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no memory of this process.
        let address =
            unsafe { nix::sys::mman::mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }.unwrap();
        (Self { address, len: length.get(), rings: Mutex::default() }, address.cast())
    }

    /// Reserves `bytes` for a ring. Returns false if another ring has some of them.
    pub(super) fn take(&self, bytes: Range<usize>) -> bool {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = rings.iter().all(|ring| ring.end <= bytes.start || bytes.end <= ring.start);
        if is_free {
            rings.push(bytes);
        }
        is_free
    }

    /// Releases the bytes that [`PeerMapping::take`] has reserved.
    pub(super) fn release(&self, bytes: &Range<usize>) {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner).retain(|ring| ring != bytes);
    }
}
