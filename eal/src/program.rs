//! Both ends of what a program says: text on standard output, and the line that it fails with.

use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, Result};

/// Prints `text`, and says so when nobody takes it: `print!` would panic when standard output is a closed pipe.
///
/// # Errors
/// `Io` when standard output does not take it.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Error::io("cannot write to standard output", &error))
}

/// Says one line on standard error; whoever closed that does not want it.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Whether standard output takes a page of text without waiting for its reader. One that has an error does: the write
/// will say which.
pub fn is_output_ready() -> bool {
    let stdout = std::io::stdout();
    let mut output = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
    !matches!(poll(&mut output, PollTimeout::ZERO), Ok(0))
}

/// The exit code for `result`; an error is one line on standard error first, after the program's name.
pub fn exit_code(name: &str, result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        note(&format!("{name}: {error}"));
        error.kind().exit_code().into()
    })
}
