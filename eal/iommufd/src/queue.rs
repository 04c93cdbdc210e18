//! Reads from kernel queues that have their own descriptor.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

use crate::error::{Error, Operation, Result};

/// Upper limit for the size of a record, larger than the records of any device or IOMMU.
const LIMIT: usize = 1 << 20;

/// Reads the pending records of a queue, if any. The kernel returns only whole records, and none if the first
/// record does not fit into `room` bytes. The read is then repeated with a larger buffer.
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
                why: "the kernel reports data to read but returns none",
            });
        }
        bytes.resize(2 * bytes.len(), 0);
    }
}

fn is_readable(file: &OwnedFd) -> bool {
    let mut found = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    poll(&mut found, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Returns the `u32` at `offset`.
pub(crate) fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|at| bytes[offset + at]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_never_gives_what_it_announces_is_an_error() {
        // A regular file is always readable, but returns no bytes at its end.
        let file = tempfile::tempfile().unwrap().into();
        let error = read_all(&file, 1 << 10, Operation::ReadEvents).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}");
    }
}
