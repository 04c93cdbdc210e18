//! Limits on ordinary memory: `MemAvailable` of the machine, and the memory control groups of this process
//! (`Documentation/admin-guide/cgroup-v2.rst`, `cgroup-v1/memory.rst`).
//!
//! The kernel does not refuse to populate pages beyond either limit. The OOM killer ends this process or
//! another one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};

/// Bytes that a start takes in addition to packet memory: stacks, ring bookkeeping, kernel objects.
const START: u64 = 8 << 20;

/// Bytes by which a group's usage may differ from one start to the next: the kernel charges memory in batches
/// per CPU, and frees some of it late.
const VARIATION: u64 = 8 << 20;

/// Returns an error if the machine or a control group has no room for a mapping of `len` bytes of ordinary
/// pages. `root` is `/` on a real machine. A limit that cannot be read there is ignored.
pub(super) fn check(root: &Path, what: impl Fn() -> String, len: u64) -> Result<(), Error> {
    // The page tables of the CPU and of the IOMMU take 1/512 each, the pool's free list takes less than
    // 1/256.
    let need = len.saturating_add(len / 128).saturating_add(START);
    let refuse =
        |why: String| Error::new(ErrorKind::Os, what(), format!("{} MiB are needed and {why}", mib(need)));
    if let Some(group) = groups(root).into_iter().find(|group| !group.has(need)) {
        let Group { path, file, .. } = &group;
        let (left, limit) = (mib(group.left()), mib(group.limit));
        let dir = path.strip_prefix(root).unwrap_or(path).display();
        return Err(refuse(format!("the control group /{dir} has {left} of its {limit} MiB left ({file})"))
            .with_hint(format!(
                "run: echo {} > /{dir}/{file}; or ask for fewer packet buffers",
                need.saturating_add(group.held()).saturating_add(VARIATION)
            )));
    }
    match available(root) {
        Some(left) if left < need => {
            Err(refuse(format!("the machine has {} MiB available (MemAvailable)", mib(left)))
                .with_hint("free memory, or ask for fewer packet buffers"))
        }
        _ => Ok(()),
    }
}

/// Bytes that the machine can provide without swapping.
pub(super) fn available(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// A control group that limits this process.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    /// Name of the file that holds the limit.
    file: &'static str,
    limit: u64,
    /// Bytes that the group uses. `cache` is the page cache among them, which the kernel drops before it
    /// kills a process.
    used: u64,
    cache: u64,
}

impl Group {
    fn read(path: PathBuf, version: &Version) -> Option<Self> {
        let number = |file: &str| fs::read_to_string(path.join(file)).ok()?.trim().parse::<u64>().ok();
        // "max" is not a number and means that there is no limit.
        let (limit, used) = (number(version.limit)?, number(version.used)?);
        let stat = fs::read_to_string(path.join("memory.stat")).unwrap_or_default();
        let cache = stat.lines().filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            version.cache.contains(&key).then(|| value.parse::<u64>().ok()).flatten()
        });
        Some(Self { file: version.limit, limit, used, cache: cache.sum(), path })
    }

    fn held(&self) -> u64 {
        self.used.saturating_sub(self.cache)
    }

    fn left(&self) -> u64 {
        self.limit.saturating_sub(self.held())
    }

    fn has(&self, need: u64) -> bool {
        self.left() >= need
    }
}

/// File names in one version of the control group hierarchy.
#[derive(Debug)]
struct Version {
    limit: &'static str,
    used: &'static str,
    cache: [&'static str; 2],
}

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};
const V2: Version =
    Version { limit: "memory.max", used: "memory.current", cache: ["inactive_file", "active_file"] };

/// Control groups of this process that have a limit, innermost first.
fn groups(root: &Path) -> Vec<Group> {
    let read = |file: &str| fs::read_to_string(root.join("proc/self").join(file)).unwrap_or_default();
    let (own, mounts) = (read("cgroup"), read("mountinfo"));
    let mut groups = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let version = match controllers {
            "" => &V2,
            _ if controllers.split(',').any(|name| name == "memory") => &V1,
            _ => continue,
        };
        let Some((from, at)) = mounts.lines().find_map(|line| mount(line, version)) else { continue };
        // A path outside of the mount, as seen from another cgroup namespace, does not locate a group here.
        let inner = Path::new(path).strip_prefix(from).ok().filter(|inner| !inner.starts_with(".."));
        let top = root.join(at.strip_prefix('/').unwrap_or(at));
        let inner = inner.unwrap_or(Path::new(""));
        groups.extend(inner.ancestors().filter_map(|inner| {
            // `join("")` would add a trailing slash.
            let path = if inner.as_os_str().is_empty() { top.clone() } else { top.join(inner) };
            Group::read(path, version)
        }));
    }
    groups
}

