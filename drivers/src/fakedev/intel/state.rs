//! State of a controller, and its work on registers, rings and the wire.

use vireo_eal::dma::DeviceView;
use vireo_eal::event::Event;

use super::model::{BAR_SIZE, Model, RegisterFile};
use super::registers::*;
use super::{Faults, PAUSE_ADDRESS};
use crate::port::MacAddr;

/// Statistics registers whose count QEMU keeps across reads (hw/net/e1000.c, `macreg_readops`;
/// hw/net/igb_core.c, `igb_macreg_readops`).
pub(super) const KEPT: std::ops::RangeInclusive<u64> = CRCERRS..=MPC;
/// Abilities that the PHY advertises (IEEE 802.3, 28.2.4.1.3): PAUSE and ASM_DIR among others.
const ADVERTISED: u16 = 0x0DE1;
const ETHERTYPE_MAC_CONTROL: u16 = 0x8808;
const ETHERTYPE_ARP: u16 = 0x0806;

#[derive(Debug)]
pub(super) struct State<M> {
    pub(super) model: M,
    mac: MacAddr,
    pub(super) registers: RegisterFile,
    phy_control: u16,
    /// Whether the PHY has negotiated.
    negotiated: bool,
    /// Abilities that the link partner advertises: PHY register 5.
    partner: u16,
    cable: bool,
    pub(super) memory: Option<DeviceView>,
    faults: Faults,
    /// Bytes of a frame whose last descriptor was not processed yet, and the second word of the frame's first
    /// descriptor.
    partial: Vec<u8>,
    first: Option<u64>,
    pub(super) sent: Vec<Vec<u8>>,
    /// PAUSE frames that stopped the transmitter.
    pub(super) pauses: u64,
    pub(super) resets: u64,
    pub(super) reads: u64,
    /// Event of the interrupt, if it is enabled.
    pub(super) interrupt: Option<Event>,
}

impl<M: Model> State<M> {
    pub(super) fn new(model: M, mac: MacAddr) -> Self {
        let mut state = Self {
            model,
            mac,
            registers: RegisterFile(vec![0; BAR_SIZE / 4]),
            phy_control: PHY_AUTONEG,
            negotiated: true,
            partner: 0,
            cable: true,
            memory: None,
            faults: Faults::default(),
            partial: Vec::new(),
            first: None,
            sent: Vec::new(),
            pauses: 0,
            resets: 0,
            reads: 0,
            interrupt: None,
        };
        state.reset();
        state
    }

    pub(super) fn get(&self, register: u64) -> u32 {
        self.registers.get(register)
    }

    pub(super) fn set(&mut self, register: u64, value: u32) {
        self.registers.set(register, value);
    }

    pub(super) fn faults(&self) -> Faults {
        self.faults
    }

