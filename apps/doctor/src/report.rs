//! The findings as text and as JSON. Lines are not wrapped, because they contain commands to copy, and a pipe
//! has no width.

use std::process::ExitCode;

use serde::Serialize;
use vireo_eal::{Error, ErrorKind, Result};

use crate::examine::{Nic, Verdict};
use crate::machine::Machine;

/// All findings.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) nics: Vec<Nic>,
}

impl Report {
    /// Returns success if some NIC can be used.
    pub(crate) fn exit_code(&self) -> ExitCode {
        if self.usable() { ExitCode::SUCCESS } else { ErrorKind::Unavailable.exit_code().into() }
    }

    pub(crate) fn usable(&self) -> bool {
        self.nics.iter().flat_map(|nic| &nic.modes).any(|verdict| verdict.usable)
    }

    /// Formats the findings as text for people.
    pub(crate) fn text(&self) -> String {
        let mut text = self.machine.text();
        if self.nics.is_empty() {
            text += "\nno Ethernet controllers on the PCI bus\n";
        }
        for nic in &self.nics {
            let group =
                nic.iommu_group.map_or_else(|| "no IOMMU group".into(), |n| format!("IOMMU group {n}"));
            text += &format!(
                "\n{} ({}, {}) on {}, {group}\n",
                nic.address,
                nic.driver.unwrap_or("unknown to Vireo"),
                nic.id,
                nic.kernel_driver.as_deref().unwrap_or("no kernel driver"),
            );
            nic.modes.iter().for_each(|verdict| text += &row(verdict));
        }
        text
    }

    /// Formats the findings as JSON for programs.
    pub(crate) fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self)
            .map(|text| text + "\n")
            .map_err(|error| Error::new(ErrorKind::Protocol, "cannot encode the findings", error.to_string()))
    }
}

/// Formats a verdict, with the command that fixes it on its own line.
fn row(Verdict { mode, refusal, .. }: &Verdict) -> String {
    let Some(refusal) = refusal else { return format!("  {mode:<14}usable\n") };
    let mut row = format!("  {mode:<14}no: {}: {}\n", refusal.what, refusal.why);
    if let Some(hint) = &refusal.hint {
        row += &format!("{:16}{hint}\n", "");
    }
    row
}
