//! Fake devices that run in the process. They work on the same memory and registers as a NIC would, for tests
//! and for counting the drivers' instructions. They can break any rule that a real device could break.

pub mod e1000;
pub mod igb;
pub(crate) mod intel;
pub mod virtio;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vireo_bus_pci::DeviceId;

/// Size of conventional PCI config space in bytes.
const LEN: usize = 256;
/// Registers of the type 0 header (PCI Local Bus 3.0, 6.1).
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
/// Size of the header in bytes, after which capabilities may follow.
const HEADER_LEN: usize = 0x40;
const COMMAND_IO: u8 = 1 << 0;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const STATUS_CAPABILITY_LIST: u8 = 1 << 4;

/// Config space of an emulated function. Clones share the bytes, so that the driver's function and the test's
/// handle see the same contents.
#[derive(Clone, Debug)]
pub struct ConfigSpace(Arc<Mutex<Bytes>>);

#[derive(Debug)]
struct Bytes {
    bytes: [u8; LEN],
    /// Offset of the byte that links to the next capability.
    last_link: usize,
    /// Offset of the first free byte after the capabilities.
    end: usize,
}

impl ConfigSpace {
    /// Creates the config space of a function with this id: no BAR, no capability, disabled.
    pub fn new(id: DeviceId) -> Self {
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&id.vendor.to_le_bytes());
        bytes[2..4].copy_from_slice(&id.device.to_le_bytes());
        Self(Arc::new(Mutex::new(Bytes { bytes, last_link: CAPABILITY_POINTER, end: HEADER_LEN })))
    }

    /// Ignores poisoning, because a panicking test cannot leave the bytes invalid.
    fn lock(&self) -> MutexGuard<'_, Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Vendor and device id of the function.
    pub fn id(&self) -> DeviceId {
        let bytes = self.lock().bytes;
        DeviceId {
            vendor: u16::from_le_bytes([bytes[0], bytes[1]]),
            device: u16::from_le_bytes([bytes[2], bytes[3]]),
        }
    }

    /// Writes base address register `index` (0 to 5) as firmware does. `address` includes the type bits.
    ///
    /// # Panics
    /// When `index` is above 5.
    pub fn set_bar(&self, index: u8, address: u32) {
        assert!(index < 6);
        self.set(BAR0 as u16 + 4 * u16::from(index), &address.to_le_bytes());
    }

    /// Appends a capability: its id, the link to the next one, then `body`. Returns its offset.
    ///
    /// # Panics
    /// When the capability does not fit.
    pub fn add_capability(&self, id: u8, body: &[u8]) -> u16 {
        let mut space = self.lock();
        let offset = space.end.next_multiple_of(4);
        let end = offset + 2 + body.len();
        assert!(end <= LEN, "config space is full");
        let link = space.last_link;
        space.bytes[link] = offset as u8;
        space.bytes[offset] = id;
        space.bytes[offset + 2..end].copy_from_slice(body);
        space.bytes[STATUS] |= STATUS_CAPABILITY_LIST;
        space.last_link = offset + 1;
        space.end = end;
        offset as u16
    }

    /// Reads at `offset`. Bytes beyond the end read as all ones.
    pub fn read(&self, offset: u16, bytes: &mut [u8]) {
        let space = self.lock();
        for (at, byte) in (usize::from(offset)..).zip(bytes) {
            *byte = space.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Performs a driver's write. Only the command register and the bytes after the header change.
    pub fn write(&self, offset: u16, bytes: &[u8]) {
        let mut space = self.lock();
        for (at, byte) in (usize::from(offset)..LEN).zip(bytes) {
            if (COMMAND..STATUS).contains(&at) || at >= HEADER_LEN {
                space.bytes[at] = *byte;
            }
        }
    }

    /// Writes any bytes anywhere, as a misbehaving device does. Bytes beyond the end are lost.
    pub fn set(&self, offset: u16, bytes: &[u8]) {
        let mut space = self.lock();
        for (at, byte) in (usize::from(offset)..LEN).zip(bytes) {
            space.bytes[at] = *byte;
        }
    }

    /// Whether the function responds to accesses to I/O ports.
    pub fn io_enabled(&self) -> bool {
        self.lock().bytes[COMMAND] & COMMAND_IO != 0
    }

    /// Whether the function responds to memory accesses.
    pub fn memory_enabled(&self) -> bool {
        self.lock().bytes[COMMAND] & COMMAND_MEMORY != 0
    }

    /// Whether the function may start DMA.
    pub fn bus_master(&self) -> bool {
        self.lock().bytes[COMMAND] & COMMAND_BUS_MASTER != 0
    }

    /// Clears the command register, as a function reset does.
    pub fn reset(&self) {
        self.lock().bytes[COMMAND..STATUS].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_linked_and_the_header_is_read_only() {
        let space = ConfigSpace::new(DeviceId { vendor: 0x8086, device: 0x10d3 });
        let first = space.add_capability(9, &[1, 2, 3]);
        let second = space.add_capability(17, &[4; 10]);
        let mut bytes = [0; 5];
        space.read(first, &mut bytes);
        assert_eq!((first, bytes), (0x40, [9, second as u8, 1, 2, 3]));
        space.write(0, &[0; 8]);
        assert_eq!(space.id().to_string(), "8086:10d3");
        space.write(COMMAND as u16, &[4, 0]);
        assert!(space.bus_master());
        space.reset();
        assert!(!space.bus_master());
        space.read(255, &mut bytes);
        assert_eq!(bytes[1..], [0xff; 4]);
    }
}
