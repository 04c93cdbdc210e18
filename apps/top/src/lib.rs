//! Clients of the telemetry of Vireo's and DPDK's programs, for `vireo-top` and `vireo-proc-info`.
#![forbid(unsafe_code)]

pub mod client;
