//! VFIO modes: the values of `--vfio-mode`.

use std::fmt;
use std::str::FromStr;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};

use crate::args::quoted;
use crate::error::{Error, ErrorKind};

/// How a device is opened, and how memory is mapped for it (`--vfio-mode`, device argument `vfio-mode=`).
///
/// | mode | open | map | address the NIC uses |
/// |---|---|---|---|
/// | `container` (alias `group`) | group + `/dev/vfio/vfio` | `VFIO_IOMMU_MAP_DMA` | Vireo's IOVA |
/// | `cdev` | `/dev/vfio/devices/vfioN`, bind, attach | `IOMMU_IOAS_MAP` | Vireo's IOVA |
/// | `compat` | group, `/dev/iommu` as the container | type1 ioctls served by iommufd | Vireo's IOVA |
/// | `noiommu` | `/dev/vfio/noiommu-N` | none | physical |
/// | `noiommu-cdev` (kernel 7.3) | `/dev/vfio/devices/noiommu-vfioN` | `IOMMU_IOAS_MAP` pins | physical, pinned |
/// | `auto` | `cdev`, else `container`; never without an IOMMU | | Vireo's IOVA |
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Schema,
)]
pub enum VfioMode {
    /// `cdev` if the kernel offers it, otherwise `container`; never without an IOMMU.
    #[default]
    Auto,
    /// Group in a VFIO container.
    Container,
    /// VFIO character device bound to iommufd (kernel 6.6).
    Cdev,
    /// Group with `/dev/iommu` in place of the container (kernel 6.2).
    Compat,
    /// Group without an IOMMU: the device reaches all memory.
    Noiommu,
    /// Character device without an IOMMU (kernel 7.3): the device reaches all memory, and mapped memory is
    /// pinned.
    NoiommuCdev,
}

impl VfioMode {
    /// Every mode, starting with `Auto`.
    pub const ALL: [Self; 6] =
        [Self::Auto, Self::Container, Self::Cdev, Self::Compat, Self::Noiommu, Self::NoiommuCdev];

    /// Every mode except `Auto`.
    pub const EXPLICIT: [Self; 5] =
        [Self::Container, Self::Cdev, Self::Compat, Self::Noiommu, Self::NoiommuCdev];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Container => "container",
            Self::Cdev => "cdev",
            Self::Compat => "compat",
            Self::Noiommu => "noiommu",
            Self::NoiommuCdev => "noiommu-cdev",
        }
    }

    /// Returns whether an IOMMU translates the device's memory accesses; always true for `auto`.
    pub fn has_iommu(self) -> bool {
        !matches!(self, Self::Noiommu | Self::NoiommuCdev)
    }
}

impl fmt::Display for VfioMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for VfioMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "group" {
            return Ok(Self::Container);
        }
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
            Error::new(ErrorKind::Usage, format!("VFIO mode {}", quoted(text)), "there is no such mode")
                .with_hint("use one of auto, container (or group), cdev, compat, noiommu, noiommu-cdev")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for mode in VfioMode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!("group".parse(), Ok(VfioMode::Container));
    }

    #[test]
    fn an_unknown_mode_is_a_usage_error_with_the_known_ones() {
        let error = VfioMode::from_str("Cdev\n").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains("noiommu-cdev"), "{error}");
        assert!(!error.to_string().contains('\n'));
    }
}
