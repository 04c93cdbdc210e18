//! Selects functions by the user's arguments, and acquires them for this process.

use std::os::fd::AsFd;

use vireo_eal::args::{EalArgs, VfioInterrupt};
use vireo_eal::bdf::Bdf;
use vireo_eal::event::Event;
use vireo_eal::handover::ReceivedFds;
use vireo_eal::mmio::Bar;
use vireo_eal::vfio::{Acquired, ConfigSpace, Device, DeviceFds, DeviceRecord, Irq, Phase, Vfio, VfioMode};
use vireo_eal::{Error, ErrorKind, Result};

use crate::{Bus, DeviceId, Function, Interrupt, PciInfo};

/// The kernel driver that hands functions to user space.
pub const VFIO_DRIVER: &str = "vfio-pci";

/// A PCI function that this process owns through VFIO, in any mode.
#[derive(Debug)]
pub struct PciDevice {
    address: Bdf,
    id: DeviceId,
    config: ConfigSpace,
    device: Device,
    /// The only kind of interrupt that may be used, if the user chose one.
    interrupts: Option<Irq>,
    /// VFIO mode, the reason for it, and the steps of the acquisition.
    pub report: Report,
}

/// How a function was acquired.
#[derive(Clone, Debug)]
pub struct Report {
    /// VFIO mode; never `auto`.
    pub mode: VfioMode,
    /// Reason for the mode.
    pub why: String,
    /// Steps of the acquisition and their times.
    pub phases: Vec<Phase>,
}

impl Bus {
    /// Returns the functions that the arguments choose: with `--allow` exactly those, else every function
    /// that is bound to VFIO, known to a driver and not blocked. Functions are sorted by address, which
    /// determines their port numbers.
    ///
    /// # Errors
    /// When a function of `--allow` does not exist, is not known to a driver here, or is not bound to VFIO.
    pub fn select(&self, args: &EalArgs, known: impl Fn(DeviceId) -> bool) -> Result<Vec<PciInfo>> {
        if args.no_pci {
            return Ok(Vec::new());
        }
        if args.allow.is_empty() {
            let usable = |info: &PciInfo| {
                self.is_on_vfio(info) && known(info.id) && !args.block.contains(&info.address)
            };
            return Ok(self.scan()?.into_iter().filter(usable).collect());
        }
        let mut chosen = args
            .allow
            .iter()
            .map(|allowed| {
                let info = self.find(allowed.address)?;
                self.usable(&info, &known)?;
                Ok(info)
            })
            .collect::<Result<Vec<_>>>()?;
        chosen.sort_by_key(|info| info.address);
        Ok(chosen)
    }

    /// Whether `info` is bound to vfio-pci or to a variant driver that also gives devices to VFIO
    /// (mlx5-vfio-pci, virtio-vfio-pci, …; drivers/vfio/pci of the kernel). Since Linux 6.1, `vfio-dev` in
    /// sysfs identifies variant drivers.
    pub fn is_on_vfio(&self, info: &PciInfo) -> bool {
        info.driver.as_deref() == Some(VFIO_DRIVER) || self.path(info.address).join("vfio-dev").is_dir()
    }

    /// Checks that a program can acquire `info`: a driver knows it, and it is bound to VFIO.
    ///
    /// # Errors
    /// `Unavailable` when not. If only the binding is missing, the hint is the command for it.
    pub fn usable(&self, info: &PciInfo, known: impl Fn(DeviceId) -> bool) -> Result<()> {
        let refuse =
            |why: String| Error::new(ErrorKind::Unavailable, format!("cannot use {}", info.address), why);
        if !known(info.id) {
            return Err(refuse(format!("no driver supports {}", info.id)));
        }
        if self.is_on_vfio(info) {
            return Ok(());
        }
        let why = match info.driver.as_deref() {
            Some(driver) => format!("it is bound to the kernel driver {driver}"),
            None => "it is bound to no driver".into(),
        };
        let bind = format!("vireo-devbind --bind {VFIO_DRIVER} {}", info.address);
        Err(match self.has_driver(VFIO_DRIVER) {
            true => refuse(why).with_hint(format!("run: {bind}")),
            false => refuse(format!("{why}, and {VFIO_DRIVER} is not loaded"))
                .with_hint(format!("run: modprobe {VFIO_DRIVER} && {bind}")),
        })
    }

