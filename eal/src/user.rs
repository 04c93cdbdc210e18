//! Dropping root privileges permanently: user, groups, capabilities (`--user`), and a command started without
//! them.

use std::ffi::OsString;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::str::FromStr;

use caps::CapSet;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Group, Uid, getresgid, getresuid, setgroups, setresgid, setresuid};

use crate::args::quoted;
use crate::error::{Error, ErrorKind, Result};
use crate::vfio::listen::LISTEN_FDS_START;

/// Id that setresuid(2) and setresgid(2) take as "unchanged".
const KEEP: u32 = u32::MAX;

/// User and group as `USER[:GROUP]`, each a name or a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName {
    user: String,
    group: Option<String>,
}

impl FromStr for UserName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        if user.is_empty() || group.is_some_and(str::is_empty) || text.contains(char::is_whitespace) {
            let what = format!("--user {}", quoted(text));
            return Err(Error::new(ErrorKind::Usage, what, "it is not of the form USER or USER:GROUP")
                .with_hint("for example: nobody, or 65534:65534"));
        }
        Ok(Self { user: user.to_owned(), group: group.map(str::to_owned) })
    }
}

/// Ids of a user and a group, neither of which is root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    uid: Uid,
    gid: Gid,
}

impl UserName {
    /// Looks up the user and the group.
    ///
    /// # Errors
    /// `Usage` if the user or group does not exist or is root, or if the number is not a valid id.
    pub fn find(&self) -> Result<User> {
        let what = || format!("--user {}", quoted(&self.user));
        let wrong = |why: &str, hint: &str| Error::new(ErrorKind::Usage, what(), why).with_hint(hint);
        let number: Option<u32> = self.user.parse().ok();
        let entry = match number {
            Some(uid) => nix::unistd::User::from_uid(Uid::from_raw(uid)),
            None => nix::unistd::User::from_name(&self.user),
        };
        let entry = entry.map_err(|errno| Error::os(format!("cannot look up {}", what()), errno))?;
        let uid = number.map(Uid::from_raw).or(entry.as_ref().map(|entry| entry.uid));
        let uid = uid.ok_or_else(|| wrong("there is no such user", "list them: getent passwd"))?;
        let gid = match (&self.group, entry) {
            (Some(group), _) => group_id(group)?,
            (None, Some(entry)) => entry.gid,
            (None, None) => return Err(wrong("its group is unknown", "give UID:GID")),
        };
        if uid.is_root() || gid == Gid::from_raw(0) {
            return Err(wrong(
                "the user or the group is root, which keeps every privilege",
                "name another user and group",
            ));
        }
        if uid.as_raw() == KEEP || gid.as_raw() == KEEP {
            let why = format!("{KEEP} is not an id: the kernel would keep the current one");
            return Err(wrong(&why, "name another user and group"));
        }
        Ok(User { uid, gid })
    }
}

fn group_id(group: &str) -> Result<Gid> {
    if let Ok(gid) = group.parse() {
        return Ok(Gid::from_raw(gid));
    }
    let found = Group::from_name(group)
        .map_err(|errno| Error::os(format!("cannot look up group {}", quoted(group)), errno))?;
    found.map(|group| group.gid).ok_or_else(|| {
        Error::new(ErrorKind::Usage, format!("--user …:{}", quoted(group)), "there is no such group")
            .with_hint("list them: getent group")
    })
}

impl User {
    /// User id.
    pub fn uid(self) -> u32 {
        self.uid.as_raw()
    }

    /// Group id.
    pub fn gid(self) -> u32 {
        self.gid.as_raw()
    }

    /// Becomes this user permanently: with its user id, its group id and no other group, without
    /// capabilities, and without gaining any from an executable. The kernel then makes the process not
    /// dumpable: it writes no core dump, and the user's other processes cannot trace it.
    ///
    /// A process that already runs as this user keeps its groups, which only root can change. Ids change in
    /// all threads, and giving up root's ids also drops the capabilities. The bounding set and `no_new_privs`
    /// apply to the calling thread and to threads that it starts later.
    ///
    /// # Errors
    /// `Permission` if the process is neither root nor this user, or if it has other ids afterwards.
    pub fn drop_privileges(self) -> Result<()> {
        let what = || format!("cannot switch to user {} and group {}", self.uid, self.gid);
        let failed = |errno| {
            let error = Error::os(what(), errno);
            if errno == Errno::EPERM { error.with_hint("start as root, or leave --user out") } else { error }
        };
        if !self.is_current() {
            // The bounding set is cleared first, because that takes CAP_SETPCAP.
            clear(CapSet::Bounding)?;
            setgroups(&[]).map_err(failed)?;
            setresgid(self.gid, self.gid, self.gid).map_err(failed)?;
            setresuid(self.uid, self.uid, self.uid).map_err(failed)?;
            if !self.is_current() {
                return Err(Error::new(ErrorKind::Permission, what(), "the process still has other ids"));
            }
        }
        [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted]
            .into_iter()
            .try_for_each(clear)?;
        prctl::set_no_new_privs().map_err(failed)
    }

    /// Returns whether the process has the ids of this user, and no other.
    fn is_current(self) -> bool {
        getresuid().is_ok_and(|ids| [ids.real, ids.effective, ids.saved] == [self.uid; 3])
            && getresgid().is_ok_and(|ids| [ids.real, ids.effective, ids.saved] == [self.gid; 3])
    }
}

