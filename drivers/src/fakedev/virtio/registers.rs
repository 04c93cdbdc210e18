//! Registers and config space of the device.

use std::sync::Arc;

use vireo_bus_pci::{DeviceId, Function, Interrupt};
use vireo_eal::bdf::Bdf;
use vireo_eal::event::Event;
use vireo_eal::mmio::{Bar, Registers};
use vireo_eal::vfio::Irq;
use vireo_eal::{Error, ErrorKind, Result};

use super::{
    BAR, DEVICE, NOT_RUNG, NOTIFY, NOTIFY_OFF_MULTIPLIER, PAGE, STATUS_DRIVER_OK, State, VirtioNet, feature,
};

const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

impl Function for VirtioNet {
    fn address(&self) -> Bdf {
        self.address
    }

    fn id(&self) -> DeviceId {
        self.config.id()
    }

    fn read_config(&self, offset: u16, bytes: &mut [u8]) {
        self.config.read(offset, bytes);
    }

    fn write_config(&self, offset: u16, bytes: &[u8]) -> Result<()> {
        self.config.write(offset, bytes);
        Ok(())
    }

    fn bar(&self, index: u8) -> Result<Bar> {
        match index {
            BAR => Ok(Bar::emulated(Arc::new(self.clone()), Arc::clone(&self.doorbells))),
            _ => Err(Error::new(
                ErrorKind::Unavailable,
                format!("cannot map BAR {index} of {}", self.address()),
                "there is none",
            )),
        }
    }

    fn reset(&self) -> Result<bool> {
        if !self.state().behaviour.function_reset {
            return Ok(false);
        }
        self.config.reset();
        self.reset_device();
        Ok(true)
    }

    fn has_iommu(&self) -> bool {
        self.state().behaviour.iommu
    }

    fn enable_interrupts(&self, kinds: &[Irq], count: u16) -> Result<Vec<Interrupt>> {
        let mut state = self.state();
        if !kinds.contains(&Irq::Msix) || count > state.behaviour.vectors {
            let what = format!("cannot use interrupts of {}", self.address);
            return Err(Error::new(ErrorKind::Unavailable, what, "it has too few"));
        }
        state.vectors = (0..count).map(|_| Event::new()).collect::<Result<_>>()?;
        Ok(state.vectors.iter().map(|event| Interrupt::new(event.clone(), None)).collect())
    }
}

impl VirtioNet {
    /// Resets the device, as a write of 0 to `device_status` does.
    pub(super) fn reset_device(&self) {
        let mut state = self.state();
        state.status = 0;
        state.resets += 1;
        state.driver_features = 0;
        state.queues = Default::default();
        state.promiscuous = true;
        state.pairs = 1;
        state.config_vector = None;
        for queue in 0..state.queues.len() as u64 {
            self.doorbells.store16(NOTIFY + queue * u64::from(NOTIFY_OFF_MULTIPLIER), NOT_RUNG);
        }
    }
}

impl Registers for VirtioNet {
    fn read(&self, offset: u64, size: usize) -> u64 {
        let mut state = self.state();
        state.reads += 1;
        let ones = u64::MAX >> (64 - 8 * size);
        if state.behaviour.removed {
            return ones;
        }
        let value = match offset {
            0..0x3c => state.read_common(offset),
            DEVICE..NOTIFY => {
                let mut bytes = [0; 16];
                bytes[..6].copy_from_slice(&state.behaviour.mac);
                bytes[6] = u8::from(state.behaviour.link_up);
                bytes[8..10].copy_from_slice(&state.behaviour.pairs.to_le_bytes());
                bytes[10..12].copy_from_slice(&state.behaviour.mtu.to_le_bytes());
                (u128::from_le_bytes(bytes) >> (8 * (offset - DEVICE).min(15))) as u64
            }
            _ => 0,
        };
        value & ones
    }

