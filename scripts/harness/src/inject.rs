//! System calls of a start that fail one after the other: each time a documented exit code, one line, and
//! nothing left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::case::{Context, read, skip};
use crate::l2fwd::{Ended, Start};

/// A system call, and an error that the kernel has for it.
pub(crate) type Call = (&'static str, &'static str);

/// Calls that every start makes. No table has brk, mprotect, rt_sigaction, rt_sigprocmask and close: only the
/// C library and Rust's std make these calls, and they end the process if one fails. No table has futex and
/// shutdown: the kernel has no error for a `FUTEX_WAKE` of a valid address or for the shutdown of a Unix
/// socket, and a thread that waits for one that failed waits forever.
pub(crate) const OF_EVERY_START: [Call; 17] = [
    ("write", "ENOSPC"),
    ("statx", "EACCES"),
    ("fcntl", "EMFILE"),
    ("readlink", "EACCES"),
    ("getdents64", "EIO"),
    ("lseek", "EINVAL"),
    ("flock", "ENOLCK"),
    ("mkdir", "EACCES"),
    ("unlink", "EACCES"),
    ("rmdir", "EACCES"),
    ("sched_getaffinity", "EINVAL"),
    ("sched_setaffinity", "EINVAL"),
    ("sigaltstack", "ENOMEM"),
    ("prctl", "EINVAL"),
    ("getrandom", "ENOSYS"),
    ("clock_nanosleep", "EINTR"),
    ("clone3", "EAGAIN"),
];

/// Calls whose failure may leave a file behind, because they remove it or find out whose it is. The next
/// start removes the file.
const LEAVES_NAMES: [&str; 5] = ["unlink", "rmdir", "getdents64", "statx", "flock"];

/// A start of l2fwd that is made to fail.
pub(crate) struct Target<'a> {
    /// How l2fwd is started.
    pub(crate) start: Start,
    /// Whether the start is complete with this event, so that l2fwd can be stopped.
    pub(crate) is_up: &'a dyn Fn(&Value) -> bool,
    /// What l2fwd has left behind after its end, if anything. Names are not included, because some calls may
    /// leave them.
    pub(crate) left: &'a dyn Fn(&Ended) -> Result<Option<String>>,
    /// Name of a file or directory that is left behind, if any.
    pub(crate) names: &'a dyn Fn() -> Option<String>,
}

impl std::fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.start.fmt(f)
    }
}

/// Fails each `call` of the start with `error` in turn. strace counts the calls of each thread separately, so
/// those of the main thread alone come first, and then, with `-f`, those of the others.
pub(crate) fn fail_each(context: &Context, target: &Target<'_>, (call, error): Call) -> Result<()> {
    let mut codes: BTreeMap<i32, u32> = BTreeMap::new();
    let mut harmless = BTreeSet::new();
    for follow in [&[][..], &["-f"]] {
        let (ended, pid) = traced(context, target, follow, &[&format!("trace={call}")])?;
        ensure!(ended.code == 0, "l2fwd exited with {} although nothing failed", ended.code);
        for number in 1..=count(&read(context.path("trace"))?, call, pid) {
            let inject = format!("inject={call}:error={error}:when={number}");
            let (ended, _) = traced(context, target, follow, &[&format!("trace={call}"), &inject])?;
            if let Err(error) = judge(&ended, target, call) {
                bail!("{call} {number}{}: {error}\n{}", follow.concat(), ended.stderr);
            }
            if ended.code == 0 {
                harmless.extend(injected(&read(context.path("trace"))?));
            }
            *codes.entry(ended.code).or_default() += 1;
        }
    }
    if codes.is_empty() {
        return skip(format!("a start does not call {call}"));
    }
    let (ended, _) = traced(context, target, &[], &["trace=none"])?;
    ensure!(ended.code == 0 && ended.complaints().is_empty(), "the next start exited with {}", ended.code);
    let list: Vec<String> = codes.iter().map(|(code, times)| format!("{code} x {times}")).collect();
    context.note(format!("{} calls; exit codes: {}", codes.values().sum::<u32>(), list.join(", ")));
    if context.full {
        harmless.iter().for_each(|call| context.note(format!("continues without: {call}")));
    }
    Ok(())
}

