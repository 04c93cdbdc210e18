//! Traits through which the driver table uses each driver, and helpers to parse driver arguments.

use std::path::{Path, PathBuf};

use postcard_schema::Schema;
use serde::de::DeserializeOwned;
use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::args::quoted;
use vireo_eal::handover::{ReceivedFds, decode};
use vireo_eal::lcore::StopFlag;
use vireo_eal::socket::check_path;
use vireo_eal::{Error, ErrorKind, Result};

use crate::port::Nic;

/// Keys and values of `-a` or `--vdev`, in command-line order.
pub type Args<'a> = &'a [(String, String)];

/// What [`HandOver::facts`](crate::handover::HandOver::facts) returned in another process.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The record.
    pub record: &'a [u8],
    /// Descriptors that came with it.
    pub fds: &'a ReceivedFds,
}

impl Facts<'_> {
    /// Decodes the record.
    ///
    /// # Errors
    /// As for [`decode`].
    pub fn decode<T: DeserializeOwned + Schema>(&self) -> Result<T> {
        decode(self.record)
    }
}

/// A driver of PCI functions.
pub trait PciDriver: Nic + Sized {
    /// Name of the driver in messages.
    const NAME: &'static str;
    /// Supported device IDs, each with the device's name.
    const IDS: &'static [(DeviceId, &'static str)];
    /// Devargs that the driver accepts.
    const KEYS: &'static [&'static str];

    /// Opens `function`, whose ID is one of [`PciDriver::IDS`], with devargs whose keys are in
    /// [`PciDriver::KEYS`].
    ///
    /// # Errors
    /// When the device refuses, or a value is invalid.
    fn open(function: Box<dyn Function>, args: Args<'_>) -> Result<Self>;
}

/// A virtual device, as parsed from its arguments.
pub trait Vdev: Send + Sync + Sized {
    /// Type of the opened device.
    type Device: Nic;
    /// DPDK's name of the driver, and DPDK's alias for it.
    const NAMES: [&'static str; 2];
    /// Argument keys that the driver accepts.
    const KEYS: &'static [&'static str];

    /// Parses the arguments of device `name`.
    ///
    /// # Errors
    /// `Usage` for an unknown key, an invalid value or a missing argument.
    fn parse(name: &str, args: Args<'_>) -> Result<Self>;

    /// Path of the socket that the device creates, if it creates one.
    fn listens_at(&self) -> Option<&Path>;

    /// Kind of device and its location, for the start-up report.
    fn describe(&self) -> String;

    /// Opens the device, which messages call `name`. May wait for a peer until `stop` is set.
    ///
    /// # Errors
    /// When the device is unavailable.
    fn open(&self, name: &str, stop: &StopFlag) -> Result<Self::Device>;

    /// Attaches to the device `name`, which runs for another process, as
    /// [`HandOver::attach`](crate::handover::HandOver::attach) does.
    ///
    /// # Errors
    /// As for that.
    fn attach(&self, _name: &str, _facts: Facts<'_>) -> Result<Self::Device> {
        Err(unsupported())
    }
}

/// Error of a port that cannot be handed over, for the reason `why`.
pub(crate) fn cannot_hand_over(why: &str) -> Error {
    Error::new(ErrorKind::Unavailable, "cannot hand over a port", why)
}

/// Error of a driver that cannot hand over.
pub(crate) fn unsupported() -> Error {
    cannot_hand_over("its driver cannot do that")
}

/// Parses the value of `key`, the socket path of device `name`.
pub(crate) fn socket_path(name: &str, key: &str, value: &str) -> Result<PathBuf> {
    check_path(format!("cannot use {key}={} of {name}", quoted(value)), value.as_ref())?;
    Ok(value.into())
}

pub(crate) fn flag(key: &str, value: &str) -> Result<bool> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(Error::new(
            ErrorKind::Usage,
            format!("cannot read {key}={value}"),
            "the value is neither 0 nor 1",
        )),
    }
}
