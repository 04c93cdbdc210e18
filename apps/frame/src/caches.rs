//! The caches of packet buffers that an lcore polls its lanes with.

use std::sync::Arc;

use vireo_eal::dma::{Pool, PoolCache};

/// The caches of packet buffers that an lcore has for its lanes.
pub trait Caches {
    /// That of the lane at index `lane`.
    fn of_lane(&mut self, lane: usize) -> &mut PoolCache;
}

/// One for all lanes.
impl Caches for PoolCache {
    #[inline(always)]
    fn of_lane(&mut self, _lane: usize) -> &mut PoolCache {
        self
    }
}

/// A cache for each NUMA node that an lcore receives from: what a lane sends comes back to where it receives into, so that
/// buffers stay on their node.
#[derive(Debug)]
pub(crate) struct CachesByNode {
    pub(crate) caches: Vec<PoolCache>,
    /// Index of the cache of each lane.
    pub(crate) of_lanes: Vec<usize>,
}

impl CachesByNode {
    /// Caches of `pool` for lanes that receive on these `nodes`.
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
