//! Environment abstraction layer of Vireo: what a NIC driver in user space needs from Linux.
//!
//! | module | what it does | kernel's term |
//! |---|---|---|
//! | [`args`] | EAL arguments | – |
//! | [`lcore`] | pinned threads and the stop flag | `sched_setaffinity` |
//! | [`mem`] | pages for DMA | hugetlb, memfd |
//! | [`dma`] | device addresses, descriptor rings, packet buffers | IOVA |
//! | [`iommufd`] | I/O page tables, without VFIO or PCI: a separate crate | `/dev/iommu` |
//! | [`vfio`] | devices, in all modes | `/dev/vfio` |
//! | [`socket`] | unix sockets by path | `connect` |
//! | [`telemetry`] | the socket that DPDK's telemetry clients connect to | unix socket |
//! | [`rlimit`] | commands that raise limits | `RLIMIT_NOFILE` |
//! | [`sync`] | locks and atomics that loom models can replace | – |
//! | [`user`] | dropping root privileges | `setresuid`, capabilities |
//! | [`event`] | what a sleeping lcore waits for | eventfd |
//! | [`handover`] | how a program is replaced while it runs | `SCM_RIGHTS` |
//! | [`mmio`] | registers and doorbells | BAR |
//!
//! All `unsafe` code of Vireo is in this crate and in the crates in folders next to its `src`. All other
//! crates forbid it.

mod affinity;
pub mod args;
pub mod bdf;
pub mod clock;
mod device_node;
pub mod dma;
pub mod error;
pub mod event;
pub mod handover;
mod init;
pub mod ioctl;
pub mod lcore;
pub mod log;
pub mod mem;
pub mod mmio;
mod opaque;
mod prefetch;
pub mod program;
pub mod rights;
pub mod rlimit;
pub mod runtime;
mod sandbox;
mod seqpacket;
pub mod socket;
pub mod sync;
pub mod telemetry;
pub mod user;
pub mod vfio;

pub use error::{Error, ErrorKind, Result};
pub use init::Eal;
pub use vireo_iommufd as iommufd;
