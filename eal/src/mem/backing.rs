//! Sources of pages, and the free pages of a hugetlbfs mount.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs, statfs};

use super::shortage::default_hugepage_size;
use super::{GIANT_PAGE, page_size as cpu_page_size};
use crate::error::{Error, ErrorKind, Result};

/// Flags of every memfd: close on exec, and allow sealing of the size.
const MEMFD: MFdFlags = MFdFlags::MFD_CLOEXEC.union(MFdFlags::MFD_ALLOW_SEALING);

/// Source of the pages of a [`Region`](super::Region).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A hugetlb memfd: hugepages without a mount, which another process can map through the descriptor.
    HugeMemfd,
    /// A hugetlb memfd of 1 GiB pages.
    GiantMemfd,
    /// A file on a hugetlbfs mount (`--huge-dir`) that never has a name. hugetlbfs files cannot be sealed.
    HugeFile {
        /// Mount point.
        dir: PathBuf,
    },
    /// Private anonymous hugepages (`--in-memory`), allocated by `hugepage-rs`.
    HugeAnonymous,
    /// A memfd of ordinary pages (`--no-huge`): 4 KiB, or the size that the kernel is built with.
    SmallPages,
}

impl Backing {
    /// Name for the startup report.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HugeMemfd => "hugetlb memfd",
            Self::GiantMemfd => "hugetlb memfd of 1 GiB pages",
            Self::HugeFile { .. } => "hugetlbfs file",
            Self::HugeAnonymous => "anonymous hugepages",
            Self::SmallPages => "memfd of ordinary pages",
        }
    }

    /// Size of the pages in bytes.
    ///
    /// # Errors
    /// `Unavailable` if the kernel has no hugepages, `Io` if `dir` is not a hugetlbfs mount.
    pub fn page_size(&self) -> Result<usize> {
        match self {
            Self::SmallPages => Ok(cpu_page_size()),
            Self::GiantMemfd => Ok(GIANT_PAGE),
            Self::HugeFile { dir } => mounted_page_size(dir),
            Self::HugeMemfd | Self::HugeAnonymous => default_hugepage_size(),
        }
    }

    /// Creates a file for a part of `len` bytes. Returns `None` for pages that no other process can map.
    pub(super) fn file(&self, len: usize, page_size: usize) -> Result<Option<OwnedFd>> {
        let pages = match self {
            Self::HugeAnonymous => return Ok(None),
            // Miri does not support memfds.
            Self::SmallPages if cfg!(miri) => return Ok(None),
            Self::HugeFile { dir } => {
                let file = huge_file(dir)?;
                check_mount(&file, dir, len, page_size)?;
                return Ok(Some(file.into()));
            }
            Self::HugeMemfd => MFdFlags::MFD_HUGETLB,
            Self::GiantMemfd => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
            Self::SmallPages => MFdFlags::empty(),
        };
        memfd_create(c"vireo", MEMFD | pages)
            .map(Some)
            .map_err(|errno| Error::os(format!("cannot create a {}", self.name()), errno))
    }
}

/// Page size of a hugetlbfs mount, which is its block size.
fn mounted_page_size(dir: &Path) -> Result<usize> {
    let what = || format!("cannot use --huge-dir {}", dir.display());
    let found = statfs(dir).map_err(|errno| {
        Error::os(what(), errno).with_kind(ErrorKind::Io).with_hint(format!(
            "run: mkdir -p {0} && mount -t hugetlbfs none {0}; or {NO_MOUNT}",
            dir.display()
        ))
    })?;
    match usize::try_from(found.block_size()) {
        Ok(size) if found.filesystem_type() == HUGETLBFS_MAGIC => Ok(size),
        _ => Err(Error::new(ErrorKind::Io, what(), "it is not a hugetlbfs mount")
            .with_hint(format!("run: mount -t hugetlbfs none {}; or {NO_MOUNT}", dir.display()))),
    }
}

