//! The open device node.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::stat::{SFlag, fstat, major, minor};

use crate::error::{Error, Operation, Result};
use crate::observe::observed;
use crate::sys::{self, Argument};
use crate::{FaultQueue, HwInfo, HwInfoType, Ioas};

/// Path of the device node.
pub const PATH: &str = "/dev/iommu";

/// Owner of the `RLIMIT_MEMLOCK` that pinned pages count against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accounting {
    /// The user, with all processes of the user counted together (the kernel's default).
    PerUser,
    /// The process, as in a VFIO container; needs `CAP_SYS_RESOURCE`.
    PerProcess,
}

/// Id of a device that is bound to an iommufd, as returned by `VFIO_DEVICE_BIND_IOMMUFD` in `out_devid`. The
/// id is valid while the device's own descriptor is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId(pub u32);

/// An open `/dev/iommu`: the owner of all other objects. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct Iommufd(Arc<OwnedFd>);

/// Weak reference to an [`Iommufd`], which does not keep the descriptor open.
#[derive(Clone, Debug, Default)]
pub struct WeakIommufd(Weak<OwnedFd>);

impl WeakIommufd {
    /// Returns the iommufd if its descriptor is still open.
    pub fn upgrade(&self) -> Option<Iommufd> {
        self.0.upgrade().map(Iommufd)
    }
}

impl Iommufd {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// [`Error::Open`]: `ENOENT` on kernels without iommufd, `EACCES` without access to the node.
    pub fn open() -> Result<Self> {
        open(PATH.as_ref()).map(Self::of)
    }

    /// Opens the node at `path`, for Linux containers in which it is not `/dev/iommu`.
    ///
    /// # Errors
    /// As for [`Iommufd::open`]; [`Error::NotIommufd`] when sysfs does not identify the node as `/dev/iommu`.
    pub fn open_at(path: &Path) -> Result<Self> {
        if path == Path::new(PATH) { Self::open() } else { Self::from_fd(open(path)?) }
    }

