//! Counts the ioctls to VFIO and iommufd, because what a mode costs is shown as a count.

use std::sync::atomic::{AtomicU64, Ordering};

static CALLS: AtomicU64 = AtomicU64::new(0);

/// Ioctls made to VFIO and iommufd by this process so far.
pub fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// Notes one ioctl and passes its result on.
pub(crate) fn counted<T>(result: T) -> T {
    CALLS.fetch_add(1, Ordering::Relaxed);
    result
}
