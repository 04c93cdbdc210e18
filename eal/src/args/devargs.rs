//! A device and its arguments: `-a 0000:00:03.0,vfio-mode=cdev,key=value`.

use std::fmt;

use super::quoted;
use crate::bdf::Bdf;
use crate::error::{Error, ErrorKind, Result};
use crate::vfio::VfioMode;

const MODE_KEY: &str = "vfio-mode";

/// One `--allow`: a device, and what is special about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceArgs {
    /// The device.
    pub address: Bdf,
    /// Its own VFIO mode (`vfio-mode=`), in the place of `--vfio-mode`.
    pub mode: Option<VfioMode>,
    /// The other arguments, keys for its driver, in the order given.
    pub args: Vec<(String, String)>,
}

impl DeviceArgs {
    /// Reads `ADDRESS[,KEY=VALUE…]`; a key is `vfio-mode` or one of `driver_keys`.
    ///
    /// # Errors
    /// `Usage`, naming the wrong part and, of an unknown key, the known ones.
    pub fn parse(text: &str, driver_keys: &[&str]) -> Result<Self> {
        let mut parts = text.split(',');
        let mut device = Self { address: parts.next().unwrap_or("").parse()?, mode: None, args: Vec::new() };
        for part in parts {
            device.add(part, driver_keys)?;
        }
        Ok(device)
    }

    fn add(&mut self, part: &str, driver_keys: &[&str]) -> Result<()> {
        let wrong = |why: &str| {
            let what = format!("argument {} of device {}", quoted(part), self.address);
            Error::new(ErrorKind::Usage, what, why)
        };
        let Some((key, value)) = part.split_once('=') else {
            return Err(wrong("not of the form KEY=VALUE"));
        };
        if value.is_empty() {
            return Err(wrong("the value is missing"));
        }
        let twice = || Err(wrong("the key is given twice"));
        if key == MODE_KEY {
            if self.mode.is_some() {
                return twice();
            }
            self.mode = Some(value.parse()?);
        } else if driver_keys.contains(&key) {
            if self.args.iter().any(|(known, _)| known == key) {
                return twice();
            }
            self.args.push((key.to_owned(), value.to_owned()));
        } else {
            let known = [&[MODE_KEY], driver_keys].concat().join(", ");
            return Err(wrong("there is no such key").mend(format!("known keys: {known}")));
        }
        Ok(())
    }
}

impl fmt::Display for DeviceArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)?;
        if let Some(mode) = self.mode {
            write!(f, ",{MODE_KEY}={mode}")?;
        }
        self.args.iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn long_and_short_address() {
        let device = DeviceArgs::parse("00:03.0,rxd=256,vfio-mode=group", &["rxd"]).unwrap();
        assert_eq!(device.mode, Some(VfioMode::Container));
        assert_eq!(device.args, [("rxd".into(), "256".into())]);
        assert_eq!(device.to_string(), "0000:00:03.0,vfio-mode=container,rxd=256");
    }

    #[test]
    fn wrong_arguments_are_named() {
        let cases = [
            ("00:03.0,", "argument \"\" of device 0000:00:03.0: not of the form KEY=VALUE"),
            ("00:03.0,x", "argument \"x\" of device 0000:00:03.0: not of the form KEY=VALUE"),
            ("00:03.0,rxd=", "argument \"rxd=\" of device 0000:00:03.0: the value is missing"),
            ("00:03.0,rxd=1,rxd=2", "argument \"rxd=2\" of device 0000:00:03.0: the key is given twice"),
            (
                "00:03.0,vfio-mod=cdev",
                "argument \"vfio-mod=cdev\" of device 0000:00:03.0: there is no such key; known keys: vfio-mode, rxd",
            ),
        ];
        for (text, line) in cases {
            let error = DeviceArgs::parse(text, &["rxd"]).unwrap_err();
            assert_eq!(error.to_string(), line);
            assert_eq!(error.kind(), ErrorKind::Usage);
        }
        assert!(DeviceArgs::parse("", &[]).unwrap_err().to_string().contains("PCI address"));
        assert!(DeviceArgs::parse("00:03.0,vfio-mode=x", &[]).unwrap_err().to_string().contains("VFIO mode"));
        assert!(DeviceArgs::parse("00:03.0,vfio-mode=cdev,vfio-mode=cdev", &[]).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "00:03.0[,=a-z-]{0,30}|.*") {
            let _ = DeviceArgs::parse(&text, &["a", ""]);
        }

        #[test]
        fn round_trip(
            bus: u8,
            mode in prop::option::of(prop::sample::select(VfioMode::ALL.to_vec())),
            values in prop::collection::vec("[^,]+", 0..3),
        ) {
            let keys = ["rxd", "txd", "queues"];
            let args = keys.iter().zip(values).map(|(key, value)| (key.to_string(), value)).collect();
            let device = DeviceArgs { address: Bdf::new(0, bus, 3, 0).unwrap(), mode, args };
            prop_assert_eq!(DeviceArgs::parse(&device.to_string(), &keys), Ok(device));
        }
    }
}
