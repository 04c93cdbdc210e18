//! The counts of `scripts/lab count` must be the same in every boot, and those of forwarding as callgrind's.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Environment;
use super::cargo::need_guest;
use crate::case::{Cases, Context, read};
use crate::process::run_for;

/// Fraction of a count by which two boots may differ.
const MARGIN: f64 = 0.001;
/// Number of instructions by which two boots may always differ: short steps consist of little more than the
/// kernel's caching.
const FEW: f64 = 200.0;

/// Number of instructions that a poll of a forwarder takes besides its packets: the other lane's empty poll, and a
/// reading of the clock.
const OTHER_LANE: f64 = 60.0;

pub(super) fn cases(cases: &mut Cases, environment: &Environment) {
    const LIMIT: u64 = 1800;
    let repo = environment.repo.clone();
    cases
        .add(
            "each mode takes the same instructions in two boots, and forwards in those that callgrind counts",
            move |context| {
                need_guest(&repo)?;
                let lab = || {
                    let mut lab = Command::new("scripts/lab");
                    lab.current_dir(&repo);
                    lab
                };
                let committed = serde_json::from_str(&read(repo.join("scripts/insn.json"))?)?;
                let mut counted = Vec::new();
                for boot in ["first", "second"] {
                    let file = context.path(&format!("{boot}.json"));
                    let mut lab = lab();
                    lab.args(["count", "--nics", "e1000e,virtio-net", "--json"]).arg(&file);
                    run_for(context, boot, &mut lab, Duration::from_secs(LIMIT / 2))?.expect(0)?;
                    let figures = serde_json::from_str(&read(file)?)?;
                    calls(&figures)?;
                    forwarding(&figures, &committed)?;
                    counted.push(rows(&figures)?);
                }
                compare(context, &counted[0], &counted[1])
            },
        )
        .in_full()
        .limit(LIMIT);
}

/// Steps of all modes on e1000e, with their instructions.
fn rows(figures: &Value) -> Result<Vec<(String, f64)>> {
    let rows = figures["counted"].as_array().context("nothing was counted")?;
    let rows = rows.iter().filter(|row| row["nic"] == "e1000e");
    let row = |row: &Value| {
        let words = ["mode", "step", "memory"].map(|key| row[key].as_str().unwrap_or_default());
        Ok((words.join(" "), row["instructions"].as_f64().context("a row without a count")?))
    };
    rows.map(row).collect()
}

/// Checks that a step's main call accounts for most of the step, and that a step's calls do not add up to
/// more than the step.
fn calls(figures: &Value) -> Result<()> {
    let rows = figures["counted"].as_array().context("nothing was counted")?;
    for row in rows {
        let calls = row["calls"].as_array().context("a row without calls")?;
        let sum: f64 = calls.iter().filter_map(|call| call["instructions"].as_f64()).sum();
        let all = row["instructions"].as_f64().context("a row without a count")?;
        ensure!(sum <= (1.0 + MARGIN) * all + FEW, "{sum} instructions in the calls of {row}");
    }
    for (mode, step, memory, name) in [
        ("container", "map", Some("1 GiB, map"), "VFIO_IOMMU_MAP_DMA"),
        ("cdev", "map", Some("1 GiB, map"), "IOMMU_IOAS_MAP"),
        ("cdev", "unmap", Some("4 KiB, map"), "IOMMU_IOAS_UNMAP"),
        ("cdev", "bind", None, "VFIO_DEVICE_BIND_IOMMUFD"),
        ("container", "close", None, "close"),
    ] {
        let fits =
            |row: &&Value| row["mode"] == mode && row["step"] == step && row["memory"].as_str() == memory;
        let row = rows.iter().find(fits).with_context(|| format!("no {step} in {mode}"))?;
        let call = row["calls"].as_array().into_iter().flatten().find(|call| call["name"] == name);
        let part = call.and_then(|call| call["instructions"].as_f64()).unwrap_or_default()
            / row["instructions"].as_f64().unwrap_or(f64::INFINITY);
        ensure!(part > 0.8, "{name} is {part:.3} of {row}");
    }
    Ok(())
}

/// Checks that forwarding takes the same number of instructions in each mode, and about as many as callgrind counts
/// of programs that are built with LTO (`scripts/bench insn`).
fn forwarding(figures: &Value, committed: &Value) -> Result<()> {
    let find = |rows: &Value, wanted: &[(&str, Value)], count: &str| -> Vec<f64> {
        let fits = |row: &&Value| wanted.iter().all(|(key, value)| row[key] == *value);
        rows.as_array().into_iter().flatten().filter(fits).filter_map(|row| row[count].as_f64()).collect()
    };
    for (nic, device) in [("e1000e", "82574L"), ("virtio-net", "split mergeable")] {
        let polls = [("nic", nic.into()), ("step", "forward".into())];
        let polls = find(&figures["counted"], &polls, "instructions");
        ensure!(polls.len() > 3 && polls.iter().all(|poll| *poll == polls[0]), "{nic}: polls take {polls:?}");
        let tied = [("device", device.into()), ("path", "tied".into()), ("burst", 32.into())];
        let tied = find(&committed["rows"], &tied, "insn_per_packet");
        let most =
            32.0 * 1.1 * tied.first().with_context(|| format!("no {device} in insn.json"))? + OTHER_LANE;
        ensure!(
            polls[0] <= most,
            "{nic}: a poll of 32 packets takes {} instructions, above {most}",
            polls[0]
        );
    }
    Ok(())
}

fn compare(context: &Context, first: &[(String, f64)], second: &[(String, f64)]) -> Result<()> {
    ensure!(first.len() > 20 && first.len() == second.len(), "{} and {} rows", first.len(), second.len());
    for ((name, one), (other_name, other)) in first.iter().zip(second) {
        ensure!(name == other_name, "{name} where the other boot has {other_name}");
        let difference = (one - other).abs();
        ensure!(difference <= (MARGIN * one.max(*other)).max(FEW), "{name}: {one} and {other} instructions");
    }
    let of = |wanted: &str| first.iter().find(|(name, _)| name == wanted).map(|(_, count)| *count);
    let map = |mode: &str| of(&format!("{mode} map 2 MiB, map")).context("no map of 2 MiB pages");
    let ratio = map("cdev")? / map("container")?;
    context.note(format!("cdev maps 2 MiB pages in {ratio:.3} of container's instructions"));
    Ok(())
}
