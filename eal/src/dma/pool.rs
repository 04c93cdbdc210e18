//! Packet buffers: the pool that all lcores share.

use std::ops::Range;
use std::sync::Arc;

use super::DmaMemory;
use super::packet::{BUFFER_SIZE, Packet};
use crate::clock::Tsc;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
use crate::mem::OnNode;
use crate::sync::atomic::{AtomicU64, Ordering};

mod cache;
mod free;
#[cfg(all(test, loom))]
mod models;
mod place;
mod tag;
#[cfg(test)]
mod tests;

pub(super) use cache::MAX_FREE;
pub use cache::PoolCache;
use free::{Chunk, FreeList};
pub(super) use place::Buffers;
use tag::Tag;
pub(super) use tag::send_home;

/// Buffers that move between the pool and a cache at a time.
const CHUNK: usize = 32;

/// Most buffers of a pool: their distances from the first fit into 32 bits.
pub const MAX_BUFFERS: u32 = u32::MAX / BUFFER_SIZE as u32;

/// All packet buffers of a process, at one linear range of offsets in a [`DmaMemory`].
#[derive(Debug)]
pub struct Pool {
    memory: Arc<DmaMemory>,
    /// In each handle of a buffer of this pool, and of no other's.
    tag: Tag,
    /// Offset of buffer 0 in the memory.
    offset: usize,
    count: u32,
    /// See [`place::bases`].
    bases: Box<[u64]>,
    /// In the order of their buffers.
    free: Box<[NodeList]>,
    /// TSC from which on it may be said again what is wrong with the pool.
    warn_from: AtomicU64,
}

/// The free buffers of one NUMA node, or all of them where there are no nodes.
#[derive(Debug)]
struct NodeList {
    node: Option<u32>,
    /// Number of the first buffer behind its own.
    end: u32,
    list: FreeList,
}

/// Buffers `0..count`, at `offset` of a memory with these `nodes`, by the node that they are on.
fn by_node(nodes: &[OnNode], offset: usize, count: u32) -> Vec<(Option<u32>, Range<u32>)> {
    let mut next = 0;
    let mut ranges = Vec::new();
    for OnNode { node, bytes } in nodes {
        let end = (bytes.end.saturating_sub(offset) / BUFFER_SIZE).min(count as usize) as u32;
        if end > next {
            ranges.push((Some(*node), next..end));
            next = end;
        }
    }
    match ranges.last_mut() {
        // No node was asked for these; they belong to some list.
        Some((_, last)) => last.end = count,
        None => ranges.push((None, 0..count)),
    }
    ranges
}

impl Pool {
    /// Takes `count` buffers of `memory`.
    ///
    /// # Errors
    /// `Os` when the memory is too small, or there are 70 pools, `Usage` when a pool cannot be so large.
    /// A pool counts until its buffers have all come back and it is dropped.
    pub fn new(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(memory, count, Access::ReadWrite)
    }

    /// As [`Pool::new`], of buffers that devices only read: packets that are sent and never received into.
    ///
    /// # Errors
    /// As for [`Pool::new`].
    pub fn send_only(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(memory, count, Access::Read)
    }

    fn with_access(memory: &Arc<DmaMemory>, count: u32, access: Access) -> Result<Arc<Self>> {
        if count > MAX_BUFFERS {
            let what = format!("cannot make a pool of {count} packet buffers");
            return Err(Error::new(ErrorKind::Usage, what, format!("there can be at most {MAX_BUFFERS}")));
        }
        let tag = Tag::take()?;
        let offset =
            memory.allocate_buffers(count as usize, BUFFER_SIZE, access).inspect_err(|_| tag.retire(0))?;
        let free = by_node(memory.nodes(), offset, count).into_iter().map(|(node, own)| {
            let list = FreeList::new(own.len());
            for first in own.clone().step_by(CHUNK) {
                let chunk = first..own.end.min(first + CHUNK as u32);
                list.push(chunk.map(|index| index * BUFFER_SIZE as u32).collect());
            }
            NodeList { node, end: own.end, list }
        });
        let free = free.collect();
        let bases = place::bases(memory.translation(), offset, count);
        let pool = Arc::new(Self {
            memory: Arc::clone(memory),
            tag,
            offset,
            count,
            bases,
            free,
            warn_from: AtomicU64::new(0),
        });
        pool.tag.assign(&pool);
        Ok(pool)
    }

    /// Bytes of memory that a pool of `count` buffers takes.
    pub fn bytes(count: u32) -> usize {
        (count as usize).saturating_add(1).saturating_mul(BUFFER_SIZE)
    }

    /// Buffers in all.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Buffers that are neither in a cache, a ring nor a packet, as DPDK's `rte_mempool_avail_count` without caches.
    /// Exact while no cache moves. Counting takes none of them.
    pub fn available(&self) -> u32 {
        self.free.iter().map(|own| own.list.len()).sum::<usize>() as u32
    }

    /// Takes free buffers, if there are any from list `first`.
    fn take_out(&self, first: usize) -> Option<Chunk> {
        let others = (0..self.free.len()).filter(|list| *list != first);
        std::iter::once(first).chain(others).find_map(|list| self.free[list].list.pop())
    }

    /// Takes back what a cache gives: buffers of this pool, so that there is room for them.
    fn take_back(&self, mut chunk: Chunk) {
        if let [all] = &self.free[..] {
            all.list.push(chunk);
            return;
        }
        for own in &self.free {
            let is_own = |slot: &u32| (*slot / BUFFER_SIZE as u32) < own.end;
            let (own_ones, others) = chunk.into_iter().partition(is_own);
            chunk = others;
            own.list.push(own_ones);
        }
    }

    /// Whether it is to be said at `now`, in TSC ticks, what is wrong with the pool: once in a second.
    fn is_to_warn(&self, now: u64) -> bool {
        let from = self.warn_from.load(Ordering::Relaxed);
        let next = now + Tsc::hz();
        now >= from
            && self.warn_from.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// A cache for one lcore.
    pub fn cache(self: &Arc<Self>) -> PoolCache {
        self.cache_near(None)
    }

    /// A cache for one lcore whose ports are on NUMA `node`: it takes buffers of other nodes only when there are no others.
    pub fn cache_near(self: &Arc<Self>, node: Option<u32>) -> PoolCache {
        let near = self.free.iter().position(|own| own.node == node).unwrap_or(0);
        PoolCache::new(self, near)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.tag.retire(self.count - self.available());
    }
}
