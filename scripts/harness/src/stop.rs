//! The early end of a run: what it started ends and cleans up when the run is told to end. QEMU and the scripts around it are
//! in process groups of their own, which a terminal's Ctrl-C does not reach.

use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::host::stacks;
use crate::process::GRACE;

/// The signal that told the run to end, or 0.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Watches for SIGHUP, SIGINT and SIGTERM, but for those that were ignored at the start, as nohup does.
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
            // The case fails, its guards clean up, and the run ends by itself, if it can.
            std::thread::sleep(GRACE);
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// The exit code, once the run was told to end.
pub(crate) fn exit_code() -> Option<u8> {
    match SIGNAL.load(Ordering::Relaxed) {
        0 => None,
        signal => u8::try_from(128 + signal).ok(),
    }
}
