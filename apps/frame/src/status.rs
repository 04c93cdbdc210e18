//! State of a port that any thread may read while lcores forward.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vireo_drivers::port::Link;

/// State of a port. The thread that owns the port keeps it up to date.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PortStatus {
    /// Whether the port is open. If not, the kernel has its device back.
    pub(crate) is_open: bool,
    /// Whether its queues run.
    pub(crate) is_started: bool,
    /// Whether it receives every frame.
    pub(crate) is_promiscuous: bool,
    /// Its link, unless it is closed or restarts.
    pub(crate) link: Option<Link>,
    /// Number of its restarts.
    pub(crate) restarts: u64,
    /// Number of changes of its link.
    pub(crate) link_changes: u64,
}

/// State of a port, shared by all clones.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedStatus(Arc<Mutex<PortStatus>>);

impl SharedStatus {
    /// Returns the current state.
    pub(crate) fn get(&self) -> PortStatus {
        *self.lock()
    }

    /// Changes the state.
    pub(crate) fn update(&self, change: impl FnOnce(&mut PortStatus)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, PortStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
