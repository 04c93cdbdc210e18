//! Scripts on a machine where something is missing.

use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::{Result, ensure};

use super::Environment;
use super::cargo::{LAB, need};
use crate::case::{Cases, Context};
use crate::process::run;

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    for script in ["test", "lab", "bench", "soak"] {
        let program = environment.repo.join("scripts").join(script);
        cases.add(format!("scripts/{script} without cargo says what to do"), move |context| {
            if script == "lab" {
                need(LAB)?;
            }
            let bin = path_without(context, &["cargo", "rustc", "rustup"])?;
            let mut command = Command::new(&program);
            command.args(match script {
                "test" => &["--list"][..],
                "lab" => &["run", "--", "true"],
                "bench" => &["insn"],
                _ => &["native"],
            });
            command.env_clear().env("PATH", bin).env("HOME", &context.dir).current_dir("/");
            let ended = run(context, "script", &mut command)?.expect(125)?;
            let last = ended.stderr.lines().last().unwrap_or_default();
            ensure!(last.contains("cargo") && last.contains("; try: "), "unexpected output: {last}");
            Ok(())
        });
    }
    for (name, missing, arguments, words) in [
        ("a tool", Some("cpio"), &["run", "--no-build", "--", "true"][..], "has no cpio"),
        ("a kernel", None, &["kernel", "--kernel", "default"], "--kernel PATH"),
    ] {
        let lab = environment.repo.join("scripts/lab");
        cases.add(format!("scripts/lab without apt and without {name} says what to do"), move |context| {
            need(LAB)?;
            let apt = ["apt-get", "apt-cache", "dpkg", "dpkg-query"];
            let bin = path_without(context, &[&apt[..], missing.as_slice()].concat())?;
            let mut command = Command::new(&lab);
            command.args(arguments).env_clear().env("PATH", bin).env("HOME", &context.dir).current_dir("/");
            let ended = run(context, "script", &mut command)?.expect(125)?;
            let last = ended.stderr.lines().last().unwrap_or_default();
            ensure!(last.contains(words) && last.contains("; try: "), "unexpected output: {last}");
            Ok(())
        });
    }
    let ui = environment.repo.join("scripts/lib/ui.sh");
    cases.add("a script that errexit stops says where", move |context| {
        let script = format!(
            "set -euo pipefail; shopt -s inherit_errexit; . {}\nf() {{\nlocal x\nx=$(false | cat)\necho \"$x\"\n}}\nf",
            ui.display()
        );
        let ended = run(context, "script", Command::new("bash").args(["-c", &script]))?.expect(1)?;
        ensure!(
            ended.stderr.contains("exit code 1 of: x=$(false | cat)"),
            "unexpected output: {}",
            ended.stderr
        );
        Ok(())
    });
}

/// Creates a directory for `PATH` with all programs of this machine except `missing`.
fn path_without(context: &Context, missing: &[&str]) -> Result<std::path::PathBuf> {
    let bin = context.path("bin");
    std::fs::create_dir(&bin)?;
    for dir in ["/usr/bin", "/bin", "/usr/sbin", "/sbin"] {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if !missing.iter().any(|missing| name.to_string_lossy() == *missing) {
                // Most programs are in several of these directories.
                let _ = symlink(entry.path(), bin.join(name));
            }
        }
    }
    Ok(bin)
}
