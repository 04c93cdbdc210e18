//! `vireo-devbind`: shows which kernel driver has each NIC, gives NICs to another driver, and back.
#![forbid(unsafe_code)]

mod host;
mod status;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::{ArgGroup, Parser};
use vireo_eal::args::parse_plain;
use vireo_eal::bdf::Bdf;
use vireo_eal::{Error, ErrorKind, Result, program};

use crate::host::Host;

/// Shows which kernel driver has each NIC, gives NICs to another driver, and back
#[derive(Debug, Parser)]
#[command(name = "vireo-devbind", version)]
#[command(group(ArgGroup::new("action").args(["status", "bind", "unbind", "restore"])))]
struct Cli {
    /// List the Ethernet controllers (what it does without arguments, too)
    #[arg(short, long)]
    status: bool,
    /// Give the NICs to this kernel driver, such as vfio-pci; the one they had is recorded
    #[arg(short, long, value_name = "DRIVER", requires = "addresses")]
    bind: Option<String>,
    /// Take the NICs from their kernel driver, which is recorded
    #[arg(short, long, requires = "addresses")]
    unbind: bool,
    /// Give the NICs back to the kernel driver that was recorded
    #[arg(short, long, requires = "addresses")]
    restore: bool,
    /// Also NICs that carry this machine's traffic
    #[arg(long, conflicts_with = "status")]
    force: bool,
    /// Print the list as JSON
    #[arg(long, conflicts_with_all = ["bind", "unbind", "restore"])]
    json: bool,
    /// PCI addresses, such as 0000:00:03.0
    #[arg(value_name = "ADDRESS", value_parser = clap::value_parser!(Bdf), conflicts_with = "status")]
    addresses: Vec<Bdf>,
}

fn run() -> Result<()> {
    let Some(cli) = parse_plain::<Cli>(std::env::args_os())? else { return Ok(()) };
    cli.check()?;
    vireo_eal::log::init(&[])?;
    let host = Host::new();
    match (&cli.bind, cli.unbind, cli.restore) {
        (Some(driver), ..) => host.change(&cli.addresses, Some(driver), cli.force),
        (_, true, _) => host.change(&cli.addresses, None, cli.force),
        (.., true) => host.restore(&cli.addresses, cli.force),
        _ => {
            let nics = status::list(&host)?;
            let text = if cli.json { status::json(&nics)? } else { status::table(&nics) };
            program::print(&format!("{text}\n"))
        }
    }
}

impl Cli {
    /// Refuses addresses with which nothing is to be done.
    fn check(&self) -> Result<()> {
        if self.addresses.is_empty() || self.bind.is_some() || self.unbind || self.restore {
            return Ok(());
        }
        let (what, why) = ("cannot act on the addresses", "nothing says what to do");
        Err(Error::new(ErrorKind::Usage, what, why).mend("give --bind DRIVER, --unbind or --restore"))
    }
}

fn main() -> ExitCode {
    program::exit_code("vireo-devbind", run().map(|()| ExitCode::SUCCESS))
}
