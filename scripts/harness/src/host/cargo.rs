//! Checks by cargo and the other scripts: each is a command that fails with its exit code.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Environment;
use crate::case::{Case, Cases, Context, Tier, skip, skipped_by};
use crate::process::run_for;

/// Time limit in seconds for a build with its tests.
const BUILD: u64 = 3600;
/// Architecture whose barriers and page sizes differ from those of x86.
const AARCH64: &str = "aarch64-unknown-linux-gnu";

/// A case that runs a command in the checkout.
struct Line<'a> {
    name: &'a str,
    words: &'a [&'a str],
    /// Programs without which the case is skipped.
    needs: &'static [&'static str],
}

impl Line<'_> {
    fn add<'c>(&self, cases: &'c mut Cases, environment: &Environment) -> &'c mut Case {
        let (repo, needs) = (environment.repo.clone(), self.needs);
        let line: Vec<String> =
            self.words.iter().filter(|word| !word.is_empty()).map(|&word| word.into()).collect();
        cases
            .add(self.name, move |context| {
                need(needs)?;
                finish(context, Command::new(&line[0]).args(&line[1..]).current_dir(&repo))
            })
            .limit(BUILD)
    }
}

/// Start of the command line of what runs alongside guests: their time runs on when they do not.
const NICE: &[&str] = &["nice", "-n", "10"];

fn niced() -> Command {
    let mut command = Command::new(NICE[0]);
    command.args(&NICE[1..]);
    command
}

/// Skips the case if a program is missing.
pub(super) fn need(programs: &[&str]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |program: &&&str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    match programs.iter().find(|program| !is_there(program)) {
        Some(program) => skip(format!("{program} is not installed")),
        None => Ok(()),
    }
}

/// Skips the case if the lab cannot boot a guest: a program is missing, or the kernel is not built.
pub(super) fn need_guest(repo: &Path) -> Result<()> {
    need(LAB)?;
    match Command::new(repo.join("scripts/lab")).args(["kernel", "--show"]).output()?.status.success() {
        true => Ok(()),
        false => skip("the guest's kernel is not built; run: scripts/lab kernel"),
    }
}

/// Programs that the lab needs.
pub(super) const LAB: &[&str] = &["busybox", "cpio", "qemu-system-x86_64"];

/// Runs a command to its end. [Its output](skipped_by) may skip the case, and its exit code may fail it.
fn finish(context: &Context, command: &mut Command) -> Result<()> {
    let ended = run_for(context, "command", command, Duration::from_secs(BUILD))?;
    if let Some(reason) = [&ended.stdout, &ended.stderr].into_iter().find_map(|text| skipped_by(text)) {
        return skip(reason);
    }
    ended.expect(0).map(drop)
}