    /// Takes ownership of an open descriptor of `/dev/iommu`.
    ///
    /// # Errors
    /// [`Error::NotIommufd`] when sysfs does not identify the descriptor as `/dev/iommu`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        check(fd.as_fd())?;
        Ok(Self::of(fd))
    }

    /// Duplicates an open descriptor of `/dev/iommu`. Both descriptors refer to the same open file, so they
    /// share objects and object ids.
    ///
    /// # Errors
    /// As for [`Iommufd::from_fd`], and when the process has no free descriptor.
    pub fn from_borrowed(fd: BorrowedFd<'_>) -> Result<Self> {
        check(fd)?;
        let duplicate =
            fd.try_clone_to_owned().map_err(|error| Operation::Duplicate.failed(errno(&error)))?;
        Ok(Self::of(duplicate))
    }

    /// Takes ownership of a descriptor without the sysfs check of [`Iommufd::from_fd`].
    ///
    /// # Safety
    /// `fd` must refer to `/dev/iommu`. Another driver may respond to these ioctls by writing arbitrary data
    /// to arbitrary addresses.
    pub unsafe fn from_fd_unchecked(fd: OwnedFd) -> Self {
        Self::of(fd)
    }

    fn of(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// Returns a reference that does not keep the descriptor open.
    pub fn downgrade(&self) -> WeakIommufd {
        WeakIommufd(Arc::downgrade(&self.0))
    }

    /// Returns whether both are the same open file, so that their address spaces can share pages. If kcmp(2)
    /// is not available, two descriptors of the same file are reported as different.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || is_same_file(&self.0, &other.0)
    }

    /// Sets the owner of the limit that pinned pages count against. Must be called before the first object is
    /// allocated.
    ///
    /// # Errors
    /// `EBUSY` when objects exist, `EPERM` without `CAP_SYS_RESOURCE`.
    pub fn set_accounting(&self, accounting: Accounting) -> Result<()> {
        let value = u64::from(accounting == Accounting::PerProcess);
        self.set_option(sys::iommufd_option_IOMMU_OPTION_RLIMIT_MODE, 0, value)
    }

    /// Returns the owner of the limit that pinned pages count against.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn accounting(&self) -> Result<Accounting> {
        let value = self.option(sys::iommufd_option_IOMMU_OPTION_RLIMIT_MODE, 0)?;
        Ok(if value == 0 { Accounting::PerUser } else { Accounting::PerProcess })
    }

    pub(crate) fn set_option(&self, option_id: u32, object_id: u32, val64: u64) -> Result<()> {
        let op = sys::iommufd_option_ops_IOMMU_OPTION_OP_SET as u16;
        let mut option = sys::iommu_option { option_id, op, object_id, val64, ..Default::default() };
        // SAFETY: the argument has no addresses.
        unsafe { self.call(&mut option) }.map_err(|errno| Operation::SetOption(option_id).failed(errno))
    }

    pub(crate) fn option(&self, option_id: u32, object_id: u32) -> Result<u64> {
        let op = sys::iommufd_option_ops_IOMMU_OPTION_OP_GET as u16;
        let mut option = sys::iommu_option { option_id, op, object_id, ..Default::default() };
        // SAFETY: the argument has no addresses.
        unsafe { self.call(&mut option) }.map_err(|errno| Operation::GetOption(option_id).failed(errno))?;
        Ok(option.val64)
    }

    /// Allocates an empty I/O address space (`IOMMU_IOAS_ALLOC`).
    ///
    /// # Errors
    /// When the kernel is out of memory.
    pub fn ioas_alloc(&self) -> Result<Arc<Ioas>> {
        let mut alloc = sys::iommu_ioas_alloc::default();
        // SAFETY: the argument has no addresses.
        unsafe { self.call(&mut alloc) }.map_err(|errno| Operation::AllocateIoas.failed(errno))?;
        Ok(Arc::new(Ioas::new(self, alloc.out_ioas_id)))
    }

    /// Returns an address space that was allocated elsewhere in this open file, such as by the process that
    /// passed the descriptor. Dropping the value does not destroy the address space.
    ///
    /// # Safety
    /// While the value or a mapping made through it is alive, nothing else may destroy the address space or
    /// unmap memory that was mapped through this value.
    pub unsafe fn ioas_from_id(&self, id: u32) -> Arc<Ioas> {
        Arc::new(Ioas::foreign(self, id))
    }

    /// Allocates a queue for page faults of devices (`IOMMU_FAULT_QUEUE_ALLOC`).
    ///
    /// # Errors
    /// When the kernel is too old, out of memory or out of descriptors.
    pub fn fault_queue_alloc(&self) -> Result<Arc<FaultQueue>> {
        FaultQueue::alloc(self)
    }

    /// Reads the properties of the IOMMU behind `device` (`IOMMU_GET_HW_INFO`). If `wanted` is `None`, the
    /// IOMMU's driver chooses the type of the properties.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the IOMMU's driver does not report properties of type `wanted`.
    pub fn hw_info(&self, device: DeviceId, wanted: Option<HwInfoType>) -> Result<HwInfo> {
        HwInfo::read(self, device, wanted)
    }

    /// Moves the accounting of all pinned pages, in all address spaces, to this process
    /// (`IOMMU_IOAS_CHANGE_PROCESS`). Intended for a process that received the descriptor from another
    /// process.
    ///
    /// # Errors
    /// `EINVAL` when any memory is mapped by address instead of by file; `ENOTTY` on kernels before 6.13. In
    /// both cases nothing changes.
    pub fn change_process(&self) -> Result<()> {
        // SAFETY: the argument has no addresses.
        unsafe { self.call(&mut sys::iommu_ioas_change_process::default()) }
            .map_err(|errno| Operation::ChangeProcess.failed(errno))
    }

    /// Returns the id of the address space that VFIO containers on this descriptor use (`IOMMU_VFIO_IOAS`). A
    /// device that is attached to this address space shares the mappings of the containers.
    ///
    /// # Errors
    /// When no address space is set.
    pub fn compat_ioas(&self) -> Result<u32> {
        self.vfio_ioas(sys::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_GET, 0)
    }

    /// Makes `ioas` the address space of VFIO groups that use this descriptor as their container from now on.
    ///
    /// # Errors
    /// [`Error::OtherIommufd`] when `ioas` belongs to another open `/dev/iommu`, where the kernel would take
    /// whatever has the same id here.
    pub fn set_compat_ioas(&self, ioas: &Ioas) -> Result<()> {
        if !self.is_same(ioas.iommufd()) {
            return Err(Error::OtherIommufd { operation: Operation::CompatIoas });
        }
        self.vfio_ioas(sys::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET, ioas.id()).map(drop)
    }

    /// Clears the address space that VFIO containers on this descriptor use. When the next VFIO group joins,
    /// the kernel allocates a new one.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn clear_compat_ioas(&self) -> Result<()> {
        self.vfio_ioas(sys::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_CLEAR, 0).map(drop)
    }

    fn vfio_ioas(&self, op: u32, ioas_id: u32) -> Result<u32> {
        let mut argument = sys::iommu_vfio_ioas { ioas_id, op: op as u16, ..Default::default() };
        // SAFETY: the argument has no addresses.
        unsafe { self.call(&mut argument) }.map_err(|errno| Operation::CompatIoas.failed(errno))?;
        Ok(argument.ioas_id)
    }

    /// Issues an ioctl on this iommufd. As in [`sys::call`], the caller must ensure that addresses in the
    /// argument are valid.
    pub(crate) unsafe fn call<A: Argument>(&self, argument: &mut A) -> nix::Result<()> {
        // SAFETY: every constructor takes only an iommufd, and the caller guarantees the addresses.
        unsafe { sys::call(self.as_fd(), argument) }
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    observed("open", || OpenOptions::new().read(true).write(true).open(path))
        .map(OwnedFd::from)
        .map_err(|error| Error::Open { path: path.to_owned(), errno: errno(&error) })
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw)
}

