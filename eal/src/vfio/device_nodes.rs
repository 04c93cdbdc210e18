//! Sources of device nodes: `/dev`, or a launcher that opens them for a process that may not.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use vireo_vfio::class_and_name;

use super::acquire::lock;
use super::diagnose;
use super::listen::listen_fds;
use crate::args::quoted;
use crate::device_node::{is_char_device, number_of, open};
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::Iommufd;
use crate::rights;
use crate::socket;

/// The one byte that carries the descriptors. It distinguishes the message from one with another purpose.
const MESSAGE: u8 = b'n';
/// Time limit for a listener to pass its descriptors, which it has already opened.
const PATIENCE: Duration = Duration::from_secs(10);

/// Source of the descriptors (`--vfio-fds`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdSource {
    /// The process that started this one (`LISTEN_FDS`, as systemd and `vireo-launch` pass them).
    Listen,
    /// The process that listens on a unix socket, as `vireo-launch --socket` does.
    Socket(PathBuf),
}

impl std::str::FromStr for FdSource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "" => Err(Error::new(ErrorKind::Usage, "--vfio-fds \"\"", "the source is missing")
                .with_hint("give listen, or the path of a socket")),
            "listen" => Ok(Self::Listen),
            path => {
                socket::check_path(format!("--vfio-fds {}", quoted(path)), path.as_ref())?;
                Ok(Self::Socket(path.into()))
            }
        }
    }
}

/// The device nodes that a process can open.
#[derive(Debug)]
pub struct DeviceNodes(Kind);

#[derive(Debug)]
enum Kind {
    /// Nodes that are opened by path.
    Files,
    /// Descriptors that were passed, with the file names of their nodes. Each serves one `open`.
    Passed(Mutex<Vec<(String, OwnedFd)>>),
}

impl Default for DeviceNodes {
    fn default() -> Self {
        Self(Kind::Files)
    }
}

impl DeviceNodes {
    /// Takes the descriptors of `source`. Their nodes are identified through the kernel, not by what the
    /// sender claims.
    ///
    /// # Errors
    /// `Usage` if the environment announces descriptors that are not open or are for another process;
    /// `Permission` if one is not a node of VFIO or iommufd; otherwise why the socket provided none:
    /// `Unavailable` if it sends nothing for 10 s, or if a signal that the process handles arrives first.
    pub fn of(source: &FdSource) -> Result<Self> {
        let fds = match source {
            FdSource::Listen => listen_fds()?,
            FdSource::Socket(path) => receive(path, PATIENCE)?,
        };
        let named = fds.into_iter().map(|fd| Ok((node_name(fd.as_fd())?, fd)));
        Ok(Self::passed(named.collect::<Result<_>>()?))
    }

    /// Creates the nodes of `fds`, which have the file names of their nodes.
    pub(super) fn passed(fds: Vec<(String, OwnedFd)>) -> Self {
        Self(Kind::Passed(Mutex::new(fds)))
    }

    /// Opens `path` for reading and writing, or returns the descriptor that was passed for it.
    pub(super) fn open(&self, path: &Path) -> Result<File> {
        let Kind::Passed(passed) = &self.0 else {
            return open(path).map_err(|error| diagnose::forbidden(error, path));
        };
        let mut passed = lock(passed);
        let found =
            passed.iter().position(|(name, _)| path.file_name().is_some_and(|wanted| wanted == &**name));
        match found {
            Some(at) => Ok(passed.remove(at).1.into()),
            None => {
                let names: Vec<&str> = passed.iter().map(|(name, _)| &**name).collect();
                let left = if names.is_empty() {
                    "none are left".into()
                } else {
                    format!("remaining: {}", names.join(", "))
                };
                Err(Error::new(
                    ErrorKind::Permission,
                    format!("cannot open {}", path.display()),
                    format!("it is not among the descriptors of --vfio-fds ({left})"),
                )
                .with_hint("give the launcher the same -a and --vfio-mode"))
            }
        }
    }

    /// Returns the path in `dir` of the node with device number `number` (`major:minor`). Its name is `name`,
    /// given by udev, or another name, as in some containers. If no node has that number, or the number is
    /// unknown, returns the path of `name` if it exists.
    pub(super) fn find(&self, dir: &Path, name: &str, number: Option<&str>) -> Option<PathBuf> {
        let udev = dir.join(name);
        let is_match = |path: &PathBuf| {
            fs::metadata(path).is_ok_and(|found| {
                found.file_type().is_char_device() && number == Some(&*number_of(found.rdev()))
            })
        };
        match &self.0 {
            Kind::Files if !is_match(&udev) => {
                let others = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
                others.into_iter().find(is_match)
            }
            _ => None,
        }
        .or_else(|| self.has(&udev).then_some(udev))
    }

    /// Opens iommufd, whose node is `path`.
    pub(super) fn iommufd(&self, path: &Path) -> Result<Iommufd> {
        match &self.0 {
            Kind::Files => Iommufd::open_at(path).map_err(|error| diagnose::forbidden(error.into(), path)),
            // SAFETY: `of` has asked the kernel which node each descriptor belongs to.
            Kind::Passed(_) => self.open(path).map(|file| unsafe { Iommufd::from_fd_unchecked(file.into()) }),
        }
    }

    /// Returns whether [`open`](Self::open) would find `path`.
    pub(super) fn has(&self, path: &Path) -> bool {
        match &self.0 {
            Kind::Files => path.exists(),
            Kind::Passed(passed) => {
                lock(passed).iter().any(|(name, _)| path.file_name().is_some_and(|wanted| wanted == &**name))
            }
        }
    }
}

