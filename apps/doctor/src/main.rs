//! `vireo-doctor`: reports for each NIC and each VFIO mode whether a program can use it. If not, it reports
//! the one reason and the command that fixes it.
#![forbid(unsafe_code)]

mod examine;
mod machine;
mod report;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::Parser;
use vireo_bus_pci::Bus;
use vireo_eal::args::{VfToken, parse_plain};
use vireo_eal::bdf::Bdf;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result, program};

use crate::examine::Host;
use crate::machine::Machine;
use crate::report::Report;

/// Reports for each NIC and each VFIO mode whether a program can use it, and if not, why and which command
/// fixes it.
///
/// NICs on vfio-pci are opened in each mode, probed, mapped as l2fwd maps them, and released, which resets
/// them. Their queues are not started and nothing is forwarded. NICs that another process has open are left
/// alone. For NICs on another kernel driver, or on none, the doctor only reads their state.
///
/// Exit code: 0 when some NIC can be used in some mode, 69 when no NIC can be used, 64 for wrong arguments, 74 when
/// the output cannot be written.
#[derive(Debug, Parser)]
#[command(name = "vireo-doctor", version)]
struct Cli {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
    /// Only these modes: container, cdev, compat, noiommu, noiommu-cdev
    #[arg(long, value_name = "MODE,...", value_delimiter = ',', value_parser = explicit)]
    modes: Vec<VfioMode>,
    /// Token that virtual functions share with their physical function
    #[arg(long, value_name = "UUID")]
    vfio_vf_token: Option<VfToken>,
    /// PCI addresses, such as 0000:00:03.0; without any, all Ethernet controllers
    #[arg(value_name = "ADDRESS", value_parser = clap::value_parser!(Bdf))]
    addresses: Vec<Bdf>,
}

/// Any mode except `auto`.
fn explicit(text: &str) -> Result<VfioMode> {
    let hint =
        |error: Error| error.with_hint("use one or more of container, cdev, compat, noiommu, noiommu-cdev");
    match text.parse().map_err(hint)? {
        VfioMode::Auto => {
            Err(hint(Error::new(ErrorKind::Usage, "VFIO mode auto", "it selects one of the other modes")))
        }
        mode => Ok(mode),
    }
}

impl Cli {
    fn modes(&self) -> &[VfioMode] {
        if self.modes.is_empty() { &VfioMode::EXPLICIT } else { &self.modes }
    }
}

fn run() -> Result<ExitCode> {
    let Some(cli) = parse_plain::<Cli>(std::env::args_os())? else { return Ok(ExitCode::SUCCESS) };
    vireo_eal::log::init(&[], vireo_eal::log::LogColor::Auto);
    let host = Host { bus: Bus::default(), root: "/".into(), vf_token: cli.vfio_vf_token };
    let machine = Machine::read("/".as_ref())?;
    let report = Report { machine, nics: examine::examine(&host, &cli.addresses, cli.modes())? };
    program::print(&if cli.json { report.json()? } else { report.text() })?;
    Ok(report.exit_code())
}

fn main() -> ExitCode {
    program::exit_code("vireo-doctor", run())
}
