//! `vireo-vfio-bench`: compares what each way of handing a NIC to a process costs.

#![forbid(unsafe_code)]

mod coherence;
mod compare;
mod cores;
mod costs;
mod count;
mod dma_proof;
mod environment;
mod findings;
mod html;
mod machine;
mod measure;
mod native;
mod perf;
mod plot;
mod process;
mod record;
mod reference;
mod report;
mod run;
mod selftest;
mod start;
mod stats;
mod table;
mod testpmd;
#[cfg(test)]
mod tests;
mod words;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vireo_eal::args::parse_plain;
use vireo_eal::{Result, program};

#[derive(Parser)]
// Report an error if the subcommand is missing: the help, cut to one line, would not mention it.
#[command(name = "vireo-vfio-bench", version, about, arg_required_else_help = false)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Report(report::ReportArgs),
    /// Print the JSON schema of report --json
    Schema,
    Selftest(selftest::SelftestArgs),
    Costs(costs::CostsArgs),
    Native(native::NativeArgs),
    Coherence(coherence::CoherenceArgs),
    DmaProof(dma_proof::DmaProofArgs),
    /// Count the instructions that each mode takes, in a guest whose clock counts them
    #[command(subcommand, arg_required_else_help = false)]
    Count(count::Command),
    /// Time the phases from a forwarder's start to its first packet, compared with DPDK's testpmd
    #[command(subcommand, arg_required_else_help = false)]
    Start(start::Command),
}

fn run() -> Result<()> {
    let Some(cli) = parse_plain::<Cli>(std::env::args_os())? else { return Ok(()) };
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Report(args) => report::report(&args),
        Command::Schema => report::schema(),
        Command::Selftest(args) => selftest::selftest(&args),
        Command::Costs(args) => costs::costs(&args),
        Command::Native(args) => native::native(&args),
        Command::Coherence(args) => coherence::coherence(&args),
        Command::DmaProof(args) => dma_proof::dma_proof(&args),
        Command::Count(command) => count::count(&command),
        Command::Start(command) => start::start(&command),
    }
}

fn main() -> ExitCode {
    program::exit_code("vireo-vfio-bench", run().map(|()| ExitCode::SUCCESS))
}
