//! Counts and times the ioctls to VFIO and iommufd, because what a mode costs is shown by them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Tsc;

static CALLS: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);

/// Ioctls made to VFIO and iommufd by this process so far.
pub fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// Time that this process has spent in them: what is left of a call of ours is our own share.
pub fn time() -> Duration {
    Duration::from_nanos(Tsc::to_nanos(TICKS.load(Ordering::Relaxed)))
}

/// Makes one ioctl.
pub(crate) fn counted<T>(ioctl: impl FnOnce() -> T) -> T {
    let since = Tsc::now();
    let result = ioctl();
    TICKS.fetch_add(Tsc::now().wrapping_sub(since), Ordering::Relaxed);
    CALLS.fetch_add(1, Ordering::Relaxed);
    result
}
