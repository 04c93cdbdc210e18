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
    /// The legacy line. The kernel masks it when it fires; [`Device::unmask`] arms it again.
    Intx,
    /// Message-signalled.
    Msi,
    /// Message-signalled, by a table.
    Msix,
    /// An uncorrectable error was reported (AER).
    Error,
    /// The kernel asks for the device back.
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

/// What the device has of one kind of interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IrqInfo {
    /// Number of interrupts; 0 when the device has none of this kind.
    pub count: u32,
    /// Whether an eventfd can receive it.
    pub eventfd: bool,
    /// Whether the kernel masks it when it fires.
    pub automasked: bool,
}

/// Hears that the kernel wants a device back, because it is to be unplugged or unbound. Until the device is closed
/// the kernel waits, and asks again every ten seconds.
#[derive(Debug)]
pub struct Request(EventFd);

impl Request {
    /// Whether it asked since the last call; does not wait.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }
}

/// Header of `struct vfio_irq_set`, in 32-bit words.
const HEADER: usize = 5;

impl<K> Device<K> {
    /// What the device has of `irq`.
    ///
    /// # Errors
    /// When the kernel does not know this kind for the device.
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

    /// Delivers interrupt `i` of this kind to `eventfds[i]`, replacing what was set before.
    ///
    /// # Errors
    /// When the device has fewer interrupts, or another kind is enabled.
    pub fn enable_irq(&self, irq: Irq, eventfds: &[BorrowedFd<'_>]) -> Result<()> {
        if matches!(irq, Irq::Msi | Irq::Msix) {
            // The kernel leaves vectors beyond these as they were; EINVAL is its answer when there are none.
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

    /// Listens for the kernel's wish to have the device back.
    ///
    /// # Errors
    /// When the kernel has no such interrupt, or no eventfd.
    pub fn watch_release_request(&self) -> Result<Request> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno: Errno| Operation::Eventfd(self.name.clone()).failed(errno))?;
        self.enable_irq(Irq::Request, &[event.as_fd()])?;
        Ok(Request(event))
    }

    /// Ends delivery of this kind.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn disable_irq(&self, irq: Irq) -> Result<()> {
        self.set_irqs(irq, sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_TRIGGER, 0, [])
    }

    /// Arms an automasked interrupt again.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmask(&self, irq: Irq) -> Result<()> {
        self.set_irqs(irq, sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_UNMASK, 1, [])
    }

    /// Fires interrupt 0 of this kind by software, to see that it arrives.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn trigger(&self, irq: Irq) -> Result<()> {
        self.set_irqs(irq, sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_TRIGGER, 1, [])
    }

    fn set_irqs(&self, irq: Irq, flags: u32, count: u32, data: impl IntoIterator<Item = u32>) -> Result<()> {
        let mut set = vec![0, flags, irq.index(), 0, count];
        debug_assert_eq!(set.len(), HEADER);
        set.extend(data);
        set[0] = (set.len() * size_of::<u32>()) as u32;
        // SAFETY: the words are a `vfio_irq_set` of `argsz` bytes with its data behind it; descriptors in it
        // are open for the call.
        unsafe { sys::ioctl(self.as_fd(), sys::VFIO_DEVICE_SET_IRQS, set.as_mut_ptr().cast()) }
            .map(drop)
            .map_err(|errno| Operation::SetIrqs { device: self.name.clone(), irq }.failed(errno))
    }
}
