//! Where pages come from, and what a hugetlbfs mount has.

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

/// Of every memfd: closed on exec, and of a size that can be fixed.
const MEMFD: MFdFlags = MFdFlags::MFD_CLOEXEC.union(MFdFlags::MFD_ALLOW_SEALING);

/// Where the pages of a [`Region`](super::Region) come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A hugetlb memfd: hugepages without a mount, that another process can map by its descriptor.
    HugeMemfd,
    /// As that, of 1 GiB pages.
    GiantMemfd,
    /// A file on a hugetlbfs mount (`--huge-dir`) that never has a name. hugetlbfs files cannot be sealed.
    HugeFile {
        /// The mount.
        dir: PathBuf,
    },
    /// Private anonymous hugepages (`--in-memory`), by `hugepage-rs`.
    HugeAnonymous,
    /// A memfd of ordinary pages (`--no-huge`): of 4 KiB, or what the kernel is built with.
    SmallPages,
}

impl Backing {
    /// Name for the start-up report.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HugeMemfd => "hugetlb memfd",
            Self::GiantMemfd => "hugetlb memfd of 1 GiB pages",
            Self::HugeFile { .. } => "hugetlbfs file",
            Self::HugeAnonymous => "anonymous hugepages",
            Self::SmallPages => "memfd of ordinary pages",
        }
    }

    /// Size of its pages in bytes.
    ///
    /// # Errors
    /// `Unavailable` when the kernel has no hugepages, `Io` when `dir` is no hugetlbfs mount.
    pub fn page_size(&self) -> Result<usize> {
        match self {
            Self::SmallPages => Ok(cpu_page_size()),
            Self::GiantMemfd => Ok(GIANT_PAGE),
            Self::HugeFile { dir } => mounted_page_size(dir),
            Self::HugeMemfd | Self::HugeAnonymous => default_hugepage_size(),
        }
    }

    /// A new file for a part of `len` bytes; none for pages that nobody else can map.
    pub(super) fn file(&self, len: usize, page_size: usize) -> Result<Option<OwnedFd>> {
        let pages = match self {
            Self::HugeAnonymous => return Ok(None),
            // Miri has no memfd.
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

/// Pages of a hugetlbfs mount are its blocks.
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

/// A mount may have less than the machine: its `size=`. That `file` has the pages that were found in `dir` decides what is
/// contiguous in physical memory.
fn check_mount(file: &File, dir: &Path, len: usize, page_size: usize) -> Result<()> {
    let what = || format!("cannot use --huge-dir {}", dir.display());
    let found = fstatfs(file).map_err(|errno| Error::os(what(), errno).with_kind(ErrorKind::Io))?;
    if found.filesystem_type() != HUGETLBFS_MAGIC || found.block_size() as usize != page_size {
        return Err(Error::new(ErrorKind::Io, what(), "something else was mounted there meanwhile"));
    }
    let (total, free) = (found.blocks(), found.blocks_free());
    // A mount without a size of its own has no count of blocks.
    if total == 0 || free as usize >= len / page_size {
        return Ok(());
    }
    let why = format!("{} pages are needed and the mount has {free} of {total} free", len / page_size);
    let wanted = total.saturating_sub(free) as usize + len / page_size;
    Err(Error::new(ErrorKind::Io, what(), why).with_hint(mount_again(dir, wanted, page_size)))
}

/// A mount's size stays what it was: hugetlbfs takes `-o remount` and does nothing.
fn mount_again(dir: &Path, pages: usize, page_size: usize) -> String {
    let (dir, page) = (dir.display(), page_size >> 10);
    let size = pages.saturating_mul(page);
    format!(
        "run: umount {dir} && mount -t hugetlbfs -o pagesize={page}K,size={size}K none {dir}; or {NO_MOUNT}"
    )
}

/// A file in `dir` that has no name: nobody else opens it, and a killed process leaves none behind. Two processes with
/// one pid, in two containers, cannot meet in it.
fn huge_file(dir: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        // O_EXCL: nor does it get a name later (`open(2)`).
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
            // Overlays of old kernels.
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
        assert_eq!(error.why(), "something else was mounted there meanwhile");
    }

    #[test]
    fn a_full_mount_is_made_again_with_room_for_both() {
        assert_eq!(
            mount_again(Path::new("/mnt/huge"), 11, 2 << 20),
            "run: umount /mnt/huge && mount -t hugetlbfs -o pagesize=2048K,size=22528K none /mnt/huge; \
             or leave --huge-dir out: no mount is needed"
        );
    }
}
