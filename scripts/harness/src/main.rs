//! Vireo's tests: cases of the host, and cases of the lab's guest, in which this same program runs as the agent.
#![forbid(unsafe_code)]

mod agent;
mod boot;
mod case;
mod clock;
mod guest;
mod host;
mod inject;
mod l2fwd;
mod pktgen;
mod process;
mod qmp;
mod runner;
mod soak;
mod stop;
mod tap;
mod telemetry;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

use crate::guest::Boot;
use crate::runner::Choice;

/// Vireo's tests and soaks, for scripts/test, scripts/lab and scripts/soak
#[derive(Debug, Parser)]
#[command(name = "vireo-harness")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run tests
    Test(TestArgs),
    /// Forward for a long time, with a fault every few seconds, and count everything
    Soak(host::soak::SoakArgs),
    /// Serve cases in the guest
    #[command(hide = true)]
    Agent {
        boot: Boot,
        #[arg(long)]
        full: bool,
    },
    /// Send numbered frames from the guest to a port that sends them back
    #[command(hide = true)]
    Echo { interface: String },
}

#[derive(Debug, clap::Args)]
struct TestArgs {
    /// Only cases with PATTERN in their name (repeatable)
    #[arg(long, value_name = "PATTERN", allow_hyphen_values = true)]
    only: Vec<String>,
    /// Print the names of the cases, and run none
    #[arg(long)]
    list: bool,
    /// Also run long cases, and every guest case on every kernel
    #[arg(long)]
    full: bool,
    /// Leave out the host's cases
    #[arg(long)]
    no_host: bool,
    /// Kernels of the guest and their releases; the first one runs all cases, the others those that depend on the kernel
    #[arg(long, value_name = "KERNEL=RELEASE", value_parser = kernel)]
    kernel: Vec<(String, String)>,
    /// Only these boots of the guest
    #[arg(long, value_name = "BOOT")]
    boot: Vec<Boot>,
    /// Number of guests at a time
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Directory of Vireo's programs; default: that of this program
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    #[command(flatten)]
    environment: host::Environment,
    /// Options of `lab run` for every boot
    #[arg(last = true)]
    lab: Vec<String>,
}

fn kernel(text: &str) -> Result<(String, String), String> {
    let (kernel, release) = text.rsplit_once('=').ok_or("it is not of the form KERNEL=RELEASE")?;
    let mut numbers = release.split('.');
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => Ok((kernel.into(), format!("{major}.{minor}"))),
        _ => Err("a release has at least two numbers".into()),
    }
}

fn run() -> Result<u8> {
    let programs = std::env::current_exe()?;
    let programs: PathBuf = programs.parent().context("this program has no directory")?.into();
    match Cli::parse().command {
        Task::Agent { boot, full } => agent::serve(boot, full, &programs).map(|()| 0),
        Task::Echo { interface } => guest::echo::run(&interface).map(|()| 0),
        Task::Soak(args) => {
            stop::watch()?;
            host::soak::run(&args, &programs)
        }
        Task::Test(args) => {
            let environment = args.environment;
            let programs = args.programs.unwrap_or(programs);
            let choice = Choice {
                only: args.only,
                full: args.full,
                host: !args.no_host,
                kernels: args.kernel,
                boots: args.boot,
            };
            let lab = boot::Lab { repo: environment.repo.clone(), options: args.lab, full: args.full };
            if args.list {
                runner::list(&choice, &environment)?;
                return Ok(0);
            }
            stop::watch()?;
            runner::run(&choice, &environment, (&lab, &programs), args.jobs.max(1))
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("harness: {error:#}");
            ExitCode::from(125)
        }
    }
}
