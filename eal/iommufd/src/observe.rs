//! Hook to count, time or trace the ioctls of this crate.

use std::io;
use std::sync::OnceLock;

use nix::errno::Errno;

/// Function that receives the name of an ioctl (`IOMMU_IOAS_MAP`), or `open` for the device node, and a
/// closure that makes the call and returns its error, if it fails. The observer calls the closure once.
pub type Observer = fn(name: &'static str, call: &mut dyn FnMut() -> Option<Errno>);

/// Result of a call, as far as an observer sees it.
pub trait Outcome {
    /// Error of a call that failed.
    fn errno(&self) -> Option<Errno>;
}

impl<T> Outcome for Result<T, Errno> {
    fn errno(&self) -> Option<Errno> {
        self.as_ref().err().copied()
    }
}

impl<T> Outcome for io::Result<T> {
    fn errno(&self) -> Option<Errno> {
        self.as_ref().err().and_then(io::Error::raw_os_error).map(Errno::from_raw)
    }
}

/// The call cannot fail.
impl Outcome for () {
    fn errno(&self) -> Option<Errno> {
        None
    }
}

/// The call's result is elsewhere, and this is its error.
impl Outcome for Option<Errno> {
    fn errno(&self) -> Option<Errno> {
        *self
    }
}

static OBSERVER: OnceLock<Observer> = OnceLock::new();

/// Routes all further ioctls of this crate, and each open of the device node, through `observer`, for the
/// whole process. Returns false if an observer is already set, in which case that observer remains. Without
/// an observer, a call costs one check.
#[must_use = "`false` means that another observer receives the calls"]
pub fn observe(observer: Observer) -> bool {
    OBSERVER.set(observer).is_ok()
}

/// Makes a call through the observer, if one is set. Intended for other crates whose calls belong to the same count.
pub fn observed<T: Outcome>(name: &'static str, mut call: impl FnMut() -> T) -> T {
    let Some(observer) = OBSERVER.get() else { return call() };
    let mut result = None;
    observer(name, &mut || result.insert(call()).errno());
    // An observer that does not make the call must not suppress it, so the call is made here.
    result.unwrap_or_else(call)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    static SEEN: Mutex<Vec<(&str, Option<Errno>)>> = Mutex::new(Vec::new());

    #[test]
    fn the_first_observer_sees_every_call_and_cannot_lose_one() {
        assert!(observe(|name, call| {
            let errno = if name == "seven" { None } else { call() };
            if matches!(name, "twenty" | "seven" | "failing") {
                SEEN.lock().unwrap().push((name, errno));
            }
        }));
        assert!(!observe(|_, _| {}));
        let answers = |name, answer| observed(name, || answer);
        assert_eq!((answers("twenty", Ok(20)), answers("seven", Ok(7))), (Ok(20), Ok(7)));
        assert_eq!(answers("failing", Err(Errno::EBUSY)), Err(Errno::EBUSY));
        let seen = [("twenty", None), ("seven", None), ("failing", Some(Errno::EBUSY))];
        assert_eq!(*SEEN.lock().unwrap(), seen);
    }
}
