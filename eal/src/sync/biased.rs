//! A lock for a value that an lcore uses in each burst, and other threads seldom.
//!
//! Both sides announce themselves and then look for the other. Between these two steps each needs a barrier, or
//! both could find nobody. The lcore's would be its most expensive instruction, so it has none: a thread that wants
//! the value makes the kernel execute a barrier on all CPUs that run this process (`membarrier(2)`,
//! `MEMBARRIER_CMD_PRIVATE_EXPEDITED`).

use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, PoisonError};

use super::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use super::{Mutex, MutexGuard};

#[cfg(test)]
#[cfg(loom)]
mod models;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;

/// A value that belongs to one [`Owner`] and that other threads may [`lock`](BiasedLock::lock). It has cache lines
/// of its own, because the values of a port may belong to several lcores.
#[repr(align(128))]
pub struct BiasedLock<T> {
    /// Whether the owner uses the value, or is about to find out if it may. Only the owner writes it.
    in_use: AtomicBool,
    /// Number of other threads that wait for the value or have it. While there is one, the owner leaves the value
    /// alone; otherwise it could have the value nearly all of the time.
    wanted: AtomicU32,
    /// Whether there is an owner.
    is_owned: AtomicBool,
    /// Whether the owner executes the barrier, because the kernel has no `membarrier`.
    is_fenced: bool,
    /// Held by the other thread that has the value.
    turn: Mutex<()>,
    value: UnsafeCell<T>,
}

// SAFETY: at any time one thread has access to the value, which is handed from thread to thread.
unsafe impl<T: Send> Sync for BiasedLock<T> {}

impl<T> BiasedLock<T> {
    /// Creates a lock without an owner.
    pub fn new(value: T) -> Self {
        Self {
            in_use: AtomicBool::new(false),
            wanted: AtomicU32::new(0),
            is_owned: AtomicBool::new(false),
            is_fenced: !membarrier::register(),
            turn: Mutex::new(()),
            value: UnsafeCell::new(value),
        }
    }

    /// Makes the caller the owner. `None` while there is another.
    pub fn own(self: &Arc<Self>) -> Option<Owner<T>> {
        let was_owned = self.is_owned.swap(true, Ordering::Acquire);
        (!was_owned).then(|| Owner(Arc::clone(self)))
    }

    /// Whether another thread than the owner waits for the value or has it.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// Waits until the owner does not use the value, and keeps it away.
    ///
    /// # Panics
    /// Panics if the kernel refuses a barrier that it has agreed to when the lock was created.
    pub fn lock(&self) -> BiasedGuard<'_, T> {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_fenced {
            fence(Ordering::SeqCst);
        } else {
            membarrier::execute();
        }
        let mut waits = 0;
        while self.in_use.load(Ordering::Acquire) {
            pause(&mut waits);
        }
        BiasedGuard { lock: self, _turn: turn, _value: PhantomData }
    }
}

impl<T: Default> Default for BiasedLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> fmt::Debug for BiasedLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BiasedLock").finish_non_exhaustive()
    }
}

/// Lets the owner come to the end of its burst. An owner without a CPU needs one, so the caller soon sleeps.
fn pause(waits: &mut u32) {
    *waits += 1;
    #[cfg(loom)]
    super::thread::yield_now();
    #[cfg(not(loom))]
    if *waits < 100 {
        std::hint::spin_loop();
    } else {
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
}

/// Access of a thread that is not the owner.
pub struct BiasedGuard<'a, T> {
    lock: &'a BiasedLock<T>,
    _turn: MutexGuard<'a, ()>,
    /// The guard may be shared or sent where a reference to the value may.
    _value: PhantomData<&'a mut T>,
}

impl<T> Deref for BiasedGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `lock` waited for the owner and keeps it away, and `_turn` excludes all other threads.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for BiasedGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for BiasedGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.wanted.fetch_sub(1, Ordering::Release);
    }
}

/// The thread that uses the value all the time. There is one at most.
#[derive(Debug)]
pub struct Owner<T>(Arc<BiasedLock<T>>);

impl<T> Owner<T> {
    /// Whether this is the owner of `lock`.
    pub fn is_of(&self, lock: &Arc<BiasedLock<T>>) -> bool {
        Arc::ptr_eq(&self.0, lock)
    }

    /// Gives access to the value, unless another thread wants or has it. Never waits.
    #[inline(always)]
    pub fn try_lock(&mut self) -> Option<OwnerGuard<'_, T>> {
        let lock = &*self.0;
        lock.in_use.store(true, Ordering::Relaxed);
        if lock.is_fenced {
            fence(Ordering::SeqCst);
        } else {
            // The other side executes the barrier.
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
        }
        if lock.wanted.load(Ordering::Acquire) > 0 {
            lock.in_use.store(false, Ordering::Release);
            return None;
        }
        Some(OwnerGuard { lock, _value: PhantomData })
    }
}

impl<T> Drop for Owner<T> {
    fn drop(&mut self) {
        self.0.is_owned.store(false, Ordering::Release);
    }
}

/// Access of the owner.
pub struct OwnerGuard<'a, T> {
    lock: &'a BiasedLock<T>,
    /// As in [`BiasedGuard`]. It also borrows the owner, which thus has one guard at a time.
    _value: PhantomData<&'a mut T>,
}

impl<T> Deref for OwnerGuard<'_, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: `in_use` is set and no other thread wanted the value after that, so all that come later wait.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for OwnerGuard<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for OwnerGuard<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.lock.in_use.store(false, Ordering::Release);
    }
}

/// `membarrier(2)`.
#[cfg(not(any(loom, miri)))]
mod membarrier {
    use nix::errno::Errno;
    use nix::libc::{self, c_int};

    // include/uapi/linux/membarrier.h
    const PRIVATE_EXPEDITED: c_int = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: c_int = 1 << 4;

    fn call(command: c_int) -> nix::Result<()> {
        // SAFETY: the call has no memory among its arguments.
        Errno::result(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }).map(drop)
    }

    /// Announces to the kernel that this process will call [`execute`]. Returns whether it may.
    pub(super) fn register() -> bool {
        call(REGISTER_PRIVATE_EXPEDITED).and_then(|()| call(PRIVATE_EXPEDITED)).is_ok()
    }

    /// Executes a full barrier on all CPUs that run this process.
    pub(super) fn execute() {
        let done = call(PRIVATE_EXPEDITED);
        assert!(done.is_ok(), "membarrier: {done:?}, after the kernel had agreed to it");
    }
}

/// Neither loom nor Miri has the call.
#[cfg(any(loom, miri))]
mod membarrier {
    pub(super) fn register() -> bool {
        false
    }

    pub(super) fn execute() {}
}
