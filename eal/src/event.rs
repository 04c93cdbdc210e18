//! Events for a thread that sleeps until a device, the kernel or another thread signals one (eventfd(2)).

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};

/// Event that stays signaled until it is taken. Its clones are the same event.
#[derive(Clone, Debug)]
pub struct Event {
    fd: Arc<EventFd>,
    /// Stands in for the count of the eventfd, which loom does not see, and for the lock that the kernel takes.
    #[cfg(loom)]
    signaled: Arc<crate::sync::Mutex<bool>>,
}

impl Event {
    /// Creates an event that is not signaled.
    ///
    /// # Errors
    /// `Os` if the process or the machine has too many open files.
    pub fn new() -> Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let fd = event.map_err(|errno| Error::os("cannot create an eventfd", errno))?;
        Ok(Self {
            fd: Arc::new(fd),
            #[cfg(loom)]
            signaled: Arc::new(crate::sync::Mutex::new(false)),
        })
    }

    /// Returns the event of an eventfd that another process has passed.
    pub fn from_fd(fd: OwnedFd) -> Self {
        // SAFETY: the event reads and writes 8 bytes of its own, which no file can turn into an access to other memory.
        let fd = unsafe { EventFd::from_owned_fd(fd) };
        Self {
            fd: Arc::new(fd),
            #[cfg(loom)]
            signaled: Arc::new(crate::sync::Mutex::new(false)),
        }
    }

    /// Signals the event. This is async-signal-safe.
    pub fn signal(&self) {
        #[cfg(loom)]
        let _ = self.signaled.lock().map(|mut signaled| *signaled = true);
        // The kernel fails only if the count cannot grow, and then the event is signaled. A tracer or a filter of system
        // calls may let it fail with another error, once, and somebody would wait for ever.
        #[cfg(not(loom))]
        if self.fd.write(1).is_err_and(|errno| errno != nix::errno::Errno::EAGAIN) {
            let _ = self.fd.write(1);
        }
    }

    /// Ends the signal. Returns whether the event was signaled.
    pub fn take(&self) -> bool {
        #[cfg(loom)]
        return self.signaled.lock().is_ok_and(|mut signaled| std::mem::take(&mut *signaled));
        #[cfg(not(loom))]
        self.fd.read().is_ok()
    }
}

impl Event {
    /// Duplicates the event as the type that rust-vmm's crates take.
    ///
    /// # Errors
    /// `Os` if the process or the machine has too many open files.
    pub fn to_vmm(&self) -> Result<vmm_sys_util::eventfd::EventFd> {
        let fd = self.fd.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|error| Error::io("cannot duplicate an eventfd", &error))?;
        // SAFETY: the descriptor is that of an eventfd, and nothing else owns it.
        Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd.into_raw_fd()) })
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether an event is signaled. Does not take it.
pub fn is_signaled(event: impl AsFd) -> bool {
    poll(&mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
}

/// Waits until one of `events` is signaled or `longest` has passed, rounded up to milliseconds. Takes no event. A
/// signal that the thread handles ends the wait too.
pub fn wait_for_any(events: impl IntoIterator<Item: AsFd>, longest: Option<Duration>) {
    let events: Vec<_> = events.into_iter().collect();
    let mut fds: Vec<_> = events.iter().map(|event| PollFd::new(event.as_fd(), PollFlags::POLLIN)).collect();
    let longest = longest.map(|time| time.as_micros().div_ceil(1000));
    let timeout =
        longest.map_or(PollTimeout::NONE, |ms| PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX));
    // Fails only if the wait was interrupted or the kernel lacks memory. The caller looks for itself.
    let _ = poll(&mut fds, timeout);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri does not support poll")]
    fn an_event_is_signaled_until_it_is_taken() {
        let (event, other) = (Event::new().unwrap(), Event::new().unwrap());
        assert!(!event.take());
        let clone = event.clone();
        let signals = std::thread::spawn(move || {
            clone.signal();
            clone.signal();
        });
        // Without a signal, these would never return.
        wait_for_any([&other, &event], None);
        wait_for_any([&event], None);
        signals.join().unwrap();
        assert!(is_signaled(&event) && !is_signaled(&other));
        assert!(event.take() && !event.take() && !other.take());
        wait_for_any([&event], Some(Duration::from_micros(1)));
    }
}
