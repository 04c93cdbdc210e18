//! Errors for missing hugepages: the limit that was reached, and the command that raises it.

use std::collections::BTreeMap;
use std::path::Path;

use super::hugepages::{HugePages, allowed_nodes, free_in_nodes, hugepages};
use super::{GIANT_PAGE, limits};
use crate::args::ranges;
use crate::error::{Error, ErrorKind, Result};

/// Size in bytes of the hugepages that a mapping gets by default.
pub(super) fn default_hugepage_size() -> Result<usize> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| Error::io("cannot read /proc/meminfo", &error))?;
    text.lines()
        .find_map(|line| line.strip_prefix("Hugepagesize:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kilobytes| kilobytes.trim().parse::<usize>().ok())
        .map(|kilobytes| kilobytes * 1024)
        .ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "cannot use hugepages", "this kernel has no hugetlb support")
                .with_hint("run with --no-huge")
        })
}

/// Checks that hugepages for `len` bytes are available. `mmap` of a memfd reserves its hugepages, but its
/// error does not report what is missing.
pub(super) fn check_free(root: &Path, len: usize, page_size: usize) -> Result<()> {
    let (pages, need) = (pages_of(root, page_size), len / page_size);
    let what = || format!("cannot reserve {} MiB of hugepages", len >> 20);
    if pages.available() < need {
        return Err(too_few(root, Error::new(ErrorKind::Os, what(), ""), need, pages));
    }
    // Surplus pages come out of ordinary memory. The memory control group does not count them.
    let surplus = need.saturating_sub(pages.free).saturating_mul(page_size);
    match limits::available(root) {
        Some(left) if left < surplus as u64 => Err(Error::new(
            ErrorKind::Os,
            what(),
            format!(
                "{} MiB of surplus pages are needed and the machine has {} MiB available (MemAvailable)",
                surplus >> 20,
                left >> 20
            ),
        )
        .with_hint("free memory, or ask for fewer packet buffers")),
        _ => Ok(()),
    }
}

/// Checks that the NUMA nodes in `parts` have the hugepages that the parts request from them.
pub(super) fn check_nodes(root: &Path, parts: &[(Option<u32>, usize)], page_size: usize) -> Result<()> {
    if page_size == super::page_size() {
        return Ok(());
    }
    let mut bytes_of: BTreeMap<u32, usize> = BTreeMap::new();
    for (node, bytes) in parts.iter().filter_map(|(node, bytes)| Some(((*node)?, bytes))) {
        *bytes_of.entry(node).or_default() += bytes;
    }
    for (node, bytes) in bytes_of {
        let (need, kib) = (bytes / page_size, page_size >> 10);
        let Some(free) = free_in_nodes(&root.join("sys"), &[node as usize], page_size) else { continue };
        if free < need {
            let what = format!("cannot reserve {} MiB of hugepages on NUMA node {node}", bytes >> 20);
            let why = format!("{} and {free} are free there", needed(need, kib));
            return Err(Error::new(ErrorKind::Os, what, why).with_hint(more_on_node(
                root,
                node,
                page_size,
                need - free,
            )));
        }
    }
    Ok(())
}

/// Hint that tells how `node` gets `pages` more hugepages than it has.
pub(super) fn more_on_node(root: &Path, node: u32, page_size: usize, pages: usize) -> String {
    let file =
        format!("sys/devices/system/node/node{node}/hugepages/hugepages-{}kB/nr_hugepages", page_size >> 10);
    let total =
        std::fs::read_to_string(root.join(&file)).ok().and_then(|text| text.trim().parse::<usize>().ok());
    match total {
        Some(total) => format!("run: echo {} > /{file}", total + pages),
        None => format!("free memory on node {node}"),
    }
}

fn pages_of(root: &Path, page_size: usize) -> HugePages {
    let none = HugePages { page_size, total: 0, free: 0, surplus: 0 };
    hugepages(&root.join("sys")).into_iter().find(|pages| pages.page_size == page_size).unwrap_or(none)
}

