//! Free list of a pool.

use arrayvec::ArrayVec;

use super::CHUNK;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{ArrayQueue, Mutex, MutexGuard};

/// Pool offsets of buffers that move together between the pool and a cache.
pub(super) type Chunk = ArrayVec<u32, CHUNK>;

/// Free buffers: a queue of full chunks, and one partial chunk. Partial chunks do not enter the queue, so
/// that it never has more chunks than the pool has buffers for.
#[derive(Debug)]
pub(super) struct FreeList {
    chunks: ArrayQueue<Chunk>,
    rest: Mutex<Chunk>,
    /// Length of `rest`, readable without the lock, so that neither a count nor an exhausted pool takes the
    /// lock.
    rest_len: AtomicUsize,
}

impl FreeList {
    /// Creates an empty list for `count` buffers.
    pub(super) fn new(count: usize) -> Self {
        let chunks = ArrayQueue::new((count / CHUNK).max(1));
        Self { chunks, rest: Mutex::default(), rest_len: AtomicUsize::new(0) }
    }

    /// Number of buffers in the list. Exact while no buffer moves. Counting takes no buffers, so that no
    /// lcore finds fewer meanwhile.
    pub(super) fn len(&self) -> usize {
        self.chunks.len() * CHUNK + self.rest_len.load(Ordering::Relaxed)
    }

    /// Takes a chunk. The last one may be partial.
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

    /// Returns a chunk to the list. Returns false if there are more chunks than the pool can fill.
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
        // No code panics while it holds the lock.
        self.rest.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
