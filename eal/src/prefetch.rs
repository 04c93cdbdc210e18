//! Prefetches of a cache line.
//!
//! With the feature `trace-prefetches`, a prefetch accesses the line as the code that follows will, so that a
//! tool that records accesses to memory sees it. That feature is for simulations in which one thread runs
//! both ends of a ring.

#[cfg(all(target_arch = "x86_64", not(miri)))]
use std::arch::asm;

/// Whether a prefetch accesses its line.
pub(crate) const ACCESSES: bool = cfg!(feature = "trace-prefetches");

/// Prefetches the line of the byte at `at`, to read it.
///
/// # Safety
/// With the feature `trace-prefetches`, the byte is mapped.
#[inline(always)]
#[cfg_attr(any(miri, not(target_arch = "x86_64")), allow(unused_variables))]
pub(crate) unsafe fn to_read(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri), not(feature = "trace-prefetches")))]
    // SAFETY: a prefetch reads nothing and never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(all(target_arch = "x86_64", not(miri), feature = "trace-prefetches"))]
    // SAFETY: the caller's contract.
    unsafe {
        asm!("test byte ptr [{}], 0", in(reg) at, options(readonly, nostack));
    }
}

/// Prefetches the line of the byte at `at`, to write it. Its owner gives it up at once, not first for reading and
/// then for writing.
///
/// # Safety
/// With the feature `trace-prefetches`, the byte is mapped for writing, and nothing else writes it at the same time.
#[inline(always)]
#[cfg_attr(any(miri, not(target_arch = "x86_64")), allow(unused_variables))]
pub(crate) unsafe fn to_write(at: *mut u8) {
    // The compiler's intrinsic becomes a prefetch for reading if PREFETCHW is not part of the target, as on
    // x86-64.
    #[cfg(all(target_arch = "x86_64", not(miri), not(feature = "trace-prefetches")))]
    // SAFETY: a prefetch reads nothing and never faults. A processor without PREFETCHW takes it for a NOP
    // (AMD64 manual, volume 3, and Intel SDM, volume 2: PREFETCHW).
    unsafe {
        asm!("prefetchw [{}]", in(reg) at, options(readonly, nostack, preserves_flags));
    }
    #[cfg(all(target_arch = "x86_64", not(miri), feature = "trace-prefetches"))]
    // SAFETY: the caller's contract. The byte keeps its value.
    unsafe {
        asm!("or byte ptr [{}], 0", in(reg) at, options(nostack));
    }
}
