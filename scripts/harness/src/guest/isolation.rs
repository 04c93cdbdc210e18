//! Memory that a NIC reaches: only its own with an IOMMU, all memory without one.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Boot;
use super::machine::{Nic, Role, need_mode, nodes_of, owned_by_nobody};
use super::refuse::refused_as;
use super::traffic::{forwards, ports};
use crate::case::{Cases, Context, read};
use crate::l2fwd::Start;
use crate::process::run_for;

/// Time limit for a proof: an 82540EM needs a second per frame.
const PROOF_PATIENCE: Duration = Duration::from_secs(120);

/// Aims a NIC at several targets. Returns a row for each target, with whether the NIC's write landed there.
fn proof(context: &Context, mode: &str, nic: Nic) -> Result<Vec<Value>> {
    let file = context.path("proof.json");
    let mut command = Command::new(context.program("vfio-bench"));
    command.args([
        "dma-proof",
        "--modes",
        mode,
        "--nic",
        &nic.bdf(Role::FwdRx),
        "--neighbour",
        &nic.bdf(Role::FwdTx),
    ]);
    run_for(context, "proof", command.arg("--json").arg(&file), PROOF_PATIENCE)?.expect(0)?;
    let proof: Value = serde_json::from_str(&read(file)?)?;
    let rows = proof["rows"].as_array().context("no rows")?;
    ensure!(rows.iter().all(|row| row["works_after_reset"] == true), "the NIC does not work after a reset");
    Ok(rows.clone())
}

pub(super) fn with_iommu(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for (rx, tx, calls) in [(Nic::VirtioNet, Nic::VirtioNet, 6), (Nic::E1000, Nic::E1000e, 4)] {
        let name = if rx == tx { rx.name().to_owned() } else { format!("{} to {}", rx.name(), tx.name()) };
        cases.add(format!("{name}, --isolate-ports, {mode}"), move |context| {
            let arguments =
                format!("-l 1 --vfio-mode {mode} --isolate-ports {} -- -p 3 -q 2 -T 0", ports(rx, tx));
            let ended = forwards(context, boot.generator_mode(), &Start::new(arguments), rx, tx)?;
            // Each port maps the packet buffers with one call and its rings with one or two: virtio's
            // descriptors are mapped separately, because the device only reads them.
            let isolation = ended.event("isolation")?;
            ensure!(isolation["spaces"] == 2 && isolation["map_calls"] == calls, "{isolation}");
            Ok(())
        });
    }
    for nic in [Nic::E1000, Nic::E1000e] {
        let case = cases.add(
            format!("DMA of {} where it should not be is stopped, {mode}", nic.name()),
            move |context| {
                let rows = proof(context, mode, nic)?;
                ensure!(rows.len() == 4, "{} rows, not 4", rows.len());
                for row in rows {
                    // Nothing separates ports that share an address space.
                    let shared = row["target"] == "shared-ring";
                    ensure!(row["landed"] == shared, "landed is {}: {row}", row["landed"]);
                    let fault = row["fault"].as_str().unwrap_or_default();
                    let device = nic.bdf(Role::FwdRx);
                    let named = fault.contains("DMA Write")
                        && fault.contains(&format!("{}]", &device["0000:".len()..]));
                    ensure!(named != shared, "the kernel reported: {fault}");
                }
                Ok(())
            },
        );
        // Kernels word faults differently; the NIC makes no difference.
        if nic == Nic::E1000e {
            case.on_both_kernels();
        } else {
            case.in_full();
        }
    }
}

pub(super) fn without_iommu(cases: &mut Cases, mode: &'static str) {
    for nic in [Nic::E1000, Nic::E1000e] {
        let case = cases.add(format!("DMA of {} arrives everywhere, {mode}", nic.name()), move |context| {
            need_mode(mode)?;
            let rows = proof(context, mode, nic)?;
            ensure!(rows.len() == 3 && rows.iter().all(|row| row["landed"] == true), "{rows:?}");
            Ok(())
        });
        case.in_full_if(nic == Nic::E1000);
    }
}

/// Adds cases with two isolated ports of an unprivileged user who may lock 24 MiB; the packet buffers take 18
/// MiB of that. In cdev mode, the second address space copies the mapping of the first and pins nothing. In
/// the other modes, each container pins separately.
pub(super) fn pins(cases: &mut Cases) {
    const LIMIT: &str = "ulimit -l 24576";
    let arguments = |mode: &str| {
        format!(
            "-l 1 --file-prefix nobody --vfio-mode {mode} --isolate-ports {} -- -p 3 -q 2 -T 0",
            ports(Nic::E1000e, Nic::E1000e)
        )
    };
    cases
        .add("isolated ports pin packet buffers once, cdev", move |context| {
            let _owned = owned_by_nobody(&nodes_of("cdev")?)?;
            let limited = format!("{LIMIT}; exec su nobody -s /bin/sh -c \"exec $*\"");
            Start::new(arguments("cdev")).under(["sh", "-c", &limited, "sh"]).forwarding(context)?.stop()?;
            Ok(())
        })
        .on_both_kernels();
    for mode in ["container", "compat"] {
        cases
            .add(format!("isolated ports pin packet buffers once each, {mode}"), move |context| {
                let _owned = owned_by_nobody(&nodes_of(mode)?)?;
                let line = refused_as(context, ("nobody", LIMIT), &arguments(mode), (71, "run: ulimit -l"))?;
                let (_, limit) = line.split_once("run: ulimit -l ").context("no command")?;
                let digits: String = limit.chars().take_while(char::is_ascii_digit).collect();
                ensure!(digits.parse::<u64>()? > 24576, "the hint does not raise the limit");
                Ok(())
            })
            .on_both_kernels();
    }
}