/// Runs a start under strace and stops it if it comes up. The start has no sandbox: strace replaces a call that must fail
/// with one that does not exist, which the sandbox would deny.
fn traced(
    context: &Context,
    target: &Target<'_>,
    options: &[&str],
    expressions: &[&str],
) -> Result<(Ended, i32)> {
    let trace = context.path("trace").to_string_lossy().into_owned();
    let mut under = vec!["strace", "-D", "-qq", "-o", &trace];
    under.extend(options);
    under.extend(expressions.iter().flat_map(|expression| ["-e", *expression]));
    let mut l2fwd = target.start.clone().under(under).spawn(context)?;
    let pid = l2fwd.process.pid();
    if l2fwd.await_event("that it is up", target.is_up).is_ok() {
        // It may have ended by itself since.
        let _ = l2fwd.process.signal(Signal::SIGINT);
    }
    let ended = l2fwd.wait()?;
    for entry in fs::read_dir(&context.dir)? {
        let file = entry?.path();
        if file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("l2fwd")) {
            fs::remove_file(file)?;
        }
    }
    Ok((ended, pid))
}

/// Number of calls of the main thread. If each line begins with its thread, number of calls of the busiest
/// other thread.
fn count(trace: &str, call: &str, main: i32) -> usize {
    let mut calls: BTreeMap<&str, usize> = BTreeMap::new();
    for line in trace.lines() {
        let (thread, rest) = match line.split_once(' ') {
            Some((thread, rest)) if thread.bytes().all(|byte| byte.is_ascii_digit()) => {
                (thread, rest.trim_start())
            }
            _ => ("", line),
        };
        if rest.starts_with(call) && rest[call.len()..].starts_with('(') && thread != main.to_string() {
            *calls.entry(thread).or_default() += 1;
        }
    }
    calls.into_values().max().unwrap_or_default()
}

/// The calls that were made to fail, with their arguments.
fn injected(trace: &str) -> impl Iterator<Item = String> {
    trace.lines().filter(|line| line.ends_with("(INJECTED)")).map(|line| {
        let call = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
        call.rsplit_once(" = ").map_or(call, |(call, _)| call).to_owned()
    })
}

fn judge(ended: &Ended, target: &Target<'_>, call: &str) -> Result<()> {
    // Two failures happen before main: the loader's, and that of std, which ends the process if it has no
    // signal stack.
    let before_main = ended.code == 127 && ended.stderr.contains("error while loading shared libraries")
        || ended.code == 134 && ended.stderr.contains("std/src/sys/pal/unix/stack_overflow.rs");
    if before_main {
        return Ok(());
    }
    let lines = ended.stderr.lines().filter(|line| line.starts_with("vireo-l2fwd: ")).count();
    match ended.code {
        0 => ensure!(lines == 0, "exit code 0 and an error"),
        64..=77 => ensure!(lines == 1, "exit code {} with {lines} error lines", ended.code),
        code => bail!("exit code {code}"),
    }
    for word in ["panicked", "stack backtrace"] {
        ensure!(!ended.stderr.contains(word), "l2fwd panicked");
    }
    if let Some(left) = (target.left)(ended)? {
        bail!("{left}");
    }
    match (target.names)() {
        Some(name) if !LEAVES_NAMES.contains(&call) => bail!("{name} was left behind"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_of_the_busiest_thread_that_is_not_the_main_one() {
        let alone = "ioctl(3, X) = 0\nioctl(4, Y) = -1 ENOMEM (Cannot allocate memory) (INJECTED)\nioctl_other(1) = 0\n";
        assert_eq!(count(alone, "ioctl", 7), 2);
        let threads =
            "7 ioctl(3, X) = 0\n8  ioctl(3, X) = 0\n9 ioctl(3, X) = 0\n9 ioctl(3, Z) = 0\n9 openat(3) = 0\n";
        assert_eq!(count(threads, "ioctl", 7), 2);
        assert_eq!(injected(alone).collect::<Vec<_>>(), ["ioctl(4, Y)"]);
    }
}
