//! Pool of packet buffers that all lcores share.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::DmaMemory;
use super::packet::BUFFER_SIZE;
use crate::clock::Tsc;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Access;
use crate::sync::atomic::{AtomicU64, Ordering};

mod addresses;
mod cache;
mod claim;
mod free;
#[cfg(all(test, loom))]
mod models;
mod tag;
#[cfg(test)]
mod tests;

pub(super) use addresses::{Buffers, PoolAddresses};
pub(super) use cache::MAX_FREE;
pub use cache::PoolCache;
pub use claim::FreeBuffers;
use free::{Chunk, FreeList};
use tag::Tag;
pub(super) use tag::return_to_owner;

/// Number of buffers that move between the pool and a cache at a time.
const CHUNK: usize = 32;

/// Maximum number of buffers in a pool: their pool offsets fit into 32 bits.
pub const MAX_BUFFERS: u32 = u32::MAX / BUFFER_SIZE as u32;

/// Packet buffers of one kind: one free list per NUMA node. A node's buffers are in that node's
/// [`DmaMemory`].
///
/// The nodes share a tag, one range of pool offsets, and one table of device addresses. A ring can therefore
/// record a buffer by its pool offset alone, and send packets of every node.
#[derive(Debug)]
pub struct Pool {
    /// Tag in each handle of this pool's buffers, and in no other pool's handles.
    tag: Tag,
    /// Number of buffers on all nodes.
    count: u32,
    /// See [`addresses::bases`].
    bases: Box<[u64]>,
    /// At least one, by ascending pool offset. The first begins at pool offset 0.
    nodes: Box<[NodeBuffers]>,
    /// TSC value from which the next warning about the pool may be logged.
    warn_from: AtomicU64,
}

/// Buffers of one NUMA node, or all buffers if there are no nodes.
#[derive(Debug)]
struct NodeBuffers {
    memory: Arc<DmaMemory>,
    /// Offset of the first buffer in the memory.
    offset: usize,
    /// Numbers of the buffers. A buffer's number is its pool offset divided by [`BUFFER_SIZE`].
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
    /// Creates a pool of `count` buffers from `memory`.
    ///
    /// # Errors
    /// `Os` if the memory is too small or 70 pools exist, `Usage` if a pool cannot be that large. A pool
    /// exists until it is dropped and all of its buffers have come back.
    pub fn new(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(&[(Arc::clone(memory), count)], Access::ReadWrite)
    }

    /// Creates a pool from several memories, each with its number of buffers. Usually there is one memory per
    /// NUMA node. Their regions must be from one call of
    /// [`Region::adjoining`](crate::mem::Region::adjoining).
    ///
    /// # Errors
    /// Same as [`Pool::new`]. Also `Usage` if there is no memory, if regions do not adjoin, or if the first
    /// and the last buffer are more than 4 GiB apart.
    pub fn on_nodes(shares: &[(Arc<DmaMemory>, u32)]) -> Result<Arc<Self>> {
        Self::with_access(shares, Access::ReadWrite)
    }

    /// Creates a pool of buffers that devices only read: for packets that are sent and never received into.
    ///
    /// # Errors
    /// Same as [`Pool::new`].
    pub fn send_only(memory: &Arc<DmaMemory>, count: u32) -> Result<Arc<Self>> {
        Self::with_access(&[(Arc::clone(memory), count)], Access::Read)
    }

    fn with_access(shares: &[(Arc<DmaMemory>, u32)], access: Access) -> Result<Arc<Self>> {
        let sum = shares.iter().fold(0_u32, |sum, (_, count)| sum.saturating_add(*count));
        let refuse = |why: String| {
            Error::new(ErrorKind::Usage, format!("cannot create a pool of {sum} packet buffers"), why)
        };
        if sum > MAX_BUFFERS {
            return Err(refuse(format!("the maximum is {MAX_BUFFERS}")));
        }
        let mut nodes = Vec::with_capacity(shares.len());
        let region = |index: usize| shares[index].0.region();
        if (1..shares.len()).any(|index| !region(index).adjoins(region(0))) {
            return Err(refuse("their regions are not adjacent".into()));
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
            bases: addresses::bases(&nodes),
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

    /// Total number of buffers.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Number of buffers that are in no cache, ring or packet, like DPDK's `rte_mempool_avail_count` without
    /// caches. Exact while no cache exchanges buffers with the pool. Counting takes no buffers.
    pub fn available(&self) -> u32 {
        self.nodes.iter().map(|node| node.free.len()).sum::<usize>() as u32
    }

    /// Takes a chunk of free buffers, from the node at index `near` first.
    fn take_out(&self, near: usize) -> Option<Chunk> {
        let others = (0..self.nodes.len()).filter(|node| *node != near);
        std::iter::once(near).chain(others).find_map(|node| self.nodes[node].free.pop())
    }

    /// Returns buffers of this pool to the free lists, which therefore have room for them.
    fn take_back(&self, mut chunk: Chunk) {
        if let [all] = &self.nodes[..] {
            all.free.push(chunk);
            return;
        }
        for node in &self.nodes {
            let is_own = |slot: &u32| node.numbers.contains(&(*slot / BUFFER_SIZE as u32));
            let (own_ones, others): (Chunk, Chunk) = chunk.into_iter().partition(is_own);
            chunk = others;
            // A partial chunk takes a lock, and so would an empty one.
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

    /// Creates a cache for one lcore.
    pub fn cache(self: &Arc<Self>) -> PoolCache {
        self.cache_near(None)
    }

    /// Creates a cache for one lcore whose ports are on NUMA node `node`. It takes buffers of other nodes
    /// only when that node has none left.
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
