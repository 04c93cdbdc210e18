//! Access to a PCI function for a driver, backed by the kernel or by a test.

use std::os::fd::AsFd;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::bdf::Bdf;
use vireo_eal::event::Event;
use vireo_eal::handover::{Fds, ReceivedFds};
use vireo_eal::mmio::Bar;
use vireo_eal::vfio::{Device, Irq};
use vireo_eal::{Error, ErrorKind, Result};

/// PCI vendor and device id, as in the first four bytes of config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId {
    /// Vendor id, such as `0x8086`.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
}

impl std::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.device)
    }
}

/// An [`Interrupt`] that is enabled, for another process. Its events are numbers of descriptors.
#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
pub struct InterruptRecord {
    event: u32,
    unmask: Option<u32>,
}

/// Interrupt of a function.
#[derive(Clone, Debug)]
pub struct Interrupt {
    event: Event,
    unmask: Option<Event>,
}

impl Interrupt {
    /// Creates an interrupt that signals `event`. If the kernel masks it when it fires, signaling `unmask` unmasks
    /// it.
    pub fn new(event: Event, unmask: Option<Event>) -> Self {
        Self { event, unmask }
    }

    /// Describes the interrupt for another process, with its descriptors in `fds`.
    pub fn record<'a>(&'a self, fds: &mut Fds<'a>) -> InterruptRecord {
        let unmask = self.unmask.as_ref().map(|unmask| fds.add(unmask.as_fd()));
        InterruptRecord { event: fds.add(self.event.as_fd()), unmask }
    }

    /// Returns the interrupt that another process has described.
    ///
    /// # Errors
    /// `Protocol` when a descriptor is missing.
    pub fn of(record: &InterruptRecord, fds: &ReceivedFds) -> Result<Self> {
        let event = |number| fds.get(number).map(Event::from_fd);
        Ok(Self { event: event(record.event)?, unmask: record.unmask.map(event).transpose()? })
    }

    /// Event that the interrupt signals.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Whether the interrupt is a line (INTx), which [`Function::allow_intx`] must allow.
    pub fn is_line(&self) -> bool {
        self.unmask.is_some()
    }

    /// Lets the interrupt fire again. The kernel masks a line that several functions may share (INTx) when it
    /// fires.
    pub fn unmask(&self) {
        if let Some(unmask) = &self.unmask {
            unmask.signal();
        }
    }
}

/// A PCI function that a driver owns. This is for setup only: nothing here is on the packet path.
///
/// The kernel resets the function when it is opened, if it can be reset.
pub trait Function: Send {
    /// PCI address of the function.
    fn address(&self) -> Bdf;

    /// Vendor and device id of the function.
    fn id(&self) -> DeviceId;

    /// Reads config space at `offset`. Bytes beyond its end read as all ones, as on the bus.
    fn read_config(&self, offset: u16, bytes: &mut [u8]);

    /// Writes config space at `offset`.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<()>;

    /// Returns base address register `index` (0 to 5).
    ///
    /// # Errors
    /// `Unavailable` when the function has no such BAR.
    fn bar(&self, index: u8) -> Result<Bar>;

    /// Resets the function. Returns false if it has no function reset and the driver must quiesce it instead.
    ///
    /// # Errors
    /// When the kernel attempts the reset and fails.
    fn reset(&self) -> Result<bool>;

    /// Whether an IOMMU translates the addresses that the function uses.
    fn has_iommu(&self) -> bool;

    /// Enables `count` interrupts of the first of `kinds` that has so many, and returns them in order. It replaces
    /// those of the same kind that were enabled before.
    ///
    /// # Errors
    /// `Unavailable` when no kind has so many. Otherwise when the kernel refuses.
    fn enable_interrupts(&self, kinds: &[Irq], count: u16) -> Result<Vec<Interrupt>>;

    /// The function's VFIO device, if that is behind it.
    fn vfio_device(&self) -> Option<&Device> {
        None
    }

    /// Reads 16 bits of config space.
    fn config16(&self, offset: u16) -> u16 {
        let mut bytes = [0xff; 2];
        self.read_config(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Reads 8 bits of config space.
    fn config8(&self, offset: u16) -> u8 {
        let mut bytes = [0xff];
        self.read_config(offset, &mut bytes);
        bytes[0]
    }

    /// Reads 32 bits of config space.
    fn config32(&self, offset: u16) -> u32 {
        let mut bytes = [0xff; 4];
        self.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Lets the function respond to memory accesses, and start DMA if `bus_master`. The function may not
    /// assert INTx, a line that other functions share, until [`Function::allow_intx`].
    ///
    /// # Errors
    /// When the kernel refuses the write.
    fn set_command(&self, bus_master: bool) -> Result<()> {
        let old = self.config16(COMMAND) & !COMMAND_BUS_MASTER;
        let new =
            old | COMMAND_MEMORY | COMMAND_INTX_DISABLE | if bus_master { COMMAND_BUS_MASTER } else { 0 };
        self.write_config(COMMAND, &new.to_le_bytes())
    }

    /// Lets the function assert INTx, for a driver that handles that interrupt.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    fn allow_intx(&self) -> Result<()> {
        let new = self.config16(COMMAND) & !COMMAND_INTX_DISABLE;
        self.write_config(COMMAND, &new.to_le_bytes())
    }

    /// Lets the function respond to accesses to its I/O ports.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    fn decode_io(&self) -> Result<()> {
        let new = self.config16(COMMAND) | COMMAND_IO;
        self.write_config(COMMAND, &new.to_le_bytes())
    }
}

/// Command register (PCI Local Bus 3.0, 6.2.2).
const COMMAND: u16 = 0x04;
const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register, whose bit 4 reports a capability list.
const STATUS: u16 = 0x06;
const STATUS_CAPABILITY_LIST: u16 = 1 << 4;
const CAPABILITY_POINTER: u16 = 0x34;

/// One entry of the capability list in config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability id (PCI Code and ID Assignment, chapter 2): 5 is MSI, 9 vendor-specific, 17 MSI-X.
    pub id: u8,
    /// Offset of the capability's first byte in config space.
    pub offset: u16,
}

/// Capability id of PCI Express.
pub const CAP_ID_EXPRESS: u8 = 0x10;
/// Capability id of vendor-specific capabilities, which virtio uses.
pub const CAP_ID_VENDOR: u8 = 0x09;

/// Walks the capability list of `function`.
///
/// # Errors
/// `Protocol` when the list points into the header or loops, because config space is device input.
pub fn capabilities(function: &dyn Function) -> Result<Vec<Capability>> {
    /// Number of four-byte entries that fit after the 64-byte header of a 256-byte config space.
    const MAX_CAPABILITIES: usize = (256 - 64) / 4;
    let mut found = Vec::new();
    if function.config16(STATUS) & STATUS_CAPABILITY_LIST == 0 {
        return Ok(found);
    }
    let mut offset = u16::from(function.config8(CAPABILITY_POINTER) & !3);
    while offset != 0 {
        if offset < 64 || found.len() == MAX_CAPABILITIES {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("cannot read the capabilities of {}", function.address()),
                if offset < 64 { "the list points into the header" } else { "the list loops" },
            ));
        }
        found.push(Capability { id: function.config8(offset), offset });
        offset = u16::from(function.config8(offset + 1) & !3);
    }
    Ok(found)
}
