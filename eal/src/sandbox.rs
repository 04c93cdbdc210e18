//! What a program may do after set-up: an allow-list of system calls (seccomp) for all its threads, and of
//! files (Landlock). It confines a driver that a misbehaving device has subverted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, RestrictSelfAttr, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use syscalls::Sysno;

use crate::error::{Error, ErrorKind, Result};

/// Newest Landlock ABI that is requested. An older kernel enforces the part that it knows.
const LANDLOCK: ABI = ABI::V8;

/// Sandbox that is not closed yet. Its paths are already open, because they may be out of reach when it is
/// closed.
pub(crate) struct Sandbox {
    files: RulesetCreated,
    /// Whether unix sockets can be created.
    sockets: bool,
}

impl Sandbox {
    /// Prepares a sandbox. Files and directories in `removable` can be removed. In `sockets`, unix sockets
    /// can be created and files can be removed. The rest of the file system is inaccessible. If `sockets` is
    /// empty, the system calls that create sockets are denied too.
    pub(crate) fn new(removable: &[&Path], sockets: &[PathBuf]) -> Result<Self> {
        let rules = || {
            let mut ruleset = Ruleset::default()
                .handle_access(AccessFs::from_all(LANDLOCK))?
                .handle_access(AccessNet::from_all(LANDLOCK))?
                .scope(Scope::from_all(LANDLOCK))?
                .create()?
                .all_threads(true)?;
            let remove = AccessFs::ReadDir | AccessFs::RemoveFile | AccessFs::RemoveDir;
            let removable = removable.iter().map(|directory| (*directory, remove));
            let made = AccessFs::MakeSock | AccessFs::RemoveFile;
            for (directory, access) in removable.chain(sockets.iter().map(|path| (path.as_path(), made))) {
                ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(directory)?, access))?;
            }
            Ok(Self { files: ruleset, sockets: !sockets.is_empty() })
        };
        rules().map_err(|error: Box<dyn std::error::Error>| failed(&*error))
    }

    /// Closes the sandbox permanently. Features that the kernel lacks are logged and left out.
    pub(crate) fn close(self) -> Result<()> {
        let status = self.files.restrict_self().map_err(|error| failed(&error))?.ruleset;
        if status == RulesetStatus::NotEnforced {
            tracing::info!(
                "the sandbox does not restrict files: this kernel has no Landlock, or it is off (lsm=)"
            );
        }
        trap_denied()?;
        set_up_malloc();
        // The order matters: the second filter denies installing another one.
        for program in [without_clone3(), allow_list(self.sockets)] {
            let program = program.map_err(|error| failed(&error))?;
            match seccompiler::apply_filter_all_threads(&program) {
                Ok(()) => {}
                Err(seccompiler::Error::Seccomp(error)) if error.raw_os_error() == Some(libc::EINVAL) => {
                    tracing::info!(
                        "the sandbox does not restrict system calls: this kernel has no CONFIG_SECCOMP_FILTER"
                    );
                    return Ok(());
                }
                Err(error) => return Err(failed(&error)),
            }
        }
        tracing::debug!("entered the sandbox: seccomp on all threads, Landlock {status:?}");
        Ok(())
    }
}

fn failed(error: &dyn std::error::Error) -> Error {
    Error::new(ErrorKind::Os, "cannot enter the sandbox", error.to_string())
        .with_hint("start with --no-sandbox")
}

/// Keeps glibc's malloc from opening files, which the sandbox denies: `/proc/sys/vm/overcommit_memory` before it
/// returns a thread's memory to the kernel (`check_may_shrink_heap`), and `/sys/devices/system/cpu/online` when
/// more than eight threads have heaps of their own (`arena_get2`).
fn set_up_malloc() {
    #[cfg(target_env = "gnu")]
    {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let arenas = (8 * cpus).try_into().unwrap_or(libc::c_int::MAX);
        // SAFETY: mallopt may be called at any time, and takes its arguments by value. As a size, -1 is the
        // largest. glibc has the same limit: eight heaps per CPU.
        unsafe {
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
            libc::mallopt(libc::M_ARENA_MAX, arenas);
        }
    }
}