/// Checks the descriptor by its device number in sysfs. Names in `/dev` are ignored.
fn check(fd: BorrowedFd<'_>) -> Result<()> {
    let is_iommufd = fstat(fd).is_ok_and(|found| {
        let number = format!("/sys/dev/char/{}:{}", major(found.st_rdev), minor(found.st_rdev));
        SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
            && fs::read_link(number).is_ok_and(|device| device.ends_with("misc/iommu"))
    });
    if is_iommufd { Ok(()) } else { Err(Error::NotIommufd { fd: fd.as_raw_fd() }) }
}

/// Returns whether two descriptors refer to the same open file (kcmp(2)), as after a descriptor was passed twice.
fn is_same_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    /// `enum kcmp_type` of linux/kcmp.h.
    const KCMP_FILE: c_int = 0;
    let own = std::process::id();
    // SAFETY: kcmp reads and writes no memory of this process.
    unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, one.as_raw_fd(), other.as_raw_fd()) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{mock_kernel, read, write};
    use std::fs::File;

    #[test]
    fn only_an_iommufd_is_taken_for_one() {
        let null = File::open("/dev/null").unwrap();
        let file = tempfile::tempfile().unwrap();
        for fd in [OwnedFd::from(null), file.into()] {
            let number = fd.as_raw_fd();
            let error = Iommufd::from_borrowed(fd.as_fd()).unwrap_err();
            assert_eq!(error, Error::NotIommufd { fd: number });
            assert_eq!(Iommufd::from_fd(fd).unwrap_err(), error);
            assert_eq!(
                error.to_string(),
                format!("cannot use descriptor {number} as /dev/iommu: it is not an iommufd")
            );
        }
        assert!(matches!(Iommufd::open_at("/dev/null".as_ref()), Err(Error::NotIommufd { .. })));
        let error = Iommufd::open_at("/dev/null/iommu".as_ref()).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENOTDIR));
    }

    #[test]
    fn a_descriptor_that_was_duplicated_is_the_same_file() {
        let open = || OwnedFd::from(File::open("/dev/null").unwrap());
        let (one, other) = (open(), open());
        let again = one.try_clone().unwrap();
        // kcmp fails on kernels without CONFIG_KCMP and in some sandboxes.
        let tells = is_same_file(&one, &one);
        let [one, again, other] = [one, again, other].map(Iommufd::of);
        assert!(one.is_same(&one.clone()));
        assert_eq!(one.is_same(&again), tells);
        assert!(!one.is_same(&other));
        let weak = one.downgrade();
        assert!(weak.upgrade().is_some());
        drop(one);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn options_are_set_and_read_by_their_numbers() {
        let mut value = 0;
        let iommufd = mock_kernel(move |name, bytes| {
            let mut option: sys::iommu_option = read(bytes);
            assert_eq!((name, option.size, option.option_id, option.object_id), ("IOMMU_OPTION", 24, 0, 0));
            match option.op {
                0 => value = option.val64,
                _ => option.val64 = value,
            }
            write(bytes, &option);
            Ok(())
        });
        assert_eq!(iommufd.accounting(), Ok(Accounting::PerUser));
        assert_eq!(iommufd.set_accounting(Accounting::PerProcess), Ok(()));
        assert_eq!(iommufd.accounting(), Ok(Accounting::PerProcess));
    }

    #[test]
    fn the_address_space_of_containers_is_read_set_and_cleared() {
        let iommufd = mock_kernel(|name, bytes| {
            if name == "IOMMU_IOAS_CHANGE_PROCESS" {
                return Err(Errno::EINVAL);
            }
            let mut argument: sys::iommu_vfio_ioas = read(bytes);
            assert_eq!((name, argument.size), ("IOMMU_VFIO_IOAS", 12));
            match (argument.op, argument.ioas_id) {
                (0, 0) => argument.ioas_id = 5,
                (1, 7) | (2, 0) => {}
                wrong => panic!("{wrong:?}"),
            }
            write(bytes, &argument);
            Ok(())
        });
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { iommufd.ioas_from_id(7) };
        assert_eq!(iommufd.compat_ioas(), Ok(5));
        assert_eq!((iommufd.set_compat_ioas(&ioas), iommufd.clear_compat_ioas()), (Ok(()), Ok(())));
        let error = iommufd.change_process().unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot transfer the accounting of pinned pages to this process: EINVAL (Invalid argument)"
        );
        let other = mock_kernel(|name, _| panic!("{name}"));
        assert!(matches!(other.set_compat_ioas(&ioas), Err(Error::OtherIommufd { .. })));
    }
}
