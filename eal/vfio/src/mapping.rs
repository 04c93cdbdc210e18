//! What is mapped in a container.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use crate::Container;
use crate::error::{Error, Operation, Result};

/// Memory that is mapped in a [`Container`]. Unmapped on drop, before `K`, the owner of the memory, is dropped.
///
/// If the kernel refuses to unmap, an error is logged and `K` is never dropped: a device may still reach the memory.
#[must_use = "dropping it unmaps the memory"]
#[derive(Debug)]
pub struct Mapping<K> {
    container: Arc<Container>,
    iova: u64,
    len: u64,
    is_mapped: bool,
    /// Dropped only when nothing maps its memory.
    keep: ManuallyDrop<K>,
}

impl<K> Mapping<K> {
    pub(crate) fn new(container: &Arc<Container>, iova: u64, len: u64, keep: K) -> Self {
        Self { container: Arc::clone(container), iova, len, is_mapped: true, keep: ManuallyDrop::new(keep) }
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
        if unsafe { self.container.unmap(self.iova, self.len) }? == self.len {
            return Ok(());
        }
        let operation = Operation::Unmap { len: self.len, iova: self.iova };
        Err(Error::NotReported { operation, why: "the kernel unmapped another number of bytes" })
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
