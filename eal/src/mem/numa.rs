//! NUMA nodes: which have memory, which a CPU is on, and pages that are to be on one of them
//! (`Documentation/admin-guide/mm/numa_memory_policy.rst`, mbind(2), move_pages(2)).

use std::fs;
use std::path::Path;
use std::ptr::{NonNull, null};

use nix::errno::Errno;
use nix::libc::{self, c_long, c_ulong, c_void};

use super::hugepages::numbers;

/// What becomes of pages that their node does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// They come from another node, which is logged.
    Preferred,
    /// There is no region then (`--numa-mem`).
    Required,
}

/// Nodes with memory, below `sysfs` (`/sys` on a real machine); none, or one, on a machine whose memory is all alike.
pub fn nodes(sysfs: &Path) -> Vec<u32> {
    let list = fs::read_to_string(sysfs.join("devices/system/node/has_memory")).unwrap_or_default();
    numbers(&list).filter_map(|node| u32::try_from(node).ok()).collect()
}

/// Node of a CPU; none on a kernel without nodes.
pub fn node_of_cpu(sysfs: &Path, cpu: usize) -> Option<u32> {
    fs::read_dir(sysfs.join(format!("devices/system/cpu/cpu{cpu}")))
        .ok()?
        .flatten()
        .find_map(|entry| entry.file_name().to_str()?.strip_prefix("node")?.parse().ok())
}

/// Distance of two nodes as the firmware states it, where 10 is a node's own (ACPI's SLIT).
pub fn distance(sysfs: &Path, from: u32, to: u32) -> Option<u32> {
    let row = fs::read_to_string(sysfs.join(format!("devices/system/node/node{from}/distance"))).ok()?;
    row.split_whitespace().nth(to as usize)?.parse().ok()
}

/// CPUs of a node, in the kernel's form: `0-3,8`.
pub fn cpus_of_node(sysfs: &Path, node: u32) -> Option<String> {
    let list = fs::read_to_string(sysfs.join(format!("devices/system/node/node{node}/cpulist"))).ok()?;
    Some(list.trim().to_owned()).filter(|list| !list.is_empty())
}

/// Has the pages of the `len` bytes from `start` on, which nobody has touched yet, come from `node`.
///
/// # Safety
/// The bytes belong to one mapping of the caller's.
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
    // The kernel reads one bit less than it is told of (get_nodes in mm/mempolicy.c).
    let most = mask.len() * bits as usize + 1;
    // SAFETY: the caller's contract; the policy changes no content, and the mask has as many bits as are read.
    let done =
        unsafe { libc::syscall(libc::SYS_mbind, start.as_ptr(), len, mode, mask.as_ptr(), most, 0_u32) };
    Errno::result(done).map(drop)
}

/// How many of the pages of `page_size` bytes, of the `len` bytes from `start` on, are not on `node`; none when the kernel
/// does not tell.
///
/// # Safety
/// As for [`bind`].
pub(super) unsafe fn elsewhere(start: NonNull<u8>, len: usize, node: u32, page_size: usize) -> Option<usize> {
    let pages: Vec<*const c_void> =
        (0..len).step_by(page_size).map(|at| start.as_ptr().wrapping_add(at).cast_const().cast()).collect();
    let mut found = vec![-1_i32; pages.len()];
    // SAFETY: without a list of nodes nothing is moved; the kernel writes a number for each page.
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
