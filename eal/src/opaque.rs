//! Accesses to memory that something else may write at the same time, through assembly that is opaque to the
//! compiler.
//!
//! A device's registers, a peer's memory and a second mapping of the process's own pages can change at any
//! time. The writer is a device, another process, or another thread of this process that the peer's
//! descriptors led to the same bytes. A plain copy of such bytes is a data race, which is undefined behavior.
//! So is a volatile copy: [`std::ptr::read_volatile`] documents that concurrent accesses are those of a plain
//! one. Atomics of words need aligned addresses and words of one size, and atomics of bytes take two
//! instructions per byte.
//!
//! The compiler treats assembly like the actions of another process: the bytes may change whenever it runs,
//! and nothing more is known. A copy may mix old and new bytes. A word accessed through [`Whole`] does not.
//!
//! Miri does not support assembly. Under Miri this module uses atomics, and Miri reports those that race with
//! plain accesses.

pub(crate) use access::{Whole, pass, read, write};

/// Accesses through assembly.
#[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
mod access {
    use std::arch::asm;

    /// Word that one instruction reads or writes. It is little-endian in memory.
    pub trait Whole: Copy {
        /// # Safety
        /// `at` is mapped for the size of the word, and aligned if the word must be whole.
        unsafe fn peek(at: *const Self) -> Self;
        /// # Safety
        /// As for `peek`. No reference points to `at`, and no other thread makes plain accesses to it.
        unsafe fn poke(at: *mut Self, value: Self);
    }

    macro_rules! whole {
        ($($word:ty, $class:ident: $peek:literal, $poke:literal;)*) => {$(
            impl Whole for $word {
                #[inline(always)]
                unsafe fn peek(at: *const Self) -> Self {
                    let value: Self;
                    // SAFETY: reads memory that the caller vouches for, and touches no flag or stack.
                    unsafe {
                        asm!($peek, at = in(reg) at, value = lateout($class) value,
                            options(readonly, nostack, preserves_flags));
                    }
                    Self::from_le(value)
                }

                #[inline(always)]
                unsafe fn poke(at: *mut Self, value: Self) {
                    // SAFETY: writes memory that the caller vouches for, and touches no flag or stack.
                    unsafe {
                        asm!($poke, at = in(reg) at, value = in($class) value.to_le(),
                            options(nostack, preserves_flags));
                    }
                }
            }
        )*};
    }

    #[cfg(target_arch = "x86_64")]
    whole! {
        u8, reg_byte: "mov {value}, [{at}]", "mov [{at}], {value}";
        u16, reg: "movzx {value:e}, word ptr [{at}]", "mov [{at}], {value:x}";
        u32, reg: "mov {value:e}, [{at}]", "mov [{at}], {value:e}";
        u64, reg: "mov {value}, [{at}]", "mov [{at}], {value}";
    }

    #[cfg(target_arch = "aarch64")]
    whole! {
        u8, reg: "ldrb {value:w}, [{at}]", "strb {value:w}, [{at}]";
        u16, reg: "ldrh {value:w}, [{at}]", "strh {value:w}, [{at}]";
        u32, reg: "ldr {value:w}, [{at}]", "str {value:w}, [{at}]";
        u64, reg: "ldr {value}, [{at}]", "str {value}, [{at}]";
    }

