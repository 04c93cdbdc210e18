//! Pages: the hugepages of the machine, and the [`Region`] that holds pages.

mod backing;
mod hugepages;
mod limits;
mod numa;
mod pin;
mod region;
mod shortage;

pub use backing::Backing;
pub use hugepages::{HugePages, hugepages};
pub use numa::{Placement, cpus_of_node, distance, node_of_cpu, nodes};
pub(crate) use pin::Pin;
pub use region::Region;

/// Size in bytes of the largest pages that packet memory can use.
const GIANT_PAGE: usize = 1 << 30;

/// Size in bytes of the CPU's ordinary pages: 4 KiB on x86, 4 to 64 KiB on other processors, depending on how
/// the kernel is built.
pub fn page_size() -> usize {
    use nix::unistd::{SysconfVar, sysconf};
    // The kernel passes the page size to each process (AT_PAGESZ).
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| usize::try_from(size).ok());
    size.unwrap_or(4096)
}
