//! Memory with device addresses: regions that devices access ([`MemoryMap`]), memory that is allocated from
//! them ([`DmaMemory`]), packet buffers ([`Pool`]), rings of descriptors that own packet buffers
//! ([`DescRing`]), and other rings ([`DmaRing`]). [`PeerMemory`] is memory of another process, for which
//! Vireo is the device.

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

pub use copies::pass_copies;
pub use desc_ring::{
    Completed, DescRing, GoodWord, Limits, Moved, RingRecord, SendWord, Slot, TiedPacket, TiedRings,
};
pub use iova::IovaRanges;
pub use map::{MemoryMap, Segment};
pub use memory::DmaMemory;
pub use metadata::PartialChecksum;
pub use packet::{
    BUFFER_SIZE, Burst, DATA_ROOM, HEADROOM, MAX_BURST, MAX_FRAME, MAX_SEGMENTS, Packet, first_frame, frames,
    has_partial_checksums, has_segments,
};
pub use part::Part;
pub use peer::{MAX_PEER_REGIONS, PeerEvent, PeerLog, PeerMemory, PeerRegion, PeerRing, PeerSlice, PeerView};
pub use pool::{FreeBuffers, MAX_BUFFERS, Pool, PoolCache};
pub use ring::{DmaBlock, DmaRing, RingEntry, RingView, Word};
pub use view::DeviceView;

// Rust's fences order accesses among the CPUs that run threads. On x86 that includes devices. On Arm it
// covers the inner shareable domain (`dmb ish`), but devices that are coherent with the CPUs may be in the
// outer shareable domain (Arm ARM, B2.3). Linux's `dma_rmb` and `dma_wmb` are therefore `dmb oshld` and
// `dmb oshst` (`arch/arm64/include/asm/barrier.h`).

/// The `dmb` barrier with an option such as `oshld`. Miri does not support assembly.
#[cfg(all(target_arch = "aarch64", not(miri)))]
macro_rules! dmb {
    ($option:literal) => {
        // SAFETY: the instruction only orders accesses to memory: it touches no register, flag or stack. Without `nomem`,
        // the compiler moves no access across it.
        unsafe { core::arch::asm!(concat!("dmb ", $option), options(nostack, preserves_flags)) }
    };
}

/// Orders the read of an ownership word (DD bit, used index) before reads and writes of the memory that it
/// covers.
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
    // Linux's `oshst` orders only writes. Here, reads of a buffer must also complete before the device gets
    // the buffer.
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    dmb!("osh");
    #[cfg(not(all(target_arch = "aarch64", not(miri))))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

/// Orders a write before a later read of another word, such as the publication of an index before the check
/// whether the device wants a doorbell.
#[inline(always)]
pub fn full_mb() {
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    dmb!("osh");
    // A fence becomes MFENCE, which also orders non-temporal stores. There are none, and a locked instruction, as in
    // Linux's `smp_mb` (`arch/x86/include/asm/barrier.h`), took an eighth of the time on an EPYC of family 25.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the word keeps its value. It is below the stack pointer, where the compiler keeps nothing unless `nostack`
    // is given.
    unsafe {
        core::arch::asm!("lock or dword ptr [rsp - 4], 0");
    }
    #[cfg(any(miri, not(any(target_arch = "aarch64", target_arch = "x86_64"))))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
