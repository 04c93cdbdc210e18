//! Packet buffer caches of an lcore's lanes.

use vireo_eal::dma::PoolCache;

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

/// Where a lane's packet buffers come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Home {
    /// Number of the process, which has a pool of its own.
    pub(crate) process: u16,
    /// NUMA node; `None` means any node.
    pub(crate) node: Option<u32>,
}

/// One cache per home that an lcore receives from. A lane frees sent packets to the cache that it
/// receives with, so that buffers stay at home.
#[derive(Debug)]
pub(crate) struct CachesByHome {
    pub(crate) caches: Vec<PoolCache>,
    /// Index of each lane's cache in `caches`.
    pub(crate) of_lanes: Vec<usize>,
}

impl CachesByHome {
    /// Creates caches with `cache` for lanes that receive at `homes`.
    pub(crate) fn new(homes: &[Home], cache: impl Fn(Home) -> PoolCache) -> Self {
        let mut distinct: Vec<Home> = Vec::new();
        let index = |home: &Home| {
            distinct.iter().position(|known| known == home).unwrap_or_else(|| {
                distinct.push(*home);
                distinct.len() - 1
            })
        };
        let of_lanes = homes.iter().map(index).collect();
        Self { caches: distinct.into_iter().map(cache).collect(), of_lanes }
    }
}

impl Caches for CachesByHome {
    #[inline]
    fn of_lane(&mut self, lane: usize) -> &mut PoolCache {
        &mut self.caches[self.of_lanes[lane]]
    }
}
