//! The host's cases.

mod cargo;
mod count;
mod crash;
mod fresh;
mod inject;
mod limits;
mod migration;
mod outside;
mod rings;
mod setup;
pub(crate) mod soak;
pub(crate) mod stacks;
mod telemetry;
mod vhost;
mod wire;

use std::path::PathBuf;

use anyhow::Result;

use crate::case::{Case, Cases};

/// Where the host's cases find what they need.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Environment {
    /// The checkout
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) repo: PathBuf,
    /// Let apt, cargo and rustup install what is missing
    #[arg(long)]
    pub(crate) yes: bool,
}

/// Returns the host's cases: with unit tests if `with_units`, which must be built to be listed, and with
/// cases that boot a guest if `with_guest`.
pub(crate) fn cases(environment: &Environment, with_units: bool, with_guest: bool) -> Result<Vec<Case>> {
    let mut cases = Cases::default();
    cargo::checks(&mut cases, environment);
    if with_units {
        cargo::units(&mut cases, environment)?;
    }
    setup::cases(&mut cases, environment);
    rings::cases(&mut cases);
    telemetry::cases(&mut cases, environment);
    inject::cases(&mut cases);
    limits::cases(&mut cases);
    cargo::scripts(&mut cases, environment);
    outside::cases(&mut cases, environment);
    soak::cases(&mut cases);
    if with_guest {
        wire::cases(&mut cases, environment);
        vhost::cases(&mut cases, environment);
        migration::cases(&mut cases, environment);
        count::cases(&mut cases, environment);
        crash::cases(&mut cases, environment);
        fresh::cases(&mut cases, environment);
    }
    Ok(cases.0)
}
