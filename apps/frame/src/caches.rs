//! Packet buffer caches of an lcore's lanes.

use std::sync::Arc;

use vireo_eal::dma::{Pool, PoolCache};

/// Packet buffer caches of an lcore's lanes.
pub trait Caches {
    /// Returns the cache of the lane at index `lane`.
    fn of_lane(&mut self, lane: usize) -> &mut PoolCache;
}

/// One cache for all lanes.
impl Caches for PoolCache {
    #[inline(always)]
    fn of_lane(&mut self, _lane: usize) -> &mut PoolCache {
        self
    }
}

/// One cache per NUMA node that an lcore receives from. A lane frees sent packets to the cache that it
/// receives with, so that buffers stay on their node.
#[derive(Debug)]
pub(crate) struct CachesByNode {
    pub(crate) caches: Vec<PoolCache>,
    /// Index of each lane's cache in `caches`.
    pub(crate) of_lanes: Vec<usize>,
}

impl CachesByNode {
    /// Creates caches of `pool` for lanes that receive on `nodes`.
    pub(crate) fn new(pool: &Arc<Pool>, nodes: &[Option<u32>]) -> Self {
        let mut distinct: Vec<Option<u32>> = Vec::new();
        let index = |node: &Option<u32>| {
            distinct.iter().position(|known| known == node).unwrap_or_else(|| {
                distinct.push(*node);
                distinct.len() - 1
            })
        };
        let of_lanes = nodes.iter().map(index).collect();
        Self { caches: distinct.into_iter().map(|node| pool.cache_near(node)).collect(), of_lanes }
    }
}

impl Caches for CachesByNode {
    #[inline]
    fn of_lane(&mut self, lane: usize) -> &mut PoolCache {
        &mut self.caches[self.of_lanes[lane]]
    }
}
