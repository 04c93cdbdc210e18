//! `vireo-l2fwd [EAL ARGUMENTS] -- -p PORTMASK …`
#![forbid(unsafe_code)]

use std::process::ExitCode;

use vireo_drivers::table::{VDEV_KEYS, device_keys};
use vireo_eal::args::{self as eal_args, Outcome, Program};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Result, program};
use vireo_l2fwd::{app, args};

fn run() -> Result<ExitCode> {
    let usage = args::usage();
    let program = Program { usage: &usage, device_keys: &device_keys(), vdev_keys: VDEV_KEYS };
    let parsed = match eal_args::parse(std::env::args_os(), &program)? {
        Outcome::Print(text) => {
            program::print(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
        Outcome::Run(parsed) => parsed,
    };
    let args = args::parse(parsed.app)?;
    let stop = StopFlag::on_signals()?;
    app::run(&Eal::init(parsed.eal)?, &args, &stop)?;
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    program::exit_code("vireo-l2fwd", run())
}