/// Root and mount point in a line of `mountinfo`, if the line mounts the hierarchy (`proc_pid_mountinfo(5)`).
fn mount<'a>(line: &'a str, version: &Version) -> Option<(&'a str, &'a str)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    let (kind, options) = (filesystem.next()?, filesystem.nth(1)?);
    let is_match = if version.limit == V2.limit {
        kind == "cgroup2"
    } else {
        kind == "cgroup" && options.split(',').any(|option| option == "memory")
    };
    let mut fields = mount.split(' ').skip(3);
    is_match.then(|| Some((fields.next()?, fields.next()?))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_MOUNT: &str = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory";
    const V2_MOUNT: &str = "24 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in
            [("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   1048576 kB\n")].iter().chain(files)
        {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn checked(root: &tempfile::TempDir, megabytes: u64) -> Result<(), String> {
        check(root.path(), || "cannot reserve".into(), megabytes << 20).map_err(|error| {
            assert_eq!(error.kind(), ErrorKind::Os);
            error.to_string()
        })
    }

    #[test]
    fn the_machine_has_to_have_the_memory() {
        let root = machine(&[]);
        assert_eq!(checked(&root, 1000), Ok(()));
        assert_eq!(
            checked(&root, 8 << 20).unwrap_err(),
            "cannot reserve: 8454152 MiB are needed and the machine has 1024 MiB available (MemAvailable); free \
             memory, or ask for fewer packet buffers"
        );
        assert!(check(root.path(), String::new, u64::MAX).is_err());
        let unknown = tempfile::tempdir().unwrap();
        assert_eq!(checked(&unknown, 8 << 20), Ok(()), "what is not known is no limit");
    }

    #[test]
    fn a_group_above_may_have_the_limit() {
        let root = machine(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/a/memory.max", "67108864\n"),
            ("sys/fs/cgroup/a/memory.current", "33554432\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 8388608\nactive_file 8388608\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "33554432\n"),
        ]);
        assert_eq!(checked(&root, 39), Ok(()), "page cache is no loss");
        assert_eq!(
            checked(&root, 64).unwrap_err(),
            "cannot reserve: 72 MiB are needed and the control group /sys/fs/cgroup/a has 48 of its 64 MiB left \
             (memory.max); run: echo 101187584 > /sys/fs/cgroup/a/memory.max; or ask for fewer packet buffers"
        );
    }

    #[test]
    fn the_limit_that_is_named_leaves_room_for_what_differs_between_starts() {
        let group = |limit: u64, held: u64| {
            machine(&[
                ("proc/self/cgroup", "0::/a\n"),
                ("proc/self/mountinfo", V2_MOUNT),
                ("sys/fs/cgroup/a/memory.max", &limit.to_string()),
                ("sys/fs/cgroup/a/memory.current", &held.to_string()),
            ])
        };
        let refused = checked(&group(64 << 20, 100 << 10), 200).unwrap_err();
        let (_, command) = refused.split_once("run: echo ").unwrap();
        let limit = command.split_once(' ').unwrap().0.parse().unwrap();
        for held in [0, 400 << 10, 4 << 20] {
            assert_eq!(checked(&group(limit, held), 200), Ok(()));
        }
    }

    #[test]
    fn version_1_has_other_names() {
        let root = machine(&[
            ("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/a\n0::/\n"),
            (
                "proc/self/mountinfo",
                &format!("{V1_MOUNT}\n{}", V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")),
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "67108864\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1048576\n"),
        ]);
        assert_eq!(checked(&root, 50), Ok(()));
        let error = checked(&root, 60).unwrap_err();
        assert!(
            error.contains("/sys/fs/cgroup/memory/a has 63 of its 64 MiB left (memory.limit_in_bytes)"),
            "{error}"
        );
    }

    #[test]
    fn a_container_sees_its_group_at_the_mount() {
        let limited = [("sys/fs/cgroup/memory.max", "16777216"), ("sys/fs/cgroup/memory.current", "0")];
        for (own, from) in
            [("0::/", "/"), ("0::/docker/1", "/docker/1"), ("0::/../2", "/"), ("0::/x", "/docker/1")]
        {
            let mount = V2_MOUNT.replace(" / ", &format!(" {from} "));
            let files =
                [&limited[..], &[("proc/self/cgroup", own), ("proc/self/mountinfo", &mount)]].concat();
            let error = checked(&machine(&files), 16).unwrap_err();
            assert!(error.contains("the control group /sys/fs/cgroup has 16 of"), "{own} {error}");
        }
    }
}
