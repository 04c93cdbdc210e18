//! Stand-in for the kernel in unit tests. The test inspects the argument of each ioctl and supplies the result.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::fd::OwnedFd;

type Answer = Box<dyn FnMut(&'static str, *mut c_void) -> nix::Result<c_int>>;

thread_local! {
    static KERNEL: RefCell<Option<Answer>> = const { RefCell::new(None) };
}

/// Returns a descriptor, and passes the name and argument of each ioctl of this thread to `answer`.
pub(crate) fn mock_kernel(
    answer: impl FnMut(&'static str, *mut c_void) -> nix::Result<c_int> + 'static,
) -> OwnedFd {
    KERNEL.set(Some(Box::new(answer)));
    File::open("/dev/null").unwrap().into()
}

/// Returns the stand-in's result for an ioctl, or `None` if this thread has no stand-in.
pub(crate) fn answer(name: &'static str, argument: *mut c_void) -> Option<nix::Result<c_int>> {
    KERNEL.with_borrow_mut(|kernel| kernel.as_mut().map(|kernel| kernel(name, argument)))
}

/// Returns the structure at the address in `argument`.
pub(crate) fn at<'a, T>(argument: *mut c_void) -> &'a mut T {
    // SAFETY: the test requests the structure of the ioctl that it mock_kernel, while the caller waits for the result.
    unsafe { &mut *argument.cast() }
}
