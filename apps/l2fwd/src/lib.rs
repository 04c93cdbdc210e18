//! l2fwd on the application frame ([`vireo_frame`]): DPDK's arguments, the rewrite of the Ethernet addresses, the output.
//!
//! [`args`] reads what stands behind `--`, [`plan`] turns it into routes, [`rewrite`] is what happens to packets, [`report`]
//! prints, and [`app`] joins them.
#![forbid(unsafe_code)]

pub mod app;
pub mod args;
pub mod plan;
pub mod report;
pub mod rewrite;
