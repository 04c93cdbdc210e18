//! Processes as seen in `/proc`: where those that hang wait, and how to end all that a run started.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Parent and process group of each process, by pid (proc_pid_stat(5)).
fn processes() -> BTreeMap<i32, (i32, i32)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name in parentheses may itself contain blanks and parentheses.
        let Some((_, fields)) = stat.rsplit_once(") ") else { continue };
        let mut fields = fields.split(' ').skip(1).map_while(|field| field.parse().ok());
        if let (Some(parent), Some(group)) = (fields.next(), fields.next()) {
            all.insert(pid, (parent, group));
        }
    }
    all
}

/// Processes that a process started, directly or indirectly, and that still run.
pub(crate) fn descendants(of: i32) -> Vec<i32> {
    let all = processes();
    let mut found = vec![of];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(all.iter().filter(|(_, (of, _))| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

/// Stacks of a process group.
pub(crate) fn of_group(group: i32) -> String {
    let all = processes();
    all.iter().filter(|(_, (_, of))| *of == group).map(|(pid, _)| of_process(*pid)).collect()
}

/// Sends a signal to processes, and ignores those that have ended.
pub(crate) fn signal_all(pids: &[i32], signal: Signal) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}

/// Asks all processes that this process started to clean up and end, and kills those that have not ended
/// within `grace`. Processes that start meanwhile do the cleaning up and are left alone.
pub(crate) fn end_descendants(grace: Duration) {
    let until = Instant::now() + grace;
    let mut running = descendants(this());
    signal_all(&running, Signal::SIGTERM);
    while !running.is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
        let all = descendants(this());
        running.retain(|pid| all.contains(pid));
    }
    signal_all(&running, Signal::SIGKILL);
}

fn this() -> i32 {
    std::process::id().cast_signed()
}

/// Stacks of one process, a line per thread: name, state, and where in the kernel it waits, as far as this
/// user may read it.
pub(crate) fn of_process(pid: i32) -> String {
    let mut text = String::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let file =
            |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default().trim().to_owned();
        let status = file("status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or_default().trim();
        text += &format!(
            "{pid}/{} {} {state} {}",
            task.file_name().to_string_lossy(),
            file("comm"),
            file("wchan")
        );
        text += &format!(" syscall {}\n", file("syscall").split(' ').next().unwrap_or_default());
        text.extend(file("stack").lines().map(|line| format!("    {line}\n")));
    }
    let command = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    let command: String = String::from_utf8_lossy(&command).replace('\0', " ").chars().take(120).collect();
    if text.is_empty() { text } else { format!("{command}\n{text}") }
}