fn clear(set: CapSet) -> Result<()> {
    caps::clear(None, set).map_err(|error| {
        Error::new(ErrorKind::Permission, "cannot drop capabilities", error.to_string())
            .with_hint("start as root, or leave --user out")
    })
}

/// Replaces this process with `program`, run as `user`, with no limit on locked memory and with `fds` passed
/// the way systemd does (`LISTEN_FDS`, sd_listen_fds(3)). Returns only if that fails, with the reason. The
/// process then still has its descriptors, but may have become `user` already.
pub fn exec(program: &OsString, args: &[OsString], user: User, fds: Vec<OwnedFd>) -> Error {
    if let Err(errno) = setrlimit(Resource::RLIMIT_MEMLOCK, libc::RLIM_INFINITY, libc::RLIM_INFINITY) {
        return Error::os("cannot raise the limit of locked memory", errno).with_hint("start as root");
    }
    if let Err(error) = user.drop_privileges() {
        return error;
    }
    replace(program, args, &fds)
}

/// Replaces this process with `program`, which gets `fds`, or returns the reason why it could not. A thread
/// with its own copy of the descriptor table does it. The thread overwrites descriptors 3, 4, … only in that
/// copy, so they stay open for the other threads.
fn replace(program: &OsString, args: &[OsString], fds: &[OwnedFd]) -> Error {
    let what = || format!("cannot start {}", quoted(&program.to_string_lossy()));
    let start = || {
        if let Err(errno) = unshare(CloneFlags::CLONE_FILES) {
            return Error::os(what(), errno);
        }
        // The descriptors first move above all their final places, so that no move overwrites one that is
        // still to be moved.
        let above = LISTEN_FDS_START + fds.len() as RawFd;
        let moved: nix::Result<Vec<RawFd>> =
            fds.iter().map(|fd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(above))).collect();
        let moved = match moved {
            Ok(moved) => moved,
            Err(errno) => return Error::os(what(), errno),
        };
        let mut command = Command::new(program);
        command
            .args(args)
            .env("LISTEN_PID", std::process::id().to_string())
            .env("LISTEN_FDS", fds.len().to_string())
            .env_remove("LISTEN_FDNAMES")
            // This is root's directory, in which the user can do nothing.
            .env_remove("XDG_RUNTIME_DIR");
        let place = move || {
            moved.iter().zip(LISTEN_FDS_START..).try_for_each(|(from, to)| {
                // SAFETY: `dup2` closes what was open at `to` in the table of this thread only. The thread
                // owns none of it, and either becomes the program or ends.
                Errno::result(unsafe { libc::dup2(*from, to) }).map(drop).map_err(std::io::Error::from)
            })
        };
        // SAFETY: `place` only makes system calls, in this very process and thread.
        unsafe { command.pre_exec(place) };
        Error::io(what(), &command.exec())
    };
    std::thread::scope(|scope| match std::thread::Builder::new().spawn_scoped(scope, start) {
        Ok(thread) => thread
            .join()
            .unwrap_or_else(|_| Error::new(ErrorKind::Os, what(), "the thread that starts it panicked")),
        Err(error) => Error::io(what(), &error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let found = |text: &str| text.parse::<UserName>().and_then(|name| name.find());
        let nobody = found("nobody").unwrap();
        assert_eq!(found("65534:65534").unwrap().uid(), 65534);
        assert_eq!(found(&format!("{}:{}", nobody.uid(), nobody.gid())), Ok(nobody));
        assert_eq!(found("4000000:4000001").unwrap().gid(), 4_000_001);
        let cases = [
            ("", "not of the form"),
            (":1", "not of the form"),
            ("nobody:", "not of the form"),
            ("no body", "not of the form"),
            ("no-such-user", "there is no such user; list them"),
            ("nobody:no-such-group", "there is no such group"),
            ("4000000", "give UID:GID"),
            ("root", "is root, which keeps every privilege"),
            ("0:5", "is root, which keeps every privilege"),
            ("nobody:0", "is root, which keeps every privilege"),
            ("4294967295:4294967295", "4294967295 is not an id"),
            ("4294967295:1", "4294967295 is not an id"),
            ("nobody:4294967295", "4294967295 is not an id"),
        ];
        for (text, why) in cases {
            let error = found(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_program_that_does_not_start_leaves_descriptors_as_they_were() {
        use std::os::fd::AsRawFd;
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        let before = file.metadata().unwrap().ino();
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let over_it: Vec<OwnedFd> = (LISTEN_FDS_START..=file.as_raw_fd()).map(|_| null()).collect();
        let error = replace(&"/no/such/program".into(), &[], &over_it);
        assert_eq!(error.errno(), Some(Errno::ENOENT), "{error}");
        assert_eq!(file.metadata().unwrap().ino(), before);
    }

    #[test]
    fn ids_that_were_kept_are_noticed() {
        let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
        assert!(User { uid, gid }.is_current());
        let keep = User { uid: Uid::from_raw(KEEP), gid: Gid::from_raw(KEEP) };
        assert!(
            !keep.is_current() && !User { uid, ..keep }.is_current() && !User { gid, ..keep }.is_current()
        );
    }
}
