//! Hook to count or time the ioctls of this crate.

use std::sync::OnceLock;

/// Function that receives the name of an ioctl (`IOMMU_IOAS_MAP`), or `open` for the device node, and a
/// closure that makes the call. The observer calls the closure once.
pub type Observer = fn(name: &'static str, call: &mut dyn FnMut());

static OBSERVER: OnceLock<Observer> = OnceLock::new();

/// Routes all further ioctls of this crate, and each open of the device node, through `observer`, for the
/// whole process. Returns false if an observer is already set, in which case that observer remains. Without
/// an observer, a call costs one check.
#[must_use = "`false` means that another observer receives the calls"]
pub fn observe(observer: Observer) -> bool {
    OBSERVER.set(observer).is_ok()
}

/// Makes a call through the observer, if one is set. Intended for other crates whose calls belong to the same count.
pub fn observed<T>(name: &'static str, mut call: impl FnMut() -> T) -> T {
    let Some(observer) = OBSERVER.get() else { return call() };
    let mut result = None;
    observer(name, &mut || result = Some(call()));
    // An observer that does not make the call must not suppress it, so the call is made here.
    result.unwrap_or_else(call)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    static SEEN: Mutex<Vec<&str>> = Mutex::new(Vec::new());

    #[test]
    fn the_first_observer_sees_every_call_and_cannot_lose_one() {
        assert!(observe(|name, call| {
            if matches!(name, "twenty" | "seven") {
                SEEN.lock().unwrap().push(name);
            }
            if name != "seven" {
                call();
            }
        }));
        assert!(!observe(|_, _| {}));
        assert_eq!((observed("twenty", || 20), observed("seven", || 7)), (20, 7));
        assert_eq!(*SEEN.lock().unwrap(), ["twenty", "seven"]);
    }
}
