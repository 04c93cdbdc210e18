//! CPU affinity of the calling thread, with masks as long as the kernel's. The masks of nix and core_affinity
//! end at 1024 CPUs. A kernel with more possible CPUs does not fill a mask that short.

use nix::errno::Errno;
use nix::libc::{self, c_ulong};

/// Number of CPUs in one word of a mask.
const WORD: usize = c_ulong::BITS as usize;
/// Number of CPUs in glibc's `cpu_set_t`.
pub(crate) const CPU_SET_SIZE: usize = 1024;
/// Maximum length of a mask in words: 65,536 CPUs, many more than Linux can be built for.
const MAX_WORDS: usize = 65_536 / WORD;

/// Returns the CPUs that the calling thread may run on, in ascending order.
pub(crate) fn get() -> nix::Result<Vec<usize>> {
    get_from(CPU_SET_SIZE / WORD)
}

/// Same as [`get`], but starts with a mask of `words` words.
fn get_from(mut words: usize) -> nix::Result<Vec<usize>> {
    loop {
        let mut mask: Vec<c_ulong> = vec![0; words];
        // SAFETY: glibc and the kernel write at most the given length, which is that of the vector. Any bit
        // pattern is a valid word.
        let result = unsafe { libc::sched_getaffinity(0, size_of_val(&mask[..]), mask.as_mut_ptr().cast()) };
        match Errno::result(result) {
            Ok(_) => {
                let is_set = |cpu: &usize| mask[cpu / WORD] >> (cpu % WORD) & 1 == 1;
                return Ok((0..words * WORD).filter(is_set).collect());
            }
            // The kernel's mask is longer (sched_getaffinity(2), "Handling systems with large CPU affinity
            // masks").
            Err(Errno::EINVAL) if words < MAX_WORDS => words = (2 * words).max(1),
            Err(errno) => return Err(errno),
        }
    }
}

/// Restricts the calling thread to `cpus`.
///
/// # Errors
/// `EINVAL` if the thread may run on none of them, or if a CPU number is beyond those of any kernel.
pub(crate) fn set(cpus: &[usize]) -> nix::Result<()> {
    let words = cpus.iter().max().map_or(0, |cpu| cpu / WORD + 1);
    if words > MAX_WORDS {
        return Err(Errno::EINVAL);
    }
    let mut mask: Vec<c_ulong> = vec![0; words];
    for cpu in cpus {
        mask[cpu / WORD] |= 1 << (cpu % WORD);
    }
    // SAFETY: glibc and the kernel read the given length, which is that of the vector. The kernel treats the
    // rest of its own mask as zero.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&mask[..]), mask.as_ptr().cast()) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_too_short_grows() {
        assert_eq!(get_from(0), get());
        assert!(!get().unwrap().is_empty());
    }

    #[test]
    fn cpus_beyond_1024_count() {
        let mine = get().unwrap();
        std::thread::spawn(move || {
            // No CPU has the number 5000 here, so the kernel uses only the other one.
            set(&[mine[0], 5000]).unwrap();
            assert_eq!(get().unwrap(), [mine[0]]);
            for cpus in [&[][..], &[5000], &[usize::MAX]] {
                assert_eq!(set(cpus), Err(Errno::EINVAL));
            }
        })
        .join()
        .unwrap();
    }
}
