//! A virtual device and its arguments: `--vdev net_virtio_user0,path=/tmp/socket`.

use std::fmt;

use super::devargs::{key_values, split_name};
use super::quoted;
use crate::error::{Error, ErrorKind, Result};

/// Maximum number of digits at the end of a name.
const MAX_DIGITS: usize = 4;

/// Value of `--vdev`: a virtual device and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdevArgs {
    /// Name of the device: the name of its driver, followed by a number.
    pub name: String,
    /// Name of the driver.
    pub driver: String,
    /// Keys and values for the driver, in the order given.
    pub args: Vec<(String, String)>,
}

impl VdevArgs {
    /// Parses `NAME[,KEY=VALUE…]`. `drivers` lists the known drivers with their keys.
    ///
    /// # Errors
    /// `Usage`, naming the invalid part and what would be valid.
    pub fn parse(text: &str, drivers: &[(&str, &[&str])]) -> Result<Self> {
        let (name, rest) = split_name(text);
        let driver = name.trim_end_matches(|char: char| char.is_ascii_digit());
        let wrong = |why: &str| Error::new(ErrorKind::Usage, format!("--vdev {}", quoted(name)), why);
        let Some((_, keys)) = drivers.iter().find(|(known, _)| *known == driver) else {
            let known: Vec<String> = drivers.iter().map(|(known, _)| format!("{known}0")).collect();
            return Err(wrong("no driver has that name").with_hint(match known.is_empty() {
                true => "leave --vdev out: this program has no virtual devices".to_owned(),
                false => format!("valid names include {}", known.join(", ")),
            }));
        };
        if !(1..=MAX_DIGITS).contains(&(name.len() - driver.len())) {
            return Err(wrong("the driver's name is not followed by a number of 1 to 4 digits")
                .with_hint(format!("for example: {driver}0")));
        }
        let args = key_values(rest, &name, keys)?;
        Ok(Self { name: name.to_owned(), driver: driver.to_owned(), args })
    }
}

impl fmt::Display for VdevArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.args.iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DRIVERS: &[(&str, &[&str])] =
        &[("net_virtio_user", &["path", "queues"]), ("virtio_user", &["path", "queues"])];

    #[test]
    fn name_driver_and_keys() {
        let vdev = VdevArgs::parse("net_virtio_user12,path=/tmp/a=b,queues=1", DRIVERS).unwrap();
        assert_eq!((&*vdev.name, &*vdev.driver), ("net_virtio_user12", "net_virtio_user"));
        assert_eq!(vdev.args, [("path".into(), "/tmp/a=b".into()), ("queues".into(), "1".into())]);
        assert_eq!(VdevArgs::parse("virtio_user0", DRIVERS).unwrap().driver, "virtio_user");
    }

    #[test]
    fn wrong_arguments_are_named() {
        let cases = [
            (
                "net_tap0,iface=x",
                "--vdev \"net_tap0\": no driver has that name; valid names include net_virtio_user0, virtio_user0",
            ),
            ("", "--vdev \"\": no driver has that name; valid names include net_virtio_user0, virtio_user0"),
            (
                "net_virtio_user,path=x",
                "--vdev \"net_virtio_user\": the driver's name is not followed by a number of 1 to 4 digits; for example: net_virtio_user0",
            ),
            (
                "virtio_user00000",
                "--vdev \"virtio_user00000\": the driver's name is not followed by a number of 1 to 4 digits; for example: virtio_user0",
            ),
            ("virtio_user0,", "argument \"\" of device virtio_user0: not of the form KEY=VALUE"),
            (
                "virtio_user0,speed=1",
                "argument \"speed=1\" of device virtio_user0: there is no such key; known keys: path, queues",
            ),
            ("virtio_user0,path=", "argument \"path=\" of device virtio_user0: the value is missing"),
            (
                "virtio_user0,path=a,path=b",
                "argument \"path=b\" of device virtio_user0: the key is given twice",
            ),
        ];
        for (text, line) in cases {
            let error = VdevArgs::parse(text, DRIVERS).unwrap_err();
            assert_eq!((error.to_string(), error.kind()), (line.to_owned(), ErrorKind::Usage));
        }
        let error = VdevArgs::parse("net_vhost0", &[]).unwrap_err().to_string();
        assert!(error.ends_with("leave --vdev out: this program has no virtual devices"), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(net_)?virtio_user[0-9]{0,6}[,=a-z0-9]{0,30}|.*") {
            let _ = VdevArgs::parse(&text, DRIVERS);
        }

        #[test]
        fn round_trip(number in 0_u32..10_000, values in prop::collection::vec("[^,]+", 0..3)) {
            let keys = ["path", "queues"];
            let args = keys.iter().zip(values).map(|(key, value)| (key.to_string(), value)).collect();
            let driver = "virtio_user".to_owned();
            let vdev = VdevArgs { name: format!("{driver}{number}"), driver, args };
            prop_assert_eq!(VdevArgs::parse(&vdev.to_string(), DRIVERS), Ok(vdev));
        }
    }
}
