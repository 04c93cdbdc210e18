//! The runtime directory: one for each `--file-prefix`, used by one process at a time.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Uid, geteuid};

use crate::args::EalArgs;
use crate::error::{Error, ErrorKind, Result};
use crate::handover;

const LOCK: &str = "lock";

/// Directory for sockets and other files that live as long as the process, locked against other processes.
///
/// Dropping it removes the directory with everything inside. If a process dies, the next one takes over its
/// directory.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    /// Lock file. The drop glue releases it after all files are removed.
    lock: File,
    /// Whether the directory belongs to another process, which has the same open lock file: the predecessor of this
    /// process, its successor or its primary.
    is_lent: AtomicBool,
}

impl RuntimeDir {
    /// Creates and locks the directory for `args`. Returns `None` with `--in-memory`.
    ///
    /// # Errors
    /// `Busy` if another process uses the directory, naming that process; `Permission` or `Io` if it cannot
    /// be created.
    pub fn new(args: &EalArgs) -> Result<Option<Self>> {
        if args.memory.in_memory {
            return Ok(None);
        }
        Self::open(&base(geteuid(), variable), &args.file_prefix).map(Some)
    }

    /// Path of the directory for `args`.
    pub(crate) fn path_for(args: &EalArgs) -> PathBuf {
        base(geteuid(), variable).join(&args.file_prefix)
    }

    /// Returns the directory at `path` of a process that has passed its `lock`. It belongs to that process until
    /// [`RuntimeDir::take`].
    pub(crate) fn of_running(path: PathBuf, lock: File) -> Self {
        Self { path, lock, is_lent: AtomicBool::new(true) }
    }

    /// Takes the directory from the predecessor.
    pub(crate) fn take(&self) {
        self.is_lent.store(false, Ordering::Relaxed);
        if let Err(error) = write_pid(&self.lock) {
            tracing::warn!("{}", Error::io(what(&self.path), &error));
        }
    }

    /// Leaves the directory to the successor, which has the lock.
    pub(crate) fn leave(&self) {
        self.is_lent.store(true, Ordering::Relaxed);
    }

    /// Lock of the directory, for a successor.
    pub(crate) fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Opens and locks the directory `prefix` in `base`. Creates both if necessary.
    fn open(base: &Path, prefix: &str) -> Result<Self> {
        // An exiting process may remove the directory while it is opened here, so the opened file must still
        // be in place.
        const TRIES: usize = 100;
        let path = base.join(prefix);
        for _ in 0..TRIES {
            private_dir(base)?;
            private_dir(&path)?;
            // An empty directory belongs to no process, so it is removed.
            let locked = lock(&path).inspect_err(|_| drop(std::fs::remove_dir(&path)))?;
            if let Some(lock) = locked {
                let mut dir = Self { path, lock, is_lent: AtomicBool::new(false) };
                dir.sign()?;
                return Ok(dir);
            }
        }
        Err(Error::new(ErrorKind::Busy, what(&path), "other processes keep creating and removing it")
            .with_hint(OTHER_PREFIX))
    }

    /// Replaces the pid of a previous process, which ended uncleanly, with the pid of this process.
    fn sign(&mut self) -> Result<()> {
        if let Some(pid) = pid_in(&self.lock) {
            tracing::info!("previous run (pid {pid}) ended uncleanly, recovered {}", self.path.display());
        }
        write_pid(&self.lock).map_err(|error| Error::io(what(&self.path), &error))
    }

    /// Path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        if self.is_lent.load(Ordering::Relaxed) {
            return;
        }
        // By name, because a process with too many open files cannot read the directory.
        let _ = std::fs::remove_file(self.path.join(handover::SOCKET));
        // Remove the lock file last, and then the directory, unless another process has started to use it.
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name() != LOCK) {
            let _ = match entry.file_type() {
                Ok(kind) if kind.is_dir() => std::fs::remove_dir_all(entry.path()),
                _ => std::fs::remove_file(entry.path()),
            };
        }
        // After `--user` the lock file cannot be unlinked; truncating it marks a clean exit.
        let _ = self.lock.set_len(0);
        let _ = std::fs::remove_file(self.path.join(LOCK));
        let _ = std::fs::remove_dir(&self.path);
    }
}

const OTHER_PREFIX: &str = "start with another --file-prefix NAME, or with --in-memory";

