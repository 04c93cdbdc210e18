//! Interrupts of a [`Device`], each delivered to an eventfd.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Operation, Result};
use crate::{Device, sys};

/// Kinds of interrupt of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Irq {
    /// Legacy interrupt line (INTx). The kernel masks it when it fires, and [`Device::unmask`] arms it again.
    Intx,
    /// Message-signaled interrupts (MSI).
    Msi,
    /// Message-signaled interrupts with a vector table (MSI-X).
    Msix,
    /// Report of an uncorrectable error (AER).
    Error,
    /// Request from the kernel to release the device.
    Request,
}

impl Irq {
    fn index(self) -> u32 {
        match self {
            Self::Intx => sys::VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => sys::VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => sys::VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => sys::VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => sys::VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

/// Properties of one kind of interrupt of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IrqInfo {
    /// Number of interrupts; 0 if the device has none of this kind.
    pub count: u32,
    /// Whether an eventfd can receive the interrupt.
    pub eventfd: bool,
    /// Whether the kernel masks the interrupt when it fires.
    pub automasked: bool,
}

/// Notification that the kernel wants a device to be released, because it is being unplugged or unbound. The
/// kernel waits until the device is closed, and repeats the request every ten seconds.
#[derive(Debug)]
pub struct Request(EventFd);

impl Request {
    /// Returns whether a request arrived since the last call, without waiting.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }
}

/// Length of the header of `struct vfio_irq_set`, in 32-bit words.
const HEADER: usize = 5;

impl<K> Device<K> {
    /// Reads the properties of the interrupts of kind `irq` (`VFIO_DEVICE_GET_IRQ_INFO`).
    ///
    /// # Errors
    /// When the kernel does not support this kind for the device.
    pub fn irq_info(&self, irq: Irq) -> Result<IrqInfo> {
        let mut info = sys::vfio_irq_info {
            argsz: size_of::<sys::vfio_irq_info>() as u32,
            flags: 0,
            index: irq.index(),
            count: 0,
        };
        // SAFETY: the structure is complete and has no addresses.
        unsafe { sys::call(self.as_fd(), sys::VFIO_DEVICE_GET_IRQ_INFO, &mut info) }
            .map_err(|errno| Operation::IrqInfo { device: self.name.clone(), irq }.failed(errno))?;
        Ok(IrqInfo {
            count: info.count,
            eventfd: info.flags & sys::VFIO_IRQ_INFO_EVENTFD != 0,
            automasked: info.flags & sys::VFIO_IRQ_INFO_AUTOMASKED != 0,
        })
    }

    /// Delivers interrupt `i` of this kind to `eventfds[i]`, replacing the previous eventfds.
    ///
    /// # Errors
    /// When the device has fewer interrupts, or another kind is enabled.
    pub fn enable_irq(&self, irq: Irq, eventfds: &[BorrowedFd<'_>]) -> Result<()> {
        if matches!(irq, Irq::Msi | Irq::Msix) {
            // The kernel keeps vectors beyond `eventfds` enabled, so disable all of them first. It returns
            // EINVAL if none is enabled.
            match self.disable_irq(irq) {
                Err(error) if error.errno() != Some(Errno::EINVAL) => return Err(error),
                _ => {}
            }
        }
        let fds = eventfds.iter().map(|fd| fd.as_raw_fd() as u32);
        self.set_irqs(
            irq,
            sys::VFIO_IRQ_SET_DATA_EVENTFD | sys::VFIO_IRQ_SET_ACTION_TRIGGER,
            eventfds.len() as u32,
            fds,
        )
    }

    /// Starts to watch for requests from the kernel to release the device.
    ///
    /// # Errors
    /// When the device has no such interrupt, or no eventfd can be created.
    pub fn watch_release_request(&self) -> Result<Request> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno: Errno| Operation::Eventfd(self.name.clone()).failed(errno))?;
        self.enable_irq(Irq::Request, &[event.as_fd()])?;
        Ok(Request(event))
    }

    /// Disables interrupts of this kind.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn disable_irq(&self, irq: Irq) -> Result<()> {
        self.set_irqs(irq, sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_TRIGGER, 0, [])
    }

    /// Arms an automasked interrupt again.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn unmask(&self, irq: Irq) -> Result<()> {
        self.set_irqs(irq, sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_UNMASK, 1, [])
    }

    /// Arms an automasked interrupt again at each write to `eventfd`, which takes less than [`Device::unmask`] and
    /// needs no access to the device.
    ///
    /// # Errors
    /// When the ioctl fails; the interrupt must be enabled.
    pub fn unmask_by(&self, irq: Irq, eventfd: BorrowedFd<'_>) -> Result<()> {
        let flags = sys::VFIO_IRQ_SET_DATA_EVENTFD | sys::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set_irqs(irq, flags, 1, [eventfd.as_raw_fd() as u32])
    }

    /// Triggers interrupt 0 of this kind in software, to test its delivery.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn trigger(&self, irq: Irq) -> Result<()> {
        self.set_irqs(irq, sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_TRIGGER, 1, [])
    }

    fn set_irqs(&self, irq: Irq, flags: u32, count: u32, data: impl IntoIterator<Item = u32>) -> Result<()> {
        let mut set = vec![0, flags, irq.index(), 0, count];
        debug_assert_eq!(set.len(), HEADER);
        set.extend(data);
        set[0] = (set.len() * size_of::<u32>()) as u32;
        // SAFETY: the words are a `vfio_irq_set` and its data, `argsz` bytes in total. Descriptors in the
        // data stay open during the call.
        unsafe { sys::ioctl(self.as_fd(), sys::VFIO_DEVICE_SET_IRQS, set.as_mut_ptr().cast()) }
            .map(drop)
            .map_err(|errno| Operation::SetIrqs { device: self.name.clone(), irq }.failed(errno))
    }
}