/// Checks that the open node at `path` has the device number `number` (`major:minor`), which sysfs reports
/// for `whose`.
pub(super) fn check(node: impl AsFd, path: &Path, number: &str, whose: &str) -> Result<()> {
    let found =
        fstat(node).map_err(|errno| Error::os(format!("cannot examine {}", path.display()), errno))?;
    let why = match number_of(found.st_rdev) {
        _ if !is_char_device(&found) => format!("it is not a character device, but {whose} is {number}"),
        found if found == number => return Ok(()),
        found => format!("it is device {found}, but {whose} is {number}"),
    };
    let error = Error::new(ErrorKind::Unavailable, format!("cannot use {}", path.display()), why);
    Err(error.with_hint(format!("run: rm -f {} && {}", path.display(), make(path, number))))
}

/// Adds to `error` how to create the missing node at `path` with this device number.
pub(super) fn absent(error: Error, path: &Path, number: &str) -> Error {
    error.with_hint(format!(
        "run: {}; or start the container with --device {}",
        make(path, number),
        path.display()
    ))
}

/// Returns the commands that create a node. The kernel creates nodes only in a devtmpfs, and udev creates
/// none at all.
fn make(path: &Path, number: &str) -> String {
    let dir = path.parent().unwrap_or(Path::new("/dev/vfio")).display();
    format!("mkdir -p {dir} && mknod -m 0600 {} c {}", path.display(), number.replace(':', " "))
}

/// Opens `paths` to pass them to another process.
///
/// # Errors
/// If a node cannot be opened.
pub fn open_all<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Vec<OwnedFd>> {
    let opened = |path: &Path| {
        open(path).map(OwnedFd::from).map_err(|error| match error.errno() {
            Some(Errno::EBUSY) => diagnose::in_use(error, &[path.to_owned()]),
            _ => diagnose::forbidden(error, path),
        })
    };
    paths.into_iter().map(opened).collect()
}

/// Passes `fds` to the process at the other end of `socket`, which takes them with `--vfio-fds`.
///
/// # Errors
/// If the socket is closed, or if there are more descriptors than one message can hold.
pub fn send(fds: &[OwnedFd], socket: &UnixStream) -> Result<()> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    rights::send(socket, &[MESSAGE], &fds)
        .map(drop)
        .map_err(|errno| Error::os("cannot send device descriptors", errno))
}

fn receive(path: &Path, patience: Duration) -> Result<Vec<OwnedFd>> {
    let what = || format!("cannot receive device descriptors from {}", path.display());
    let hint = format!("as root, first: vireo-launch --socket {} …", path.display());
    let socket = socket::connect(path, what(), hint)?;
    let mut answer = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    match poll(&mut answer, PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX)) {
        Ok(0) => {
            let why = format!("the listener has sent nothing for {patience:?}");
            return Err(Error::new(ErrorKind::Unavailable, what(), why).with_hint(socket::see_listener(path)));
        }
        Ok(_) => {}
        Err(Errno::EINTR) => {
            return Err(Error::new(ErrorKind::Unavailable, what(), "stopped by a signal"));
        }
        Err(errno) => return Err(Error::os(what(), errno)),
    }
    let mut message = [0];
    match rights::receive(&socket, &mut message, &what())? {
        (1, fds) if message == [MESSAGE] && !fds.is_empty() => Ok(fds),
        (0, _) => Err(Error::new(
            ErrorKind::Permission,
            what(),
            "the listener closed the connection: they are for another user",
        )),
        _ => Err(Error::new(ErrorKind::Protocol, what(), "the message is not from Vireo")),
    }
}

/// File name of the VFIO or iommufd node behind `fd`, which is also its name in sysfs.
pub(super) fn node_name(fd: BorrowedFd<'_>) -> Result<String> {
    let what = || format!("cannot use descriptor {} of --vfio-fds", fd.as_raw_fd());
    let found = class_and_name(fd).map_err(|errno| Error::os(what(), errno))?;
    match found.as_ref().map(|(class, name)| (&**class, name)) {
        Some(("vfio" | "vfio-dev", name)) => Ok(name.clone()),
        Some(("misc", name)) if matches!(&**name, "vfio" | "iommu") => Ok(name.clone()),
        _ => Err(Error::new(ErrorKind::Permission, what(), "it is not a VFIO or iommufd node")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    #[test]
    fn what_is_no_device_node_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let file = tempfile::tempfile().unwrap();
        for fd in [null.as_fd(), file.as_fd()] {
            let error = node_name(fd).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Permission);
            assert!(error.to_string().contains("not a VFIO or iommufd node"), "{error}");
        }
    }

    #[test]
    fn a_socket_that_sends_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        for (message, kind) in [(&b""[..], ErrorKind::Permission), (b"n", ErrorKind::Protocol)] {
            let sent = std::thread::scope(|scope| {
                scope.spawn(|| listener.accept().unwrap().0.write_all(message).unwrap());
                receive(&path, PATIENCE)
            });
            assert_eq!(sent.unwrap_err().kind(), kind);
        }
        let error = receive(&path, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("has sent nothing for 50ms; see which process"), "{error}");
        drop(listener);
        let error = DeviceNodes::of(&FdSource::Socket(path)).unwrap_err().to_string();
        assert!(error.contains("vireo-launch --socket"), "{error}");
    }

    #[test]
    fn descriptors_are_given_once_and_by_name() {
        let iommu = || ("iommu".to_owned(), tempfile::tempfile().unwrap().into());
        let nodes = DeviceNodes::passed(vec![iommu(), iommu()]);
        let path = Path::new("/dev/iommu");
        assert!(nodes.has(path) && !nodes.has(Path::new("/dev/vfio/vfio")));
        assert!(nodes.open(path).is_ok() && nodes.open(path).is_ok());
        let error = nodes.open(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert!(error.to_string().contains("none are left"), "{error}");
    }
}
