//! Runs the program itself with output that cannot be written.

use std::fs::File;
use std::process::Command;

#[test]
fn help_that_nobody_takes_is_an_error() {
    for word in ["--help", "--version"] {
        let program = || Command::new(env!("CARGO_BIN_EXE_vireo-doctor"));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = program().arg(word).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(74));
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            "vireo-doctor: cannot write to standard output: ENOSPC (No space left on device)\n"
        );
        let output = program().arg(word).output().unwrap();
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("vireo-doctor"));
    }
}
