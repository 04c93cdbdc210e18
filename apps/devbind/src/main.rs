//! `vireo-devbind`: shows the kernel driver of each NIC, binds NICs to another driver, and back.
#![forbid(unsafe_code)]

mod host;
mod idle;
mod pci_ids;
mod select;
mod status;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::{ArgGroup, Parser, ValueEnum};
use vireo_eal::args::parse_plain;
use vireo_eal::{Error, ErrorKind, Result, program};

use crate::host::Host;

/// Device classes of `dpdk-devbind.py` that Vireo supports.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Class {
    Net,
}

/// Shows the kernel driver of each NIC, binds NICs to another driver, and back
///
/// Either all NICs of a command change their driver, or none does. A NIC is refused while this machine's
/// routes, a bond, a bridge, another network namespace, a bound virtual function or a process needs it.
#[derive(Debug, Parser)]
#[command(name = "vireo-devbind", version)]
#[command(group(ArgGroup::new("action").args(["status", "status_dev", "bind", "unbind", "restore"])))]
#[command(after_help = "Options of dpdk-devbind.py mean the same here; --uid and --gid are not available.")]
struct Cli {
    /// List the Ethernet controllers (the default)
    #[arg(short, long)]
    status: bool,
    /// List the devices of a class: net, the Ethernet controllers
    #[arg(long, value_name = "CLASS", hide_possible_values = true)]
    status_dev: Option<Class>,
    /// Bind the NICs to this kernel driver, such as vfio-pci, and record the old one; "none" unbinds them
    #[arg(short, long, value_name = "DRIVER", requires = "nics")]
    bind: Option<String>,
    /// Unbind the NICs from their kernel driver and record it
    #[arg(short, long, requires = "nics")]
    unbind: bool,
    /// Bind the NICs to the kernel driver that was recorded
    #[arg(short, long, requires = "nics")]
    restore: bool,
    /// Also change NICs that are in use; one that a process has open is still refused
    #[arg(long, conflicts_with_all = ["status", "status_dev"])]
    force: bool,
    /// If a NIC has no IOMMU, allow VFIO's no-IOMMU mode before --bind; unsafe: the NIC can then write to all memory
    #[arg(long, requires = "bind", conflicts_with_all = ["status", "status_dev", "unbind", "restore"])]
    noiommu_mode: bool,
    /// Print the list as JSON
    #[arg(long, conflicts_with_all = ["bind", "unbind", "restore"])]
    json: bool,
    /// PCI addresses (0000:00:03.0 or 00:03.0), network interfaces (eth0), or patterns of the addresses of Ethernet
    /// controllers ('00:03.*')
    #[arg(value_name = "NIC", conflicts_with_all = ["status", "status_dev"])]
    nics: Vec<String>,
}

fn run() -> Result<()> {
    let Some(cli) = parse_plain::<Cli>(std::env::args_os())? else { return Ok(()) };
    cli.check()?;
    vireo_eal::log::init(&[], vireo_eal::log::LogColor::Auto);
    let host = Host::new();
    let nics = || host.select(&cli.nics);
    match (cli.driver(), cli.restore) {
        (Some(driver), _) if cli.noiommu_mode => host.change_without_iommu(&nics()?, driver, cli.force),
        (Some(driver), _) => host.change(&nics()?, Some(driver), cli.force),
        (None, true) => host.restore(&nics()?, cli.force),
        (None, false) if cli.unbind || cli.bind.is_some() => host.change(&nics()?, None, cli.force),
        (None, false) => {
            let nics = status::list(&host)?;
            let text = if cli.json { status::json(&nics)? } else { status::table(&nics) };
            program::print(&format!("{text}\n"))
        }
    }
}

impl Cli {
    /// Returns the driver of `--bind`; `None` for "none", which means `--unbind`.
    fn driver(&self) -> Option<&str> {
        self.bind.as_deref().filter(|driver| *driver != "none")
    }

    /// Refuses NIC arguments without an action.
    fn check(&self) -> Result<()> {
        if self.nics.is_empty() || self.bind.is_some() || self.unbind || self.restore {
            return Ok(());
        }
        let (what, why) = ("cannot act on the NICs", "no action is given");
        Err(Error::new(ErrorKind::Usage, what, why).with_hint("use --bind DRIVER, --unbind or --restore"))
    }
}

fn main() -> ExitCode {
    program::exit_code("vireo-devbind", run().map(|()| ExitCode::SUCCESS))
}