    /// Copies the 16 bytes at offset `AT`.
    ///
    /// # Safety
    /// As for `copy`. Both sides contain these bytes.
    #[inline(always)]
    unsafe fn near<const AT: usize>(from: *const u8, to: *mut u8) {
        // SAFETY: the caller vouches for the bytes; no flag or stack is touched.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            asm!("movups {block}, [{from} + {at}]", "movups [{to} + {at}], {block}",
                from = in(reg) from, to = in(reg) to, at = const AT, block = out(xmm_reg) _,
                options(nostack, preserves_flags));
            #[cfg(target_arch = "aarch64")]
            asm!("ldr {block:q}, [{from}, #{at}]", "str {block:q}, [{to}, #{at}]",
                from = in(reg) from, to = in(reg) to, at = const AT, block = out(vreg) _,
                options(nostack, preserves_flags));
        }
    }

    /// Copies the 16 bytes that begin `BACK` bytes before the end.
    ///
    /// # Safety
    /// As for `near`.
    #[inline(always)]
    unsafe fn far<const BACK: usize>(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: as in `near`. On x86 the sum of three terms in the address costs no instruction.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            asm!("movups {block}, [{from} + {len} - {back}]", "movups [{to} + {len} - {back}], {block}",
                from = in(reg) from, to = in(reg) to, len = in(reg) len, back = const BACK, block = out(xmm_reg) _,
                options(nostack, preserves_flags));
            #[cfg(target_arch = "aarch64")]
            near::<0>(from.add(len - BACK), to.add(len - BACK));
        }
    }

    /// Copies 64 to 128 bytes.
    ///
    /// # Safety
    /// As for `copy`.
    #[inline(always)]
    unsafe fn ends(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: these are the first and the last 64 bytes, which together cover all `len` bytes.
        unsafe {
            near::<0>(from, to);
            near::<16>(from, to);
            near::<32>(from, to);
            near::<48>(from, to);
            far::<64>(from, to, len);
            far::<48>(from, to, len);
            far::<32>(from, to, len);
            far::<16>(from, to, len);
        }
    }

    /// Copies `len` bytes, which are at least one word and at most two.
    ///
    /// # Safety
    /// As for `copy`.
    #[inline(always)]
    unsafe fn two_words<W: Whole>(from: *const u8, to: *mut u8, len: usize) {
        let last = len - size_of::<W>();
        // SAFETY: both words are within the `len` bytes.
        unsafe {
            W::poke(to.cast(), W::peek(from.cast()));
            W::poke(to.add(last).cast(), W::peek(from.add(last).cast()));
        }
    }

    /// Copies fewer than 16 or more than 128 bytes.
    ///
    /// # Safety
    /// As for `copy`.
    #[inline(never)]
    unsafe fn copy_any(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: the caller's contract. Each arm accesses bytes within the lengths that it matches.
        unsafe {
            match len {
                0 => {}
                1 => u8::poke(to, u8::peek(from)),
                2..4 => two_words::<u16>(from, to, len),
                4..8 => two_words::<u32>(from, to, len),
                8..16 => two_words::<u64>(from, to, len),
                // `rep movsb` took 33 ticks for 200 bytes on an EPYC of family 25, where this loop takes 17.
                _ => {
                    const STEP: usize = 128;
                    let mut at = 0;
                    while at + STEP < len {
                        ends(from.add(at), to.add(at), STEP);
                        at += STEP;
                    }
                    ends(from.add(len - STEP), to.add(len - STEP), STEP);
                }
            }
        }
    }

    /// Copies `len` bytes. Most packets are short, and a function call costs as much as their copy. Two
    /// blocks of a fixed size that overlap in the middle need no loop and access no byte beyond the end.
    /// Nothing goes through the stack: stores complete in order, so a store to the stack between two stores
    /// to a peer's cache lines serializes these.
    ///
    /// # Safety
    /// `from` and `to` are mapped for `len` bytes. No reference points to `to`, and no other thread of this
    /// process makes plain accesses to it during the copy.
    #[inline(always)]
    unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: the caller's contract. Each arm accesses bytes within the lengths that it matches.
        unsafe {
            match len {
                32..=64 => {
                    near::<0>(from, to);
                    near::<16>(from, to);
                    far::<32>(from, to, len);
                    far::<16>(from, to, len);
                }
                16..32 => {
                    near::<0>(from, to);
                    far::<16>(from, to, len);
                }
                65..=128 => ends(from, to, len),
                _ => copy_any(from, to, len),
            }
        }
    }

    /// Copies `len` bytes from memory that something else may write.
    ///
    /// # Safety
    /// `from` is mapped for `len` bytes; `to` is valid for writes of `len` bytes.
    #[inline(always)]
    pub(crate) unsafe fn read(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: the caller's contract.
        unsafe { copy(from, to, len) }
    }

    /// Copies `len` bytes into memory that something else may read and write.
    ///
    /// # Safety
    /// `from` is valid for reads of `len` bytes. `to` is mapped for as many bytes, no reference points to it,
    /// and all concurrent accesses to it by this process are atomic or go through this module.
    #[inline(always)]
    pub(crate) unsafe fn write(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: the caller's contract.
        unsafe { copy(from, to, len) }
    }

    /// Copies `len` bytes from memory that something else may write into memory that it may read and write. What
    /// they become if both overlap is unspecified.
    ///
    /// # Safety
    /// As for [`read`] from `from` and for [`write`] to `to`.
    #[inline(always)]
    pub(crate) unsafe fn pass(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: the caller's contract.
        unsafe { copy(from, to, len) }
    }

    /// Reads the last 8 of `N` bytes. Their address costs no instruction.
    ///
    /// # Safety
    /// As for [`read`] of `N` bytes.
    #[inline(always)]
    pub(super) unsafe fn peek_last<const N: usize>(at: *const u8) -> u64 {
        let value: u64;
        // SAFETY: reads memory that the caller vouches for, and touches no flag or stack.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            asm!("mov {value}, [{at} + {distance}]", at = in(reg) at, distance = const N - 8,
                value = lateout(reg) value, options(readonly, nostack, preserves_flags));
            #[cfg(target_arch = "aarch64")]
            asm!("ldur {value}, [{at}, #{distance}]", at = in(reg) at, distance = const N - 8,
                value = lateout(reg) value, options(readonly, nostack, preserves_flags));
        }
        u64::from_le(value)
    }

    /// # Safety
    /// As for [`Whole::poke`].
    #[inline(always)]
    pub(super) unsafe fn poke_unaligned(at: *mut u8, value: u64) {
        // SAFETY: the caller's contract.
        unsafe { u64::poke(at.cast(), value) }
    }
}

