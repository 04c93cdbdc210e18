//! Stands in for the kernel in unit tests: a test says what each ioctl answers, and sees the argument.

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

/// A descriptor whose ioctls `answer` gets by name with their argument, on this thread.
pub(crate) fn answers(answer: impl FnMut(&'static str, &mut [u8]) -> nix::Result<()> + 'static) -> Iommufd {
    KERNEL.set(Some(Box::new(answer)));
    let null = File::open("/dev/null").unwrap();
    // SAFETY: no ioctl of this thread reaches the descriptor, and the null device has none.
    unsafe { Iommufd::from_fd_unchecked(null.into()) }
}

/// What the stand-in makes of an argument; none when there is no stand-in.
pub(crate) fn answer<A: Argument>(argument: *mut A) -> Option<nix::Result<()>> {
    KERNEL.with_borrow_mut(|kernel| {
        // SAFETY: the caller owns the argument, and an `Argument` has no padding.
        let bytes = unsafe { std::slice::from_raw_parts_mut(argument.cast::<u8>(), size_of::<A>()) };
        kernel.as_mut().map(|kernel| kernel(A::NAME, bytes))
    })
}

/// The argument behind the bytes of one.
pub(crate) fn read<A: Argument>(bytes: &[u8]) -> A {
    assert_eq!(bytes.len(), size_of::<A>());
    // SAFETY: the bytes are those of an `A`, whose fields are integers.
    unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) }
}

/// Writes an answer back.
pub(crate) fn write<A: Argument>(bytes: &mut [u8], argument: &A) {
    assert_eq!(bytes.len(), size_of::<A>());
    // SAFETY: as for `read`.
    unsafe { ptr::copy_nonoverlapping(ptr::from_ref(argument).cast(), bytes.as_mut_ptr(), bytes.len()) }
}

/// Whether the socket that stands for a queue's descriptor has been closed; `other_end` is the one that the kernel has.
pub(crate) fn is_closed(other_end: &UnixStream) -> bool {
    let mut found = [PollFd::new(other_end.as_fd(), PollFlags::POLLIN)];
    poll(&mut found, PollTimeout::ZERO).unwrap();
    found[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}
