//! Access to a controller: its registers, bounded waits, the link state and the station address.

use std::fmt;
use std::time::{Duration, Instant};

use vireo_bus_pci::Function;
use vireo_eal::mmio::Bar;
use vireo_eal::{Error, ErrorKind, Result};

use super::regs::*;
use crate::port::{Link, MacAddr};

/// Longest wait for the device.
const PATIENCE: Duration = Duration::from_secs(1);

/// A controller's registers and its PCI function.
pub struct Hardware {
    pub(crate) bar: Bar,
    /// PCI function, dropped after its registers.
    pub(crate) function: Box<dyn Function>,
}

impl fmt::Debug for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.function.address())
    }
}

impl Hardware {
    /// Creates the error "cannot `what` this device", for the reason `why`.
    pub(crate) fn error(&self, kind: ErrorKind, what: &str, why: &str) -> Error {
        Error::new(kind, format!("cannot {what} {}", self.function.address()), why)
    }

    /// Polls `register` until its value satisfies `done`, and returns that value.
    ///
    /// # Errors
    /// `Protocol` after a second. `Unavailable` at once if the register reads all ones, because the device is
    /// gone.
    pub(crate) fn wait(&self, what: &str, register: u64, done: impl Fn(u32) -> bool) -> Result<u32> {
        let start = Instant::now();
        loop {
            let value = self.bar.read32(register);
            if value == u32::MAX {
                return Err(self
                    .error(ErrorKind::Unavailable, what, "its registers read as all ones")
                    .with_hint("see whether it is still there: lspci"));
            }
            if done(value) {
                return Ok(value);
            }
            if start.elapsed() > PATIENCE {
                let why = format!("register {register:#x} was still {value:#x} after 1 s");
                return Err(self.error(ErrorKind::Protocol, what, &why));
            }
            self.bar.pause(Duration::from_micros(20));
        }
    }

    /// Sets the bits `set` of `register`, and clears the bits `clear`.
    pub(crate) fn change(&self, register: u64, set: u32, clear: u32) {
        self.bar.write32(register, self.bar.read32(register) & !clear | set);
    }

    /// Reads the station address, which the chip loads from its NVM shortly after the reset.
    pub(super) fn station_address(&self) -> Result<MacAddr> {
        let what = "read the station address of";
        let high = self.wait(what, RAH0, |high| high & RAH_AV != 0)?.to_le_bytes();
        let low = self.bar.read32(RAL0).to_le_bytes();
        let mac = MacAddr([low[0], low[1], low[2], low[3], high[0], high[1]]);
        if !mac.is_valid_station() {
            let why = format!("{mac} is not a station address");
            return Err(self.error(ErrorKind::Protocol, what, &why));
        }
        Ok(mac)
    }

    /// Clears the multicast table, so that the only group address received is broadcast.
    pub(crate) fn clear_multicast_table(&self) {
        for word in 0..MTA_WORDS {
            self.bar.write32(MTA + 4 * word, 0);
        }
    }
}

/// Decodes the link state from `status`, the value of STATUS.
pub(super) fn link(status: u32) -> Link {
    let up = status != u32::MAX && status & STATUS_LU != 0;
    let speed = [10, 100, 1000, 1000][(status >> STATUS_SPEED_SHIFT & 3) as usize];
    Link { up, speed: up.then_some(speed), full_duplex: up && status & STATUS_FD != 0, autoneg: true }
}
