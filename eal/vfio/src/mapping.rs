//! Mappings in a container.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use crate::Container;
use crate::error::{Error, Operation, Result};

/// Memory that is mapped in a [`Container`]. On drop, the memory is unmapped, and then `K`, the owner of the
/// memory, is dropped.
///
/// If the unmap fails, an error is logged and `K` is never dropped, because a device may still access the memory.
#[must_use = "dropping it unmaps the memory"]
#[derive(Debug)]
pub struct Mapping<K> {
    container: Arc<Container>,
    iova: u64,
    len: u64,
    is_mapped: bool,
    /// Dropped only after its memory is unmapped.
    keep: ManuallyDrop<K>,
}

impl<K> Mapping<K> {
    pub(crate) fn new(container: &Arc<Container>, iova: u64, len: u64, keep: K) -> Self {
        Self { container: Arc::clone(container), iova, len, is_mapped: true, keep: ManuallyDrop::new(keep) }
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

    /// Unmaps the memory and returns its owner. Dropping the mapping also unmaps it, but only logs errors.
    ///
    /// # Errors
    /// When the kernel does not unmap the memory. Its owner is then never dropped, so that the memory stays valid.
    pub fn unmap(mut self) -> Result<K> {
        self.release()?;
        // SAFETY: `is_mapped` is false, so drop does not use `keep`.
        Ok(unsafe { ManuallyDrop::take(&mut self.keep) })
    }

    /// Unmaps the memory. Drop does not try again, even if this fails.
    fn release(&mut self) -> Result<()> {
        self.is_mapped = false;
        // SAFETY: the mapping is not used afterwards.
        if unsafe { self.container.unmap(self.iova, self.len) }? == self.len {
            return Ok(());
        }
        let operation = Operation::Unmap { len: self.len, iova: self.iova };
        Err(Error::Protocol { operation, why: "the kernel unmapped a different number of bytes" })
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
