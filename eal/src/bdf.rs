//! Address of a PCI function.

use std::fmt;
use std::str::FromStr;

use crate::args::quoted;
use crate::error::{Error, ErrorKind};

/// Address of a PCI function: domain, bus, device and function, as in `0000:00:03.0`.
///
/// Linux gives domains above `ffff` to devices behind an Intel VMD, so a domain has 32 bits.
/// Addresses sort in the order of a bus scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl Bdf {
    /// Creates an address from its parts. Returns `None` if `device` is above 31 or `function` above 7.
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 0x1f || function > 7 {
            return None;
        }
        Some(Self { domain, bus, device, function })
    }

    /// PCI domain, called segment in ACPI.
    pub const fn domain(self) -> u32 {
        self.domain
    }

    /// Bus number in the domain.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// Device (slot) on the bus, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// Function of the device, 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }

    fn parse(text: &str) -> Option<Self> {
        let (slot, function) = text.rsplit_once('.')?;
        let (bus, device) = slot.rsplit_once(':')?;
        let (domain, bus) = bus.rsplit_once(':').unwrap_or(("0", bus));
        Self::new(
            hex(domain, 8)?,
            hex(bus, 2)?.try_into().ok()?,
            hex(device, 2)?.try_into().ok()?,
            hex(function, 1)?.try_into().ok()?,
        )
    }
}

fn hex(digits: &str, max_len: usize) -> Option<u32> {
    let valid = (1..=max_len).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    valid.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        f.pad(&format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
    }
}

impl FromStr for Bdf {
    type Err = Error;

    /// Parses `0000:00:03.0`, or `00:03.0` for domain 0.
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text).ok_or_else(|| {
            Error::new(
                ErrorKind::Usage,
                format!("PCI address {}", quoted(text)),
                "not of the form 0000:00:03.0 or 00:03.0",
            )
            .with_hint("list addresses with: ls /sys/bus/pci/devices")
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn long_and_short_form() {
        let bdf = Bdf::new(0, 0, 3, 1).unwrap();
        assert_eq!("0000:00:03.1".parse(), Ok(bdf));
        assert_eq!("00:03.1".parse(), Ok(bdf));
        assert_eq!("10000:E1:1f.7".parse(), Ok(Bdf::new(0x10000, 0xe1, 0x1f, 7).unwrap()));
        assert_eq!(bdf.to_string(), "0000:00:03.1");
    }

    #[test]
    fn what_is_not_an_address() {
        let wrong = [
            "",
            ".",
            ":.",
            "00:03",
            "00:20.0",
            "00:03.8",
            "+0:03.0",
            "0:0:0:0.0",
            "100:00.0",
            "00:03.0 ",
            "éé:é.é",
        ];
        for text in wrong {
            let error = Bdf::from_str(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{text:?}");
        }
        assert_eq!(Bdf::new(0, 0, 32, 0), None);
        assert_eq!(Bdf::new(0, 0, 0, 8), None);
    }

    #[test]
    fn order_is_that_of_a_bus_scan() {
        let order = ["0000:00:03.0", "0000:00:03.1", "0000:00:1f.0", "0000:01:00.0", "0001:00:00.0"];
        let mut sorted = order.map(|text| Bdf::from_str(text).unwrap());
        sorted.reverse();
        sorted.sort();
        assert_eq!(sorted.map(|bdf| bdf.to_string()), order);
    }

    proptest! {
        #[test]
        fn round_trip(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let bdf = Bdf::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(bdf.to_string().parse(), Ok(bdf));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Bdf>();
        }
    }
}
