//! Early end of a run: when a signal ends the run, the processes that it started clean up and end. QEMU and
//! the scripts around it are in their own process groups, which a terminal's Ctrl-C does not reach.

use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::host::stacks;
use crate::process::GRACE;

/// Signal that ends the run, or 0.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Watches for SIGHUP, SIGINT and SIGTERM, except those that were ignored at the start, as under nohup.
pub(crate) fn watch() -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap_or_default();
    let ignored = u64::from_str_radix(ignored.trim(), 16)?;
    let mut signals = Signals::new(
        [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0),
    )?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            SIGNAL.store(signal, Ordering::Relaxed);
            stacks::end_descendants(GRACE);
            // The case fails, its guards clean up, and the run ends by itself in this time if it can.
            std::thread::sleep(GRACE);
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Exit code of a run that a signal ends.
pub(crate) fn exit_code() -> Option<u8> {
    match SIGNAL.load(Ordering::Relaxed) {
        0 => None,
        signal => u8::try_from(128 + signal).ok(),
    }
}
