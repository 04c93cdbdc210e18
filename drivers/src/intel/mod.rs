//! What the drivers of Intel's Gigabit Ethernet controllers share: registers, queues, waits that end, the PHY, flow control and
//! counters of dropped frames. It knows none of those drivers.

mod counter;
mod format;
mod phy;
pub(crate) mod regs;
mod rx;
mod tx;

use std::fmt;
use std::time::{Duration, Instant};

use vireo_bus_pci::Function;
use vireo_eal::bdf::Bdf;
use vireo_eal::mmio::Bar;
use vireo_eal::{Error, ErrorKind, Result};

use self::counter::Counter;
pub(crate) use self::format::Format;
pub(crate) use self::phy::watermarks;
pub(crate) use self::regs::registers;
use self::regs::*;
pub(crate) use self::rx::{RxQueue, fill};
pub(crate) use self::tx::{RECLAIM, TxQueue};
use crate::port::{Link, MacAddr};

/// Longest wait for the device.
const PATIENCE: Duration = Duration::from_secs(1);

/// Counters of frames that the device dropped. RNBC is none of them: its frames wait in the FIFO and may still
/// be received (SDM 13.7); nor is RUC, which QEMU counts for frames that it pads and delivers.
const DROPS: [(&str, u64); 4] = [
    ("rx_missed_errors", MPC),
    ("rx_crc_errors", CRCERRS),
    ("rx_align_errors", ALGNERRC),
    ("rx_long_length_errors", ROC),
];

/// Frames that the device dropped since a start.
#[derive(Debug, Default)]
pub(crate) struct Drops([Counter; DROPS.len()]);

impl Drops {
    /// Counts from 0 on.
    pub(crate) fn begin(&mut self, bar: &Bar) {
        for ((_, register), counter) in DROPS.iter().zip(&mut self.0) {
            counter.begin(|| bar.read32(*register));
        }
    }

    /// The sums by name, as [`Nic::device_drops`](crate::port::Nic::device_drops) gives them.
    pub(crate) fn read(&mut self, bar: &Bar) -> Vec<(&'static str, u64)> {
        let counters = DROPS.iter().zip(&mut self.0);
        counters.map(|((name, register), counter)| (*name, counter.read(|| bar.read32(*register)))).collect()
    }
}

/// A function that is shown by its address.
pub(crate) struct OpaqueFunction(pub(crate) Box<dyn Function>);

impl fmt::Debug for OpaqueFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.address())
    }
}

/// Registers of a controller, and its address for messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hardware<'a> {
    pub(crate) bar: &'a Bar,
    pub(crate) address: Bdf,
}

impl Hardware<'_> {
    /// An error about this device: `what` could not be done to it.
    pub(crate) fn error(self, kind: ErrorKind, what: &str, why: &str) -> Error {
        Error::new(kind, format!("cannot {what} {}", self.address), why)
    }

    /// Polls `register` until `done`, and returns its value.
    ///
    /// # Errors
    /// `Protocol` after a second; `Unavailable` at once where the register reads all ones, because the device is gone.
    pub(crate) fn wait(self, what: &str, register: u64, done: impl Fn(u32) -> bool) -> Result<u32> {
        let start = Instant::now();
        loop {
            let value = self.bar.read32(register);
            if value == u32::MAX {
                return Err(self
                    .error(ErrorKind::Unavailable, what, "its registers read all ones")
                    .with_hint("see whether it is still there: lspci"));
            }
            if done(value) {
                return Ok(value);
            }
            if start.elapsed() > PATIENCE {
                let why = format!("register {register:#x} stays {value:#x} for a second");
                return Err(self.error(ErrorKind::Protocol, what, &why));
            }
            self.bar.pause(Duration::from_micros(20));
        }
    }

    /// Sets the bits `set` of `register`, and clears those of `clear`.
    pub(crate) fn change(self, register: u64, set: u32, clear: u32) {
        self.bar.write32(register, self.bar.read32(register) & !clear | set);
    }

    /// The address that the chip loaded from its NVM, a moment after the reset.
    pub(crate) fn station_address(self) -> Result<MacAddr> {
        let what = "read the station address of";
        let high = self.wait(what, RAH0, |high| high & RAH_AV != 0)?.to_le_bytes();
        let low = self.bar.read32(RAL0).to_le_bytes();
        let mac = MacAddr([low[0], low[1], low[2], low[3], high[0], high[1]]);
        if !mac.is_valid_station() {
            let why = format!("{mac} is no address of a station");
            return Err(self.error(ErrorKind::Protocol, what, &why));
        }
        Ok(mac)
    }
}

/// The link as `status`, the value of STATUS, has it.
pub(crate) fn link(status: u32) -> Link {
    let up = status != u32::MAX && status & STATUS_LU != 0;
    let speed = [10, 100, 1000, 1000][(status >> STATUS_SPEED_SHIFT & 3) as usize];
    Link { up, speed: up.then_some(speed), full_duplex: up && status & STATUS_FD != 0, autoneg: true }
}
