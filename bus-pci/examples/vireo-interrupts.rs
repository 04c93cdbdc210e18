//! `vireo-interrupts BDF MODE`: fires every kind of interrupt that a PCI device has and waits for its eventfd.
//!
//! The kernel fires each kind on the program's behalf. A NIC of the e1000 family also fires it itself.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vireo_bus_pci::{Bus, DeviceId, Function, PciDevice};
use vireo_eal::mmio::Bar;
use vireo_eal::vfio::{Irq, Vfio};
use vireo_eal::{Error, ErrorKind, Result};

/// Longest wait for an interrupt in milliseconds.
const PATIENCE: u16 = 5000;

/// Interrupt cause read (and clear), cause set, mask set and mask clear (8254x SDM 13.4, 82574 DS 10.2.4).
const ICR: u64 = 0xc0;
const ICS: u64 = 0xc8;
const IMS: u64 = 0xd0;
const IMC: u64 = 0xd8;
const CAUSE_LINK: u32 = 1 << 2;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-interrupts: {error}");
            error.kind().exit_code().into()
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().collect();
    let [_, address, mode] = &words[..] else {
        return Err(Error::new(ErrorKind::Usage, "cannot start", "the arguments are not BDF MODE"));
    };
    let bus = Bus::default();
    let device = bus.open(&bus.find(address.parse()?)?, &Vfio::new(None), mode.parse()?)?;
    let mut kinds = Vec::new();
    for irq in [Irq::Intx, Irq::Msi, Irq::Msix] {
        let count = device.vfio().irq_info(irq)?.count;
        if count > 0 {
            by_software(&device, irq)?;
            kinds.push(irq);
        }
        if irq == Irq::Msix && count > 1 {
            fewer(&device)?;
        }
    }
    // Last, because QEMU 7.2's e1000e starts a throttle timer at each interrupt, and fails an assertion if
    // MSI-X is on when the timer fires.
    for irq in kinds {
        if let Some(cause) = cause(device.id(), irq) {
            by_device(&device, irq, cause)?;
        }
    }
    Ok(())
}

fn by_software(device: &PciDevice, irq: Irq) -> Result<()> {
    let event = enable(device, irq)?;
    device.vfio().trigger(irq)?;
    wait(&event, irq)?;
    println!("{irq:?}: by software");
    device.vfio().disable_irq(irq)
}

/// Checks that vectors that are not set again are released: the kernel lists each vector in use
/// (drivers/vfio/pci/vfio_pci_intrs.c).
fn fewer(device: &PciDevice) -> Result<()> {
    let (first, second) = (eventfd()?, eventfd()?);
    device.vfio().enable_irq(Irq::Msix, &[first.as_fd(), second.as_fd()])?;
    let has_second = || {
        let table = std::fs::read_to_string("/proc/interrupts")
            .map_err(|error| Error::io("cannot read /proc/interrupts", &error))?;
        Ok(table.contains(&format!("vfio-msix[1]({})", device.address())))
    };
    let before: Result<bool> = has_second();
    device.vfio().enable_irq(Irq::Msix, &[first.as_fd()])?;
    if !before? || has_second()? {
        return Err(Error::new(
            ErrorKind::Protocol,
            "cannot replace two vectors with one",
            "the second is still set",
        ));
    }
    println!("Msix: fewer vectors");
    device.vfio().disable_irq(Irq::Msix)
}

/// Returns a cause that the chip can report through `irq`, or `None` if there is no usable one.
fn cause(id: DeviceId, irq: Irq) -> Option<u32> {
    match (id.vendor, id.device, irq) {
        // QEMU 7.2 also fails an assertion if the throttle timer of MSI-X fires after MSI-X was disabled.
        (0x8086, 0x10d3, Irq::Msix) => None,
        (0x8086, 0x10d3 | 0x100e, _) => Some(CAUSE_LINK),
        _ => None,
    }
}

/// Fires the interrupt twice, because the first one may leave it masked: in the chip until ICR is read, and
/// an INTx line also in the kernel until it is unmasked.
fn by_device(device: &PciDevice, irq: Irq, cause: u32) -> Result<()> {
    // An MSI is a memory write, which only a bus master makes.
    device.set_command(true)?;
    device.allow_intx()?;
    let registers = device.bar(0)?;
    quiet(&registers);
    let event = enable(device, irq)?;
    for round in ["first", "second"] {
        registers.write32(IMS, cause);
        registers.write32(ICS, cause);
        wait(&event, irq)?;
        println!("{irq:?}: by the device, {round}");
        quiet(&registers);
        if device.vfio().irq_info(irq)?.automasked {
            device.vfio().unmask(irq)?;
        }
    }
    device.vfio().disable_irq(irq)?;
    device.set_command(false)
}

fn quiet(registers: &Bar) {
    registers.write32(IMC, u32::MAX);
    registers.read32(ICR);
}

fn eventfd() -> Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|errno| Error::os("cannot create an eventfd", errno))
}

fn enable(device: &PciDevice, irq: Irq) -> Result<EventFd> {
    let event = eventfd()?;
    device.vfio().enable_irq(irq, &[event.as_fd()])?;
    Ok(event)
}

fn wait(event: &EventFd, irq: Irq) -> Result<()> {
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut fds, PATIENCE).map_err(|errno| Error::os("cannot poll", errno))?;
    if ready == 0 {
        return Err(Error::new(
            ErrorKind::Protocol,
            format!("no {irq:?} interrupt"),
            "its eventfd was not signaled",
        ));
    }
    event.read().map(drop).map_err(|errno| Error::os("cannot read an eventfd", errno))
}
