//! `vireo-l2fwd [EAL ARGUMENTS] -- -p PORTMASK …`
#![forbid(unsafe_code)]

use std::process::ExitCode;

use vireo_drivers::table::Drivers;
use vireo_l2fwd::app;

fn main() -> ExitCode {
    vireo_frame::main_of_shareable(Drivers::default(), app::run)
}
