//! Hugepages of the machine, from sysfs (`Documentation/admin-guide/mm/hugetlbpage.rst`).

use std::fs;
use std::path::Path;

/// Pages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Page size in bytes.
    pub page_size: usize,
    /// Pages reserved on the machine.
    pub total: usize,
    /// Pages that nobody uses and nobody has reserved: what a new mapping can get.
    pub free: usize,
}

/// Reads `/sys/kernel/mm/hugepages` below `sysfs` (`/sys` on a real machine), smallest pages first.
/// A kernel without hugepages gives an empty list.
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
            // Pages that are reserved count as free until they are touched.
            let reserved = number(&entry.path(), "resv_hugepages")?;
            Some(HugePages {
                page_size: kilobytes.checked_mul(1024)?,
                total: number(&entry.path(), "nr_hugepages")?,
                free: number(&entry.path(), "free_hugepages")?.saturating_sub(reserved),
            })
        })
        .collect();
    sizes.sort_by_key(|pages| pages.page_size);
    sizes
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
        fs::create_dir_all(sysfs.path().join("kernel/mm/hugepages/hugepages-xkB")).unwrap();
        assert_eq!(
            hugepages(sysfs.path()),
            [
                HugePages { page_size: 2 << 20, total: 64, free: 40 },
                HugePages { page_size: 1 << 30, total: 1, free: 0 }
            ]
        );
        assert!(hugepages(Path::new("/nonexistent")).is_empty());
    }
}
