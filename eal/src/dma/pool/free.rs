//! Free buffers of a pool.

use arrayvec::ArrayVec;

use super::CHUNK;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{ArrayQueue, Mutex, MutexGuard};

/// Buffers that move together between the pool and a cache.
pub(super) type Chunk = ArrayVec<u32, CHUNK>;

/// Free buffers: whole chunks in a queue, and beside it those that make no whole chunk, so that the queue never has
/// more chunks than the pool has buffers for.
#[derive(Debug)]
pub(super) struct FreeList {
    chunks: ArrayQueue<Chunk>,
    rest: Mutex<Chunk>,
    /// Length of `rest`, to be read without the lock: neither a count nor an exhausted pool takes it.
    rest_len: AtomicUsize,
}

impl FreeList {
    /// An empty list for `count` buffers.
    pub(super) fn new(count: usize) -> Self {
        let chunks = ArrayQueue::new((count / CHUNK).max(1));
        Self { chunks, rest: Mutex::default(), rest_len: AtomicUsize::new(0) }
    }

    /// Buffers in the list. Exact while nothing moves; takes nothing, so that nobody finds less meanwhile.
    pub(super) fn len(&self) -> usize {
        self.chunks.len() * CHUNK + self.rest_len.load(Ordering::Relaxed)
    }

    /// Takes a chunk; the last one may not be whole.
    pub(super) fn pop(&self) -> Option<Chunk> {
        self.chunks.pop().or_else(|| {
            if self.rest_len.load(Ordering::Relaxed) == 0 {
                return None;
            }
            let mut rest = self.rest();
            self.rest_len.store(0, Ordering::Relaxed);
            Some(std::mem::take(&mut *rest)).filter(|chunk| !chunk.is_empty())
        })
    }

    /// Puts a chunk back; false when there are more chunks than the pool can fill.
    pub(super) fn push(&self, chunk: Chunk) -> bool {
        if chunk.is_full() {
            return self.chunks.push(chunk).is_ok();
        }
        let mut rest = self.rest();
        let mut has_room = true;
        for buffer in chunk {
            rest.push(buffer);
            if rest.is_full() {
                has_room &= self.chunks.push(std::mem::take(&mut *rest)).is_ok();
            }
        }
        self.rest_len.store(rest.len(), Ordering::Relaxed);
        has_room
    }

    fn rest(&self) -> MutexGuard<'_, Chunk> {
        // Nothing panics while it is held.
        self.rest.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
