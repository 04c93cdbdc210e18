//! Affinity of the calling thread, with masks as long as the kernel's. nix's and core_affinity's end at 1024 cpus, and
//! where more are possible the kernel fills no mask that short.

use nix::errno::Errno;
use nix::libc::{self, c_ulong};

/// Cpus of one word of a mask.
const WORD: usize = c_ulong::BITS as usize;
/// Cpus of glibc's `cpu_set_t`.
pub(crate) const CLASSIC: usize = 1024;
/// Most words that are tried: 65,536 cpus, many more than Linux can be built for.
const MOST: usize = 65_536 / WORD;

/// Cpus that the calling thread may run on, ascending.
pub(crate) fn get() -> nix::Result<Vec<usize>> {
    get_from(CLASSIC / WORD)
}

/// As [`get`], with a mask of `words` words at first.
fn get_from(mut words: usize) -> nix::Result<Vec<usize>> {
    loop {
        let mut mask: Vec<c_ulong> = vec![0; words];
        // SAFETY: glibc and the kernel write at most the given length, which is the vector's, and any bits are words.
        let result = unsafe { libc::sched_getaffinity(0, size_of_val(&mask[..]), mask.as_mut_ptr().cast()) };
        match Errno::result(result) {
            Ok(_) => {
                let is_set = |cpu: &usize| mask[cpu / WORD] >> (cpu % WORD) & 1 == 1;
                return Ok((0..words * WORD).filter(is_set).collect());
            }
            // The kernel's mask is longer (sched_getaffinity(2), "Handling systems with large CPU affinity masks").
            Err(Errno::EINVAL) if words < MOST => words = (2 * words).max(1),
            Err(errno) => return Err(errno),
        }
    }
}

/// Lets the calling thread run on `cpus` only.
///
/// # Errors
/// `EINVAL` when the thread may run on none of them, or a number is beyond any kernel's.
pub(crate) fn set(cpus: &[usize]) -> nix::Result<()> {
    let words = cpus.iter().max().map_or(0, |cpu| cpu / WORD + 1);
    if words > MOST {
        return Err(Errno::EINVAL);
    }
    let mut mask: Vec<c_ulong> = vec![0; words];
    for cpu in cpus {
        mask[cpu / WORD] |= 1 << (cpu % WORD);
    }
    // SAFETY: glibc and the kernel read the given length, which is the vector's; the kernel takes the rest of its own
    // mask for zero.
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
            // No cpu has that number here: the kernel reads on to the one that it has.
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
