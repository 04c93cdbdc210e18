//! l2fwd on the application frame ([`vireo_frame`]): DPDK's arguments, the rewriting of Ethernet addresses,
//! and the output.
//!
//! [`args`] parses the arguments after `--`, [`plan`] turns them into routes, [`rewrite`] processes packets,
//! [`report`] prints, and [`app`] combines them.
#![forbid(unsafe_code)]

pub mod app;
pub mod args;
pub mod plan;
pub mod report;
pub mod rewrite;
