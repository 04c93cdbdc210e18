//! Memory with device addresses: the regions that devices reach ([`MemoryMap`]), what is given out of them ([`DmaMemory`]),
//! and what is made of that: packet buffers ([`Pool`]), rings of descriptors that own such buffers ([`DescRing`]), and other
//! rings ([`DmaRing`]). Memory of another process, for which we are the device:
//! [`PeerMemory`].

mod copies;
mod desc_ring;
mod iova;
mod map;
mod memory;
mod metadata;
mod packet;
mod part;
mod peer;
mod pool;
mod ring;
mod view;

pub use desc_ring::{DescRing, Filled, GoodWord, Slot};
pub use iova::IovaRanges;
pub use map::{MemoryMap, Segment};
pub use memory::DmaMemory;
pub use metadata::PartialChecksum;
pub use packet::{
    BUFFER_SIZE, Burst, DATA_ROOM, HEADROOM, MAX_BURST, MAX_FRAME, MAX_SEGMENTS, Packet, first_frame, frames,
};
pub use part::Part;
pub use peer::{MAX_PEER_REGIONS, PeerEvent, PeerLog, PeerMemory, PeerRegion, PeerRing, PeerSlice, PeerView};
pub use pool::{MAX_BUFFERS, Pool, PoolCache};
pub use ring::{DmaBlock, DmaRing, RingEntry, RingView, Word};
pub use view::DeviceView;

// Rust's fences order accesses among the CPUs that run threads. For x86 that includes devices; for Arm it is the inner
// shareable domain (`dmb ish`), and devices that are coherent with the CPUs may be in the outer one (Arm ARM, B2.3), which
// is why Linux's `dma_rmb` and `dma_wmb` are `dmb oshld` and `dmb oshst` (`arch/arm64/include/asm/barrier.h`).

/// The barrier `dmb` of an option, such as `oshld`. Miri knows no assembly.
#[cfg(all(target_arch = "aarch64", not(miri)))]
macro_rules! dmb {
    ($option:literal) => {
        // SAFETY: the instruction only orders accesses to memory: it touches no register, flag or stack. Without `nomem`,
        // the compiler moves no access across it.
        unsafe { core::arch::asm!(concat!("dmb ", $option), options(nostack, preserves_flags)) }
    };
}

/// Calls `each` with the numbers below `count` in order, until it gives false; gives how often it gave true. Four calls
/// follow each other without a jump, because for a packet the loop around them costs as much as a part of the work.
#[inline(always)]
fn in_fours(count: usize, mut each: impl FnMut(usize) -> bool) -> usize {
    let mut done = 0;
    while count - done >= 4 {
        for _ in 0..4 {
            if !each(done) {
                return done;
            }
            done += 1;
        }
    }
    while done < count && each(done) {
        done += 1;
    }
    done
}

/// Orders the read of an ownership word (DD bit, used index) before the reads and writes of what it covers.
#[inline(always)]
pub fn dma_rmb() {
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    dmb!("oshld");
    #[cfg(not(all(target_arch = "aarch64", not(miri))))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
}

/// Orders the reads and writes of descriptors and buffers before the write that hands them to the device.
#[inline(always)]
pub fn dma_wmb() {
    // Linux's `oshst` orders writes alone. Here a buffer that was read is given away behind this barrier, too.
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    dmb!("osh");
    #[cfg(not(all(target_arch = "aarch64", not(miri))))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

/// Orders a write before a later read of another word: publish an index, then read whether a doorbell is wanted.
#[inline(always)]
pub fn full_mb() {
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    dmb!("osh");
    #[cfg(not(all(target_arch = "aarch64", not(miri))))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