    fn write(&self, offset: u64, _: usize, value: u64) {
        match offset {
            0x14 if value == 0 && self.state().behaviour.ignore_reset => {}
            0x14 if value == 0 => self.reset_device(),
            0..0x3c => self.state().write_common(offset, value),
            NOTIFY.. if offset < NOTIFY + PAGE && self.is_live() => {
                let mut state = self.state();
                if value == u64::from(state.control_index()) {
                    state.control();
                }
            }
            _ => {}
        }
    }
}

/// Accesses to `struct virtio_pci_common_cfg` (4.1.4.3).
impl State {
    fn read_common(&mut self, offset: u64) -> u64 {
        let behaviour = &self.behaviour;
        let exists = match self.queue_select {
            control if control == self.control_index() => behaviour.features & feature::CTRL_VQ != 0,
            queue => queue < self.control_index(),
        };
        match offset {
            0x04 if self.device_feature_select < 2 => {
                behaviour.features >> (32 * self.device_feature_select) & 0xffff_ffff
            }
            0x10 => u64::from(self.config_vector.unwrap_or(0xffff)),
            0x1a => u64::from(self.queue(self.queue_select).0.vector.unwrap_or(0xffff)),
            0x12 => self.queues.len() as u64,
            0x14 if behaviour.needs_reset && self.status != 0 => u64::from(self.status | STATUS_NEEDS_RESET),
            0x14 if behaviour.halted => u64::from(self.status & !STATUS_DRIVER_OK),
            0x14 => u64::from(self.status),
            0x15 => {
                self.generation = self.generation.wrapping_add(u8::from(behaviour.config_changes));
                u64::from(self.generation)
            }
            0x16 => u64::from(self.queue_select),
            0x18 if exists => u64::from(self.queue(self.queue_select).1),
            0x1e if exists => u64::from(behaviour.notify_off.unwrap_or(self.queue_select)),
            _ => 0,
        }
    }

    /// The vector that a driver has written. One that is not enabled reads as none (4.1.5.1.2.1).
    fn enabled_vector(&self, value: u64) -> Option<u16> {
        Some(value as u16).filter(|vector| usize::from(*vector) < self.vectors.len())
    }

    fn write_common(&mut self, offset: u64, value: u64) {
        match offset {
            0x00 => self.device_feature_select = value as u32,
            0x08 => self.driver_feature_select = value as u32,
            0x0c if self.driver_feature_select < 2 => {
                let shift = 32 * self.driver_feature_select;
                self.driver_features = self.driver_features & !(0xffff_ffff << shift) | value << shift;
            }
            0x14 => {
                let known = self.driver_features & !self.behaviour.features == 0;
                // A device may insist on `ORDER_PLATFORM` (6.2).
                let unordered =
                    self.behaviour.features & !self.driver_features & feature::ORDER_PLATFORM != 0;
                // A feature that depends on `CTRL_VQ` is not accepted without it (5.1.3.1).
                let alone = self.driver_features & (feature::MQ | feature::CTRL_RX) != 0
                    && self.driver_features & feature::CTRL_VQ == 0;
                let refused = self.behaviour.refuse_features || !known || unordered || alone;
                // A driver must not clear a bit (2.1.1).
                if self.status & !(value as u8) != 0 {
                    self.faults.push("a write of device_status clears bits");
                }
                self.status = value as u8 & if refused { !STATUS_FEATURES_OK } else { 0xff };
            }
            0x16 => self.queue_select = value as u16,
            0x10 => self.config_vector = self.enabled_vector(value),
            _ => {
                let vector = self.enabled_vector(value);
                let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
                match offset {
                    0x1a => queue.vector = vector,
                    0x18 => queue.size = Some(value as u16),
                    0x1c => queue.enabled = value == 1,
                    // It reads as 0 again at once.
                    0x3a if value == 1 && self.driver_features & feature::RING_RESET != 0 => {
                        *queue = super::Queue::default()
                    }
                    0x20..0x3c => {
                        let address = &mut queue.addresses[(offset as usize - 0x20) / 8];
                        let shift = 8 * (offset % 8);
                        *address = *address & !(0xffff_ffff << shift) | value << shift;
                    }
                    _ => {}
                }
            }
        }
    }
}
