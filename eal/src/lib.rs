//! Environment abstraction layer of Vireo: what a NIC driver in user space needs of Linux.
//!
//! | module | what it does | kernel's word for it |
//! |---|---|---|
//! | [`args`] | EAL arguments | – |
//! | [`lcore`] | pinned threads and the stop flag | `sched_setaffinity` |
//! | [`mem`] | pages for DMA | hugetlb, memfd |
//! | [`dma`] | device addresses, descriptor rings, packet buffers | IOVA |
//! | [`iommufd`] | I/O page tables, without VFIO or PCI: a crate of its own | `/dev/iommu` |
//! | [`vfio`] | devices, in any of the modes | `/dev/vfio` |
//! | [`socket`] | unix sockets by path | `connect` |
//! | [`rlimit`] | limits that are too low | `RLIMIT_NOFILE` |
//! | [`sync`] | locks and atomics that models can replace | – |
//! | [`user`] | giving up root | `setresuid`, capabilities |
//! | [`mmio`] | registers and doorbells | BAR |
//!
//! All `unsafe` of Vireo is in this crate and in those that are folders beside its `src`; the others forbid it.

mod affinity;
pub mod args;
pub mod bdf;
pub mod clock;
mod device_node;
pub mod dma;
pub mod error;
mod init;
pub mod ioctl;
pub mod lcore;
pub mod log;
pub mod mem;
pub mod mmio;
mod opaque;
pub mod program;
pub mod rlimit;
pub mod runtime;
mod sandbox;
pub mod socket;
pub mod sync;
pub mod user;
pub mod vfio;

pub use error::{Error, ErrorKind, Result};
pub use init::Eal;
pub use vireo_iommufd as iommufd;
