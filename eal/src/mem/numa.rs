//! NUMA nodes: their memory, their CPUs, and the placement of pages on a node
//! (`Documentation/admin-guide/mm/numa_memory_policy.rst`, mbind(2), move_pages(2)).

use std::fs;
use std::path::Path;
use std::ptr::{NonNull, null};

use nix::errno::Errno;
use nix::libc::{self, c_long, c_ulong, c_void};

use super::hugepages::numbers;

/// Policy for pages that are not available on their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Vireo uses pages of another node and logs this.
    Preferred,
    /// The region is refused (`--numa-mem`).
    Required,
}

/// Nodes with memory, under `sysfs` (`/sys` on a real machine). Empty, or a single node, on a machine with
/// uniform memory.
pub fn nodes(sysfs: &Path) -> Vec<u32> {
    let list = fs::read_to_string(sysfs.join("devices/system/node/has_memory")).unwrap_or_default();
    numbers(&list).filter_map(|node| u32::try_from(node).ok()).collect()
}

/// Node of a CPU, or `None` on a kernel without nodes.
pub fn node_of_cpu(sysfs: &Path, cpu: usize) -> Option<u32> {
    fs::read_dir(sysfs.join(format!("devices/system/cpu/cpu{cpu}")))
        .ok()?
        .flatten()
        .find_map(|entry| entry.file_name().to_str()?.strip_prefix("node")?.parse().ok())
}

/// Distance between two nodes as the firmware reports it. A node's distance to itself is 10 (ACPI SLIT).
pub fn distance(sysfs: &Path, from: u32, to: u32) -> Option<u32> {
    let row = fs::read_to_string(sysfs.join(format!("devices/system/node/node{from}/distance"))).ok()?;
    row.split_whitespace().nth(to as usize)?.parse().ok()
}

/// CPUs of a node in the kernel's format, such as `0-3,8`.
pub fn cpus_of_node(sysfs: &Path, node: u32) -> Option<String> {
    let list = fs::read_to_string(sysfs.join(format!("devices/system/node/node{node}/cpulist"))).ok()?;
    Some(list.trim().to_owned()).filter(|list| !list.is_empty())
}

/// Sets `node` as the source of the pages of the `len` bytes from `start` on. The bytes must not have been
/// touched yet.
///
/// # Safety
/// The bytes belong to one mapping of the caller.
pub(super) unsafe fn bind(
    start: NonNull<u8>,
    len: usize,
    node: u32,
    placement: Placement,
) -> nix::Result<()> {
    const MPOL_PREFERRED: c_long = 1;
    const MPOL_BIND: c_long = 2;
    let mode = match placement {
        Placement::Preferred => MPOL_PREFERRED,
        Placement::Required => MPOL_BIND,
    };
    let bits = c_ulong::BITS;
    let mut mask = vec![0 as c_ulong; (node / bits) as usize + 1];
    mask[(node / bits) as usize] = 1 << (node % bits);
    // The kernel reads one bit less than it is passed (get_nodes in mm/mempolicy.c).
    let most = mask.len() * bits as usize + 1;
    // SAFETY: the caller owns the mapping. The policy changes no content, and the mask has as many bits as
    // the kernel reads.
    let done =
        unsafe { libc::syscall(libc::SYS_mbind, start.as_ptr(), len, mode, mask.as_ptr(), most, 0_u32) };
    Errno::result(done).map(drop)
}

/// Number of pages of `page_size` bytes, among the `len` bytes from `start` on, that are not on `node`.
/// `None` if the kernel does not report it.
///
/// # Safety
/// Same as [`bind`].
pub(super) unsafe fn elsewhere(start: NonNull<u8>, len: usize, node: u32, page_size: usize) -> Option<usize> {
    let pages: Vec<*const c_void> =
        (0..len).step_by(page_size).map(|at| start.as_ptr().wrapping_add(at).cast_const().cast()).collect();
    let mut found = vec![-1_i32; pages.len()];
    // SAFETY: without a list of nodes, no page is moved. The kernel writes one number per page.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            null::<i32>(),
            found.as_mut_ptr(),
            0,
        )
    };
    Errno::result(done).ok()?;
    Some(found.into_iter().filter(|found| u32::try_from(*found) != Ok(node)).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_their_cpus_are_read_from_sysfs() {
        let sysfs = tempfile::tempdir().unwrap();
        assert_eq!((nodes(sysfs.path()), node_of_cpu(sysfs.path(), 0)), (Vec::new(), None));
        let system = sysfs.path().join("devices/system");
        fs::create_dir_all(system.join("cpu/cpu9/node2")).unwrap();
        fs::create_dir_all(system.join("cpu/cpu9/topology")).unwrap();
        fs::create_dir_all(system.join("node/node2")).unwrap();
        fs::write(system.join("node/has_memory"), "0,2-3\n").unwrap();
        fs::write(system.join("node/node2/cpulist"), "8-9\n").unwrap();
        assert_eq!(nodes(sysfs.path()), [0, 2, 3]);
        assert_eq!(node_of_cpu(sysfs.path(), 9), Some(2));
        assert_eq!(cpus_of_node(sysfs.path(), 2).as_deref(), Some("8-9"));
        assert_eq!(cpus_of_node(sysfs.path(), 3), None);
    }
}
