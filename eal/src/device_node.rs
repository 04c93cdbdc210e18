//! Device nodes: which device a node stands for, and who may open it if this process may not.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, major, minor};
use nix::unistd::geteuid;

use crate::error::{Error, Result};
use crate::ioctl::counted;

/// Opens `path` for reading and writing.
pub(crate) fn open(path: &Path) -> Result<File> {
    counted("open", || OpenOptions::new().read(true).write(true).open(path)).map_err(|error| {
        let error = Error::io(format!("cannot open {}", path.display()), &error);
        match error.errno() {
            Some(Errno::EACCES) => permission(error, path),
            _ => error,
        }
    })
}

pub(crate) fn is_char_device(found: &FileStat) -> bool {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
}

/// Formats a device number as sysfs does: `MAJOR:MINOR`.
pub(crate) fn number_of(rdev: u64) -> String {
    format!("{}:{}", major(rdev), minor(rdev))
}

/// Adds to `error` who may open `path`, and how the user can get that permission.
pub(crate) fn permission(error: Error, path: &Path) -> Error {
    let Ok(found) = fs::metadata(path) else { return error };
    let me = std::env::var("USER").unwrap_or_else(|_| geteuid().to_string());
    let mode = found.mode() & 0o7777;
    error
        .because(format!("it belongs to uid {}, gid {} with mode {mode:04o}", found.uid(), found.gid()))
        .with_hint(format!(
            "run as root, or: setfacl -m u:{me}:rw {}; permanently, with a udev rule: {}, OWNER=\"{me}\"",
            path.display(),
            udev_match(path)
        ))
}

/// Returns how a udev rule matches the node. Group and device numbers are not used: they may change at boot.
fn udev_match(path: &Path) -> &'static str {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    match (path.parent().and_then(name).as_deref(), name(path).as_deref()) {
        (_, Some("iommu")) => "KERNEL==\"iommu\"",
        (Some("vfio"), Some("vfio")) => "KERNEL==\"vfio\"",
        (Some("devices"), _) => "SUBSYSTEM==\"vfio-dev\"",
        _ => "SUBSYSTEM==\"vfio\"",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_udev_rule_for_each_kind_of_node() {
        for (path, rule) in [
            ("/dev/iommu", "KERNEL==\"iommu\""),
            ("/dev/vfio/vfio", "KERNEL==\"vfio\""),
            ("/dev/vfio/12", "SUBSYSTEM==\"vfio\""),
            ("/dev/vfio/devices/vfio3", "SUBSYSTEM==\"vfio-dev\""),
        ] {
            assert_eq!(udev_match(path.as_ref()), rule);
        }
    }

    #[test]
    fn who_may_is_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = permission(Error::os("cannot open x", Errno::EACCES), file.path());
        let owner = format!("EACCES: it belongs to uid {}, gid ", geteuid());
        assert!(error.to_string().contains(&owner) && error.to_string().contains("mode 0600"), "{error}");
    }
}
