//! Forwards packets between neighboring ports: `forwarder [EAL ARGUMENTS] -- [-P]`
use std::process::ExitCode;

use clap::Parser;
use vireo_frame::drivers::table::Drivers;
use vireo_frame::eal::{Result, program};
use vireo_frame::{App, Config, RunEvent, neighbors};

/// Arguments after `--`
#[derive(Parser)]
#[command(name = "forwarder", disable_help_flag = true)]
struct Args {
    /// Receive every frame
    #[arg(short = 'P')]
    promiscuous: bool,
}

fn forward(app: &App, args: Args) -> Result<()> {
    let open = app.open_ports()?;
    let routes = app.assign_lcores(&neighbors(0..open.len()), 1)?; // which lcore polls which port
    let mut ports = app.reserve(open, routes, &Config::default())?; // packet buffers and rings
    ports.start_all(args.promiscuous)?;
    ports.wait_for_links(&app.stop, || Ok(()))?;
    app.confine()?; // drops root privileges, enters the sandbox
    program::print("forwarding\n")?;
    // Forwards on all lcores until a signal arrives. Restarts and announces ports whose devices misbehave.
    let announce = |event: RunEvent| program::note(&event.to_string());
    ports.forward(app, |_| (), &announce, |_| ())?;
    // Checks that every buffer was returned, and that every packet is accounted for.
    ports.finish(|port, summary| program::print(&format!("port {port}: {:?}\n", summary.stats.named())))
}

fn main() -> ExitCode {
    vireo_frame::main(Drivers::default(), forward)
}
