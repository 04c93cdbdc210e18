//! `vireo-l2fwd [EAL ARGUMENTS] -- -p PORTMASK …`
#![forbid(unsafe_code)]

use std::process::ExitCode;

use vireo_drivers::ports::{DEVICE_KEYS, VDEV_KEYS};
use vireo_eal::args::{self as eal_args, Outcome, Program};
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Eal, Result};
use vireo_l2fwd::{app, args};

fn run() -> Result<()> {
    let usage = args::usage();
    let program = Program { usage: &usage, device_keys: DEVICE_KEYS, vdev_keys: VDEV_KEYS };
    let parsed = match eal_args::parse(std::env::args_os(), &program)? {
        Outcome::Print(text) => {
            print!("{text}");
            return Ok(());
        }
        Outcome::Run(parsed) => parsed,
    };
    let args = args::parse(parsed.app)?;
    let stop = StopFlag::on_signals()?;
    app::run(&Eal::init(parsed.eal)?, &args, &stop)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-l2fwd: {error}");
            error.kind().exit_code().into()
        }
    }
}
