//! Counts and times the calls to VFIO and iommufd by name, because they show what a mode costs, and keeps the first
//! of them one by one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use vireo_iommufd::Outcome;

use crate::clock::{Tsc, thread_time};

/// Calls with one name, by all threads of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calls {
    /// Name of the ioctl, such as `VFIO_IOMMU_MAP_DMA`; `open` of a device node; `close` of a device.
    pub name: &'static str,
    /// Number of calls.
    pub calls: u64,
    /// Time spent in the calls.
    pub time: Duration,
    /// CPU time of the threads in the calls, measured only while [`split_waiting`] is on.
    pub worked: Duration,
}

/// One call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// As in [`Calls::name`].
    pub name: &'static str,
    /// Time from the start of the first call to that of this one.
    pub at: Duration,
    /// Time spent in the call.
    pub time: Duration,
    /// Error of a call that failed.
    pub errno: Option<Errno>,
}

/// Maximum number of calls that [`trace`] returns. A start with a few ports makes fewer.
const TRACED: usize = 1024;

#[derive(Debug)]
struct Log {
    table: Vec<Calls>,
    /// The first calls, each with the value of the TSC at its start.
    trace: Vec<(u64, Call)>,
}

static LOG: Mutex<Log> = Mutex::new(Log { table: Vec::new(), trace: Vec::new() });
/// Cost of reading a thread's clock, in nanoseconds; 0 while `split_waiting` is off.
static CLOCK_COST: AtomicU64 = AtomicU64::new(0);

/// Locks the log. The first call also starts the count of iommufd's calls. Every measurement begins by
/// reading the table, so it misses none of them.
fn lock() -> MutexGuard<'static, Log> {
    static OBSERVED: Once = Once::new();
    OBSERVED.call_once(|| {
        if !vireo_iommufd::observe(|name, call| {
            counted(name, call);
        }) {
            tracing::warn!(
                "calls to VFIO and iommufd are not counted: another observer in this process receives them"
            );
        }
    });
    // A panic cannot leave an entry half updated.
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the calls by this process so far, one entry per name, in the order of the first call.
pub fn table() -> Vec<Calls> {
    lock().table.clone()
}

/// Returns the calls that were made since [`table`] returned `before`.
pub fn since(before: &[Calls]) -> Vec<Calls> {
    let mut table = table();
    // Names are only ever appended.
    for (now, before) in table.iter_mut().zip(before) {
        now.calls -= before.calls;
        now.time -= before.time;
        now.worked -= before.worked;
    }
    table.retain(|now| now.calls > 0);
    table
}

/// Returns the first calls by this process, in the order of their starts, up to 1024 of them.
pub fn trace() -> Vec<Call> {
    let mut trace = lock().trace.clone();
    trace.sort_by_key(|(start, _)| *start);
    let first = trace.first().map_or(0, |(start, _)| *start);
    let at = |start| Duration::from_nanos(Tsc::to_nanos(start - first));
    trace.into_iter().map(|(start, call)| Call { at: at(start), ..call }).collect()
}

/// Number of calls by this process so far.
pub fn calls() -> u64 {
    lock().table.iter().map(|entry| entry.calls).sum()
}

/// Time that this process has spent in these calls. The rest of an operation's time is Vireo's own share.
pub fn time() -> Duration {
    lock().table.iter().map(|entry| entry.time).sum()
}

/// Turns the measurement of [`Calls::worked`] on or off. It adds two reads of the thread's clock to each
/// call.
pub fn split_waiting(on: bool) {
    let reading = |_| {
        let before = thread_time();
        thread_time().saturating_sub(before).as_nanos() as u64
    };
    let mut readings = [(); 15].map(reading);
    // The median ignores readings that an interrupt delayed.
    readings.sort_unstable();
    CLOCK_COST.store(if on { readings[7].max(1) } else { 0 }, Ordering::Relaxed);
}

/// Makes one call, and counts and times it.
pub(crate) fn counted<T: Outcome>(name: &'static str, call: impl FnOnce() -> T) -> T {
    let reading = CLOCK_COST.load(Ordering::Relaxed);
    let before = (reading > 0).then(thread_time);
    let since = Tsc::now();
    let result = call();
    let ticks = Tsc::now().wrapping_sub(since);
    let worked = before.map_or(Duration::ZERO, |before| {
        thread_time().saturating_sub(before).saturating_sub(Duration::from_nanos(reading))
    });
    let time = Duration::from_nanos(Tsc::to_nanos(ticks));
    let mut log = lock();
    if log.trace.len() < TRACED {
        log.trace.push((since, Call { name, at: Duration::ZERO, time, errno: result.errno() }));
    }
    let table = &mut log.table;
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
        // Other tests make calls with other names at the same time.
        let of = |name: &str, before: &[Calls]| since(before).into_iter().find(|call| call.name == name);
        let nap = Duration::from_millis(20);
        counted("one", || ());
        let before = table();
        let answer = Err::<(), _>(Errno::EBUSY);
        assert_eq!(counted("one", || answer), answer);
        let traced = trace();
        assert!(traced.is_sorted_by_key(|call| call.at));
        let ones: Vec<_> = traced.iter().filter(|call| call.name == "one").map(|call| call.errno).collect();
        assert_eq!(ones, [None, Some(Errno::EBUSY)]);
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
