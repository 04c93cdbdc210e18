//! l2fwd: receives on one port, rewrites the Ethernet addresses and sends on another.
//!
//! A packet's way is in [`forward`]; [`app`] sets up and ends, [`plan`] shares ports out to lcores, [`launch`]
//! runs them, [`control`] restarts a port whose device broke a rule, [`report`] prints, [`args`] reads what
//! stands behind `--`.
#![forbid(unsafe_code)]

pub mod app;
pub mod args;
pub mod balance;
pub mod control;
pub mod forward;
pub mod launch;
pub mod plan;
pub mod recall;
pub mod report;
