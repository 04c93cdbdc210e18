//! Runs the program itself with wrong command lines. It must print one line, exit with the right code and not
//! panic.

use std::process::{Command, Stdio};

#[test]
fn a_wrong_word_is_named_with_what_would_be_right() {
    const MAC: [&str; 2] = ["--dst-mac", "52:54:00:00:00:05"];
    for (eal, app, named, right) in [
        (&["--no-pc"][..], &[][..], "'--no-pc'", "did you mean --no-pci?"),
        (&[], &["--dst-mac", "1:2"], "'1:2'", "see: vireo-pktgen --help"),
        (&[], &["--dst-mak", "x"], "'--dst-mak'", "did you mean --dst-mac?"),
        (&[], &["--rate", "0"], "'0'", "not a rate above 0"),
        (&[], &["--size", "99999999999999999999"], "'99999999999999999999'", "see: vireo-pktgen --help"),
        (&[], &["--window", "0"], "'0'", "not in 1.."),
        (&[], &["--duration", "soon"], "'soon'", "not a number of seconds"),
        (&[], &["--count", "1", "--duration", "1"], "--count", "cannot be used with"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_vireo-pktgen"))
            .args(["--no-pci", "--in-memory"])
            .args(eal)
            .arg("--")
            .args(app.first().filter(|first| !first.starts_with("--dst")).map_or(&[][..], |_| &MAC))
            .args(app)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{text}");
        assert!(text.starts_with("vireo-pktgen: ") && text.lines().count() == 1, "{text}");
        assert!(text.contains(named) && text.contains(right), "{app:?}: {text}");
    }
}
