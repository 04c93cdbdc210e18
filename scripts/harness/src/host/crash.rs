//! A guest whose kernel crashes.

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;

use super::Environment;
use super::cargo::need_guest;
use crate::case::{Cases, Context};
use crate::process::run_for;

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    let repo = environment.repo.clone();
    let crashes = move |context: &Context| {
        need_guest(&repo)?;
        // An oops must end the guest as well, and no command causes one.
        let crash = "grep -qx 1 /proc/sys/kernel/panic_on_oops && echo c >/proc/sysrq-trigger && sleep 600";
        let mut lab = Command::new(repo.join("scripts/lab"));
        lab.args(["run", "--no-build", "--nics", "none", "--", "sh", "-c", crash]);
        let ended = run_for(context, "lab", &mut lab, Duration::from_secs(120))?.expect(125)?;
        let last = ended.stderr.lines().last().unwrap_or_default();
        ensure!(
            last.contains("Kernel panic") && last.contains("guest kernel's log"),
            "unexpected output: {last}"
        );
        Ok(())
    };
    cases.add("a crash of the guest's kernel ends scripts/lab, which says so", crashes).in_place_of_a_guest();
}
