//! Packet buffers: the pool that all lcores share.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::DmaMemory;
use super::packet::BUFFER_SIZE;
use crate::clock::Tsc;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
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

/// Packet buffers of one kind: a free list for each NUMA node, whose buffers are in that node's [`DmaMemory`].
///
/// The nodes share a tag, one space of distances, and one table of device addresses. So a ring records a buffer by its
/// distance alone, and sends the packets of every node.
#[derive(Debug)]
pub struct Pool {
    /// In each handle of a buffer of this pool, and of no other's.
    tag: Tag,
    /// Buffers of all nodes.
    count: u32,
    /// See [`place::bases`].
    bases: Box<[u64]>,
    /// At least one, by ascending distance; the first begins at distance 0.
    nodes: Box<[NodeBuffers]>,
    /// TSC from which on it may be said again what is wrong with the pool.
    warn_from: AtomicU64,
}

/// The buffers of one NUMA node, or all of them where there are no nodes.
#[derive(Debug)]
struct NodeBuffers {
    memory: Arc<DmaMemory>,
    /// Offset of the first one in the memory.
    offset: usize,
    /// Numbers of the buffers. A buffer's number is its distance by [`BUFFER_SIZE`].
    numbers: Range<u32>,
    free: FreeList,
}

impl NodeBuffers {
    /// First byte of the first buffer.
    fn start(&self) -> NonNull<u8> {
        self.memory.pointer(self.offset, self.numbers.len() * BUFFER_SIZE)
    }

    fn node(&self) -> Option<u32> {
        self.memory.region().node()
    }
}

impl Pool {
    /// Takes `count` buffers of `memory`.
    ///
    /// # Errors
    /// `Os` when the memory is too small, or there are 70 pools, `Usage` when a pool cannot be so large.
    /// A pool counts until its buffers have all come back and it is dropped.
    pub fn new(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(&[(Arc::clone(memory), count)], Access::ReadWrite)
    }

    /// Takes so many buffers of each memory, usually of one for each NUMA node. Their regions are of one call of
    /// [`Region::adjoining`](crate::mem::Region::adjoining).
    ///
    /// # Errors
    /// As for [`Pool::new`]; `Usage` also when there is no memory, when regions do not adjoin, or when more than 4 GiB are
    /// between the first buffer and the last.
    pub fn on_nodes(shares: &[(Arc<DmaMemory>, u32)]) -> Result<Arc<Self>> {
        Self::with_access(shares, Access::ReadWrite)
    }

    /// As [`Pool::new`], of buffers that devices only read: packets that are sent and never received into.
    ///
    /// # Errors
    /// As for [`Pool::new`].
    pub fn send_only(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(&[(Arc::clone(memory), count)], Access::Read)
    }

    fn with_access(shares: &[(Arc<DmaMemory>, u32)], access: Access) -> Result<Arc<Self>> {
        let sum = shares.iter().fold(0_u32, |sum, (_, count)| sum.saturating_add(*count));
        let refuse = |why: String| {
            Error::new(ErrorKind::Usage, format!("cannot make a pool of {sum} packet buffers"), why)
        };
        if sum > MAX_BUFFERS {
            return Err(refuse(format!("there can be at most {MAX_BUFFERS}")));
        }
        let mut nodes = Vec::with_capacity(shares.len());
        let region = |index: usize| shares[index].0.region();
        if (1..shares.len()).any(|index| !region(index).adjoins(region(0))) {
            return Err(refuse("their regions do not adjoin".into()));
        }
        for (memory, count) in shares {
            let offset = memory.allocate_buffers(*count as usize, BUFFER_SIZE, access)?;
            let (memory, free) = (Arc::clone(memory), FreeList::new(*count as usize));
            nodes.push(NodeBuffers { memory, offset, numbers: 0..*count, free });
        }
        nodes.sort_by_key(NodeBuffers::start);
        let Some(base) = nodes.first().map(NodeBuffers::start) else {
            return Err(refuse("there is no memory for them".into()));
        };
        for node in &mut nodes {
            let first = (node.start().addr().get() - base.addr().get()) / BUFFER_SIZE;
            let end = first + node.numbers.len();
            if end > MAX_BUFFERS as usize {
                return Err(refuse("their memory is more than 4 GiB apart".into()));
            }
            node.numbers = first as u32..end as u32;
            for first in node.numbers.clone().step_by(CHUNK) {
                let chunk = first..node.numbers.end.min(first + CHUNK as u32);
                node.free.push(chunk.map(|number| number * BUFFER_SIZE as u32).collect());
            }
        }
        let pool = Arc::new(Self {
            tag: Tag::take()?,
            count: sum,
            bases: place::bases(&nodes),
            nodes: nodes.into(),
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
        self.nodes.iter().map(|node| node.free.len()).sum::<usize>() as u32
    }

    /// Takes free buffers, those of the node at index `near` first.
    fn take_out(&self, near: usize) -> Option<Chunk> {
        let others = (0..self.nodes.len()).filter(|node| *node != near);
        std::iter::once(near).chain(others).find_map(|node| self.nodes[node].free.pop())
    }

    /// Takes back what a cache gives: buffers of this pool, so that there is room for them.
    fn take_back(&self, mut chunk: Chunk) {
        if let [all] = &self.nodes[..] {
            all.free.push(chunk);
            return;
        }
        for node in &self.nodes {
            let is_own = |slot: &u32| node.numbers.contains(&(*slot / BUFFER_SIZE as u32));
            let (own_ones, others): (Chunk, Chunk) = chunk.into_iter().partition(is_own);
            chunk = others;
            // What is no whole chunk goes in under a lock, and so would nothing.
            if !own_ones.is_empty() {
                node.free.push(own_ones);
            }
        }
    }

    /// Rate limiter for warnings about the pool: one per second. `now` is in TSC ticks.
    fn may_warn(&self, now: u64) -> bool {
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
        let near = self.nodes.iter().position(|own| own.node() == node).unwrap_or(0);
        PoolCache::new(self, near)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.tag.retire(self.count - self.available());
    }
}
