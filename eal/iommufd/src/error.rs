//! Errors, with the kernel's errno where there is one.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

use nix::errno::Errno;

/// Result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Reason why a call of this crate failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", self.what(), self.why())]
#[non_exhaustive]
pub enum Error {
    /// Opening the device node failed.
    Open {
        /// Path of the node.
        path: PathBuf,
        /// Errno from the kernel.
        errno: Errno,
    },
    /// Sysfs does not identify the descriptor as `/dev/iommu`.
    NotIommufd {
        /// Number of the descriptor.
        fd: RawFd,
    },
    /// The kernel refused an operation.
    Kernel {
        /// The requested operation.
        operation: Operation,
        /// Errno from the kernel.
        errno: Errno,
    },
    /// The kernel did not handle all invalidation requests.
    Invalidate {
        /// Number of requests that the kernel handled before the one that failed.
        handled: usize,
        /// Errno from the kernel.
        errno: Errno,
    },
    /// The objects of one operation belong to different open files of `/dev/iommu`.
    OtherIommufd {
        /// The requested operation.
        operation: Operation,
    },
    /// An argument is invalid. The kernel was not called.
    Argument {
        /// The requested operation.
        operation: Operation,
        /// Reason why the argument is invalid.
        why: &'static str,
    },
    /// Memory that must be physically contiguous is not.
    NotContiguous {
        /// Number of bytes that must be contiguous.
        page: u64,
        /// Number of bytes that are contiguous.
        contiguous: u64,
    },
    /// The kernel's response violates its own interface.
    Protocol {
        /// The requested operation.
        operation: Operation,
        /// What is wrong with the response.
        why: &'static str,
    },
}

impl Error {
    /// Returns what failed, as the first half of the message: `cannot map 2 MiB for DMA`.
    pub fn what(&self) -> String {
        match self {
            Self::Open { path, .. } => format!("cannot open {}", path.display()),
            Self::NotIommufd { fd } => format!("cannot use descriptor {fd} as {}", crate::PATH),
            Self::Invalidate { .. } => format!("cannot {}", Operation::Invalidate),
            Self::NotContiguous { .. } => format!("cannot {}", Operation::PhysicalAddress),
            Self::Kernel { operation, .. }
            | Self::OtherIommufd { operation }
            | Self::Argument { operation, .. }
            | Self::Protocol { operation, .. } => format!("cannot {operation}"),
        }
    }

    /// Returns why it failed, as the second half of the message: `EEXIST (File exists)`.
    pub fn why(&self) -> String {
        match self {
            Self::Open { errno, .. } | Self::Kernel { errno, .. } => match self.reason() {
                Some(reason) => format!("{errno:?}: {reason}"),
                None => format!("{errno:?} ({})", errno.desc()),
            },
            Self::Invalidate { handled, errno } => {
                let requests = if *handled == 1 { "request" } else { "requests" };
                format!("{errno:?} ({}) after {handled} successful {requests}", errno.desc())
            }
            Self::NotIommufd { .. } => "it is not an iommufd".into(),
            Self::OtherIommufd { .. } => "the source belongs to another open /dev/iommu".into(),
            Self::Argument { why, .. } | Self::Protocol { why, .. } => (*why).into(),
            Self::NotContiguous { page, contiguous } => {
                format!("only {contiguous} bytes of a page of {page} bytes are contiguous")
            }
        }
    }

