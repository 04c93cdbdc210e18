//! What the models need and loom has not.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use loom::model::Builder;
use loom::sync::{Mutex, MutexGuard};

/// Runs `body` in every order in which its threads can meet, and prints how many there were. With `preemptions`, of
/// these only the orders that take the cpu from a thread at most so many times: most mistakes need few.
///
/// # Panics
/// When `body` panics in one of them, deadlocks, or does not end.
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

/// Stands for crossbeam's queue, whose atomics are std's: bounded, and each call happens at one moment.
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
