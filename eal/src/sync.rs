//! Locks and atomics of what several threads use. They are std's; under `--cfg loom` they are those of [loom], and the
//! models beside the code run it in every order in which its threads can meet (`scripts/sanitize loom`).
//!
//! What a device or another process writes has no model here, and names std itself.
//!
//! [loom]: https://docs.rs/loom

#[cfg(loom)]
mod loomed;

#[cfg(not(loom))]
pub(crate) use crossbeam::queue::ArrayQueue;
#[cfg(not(loom))]
pub use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(loom)]
pub(crate) use loomed::ArrayQueue;
#[cfg(loom)]
pub use {
    loom::sync::{Condvar, Mutex, MutexGuard, atomic},
    loom::{skip_branch, thread},
    loomed::model,
};