    /// Returns the errno from the kernel, if the kernel reported the error.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open { errno, .. } | Self::Kernel { errno, .. } | Self::Invalidate { errno, .. } => {
                Some(*errno)
            }
            _ => None,
        }
    }

    /// Returns what the errno means for this operation, if that is more specific than its name.
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Open { errno: Errno::ENOENT | Errno::ENODEV, .. } => {
                Some("this kernel has no iommufd (CONFIG_IOMMUFD)")
            }
            Self::Kernel { operation, errno: Errno::ENOTTY } => match operation {
                Operation::MapFile { .. } => Some("IOMMU_IOAS_MAP_FILE needs kernel 6.13 or newer"),
                Operation::ChangeProcess => Some("IOMMU_IOAS_CHANGE_PROCESS needs kernel 6.13 or newer"),
                _ => None,
            },
            _ => None,
        }
    }

    /// Returns how to fix the error, as a command where possible. `None` if there is no known fix.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open { errno: Errno::ENOENT | Errno::ENODEV, .. } => Some("run: modprobe iommufd".into()),
            Self::Open { errno: Errno::EACCES, path } => {
                Some(format!("run as root, or as root: setfacl -m u:USER:rw {}", path.display()))
            }
            Self::Kernel { operation, errno } => operation.hint(*errno).map(Into::into),
            _ => None,
        }
    }
}

/// Operation requested from the kernel. Its `Display` text completes a sentence that starts with "cannot".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Allocate an address space (`IOMMU_IOAS_ALLOC`).
    AllocateIoas,
    /// Read the usable IOVA ranges (`IOMMU_IOAS_IOVA_RANGES`).
    ReadIovaRanges,
    /// Reserve IOVA ranges (`IOMMU_IOAS_ALLOW_IOVAS`).
    AllowIovas,
    /// Map memory by address (`IOMMU_IOAS_MAP`).
    Map {
        /// Length in bytes.
        len: u64,
        /// Requested IOVA, if any.
        iova: Option<u64>,
    },
    /// Map memory by file (`IOMMU_IOAS_MAP_FILE`).
    MapFile {
        /// Length in bytes.
        len: u64,
        /// Requested IOVA, if any.
        iova: Option<u64>,
    },
    /// Copy an existing mapping (`IOMMU_IOAS_COPY`).
    Copy {
        /// Length in bytes.
        len: u64,
        /// Requested IOVA, if any.
        iova: Option<u64>,
    },
    /// Unmap a range of IOVAs (`IOMMU_IOAS_UNMAP`).
    Unmap {
        /// Length in bytes.
        len: u64,
        /// First IOVA.
        iova: u64,
    },
    /// Translate an IOVA for devices without an IOMMU (`IOMMU_IOAS_NOIOMMU_GET_PA`).
    PhysicalAddress,
    /// Set the option with this number (`IOMMU_OPTION`).
    SetOption(u32),
    /// Read the option with this number (`IOMMU_OPTION`).
    GetOption(u32),
    /// Read or change the address space that VFIO containers use (`IOMMU_VFIO_IOAS`).
    CompatIoas,
    /// Move the accounting of pinned pages to this process (`IOMMU_IOAS_CHANGE_PROCESS`).
    ChangeProcess,
    /// Read the properties of the IOMMU behind a device (`IOMMU_GET_HW_INFO`).
    HwInfo,
    /// Allocate a hardware page table (`IOMMU_HWPT_ALLOC`).
    AllocateHwpt,
    /// Start or stop dirty tracking (`IOMMU_HWPT_SET_DIRTY_TRACKING`).
    DirtyTracking,
    /// Read dirty bits (`IOMMU_HWPT_GET_DIRTY_BITMAP`).
    DirtyBitmap,
    /// Invalidate caches (`IOMMU_HWPT_INVALIDATE`).
    Invalidate,
    /// Allocate a page fault queue (`IOMMU_FAULT_QUEUE_ALLOC`).
    AllocateFaultQueue,
    /// Read page faults.
    ReadFaults,
    /// Respond to a page fault.
    RespondToFault,
    /// Allocate a virtual IOMMU (`IOMMU_VIOMMU_ALLOC`).
    AllocateViommu,
    /// Allocate a virtual device (`IOMMU_VDEVICE_ALLOC`).
    AllocateVdevice,
    /// Allocate an event queue of a virtual IOMMU (`IOMMU_VEVENTQ_ALLOC`).
    AllocateEventQueue,
    /// Read events of a virtual IOMMU.
    ReadEvents,
    /// Allocate a hardware queue (`IOMMU_HW_QUEUE_ALLOC`).
    AllocateHwQueue,
    /// Duplicate the descriptor.
    Duplicate,
}

