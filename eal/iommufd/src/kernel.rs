//! Stand-in for the kernel in unit tests. The test inspects the argument of each ioctl and supplies the result.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::ptr;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Iommufd;
use crate::sys::Argument;

type Answer = Box<dyn FnMut(&'static str, &mut [u8]) -> nix::Result<()>>;

thread_local! {
    static KERNEL: RefCell<Option<Answer>> = const { RefCell::new(None) };
}

/// Returns a descriptor, and passes the name and argument of each ioctl of this thread to `answer`.
pub(crate) fn mock_kernel(
    answer: impl FnMut(&'static str, &mut [u8]) -> nix::Result<()> + 'static,
) -> Iommufd {
    KERNEL.set(Some(Box::new(answer)));
    let null = File::open("/dev/null").unwrap();
    // SAFETY: no ioctl of this thread reaches the descriptor, and the null device has no ioctls.
    unsafe { Iommufd::from_fd_unchecked(null.into()) }
}

/// Returns the stand-in's result for an ioctl, or `None` if this thread has no stand-in.
pub(crate) fn answer<A: Argument>(argument: *mut A) -> Option<nix::Result<()>> {
    KERNEL.with_borrow_mut(|kernel| {
        // SAFETY: the caller owns the argument, and an `Argument` has no padding.
        let bytes = unsafe { std::slice::from_raw_parts_mut(argument.cast::<u8>(), size_of::<A>()) };
        kernel.as_mut().map(|kernel| kernel(A::NAME, bytes))
    })
}

/// Reads an ioctl's argument from its bytes.
pub(crate) fn read<A: Argument>(bytes: &[u8]) -> A {
    assert_eq!(bytes.len(), size_of::<A>());
    // SAFETY: the bytes are those of an `A`, whose fields are integers.
    unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) }
}

/// Writes the kernel's output into an ioctl's argument.
pub(crate) fn write<A: Argument>(bytes: &mut [u8], argument: &A) {
    assert_eq!(bytes.len(), size_of::<A>());
    // SAFETY: as for `read`.
    unsafe { ptr::copy_nonoverlapping(ptr::from_ref(argument).cast(), bytes.as_mut_ptr(), bytes.len()) }
}

/// Returns whether the socket that stands for a queue's descriptor is closed. `other_end` is the kernel's end.
pub(crate) fn is_closed(other_end: &UnixStream) -> bool {
    let mut found = [PollFd::new(other_end.as_fd(), PollFlags::POLLIN)];
    poll(&mut found, PollTimeout::ZERO).unwrap();
    found[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
