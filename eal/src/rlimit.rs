//! Commands that raise limits of the process (getrlimit(2)) that are too low.

use nix::sys::resource::{Resource, getrlimit};

/// Returns the command that lets a program open `more` files more than this process may.
pub fn more_files(more: u64) -> String {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    raise_files(soft.saturating_add(more), hard)
}

/// Returns the command that raises the limit to `wanted`. A shell can raise its soft limit up to `hard`, and
/// root can raise both limits.
fn raise_files(wanted: u64, hard: u64) -> String {
    if wanted <= hard {
        format!("run: ulimit -n {wanted}")
    } else {
        format!("as root: prlimit --nofile={wanted} -- COMMAND")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_never_lowered() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(more_files(253), raise_files(soft + 253, hard));
        assert_eq!(raise_files(1277, 4096), "run: ulimit -n 1277");
        assert_eq!(raise_files(4096, 4096), "run: ulimit -n 4096");
        assert_eq!(raise_files(4349, 4096), "as root: prlimit --nofile=4349 -- COMMAND");
    }

    #[test]
    fn the_command_raises_the_limit() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let command = raise_files(hard, hard);
        let shell = format!("ulimit -S -n 16; {}; ulimit -n", command.trim_start_matches("run: "));
        let output = std::process::Command::new("sh").args(["-c", &shell]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), hard.to_string(), "{output:?}");
    }
}
