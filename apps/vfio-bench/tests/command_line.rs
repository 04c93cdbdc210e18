//! Runs the program with wrong command lines, and with output that cannot be written: it must print one line,
//! end with the right exit code, and not panic.

use std::fs::File;
use std::process::{Command, Output};

fn bench(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo-vfio-bench"));
    command.args(words);
    command
}

/// Returns the line with which the program failed.
fn refused(output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.starts_with("vireo-vfio-bench: ") && text.lines().count() == 1, "{text}");
    text.into_owned()
}

#[test]
fn a_wrong_word_is_named_with_what_would_be_right() {
    let run = ["run", "--json", "/nonexistent/recording"];
    for (first, rest, named, right) in [
        (&run[..], &["--seconds=-1"][..], "'-1'", "not a number of seconds above 0"),
        (&run, &["--seconds", "nan"], "'nan'", "not a number of seconds above 0"),
        (&run, &["--seconds", "inf"], "'inf'", "not a number of seconds above 0"),
        (&run, &["--seconds", "1e300"], "'1e300'", "not a number of seconds above 0"),
        (&run, &["--seconds", "0"], "'0'", "not a number of seconds above 0"),
        (&run, &["--rounds", "0"], "'0'", "not in 1.."),
        (&run, &["--map-mib", "0"], "'0'", "not in 1.."),
        (&run, &["--round", "1"], "'--round'", "did you mean --rounds?"),
        (&run, &["--modes", "vfio"], "vfio", "container"),
        (&run, &["--references", "ovs"], "'ovs'", "bridge"),
        (&["native"], &["--seconds=-1"], "'-1'", "not a number of seconds above 0"),
        (&["repot"], &[], "'repot'", "see: vireo-vfio-bench --help"),
        (&[], &[], "subcommand", "see: vireo-vfio-bench --help"),
        (&["start"], &[], "subcommand", "see: vireo-vfio-bench --help"),
    ] {
        let text = refused(&bench(first).args(rest).output().unwrap(), 64);
        assert!(text.contains(named) && text.contains(right), "{rest:?}: {text}");
    }
}

#[test]
fn help_that_nobody_takes_is_an_error() {
    for words in [&["--help"][..], &["--version"], &["run", "--help"]] {
        assert!(bench(words).output().unwrap().status.success());
        let full = File::options().write(true).open("/dev/full").unwrap();
        let text = refused(&bench(words).stdout(full).output().unwrap(), 74);
        assert!(text.contains("ENOSPC"), "{text}");
    }
}
