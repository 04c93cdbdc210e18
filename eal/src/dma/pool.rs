//! Packet buffers: the pool that all lcores share, and the 8-byte handles that own a buffer.

use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::DmaMemory;
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

/// Distance of two buffers in bytes; a power of two, so that no buffer crosses a page.
pub const BUFFER_SIZE: usize = 2048;

/// Bytes in front of a packet's first byte: room for a virtio-net header, and the packet on a cache line.
pub const HEADROOM: usize = 64;

/// Longest packet that a buffer holds, in bytes.
pub const DATA_ROOM: usize = BUFFER_SIZE - HEADROOM;

/// Packets in a [`Burst`].
pub const MAX_BURST: usize = 32;

/// Buffers that move between the pool and a cache at a time.
const CHUNK: usize = 32;

/// Packets that move together.
pub type Burst = ArrayVec<Packet, MAX_BURST>;

/// Most buffers of a pool: their distances from the first fit into 32 bits.
pub const MAX_BUFFERS: u32 = u32::MAX / BUFFER_SIZE as u32;

/// Ownership of one packet buffer, by its distance from the pool's first in bytes plus the pool's tag. There is
/// exactly one handle of each buffer: it is moved, never copied, into a descriptor ring, a packet, or the pool that it
/// came from ([`PoolCache::free`]). Losing it loses the buffer. A cache of another pool gives no access by it: it
/// panics, or in [`PoolCache::free`] refuses the buffer.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub struct Buffer(pub(super) u32);

/// A packet: a buffer and how much of it is used. 8 bytes, moved by value.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a packet that is dropped is lost to its pool; give it to PoolCache::free"]
pub struct Packet {
    buffer: Buffer,
    len: u32,
}

const _: () = assert!(size_of::<Packet>() == 8);

impl Packet {
    /// A packet of `len` bytes in `buffer`; a `len` above [`DATA_ROOM`] becomes it.
    #[inline(always)]
    pub fn new(buffer: Buffer, len: usize) -> Self {
        Self { buffer, len: len.min(DATA_ROOM) as u32 }
    }

    /// Length in bytes, without the frame check sequence.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// The buffer that the packet is in.
    #[inline(always)]
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Gives up the packet, keeps its buffer.
    #[inline(always)]
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }
}

/// All packet buffers of a process, at one linear range of offsets in a [`DmaMemory`].
#[derive(Debug)]
pub struct Pool {
    memory: Arc<DmaMemory>,
    /// In each handle of this pool's buffers, and of no other's.
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
    /// `Os` when the memory is too small, or there are 127 pools, `Usage` when a pool cannot be so large.
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
            memory.allocate_buffers(count as usize, BUFFER_SIZE, access).inspect_err(|_| tag.release())?;
        let free = by_node(memory.nodes(), offset, count).into_iter().map(|(node, own)| {
            let list = FreeList::new(own.len());
            for first in own.clone().step_by(CHUNK) {
                let chunk = first..own.end.min(first + CHUNK as u32);
                list.push(chunk.map(|index| index * BUFFER_SIZE as u32 + tag.get()).collect());
            }
            NodeList { node, end: own.end, list }
        });
        let free = free.collect();
        let bases = place::bases(memory.translation(), offset, count, tag.get());
        Ok(Arc::new(Self {
            memory: Arc::clone(memory),
            tag,
            offset,
            count,
            bases,
            free,
            warn_from: AtomicU64::new(0),
        }))
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
            let is_own = |handle: &u32| (*handle / BUFFER_SIZE as u32) < own.end;
            let (own_ones, others) = chunk.into_iter().partition(is_own);
            chunk = others;
            own.list.push(own_ones);
        }
    }

    /// Says that a buffer of another pool came to this one, which is lost to its own.
    #[cold]
    #[inline(never)]
    fn refuse(&self, _: Buffer) {
        if self.is_to_warn(Tsc::now()) {
            tracing::error!("packet buffers of another pool came back to this one: a driver mixes pools up");
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
        // A handle that is still somewhere would be one of the next pool with this tag.
        if self.available() == self.count {
            self.tag.release();
        }
    }
}
