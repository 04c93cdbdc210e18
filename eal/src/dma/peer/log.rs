//! Log in which the device of a migrating guest marks the pages that it has written.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::mapping::PeerMapping;
use crate::error::Result;

/// Bytes that a bit of the log covers (vhost-user, "Migration": `VHOST_LOG_PAGE`).
const PAGE: u64 = 0x1000;

/// A log in a frontend's file: one bit per page of guest addresses. The frontend clears each bit that it has
/// read.
#[derive(Debug)]
pub struct PeerLog {
    /// First byte, valid for `len` bytes while `_mapping` lives.
    bits: NonNull<u8>,
    len: u64,
    _mapping: PeerMapping,
}

// SAFETY: the mapping belongs to the process, not to a thread. Nothing but the log uses it, and only by byte
// atomics.
unsafe impl Send for PeerLog {}
// SAFETY: as above.
unsafe impl Sync for PeerLog {}

impl PeerLog {
    /// Maps the log of `len` bytes at `offset` of `file`. The mapping does not need the file to stay open.
    ///
    /// # Errors
    /// `Protocol` if the log is not within its file. Otherwise the error of `mmap`.
    pub fn map(file: File, offset: u64, len: u64) -> Result<Arc<Self>> {
        let (mapping, bits) = PeerMapping::shared(&file.into(), offset, len)?;
        Ok(Arc::new(Self { bits, len, _mapping: mapping }))
    }

    /// Marks the pages of the `len` bytes at the guest address `guest`, which the caller has already written.
    /// Pages beyond the log are ignored.
    pub fn mark(&self, guest: u64, len: usize) {
        let Some(last) = (len as u64).checked_sub(1) else { return };
        // The length of the log bounds the loop.
        let end = (guest.saturating_add(last) / PAGE).min(self.len.saturating_mul(8).saturating_sub(1));
        for page in guest / PAGE..=end {
            // SAFETY: the byte is within the log, because `page` is below the log's number of bits.
            let byte = unsafe { AtomicU8::from_ptr(self.bits.add((page / 8) as usize).as_ptr()) };
            // The write of the page must be visible before its mark.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_pages_of_what_was_written_are_marked_and_no_others() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let log = PeerLog::map(file.try_clone().unwrap(), 0x1800, 4).unwrap();
        log.mark(0, 0);
        log.mark(0x1fff, 2);
        log.mark(0x8000, 0x2000);
        for beyond in [(0x1f_ffff, 0x10_0000), (0x20_0000, 1), (u64::MAX, usize::MAX), (u64::MAX - 5, 3)] {
            log.mark(beyond.0, beyond.1);
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes[0x1800..0x1804], [0b110, 0b11, 0, 0]);
        assert!(bytes[..0x1800].iter().chain(&bytes[0x1804..]).all(|byte| *byte == 0));
        assert!(PeerLog::map(file.try_clone().unwrap(), 0x1ffd, 4).is_err());
        assert!(PeerLog::map(file, 0, 0).is_err());
    }
}
