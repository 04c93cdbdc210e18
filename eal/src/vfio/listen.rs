//! Descriptors that the process was started with (`LISTEN_FDS`, sd_listen_fds(3)).

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;

use super::acquire::lock;
use super::device_nodes::node_name;
use crate::args::quoted;
use crate::error::{Error, ErrorKind, Result};
use crate::rights::MAX_FDS;

/// Number of the first passed descriptor (`SD_LISTEN_FDS_START`).
pub(crate) const LISTEN_FDS_START: RawFd = 3;

/// Number of descriptors, from [`LISTEN_FDS_START`] on, that the process was started with. The kernel has not
/// given their numbers to anything in the process, so nothing in it owns them.
static PASSED: AtomicI32 = AtomicI32::new(0);

/// Counts the passed descriptors before `main`. Later, a descriptor with such a number may belong to anything
/// in the process, whatever the environment announces.
extern "C" fn count_passed() {
    // SAFETY: F_GETFD changes nothing, and the kernel returns EBADF for a descriptor that is not open.
    let is_open = |fd: &RawFd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0;
    let passed = (LISTEN_FDS_START..).take(MAX_FDS).take_while(is_open).count();
    PASSED.store(passed as i32, Ordering::Relaxed);
}

// SAFETY: the section is a list of functions that the C library calls before `main`. This function makes
// system calls and stores an atomic, which needs nothing of Rust's runtime, and cannot panic.
#[unsafe(link_section = ".init_array")]
#[used]
static COUNT_PASSED: extern "C" fn() = count_passed;

/// Takes the descriptors that the environment announces. This succeeds only once.
pub(super) fn listen_fds() -> Result<Vec<OwnedFd>> {
    static TAKEN: Mutex<bool> = Mutex::new(false);
    let variable = |name: &str| std::env::var(name).ok();
    let count =
        promised(variable("LISTEN_PID").as_deref(), variable("LISTEN_FDS").as_deref(), std::process::id())?;
    let wrong = |why: String| Error::new(ErrorKind::Usage, CANNOT_TAKE, why).with_hint(HINT);
    let mut taken = lock(&TAKEN);
    if *taken {
        return Err(wrong("they have already been taken".into()));
    }
    let passed = PASSED.load(Ordering::Relaxed);
    if count > passed {
        let missing = LISTEN_FDS_START + passed;
        return Err(wrong(format!(
            "LISTEN_FDS is {count}, but descriptor {missing} was not open at start-up"
        )));
    }
    let fds = LISTEN_FDS_START..LISTEN_FDS_START + count;
    for fd in fds.clone() {
        // SAFETY: the borrow lasts for these checks only, and the kernel returns EBADF for a descriptor that
        // is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|errno| wrong(format!("descriptor {fd} is no longer open ({errno:?})")))?;
        node_name(borrowed)?;
    }
    *taken = true;
    // SAFETY: `PASSED` shows that nothing in this process owns them, LISTEN_PID that they are for it, and
    // `TAKEN` that this happens once.
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect())
}

const CANNOT_TAKE: &str = "cannot take the descriptors of --vfio-fds listen";
const HINT: &str = "start with: vireo-launch --user USER COMMAND, or with OpenFile= of systemd";

/// Returns the number of descriptors that `LISTEN_PID` and `LISTEN_FDS` announce to process `own`.
fn promised(pid: Option<&str>, fds: Option<&str>, own: u32) -> Result<RawFd> {
    let wrong = |why: String| Err(Error::new(ErrorKind::Usage, CANNOT_TAKE, why).with_hint(HINT));
    let (Some(pid), Some(fds)) = (pid, fds) else {
        return wrong("LISTEN_PID and LISTEN_FDS are not set".into());
    };
    match (pid.parse::<u32>(), fds.parse::<RawFd>()) {
        (Ok(pid), _) if pid != own => {
            wrong(format!("they are for pid {pid} (LISTEN_PID), but this is pid {own}"))
        }
        (Ok(_), Ok(count)) if (1..=MAX_FDS as RawFd).contains(&count) => Ok(count),
        (Ok(_), _) => wrong(format!("LISTEN_FDS is {}, not 1 to {MAX_FDS}", quoted(fds))),
        (Err(_), _) => wrong(format!("LISTEN_PID is {}, not a pid", quoted(pid))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_environment_is_checked() {
        assert_eq!(promised(Some("7"), Some("2"), 7).unwrap(), 2);
        let cases = [
            (None, Some("2"), "are not set"),
            (Some("7"), None, "are not set"),
            (Some("8"), Some("2"), "they are for pid 8 (LISTEN_PID), but this is pid 7"),
            (Some("x"), Some("2"), "LISTEN_PID is \"x\", not a pid"),
            (Some("7"), Some("0"), "not 1 to 253"),
            (Some("7"), Some("-1"), "not 1 to 253"),
            (Some("7"), Some("254"), "not 1 to 253"),
            (Some("7"), Some("two\n"), "LISTEN_FDS is \"two\\n\", not"),
        ];
        for (pid, fds, why) in cases {
            let error = promised(pid, fds, 7).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    /// Runs in its own process; see the test below.
    #[test]
    #[ignore = "run by what_was_opened_later_is_nobody_elses"]
    fn child_that_takes_descriptor_3() {
        let own: Vec<File> = (0..8).map(|_| File::open("/dev/null").unwrap()).collect();
        let error = listen_fds().unwrap_err();
        println!("{error}");
        assert!(own.iter().all(|file| file.as_raw_fd() > 0 && file.metadata().is_ok()));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri cannot start processes")]
    fn what_was_opened_later_is_nobody_elses() {
        let own = std::env::current_exe().unwrap();
        let child = format!(
            "export LISTEN_PID=$$ LISTEN_FDS=1; exec {} --exact --ignored --nocapture {}::child_that_takes_descriptor_3",
            own.display(),
            module_path!().split_once("::").unwrap().1
        );
        for (descriptor, why) in [
            ("3<&-", "LISTEN_FDS is 1, but descriptor 3 was not open at start-up"),
            ("3</dev/null", "it is not a VFIO or iommufd node"),
        ] {
            let output = Command::new("sh").args(["-c", &format!("{child} {descriptor}")]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains(why), "{text}");
        }
    }
}