    /// Acquires one function through VFIO in `mode`.
    ///
    /// # Errors
    /// The same as [`Vfio::acquire`].
    pub fn open(&self, info: &PciInfo, vfio: &Vfio, mode: VfioMode) -> Result<PciDevice> {
        PciDevice::new(info, vfio.acquire(&self.device(info.address), mode)?)
    }

    /// Takes over one function through file descriptors that another process opened.
    ///
    /// # Errors
    /// The same as [`Vfio::adopt`].
    pub fn adopt(&self, info: &PciInfo, vfio: &Vfio, mode: VfioMode, fds: DeviceFds) -> Result<PciDevice> {
        PciDevice::new(info, vfio.adopt(&self.device(info.address), mode, fds)?)
    }

    /// Takes over one function that another process uses, without an access to it.
    ///
    /// # Errors
    /// The same as [`Vfio::take_over`].
    pub fn take_over(
        &self,
        info: &PciInfo,
        vfio: &Vfio,
        record: &DeviceRecord,
        fds: &ReceivedFds,
    ) -> Result<PciDevice> {
        PciDevice::new(info, vfio.take_over(&self.device(info.address), record, fds)?)
    }
}

impl PciDevice {
    fn new(info: &PciInfo, acquired: Acquired) -> Result<Self> {
        let Acquired { device, mode, why, phases, .. } = acquired;
        Ok(Self {
            address: info.address,
            id: info.id,
            config: device.config_space()?,
            device,
            interrupts: None,
            report: Report { mode, why, phases },
        })
    }

    /// Uses interrupts of no other kind than `kind`, if it is given.
    #[must_use]
    pub fn with_interrupts(self, kind: Option<VfioInterrupt>) -> Self {
        let interrupts = kind.map(|kind| match kind {
            VfioInterrupt::Legacy => Irq::Intx,
            VfioInterrupt::Msi => Irq::Msi,
            VfioInterrupt::Msix => Irq::Msix,
        });
        Self { interrupts, ..self }
    }

    /// The VFIO device, for its interrupts and its address space.
    pub fn vfio(&self) -> &Device {
        &self.device
    }
}

impl Function for PciDevice {
    fn address(&self) -> Bdf {
        self.address
    }

    fn id(&self) -> DeviceId {
        self.id
    }

    fn read_config(&self, offset: u16, bytes: &mut [u8]) {
        self.config.read(offset, bytes);
    }

    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<()> {
        self.config.write(offset, bytes)
    }

    fn bar(&self, index: u8) -> Result<Bar> {
        self.device.bar(index)
    }

    fn reset(&self) -> Result<bool> {
        self.device.reset()
    }

    fn has_iommu(&self) -> bool {
        !self.device.space().is_physical()
    }

    fn vfio_device(&self) -> Option<&Device> {
        Some(&self.device)
    }

