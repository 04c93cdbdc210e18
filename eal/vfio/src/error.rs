//! What can fail, with the kernel's errno where it has one.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::Irq;

/// Result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call of this crate failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", self.what(), self.why())]
#[non_exhaustive]
pub enum Error {
    /// A device node did not open.
    Open {
        /// The node.
        path: PathBuf,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The descriptor is of another node.
    OtherNode {
        /// Its number.
        fd: RawFd,
        /// What it is not.
        wanted: &'static str,
    },
    /// The kernel refused an operation.
    Kernel {
        /// What was asked for.
        operation: Operation,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The device wants a VF token, and a kernel before 6.17 takes none with a character device.
    TokenUnknown {
        /// What was asked for.
        operation: Operation,
    },
    /// The kernel has another API than this crate.
    ApiVersion(i32),
    /// The kernel does not report what was asked for.
    NotReported {
        /// What was asked for.
        operation: Operation,
        /// What does.
        why: &'static str,
    },
    /// An argument has no meaning, and the kernel was not asked.
    Argument {
        /// What was asked for.
        operation: Operation,
        /// What is wrong with the argument.
        why: &'static str,
    },
}

impl Error {
    /// What failed, as the first half of the message: `cannot reset 0000:00:04.0`.
    pub fn what(&self) -> String {
        match self {
            Self::Open { path, .. } => format!("cannot open {}", path.display()),
            Self::OtherNode { fd, wanted } => format!("cannot use descriptor {fd} as {wanted}"),
            Self::ApiVersion(_) => format!("cannot {}", Operation::SetIommu),
            Self::Kernel { operation, .. }
            | Self::TokenUnknown { operation }
            | Self::NotReported { operation, .. }
            | Self::Argument { operation, .. } => format!("cannot {operation}"),
        }
    }

    /// Why it failed, as the second half of the message: `EBUSY (Device or resource busy)`.
    pub fn why(&self) -> String {
        match self {
            Self::Open { errno, .. } | Self::Kernel { errno, .. } => format!("{errno:?} ({})", errno.desc()),
            Self::OtherNode { wanted, .. } => format!("it is no {wanted}"),
            Self::TokenUnknown { .. } => {
                "EACCES: this kernel takes no VF token for a cdev (6.17 does)".to_owned()
            }
            Self::ApiVersion(version) => format!("the kernel speaks VFIO API {version}, not 0"),
            Self::NotReported { why, .. } | Self::Argument { why, .. } => (*why).to_owned(),
        }
    }

    /// What the kernel answered, if it was the kernel.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open { errno, .. } | Self::Kernel { errno, .. } => Some(*errno),
            Self::TokenUnknown { .. } => Some(Errno::EACCES),
            _ => None,
        }
    }

    /// What to do about it, best as a command to type, where something helps.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open { errno: Errno::ENOENT | Errno::ENODEV, .. } => Some("run: modprobe vfio-pci".into()),
            Self::Open { errno: Errno::EACCES, path } => {
                Some(format!("run as root, or as root: setfacl -m u:USER:rw {}", path.display()))
            }
            Self::Open { errno: Errno::EBUSY, path } => {
                Some(format!("see which process has it open: fuser -v {}", path.display()))
            }
            Self::TokenUnknown { .. } => Some("open the device by its group".into()),
            Self::Kernel { operation, errno } => operation.hint(*errno).map(Into::into),
            _ => None,
        }
    }
}

