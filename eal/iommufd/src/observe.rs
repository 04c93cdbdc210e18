//! A look at this crate's ioctls from outside, to count or time them.

use std::sync::OnceLock;

/// Gets the name of an ioctl (`IOMMU_IOAS_MAP`), or `open` for the device node, and a closure that makes the call. An
/// observer calls the closure once.
pub type Observer = fn(name: &'static str, call: &mut dyn FnMut());

static OBSERVER: OnceLock<Observer> = OnceLock::new();

/// Has `observer` make all further ioctls of this crate, and open the node, in the whole process. False when there is another observer
/// already, which then stays. Without one, a call costs the look whether there is one.
#[must_use = "false when another observer gets the calls"]
pub fn observe(observer: Observer) -> bool {
    OBSERVER.set(observer).is_ok()
}

/// Makes a call, by way of the observer if there is one: for crates beside this one, whose calls belong to the same count.
pub fn observed<T>(name: &'static str, mut call: impl FnMut() -> T) -> T {
    let Some(observer) = OBSERVER.get() else { return call() };
    let mut result = None;
    observer(name, &mut || result = Some(call()));
    // An observer that does not make the call changes nothing but its own figures.
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
