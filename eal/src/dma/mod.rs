//! Memory with device addresses: [`DmaMemory`], and what is made of it: descriptor rings ([`DmaRing`])
//! and packet buffers ([`Pool`]). Memory of another process, for which we are the device: [`PeerMemory`].

mod buffer_ring;
mod copies;
mod iova;
mod memory;
mod peer;
mod pool;
mod ring;

pub use buffer_ring::{BufferRing, Slot};
pub use iova::IovaRanges;
pub use memory::{DeviceView, DmaMemory, Part};
pub use peer::{MAX_PEER_REGIONS, PeerEvent, PeerMemory, PeerRegion, PeerRing, PeerSlice, PeerView};
pub use pool::{BUFFER_SIZE, Buffer, Burst, DATA_ROOM, HEADROOM, MAX_BURST, Packet, Pool, PoolCache};
pub use ring::{DmaBlock, DmaRing, RingEntry, RingView, Word};

/// Orders the read of an ownership word (DD bit, used index) before the reads of what it covers.
#[inline(always)]
pub fn dma_rmb() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
}

/// Orders writes to descriptors before the write that hands them to the device.
#[inline(always)]
pub fn dma_wmb() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

/// Orders a write before a later read of another word: publish an index, then read whether a doorbell is wanted.
#[inline(always)]
pub fn full_mb() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
