//! pktgen: sends a stream on one port, receives it on another, and reports what happened to it.
#![forbid(unsafe_code)]

pub mod args;
pub mod frame;
pub mod generator;
