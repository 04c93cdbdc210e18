//! One error type for the whole program: what failed, why, and the command that fixes it.

use nix::errno::Errno;
use vireo_iommufd::{self as iommufd, Operation};

use crate::device_node;

/// Result of the fallible operations in Vireo.
pub type Result<T> = std::result::Result<T, Error>;

/// Class of an [`Error`]. Each class has one exit code, after `sysexits.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The command line is wrong (64, `EX_USAGE`).
    Usage,
    /// A required device, kernel feature or program is unavailable (69, `EX_UNAVAILABLE`).
    Unavailable,
    /// A device or the kernel violated its specification (70, `EX_SOFTWARE`).
    Protocol,
    /// The operating system refused: memory, limits, descriptors (71, `EX_OSERR`).
    Os,
    /// Reading or writing a file failed (74, `EX_IOERR`).
    Io,
    /// The resource is in use (75, `EX_TEMPFAIL`).
    Busy,
    /// Permission is missing (77, `EX_NOPERM`).
    Permission,
}

impl ErrorKind {
    /// Exit code of a program that ends with this kind of error.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 64,
            Self::Unavailable => 69,
            Self::Protocol => 70,
            Self::Os => 71,
            Self::Io => 74,
            Self::Busy => 75,
            Self::Permission => 77,
        }
    }

    fn of(errno: Errno) -> Self {
        match errno {
            Errno::EACCES | Errno::EPERM => Self::Permission,
            Errno::EBUSY | Errno::EAGAIN => Self::Busy,
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::ENOTTY => Self::Unavailable,
            Errno::EIO | Errno::EPIPE | Errno::ENOSPC | Errno::EROFS => Self::Io,
            _ => Self::Os,
        }
    }
}

/// Error that reports what failed, why, and the command that fixes it, on one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}{}", .hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default())]
pub struct Error {
    kind: ErrorKind,
    what: String,
    why: String,
    errno: Option<Errno>,
    hint: Option<String>,
}

impl Error {
    /// Creates an error that no system call reported.
    pub fn new(kind: ErrorKind, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { kind, what: what.into(), why: why.into(), errno: None, hint: None }
    }

    /// Creates an error that a system call reported. The kind follows from `errno`.
    pub fn os(what: impl Into<String>, errno: Errno) -> Self {
        Self {
            kind: ErrorKind::of(errno),
            what: what.into(),
            why: format!("{errno:?} ({})", errno.desc()),
            errno: Some(errno),
            hint: None,
        }
    }

    /// Converts an error of `std::io`, and keeps its errno if it has one.
    pub fn io(what: impl Into<String>, error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(raw) => Self::os(what, Errno::from_raw(raw)),
            None => Self::new(ErrorKind::Io, what, error.to_string()),
        }
    }

    /// Replaces the reason with a plainer one. The errno, if there is one, stays in front.
    #[must_use]
    pub fn because(mut self, why: impl AsRef<str>) -> Self {
        self.why = match self.errno {
            Some(errno) => format!("{errno:?}: {}", why.as_ref()),
            None => why.as_ref().to_owned(),
        };
        self
    }

    /// Adds a hint on what the user should do, preferably a command to type.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Replaces the kind of the error.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Class of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What failed.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Why it failed.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// What the user should do, if anything helps.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Errno that the kernel returned, if a system call failed.
    pub fn errno(&self) -> Option<Errno> {
        self.errno
    }
}

/// Adds hints that name EAL arguments.
impl From<iommufd::Error> for Error {
    fn from(error: iommufd::Error) -> Self {
        let kind = match error {
            iommufd::Error::NotIommufd { .. } => ErrorKind::Permission,
            iommufd::Error::OtherIommufd { .. } | iommufd::Error::Argument { .. } => ErrorKind::Usage,
            iommufd::Error::Protocol { .. } => ErrorKind::Protocol,
            _ => error.errno().map_or(ErrorKind::Os, ErrorKind::of),
        };
        let hint = match &error {
            iommufd::Error::Open { errno: Errno::ENOENT | Errno::ENODEV, .. } => {
                Some("run: modprobe iommufd, or choose --vfio-mode container".into())
            }
            iommufd::Error::Kernel { operation: Operation::PhysicalAddress, .. } => {
                Some("run as root (CAP_SYS_RAWIO)".into())
            }
            // The address space adds the hint: it knows how much must be locked and whose limit applies.
            iommufd::Error::Kernel { errno: Errno::ENOMEM, .. } => None,
            other => other.hint(),
        };
        let converted = Self { kind, what: error.what(), why: error.why(), errno: error.errno(), hint };
        match error {
            iommufd::Error::Open { path, errno: Errno::EACCES } => device_node::permission(converted, &path),
            _ => converted,
        }
    }
}

