//! What the kernel keeps when it replaces itself by kexec (Linux, Documentation/core-api/liveupdate.rst).

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Serialize;

/// Beginning of the names of the functions by which vfio-pci takes part.
const HANDLER: &str = " vfio_pci_liveupdate_";

/// What a live update keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LiveUpdate {
    /// The kernel has no live update, or was started without it.
    Off,
    /// Files such as memfds, but none of VFIO.
    NoDevices,
    /// Also devices that are open as character devices: in `cdev` mode, but not through a group.
    Cdevs,
}

impl LiveUpdate {
    /// Examines the kernel whose `/dev` and `/proc` are below `root`.
    pub fn of(root: &Path) -> Self {
        if !root.join("dev/liveupdate").exists() {
            return Self::Off;
        }
        let Ok(symbols) = File::open(root.join("proc/kallsyms")) else { return Self::NoDevices };
        let mut lines = BufReader::new(symbols).lines().map_while(std::io::Result::ok);
        if lines.any(|line| line.contains(HANDLER)) { Self::Cdevs } else { Self::NoDevices }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, write};

    use super::*;

    #[test]
    fn the_kernel_tells_by_its_node_and_its_functions() {
        let root = tempfile::tempdir().unwrap();
        let of_root = || LiveUpdate::of(root.path());
        for dir in ["dev", "proc"] {
            create_dir(root.path().join(dir)).unwrap();
        }
        let symbols = root.path().join("proc/kallsyms");
        let handler = "0000000000000000 t vfio_pci_liveupdate_preserve\t[vfio_pci]\n";
        write(&symbols, handler).unwrap();
        assert_eq!(of_root(), LiveUpdate::Off);
        write(root.path().join("dev/liveupdate"), "").unwrap();
        assert_eq!(of_root(), LiveUpdate::Cdevs);
        write(&symbols, "0000000000000000 t memfd_luo_preserve\n0000000000000000 T vfio_pci_core_enable\n")
            .unwrap();
        assert_eq!(of_root(), LiveUpdate::NoDevices);
        std::fs::remove_file(symbols).unwrap();
        assert_eq!(of_root(), LiveUpdate::NoDevices);
    }
}
