//! Interrupts of every kind, triggered by software and, for the e1000 family, by the device; and iommufd
//! without any device. The examples that show these print only lines of text.

use anyhow::{Result, ensure};

use super::Boot;
use super::machine::{Nic, Role, need_mode, program};
use crate::case::{Cases, Context};

pub(super) fn of_each_nic(cases: &mut Cases, boot: Boot, mode: &'static str) {
    for &nic in boot.nics() {
        cases.add(format!("interrupts of {}, {mode}", nic.name()), move |context| {
            interrupts(context, mode, nic)
        });
    }
}

fn interrupts(context: &Context, mode: &str, nic: Nic) -> Result<()> {
    need_mode(mode)?;
    let kinds: &[&str] = match nic {
        Nic::VirtioNet => &["Intx", "Msix"],
        Nic::E1000 => &["Intx"],
        Nic::E1000e | Nic::Igb => &["Intx", "Msi", "Msix"],
    };
    let said = program(context, "interrupts", &format!("{} {mode}", nic.bdf(Role::FwdRx)))?.expect(0)?.stdout;
    let found: Vec<&str> = said.lines().filter_map(|line| line.strip_suffix(": by software")).collect();
    ensure!(found == kinds, "{found:?}, not {kinds:?}");
    for kind in kinds {
        ensure!(*kind != "Msix" || said.contains("Msix: fewer vectors"), "vectors were not replaced");
        // QEMU 7.2 does not survive an MSI-X interrupt of an e1000e that is switched off soon afterwards.
        if matches!(nic, Nic::E1000 | Nic::E1000e) && *kind != "Msix" {
            ensure!(said.contains(&format!("{kind}: by the device")), "no {kind} by the device");
        }
    }
    Ok(())
}

pub(super) fn iommufd_alone(cases: &mut Cases) {
    cases
        .add("iommufd alone", |context| {
            let said = program(context, "ioas", "")?.expect(0)?.stdout;
            ensure!(said.contains("the same pages, read-only, at"), "no copy of the mapping");
            Ok(())
        })
        .on_both_kernels();
}