/// Accesses through atomics, for Miri and for other architectures.
#[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
mod access {
    use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

    /// Word that is read and written as a whole. It is little-endian in memory.
    pub trait Whole: Copy {
        /// # Safety
        /// `at` is aligned and valid for reads, and all concurrent accesses to it are atomic, with words of
        /// this size.
        unsafe fn peek(at: *const Self) -> Self;
        /// # Safety
        /// As for `peek`, for writes.
        unsafe fn poke(at: *mut Self, value: Self);
    }

    macro_rules! whole {
        ($($word:ty => $atomic:ty),*) => {$(
            impl Whole for $word {
                unsafe fn peek(at: *const Self) -> Self {
                    // SAFETY: the caller's contract.
                    Self::from_le(unsafe { <$atomic>::from_ptr(at.cast_mut()) }.load(Relaxed))
                }

                unsafe fn poke(at: *mut Self, value: Self) {
                    // SAFETY: the caller's contract.
                    unsafe { <$atomic>::from_ptr(at) }.store(value.to_le(), Relaxed);
                }
            }
        )*};
    }
    whole!(u8 => AtomicU8, u16 => AtomicU16, u32 => AtomicU32, u64 => AtomicU64);

    /// Copies `len` bytes from memory that something else may write.
    ///
    /// # Safety
    /// `from` is valid for reads of `len` bytes by atomics; `to` is valid for writes of `len` bytes.
    pub(crate) unsafe fn read(from: *const u8, to: *mut u8, len: usize) {
        for at in 0..len {
            // SAFETY: within the `len` bytes of both.
            unsafe { to.add(at).write(u8::peek(from.add(at))) };
        }
    }

    /// Copies `len` bytes into memory that something else may read and write.
    ///
    /// # Safety
    /// `from` is valid for reads of `len` bytes. `to` is valid for atomic writes of as many bytes, and all
    /// concurrent accesses to it by this process are atomic.
    pub(crate) unsafe fn write(from: *const u8, to: *mut u8, len: usize) {
        for at in 0..len {
            // SAFETY: within the `len` bytes of both.
            unsafe { u8::poke(to.add(at), from.add(at).read()) };
        }
    }

    /// Copies `len` bytes from memory that something else may write into memory that it may read and write. What
    /// they become if both overlap is unspecified.
    ///
    /// # Safety
    /// As for [`read`] from `from` and for [`write()`] to `to`.
    pub(crate) unsafe fn pass(from: *const u8, to: *mut u8, len: usize) {
        for at in 0..len {
            // SAFETY: within the `len` bytes of both.
            unsafe { u8::poke(to.add(at), u8::peek(from.add(at))) };
        }
    }

    /// Reads the last 8 of `N` bytes.
    ///
    /// # Safety
    /// As for [`read`] of `N` bytes.
    pub(super) unsafe fn peek_last<const N: usize>(at: *const u8) -> u64 {
        let mut bytes = [0; 8];
        // SAFETY: the caller's contract.
        unsafe { read(at.add(N - bytes.len()), bytes.as_mut_ptr(), bytes.len()) };
        u64::from_le_bytes(bytes)
    }

    /// # Safety
    /// As for [`write()`] of 8 bytes.
    pub(super) unsafe fn poke_unaligned(at: *mut u8, value: u64) {
        let bytes = value.to_le_bytes();
        // SAFETY: the caller's contract.
        unsafe { write(bytes.as_ptr(), at, bytes.len()) };
    }
}

/// Writes the `N` bytes (8 to 16) unless memory already contains them. Without a write, other CPUs keep their
/// copies of the cache line.
///
/// # Safety
/// As for [`write()`] to `to`.
#[inline(always)]
pub(crate) unsafe fn write_changed<const N: usize>(bytes: [u8; N], to: *mut u8) {
    let (first, last) = words(bytes);
    // SAFETY: both words are within the `N` bytes.
    unsafe {
        if (access::peek_last::<8>(to) ^ first) | (access::peek_last::<N>(to) ^ last) != 0 {
            write_short(bytes, to);
        }
    }
}

/// Writes the `N` bytes (8 to 16) in two stores.
///
/// # Safety
/// As for [`write()`] to `to`.
#[inline(always)]
pub(crate) unsafe fn write_short<const N: usize>(bytes: [u8; N], to: *mut u8) {
    let (first, last) = words(bytes);
    // SAFETY: both words are within the `N` bytes.
    unsafe {
        access::poke_unaligned(to, first);
        access::poke_unaligned(to.add(N - 8), last);
    }
}

