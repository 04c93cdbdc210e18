//! `vireo-l2fwd [EAL ARGUMENTS] -- -p PORTMASK …`
#![forbid(unsafe_code)]

use std::process::ExitCode;

use vireo_drivers::table::Drivers;
use vireo_eal::args::{self as eal_args, Outcome, Program};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Result, program};
use vireo_l2fwd::{app, args};

fn run() -> Result<ExitCode> {
    let usage = args::usage();
    let drivers = Drivers::default();
    let (device_keys, vdev_keys) = (drivers.device_keys(), drivers.vdev_keys());
    let program = Program { usage: &usage, device_keys: &device_keys, vdev_keys: &vdev_keys };
    let parsed = match eal_args::parse(std::env::args_os(), &program)? {
        Outcome::Print(text) => {
            program::print(&text)?;
            return Ok(ExitCode::SUCCESS);
        }
        Outcome::Run(parsed) => parsed,
    };
    let args = args::parse(parsed.app)?;
    let stop = StopFlag::on_signals()?;
    app::run(&Eal::init(parsed.eal)?, &drivers, &args, &stop)?;
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    program::exit_code("vireo-l2fwd", run())
}