/// Adds to the `error` of a mapping of `len` bytes why the kernel had no hugepages for it.
pub(super) fn no_pages(root: &Path, error: Error, len: usize, page_size: usize) -> Error {
    too_few(root, error, len / page_size, pages_of(root, page_size))
}

/// Formats the need for `pages` pages of `kib` KiB.
fn needed(pages: usize, kib: usize) -> String {
    match pages {
        1 => format!("1 page of {kib} KiB is needed"),
        _ => format!("{pages} pages of {kib} KiB are needed"),
    }
}

fn too_few(root: &Path, error: Error, need: usize, pages: HugePages) -> Error {
    let HugePages { page_size, total, free, surplus } = pages;
    let kib = page_size >> 10;
    if pages.available() >= need {
        // The machine has enough pages: a command that sets their number could only remove some.
        let nodes = allowed_nodes(root);
        return match free_in_nodes(&root.join("sys"), &nodes, page_size) {
            Some(here) if here + surplus < need => {
                let why = format!(
                    "{}, but only {here} of the {free} free ones are on NUMA nodes that this process may use ({}: \
                     cpuset.mems, Mems_allowed_list)",
                    needed(need, kib),
                    ranges(&nodes)
                );
                let node = nodes.first().copied().unwrap_or(0);
                let at = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB/nr_hugepages");
                // The pages that the node has, plus those that are missing.
                error.because(why).with_hint(format!(
                    "run: echo $(($(cat {at}) + {})) > {at}; or allow more nodes in cpuset.mems",
                    need - here
                ))
            }
            _ => error.with_hint(
                "check the limit of the control group (hugetlb.*.max) and the memory policy (numactl), or run with \
                 --no-huge",
            ),
        };
    }
    let wanted = total - free.min(total) + need;
    let reserve = match default_hugepage_size() {
        Ok(size) if size == page_size => format!("sysctl vm.nr_hugepages={wanted}"),
        _ => format!("echo {wanted} > /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"),
    };
    // The kernel rarely finds a contiguous free GiB after it has run for a while.
    let reserve = match page_size {
        GIANT_PAGE => format!("{reserve}, or boot with hugepagesz=1G hugepages={wanted}"),
        _ => reserve,
    };
    let more = if surplus > 0 { format!(", {surplus} more by overcommit") } else { String::new() };
    error
        .because(format!("{} and {free} of {total} are free{more}", needed(need, kib)))
        .with_hint(format!("run: {reserve}, or run with --no-huge"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::errno::Errno;

    use super::*;

    const SIZE: usize = 2 << 20;

    /// A machine with hugepages on two nodes. The process may use only the first.
    fn machine(nodes: [u32; 2], overcommit: u32, available_kb: u64) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let free = nodes[0] + nodes[1];
        let pages = "sys/kernel/mm/hugepages/hugepages-2048kB";
        let mut files = vec![
            ("proc/meminfo".to_owned(), format!("MemAvailable: {available_kb} kB\n")),
            ("proc/self/status".to_owned(), "Name:\tx\nMems_allowed_list:\t0\n".to_owned()),
            (format!("{pages}/nr_hugepages"), (free + 6).to_string()),
            (format!("{pages}/free_hugepages"), free.to_string()),
            (format!("{pages}/resv_hugepages"), "0".into()),
            (format!("{pages}/nr_overcommit_hugepages"), overcommit.to_string()),
            (format!("{pages}/surplus_hugepages"), "2\n".into()),
        ];
        for (node, free) in nodes.iter().enumerate() {
            let file =
                format!("sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/free_hugepages");
            files.push((file, free.to_string()));
        }
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn missing_hugepages_name_the_command() {
        let error = check_free(Path::new("/"), 1 << 50, SIZE).unwrap_err();
        assert!(error.to_string().contains("sysctl vm.nr_hugepages="), "{error}");
    }

    #[test]
    fn surplus_pages_count_as_far_as_there_is_memory_for_them() {
        let (few, many) = (machine([4, 0], 10, 1 << 30), machine([4, 0], 10, 1024));
        assert!(check_free(few.path(), 12 * SIZE, SIZE).is_ok());
        let error = check_free(few.path(), 13 * SIZE, SIZE).unwrap_err().to_string();
        assert!(
            error.contains("13 pages of 2048 KiB are needed and 4 of 10 are free, 8 more by overcommit"),
            "{error}"
        );
        assert!(check_free(many.path(), 4 * SIZE, SIZE).is_ok());
        let error = check_free(many.path(), 12 * SIZE, SIZE).unwrap_err().to_string();
        assert!(
            error.contains("16 MiB of surplus pages are needed and the machine has 1 MiB available"),
            "{error}"
        );
    }

    #[test]
    fn pages_on_other_nodes_are_named() {
        let error = || Error::os("cannot reserve 18 MiB", Errno::ENOMEM);
        let text = no_pages(machine([3, 8], 2, 1 << 20).path(), error(), 9 * SIZE, SIZE).to_string();
        assert!(
            text.contains(
                "only 3 of the 11 free ones are on NUMA nodes that this process may use (0: cpuset.mems"
            ),
            "{text}"
        );
        let at = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";
        assert!(text.contains(&format!("run: echo $(($(cat {at}) + 6)) > {at}; or allow")), "{text}");
        let text = no_pages(machine([9, 0], 2, 1 << 20).path(), error(), 9 * SIZE, SIZE).to_string();
        assert!(text.contains("hugetlb.*.max") && !text.contains("cpuset"), "{text}");
    }

    #[test]
    fn no_command_takes_hugepages_away() {
        let error = || Error::os("cannot reserve 18 MiB", Errno::ENOMEM);
        let root = Path::new("/nonexistent");
        let pages = |free| HugePages { page_size: SIZE, total: 64, free, surplus: 0 };
        let few = too_few(root, error(), 9, pages(8)).to_string();
        assert!(few.contains("8 of 64 are free; run: ") && few.contains("65"), "{few}");
        let limited = too_few(root, error(), 9, pages(9)).to_string();
        assert!(limited.contains("hugetlb.*.max") && !limited.contains("nr_hugepages"), "{limited}");
    }

    #[test]
    fn giant_pages_are_best_reserved_at_boot() {
        let pages = HugePages { page_size: GIANT_PAGE, total: 2, free: 1, surplus: 0 };
        let error = too_few(Path::new("/nonexistent"), Error::os("cannot reserve", Errno::ENOMEM), 3, pages);
        assert_eq!(
            error.to_string(),
            "cannot reserve: ENOMEM: 3 pages of 1048576 KiB are needed and 1 of 2 are free; run: echo 4 > \
             /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages, or boot with hugepagesz=1G hugepages=4, or run \
             with --no-huge"
        );
    }

    #[test]
    fn a_node_that_lacks_pages_is_named_with_what_all_parts_need() {
        let root = machine([4, 9], 0, 1 << 20);
        let parts = |pages: usize| {
            [(Some(0), 4), (Some(1), pages), (None, 90), (Some(1), 2)].map(|(n, p)| (n, p * SIZE))
        };
        check_nodes(root.path(), &parts(7), SIZE).unwrap();
        let error = check_nodes(root.path(), &parts(8), SIZE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Os);
        assert_eq!(
            error.to_string(),
            "cannot reserve 20 MiB of hugepages on NUMA node 1: 10 pages of 2048 KiB are needed and 9 are free there; \
             free memory on node 1"
        );
        let total = root.path().join("sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages");
        fs::write(total, "12\n").unwrap();
        let error = check_nodes(root.path(), &parts(8), SIZE).unwrap_err().to_string();
        let command = "run: echo 13 > /sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages";
        assert!(error.ends_with(command), "{error}");
        // Ordinary pages are not counted per node.
        check_nodes(root.path(), &parts(8), crate::mem::page_size()).unwrap();
    }
}
