//! Arguments that a user types.

use std::ffi::OsString;
use std::fmt::{Debug, Display};
use std::os::unix::ffi::OsStringExt;

use vireo_drivers::port::MacAddr;
use vireo_eal::args::{DeviceArgs, Outcome, Program, VdevArgs, VfToken, parse};
use vireo_eal::bdf::Bdf;
use vireo_eal::vfio::VfioMode;
use vireo_eal::{Error, ErrorKind, Result};

const VDEVS: &[(&str, &[&str])] = &[("net_virtio_user", &["path", "mrg_rxbuf"]), ("net_vhost", &["iface"])];
const PROGRAM: Program<'_> = Program { usage: None, device_keys: &["mrg_rxbuf", "rxd"], vdev_keys: VDEVS, peer_of: Some("l2fwd") };

fn refused(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    assert!(!error.to_string().contains(['\n', '\x1b']), "{error}");
}

/// Parses EAL arguments, separated by NUL as in `/proc/PID/cmdline`.
pub fn eal_arguments(data: &[u8]) {
    let words = data.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec()));
    match parse([OsString::from("fuzz")].into_iter().chain(words), &PROGRAM) {
        Ok(Outcome::Run(parsed)) => {
            let lcores = &parsed.eal.lcores;
            assert!(lcores.iter().any(|lcore| lcore.id == parsed.eal.main_lcore));
            assert!(lcores.is_sorted_by(|low, high| low.id < high.id));
            assert!(lcores.iter().all(|lcore| !lcore.cpus.is_empty()));
            assert!(!parsed.eal.file_prefix.contains('/'));
        }
        Ok(Outcome::Print(_)) => {}
        Err(error) => refused(&error),
    }
}

/// Asserts that a value, once printed, parses to the same value.
fn round_trip<T: Debug + Display + PartialEq>(text: &str, read: impl Fn(&str) -> Result<T>) {
    match read(text) {
        Ok(value) => assert_eq!(read(&value.to_string()).as_ref(), Ok(&value)),
        Err(error) => refused(&error),
    }
}

/// Parses the values of `--allow`, `--vdev` and `--lcores`, and their parts. The first byte selects which.
pub fn device_arguments(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let Ok(text) = str::from_utf8(text) else { return };
    match kind % 8 {
        0 => round_trip(text, |text| DeviceArgs::parse(text, PROGRAM.device_keys)),
        1 => round_trip(text, |text| VdevArgs::parse(text, VDEVS)),
        2 => round_trip(text, str::parse::<Bdf>),
        3 => round_trip(text, str::parse::<MacAddr>),
        4 => round_trip(text, str::parse::<VfToken>),
        5 => round_trip(text, str::parse::<VfioMode>),
        6 => eal_arguments(&[b"-l\0", text.as_bytes()].concat()),
        _ => eal_arguments(&[b"-c\0", text.as_bytes()].concat()),
    }
}