/// The first and the last 8 of `N` bytes (8 to 16).
#[inline(always)]
fn words<const N: usize>(bytes: [u8; N]) -> (u64, u64) {
    const { assert!(8 <= N && N <= 16) };
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    (word(0), word(N - 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Number of bytes on each side of the copied bytes that must not change.
    const GUARD: usize = 64;
    const LONGEST: usize = 2048;

    /// Returns the target after `copy` has copied `len` bytes from offset `from` of the source to offset `to`
    /// behind the first guard.
    fn copied(copy: impl FnOnce(*const u8, *mut u8, usize), from: usize, to: usize, len: usize) -> Vec<u8> {
        let mut source: Vec<u8> = (0..from + len).map(|at| (at * 7 + at / 256) as u8).collect();
        let mut target = vec![0xee; GUARD + to + len + GUARD];
        copy(source[from..].as_mut_ptr(), target[GUARD + to..].as_mut_ptr(), len);
        target
    }

    fn check(from: usize, to: usize, len: usize) {
        // SAFETY: both have `len` bytes, and nothing else accesses them.
        let plain = copied(|from, to, len| unsafe { from.copy_to_nonoverlapping(to, len) }, from, to, len);
        // SAFETY: as above.
        let found = copied(|from, to, len| unsafe { read(from, to, len) }, from, to, len);
        // SAFETY: as above.
        let left = copied(|from, to, len| unsafe { write(from, to, len) }, from, to, len);
        // SAFETY: as above.
        let passed = copied(|from, to, len| unsafe { pass(from, to, len) }, from, to, len);
        assert!(found == plain && left == plain && passed == plain, "{len} bytes from {from} to {to}");
    }

    #[test]
    fn every_length_is_copied_and_nothing_beyond_it() {
        let step = if cfg!(miri) { 311 } else { 1 };
        (0..=LONGEST).step_by(step).for_each(|len| check(len % 64, len / 64 % 64, len));
    }

    #[test]
    fn every_alignment_is_copied() {
        let step = if cfg!(miri) { 37 } else { 1 };
        for (from, to) in
            (0..64).step_by(step).flat_map(|from| (0..64).step_by(step).map(move |to| (from, to)))
        {
            [1, 3, 7, 15, 31, 64, 65, 127, 129, 300].into_iter().for_each(|len| check(from, to, len));
        }
    }

    proptest! {
        #[test]
        fn a_copy_is_as_a_plain_one(from in 0..64_usize, to in 0..64_usize, len in 0..=LONGEST) {
            check(from, to, len);
        }

        #[test]
        fn bytes_are_written_where_they_differ(at in 0..64_usize, old: [u8; 12], new: [u8; 12], byte in 0..13_usize) {
            // First all bytes may differ, then at most one does.
            let near = std::array::from_fn(|i| if i == byte { old[i] ^ 1 } else { old[i] });
            for new in [new, near] {
                let mut memory = vec![0xee; at + 12 + GUARD];
                memory[at..at + 12].copy_from_slice(&old);
                let mut wanted = memory.clone();
                wanted[at..at + 12].copy_from_slice(&new);
                // SAFETY: the memory has these bytes, and nothing else accesses it.
                unsafe { write_changed(new, memory[at..].as_mut_ptr()) };
                prop_assert_eq!(memory, wanted);
            }
        }
    }

    #[test]
    fn words_are_little_endian_and_no_longer_than_they_say() {
        let mut memory = [0xee_u64; 3];
        let at = (&raw mut memory[1]).cast::<u8>();
        // SAFETY: aligned, within the array, and nothing else accesses it.
        unsafe {
            u64::poke(at.cast(), 0x0807_0605_0403_0201);
            assert_eq!(u64::peek(at.cast()), 0x0807_0605_0403_0201);
        }
        assert_eq!(memory[1].to_ne_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        let at = (&raw mut memory[1]).cast::<u8>();
        // SAFETY: as above. Each size has its own bytes.
        unsafe {
            u8::poke(at, 0x11);
            u16::poke(at.add(2).cast(), 0x2221);
            u32::poke(at.add(4).cast(), 0x3433_3231);
            assert_eq!((u8::peek(at), u16::peek(at.add(2).cast())), (0x11, 0x2221));
            assert_eq!(u32::peek(at.add(4).cast()), 0x3433_3231);
        }
        assert_eq!(memory[1].to_ne_bytes(), [0x11, 2, 0x21, 0x22, 0x31, 0x32, 0x33, 0x34]);
        assert_eq!([memory[0], memory[2]], [0xee; 2]);
    }
}