    pub(super) fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
        let valid = if faults.no_address { 0 } else { RAH_AV };
        self.set(RAH0, self.get(RAH0) & !RAH_AV | valid);
    }

    pub(super) fn reset(&mut self) {
        let outlives = M::STATISTICS_OUTLIVE_RESET && self.model.keeps_statistics();
        let kept = *KEPT.start() as usize / 4..=*KEPT.end() as usize / 4;
        for (number, word) in self.registers.0.iter_mut().enumerate() {
            if !(outlives && kept.contains(&number)) {
                *word = 0;
            }
        }
        for (register, value) in self.model.defaults() {
            self.set(register, value);
        }
        self.partial.clear();
        self.first = None;
        let [a, b, c, d, e, f] = self.mac.0;
        self.set(RAL0, u32::from_le_bytes([a, b, c, d]));
        self.set(RAH0, u32::from_le_bytes([e, f, 0, 0]));
        self.set_faults(self.faults);
        self.negotiated &= M::PHY_NEGOTIATES || self.model.is_silicon();
        self.set_link();
    }

    fn is_linked(&self) -> bool {
        let is_awake = self.phy_control & PHY_POWER_DOWN == 0 && self.model.phy_works();
        is_awake && self.cable && self.negotiated
    }

    pub(super) fn set_link(&mut self) {
        let link = if self.is_linked() { STATUS_LU | STATUS_FD | STATUS_SPEED_1000 } else { 0 };
        let is_changed = (self.get(STATUS) ^ link) & STATUS_LU != 0;
        self.set(STATUS, link | self.model.status(self.get(CTRL)));
        if is_changed {
            self.interrupt_for(ICR_LSC);
        }
    }

    pub(super) fn sleep_phy(&mut self) {
        self.phy_control |= PHY_POWER_DOWN;
        self.negotiated = M::PHY_NEGOTIATES;
        self.set_link();
    }

    pub(super) fn plug(&mut self, cable: bool, partner: u16) {
        (self.cable, self.partner) = (cable, partner);
        self.set_link();
    }

    pub(super) fn mdic(&mut self, mut value: u32) {
        let register = value >> 16 & 0x1F;
        if !self.model.phy_answers(&self.registers) {
            value |= MDIC_ERROR;
        } else if value & MDIC_OP_READ != 0 {
            value = value & !0xFFFF
                | u32::from(match register {
                    0 => self.phy_control,
                    1 if self.is_linked() => PHY_AUTONEG_COMPLETE,
                    4 => ADVERTISED,
                    5 if self.is_linked() => self.partner,
                    _ => 0,
                });
        } else if value & MDIC_OP_WRITE != 0 && register == 0 {
            self.phy_control = value as u16 & !PHY_RESTART;
            // Negotiation completes at once, but takes half a second in QEMU.
            self.negotiated |= value as u16 & (PHY_RESTART | PHY_AUTONEG) == PHY_RESTART | PHY_AUTONEG;
            self.set_link();
        }
        self.set(MDIC, value | MDIC_READY);
    }

    /// Whether the chip keeps `frame` from the host, because the frame is for the MAC or for the firmware.
    pub(super) fn keeps(&mut self, frame: &[u8]) -> bool {
        let Some(kind) = frame.get(12..14).map(|kind| u16::from_be_bytes([kind[0], kind[1]])) else {
            return false;
        };
        if !self.model.is_silicon() {
            return false;
        }
        let rctl = self.get(RCTL);
        let multicast_address = [self.get(FCAL).to_le_bytes(), self.get(FCAH).to_le_bytes()].concat();
        let multicast = frame.starts_with(&multicast_address[..6]);
        let own = frame.starts_with(&self.mac.0);
        if kind == ETHERTYPE_MAC_CONTROL && u32::from(kind) == self.get(FCT) && (multicast || own) {
            self.pauses += u64::from(self.get(CTRL) & CTRL_RFCE != 0);
            return rctl & RCTL_PMCF == 0 && (multicast || rctl & RCTL_DPF != 0);
        }
        if frame.starts_with(&PAUSE_ADDRESS.0) {
            return rctl & RCTL_MPE == 0;
        }
        kind == ETHERTYPE_ARP && self.get(MANC) & MANC_ARP_EN != 0
    }

    /// Number of descriptors from the head of the ring `base` to `tail`.
    pub(super) fn between(&self, base: u64, tail: u32) -> usize {
        let entries = self.get(base + LEN) / 16;
        if entries == 0 || tail >= entries {
            return 0;
        }
        ((tail + entries - self.get(base + HEAD)) % entries) as usize
    }

    /// Device address of the descriptor at the head.
    fn descriptor(&mut self, base: u64) -> Option<u64> {
        let start = u64::from(self.get(base)) | u64::from(self.get(base + BASE_HIGH)) << 32;
        let start = self.model.address(start);
        let len = u64::from(self.get(base + LEN));
        self.model.may_use(start, len).then(|| start + 16 * u64::from(self.get(base + HEAD)))
    }

    /// Moves the head by `count` descriptors.
    pub(super) fn advance(&mut self, base: u64, count: u32) {
        let entries = (self.get(base + LEN) / 16).max(1);
        let next = (self.get(base + HEAD) + count) % entries;
        self.set(base + HEAD, next);
    }

    pub(super) fn complete_rx(&mut self, bytes: &[u8], word: u64) -> Option<()> {
        let memory = self.memory.clone()?;
        let descriptor = self.descriptor(M::RDBAL)?;
        memory.write(self.model.address(memory.load::<u64>(descriptor)?), bytes)?;
        if let Some(first) = M::WRITTEN_BACK {
            memory.store(descriptor, first)?;
        }
        memory.store(descriptor + 8, word)?;
        self.advance(M::RDBAL, 1);
        self.interrupt_for(ICR_RXT0);
        Some(())
    }

    fn interrupt_for(&mut self, cause: u32) {
        self.set(ICR, self.get(ICR) | cause);
        self.set_mask(self.get(IMS));
    }

    /// Sets which causes interrupt, and interrupts if one of them is pending (SDM 13.4, IMS).
    pub(super) fn set_mask(&mut self, mask: u32) {
        self.set(IMS, mask);
        if self.get(ICR) & mask != 0
            && let Some(event) = &self.interrupt
        {
            event.signal();
        }
    }

    pub(super) fn transmit(&mut self) -> Option<()> {
        let memory = self.memory.clone()?;
        let descriptor = self.descriptor(M::TDBAL)?;
        let word = memory.load::<u64>(descriptor + 8)?;
        let first = *self.first.get_or_insert(word);
        let old = self.partial.len();
        self.partial.resize(old + (word & 0xFFFF) as usize, 0);
        memory.read(self.model.address(memory.load::<u64>(descriptor)?), &mut self.partial[old..])?;
        if word & TXD_EOP != 0 {
            let mut frame = std::mem::take(&mut self.partial);
            self.first = None;
            let is_frame = M::is_frame(first, word, frame.len());
            if self.get(TCTL) & TCTL_PSP != 0 {
                self.model.pad(&mut frame);
            }
            if is_frame {
                self.sent.push(frame);
            }
        }
        if word & TXD_RS != 0 && !self.faults.never_done {
            memory.store(descriptor + 8, M::reported(word))?;
        }
        self.advance(M::TDBAL, 1);
        Some(())
    }
}