impl Operation {
    pub(crate) fn failed(self, errno: Errno) -> Error {
        Error::Kernel { operation: self, errno }
    }

    fn hint(self, errno: Errno) -> Option<&'static str> {
        match (self, errno) {
            (Self::Map { .. } | Self::MapFile { .. } | Self::Copy { .. }, Errno::ENOMEM) => {
                Some("raise the limit of locked memory: ulimit -l unlimited")
            }
            (Self::PhysicalAddress, Errno::EPERM) => Some("run as root (CAP_SYS_RAWIO)"),
            (Self::SetOption(_), Errno::EPERM) => Some("run as root (CAP_SYS_RESOURCE)"),
            _ => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Map { len, iova } | Self::MapFile { len, iova } | Self::Copy { len, iova } => {
                write!(f, "map {} MiB for DMA", len.div_ceil(1 << 20))?;
                return iova.map_or(Ok(()), |iova| write!(f, " at {iova:#x}"));
            }
            Self::Unmap { len, iova } => return write!(f, "unmap {len} bytes at {iova:#x}"),
            Self::SetOption(option) => return write!(f, "set iommufd option {option}"),
            Self::GetOption(option) => return write!(f, "read iommufd option {option}"),
            Self::AllocateIoas => "allocate an I/O address space",
            Self::ReadIovaRanges => "read the IOVA ranges",
            Self::AllowIovas => "reserve IOVA ranges",
            Self::PhysicalAddress => "read physical addresses from iommufd",
            Self::CompatIoas => "access the address space of VFIO containers",
            Self::ChangeProcess => "transfer the accounting of pinned pages to this process",
            Self::HwInfo => "read the IOMMU's properties",
            Self::AllocateHwpt => "allocate a hardware page table",
            Self::DirtyTracking => "start or stop dirty tracking",
            Self::DirtyBitmap => "read dirty bits",
            Self::Invalidate => "invalidate IOMMU caches",
            Self::AllocateFaultQueue => "allocate a page fault queue",
            Self::ReadFaults => "read page faults",
            Self::RespondToFault => "respond to a page fault",
            Self::AllocateViommu => "allocate a virtual IOMMU",
            Self::AllocateVdevice => "allocate a virtual device",
            Self::AllocateEventQueue => "allocate an IOMMU event queue",
            Self::ReadEvents => "read IOMMU events",
            Self::AllocateHwQueue => "allocate a hardware queue",
            Self::Duplicate => "duplicate the descriptor",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_what_failed_and_why() {
        let error = Operation::Map { len: 3 << 20, iova: Some(4 << 30) }.failed(Errno::EEXIST);
        assert_eq!(error.to_string(), "cannot map 3 MiB for DMA at 0x100000000: EEXIST (File exists)");
        let error = Operation::MapFile { len: 1, iova: None }.failed(Errno::ENOTTY);
        assert_eq!(
            error.to_string(),
            "cannot map 1 MiB for DMA: ENOTTY: IOMMU_IOAS_MAP_FILE needs kernel 6.13 or newer"
        );
        assert_eq!((error.errno(), error.hint()), (Some(Errno::ENOTTY), None));
        let error = Error::Open { path: "/dev/iommu".into(), errno: Errno::EACCES };
        assert_eq!(error.to_string(), "cannot open /dev/iommu: EACCES (Permission denied)");
        assert!(error.hint().is_some_and(|hint| hint.ends_with("setfacl -m u:USER:rw /dev/iommu")));
        let error = Error::NotContiguous { page: 2 << 20, contiguous: 4096 };
        assert!(error.errno().is_none() && error.to_string().contains(": only 4096 bytes of"), "{error}");
    }
}
