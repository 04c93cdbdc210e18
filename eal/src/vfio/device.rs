//! An acquired device: regions, config space, interrupts and reset, the same in every mode.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vireo_vfio::{Irq, IrqInfo, PCI_CONFIG_REGION, RegionFile, Request};

use super::space::AddressSpace;
use crate::error::{Error, ErrorKind, Result};
use crate::mmio::Bar;

/// VFIO device. When it is closed, the kernel disables its DMA and resets it if it can, so drop it before the
/// memory that it was given. It is closed when this value, its config space and its BARs with their doorbells
/// are all dropped. It then leaves its container or address space, which is released last.
#[derive(Debug)]
pub struct Device(vireo_vfio::Device<Held>);

/// What an open device holds until it is closed. The device is attached to the address space or uses physical
/// addresses, so it may access memory as long as its file is open.
#[derive(Debug)]
pub(crate) struct Held {
    /// The device's group, in the modes that have one. The last device of a group closes it: the group then
    /// leaves its container, and other processes can open it.
    pub(crate) group: Option<Arc<File>>,
    pub(crate) space: Arc<AddressSpace>,
}

/// Descriptor of a device, and what the device holds.
pub(super) struct Open {
    pub(super) fd: OwnedFd,
    pub(super) held: Held,
}

impl Device {
    pub(super) fn new(name: String, open: Open) -> Result<Self> {
        // SAFETY: the descriptor is that of a device that is bound to iommufd or comes from its group.
        Ok(Self(unsafe { vireo_vfio::Device::new(name, open.fd, open.held) }?))
    }

    /// Name of the device on its bus.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// What the device holds while it is open.
    pub(super) fn held(&self) -> &Held {
        self.0.kept()
    }

    /// Address space: what the device can reach.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.0.kept().space
    }

    /// Base address register `index` (0 to 5) of a PCI device, mapped where the kernel allows it.
    ///
    /// # Errors
    /// `Unavailable` if the device has no such BAR.
    pub fn bar(&self, index: u8) -> Result<Bar> {
        let what = || format!("cannot map BAR {index} of {}", self.name());
        if index > 5 {
            return Err(Error::new(ErrorKind::Unavailable, what(), "there are only BARs 0 to 5"));
        }
        let region = self.0.region(index.into())?;
        if region.size == 0 {
            return Err(Error::new(ErrorKind::Unavailable, what(), "the device has no such BAR"));
        }
        let mapped = self.0.map_region(index.into(), &region).map_err(|error| match error.errno() {
            Some(errno) => Error::os(what(), errno),
            None => error.into(),
        })?;
        Ok(Bar::device(mapped, self.0.region_file(&region)))
    }

    /// The device's PCI config space.
    ///
    /// # Errors
    /// If the kernel provides none, because the device is not a PCI device.
    pub fn config_space(&self) -> Result<ConfigSpace> {
        if !self.0.is_pci() {
            let what = format!("cannot access the config space of {}", self.name());
            return Err(Error::new(ErrorKind::Unavailable, what, "it is not a PCI device"));
        }
        let region = self.0.region(PCI_CONFIG_REGION)?;
        Ok(ConfigSpace(self.0.region_file(&region)))
    }

    /// Resets the device (`VFIO_DEVICE_RESET`). Returns false if it has no reset of its own.
    ///
    /// # Errors
    /// If the kernel tried to reset the device and failed.
    pub fn reset(&self) -> Result<bool> {
        Ok(self.0.reset()?)
    }

    /// Returns what the device supports of the interrupt kind `irq`.
    ///
    /// # Errors
    /// If the kernel does not know this kind for the device.
    pub fn irq_info(&self, irq: Irq) -> Result<IrqInfo> {
        Ok(self.0.irq_info(irq)?)
    }

    /// Delivers interrupt `i` of this kind to `eventfds[i]`, replacing what was set before.
    ///
    /// # Errors
    /// If the device has fewer interrupts, or if another kind is enabled.
    pub fn enable_irq(&self, irq: Irq, eventfds: &[BorrowedFd<'_>]) -> Result<()> {
        Ok(self.0.enable_irq(irq, eventfds)?)
    }

    /// Watches for the kernel's request to release the device.
    ///
    /// # Errors
    /// If the kernel has no such interrupt, or if no eventfd can be created.
    pub fn watch_release_request(&self) -> Result<Request> {
        Ok(self.0.watch_release_request()?)
    }

    /// Stops the delivery of interrupts of this kind.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn disable_irq(&self, irq: Irq) -> Result<()> {
        Ok(self.0.disable_irq(irq)?)
    }

    /// Unmasks an automasked interrupt, so that it can fire again.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unmask(&self, irq: Irq) -> Result<()> {
        Ok(self.0.unmask(irq)?)
    }

    /// Unmasks an automasked interrupt whenever `eventfd` is signaled.
    ///
    /// # Errors
    /// If the kernel refuses; the interrupt must be enabled.
    pub fn unmask_by(&self, irq: Irq, eventfd: BorrowedFd<'_>) -> Result<()> {
        Ok(self.0.unmask_by(irq, eventfd)?)
    }

    /// Fires interrupt 0 of this kind by software, to check that it arrives.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn trigger(&self, irq: Irq) -> Result<()> {
        Ok(self.0.trigger(irq)?)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// PCI config space of a [`Device`], accessed by `pread` and `pwrite` on the device's descriptor.
#[derive(Debug)]
pub struct ConfigSpace(RegionFile<Held>);

impl ConfigSpace {
    /// Reads `bytes` at `offset`. If they extend beyond the end, or the device does not answer, all are 0xff.
    pub fn read(&self, offset: u16, bytes: &mut [u8]) {
        if self.0.read(offset.into(), bytes).is_err() {
            bytes.fill(0xff);
        }
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// If the kernel refuses, or if `bytes` extend beyond config space.
    pub fn write(&self, offset: u16, bytes: &[u8]) -> Result<()> {
        self.0
            .write(offset.into(), bytes)
            .map_err(|error| Error::io(format!("cannot write config space at {offset:#x}"), &error))
    }
}

/// Creates a file that stands in for a device's.
#[cfg(test)]
pub(crate) fn fake_file(file: File) -> Arc<vireo_vfio::DeviceFile<Held>> {
    let held = Held { group: None, space: Arc::new(AddressSpace::for_tests()) };
    // SAFETY: the file is only read and written.
    Arc::new(unsafe { vireo_vfio::DeviceFile::new(file.into(), held) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn config_space_ends_where_it_ends() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 64], 0).unwrap();
        let config = ConfigSpace(RegionFile::new(&fake_file(file.try_clone().unwrap()), 16, 32));
        let mut bytes = [0; 4];
        config.read(28, &mut bytes);
        assert_eq!(bytes, [7; 4]);
        for offset in [29, 32, u16::MAX] {
            config.read(offset, &mut bytes);
            assert_eq!(bytes, [0xff; 4]);
            assert!(config.write(offset, &[0; 4]).is_err());
        }
        config.write(28, &[0; 4]).unwrap();
        let mut all = [0; 64];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte == 7).count(), 60);
    }
}
