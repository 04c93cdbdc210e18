//! Hugepages of the machine, from sysfs (`Documentation/admin-guide/mm/hugetlbpage.rst`).

use std::fs;
use std::path::Path;

/// Hugepages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Page size in bytes.
    pub page_size: usize,
    /// Number of pages reserved on the machine.
    pub total: usize,
    /// Number of pages that are neither in use nor reserved by a mapping.
    pub free: usize,
    /// Number of pages that the kernel can add when a mapping finds too few free ones
    /// (`nr_overcommit_hugepages`), as far as memory is available.
    pub surplus: usize,
}

impl HugePages {
    /// Number of pages that a new mapping can get.
    pub fn available(&self) -> usize {
        self.free.saturating_add(self.surplus)
    }
}

/// Reads `/sys/kernel/mm/hugepages` under `sysfs` (`/sys` on a real machine), smallest pages first. Returns
/// an empty list if the kernel has no hugepages.
pub fn hugepages(sysfs: &Path) -> Vec<HugePages> {
    let number = |path: &Path, file: &str| {
        fs::read_to_string(path.join(file)).ok().and_then(|text| text.trim().parse::<usize>().ok())
    };
    let mut sizes: Vec<HugePages> = fs::read_dir(sysfs.join("kernel/mm/hugepages"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kilobytes: usize = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            // The kernel counts reserved pages as free until they are touched.
            let reserved = number(&entry.path(), "resv_hugepages")?;
            Some(HugePages {
                page_size: kilobytes.checked_mul(1024)?,
                total: number(&entry.path(), "nr_hugepages")?,
                free: number(&entry.path(), "free_hugepages")?.saturating_sub(reserved),
                surplus: number(&entry.path(), "nr_overcommit_hugepages")
                    .unwrap_or(0)
                    .saturating_sub(number(&entry.path(), "surplus_hugepages").unwrap_or(0)),
            })
        })
        .collect();
    sizes.sort_by_key(|pages| pages.page_size);
    sizes
}

/// NUMA nodes that this process may use according to its `cpuset.mems`. Empty if the kernel does not report
/// them. `root` is `/` on a real machine.
pub(super) fn allowed_nodes(root: &Path) -> Vec<usize> {
    let text = fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let list = text.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:")).unwrap_or_default();
    numbers(list).collect()
}

/// Numbers in a list in the kernel's format, such as `0-1,3`.
pub(super) fn numbers(list: &str) -> impl Iterator<Item = usize> {
    let range = |part: &str| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        Some(low.trim().parse::<usize>().ok()?..=high.trim().parse::<usize>().ok()?)
    };
    list.split(',').filter_map(range).flatten()
}

/// Number of free pages of `page_size` on `nodes`, or `None` on a kernel without nodes.
pub(super) fn free_in_nodes(sysfs: &Path, nodes: &[usize], page_size: usize) -> Option<usize> {
    let free = |node: &usize| {
        let pages = format!("devices/system/node/node{node}/hugepages/hugepages-{}kB", page_size >> 10);
        fs::read_to_string(sysfs.join(pages).join("free_hugepages")).ok()?.trim().parse::<usize>().ok()
    };
    nodes.iter().map(free).reduce(|sum, free| Some(sum? + free?)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes_and_skips_what_is_no_size() {
        let sysfs = tempfile::tempdir().unwrap();
        let sizes = [("hugepages-1048576kB", "1", "0", "3"), ("hugepages-2048kB", "64", "60\n", "20\n")];
        for (name, total, free, reserved) in sizes {
            let dir = sysfs.path().join("kernel/mm/hugepages").join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("nr_hugepages"), total).unwrap();
            fs::write(dir.join("free_hugepages"), free).unwrap();
            fs::write(dir.join("resv_hugepages"), reserved).unwrap();
        }
        let small = sysfs.path().join("kernel/mm/hugepages/hugepages-2048kB");
        fs::write(small.join("nr_overcommit_hugepages"), "10\n").unwrap();
        fs::write(small.join("surplus_hugepages"), "2\n").unwrap();
        fs::create_dir_all(sysfs.path().join("kernel/mm/hugepages/hugepages-xkB")).unwrap();
        assert_eq!(
            hugepages(sysfs.path()),
            [
                HugePages { page_size: 2 << 20, total: 64, free: 40, surplus: 8 },
                HugePages { page_size: 1 << 30, total: 1, free: 0, surplus: 0 }
            ]
        );
        assert!(hugepages(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn reads_the_nodes_of_the_cpuset() {
        let root = tempfile::tempdir().unwrap();
        assert!(allowed_nodes(root.path()).is_empty());
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        fs::write(root.path().join("proc/self/status"), "Mems_allowed:\t0b\nMems_allowed_list:\t0-1,3\n")
            .unwrap();
        assert_eq!(allowed_nodes(root.path()), [0, 1, 3]);
        assert_eq!(free_in_nodes(root.path(), &[0, 1, 3], 2 << 20), None);
    }
}
