//! vireo-doctor compared with l2fwd, which gets the same NIC in the same mode, as the same user, on a machine
//! that is broken in the same way.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Boot;
use super::machine::{Nic, Role, as_user, bind, is_bound, rebind_on_drop};
use super::refuse::refused_as;
use super::traffic::starts_again;
use crate::case::{Cases, Context, read};
use crate::process::{Ended, run};

/// The doctor's diagnosis of one NIC in one mode: `None` if the NIC is usable, else the reason and the
/// command in the format of an error.
pub(super) fn diagnose(
    context: &Context,
    user: (&str, &str),
    mode: &str,
    nic: &str,
) -> Result<Option<String>> {
    let mut command = as_user(user.0, user.1, &context.program("doctor"));
    let ended = run(context, "doctor", command.args(["--json", "--modes", mode, nic]))?;
    ensure!(ended.stderr.is_empty(), "the doctor printed errors");
    let said = modes(&ended)?;
    let verdict =
        said.iter().find(|verdict| verdict["mode"] == mode).context("the doctor left out the mode")?;
    let usable = verdict["usable"] == true;
    ensure!(ended.code == if usable { 0 } else { 69 }, "the doctor exited with {}", ended.code);
    if usable {
        return Ok(None);
    }
    let text = |name: &str| verdict[name].as_str().unwrap_or_default();
    let hint = verdict["hint"].as_str().map(|hint| format!("; {hint}")).unwrap_or_default();
    Ok(Some(format!("{}: {}{hint}", text("what"), text("why"))))
}

/// All verdicts in the output of a run.
fn modes(ended: &Ended) -> Result<Vec<Value>> {
    let said: Value = serde_json::from_str(&ended.stdout)?;
    let nics = said["nics"].as_array().context("the doctor printed no NICs")?;
    Ok(nics.iter().filter_map(|nic| nic["modes"].as_array()).flatten().cloned().collect())
}

/// Checks that the doctor calls `nic` usable in `mode`. The caller then starts l2fwd on it.
pub(super) fn usable(context: &Context, mode: &str, nic: &str) -> Result<()> {
    let diagnosis = diagnose(context, ("root", ""), mode, nic)?;
    ensure!(diagnosis.is_none(), "the doctor refuses the NIC: {}", diagnosis.unwrap_or_default());
    Ok(())
}

/// Checks that l2fwd refuses `nic` in `mode` with this exit code and one line that contains `text`, and that
/// the doctor's diagnosis is the identical line. `user` is a user name with limits that a shell sets.
pub(super) fn unusable_as(
    context: &Context,
    user: (&str, &str),
    mode: &str,
    nic: &str,
    (code, text): (i32, &str),
) -> Result<String> {
    let arguments = format!("--file-prefix second --vfio-mode {mode} -a {nic} -- -p 1");
    let line = refused_as(context, user, &arguments, (code, text))?;
    let diagnosis = diagnose(context, user, mode, nic)?.unwrap_or_else(|| "the NIC is usable".into());
    ensure!(line == diagnosis, "the doctor reports something else: {diagnosis}");
    Ok(line)
}

/// As [`unusable_as`], for root.
pub(super) fn unusable(context: &Context, mode: &str, nic: &str, why: (i32, &str)) -> Result<String> {
    unusable_as(context, ("root", ""), mode, nic, why)
}

pub(super) fn cases(cases: &mut Cases, boot: Boot, mode: &'static str) {
    cases.add(format!("doctor: all NICs, {mode}"), move |context| {
        let mut command = as_user("root", "", &context.program("doctor"));
        let ended = run(context, "doctor", command.args(["--json", "--modes", mode]))?.expect(0)?;
        let (mut nics, said) = (0, modes(&ended)?);
        for device in std::fs::read_dir("/sys/bus/pci/devices")? {
            nics += usize::from(read(device?.path().join("class"))?.trim() == "0x020000");
        }
        ensure!(said.len() == nics, "the doctor has {} NICs, not {nics}", said.len());
        ensure!(
            said.iter().all(|verdict| verdict["usable"] == true),
            "the doctor does not report all NICs as usable"
        );
        starts_again(context, boot.generator_mode())
    });
    cases.add("doctor: a NIC of the kernel", |context| {
        let nic = Nic::E1000e.bdf(Role::FwdRx);
        let _again = rebind_on_drop(nic.clone());
        bind(&nic, "e1000e")?;
        let mut command = as_user("root", "", &context.program("doctor"));
        let ended = run(context, "doctor", command.args(["--json", &nic]))?.expect(69)?;
        let said = modes(&ended)?;
        ensure!(
            said.len() == 5 && said.iter().all(|verdict| verdict["usable"] == false),
            "expected five modes, none of them usable"
        );
        ensure!(is_bound(&nic, "e1000e"), "the NIC was taken from e1000e");
        Ok(())
    });
}