/// Whether this cargo has a component. Debian's cargo comes without some.
fn has(component: &str) -> bool {
    let mut command = Command::new("cargo");
    command.args([component, "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Whether this Rust has the standard library of a target.
fn has_target(target: &str) -> Result<bool> {
    let output = Command::new("rustc").args(["--print", "target-libdir", "--target", target]).output()?;
    Ok(Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
}

fn component(
    cases: &mut Cases,
    environment: &Environment,
    name: &str,
    of: &'static str,
    arguments: &'static [&'static str],
) {
    let repo = environment.repo.clone();
    cases
        .add(name, move |context| {
            if !has(of) {
                return skip(format!("this Rust has no cargo {of}"));
            }
            finish(context, Command::new("cargo").arg(of).args(arguments).current_dir(&repo))
        })
        .limit(BUILD);
}

/// Adds the checks of format, lints and documentation, and a build for aarch64.
pub(super) fn checks(cases: &mut Cases, environment: &Environment) {
    component(cases, environment, "format", "fmt", &["--all", "--check"]);
    let clippy = &["--quiet", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    component(cases, environment, "clippy without warnings", "clippy", clippy);
    let repo = environment.repo.clone();
    cases.add("shellcheck", move |context| {
        need(&["shellcheck"])?;
        let mut scripts = vec![repo.join(".ci/run")];
        for dir in ["scripts", "scripts/lib", "scripts/guest"] {
            for entry in std::fs::read_dir(repo.join(dir))? {
                let path = entry?.path();
                let text = if path.is_file() { std::fs::read(&path)? } else { Vec::new() };
                if text.starts_with(b"#!") || text.starts_with(b"# shellcheck shell=") {
                    scripts.push(path);
                }
            }
        }
        ensure!(scripts.len() > 10, "only {} scripts", scripts.len());
        finish(context, Command::new("shellcheck").arg("-x").args(scripts).current_dir(&repo))
    });
    let words = [
        "env",
        "RUSTDOCFLAGS=-D warnings",
        "cargo",
        "doc",
        "--quiet",
        "--workspace",
        "--no-deps",
        "--locked",
    ];
    Line { name: "documentation", words: &words, needs: &[] }.add(cases, environment);
    let repo = environment.repo.clone();
    cases
        .add("the workspace compiles for aarch64", move |context| {
            if !has_target(AARCH64)? {
                return skip(format!("this Rust has no target {AARCH64}; rustup target add {AARCH64}"));
            }
            let words = ["check", "--quiet", "--workspace", "--locked", "--target", AARCH64];
            finish(context, Command::new("cargo").args(words).current_dir(&repo))
        })
        .limit(BUILD);
}

/// Adds each unit test and command-line test as a case, in its own process, so that none can hang or end
/// another.
pub(super) fn units(cases: &mut Cases, environment: &Environment) -> Result<()> {
    for (name, program, dir) in test_programs(&environment.repo)? {
        let listed = |argument: &[&str]| -> Result<Vec<String>> {
            let output =
                Command::new(&program).args(["--list", "--format", "terse"]).args(argument).output()?;
            ensure!(output.status.success(), "{} cannot list its tests", program.display());
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(Into::into).collect())
        };
        let ignored = listed(&["--ignored"])?;
        for test in listed(&[])? {
            let (program, dir, is_ignored) = (program.clone(), dir.clone(), ignored.contains(&test));
            cases
                .add(format!("{name}::{test}"), move |context| {
                    if is_ignored {
                        return skip("another test runs it");
                    }
                    finish(context, niced().arg(&program).args(["--exact", &test]).current_dir(&dir))
                })
                .alongside_guests()
                .limit(600);
        }
    }
    let repo = environment.repo.clone();
    cases
        .add("examples in the documentation", move |context| {
            let doc = ["test", "--quiet", "--workspace", "--locked", "--doc"];
            finish(context, Command::new("cargo").args(doc).current_dir(&repo))
        })
        .limit(BUILD);
    Ok(())
}

/// Builds the test programs, and returns for each its crate and target, its executable, and the directory in
/// which cargo runs it.
fn test_programs(repo: &Path) -> Result<Vec<(String, PathBuf, PathBuf)>> {
    let mut command = Command::new("cargo");
    command.args([
        "test",
        "--quiet",
        "--workspace",
        "--locked",
        "--no-run",
        "--message-format",
        "json-render-diagnostics",
    ]);
    let output = command.current_dir(repo).stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo could not build the tests (its message is above)");
    }
    let mut programs = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: Value = serde_json::from_slice(line)?;
        let (Some(program), true) = (message["executable"].as_str(), message["profile"]["test"] == true)
        else {
            continue;
        };
        let manifest = Path::new(message["manifest_path"].as_str().context("the message names no manifest")?);
        let dir = manifest.parent().context("the manifest has no directory")?;
        let krate = dir.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let target = message["target"]["name"].as_str().unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        let name =
            if kind == "lib" || kind == "bin" { krate.to_owned() } else { format!("{krate}::{target}") };
        programs.push((name, program.into(), dir.into()));
    }
    Ok(programs)
}

/// Adds fuzzing, Miri, loom, the sanitizers and the count of instructions, each run by a script.
pub(super) fn scripts(cases: &mut Cases, environment: &Environment) {
    let yes = if environment.yes { "--yes" } else { "" };
    let long = |setting, krate, tests| {
        format!("env {setting} cargo test --quiet --release --locked -p {krate} --lib -- {tests}")
    };
    let lies = long("VIREO_LIES=10000", "vireo-frame", "devices_that_lie");
    // Each of the test's 24 lanes.
    let sleeps = long("VIREO_SLEEPS=42000", "vireo-frame", "each_packet_wakes_the_lcore");
    let restarts = long("VIREO_RESTARTS=10000", "vireo-drivers", "queues_may_be_stopped_and_started");
    let [lies, sleeps, restarts] =
        [&lies, &sleeps, &restarts].map(|line| line.split(' ').collect::<Vec<_>>());
    // The longest first.
    let table: [(&str, &[&str], &'static [&'static str], Tier); 12] = [
        (
            "instructions per packet",
            &["scripts/bench", "insn", "--check", yes],
            &["valgrind", "jq"],
            Tier::Default,
        ),
        ("Miri, without its slowest tests", &["scripts/sanitize", "miri", "--short", yes], &[], Tier::Short),
        (
            "cache lines between two processes",
            &["scripts/bench", "coherence", "--check", yes],
            &["valgrind", "jq"],
            Tier::Default,
        ),
        ("loom", &["scripts/sanitize", "loom"], &[], Tier::Default),
        ("fuzz corpus with stable Rust", &["scripts/fuzz", "--replay"], &[], Tier::Default),
        ("Miri, all its tests", &["scripts/sanitize", "miri", yes], &[], Tier::Full),
        ("fuzz targets", &["scripts/fuzz", "--seconds", "60", "--jobs", "2", yes], &["g++"], Tier::Full),
        ("AddressSanitizer", &["scripts/sanitize", "asan"], &[], Tier::Full),
        ("ThreadSanitizer", &["scripts/sanitize", "tsan", yes], &[], Tier::Full),
        ("10,000 lying devices of each kind on tied lanes", &lies, &[], Tier::Full),
        ("a million sleeps of lcores", &sleeps, &[], Tier::Full),
        ("queues stopped and started 10,000 times", &restarts, &[], Tier::Full),
    ];
    for (name, words, needs, tier) in table {
        let words = [NICE, words].concat();
        let case = Line { name, words: &words, needs }.add(cases, environment);
        case.tier = tier;
        case.alongside_guests();
    }
}
