//! Unix sockets by their path.

use std::fmt::Display;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_to, socket};

use crate::error::{Error, ErrorKind, Result};

/// Maximum length of a unix socket's name, in bytes: `sun_path` holds 108 including the terminating NUL
/// (unix(7)).
pub const MAX_PATH: usize = 107;

/// Checks that `path` is short enough for a socket. `what` is the argument that gives the path.
///
/// # Errors
/// `Usage` if it is longer than [`MAX_PATH`].
pub fn check_path(what: impl Display, path: &Path) -> Result<()> {
    let len = path.as_os_str().len();
    if len <= MAX_PATH {
        return Ok(());
    }
    let why = format!("it is {len} bytes long, but a socket path has at most {MAX_PATH}");
    Err(Error::new(ErrorKind::Usage, what.to_string(), why).with_hint("use a shorter path"))
}

/// Connects to the listener at `path` without waiting.
///
/// # Errors
/// `EAGAIN` if the listener's queue is full.
pub fn try_connect(path: &Path) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect_to(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(fd);
    let blocking = stream.set_nonblocking(false);
    blocking.map_err(|error| error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw))?;
    Ok(stream)
}

/// Same as [`try_connect`], but explains a failure. `what` is what fails without the connection, and `hint`
/// says how to start a listener.
///
/// # Errors
/// `Unavailable` if nothing listens at `path`, `Busy` if the listener's queue is full.
pub fn connect(path: &Path, what: impl Into<String>, hint: impl Into<String>) -> Result<UnixStream> {
    try_connect(path).map_err(|errno| {
        let error = Error::os(what, errno);
        match errno {
            Errno::ENOENT => error.because("there is no such socket").with_hint(hint),
            Errno::ECONNREFUSED => error
                .with_kind(ErrorKind::Unavailable)
                .because("no process listens on that socket")
                .with_hint(hint),
            Errno::EAGAIN => error.because("the listener's queue is full").with_hint(see_listener(path)),
            _ => error,
        }
    })
}

/// Command that shows which process listens at `path`.
pub fn see_listener(path: &Path) -> String {
    format!("see which process listens: ss -xlp src {}", path.display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn no_connection_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let refused = || connect(&path, "cannot connect", "start it").unwrap_err();
        assert_eq!(refused().to_string(), "cannot connect: ENOENT: there is no such socket; start it");
        let listener = UnixListener::bind(&path).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| try_connect(&path).ok()).collect();
        assert!(!waiting.is_empty());
        let error = refused();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Busy, Some(Errno::EAGAIN)));
        assert!(error.hint().is_some_and(|hint| hint.contains("ss -xlp src /")), "{error}");
        drop(listener);
        let error = refused();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(
            error.to_string().ends_with("ECONNREFUSED: no process listens on that socket; start it"),
            "{error}"
        );
    }

    #[test]
    fn a_path_fits_or_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let of_length = |len: usize| dir.path().join("x".repeat(len - dir.path().as_os_str().len() - 1));
        let longest = of_length(MAX_PATH);
        assert_eq!(check_path("--socket", &longest), Ok(()));
        UnixListener::bind(&longest).unwrap();
        assert!(UnixListener::bind(of_length(MAX_PATH + 1)).is_err());
        let error = check_path("--socket", &of_length(MAX_PATH + 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(
            error
                .to_string()
                .starts_with("--socket: it is 108 bytes long, but a socket path has at most 107")
        );
    }
}
