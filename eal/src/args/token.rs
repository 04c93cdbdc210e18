//! The secret that a virtual function and its physical function share.

use std::fmt;
use std::str::FromStr;

use super::quoted;
use crate::error::{Error, ErrorKind};

/// VF token (`--vfio-vf-token`): the UUID that gives access to a virtual function whose physical function is
/// bound to VFIO.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VfToken([u8; 16]);

impl VfToken {
    /// Returns the UUID, most significant byte first, as `VFIO_DEVICE_BIND_IOMMUFD` expects it.
    pub fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for VfToken {
    /// Writes the UUID in lower case with hyphens, as `VFIO_GROUP_GET_DEVICE_FD` expects it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let hyphen = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{hyphen}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for VfToken {
    /// Omits the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VfToken(..)")
    }
}

impl FromStr for VfToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let groups = text.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
        let digits = text.replace('-', "");
        let valid = groups && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        valid
            .then(|| u128::from_str_radix(&digits, 16).ok())
            .flatten()
            .map(|uuid| Self(uuid.to_be_bytes()))
            .ok_or_else(|| {
                let what = format!("VF token {}", quoted(text));
                Error::new(ErrorKind::Usage, what, "not a UUID").with_hint("make one with: uuidgen")
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_and_written() {
        let text = "14d63f20-8445-11ea-8900-1f9ce7d5650d";
        let token: VfToken = text.to_uppercase().parse().unwrap();
        assert_eq!(token.to_string(), text);
        assert_eq!(token.bytes()[..2], [0x14, 0xd6]);
        assert!(!format!("{token:?}").contains("14"));
    }

    #[test]
    fn what_is_no_uuid() {
        for text in
            ["", "-", "14d63f20844511ea89001f9ce7d5650d", "14d63f20-8445-11ea-8900-1f9ce7d5650g", "é-"]
        {
            assert_eq!(text.parse::<VfToken>().unwrap_err().kind(), ErrorKind::Usage);
        }
    }
}
