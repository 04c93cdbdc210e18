//! Identification of device nodes, and lookups of devices in sysfs.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat, major, minor};
use vireo_iommufd::observed;

use crate::error::{Error, Result};

/// Prefix of the node names of devices without an IOMMU, for groups and for character devices.
pub const NOIOMMU_PREFIX: &str = "noiommu-";

/// Returns the class and name in sysfs of the device node that `fd` refers to, such as `("vfio", "12")`.
/// Returns `None` if `fd` is not a character device or is unknown to sysfs. Names in `/dev` are ignored.
///
/// # Errors
/// When the descriptor is not open.
pub fn class_and_name(fd: impl AsFd) -> nix::Result<Option<(String, String)>> {
    let found = fstat(fd)?;
    if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT != SFlag::S_IFCHR {
        return Ok(None);
    }
    let read = || {
        let number = format!("{}:{}", major(found.st_rdev), minor(found.st_rdev));
        let link = fs::read_link(Path::new("/sys/dev/char").join(number)).ok()?;
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        Some((name(link.parent()?)?, name(&link)?))
    };
    Ok(read())
}

/// Returns the number of a device's IOMMU group. `sysfs` is the device's directory in sysfs.
///
/// # Errors
/// When the device is in no group.
pub fn group_of(sysfs: &Path) -> io::Result<u32> {
    let link = fs::read_link(sysfs.join("iommu_group"))?;
    link.file_name()
        .and_then(|name| name.to_str()?.parse().ok())
        .ok_or_else(|| io::Error::other("the link does not end in a number"))
}

/// Returns the name in `/dev/vfio/devices` of a device's character device. `sysfs` is the device's directory
/// in sysfs. Before Linux 7.3, a device without an IOMMU has an entry in sysfs but no device number, so the
/// result is `None`.
pub fn cdev_of(sysfs: &Path) -> Option<String> {
    fs::read_dir(sysfs.join("vfio-dev"))
        .ok()?
        .flatten()
        .find(|entry| entry.path().join("dev").exists())
        .and_then(|entry| entry.file_name().into_string().ok())
}

pub(crate) fn open(path: &Path) -> Result<OwnedFd> {
    observed("open", || OpenOptions::new().read(true).write(true).open(path)).map(OwnedFd::from).map_err(
        |error| {
            let errno = error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw);
            Error::Open { path: path.to_owned(), errno }
        },
    )
}

/// Returns the name of the node that `fd` refers to, if `is_match` accepts its class and name.
pub(crate) fn name_of(
    fd: &impl AsFd,
    wanted: &'static str,
    is_match: impl FnOnce(&str, &str) -> bool,
) -> Result<String> {
    match class_and_name(fd) {
        Ok(Some((class, name))) if is_match(&class, &name) => Ok(name),
        _ => Err(Error::WrongNode { fd: fd.as_fd().as_raw_fd(), wanted }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_node_is_known_by_the_kernel() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(class_and_name(&null), Ok(Some(("mem".into(), "null".into()))));
        assert_eq!(class_and_name(tempfile::tempfile().unwrap()), Ok(None));
        assert_eq!(name_of(&null, "null", |class, name| class == "mem" && name == "null"), Ok("null".into()));
        let fd = null.as_raw_fd();
        let error = name_of(&null, "VFIO group", |class, _| class == "vfio").unwrap_err();
        assert_eq!(error, Error::WrongNode { fd, wanted: "VFIO group" });
    }

    #[test]
    fn sysfs_names_the_group_and_the_node() {
        let root = tempfile::tempdir().unwrap();
        assert!(group_of(root.path()).is_err() && cdev_of(root.path()).is_none());
        symlink("/sys/kernel/iommu_groups/3", root.path().join("iommu_group")).unwrap();
        fs::create_dir_all(root.path().join("vfio-dev/vfio9")).unwrap();
        assert_eq!(group_of(root.path()).unwrap(), 3);
        assert_eq!(cdev_of(root.path()), None);
        fs::write(root.path().join("vfio-dev/vfio9/dev"), "1:3").unwrap();
        assert_eq!(cdev_of(root.path()), Some("vfio9".into()));
    }
}
