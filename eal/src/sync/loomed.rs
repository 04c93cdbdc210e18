//! Test helpers missing from loom.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use loom::model::Builder;
use loom::sync::{Mutex, MutexGuard};

/// Runs `body` in every possible interleaving of its threads, and prints the number of interleavings. With
/// `preemptions`, runs only those with at most that many preemptions: most bugs need few.
///
/// # Panics
/// If `body` panics, deadlocks or does not terminate in one of them.
pub fn model(preemptions: Option<usize>, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    let orders = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&orders);
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let orders = orders.load(Ordering::Relaxed);
    match preemptions {
        Some(most) => println!("{orders} orders, at most {most} preemptions in each"),
        None => println!("{orders} orders, all there are"),
    }
}

/// Stand-in for crossbeam's queue, whose atomics are std's. It is bounded, and each call is atomic.
#[derive(Debug)]
pub(crate) struct ArrayQueue<T> {
    items: Mutex<VecDeque<T>>,
    capacity: usize,
}

impl<T> ArrayQueue<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { items: Mutex::default(), capacity }
    }

    fn items(&self) -> MutexGuard<'_, VecDeque<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let mut items = self.items();
        if items.len() == self.capacity {
            return Err(item);
        }
        items.push_back(item);
        Ok(())
    }

    pub(crate) fn pop(&self) -> Option<T> {
        self.items().pop_front()
    }

    pub(crate) fn len(&self) -> usize {
        self.items().len()
    }
}
