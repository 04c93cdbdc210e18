//! Counts and times the calls to VFIO and iommufd, by name, because what a mode costs is shown by them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use crate::clock::{Tsc, thread_time};

/// Calls of one name, by all threads of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calls {
    /// Name of the ioctl, such as `VFIO_IOMMU_MAP_DMA`; `open` of a device node; `close` of a device.
    pub name: &'static str,
    /// How many.
    pub calls: u64,
    /// Time in them.
    pub time: Duration,
    /// Of that, what the threads had on a CPU while [`split_waiting`] was on.
    pub worked: Duration,
}

static TABLE: Mutex<Vec<Calls>> = Mutex::new(Vec::new());
/// What reading a thread's clock takes, in nanoseconds; 0 while waiting is not split off.
static READING: AtomicU64 = AtomicU64::new(0);

/// Those of iommufd are counted from the first look at the table on, which every count begins with.
fn lock() -> MutexGuard<'static, Vec<Calls>> {
    static OBSERVED: Once = Once::new();
    OBSERVED.call_once(|| {
        if !vireo_iommufd::observe(|name, call| counted(name, call)) {
            tracing::warn!(
                "calls to VFIO and iommufd are not counted: this process has another observer of them"
            );
        }
    });
    // A panic cannot leave an entry half changed.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls by this process so far, by name in the order of the first call.
pub fn table() -> Vec<Calls> {
    lock().clone()
}

/// Calls that [`table`] has now and did not have at `before`.
pub fn since(before: &[Calls]) -> Vec<Calls> {
    let mut table = table();
    // Names are only ever added, at the end.
    for (now, before) in table.iter_mut().zip(before) {
        now.calls -= before.calls;
        now.time -= before.time;
        now.worked -= before.worked;
    }
    table.retain(|now| now.calls > 0);
    table
}

/// Number of calls by this process so far.
pub fn calls() -> u64 {
    lock().iter().map(|entry| entry.calls).sum()
}

/// Time that this process has spent in them: what is left of a call of ours is our own share.
pub fn time() -> Duration {
    lock().iter().map(|entry| entry.time).sum()
}

/// Begins or ends to fill [`Calls::worked`], for which each call takes two more to read the thread's clock.
pub fn split_waiting(on: bool) {
    let reading = |_| {
        let before = thread_time();
        thread_time().saturating_sub(before).as_nanos() as u64
    };
    let mut readings = [(); 15].map(reading);
    // The median: an interrupt comes now and then.
    readings.sort_unstable();
    READING.store(if on { readings[7].max(1) } else { 0 }, Ordering::Relaxed);
}

/// Makes one call.
pub(crate) fn counted<T>(name: &'static str, call: impl FnOnce() -> T) -> T {
    let reading = READING.load(Ordering::Relaxed);
    let before = (reading > 0).then(thread_time);
    let since = Tsc::now();
    let result = call();
    let ticks = Tsc::now().wrapping_sub(since);
    let worked = before.map_or(Duration::ZERO, |before| {
        thread_time().saturating_sub(before).saturating_sub(Duration::from_nanos(reading))
    });
    let time = Duration::from_nanos(Tsc::to_nanos(ticks));
    let mut table = lock();
    let at = table.iter().position(|entry| entry.name == name).unwrap_or_else(|| {
        table.push(Calls { name, calls: 0, time: Duration::ZERO, worked: Duration::ZERO });
        table.len() - 1
    });
    let entry = &mut table[at];
    entry.calls += 1;
    entry.time += time;
    entry.worked += worked.min(time);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_apart_by_name_and_from_waiting() {
        // Other tests make calls meanwhile, of other names.
        let of = |name: &str, before: &[Calls]| since(before).into_iter().find(|call| call.name == name);
        let nap = Duration::from_millis(20);
        counted("one", || ());
        let before = table();
        assert_eq!(counted("one", || 7), 7);
        counted("one", || std::thread::sleep(nap));
        let one = of("one", &before).unwrap();
        assert_eq!((one.calls, one.worked), (2, Duration::ZERO));
        assert!(one.time >= nap && of("other", &before).is_none());
        split_waiting(true);
        counted("other", || std::thread::sleep(nap));
        counted("work", || {
            let until = thread_time() + nap;
            while thread_time() < until {}
        });
        split_waiting(false);
        let (other, work) = (of("other", &before).unwrap(), of("work", &before).unwrap());
        assert!(other.time >= nap && other.worked < nap / 2, "{other:?}");
        assert!(work.worked >= nap - nap / 10 && work.worked <= work.time, "{work:?}");
        assert!(calls() >= 4 && time() >= 3 * nap);
    }

    #[test]
    fn calls_of_iommufd_are_in_the_table() {
        let before = table();
        assert!(vireo_iommufd::Iommufd::open_at("/dev/null/iommu".as_ref()).is_err());
        assert!(since(&before).iter().any(|call| call.name == "open"));
    }
}
