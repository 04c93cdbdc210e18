//! Reading of the queues that the kernel gives a descriptor of their own.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

use crate::error::{Error, Operation, Result};

/// Most bytes of one record, beyond any device's or IOMMU's.
const LIMIT: usize = 1 << 20;

/// What waits in a queue; nothing if nothing does. The kernel gives whole records only, and none when the first one has no
/// room in `room` bytes: then there is more room the next time.
pub(crate) fn read_all(file: &OwnedFd, room: usize, operation: Operation) -> Result<Vec<u8>> {
    let mut bytes = vec![0; room];
    loop {
        let len = match read(file, &mut bytes) {
            Ok(len) => len,
            Err(Errno::EAGAIN) => 0,
            Err(errno) => return Err(operation.failed(errno)),
        };
        if len > 0 || !is_readable(file) {
            bytes.truncate(len);
            return Ok(bytes);
        }
        if bytes.len() > LIMIT {
            return Err(Error::Protocol {
                operation,
                why: "the kernel says that there is something and gives nothing",
            });
        }
        bytes.resize(2 * bytes.len(), 0);
    }
}

fn is_readable(file: &OwnedFd) -> bool {
    let mut found = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    poll(&mut found, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// The `u32` at `offset`.
pub(crate) fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|at| bytes[offset + at]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_never_gives_what_it_announces_is_an_error() {
        // A regular file is always readable and, at its end, gives nothing.
        let file = tempfile::tempfile().unwrap().into();
        let error = read_all(&file, 1 << 10, Operation::ReadEvents).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}");
    }
}