fn what(path: &Path) -> String {
    format!("cannot use the runtime directory {}", path.display())
}

/// Directory of DPDK's processes with this `--file-prefix`, where their clients look for sockets. Creates it
/// if necessary.
///
/// # Errors
/// `Permission` or `Io` if it cannot be created.
pub(crate) fn dpdk_dir(prefix: &str) -> Result<PathBuf> {
    let base = dpdk_base();
    let path = base.join(prefix);
    private_dir(&base)?;
    private_dir(&path)?;
    Ok(path)
}

/// Directory of the directories of DPDK's processes.
pub(crate) fn dpdk_base() -> PathBuf {
    place(geteuid(), variable).unwrap_or("/tmp".into()).join("dpdk")
}

/// Value of an environment variable, unless it is empty.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Returns the directory `vireo` in the place where DPDK has its runtime directories. In `/tmp`, which all
/// users share, each user has a separate directory.
fn base(user: Uid, variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    place(user, variable).map_or_else(|| format!("/tmp/vireo-{user}").into(), |dir| dir.join("vireo"))
}

/// Returns the directory in which DPDK has its runtime directories; `None` stands for `/tmp`.
fn place(user: Uid, variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    // systemd joins several directories with colons.
    let given = variable("RUNTIME_DIRECTORY").and_then(|value| std::env::split_paths(&value).next());
    let of_user = || if user.is_root() { Some("/var/run".into()) } else { variable("XDG_RUNTIME_DIR") };
    given.or_else(of_user)
}

/// Creates `path` with mode 0700, or checks that it is a directory of this user that no other user may write
/// to.
fn private_dir(path: &Path) -> Result<()> {
    let hint = "set RUNTIME_DIRECTORY to a directory of your own, or use --in-memory";
    let failed = |error: &std::io::Error| Error::io(what(path), error).with_hint(hint);
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::EEXIST as i32) => {}
        Err(error) => return Err(failed(&error)),
    }
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        // Its last user has just removed it. The caller tries again.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(&error)),
    };
    let why = if !found.is_dir() {
        "it is not a directory"
    } else if found.uid() != geteuid().as_raw() {
        "it belongs to another user"
    } else if found.mode() & 0o022 != 0 {
        "other users may write to it"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Permission, what(path), why).with_hint(hint))
}

/// Locks `dir`. Returns `None` if it was removed in the meantime.
fn lock(dir: &Path) -> Result<Option<File>> {
    let path = dir.join(LOCK);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = match options.custom_flags((OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits()).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(what(dir), &error)),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(busy(dir, &file)),
        Err(TryLockError::Error(error)) => return Err(Error::io(what(dir), &error)),
    }
    let inode = file.metadata().map_err(|error| Error::io(what(dir), &error))?.ino();
    if std::fs::metadata(&path).map_or(true, |found| found.ino() != inode) {
        return Ok(None);
    }
    Ok(Some(file))
}

fn busy(dir: &Path, lock: &File) -> Error {
    let is_gone = |pid: &u32| !Path::new(&format!("/proc/{pid}")).exists();
    // After a take-over, the kernel still names the predecessor, which locked the file.
    let holder = match holder(lock) {
        Some(pid) if is_gone(&pid) => pid_in(lock),
        holder => holder,
    };
    let why = match holder {
        Some(pid) => {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("in use by pid {pid} ({})", comm.trim())
        }
        None => {
            "in use by a process that cannot be seen from here, such as one in another PID namespace".into()
        }
    };
    Error::new(ErrorKind::Busy, what(dir), why).with_hint(OTHER_PREFIX)
}

/// Returns the process that holds the lock, from the kernel's own list (proc_locks(5)). The pid in the file
/// may be from another PID namespace, and may stand for a different process in this one.
fn holder(lock: &File) -> Option<u32> {
    let inode = lock.metadata().ok()?.ino();
    holder_in(&std::fs::read_to_string("/proc/locks").ok()?, inode)
}

/// Finds the holder in lines such as `1: FLOCK  ADVISORY  WRITE 4711 00:1a:23 0 EOF`. A `->` after the number
/// marks a process that waits.
fn holder_in(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &[_, "FLOCK", _, _, pid, file, ..] = &fields[..] else { return None };
        (file.rsplit(':').next()?.parse() == Ok(inode)).then(|| pid.parse().ok())?
    })
}

