//! Locks and atomics for data that several threads use. They are those of std or, with `--cfg loom`, those of
//! [loom]. The models next to the code then run it in every possible interleaving of its threads
//! (`scripts/sanitize loom`).
//!
//! Memory that a device or another process writes has no models. Code that accesses it uses std directly.
//!
//! [loom]: https://docs.rs/loom

mod biased;
#[cfg(loom)]
mod loomed;

pub use biased::{BiasedGuard, BiasedLock, Owner, OwnerGuard};

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
