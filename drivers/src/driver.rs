//! What the table of drivers needs to know of each, and how drivers read their arguments.

use std::path::{Path, PathBuf};

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::args::quoted;
use vireo_eal::lcore::StopFlag;
use vireo_eal::socket::check_path;
use vireo_eal::{Error, ErrorKind, Result};

use crate::port::Nic;

/// Keys and values of `-a` or `--vdev`, in the order given.
pub type Args<'a> = &'a [(String, String)];

/// A driver of PCI functions.
pub trait PciDriver: Nic + Sized {
    /// Its name in messages.
    const NAME: &'static str;
    /// The functions that it drives, with what they are called.
    const IDS: &'static [(DeviceId, &'static str)];
    /// The devargs that it knows.
    const KEYS: &'static [&'static str];

    /// Takes a function, which is one of [`PciDriver::IDS`], with devargs, which are of [`PciDriver::KEYS`].
    ///
    /// # Errors
    /// When the device refuses, or a value is wrong.
    fn open(function: Box<dyn Function>, args: Args<'_>) -> Result<Self>;
}

/// A virtual device, as its arguments have it.
pub trait Vdev: Send + Sync + Sized {
    /// What it becomes.
    type Device: Nic;
    /// DPDK's name of the driver, and DPDK's alias.
    const NAMES: [&'static str; 2];
    /// The keys that it knows.
    const KEYS: &'static [&'static str];

    /// Reads the arguments of device `name`.
    ///
    /// # Errors
    /// `Usage` for a value that none of the keys has, or without one that it needs.
    fn parse(name: &str, args: Args<'_>) -> Result<Self>;

    /// The socket that it makes, if it makes one.
    fn listens_at(&self) -> Option<&Path>;

    /// What it is and where, for the start-up report.
    fn describe(&self) -> String;

    /// Makes the device, named `name` in messages; may wait for a peer, until `stop`.
    ///
    /// # Errors
    /// When the device is unavailable.
    fn open(&self, name: &str, stop: &StopFlag) -> Result<Self::Device>;
}

/// Reads the socket of device `name`, which its `key` gives.
pub(crate) fn socket_path(name: &str, key: &str, value: &str) -> Result<PathBuf> {
    check_path(format!("cannot use {key}={} of {name}", quoted(value)), value.as_ref())?;
    Ok(value.into())
}

pub(crate) fn flag(key: &str, value: &str) -> Result<bool> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(Error::new(ErrorKind::Usage, format!("cannot read {key}={value}"), "it is 0 or 1")),
    }
}