/// Adds no hint: the caller of the operation knows what the errno means for the device, and adds it.
impl From<vireo_vfio::Error> for Error {
    fn from(error: vireo_vfio::Error) -> Self {
        let kind = match error {
            vireo_vfio::Error::WrongNode { .. } => ErrorKind::Permission,
            vireo_vfio::Error::Argument { .. } => ErrorKind::Usage,
            vireo_vfio::Error::ApiVersion(_) | vireo_vfio::Error::NotReported { .. } => {
                ErrorKind::Unavailable
            }
            vireo_vfio::Error::Protocol { .. } => ErrorKind::Protocol,
            _ => error.errno().map_or(ErrorKind::Os, ErrorKind::of),
        };
        Self { kind, what: error.what(), why: error.why(), errno: error.errno(), hint: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_with_what_why_and_cure() {
        let error =
            Error::os("cannot open /dev/vfio/5", Errno::EACCES).with_hint("run: chown you /dev/vfio/5");
        assert_eq!(
            error.to_string(),
            "cannot open /dev/vfio/5: EACCES (Permission denied); run: chown you /dev/vfio/5"
        );
        assert_eq!(error.kind().exit_code(), 77);
        assert_eq!((error.what(), error.why()), ("cannot open /dev/vfio/5", "EACCES (Permission denied)"));
        assert_eq!(error.hint(), Some("run: chown you /dev/vfio/5"));
    }

    #[test]
    fn a_plainer_reason_keeps_the_errno() {
        let error = Error::os("cannot bind", Errno::EPERM).because("no isolated MSI");
        assert_eq!(error.to_string(), "cannot bind: EPERM: no isolated MSI");
        assert_eq!(error.errno(), Some(Errno::EPERM));
    }

    #[test]
    fn errors_of_iommufd_have_the_words_of_the_eal() {
        let converted = |error: iommufd::Error| Error::from(error);
        let open = |errno| iommufd::Error::Open { path: "/dev/iommu".into(), errno };
        let kernel = |operation, errno| iommufd::Error::Kernel { operation, errno };
        let map = Operation::Map { len: 2 << 20, iova: Some(4 << 30) };
        for (error, kind, text) in [
            (
                open(Errno::ENOENT),
                ErrorKind::Unavailable,
                "cannot open /dev/iommu: ENOENT: this kernel has no iommufd (CONFIG_IOMMUFD); run: modprobe iommufd, or \
                 choose --vfio-mode container",
            ),
            (open(Errno::EMFILE), ErrorKind::Os, "cannot open /dev/iommu: EMFILE (Too many open files)"),
            (
                iommufd::Error::NotIommufd { fd: 7 },
                ErrorKind::Permission,
                "cannot use descriptor 7 as /dev/iommu: it is not an iommufd",
            ),
            (
                kernel(map, Errno::ENOMEM),
                ErrorKind::Os,
                "cannot map 2 MiB for DMA at 0x100000000: ENOMEM (Out of memory)",
            ),
            (
                kernel(Operation::MapFile { len: 1, iova: None }, Errno::ENOTTY),
                ErrorKind::Unavailable,
                "cannot map 1 MiB for DMA: ENOTTY: IOMMU_IOAS_MAP_FILE needs kernel 6.13 or newer",
            ),
            (
                kernel(Operation::PhysicalAddress, Errno::ENOTTY),
                ErrorKind::Unavailable,
                "cannot read physical addresses from iommufd: ENOTTY (Not a typewriter); run as root \
                 (CAP_SYS_RAWIO)",
            ),
            (
                iommufd::Error::NotContiguous { page: 4096, contiguous: 512 },
                ErrorKind::Os,
                "cannot read physical addresses from iommufd: only 512 bytes of a page of 4096 bytes are contiguous",
            ),
            (
                iommufd::Error::OtherIommufd { operation: Operation::Copy { len: 1, iova: None } },
                ErrorKind::Usage,
                "cannot map 1 MiB for DMA: the source belongs to another open /dev/iommu",
            ),
        ] {
            let error = converted(error);
            assert_eq!((error.kind(), error.to_string()), (kind, text.to_owned()));
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = converted(iommufd::Error::Open { path: file.path().into(), errno: Errno::EACCES });
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Permission, Some(Errno::EACCES)));
        assert!(error.why().contains("with mode 0600"), "{error}");
        assert!(
            error.hint().is_some_and(|hint| hint.starts_with("run as root, or: setfacl -m u:")),
            "{error}"
        );
    }

    #[test]
    fn errors_of_vfio_keep_what_failed_and_why() {
        use vireo_vfio::{Error as Vfio, Irq, Operation};
        let kernel = |operation, errno| Vfio::Kernel { operation, errno };
        let device = || "0000:00:04.0".to_owned();
        for (error, kind, text) in [
            (
                kernel(Operation::Bind(device()), Errno::EBUSY),
                ErrorKind::Busy,
                "cannot bind 0000:00:04.0 to iommufd: EBUSY (Device or resource busy)",
            ),
            (
                Vfio::TokenUnsupported { operation: Operation::Bind(device()) },
                ErrorKind::Permission,
                "cannot bind 0000:00:04.0 to iommufd: EACCES: this kernel accepts no VF token for a cdev (6.17 does)",
            ),
            (
                kernel(Operation::IrqInfo { device: device(), irq: Irq::Msix }, Errno::EINVAL),
                ErrorKind::Os,
                "cannot examine the Msix interrupts of 0000:00:04.0: EINVAL (Invalid argument)",
            ),
            (
                kernel(Operation::Map { len: 1, iova: 4 << 30 }, Errno::ENOMEM),
                ErrorKind::Os,
                "cannot map 1 MiB for DMA at 0x100000000: ENOMEM (Out of memory)",
            ),
            (
                Vfio::ApiVersion(1),
                ErrorKind::Unavailable,
                "cannot set the container's IOMMU type: the kernel has VFIO API version 1, not 0",
            ),
        ] {
            let error = Error::from(error);
            assert_eq!((error.kind(), error.to_string()), (kind, text.to_owned()));
        }
    }
}
