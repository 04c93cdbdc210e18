//! Device halves that run in the process: what the NIC does, played over the same memory and registers, for
//! tests and for counting the drivers' instructions. They keep no rule that a real device could break.

pub mod e1000;
pub mod igb;
pub(crate) mod intel;
pub mod virtio;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vireo_bus_pci::DeviceId;

/// Bytes of conventional PCI config space.
const LEN: usize = 256;
/// Registers of the type 0 header (PCI Local Bus 3.0, 6.1).
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
/// First byte behind the header, where capabilities may be.
const HEADER_LEN: usize = 0x40;
const COMMAND_IO: u8 = 1 << 0;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const STATUS_CAPABILITY_LIST: u8 = 1 << 4;

/// Config space of a function that a program plays. Clones share the bytes, so that the function given to a
/// driver and the handle of the test see the same.
#[derive(Clone, Debug)]
pub struct ConfigSpace(Arc<Mutex<Bytes>>);

#[derive(Debug)]
struct Bytes {
    bytes: [u8; LEN],
    /// Offset of the byte that points to the next capability.
    last_link: usize,
    /// First free byte behind the capabilities.
    end: usize,
}

impl ConfigSpace {
    /// Config space of a function with this id: no BAR, no capability, disabled.
    pub fn new(id: DeviceId) -> Self {
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&id.vendor.to_le_bytes());
        bytes[2..4].copy_from_slice(&id.device.to_le_bytes());
        Self(Arc::new(Mutex::new(Bytes { bytes, last_link: CAPABILITY_POINTER, end: HEADER_LEN })))
    }

    /// Whatever a panicking test left, config space stays bytes.
    fn lock(&self) -> MutexGuard<'_, Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the function is.
    pub fn id(&self) -> DeviceId {
        let bytes = self.lock().bytes;
        DeviceId {
            vendor: u16::from_le_bytes([bytes[0], bytes[1]]),
            device: u16::from_le_bytes([bytes[2], bytes[3]]),
        }
    }

    /// Writes the address register of BAR `index` (0 to 5) as firmware does: `address` with its type bits.
    ///
    /// # Panics
    /// When there is no such BAR.
    pub fn set_bar(&self, index: u8, address: u32) {
        assert!(index < 6);
        self.set(BAR0 as u16 + 4 * u16::from(index), &address.to_le_bytes());
    }

    /// Appends a capability: its id, the link to the next, then `body`. Gives its offset.
    ///
    /// # Panics
    /// When it does not fit.
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

    /// Reads at `offset`; all ones beyond the end.
    pub fn read(&self, offset: u16, bytes: &mut [u8]) {
        let space = self.lock();
        for (at, byte) in (usize::from(offset)..).zip(bytes) {
            *byte = space.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Takes a driver's write: the command register and what is behind the header change, the rest does not.
    pub fn write(&self, offset: u16, bytes: &[u8]) {
        let mut space = self.lock();
        for (at, byte) in (usize::from(offset)..LEN).zip(bytes) {
            if (COMMAND..STATUS).contains(&at) || at >= HEADER_LEN {
                space.bytes[at] = *byte;
            }
        }
    }

    /// Writes anything anywhere, as a device that lies does; what is beyond the end is lost.
    pub fn set(&self, offset: u16, bytes: &[u8]) {
        let mut space = self.lock();
        for (at, byte) in (usize::from(offset)..LEN).zip(bytes) {
            space.bytes[at] = *byte;
        }
    }

    /// Whether the function answers accesses to I/O ports.
    pub fn io_enabled(&self) -> bool {
        self.lock().bytes[COMMAND] & COMMAND_IO != 0
    }

    /// Whether the function answers memory accesses.
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