fn pid_in(mut file: &File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn write_pid(mut file: &File) -> std::io::Result<()> {
    file.rewind()?;
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn fresh() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("vireo");
        (dir, base)
    }

    #[test]
    fn made_private_and_removed() {
        let (_dir, base) = fresh();
        let runtime = RuntimeDir::open(&base, "rte").unwrap();
        let path = runtime.path().to_owned();
        assert_eq!(path, base.join("rte"));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        std::fs::write(path.join("socket"), "").unwrap();
        std::fs::create_dir(path.join("sub")).unwrap();
        drop(runtime);
        assert!(!path.exists());
        RuntimeDir::open(&base, "rte").unwrap();
    }

    #[test]
    fn a_second_one_is_told_of_the_first() {
        let (_dir, base) = fresh();
        let _first = RuntimeDir::open(&base, "rte").unwrap();
        let error = RuntimeDir::open(&base, "rte").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap();
        let holder = format!(
            "in use by pid {} ({}); start with another --file-prefix",
            std::process::id(),
            comm.trim()
        );
        assert!(error.to_string().contains(&holder), "{error}");
        RuntimeDir::open(&base, "other").unwrap();
    }

    #[test]
    fn what_a_dead_process_left_is_taken_over() {
        let (_dir, base) = fresh();
        let path = base.join("rte");
        DirBuilder::new().mode(0o700).recursive(true).create(&path).unwrap();
        for left in ["4194303\n", "", "not a pid", "99999999999999999999999999"] {
            std::fs::write(path.join(LOCK), left).unwrap();
            let runtime = RuntimeDir::open(&base, "rte").unwrap();
            assert_eq!(
                std::fs::read_to_string(path.join(LOCK)).unwrap(),
                format!("{}\n", std::process::id())
            );
            drop(runtime);
            DirBuilder::new().mode(0o700).create(&path).unwrap();
        }
    }

    #[test]
    fn a_directory_that_others_write_to_is_refused() {
        let (dir, base) = fresh();
        std::fs::create_dir(&base).unwrap();
        std::fs::set_permissions(&base, PermissionsExt::from_mode(0o777)).unwrap();
        let error = RuntimeDir::open(&base, "rte").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);

        let link = dir.path().join("link");
        symlink("/tmp", &link).unwrap();
        let error = RuntimeDir::open(&link, "rte").unwrap_err();
        assert!(error.to_string().contains("not a directory"), "{error}");
    }

    #[test]
    fn processes_that_come_and_go_never_hold_it_together() {
        let (_dir, base) = fresh();
        let inside = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Ok(runtime) = RuntimeDir::open(&base, "rte") else { continue };
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(runtime);
                    }
                });
            }
        });
        RuntimeDir::open(&base, "rte").unwrap();
    }

    #[test]
    fn the_place_is_that_of_dpdk() {
        let set = |wanted: &'static str, value: &'static str| {
            move |name: &str| (name == wanted).then(|| PathBuf::from(value))
        };
        let (root, user) = (Uid::from_raw(0), Uid::from_raw(1000));
        assert_eq!(base(root, set("RUNTIME_DIRECTORY", "/run/x")), Path::new("/run/x/vireo"));
        assert_eq!(base(root, set("RUNTIME_DIRECTORY", "/run/x:/run/y")), Path::new("/run/x/vireo"));
        assert_eq!(base(root, set("XDG_RUNTIME_DIR", "/run/x")), Path::new("/var/run/vireo"));
        assert_eq!(base(user, set("XDG_RUNTIME_DIR", "/run/x")), Path::new("/run/x/vireo"));
        assert_eq!(base(user, set("", "")), Path::new("/tmp/vireo-1000"));
    }

    #[test]
    fn only_who_holds_the_lock_is_named() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1a:23 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 12 00:1a:24 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 00:1a:23 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 14 00:1a:25 0 EOF\n";
        assert_eq!(holder_in(locks, 23), Some(13));
        assert_eq!(holder_in(locks, 25), None);
        assert_eq!(holder_in("nonsense\n", 23), None);
        let file = tempfile::tempfile().unwrap();
        assert_eq!(holder(&file), None);
        file.lock().unwrap();
        assert_eq!(holder(&file), Some(std::process::id()));
    }
}
