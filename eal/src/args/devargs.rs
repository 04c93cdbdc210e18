//! A device and its arguments: `-a 0000:00:03.0,vfio-mode=cdev,key=value`.

use std::fmt;

use super::quoted;
use crate::bdf::Bdf;
use crate::error::{Error, ErrorKind, Result};
use crate::vfio::VfioMode;

const MODE_KEY: &str = "vfio-mode";

/// Value of `--allow`: a device and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceArgs {
    /// Address of the device.
    pub address: Bdf,
    /// VFIO mode of this device (`vfio-mode=`), which overrides `--vfio-mode`.
    pub mode: Option<VfioMode>,
    /// Remaining arguments: keys and values for the driver, in the order given.
    pub args: Vec<(String, String)>,
}

impl DeviceArgs {
    /// Parses `ADDRESS[,KEY=VALUE…]`. A key is `vfio-mode` or one of `driver_keys`.
    ///
    /// # Errors
    /// `Usage`, naming the invalid part and, for an unknown key, the known keys.
    pub fn parse(text: &str, driver_keys: &[&str]) -> Result<Self> {
        let (address, rest) = split_name(text);
        let address: Bdf = address.parse()?;
        let mut args = key_values(rest, &address, &[&[MODE_KEY], driver_keys].concat())?;
        let mode = match args.iter().position(|(key, _)| key == MODE_KEY) {
            Some(at) => Some(args.remove(at).1.parse()?),
            None => None,
        };
        Ok(Self { address, mode, args })
    }
}

/// Splits `text` into the name of a device and what follows the first comma.
pub(super) fn split_name(text: &str) -> (&str, Option<&str>) {
    text.split_once(',').map_or((text, None), |(name, rest)| (name, Some(rest)))
}

/// Parses `KEY=VALUE[,KEY=VALUE…]` of `device`. Each key must be one of `known` and occur only once.
///
/// # Errors
/// `Usage`, naming the invalid part and, for an unknown key, the known keys.
pub(super) fn key_values(
    text: Option<&str>,
    device: &dyn fmt::Display,
    known: &[&str],
) -> Result<Vec<(String, String)>> {
    let mut args: Vec<(String, String)> = Vec::new();
    for part in text.into_iter().flat_map(|text| text.split(',')) {
        let wrong = |why: &str| {
            Error::new(ErrorKind::Usage, format!("argument {} of device {device}", quoted(part)), why)
        };
        let (key, value) = part.split_once('=').ok_or_else(|| wrong("not of the form KEY=VALUE"))?;
        if value.is_empty() {
            return Err(wrong("the value is missing"));
        }
        if !known.contains(&key) {
            let known = known.join(", ");
            return Err(wrong("there is no such key").with_hint(format!("known keys: {known}")));
        }
        if args.iter().any(|(other, _)| other == key) {
            return Err(wrong("the key is given twice"));
        }
        args.push((key.to_owned(), value.to_owned()));
    }
    Ok(args)
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
