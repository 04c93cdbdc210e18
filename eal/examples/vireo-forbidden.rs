//! Makes a call that the sandbox denies, to show what happens: `vireo-forbidden [--no-sandbox]` prints the
//! result of the call.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Barrier;

use vireo_eal::args::{self, Outcome, Program};
use vireo_eal::{Eal, Result};

const THREADS: usize = 20;

fn run() -> Result<()> {
    let Outcome::Run(parsed) = args::parse(std::env::args_os(), &Program::default())? else { return Ok(()) };
    let eal = Eal::init(parsed.eal)?;
    eal.confine(&[])?;
    let answer = match parsed.app.get(1).and_then(|word| word.to_str()) {
        Some("exec") => std::process::Command::new("true").status().map(drop),
        Some("open") => std::fs::File::open("/etc/passwd").map(drop),
        Some("thread") => {
            let _ = std::thread::spawn(|| ()).join();
            Ok(())
        }
        // More threads than the C library gives heaps of their own, with memory that it would return to the kernel.
        Some("heap") => {
            let all = Barrier::new(THREADS);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        let blocks: Vec<Vec<u8>> = (0..100).map(|_| vec![1; 64 << 10]).collect();
                        all.wait();
                        drop(std::hint::black_box(blocks));
                    });
                }
            });
            Ok(())
        }
        Some("unlink") => std::fs::remove_file("/tmp/vireo-forbidden"),
        _ => std::net::UdpSocket::bind("127.0.0.1:0").map(drop),
    };
    println!("{answer:?}");
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-forbidden: {error}");
            error.kind().exit_code().into()
        }
    }
}
