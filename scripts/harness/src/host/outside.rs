//! An application outside of the workspace that uses vireo-frame and adds its own driver.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Environment;
use crate::case::{Cases, Context, read};
use crate::process::run_for;

/// Time limit in seconds for building the dependencies.
const BUILD: u64 = 1800;

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    let repo = environment.repo.clone();
    cases
        .add("a crate outside of the workspace adds a driver", move |context| {
            let manifest = write_crate(context, &repo)?;
            let mut cargo = Command::new("cargo");
            cargo.args(["run", "--quiet", "--offline", "--manifest-path"]).arg(manifest);
            cargo.arg("--target-dir").arg(repo.join("target/outside")).arg("--");
            cargo.args(["--no-huge", "--no-pci", "--in-memory", "-l", "0", "--vdev", "net_null0,size=64"]);
            let ended = run_for(context, "cargo", &mut cargo, Duration::from_secs(BUILD))?.expect(0)?;
            let counts = ended.stdout.strip_prefix("net_null0 (null) with frames of 64 bytes: received ");
            let counts = counts.and_then(|rest| rest.trim_end().split_once(" sent "));
            ensure!(
                counts.is_some_and(|(received, sent)| received == sent),
                "unexpected output: {}",
                ended.stdout
            );
            Ok(())
        })
        .in_full()
        .limit(BUILD);
}

/// Writes a package with the example's source and its own manifest, and returns the manifest's path.
fn write_crate(context: &Context, repo: &Path) -> Result<std::path::PathBuf> {
    fs::create_dir(context.path("src"))?;
    fs::write(context.path("src/main.rs"), read(repo.join("apps/frame/examples/net-null.rs"))?)?;
    // Use the workspace's lock file: its versions are already on this machine.
    fs::copy(repo.join("Cargo.lock"), context.path("Cargo.lock"))?;
    let frame = repo.join("apps/frame");
    let manifest = context.path("Cargo.toml");
    fs::write(
        &manifest,
        format!(
            "[package]\nname = \"outside\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n\
             clap = {{ version = \"4\", features = [\"derive\"] }}\nvireo-frame = {{ path = '{}' }}\n",
            frame.display()
        ),
    )?;
    Ok(manifest)
}
