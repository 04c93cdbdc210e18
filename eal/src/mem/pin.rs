//! Pages that the kernel may not move.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::unistd::pipe2;

use super::Region;
use crate::error::{Error, Result};

/// A reference to each page of a [`Region`], held by a pipe that nobody reads.
///
/// `mlock` keeps pages in memory, not in place, and hugetlb pages are movable: when memory goes offline, for CMA,
/// for 1 GiB pages that are reserved at run time, after correctable errors (soft offline), by `move_pages`,
/// `migrate_pages` and `cpuset.memory_migrate`. The kernel moves no page that has a reference which it cannot account
/// for (`folio_expected_ref_count`, `mm/migrate.c`), and `vmsplice` takes one. io_uring's registered buffers pin too,
/// but let pages go in a work queue after the process has ended: the next start would find them missing.
#[derive(Debug)]
pub(crate) struct Pin {
    /// Both ends: when the last one closes, the pages are free to move.
    _pipe: (OwnedFd, OwnedFd),
}

impl Pin {
    /// Pins each page of `region`, which has been populated. Physical addresses hold from then on.
    ///
    /// # Errors
    /// `Permission` when the pipe may not be so large.
    pub(crate) fn new(region: &Region) -> Result<Self> {
        let pages = region.len() / region.page_size();
        let what = || format!("cannot pin {pages} pages of packet memory");
        let pipe = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|errno| Error::os(what(), errno))?;
        // A pipe has room for one reference in each page of its size.
        let size = pages.saturating_mul(super::page_size());
        fcntl(&pipe.1, FcntlArg::F_SETPIPE_SZ(i32::try_from(size).unwrap_or(i32::MAX))).map_err(|errno| {
            let error = Error::os(what(), errno);
            match errno {
                Errno::EPERM => error
                    .because("the pipe that holds them would be larger than fs.pipe-max-size")
                    .mend(format!("run as root (CAP_SYS_RESOURCE), or: sysctl fs.pipe-max-size={size}")),
                _ => error,
            }
        })?;
        let first = region.as_ptr().as_ptr();
        let bytes = |page: usize| libc::iovec {
            iov_base: first.wrapping_add(page * region.page_size()).cast(),
            iov_len: 1,
        };
        let mut pinned = 0;
        while pinned < pages {
            let some: Vec<_> = (pinned..pages.min(pinned + libc::UIO_MAXIOV as usize)).map(bytes).collect();
            // SAFETY: each vector is one byte inside the region, which is mapped for the length of the call; the
            // kernel takes a reference to its page and neither reads nor writes it.
            let taken = unsafe {
                libc::vmsplice(pipe.1.as_raw_fd(), some.as_ptr(), some.len(), libc::SPLICE_F_NONBLOCK)
            };
            // One byte of each page.
            match Errno::result(taken).map_err(|errno| Error::os(what(), errno))? {
                0 => return Err(Error::os(what(), Errno::EAGAIN)),
                taken => pinned += taken as usize,
            }
        }
        Ok(Self { _pipe: pipe })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::mem::{Backing, page_size};

    /// Bytes in a pipe, one for each page.
    fn held(pin: &Pin) -> i32 {
        let mut bytes = 0;
        // SAFETY: FIONREAD writes one `int`, which lives for the call.
        unsafe { libc::ioctl(pin._pipe.0.as_raw_fd(), libc::FIONREAD, &mut bytes) };
        bytes
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no vmsplice")]
    fn each_page_is_held() {
        // Up to the limit of a pipe for users without privileges.
        for pages in [1, 16, 17, 40] {
            let region = Region::new(pages * page_size(), Backing::SmallPages).unwrap();
            assert_eq!(held(&Pin::new(&region).unwrap()), pages as i32);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no vmsplice")]
    fn a_pin_beyond_the_limit_is_refused_or_whole() {
        let most: usize = fs::read_to_string("/proc/sys/fs/pipe-max-size").unwrap().trim().parse().unwrap();
        let pages = 2 * most / page_size() + 1;
        match Pin::new(&Region::new(pages * page_size(), Backing::SmallPages).unwrap()) {
            Ok(pin) => assert_eq!(held(&pin), pages as i32),
            Err(error) => assert!(error.to_string().contains("sysctl fs.pipe-max-size="), "{error}"),
        }
    }
}
