//! Pinning of pages, so that the kernel cannot move them.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::unistd::pipe2;

use super::Region;
use crate::error::{Error, Result};

/// A reference to each page of a [`Region`], held by a pipe that is never read.
///
/// `mlock` keeps pages in memory, not in place, and hugetlb pages are movable: when memory goes offline, for
/// CMA, for 1 GiB pages that are reserved at run time, after correctable errors (soft offline), by
/// `move_pages`, `migrate_pages` and `cpuset.memory_migrate`. The kernel does not move a page that has a
/// reference which it cannot account for (`folio_expected_ref_count`, `mm/migrate.c`), and `vmsplice` takes
/// such a reference. io_uring's registered buffers also pin pages, but release them in a work queue after the
/// process has ended: the next start would find them missing.
#[derive(Debug)]
pub(crate) struct Pin {
    /// Both ends of the pipe. The pages can move again when the last end closes.
    _pipe: (OwnedFd, OwnedFd),
}

impl Pin {
    /// Pins each page of `region`, which must be populated. Physical addresses are valid from then on.
    ///
    /// # Errors
    /// `Permission` if the pipe may not be that large.
    pub(crate) fn new(region: &Region) -> Result<Self> {
        let pages = region.len() / region.page_size();
        let what = || format!("cannot pin {pages} pages of packet memory");
        let pipe = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|errno| Error::os(what(), errno))?;
        // A pipe has room for one reference per page of its size.
        let size = pages.saturating_mul(super::page_size());
        fcntl(&pipe.1, FcntlArg::F_SETPIPE_SZ(i32::try_from(size).unwrap_or(i32::MAX))).map_err(|errno| {
            let error = Error::os(what(), errno);
            match errno {
                Errno::EPERM => refused(error, size, largest_pipe().unwrap_or(0)),
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
            // SAFETY: each vector is one byte inside the region, which is mapped for the duration of the
            // call. The kernel takes a reference to the byte's page, and neither reads nor writes the page.
            let taken = unsafe {
                libc::vmsplice(pipe.1.as_raw_fd(), some.as_ptr(), some.len(), libc::SPLICE_F_NONBLOCK)
            };
            // `taken` is a number of bytes, one per page.
            match Errno::result(taken).map_err(|errno| Error::os(what(), errno))? {
                0 => return Err(Error::os(what(), Errno::EAGAIN)),
                taken => pinned += taken as usize,
            }
        }
        Ok(Self { _pipe: pipe })
    }
}

/// Maximum size of an unprivileged user's pipe in bytes (pipe(7)).
fn largest_pipe() -> Option<usize> {
    fs::read_to_string("/proc/sys/fs/pipe-max-size").ok()?.trim().parse().ok()
}

/// Adds the reason to the `error` of a pipe of `size` bytes, which the kernel rounds up to a power of two.
/// `largest` is the maximum size of a pipe.
fn refused(error: Error, size: usize, largest: usize) -> Error {
    let (why, setting) = if size.checked_next_power_of_two().is_none_or(|size| size > largest) {
        ("the pipe that holds them would be larger than fs.pipe-max-size", format!("pipe-max-size={size}"))
    } else {
        (
            "the pipes of this user would hold more pages than fs.pipe-user-pages-soft",
            "pipe-user-pages-soft=0".into(),
        )
    };
    error.because(why).with_hint(format!("run as root (CAP_SYS_RESOURCE), or: sysctl fs.{setting}"))
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::mem::{Backing, page_size};

    /// Number of bytes in the pipe, one per page.
    fn held(pin: &Pin) -> i32 {
        let mut bytes = 0;
        // SAFETY: FIONREAD writes one `int`, which lives for the duration of the call.
        unsafe { libc::ioctl(pin._pipe.0.as_raw_fd(), libc::FIONREAD, &mut bytes) };
        bytes
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no vmsplice")]
    fn each_page_is_held() {
        // Up to the pipe limit of unprivileged users.
        for pages in [1, 16, 17, 40] {
            let region = Region::new(pages * page_size(), Backing::SmallPages).unwrap();
            assert_eq!(held(&Pin::new(&region).unwrap()), pages as i32);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no vmsplice")]
    fn a_pin_beyond_the_limit_is_refused_or_whole() {
        let pages = 2 * largest_pipe().unwrap() / page_size() + 1;
        match Pin::new(&Region::new(pages * page_size(), Backing::SmallPages).unwrap()) {
            Ok(pin) => assert_eq!(held(&pin), pages as i32),
            Err(error) => assert!(error.to_string().contains("sysctl fs.pipe-max-size="), "{error}"),
        }
    }

    #[test]
    fn the_limit_that_refused_is_named() {
        let refused =
            |size, largest| refused(Error::os("cannot pin", Errno::EPERM), size, largest).to_string();
        assert!(refused(5 << 20, 1 << 20).ends_with("or: sysctl fs.pipe-max-size=5242880"));
        assert!(refused((1 << 20) + 1, 1 << 20).contains("pipe-max-size=1048577"));
        assert!(refused(1 << 20, 1 << 20).ends_with("or: sysctl fs.pipe-user-pages-soft=0"));
        assert!(refused(usize::MAX, 1 << 20).contains("pipe-max-size="));
    }
}
