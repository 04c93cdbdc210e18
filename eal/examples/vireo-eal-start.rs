//! Measures the start of the EAL alone: parses EAL arguments, initializes the EAL, prints how many
//! nanoseconds both took, and exits.
//!
//! `scripts/bench start` alternates it with a program that calls DPDK's `rte_eal_init`, which parses its
//! arguments too.

use std::time::Instant;

use vireo_eal::args::{Outcome, Program, parse};
use vireo_eal::{Eal, Result};

fn run() -> Result<()> {
    let since = Instant::now();
    let parsed = match parse(std::env::args_os(), &Program::default())? {
        Outcome::Print(text) => {
            print!("{text}");
            return Ok(());
        }
        Outcome::Run(parsed) => parsed,
    };
    let eal = Eal::init(parsed.eal)?;
    println!("init took {} ns", since.elapsed().as_nanos());
    drop(eal);
    Ok(())
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-eal-start: {error}");
            error.kind().exit_code().into()
        }
    }
}
