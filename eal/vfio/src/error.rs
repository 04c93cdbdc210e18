//! Errors, with the kernel's errno where there is one.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::Irq;

/// Result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Reason why a call of this crate failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", self.what(), self.why())]
#[non_exhaustive]
pub enum Error {
    /// Opening a device node failed.
    Open {
        /// Path of the node.
        path: PathBuf,
        /// Errno from the kernel.
        errno: Errno,
    },
    /// Sysfs does not identify the descriptor as the expected kind of node.
    WrongNode {
        /// Number of the descriptor.
        fd: RawFd,
        /// Expected kind of node.
        wanted: &'static str,
    },
    /// The kernel refused an operation.
    Kernel {
        /// The requested operation.
        operation: Operation,
        /// Errno from the kernel.
        errno: Errno,
    },
    /// The device needs a VF token, but kernels before 6.17 accept no token for a character device.
    TokenUnsupported {
        /// The requested operation.
        operation: Operation,
    },
    /// The kernel has a different API version than this crate.
    ApiVersion(i32),
    /// The kernel does not report the expected information.
    NotReported {
        /// The requested operation.
        operation: Operation,
        /// What is missing, and the kernel version that reports it.
        why: &'static str,
    },
    /// The kernel's response violates its own interface.
    Protocol {
        /// The requested operation.
        operation: Operation,
        /// What is wrong with the response.
        why: &'static str,
    },
    /// An argument is invalid. The kernel was not called.
    Argument {
        /// The requested operation.
        operation: Operation,
        /// Reason why the argument is invalid.
        why: &'static str,
    },
}

impl Error {
    /// Returns what failed, as the first half of the message: `cannot reset 0000:00:04.0`.
    pub fn what(&self) -> String {
        match self {
            Self::Open { path, .. } => format!("cannot open {}", path.display()),
            Self::WrongNode { fd, wanted } => format!("cannot use descriptor {fd} as a {wanted}"),
            Self::ApiVersion(_) => format!("cannot {}", Operation::SetIommu),
            Self::Kernel { operation, .. }
            | Self::TokenUnsupported { operation }
            | Self::NotReported { operation, .. }
            | Self::Protocol { operation, .. }
            | Self::Argument { operation, .. } => format!("cannot {operation}"),
        }
    }

    /// Returns why it failed, as the second half of the message: `EBUSY (Device or resource busy)`.
    pub fn why(&self) -> String {
        match self {
            Self::Open { errno, .. } | Self::Kernel { errno, .. } => format!("{errno:?} ({})", errno.desc()),
            Self::WrongNode { wanted, .. } => format!("it is not a {wanted}"),
            Self::TokenUnsupported { .. } => {
                "EACCES: this kernel accepts no VF token for a cdev (6.17 does)".to_owned()
            }
            Self::ApiVersion(version) => format!("the kernel has VFIO API version {version}, not 0"),
            Self::NotReported { why, .. } | Self::Protocol { why, .. } | Self::Argument { why, .. } => {
                (*why).to_owned()
            }
        }
    }

    /// Returns the errno from the kernel, if the kernel reported the error.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open { errno, .. } | Self::Kernel { errno, .. } => Some(*errno),
            Self::TokenUnsupported { .. } => Some(Errno::EACCES),
            _ => None,
        }
    }

    /// Returns how to fix the error, as a command where possible. `None` if there is no known fix.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open { errno: Errno::ENOENT | Errno::ENODEV, .. } => Some("run: modprobe vfio-pci".into()),
            Self::Open { errno: Errno::EACCES, path } => {
                Some(format!("run as root, or as root: setfacl -m u:USER:rw {}", path.display()))
            }
            Self::Open { errno: Errno::EBUSY, path } => {
                Some(format!("see which process has it open: fuser -v {}", path.display()))
            }
            Self::TokenUnsupported { .. } => Some("open the device through its group".into()),
            Self::Kernel { operation, errno } => operation.hint(*errno).map(Into::into),
            _ => None,
        }
    }
}

/// Operation requested from the kernel. Its `Display` text completes a sentence that starts with "cannot".
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Read a group's state (`VFIO_GROUP_GET_STATUS`).
    GroupStatus(u32),
    /// Add a group to a container (`VFIO_GROUP_SET_CONTAINER`).
    SetContainer(u32),
    /// Remove a group from its container (`VFIO_GROUP_UNSET_CONTAINER`).
    UnsetContainer(u32),
    /// Open a device through its group (`VFIO_GROUP_GET_DEVICE_FD`).
    OpenDevice(String),
    /// Set a container's IOMMU type (`VFIO_SET_IOMMU`).
    SetIommu,
    /// Check whether a container supports an IOMMU type (`VFIO_CHECK_EXTENSION`).
    CheckExtension,
    /// Read a container's IOVA ranges (`VFIO_IOMMU_GET_INFO`).
    ReadIovaRanges,
    /// Map memory (`VFIO_IOMMU_MAP_DMA`).
    Map {
        /// Length in bytes.
        len: u64,
        /// First IOVA.
        iova: u64,
    },
    /// Unmap a range of IOVAs (`VFIO_IOMMU_UNMAP_DMA`).
    Unmap {
        /// Length in bytes.
        len: u64,
        /// First IOVA.
        iova: u64,
    },
    /// Bind a device to iommufd (`VFIO_DEVICE_BIND_IOMMUFD`).
    Bind(String),
    /// Attach a device to an address space or page table (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`).
    Attach(String),
    /// Detach a device (`VFIO_DEVICE_DETACH_IOMMUFD_PT`).
    Detach(String),
    /// Read the properties of a device (`VFIO_DEVICE_GET_INFO`).
    DeviceInfo(String),
    /// Read the properties of a device's region (`VFIO_DEVICE_GET_REGION_INFO`).
    RegionInfo {
        /// Name of the device.
        device: String,
        /// Index of the region.
        index: u32,
    },
    /// Map a region of a device.
    MapRegion {
        /// Name of the device.
        device: String,
        /// Index of the region.
        index: u32,
    },
    /// Read the properties of one kind of interrupt of a device (`VFIO_DEVICE_GET_IRQ_INFO`).
    IrqInfo {
        /// Name of the device.
        device: String,
        /// Kind of interrupt.
        irq: Irq,
    },
    /// Enable, disable, unmask or trigger interrupts (`VFIO_DEVICE_SET_IRQS`).
    SetIrqs {
        /// Name of the device.
        device: String,
        /// Kind of interrupt.
        irq: Irq,
    },
    /// Create an eventfd for a device's interrupt.
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
            Self::SetContainer(group) => write!(f, "add IOMMU group {group} to its container"),
            Self::UnsetContainer(group) => write!(f, "remove IOMMU group {group} from its container"),
            Self::OpenDevice(device) => write!(f, "open {device} through its group"),
            Self::SetIommu => f.write_str("set the container's IOMMU type"),
            Self::CheckExtension => f.write_str("check the container's IOMMU type"),
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
            Self::Eventfd(device) => write!(f, "create an eventfd for {device}"),
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
        let error = Error::TokenUnsupported { operation: Operation::Bind("x".into()) };
        assert_eq!(
            (error.to_string(), error.errno()),
            (
                "cannot bind x to iommufd: EACCES: this kernel accepts no VF token for a cdev (6.17 does)"
                    .into(),
                Some(Errno::EACCES)
            )
        );
        let error = Error::WrongNode { fd: 3, wanted: "VFIO group" };
        assert_eq!(error.to_string(), "cannot use descriptor 3 as a VFIO group: it is not a VFIO group");
    }
}
