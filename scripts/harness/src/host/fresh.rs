//! README's commands on minimal Debian systems, where they must run to the end as pasted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use scopeguard::guard;

use super::Environment;
use super::cargo::need;
use crate::case::{Cases, Context, read, skip};
use crate::process::{run, run_for};

/// Debian's releases and their code names.
const RELEASES: [(&str, &str); 2] = [("12", "bookworm"), ("13", "trixie")];
/// Time limit for one of README's commands: the whole suite, after a build of everything but the kernels, while
/// the other system and this run's guests use the same CPUs.
const COMMAND: Duration = Duration::from_secs(7200);
const DEBOOTSTRAP: Duration = Duration::from_secs(1800);
/// Path of the checkout in the new system.
const CHECKOUT: &str = "/root/vireo";

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    for (number, name) in RELEASES {
        let repo = environment.repo.clone();
        let limit = 2 * COMMAND.as_secs() + DEBOOTSTRAP.as_secs();
        cases
            .add(format!("README's commands on a fresh machine: minimal Debian {number}"), move |context| {
                readme_on(context, &repo, name)
            })
            .limit(limit)
            .in_full();
    }
}

/// Returns the two commands that README has for any machine.
fn commands(readme: &str) -> Vec<String> {
    let first = |start: &str| readme.lines().find(|line| line.starts_with(start));
    ["./scripts/lab compare", "./scripts/test --yes"].into_iter().filter_map(first).map(Into::into).collect()
}

fn readme_on(context: &Context, repo: &Path, suite: &str) -> Result<()> {
    if !nix::unistd::Uid::effective().is_root() {
        return skip("debootstrap needs root");
    }
    need(&["debootstrap"])?;
    let commands = commands(&read(repo.join("README.md"))?);
    ensure!(commands.len() == 2, "README does not have two commands for a fresh machine");
    let root = guard(context.path("root"), |root| {
        let _ = std::fs::remove_dir_all(root);
    });
    let mirrors = Mirrors::of_this_machine(context)?;
    let mut debootstrap = Command::new("debootstrap");
    debootstrap
        .args(["--variant=minbase", "--include=git,ca-certificates", suite])
        .arg(&*root)
        .arg(&mirrors.release);
    run_for(context, "debootstrap", &mut debootstrap, DEBOOTSTRAP)?.expect(0)?;
    mirrors.give_to(&root, suite)?;
    let mut clone = Command::new("git");
    clone.args(["clone", "--quiet"]).arg(std::fs::canonicalize(repo)?).arg(root.join(&CHECKOUT[1..]));
    run_for(context, "clone", &mut clone, Duration::from_secs(120))?.expect(0)?;
    for command in commands {
        let begun = Instant::now();
        inside(context, &root, &command)?;
        let seconds = begun.elapsed().as_secs();
        context.note(format!("{}:{:02}  {command}", seconds / 60, seconds % 60));
    }
    Ok(())
}

/// Runs a line as root's shell in the new system would. Its mounts and processes are gone when it ends.
/// Kernels may come from this machine's cache; everything else is built in the new system.
fn inside(context: &Context, root: &Path, line: &str) -> Result<()> {
    let kernels = cache().join("kernel");
    std::fs::create_dir_all(&kernels)?;
    // The root must be a mount, as on a real machine: `ip -n` changes how it propagates.
    let script = r#"
        mount --bind "$1" "$1"
        mount -t proc proc "$1/proc"
        mount --rbind /sys "$1/sys"
        mount --rbind /dev "$1/dev"
        mkdir -p "$1/root/.cache/vireo/kernel"
        mount --bind "$2" "$1/root/.cache/vireo/kernel"
        exec env -i HOME=/root TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            chroot "$1" /bin/bash -c "$3""#;
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--propagation",
        "private",
        "sh",
        "-ec",
        script,
        "sh",
    ]);
    command.arg(root).arg(kernels).arg(format!("cd {CHECKOUT} && {line}"));
    let ended = run_for(context, "inside", &mut command, COMMAND)?;
    let failed = failed(&ended.stdout);
    ended.expect(0).with_context(|| format!("{line}\n{failed}"))?;
    Ok(())
}

/// Returns the failed cases of a suite's output, each with its comments.
fn failed(tap: &str) -> String {
    let mut is_failed = false;
    let lines = tap.lines().filter(|line| {
        let comment = line.starts_with('#');
        is_failed = line.starts_with("not ok") || (comment && is_failed);
        is_failed
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// Directory of the lab's cache.
fn cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default().join("vireo")
}

/// How this machine reaches Debian; the new system must do it in the same way.
struct Mirrors {
    /// Mirror of the releases.
    release: String,
    /// Mirror of the security updates, if this machine has one.
    security: Option<String>,
    /// apt's settings for downloads (`Acquire`).
    acquire: String,
}

impl Mirrors {
    fn of_this_machine(context: &Context) -> Result<Self> {
        let targets = ["indextargets", "--format", "$(SITE) $(CODENAME) $(SUITE)", "Created-By: Packages"];
        let listed = run(context, "apt", Command::new("apt-get").args(targets))?.expect(0)?.stdout;
        let os = read("/etc/os-release")?;
        let codename = os
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .context("no codename in /etc/os-release")?;
        let site = |wanted: &str| {
            let mut fields = listed.lines().map(|line| line.split(' '));
            fields.find_map(|mut fields| {
                let site = fields.next()?;
                fields.any(|name| name == wanted).then(|| site.to_owned())
            })
        };
        let mut dump = Command::new("apt-config");
        Ok(Self {
            release: site(codename).context("no Debian mirror in this machine's apt sources")?,
            security: site(&format!("{codename}-security")),
            acquire: run(context, "apt-config", dump.args(["dump", "Acquire"]))?.expect(0)?.stdout,
        })
    }

    /// Writes the sources that Debian's installer would have set up, and the settings that this machine's
    /// network needs.
    fn give_to(&self, root: &Path, suite: &str) -> Result<()> {
        let mut sources =
            format!("deb {} {suite} main\ndeb {} {suite}-updates main\n", self.release, self.release);
        if let Some(security) = &self.security {
            sources += &format!("deb {security} {suite}-security main\n");
        }
        std::fs::write(root.join("etc/apt/sources.list"), sources)?;
        std::fs::write(root.join("etc/apt/apt.conf.d/90transport"), &self.acquire)?;
        for file in ["etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"] {
            // If this machine has no such file, the new system needs none.
            let _ = std::fs::copy(Path::new("/").join(file), root.join(file));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_suite_the_failed_cases_are_told() {
        let tap = "ok 1 - a\n# note\nnot ok 2 - b\n#   why\n#   where\nok 3 - c\n# Linux 7.3.4\n1..3\n";
        assert_eq!(failed(tap), "not ok 2 - b\n#   why\n#   where\n");
    }
}