    fn enable_interrupts(&self, kinds: &[Irq], count: u16) -> Result<Vec<Interrupt>> {
        let what = format!("cannot use interrupts of {}", self.address);
        let asked: Vec<Irq> =
            kinds.iter().copied().filter(|kind| self.interrupts.is_none_or(|only| only == *kind)).collect();
        if asked.is_empty() {
            let why = format!("its driver uses {}", names(kinds));
            return Err(Error::new(ErrorKind::Usage, what, why).with_hint("start without --vfio-intr"));
        }
        for &kind in &asked {
            let info = self.device.irq_info(kind)?;
            if info.count < count.into() {
                continue;
            }
            let events = (0..count).map(|_| Event::new()).collect::<Result<Vec<_>>>()?;
            let fds: Vec<_> = events.iter().map(Event::as_fd).collect();
            self.device.enable_irq(kind, &fds)?;
            let unmask = match info.automasked {
                true => {
                    let unmask = Event::new()?;
                    self.device.unmask_by(kind, unmask.as_fd())?;
                    Some(unmask)
                }
                false => None,
            };
            return Ok(events.into_iter().map(|event| Interrupt::new(event, unmask.clone())).collect());
        }
        let why = format!("{count} of {} are needed, but it has fewer", names(&asked));
        Err(Error::new(ErrorKind::Unavailable, what, why))
    }
}

/// Names kinds of interrupt as the PCI specifications do.
fn names(kinds: &[Irq]) -> String {
    let name = |kind: &Irq| match kind {
        Irq::Intx => "INTx".to_owned(),
        Irq::Msi => "MSI".to_owned(),
        Irq::Msix => "MSI-X".to_owned(),
        other => format!("{other:?}"),
    };
    kinds.iter().map(name).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::tests::fake_bus;
    use vireo_eal::args::{Outcome, Program, parse};

    fn args(line: &str) -> EalArgs {
        let argv = ["test"].into_iter().chain(line.split_whitespace()).map(Into::into);
        match parse(argv, &Program::default()).unwrap() {
            Outcome::Run(parsed) => parsed.eal,
            Outcome::Print(text) => panic!("{text}"),
        }
    }

    fn selected(line: &str) -> Result<Vec<String>> {
        let (dir, bus) = fake_bus(&[
            ("0000:00:03.0", "8086", "100e", "vfio-pci"),
            ("0000:00:04.0", "8086", "10d3", "e1000e"),
            ("0000:00:05.0", "8086", "10d3", "vfio-pci"),
            ("0000:00:06.0", "abcd", "0001", "vfio-pci"),
            ("0000:00:07.0", "8086", "10d3", "igb-vfio-pci"),
        ]);
        std::fs::create_dir_all(dir.path().join("devices/0000:00:07.0/vfio-dev/vfio3")).unwrap();
        let known = |id: DeviceId| id.vendor == 0x8086;
        Ok(bus.select(&args(line), known)?.iter().map(|info| info.address.to_string()).collect())
    }

    #[test]
    fn without_lists_every_usable_function() {
        assert_eq!(selected("").unwrap(), ["0000:00:03.0", "0000:00:05.0", "0000:00:07.0"]);
        assert_eq!(selected("-b 00:03.0").unwrap(), ["0000:00:05.0", "0000:00:07.0"]);
        assert!(selected("--no-pci").unwrap().is_empty());
    }

    #[test]
    fn the_allow_list_chooses_and_addresses_order() {
        assert_eq!(selected("-a 00:07.0 -a 00:03.0").unwrap(), ["0000:00:03.0", "0000:00:07.0"]);
    }

    #[test]
    fn what_cannot_be_used_says_why_and_what_to_type() {
        let bound = selected("-a 00:04.0").unwrap_err().to_string();
        assert!(
            bound.contains("kernel driver e1000e; run: vireo-devbind --bind vfio-pci 0000:00:04.0"),
            "{bound}"
        );
        let (_dir, bus) = fake_bus(&[("0000:00:04.0", "8086", "10d3", "")]);
        let unloaded = bus.select(&args("-a 00:04.0"), |_| true).unwrap_err().to_string();
        assert!(
            unloaded
                .contains("no driver, and vfio-pci is not loaded; run: modprobe vfio-pci && vireo-devbind"),
            "{unloaded}"
        );
        assert!(selected("-a 00:06.0").unwrap_err().to_string().contains("abcd:0001"));
        assert!(selected("-a 00:08.0").unwrap_err().to_string().contains("no such PCI device"));
    }
}
