//! `vireo-vfio-bench`: what each way of handing a NIC to a process costs, side by side.

#![forbid(unsafe_code)]

mod compare;
mod environment;
mod findings;
mod html;
mod measure;
mod native;
mod plot;
mod record;
mod report;
mod run;
mod stats;
mod table;
#[cfg(test)]
mod tests;
mod words;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "vireo-vfio-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Report(report::ReportArgs),
    Native(native::NativeArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Report(args) => report::report(&args),
        Command::Native(args) => native::native(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-vfio-bench: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}
