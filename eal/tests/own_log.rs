//! A program that has its own `tracing` subscriber.
#![forbid(unsafe_code)]

use vireo_eal::Eal;
use vireo_eal::args::{Outcome, Program, parse};

#[test]
fn a_program_with_a_log_of_its_own_keeps_it() {
    tracing_subscriber::fmt().with_test_writer().init();
    let argv = ["x", "--in-memory", "--no-pci", "--log-level", "debug"].map(Into::into);
    let Outcome::Run(parsed) = parse(argv, &Program::default()).unwrap() else { panic!("it only prints") };
    let eal = Eal::init(parsed.eal.clone()).unwrap();
    drop(eal);
    Eal::init(parsed.eal).unwrap();
}