const NO_MOUNT: &str = "leave --huge-dir out: no mount is needed";

/// Checks that the mount has room for `len` bytes, because its `size=` may be less than the machine has. Also
/// checks that `file` has the page size that was found in `dir`, because the page size decides what is
/// contiguous in physical memory.
fn check_mount(file: &File, dir: &Path, len: usize, page_size: usize) -> Result<()> {
    let what = || format!("cannot use --huge-dir {}", dir.display());
    let found = fstatfs(file).map_err(|errno| Error::os(what(), errno).with_kind(ErrorKind::Io))?;
    if found.filesystem_type() != HUGETLBFS_MAGIC || found.block_size() as usize != page_size {
        return Err(Error::new(ErrorKind::Io, what(), "something else was mounted there in the meantime"));
    }
    let (total, free) = (found.blocks(), found.blocks_free());
    // A mount without a size of its own reports 0 blocks.
    if total == 0 || free as usize >= len / page_size {
        return Ok(());
    }
    let why = format!("{} pages are needed and the mount has {free} of {total} free", len / page_size);
    let wanted = total.saturating_sub(free) as usize + len / page_size;
    Err(Error::new(ErrorKind::Io, what(), why).with_hint(remount_hint(dir, wanted, page_size)))
}

/// Command that mounts `dir` again with room for `pages`. The size of a mount cannot change: hugetlbfs
/// accepts `-o remount` and does nothing.
fn remount_hint(dir: &Path, pages: usize, page_size: usize) -> String {
    let (dir, page) = (dir.display(), page_size >> 10);
    let size = pages.saturating_mul(page);
    format!(
        "run: umount {dir} && mount -t hugetlbfs -o pagesize={page}K,size={size}K none {dir}; or {NO_MOUNT}"
    )
}

/// Creates a file without a name in `dir`. No other process can open it, and a killed process leaves none
/// behind. Two processes with the same PID, in two containers, cannot get the same file.
fn huge_file(dir: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        // O_EXCL: the file cannot get a name later either (`open(2)`).
        .custom_flags((OFlag::O_TMPFILE | OFlag::O_EXCL).bits())
        .mode(0o600)
        .open(dir)
        .map_err(|error| {
            Error::io(format!("cannot create a file in {}", dir.display()), &error).with_hint(NO_MOUNT)
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use nix::errno::Errno;

    use super::*;

    #[test]
    fn a_huge_file_has_no_name_and_is_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let file = match huge_file(dir.path()) {
            // Overlay filesystems of old kernels.
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => return,
            file => file.unwrap(),
        };
        let found = file.metadata().unwrap();
        assert_eq!((found.mode() & 0o777, found.nlink()), (0o600, 0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let other = huge_file(dir.path()).unwrap();
        assert_ne!(other.metadata().unwrap().ino(), found.ino(), "two processes of one pid share nothing");
        let link = dir.path().join("link");
        std::fs::write(dir.path().join("victim"), "kept").unwrap();
        std::os::unix::fs::symlink(dir.path().join("victim"), &link).unwrap();
        assert!(huge_file(&link).is_err());
        assert_eq!(std::fs::read_to_string(&link).unwrap(), "kept");
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no fstatfs")]
    fn pages_of_another_size_are_not_taken_for_hugepages() {
        let error = check_mount(&tempfile::tempfile().unwrap(), Path::new("/mnt/huge"), 1, 4096).unwrap_err();
        assert_eq!(error.why(), "something else was mounted there in the meantime");
    }

    #[test]
    fn a_full_mount_is_made_again_with_room_for_both() {
        assert_eq!(
            remount_hint(Path::new("/mnt/huge"), 11, 2 << 20),
            "run: umount /mnt/huge && mount -t hugetlbfs -o pagesize=2048K,size=22528K none /mnt/huge; \
             or leave --huge-dir out: no mount is needed"
        );
    }
}
