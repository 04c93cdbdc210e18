//! Runs the program itself with help output that cannot be written. It must print one line, exit with the
//! right code and not panic.

use std::fs::File;
use std::process::{Command, Output};

fn launch(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo-launch"));
    command.args(words);
    command
}

fn refused(output: &Output, code: i32) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.starts_with("vireo-launch: ") && text.lines().count() == 1, "{text}");
}

#[test]
fn help_that_nobody_takes_is_an_error() {
    for words in [&["--help"][..], &["--version"], &["--user", "65534:65534", "l2fwd", "--help"]] {
        assert!(launch(words).output().unwrap().status.success());
        let full = || File::options().write(true).open("/dev/full").unwrap();
        refused(&launch(words).stdout(full()).output().unwrap(), 74);
        let nobody = launch(words).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(nobody.code(), Some(74));
    }
    refused(&launch(&[]).output().unwrap(), 64);
}

/// The path is checked before a node is opened, which an ordinary user may not do.
#[test]
fn a_path_that_no_socket_can_have_is_told_first() {
    let long = "x".repeat(120);
    let words = ["--user", "65534:65534", "--socket", &long, "l2fwd", "-a", "00:00.0", "--", "-p", "1"];
    let output = launch(&words).output().unwrap();
    refused(&output, 64);
    let why = "it is 120 bytes long, but a socket path has at most 107; use a shorter path";
    assert!(String::from_utf8_lossy(&output.stderr).contains(why), "{output:?}");
}
