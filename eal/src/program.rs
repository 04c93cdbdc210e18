//! Output of a program: text on standard output, and the line on standard error with which it fails.

use std::io::{StdoutLock, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, PIPE_BUF};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, ErrorKind, Result};
use crate::mem::page_size;

const NO_OUTPUT: &str = "cannot write to standard output";

/// Prints `text`, and returns an error if it cannot: `print!` would panic if standard output is a closed
/// pipe.
///
/// # Errors
/// `Io` if standard output does not accept it.
pub fn print(text: &str) -> Result<()> {
    write(&mut std::io::stdout().lock(), text.as_bytes())
}

/// Prints one line on standard error. Errors are ignored: if standard error is closed, the line is not
/// wanted.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Prints `text` if standard output accepts all of it without waiting for its reader, otherwise prints
/// nothing. Returns whether it printed. It is for threads that have packets to forward.
///
/// # Errors
/// Same as [`print()`].
pub fn print_if_room(text: &str) -> Result<bool> {
    // The lock is held from the check to the write: another thread's text could take up the room.
    let mut out = std::io::stdout().lock();
    let has_room = has_room(out.as_fd(), text.len());
    if has_room {
        write(&mut out, text.as_bytes())?;
    }
    Ok(has_room)
}

/// Prints `text`, but does not wait longer than `patience` for a reader that reads nothing.
///
/// # Errors
/// Same as [`print()`]; also `Io` if the reader reads nothing for `patience`. A part of `text` may have been
/// printed.
pub fn print_within(text: &str, patience: Duration) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for part in text.as_bytes().chunks(PIPE_BUF) {
        await_room(out.as_fd(), patience)?;
        write(&mut out, part)?;
    }
    Ok(())
}

fn write(out: &mut StdoutLock<'_>, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| Error::io(NO_OUTPUT, &error))
}

/// Waits until `output` is ready: a pipe then has room for [`PIPE_BUF`] bytes (pipe(7)).
fn await_room(output: BorrowedFd<'_>, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(output, PollFlags::POLLOUT)], timeout) {
            Ok(0) if left.is_zero() => {
                let why = format!("its reader has read nothing for {} s", patience.as_secs_f64());
                return Err(Error::new(ErrorKind::Io, NO_OUTPUT, why));
            }
            Ok(0) | Err(Errno::EINTR) => {}
            // If the output has an error, the write reports it.
            _ => return Ok(()),
        }
    }
}

/// Returns whether `output` accepts `len` bytes without waiting. This is also true of an output with an
/// error, which the write then reports.
fn has_room(output: BorrowedFd<'_>, len: usize) -> bool {
    let mut polled = [PollFd::new(output, PollFlags::POLLOUT)];
    match poll(&mut polled, PollTimeout::ZERO) {
        Ok(0) => return false,
        Ok(_) if polled[0].revents() == Some(PollFlags::POLLOUT) => {}
        _ => return true,
    }
    // Only a pipe has a size. A file always has room, and a socket that is ready has room for most of its
    // buffer.
    let Ok(size) = fcntl(output, FcntlArg::F_GETPIPE_SZ) else { return true };
    len <= PIPE_BUF || unread(output).is_some_and(|unread| fits(size as usize, unread, len, page_size()))
}

/// Number of bytes in a pipe; `None` if the kernel does not report it.
fn unread(pipe: BorrowedFd<'_>) -> Option<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one `int`, which lives for the call.
    Errno::result(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut bytes) }).ok()?;
    usize::try_from(bytes).ok()
}

/// Returns whether a pipe of `size` bytes with `unread` bytes in it has room for `len` more. It may return
/// false although there is room.
///
/// A pipe is a ring of pages. A write starts a new page unless its bytes beyond whole pages fit into the last
/// page (Linux, `pipe_write`), so any two neighboring pages together hold at least one page of bytes. Only
/// the first page may have been partly read.
fn fits(size: usize, unread: usize, len: usize, page: usize) -> bool {
    2 * unread.div_ceil(page) + len.div_ceil(page) <= size / page
}

/// Returns the exit code for `result`. First prints an error on standard error, as one line after the
/// program's name.
pub fn exit_code(name: &str, result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        note(&format!("{name}: {error}"));
        error.kind().exit_code().into()
    })
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read, pipe};
    use std::os::fd::OwnedFd;

    use nix::fcntl::OFlag;
    use proptest::prelude::*;

    use super::*;

    /// Creates a non-blocking pipe of `pages` pages.
    fn pipe_of(pages: usize) -> (PipeReader, PipeWriter) {
        let (reader, writer) = pipe().unwrap();
        let size = fcntl(&writer, FcntlArg::F_SETPIPE_SZ((pages * page_size()) as i32)).unwrap();
        assert_eq!(size as usize, pages * page_size());
        for end in [reader.as_fd(), writer.as_fd()] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        }
        (reader, writer)
    }

    #[test]
    fn an_empty_pipe_takes_what_it_can_hold() {
        let (_reader, mut writer) = pipe_of(4);
        let size = 4 * page_size();
        assert!(has_room(writer.as_fd(), size) && !has_room(writer.as_fd(), size + 1));
        writer.write_all(&vec![0; size - PIPE_BUF]).unwrap();
        assert!(has_room(writer.as_fd(), PIPE_BUF) && !has_room(writer.as_fd(), PIPE_BUF + 1));
        writer.write_all(&[0; PIPE_BUF]).unwrap();
        assert!(!has_room(writer.as_fd(), 1));
    }

    #[test]
    fn outputs_other_than_pipes_and_broken_ones_are_written() {
        let (reader, writer) = pipe_of(1);
        drop(reader);
        assert!(has_room(writer.as_fd(), 1 << 20));
        assert!(has_room(OwnedFd::from(tempfile::tempfile().unwrap()).as_fd(), 1 << 20));
    }

    #[test]
    fn a_reader_that_reads_nothing_is_not_awaited() {
        let (reader, mut writer) = pipe_of(1);
        await_room(writer.as_fd(), Duration::ZERO).unwrap();
        writer.write_all(&vec![0; page_size()]).unwrap();
        let error = await_room(writer.as_fd(), Duration::from_millis(20)).unwrap_err().to_string();
        assert_eq!(error, "cannot write to standard output: its reader has read nothing for 0.02 s");
        drop(reader);
        await_room(writer.as_fd(), Duration::ZERO).unwrap();
    }

    proptest! {
        /// A text for which there is room goes into the pipe as a whole, whatever was written and read
        /// before.
        #[test]
        fn what_has_room_is_not_torn(
            steps in prop::collection::vec((1_usize..12_000, any::<bool>()), 1..60),
        ) {
            let (mut reader, mut writer) = pipe_of(8);
            for (len, read) in steps {
                if read {
                    let _ = reader.read(&mut vec![0; len]);
                } else if has_room(writer.as_fd(), len) {
                    prop_assert_eq!(writer.write(&vec![0; len]).unwrap(), len);
                } else {
                    // Acts like another program that writes to the same pipe.
                    let _ = writer.write(&vec![0; len % 3000]);
                }
            }
        }
    }
}
