//! Stands in for the kernel in unit tests: a test says what each ioctl answers, and sees the argument.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::fd::OwnedFd;

type Answer = Box<dyn FnMut(&'static str, *mut c_void) -> nix::Result<c_int>>;

thread_local! {
    static KERNEL: RefCell<Option<Answer>> = const { RefCell::new(None) };
}

/// A descriptor whose ioctls `answer` gets by name with their argument, on this thread.
pub(crate) fn answers(
    answer: impl FnMut(&'static str, *mut c_void) -> nix::Result<c_int> + 'static,
) -> OwnedFd {
    KERNEL.set(Some(Box::new(answer)));
    File::open("/dev/null").unwrap().into()
}

/// What the stand-in makes of an argument; none when there is no stand-in.
pub(crate) fn answer(name: &'static str, argument: *mut c_void) -> Option<nix::Result<c_int>> {
    KERNEL.with_borrow_mut(|kernel| kernel.as_mut().map(|kernel| kernel(name, argument)))
}

/// The structure that an argument is the address of.
pub(crate) fn at<'a, T>(argument: *mut c_void) -> &'a mut T {
    // SAFETY: the test asks for the structure of the ioctl that it answers, while the caller waits for the answer.
    unsafe { &mut *argument.cast() }
}