/// Filter that fails `clone3` with ENOSYS. glibc tries `clone3` first, whose flags are in memory, where no
/// filter can check them. Without it, glibc uses `clone`.
fn without_clone3() -> seccompiler::Result<BpfProgram> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    program(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

/// Filter that allows the system calls that l2fwd and pktgen make from their first packet to their exit, as
/// strace shows them, and those that the C library may make instead on another machine.
fn allow_list(sockets: bool) -> seccompiler::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALWAYS.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_ioctl, any_of(1, IOCTLS)?);
    rules.insert(libc::SYS_prctl, any_of(0, PRCTLS)?);
    rules.insert(libc::SYS_socketpair, any_of(0, &[libc::AF_UNIX as u64])?);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![masked(2, libc::PROT_EXEC as u64, 0)?]);
    }
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    let directory = libc::O_DIRECTORY as u64;
    let writes = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
    rules.insert(libc::SYS_openat, vec![masked(2, directory | writes, directory)?]);
    if sockets {
        rules.insert(libc::SYS_socket, any_of(0, &[libc::AF_UNIX as u64])?);
        rules.extend([libc::SYS_bind, libc::SYS_listen, libc::SYS_connect].map(|call| (call, Vec::new())));
    }
    program(rules, SeccompAction::Trap, SeccompAction::Allow)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> seccompiler::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()?)
}

fn any_of(argument: u8, values: &[u64]) -> seccompiler::Result<Vec<SeccompRule>> {
    values.iter().map(|value| rule(argument, SeccompCmpOp::Eq, *value)).collect()
}

fn masked(argument: u8, mask: u64, value: u64) -> seccompiler::Result<SeccompRule> {
    rule(argument, SeccompCmpOp::MaskedEq(mask), value)
}

/// Compares the lower half of an argument: the kernel takes all of these arguments as 32 bits.
fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> seccompiler::Result<SeccompRule> {
    Ok(SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])?)
}

/// Ioctls that are made after set-up: `VFIO_DEVICE_SET_IRQS`, `VFIO_DEVICE_RESET`, `VFIO_IOMMU_UNMAP_DMA`,
/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`, `IOMMU_DESTROY`, `IOMMU_IOAS_UNMAP`, `FIONREAD` for the room in standard
/// output, and the standard library's ioctls for terminals and sockets.
const IOCTLS: &[u64] =
    &[0x3b6e, 0x3b6f, 0x3b72, 0x3b78, 0x3b80, 0x3b86, libc::FIONREAD, libc::TCGETS, libc::FIONBIO];

/// Prctls that name threads and the C library's memory.
const PRCTLS: &[u64] = &[libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64];

const ALWAYS: &[i64] = &[
    // Devices, sockets, standard streams.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Finding out what kind of descriptor a frontend has passed.
    libc::SYS_readlinkat,
    // Removing the runtime directory and sockets at exit.
    libc::SYS_getdents64,
    libc::SYS_unlinkat,
    libc::SYS_flock,
    libc::SYS_ftruncate,
    // Memory, none of it executable: see `allow_list`.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads and time.
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // Signals and exit.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Older system calls, which the C library uses where they exist.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
];

/// Installs a handler that terminates the process at a denied call, and names the call on standard error.
fn trap_denied() -> Result<()> {
    let action = SigAction::new(SigHandler::SigAction(denied), SaFlags::SA_NODEFER, SigSet::empty());
    // SAFETY: the handler makes async-signal-safe calls only and does not return.
    unsafe { sigaction(Signal::SIGSYS, &action) }
        .map(drop)
        .map_err(|errno| Error::os("cannot handle SIGSYS", errno))
}

/// Offset of `si_syscall` in `siginfo_t`, in 32-bit words (sigaction(2)). It follows 16 bytes and
/// `si_call_addr`.
const SI_SYSCALL: usize = (16 + size_of::<*const ()>()) / 4;

extern "C" fn denied(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a `siginfo_t`, which is aligned and longer than this offset.
    let number = unsafe { info.cast::<c_int>().add(SI_SYSCALL).read() };
    let mut digits = [0; 10];
    let name = Sysno::new(number as usize).map_or("unknown", |call| call.name());
    for text in [
        b"EAL: the sandbox denies the system call ",
        name.as_bytes(),
        b" (",
        decimal(number.unsigned_abs(), &mut digits),
        b"); if the program needs it, start it with --no-sandbox\n",
    ] {
        // SAFETY: the bytes live for the call. If the write fails, the exit code still shows the denial.
        let _ = Errno::result(unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) });
    }
    // SAFETY: `_exit` ends the process and runs none of its code.
    unsafe { libc::_exit(ErrorKind::Permission.exit_code().into()) }
}

/// Formats `number` in decimal, without the allocation that formatting by the standard library may make.
fn decimal(mut number: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_compile() {
        for program in [without_clone3(), allow_list(false), allow_list(true)] {
            assert!(!program.unwrap().is_empty());
        }
    }

    #[test]
    fn digits() {
        let mut room = [0; 10];
        for number in [0, 7, 41, u32::MAX] {
            assert_eq!(decimal(number, &mut room), number.to_string().as_bytes());
        }
    }
}