/// What was asked of the kernel. Its text follows "cannot".
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Read a group's state (`VFIO_GROUP_GET_STATUS`).
    GroupStatus(u32),
    /// Put a group into a container (`VFIO_GROUP_SET_CONTAINER`).
    SetContainer(u32),
    /// Take a group out of its container (`VFIO_GROUP_UNSET_CONTAINER`).
    UnsetContainer(u32),
    /// Take a device out of its group (`VFIO_GROUP_GET_DEVICE_FD`).
    OpenDevice(String),
    /// Give a container its type of IOMMU (`VFIO_SET_IOMMU`).
    SetIommu,
    /// Ask whether a container has a type of IOMMU (`VFIO_CHECK_EXTENSION`).
    CheckExtension,
    /// Read a container's IOVA ranges (`VFIO_IOMMU_GET_INFO`).
    ReadIovaRanges,
    /// Map memory (`VFIO_IOMMU_MAP_DMA`).
    Map {
        /// How much, in bytes.
        len: u64,
        /// Where.
        iova: u64,
    },
    /// Unmap (`VFIO_IOMMU_UNMAP_DMA`).
    Unmap {
        /// How much, in bytes.
        len: u64,
        /// From where on.
        iova: u64,
    },
    /// Bind a device to iommufd (`VFIO_DEVICE_BIND_IOMMUFD`).
    Bind(String),
    /// Attach a device to an address space or page table (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`).
    Attach(String),
    /// Detach a device (`VFIO_DEVICE_DETACH_IOMMUFD_PT`).
    Detach(String),
    /// Read what a device has (`VFIO_DEVICE_GET_INFO`).
    DeviceInfo(String),
    /// Read what a region of a device is (`VFIO_DEVICE_GET_REGION_INFO`).
    RegionInfo {
        /// The device.
        device: String,
        /// The region.
        index: u32,
    },
    /// Map a region of a device.
    MapRegion {
        /// The device.
        device: String,
        /// The region.
        index: u32,
    },
    /// Read what a device has of one kind of interrupt (`VFIO_DEVICE_GET_IRQ_INFO`).
    IrqInfo {
        /// The device.
        device: String,
        /// The kind.
        irq: Irq,
    },
    /// Deliver, mask, unmask or fire interrupts (`VFIO_DEVICE_SET_IRQS`).
    SetIrqs {
        /// The device.
        device: String,
        /// The kind.
        irq: Irq,
    },
    /// Make the eventfd of a device's interrupt.
    Eventfd(String),
    /// Reset a device (`VFIO_DEVICE_RESET`).
    Reset(String),
}

impl Operation {
    pub(crate) fn failed(self, errno: Errno) -> Error {
        Error::Kernel { operation: self, errno }
    }

    fn hint(&self, errno: Errno) -> Option<&'static str> {
        match (self, errno) {
            (Self::SetIommu, Errno::ENODEV) => Some("run: modprobe vfio_iommu_type1"),
            (Self::SetIommu | Self::Bind(_), Errno::EPERM) => {
                Some("boot with interrupt remapping (intremap=on)")
            }
            (Self::Map { .. }, Errno::ENOMEM) => {
                Some("raise the limit of locked memory: ulimit -l unlimited")
            }
            (Self::Bind(_) | Self::OpenDevice(_), Errno::EBUSY) => {
                Some("see which process has it open: fuser -v /dev/vfio/* /dev/vfio/devices/*")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GroupStatus(group) => write!(f, "read the state of IOMMU group {group}"),
            Self::SetContainer(group) => write!(f, "put IOMMU group {group} into its container"),
            Self::UnsetContainer(group) => write!(f, "take IOMMU group {group} out of its container"),
            Self::OpenDevice(device) => write!(f, "open {device} in its group"),
            Self::SetIommu => f.write_str("give the container an IOMMU"),
            Self::CheckExtension => f.write_str("ask the container for its IOMMU"),
            Self::ReadIovaRanges => f.write_str("read the container's IOVA ranges"),
            Self::Map { len, iova } => {
                write!(f, "map {} MiB for DMA at {iova:#x}", len.div_ceil(1 << 20))
            }
            Self::Unmap { len, iova } => write!(f, "unmap {len} bytes at {iova:#x}"),
            Self::Bind(device) => write!(f, "bind {device} to iommufd"),
            Self::Attach(device) => write!(f, "attach {device} to its address space"),
            Self::Detach(device) => write!(f, "detach {device} from its address space"),
            Self::DeviceInfo(device) => write!(f, "examine {device}"),
            Self::RegionInfo { device, index } => write!(f, "examine region {index} of {device}"),
            Self::MapRegion { device, index } => write!(f, "map region {index} of {device}"),
            Self::IrqInfo { device, irq } => write!(f, "examine the {irq:?} interrupts of {device}"),
            Self::SetIrqs { device, irq } => write!(f, "set the {irq:?} interrupts of {device}"),
            Self::Eventfd(device) => write!(f, "make an eventfd for {device}"),
            Self::Reset(device) => write!(f, "reset {device}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_what_failed_and_why() {
        let error = Operation::Bind("0000:00:04.0".into()).failed(Errno::EBUSY);
        assert_eq!(error.to_string(), "cannot bind 0000:00:04.0 to iommufd: EBUSY (Device or resource busy)");
        assert!(error.hint().is_some_and(|hint| hint.contains("fuser -v")));
        let error = Error::TokenUnknown { operation: Operation::Bind("x".into()) };
        assert_eq!(
            (error.to_string(), error.errno()),
            (
                "cannot bind x to iommufd: EACCES: this kernel takes no VF token for a cdev (6.17 does)"
                    .into(),
                Some(Errno::EACCES)
            )
        );
        let error = Error::OtherNode { fd: 3, wanted: "VFIO group" };
        assert_eq!(error.to_string(), "cannot use descriptor 3 as VFIO group: it is no VFIO group");
    }
}
