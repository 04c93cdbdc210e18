//! The device half of `igb`: registers, rings of queue 0 and the wire of an 82576 or I350.
//!
//! It does what it is told when it is told, with no thread of its own: [`FakeIgb::new`] as QEMU's model does, [`FakeIgb::silicon`]
//! as the chips do. The hooks of [`Faults`] and [`FakeIgb::receive_raw`] make it lie.

mod registers;
mod silicon;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::DeviceView;
use vireo_eal::mmio::{Bar, DoorbellPage, Registers};
use vireo_eal::{Error, ErrorKind, Result};

use self::registers::*;
use self::silicon::Silicon;
use super::ConfigSpace;
use crate::port::MacAddr;

/// Size of BAR 0 in bytes.
const BAR_SIZE: usize = 0x20000;
/// First and last statistics register (DS 8.19); reads clear them.
const STATISTICS: std::ops::RangeInclusive<u64> = CRCERRS..=0x40FC;
/// Those which QEMU keeps at a read (hw/net/igb_core.c, `igb_macreg_readops`).
const KEPT: std::ops::RangeInclusive<u64> = CRCERRS..=MPC;
/// PCI Express capability.
const CAP_ID_EXPRESS: u8 = 0x10;
/// What the PHY advertises (IEEE 802.3, 28.2.4.1.3): PAUSE and ASM_DIR among others.
const ADVERTISED: u16 = 0x0DE1;
const PAUSE_ADDRESS: [u8; 6] = [0x01, 0x80, 0xC2, 0, 0, 1];
const ETHERTYPE_MAC_CONTROL: u16 = 0x8808;
/// First word of a descriptor that was written back: packet type and RSS hash, for which the buffer's address goes.
const WRITTEN_BACK: u64 = 0x5EED_5EED_0000_0031;

/// 82576, the one that QEMU models.
pub const ID_82576: DeviceId = DeviceId { vendor: 0x8086, device: 0x10C9 };
/// I350.
pub const ID_I350: DeviceId = DeviceId { vendor: 0x8086, device: 0x1521 };

/// What the device does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Registers read all ones, as of a device that was pulled.
    pub gone: bool,
    /// CTRL.RST never clears.
    pub reset_hangs: bool,
    /// The function cannot be reset.
    pub no_function_reset: bool,
    /// Frames are sent, but no descriptor is marked done.
    pub never_done: bool,
    /// RAH0 says that there is no address.
    pub no_address: bool,
    /// RXDCTL never says that the queue is enabled.
    pub never_enabled: bool,
}

/// The test's handle on the device. Clones are the same device.
#[derive(Clone, Debug)]
pub struct FakeIgb {
    address: Bdf,
    config: ConfigSpace,
    doorbells: Arc<DoorbellPage>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    mac: MacAddr,
    registers: Vec<u32>,
    phy_control: u16,
    /// Whether the PHY has negotiated.
    negotiated: bool,
    /// What the link partner advertises: PHY register 5.
    partner: u16,
    cable: bool,
    silicon: Option<Silicon>,
    memory: Option<DeviceView>,
    faults: Faults,
    /// Bytes of a frame whose last descriptor is still to come.
    partial: Vec<u8>,
    sent: Vec<Vec<u8>>,
    /// PAUSE frames that stopped the transmitter.
    pauses: u64,
    resets: u64,
    reads: u64,
}

impl State {
    fn get(&self, register: u64) -> u32 {
        self.registers.get(register as usize / 4).copied().unwrap_or(u32::MAX)
    }

    fn set(&mut self, register: u64, value: u32) {
        if let Some(word) = self.registers.get_mut(register as usize / 4) {
            *word = value;
        }
    }

    fn reset(&mut self) {
        self.registers.fill(0);
        // As QEMU's model and the manual have them; PHPM and CTRL_EXT as no driver wants them.
        for (register, value) in [
            (CTRL, 0x0010_0A09),
            (CTRL_EXT, 0x0000_0C00),
            (PHPM, 0x0000_0020),
            (GCR, 0x0005_0000),
            (RXPBS, 0x0000_0040),
            (RXDCTL, QUEUE_ENABLE | 1 << 16),
            (TXDCTL, QUEUE_ENABLE),
            (TCTL, 0xA400_00F8),
        ] {
            self.set(register, value);
        }
        self.partial.clear();
        let [a, b, c, d, e, f] = self.mac.0;
        self.set(RAL0, u32::from_le_bytes([a, b, c, d]));
        self.set_address_valid();
        self.set(RAH0, self.get(RAH0) & RAH_AV | u32::from_le_bytes([e, f, 0, 0]));
        // QEMU resets the PHY with the rest, and does not let it negotiate.
        self.negotiated &= self.silicon.is_some();
        self.set_link();
    }

    fn set_address_valid(&mut self) {
        let valid = if self.faults.no_address { 0 } else { RAH_AV };
        self.set(RAH0, self.get(RAH0) & !RAH_AV | valid);
    }

    fn set_link(&mut self) {
        let up = self.phy_control & PHY_POWER_DOWN == 0 && self.cable && self.negotiated;
        let link = if up { STATUS_LU | STATUS_FD | STATUS_SPEED_1000 } else { 0 };
        let master_disabled = self.get(CTRL) & CTRL_GIO_MASTER_DISABLE != 0;
        let requests = if master_disabled { 0 } else { STATUS_GIO_MASTER_ENABLE };
        self.set(STATUS, link | STATUS_LAN_ID_1 | requests);
    }

    fn mdic(&mut self, mut value: u32) {
        let sync = self.get(SW_FW_SYNC);
        let refused = self.silicon.as_ref().is_some_and(|silicon| !silicon.phy_answers(sync));
        let register = value >> 16 & 0x1F;
        if refused {
            value |= MDIC_ERROR;
        } else if value & MDIC_OP_READ != 0 {
            value = value & !0xFFFF
                | u32::from(match register {
                    0 => self.phy_control,
                    1 if self.negotiated && self.cable => PHY_AUTONEG_COMPLETE,
                    4 => ADVERTISED,
                    5 if self.negotiated => self.partner,
                    _ => 0,
                });
        } else if value & MDIC_OP_WRITE != 0 && register == 0 {
            self.phy_control = value as u16 & !PHY_RESTART;
            // At once, for which QEMU takes half a second.
            self.negotiated |= value as u16 & (PHY_RESTART | PHY_AUTONEG) == PHY_RESTART | PHY_AUTONEG;
            self.set_link();
        }
        self.set(MDIC, value | MDIC_READY);
    }

    /// Whether the chip keeps `frame` from the host: it is for the MAC.
    fn keeps(&mut self, frame: &[u8]) -> bool {
        let Some(kind) = frame.get(12..14).map(|kind| u16::from_be_bytes([kind[0], kind[1]])) else {
            return false;
        };
        if self.silicon.is_none() {
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
        frame.starts_with(&PAUSE_ADDRESS) && rctl & RCTL_MPE == 0
    }
}

impl FakeIgb {
    /// A device as QEMU has it after power-on, and the function that a driver gets.
    pub fn new(address: Bdf, id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Self) {
        Self::with(address, id, mac, None)
    }

    /// A device as the manual describes the chip, after power-on.
    pub fn silicon(address: Bdf, id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Self) {
        Self::with(address, id, mac, Some(Silicon::new()))
    }

    fn with(address: Bdf, id: DeviceId, mac: MacAddr, silicon: Option<Silicon>) -> (Box<dyn Function>, Self) {
        let config = ConfigSpace::new(id);
        // Device Control 2 is at 28h.
        config.add_capability(CAP_ID_EXPRESS, &[0; 0x28]);
        let mut state = State {
            mac,
            registers: vec![0; BAR_SIZE / 4],
            phy_control: PHY_AUTONEG,
            negotiated: true,
            partner: 0,
            cable: true,
            silicon,
            memory: None,
            faults: Faults::default(),
            partial: Vec::new(),
            sent: Vec::new(),
            pauses: 0,
            resets: 0,
            reads: 0,
        };
        state.reset();
        let device = Self {
            address,
            config,
            doorbells: DoorbellPage::new(BAR_SIZE),
            state: Arc::new(Mutex::new(state)),
        };
        (Box::new(device.clone()), device)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the device the memory that it reads and writes.
    pub fn attach(&self, memory: DeviceView) {
        self.lock().memory = Some(memory);
    }

    /// Makes the device misbehave from now on.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.lock();
        state.faults = faults;
        state.set_address_valid();
    }

    /// Its config space.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// What a register of [`igb`](crate::igb) holds at `offset` bytes; reading it so changes nothing.
    pub fn register(&self, offset: u64) -> u32 {
        match offset {
            RDT | TDT => self.doorbells.load(offset),
            _ => self.lock().get(offset),
        }
    }

    /// Sets a register, a counter or a semaphore for example.
    pub fn set_register(&self, offset: u64, value: u32) {
        self.lock().set(offset, value);
    }

    /// The link is down because the PHY sleeps; it comes up when the driver wakes it.
    pub fn sleep_phy(&self) {
        let mut state = self.lock();
        state.phy_control |= PHY_POWER_DOWN;
        state.negotiated = false;
        state.set_link();
    }

    /// Plugs the cable in or pulls it. The partner advertises `partner` in PHY register 5.
    pub fn plug(&self, cable: bool, partner: u16) {
        let mut state = self.lock();
        (state.cable, state.partner) = (cable, partner);
        state.set_link();
    }

    /// Whether the chip hangs, which only its power ends.
    pub fn is_hung(&self) -> bool {
        self.lock().silicon.as_ref().is_some_and(|silicon| silicon.hung)
    }

    /// PAUSE frames that the transmitter obeyed.
    pub fn pauses(&self) -> u64 {
        self.lock().pauses
    }

    /// Descriptors that the driver has armed and the device has not used.
    pub fn armed(&self) -> usize {
        self.lock().between(RDH, self.doorbells.load(RDT))
    }

    /// A frame arrives on the wire; the chip may keep it to itself. False when it finds no room, which MPC counts, or no
    /// receiver.
    pub fn receive(&self, frame: &[u8]) -> bool {
        let mut state = self.lock();
        let rdt = self.doorbells.load(RDT);
        let enabled = self.config.bus_master()
            && state.get(RCTL) & RCTL_EN != 0
            && state.get(RXDCTL) & QUEUE_ENABLE != 0
            && state.get(STATUS) & STATUS_LU != 0;
        let size = state.buffer_size();
        if !enabled || size == 0 || state.between(RDH, rdt) < frame.len().div_ceil(size) {
            let missed = state.get(MPC) + 1;
            state.set(MPC, missed);
            return false;
        }
        if state.keeps(frame) {
            return true;
        }
        let mut chunks = frame.chunks(size).peekable();
        while let Some(chunk) = chunks.next() {
            let last = if chunks.peek().is_none() { RXD_EOP } else { 0 };
            if state.complete_rx(chunk, (chunk.len() as u64) << 32 | RXD_DD | last).is_none() {
                return false;
            }
        }
        true
    }

    /// Completes the next descriptor with `word` as its second and no data, whatever it says and whether or not it is armed.
    pub fn receive_raw(&self, word: u64) {
        let _ = self.lock().complete_rx(&[], word);
    }

    /// Completes the descriptor `ahead` of the next one out of its turn, which stays as it is.
    pub fn receive_raw_ahead(&self, ahead: u32, word: u64) {
        let mut state = self.lock();
        let head = state.get(RDH);
        let entries = (state.get(RDLEN) / 16).max(1);
        state.set(RDH, (head + ahead) % entries);
        let _ = state.complete_rx(&[], word);
        state.set(RDH, head);
    }

    /// Sends what the driver has queued, up to TDT.
    pub fn step(&self) {
        let mut state = self.lock();
        let enabled = state.get(TCTL) & TCTL_EN != 0 && state.get(TXDCTL) & QUEUE_ENABLE != 0;
        if !self.config.bus_master() || !enabled {
            return;
        }
        let tdt = self.doorbells.load(TDT);
        while state.between(TDH, tdt) > 0 {
            if state.transmit().is_none() {
                return;
            }
        }
    }

    /// Sends what the driver has queued, and gives what was sent since the last call.
    pub fn transmitted(&self) -> Vec<Vec<u8>> {
        self.step();
        std::mem::take(&mut self.lock().sent)
    }

    /// How often the driver read a register.
    pub fn reads(&self) -> u64 {
        self.lock().reads
    }

    /// How often the device was reset.
    pub fn resets(&self) -> u64 {
        self.lock().resets
    }

    fn reset_all(&self, state: &mut State) {
        state.reset();
        state.resets += 1;
        self.doorbells.store(RDT, 0);
        self.doorbells.store(TDT, 0);
    }
}

impl State {
    /// Bytes that the device writes into one buffer; 0 for descriptors other than the advanced ones with one buffer.
    fn buffer_size(&self) -> usize {
        let srrctl = self.get(SRRCTL);
        if srrctl >> 25 & 7 == 1 { (srrctl & 0x7F) as usize * 1024 } else { 0 }
    }

    /// Descriptors from the head, which is at register `head`, to `tail`.
    fn between(&self, head: u64, tail: u32) -> usize {
        let entries = self.get(head - RDH + RDLEN) / 16;
        if entries == 0 || tail >= entries {
            return 0;
        }
        ((tail + entries - self.get(head)) % entries) as usize
    }

    /// Device address of the descriptor at the head.
    fn descriptor(&self, head: u64) -> u64 {
        let base = u64::from(self.get(head - RDH + RDBAL)) | u64::from(self.get(head - RDH + RDBAH)) << 32;
        base + 16 * u64::from(self.get(head))
    }

    fn advance(&mut self, head: u64) {
        let entries = (self.get(head - RDH + RDLEN) / 16).max(1);
        let next = (self.get(head) + 1) % entries;
        self.set(head, next);
    }

    fn complete_rx(&mut self, bytes: &[u8], word: u64) -> Option<()> {
        let memory = self.memory.clone()?;
        let descriptor = self.descriptor(RDH);
        memory.write(memory.load::<u64>(descriptor)?, bytes)?;
        memory.store(descriptor, WRITTEN_BACK)?;
        memory.store(descriptor + 8, word)?;
        self.advance(RDH);
        Some(())
    }

    fn transmit(&mut self) -> Option<()> {
        let memory = self.memory.clone()?;
        let descriptor = self.descriptor(TDH);
        let word = memory.load::<u64>(descriptor + 8)?;
        let old = self.partial.len();
        self.partial.resize(old + (word & 0xFFFF) as usize, 0);
        memory.read(memory.load::<u64>(descriptor)?, &mut self.partial[old..])?;
        if word & TXD_EOP != 0 {
            let mut frame = std::mem::take(&mut self.partial);
            // Anything else is no frame, or none that a partner takes.
            let whole =
                word & TXD_KIND == TXD_DATA && word & TXD_IFCS != 0 && word >> 46 == frame.len() as u64;
            if let (Some(silicon), true) = (&self.silicon, self.get(TCTL) & TCTL_PSP != 0) {
                silicon.pad(&mut frame);
            }
            if whole {
                self.sent.push(frame);
            }
        }
        if word & TXD_RS != 0 && !self.faults.never_done {
            memory.store(descriptor + 8, word & 0xFFFF_FFFF | TXD_DD)?;
        }
        self.advance(TDH);
        Some(())
    }
}

impl Function for FakeIgb {
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
        if index == 0 {
            return Ok(Bar::emulated(Arc::new(self.clone()), Arc::clone(&self.doorbells)));
        }
        let what = format!("cannot open BAR {index} of {}", self.address);
        Err(Error::new(ErrorKind::Unavailable, what, "there is only BAR 0"))
    }

    fn reset(&self) -> Result<bool> {
        let mut state = self.lock();
        if state.faults.no_function_reset {
            return Ok(false);
        }
        if let Some(silicon) = &mut state.silicon {
            *silicon = Silicon::new();
        }
        self.reset_all(&mut state);
        self.config.reset();
        Ok(true)
    }

    fn has_iommu(&self) -> bool {
        true
    }
}

impl Registers for FakeIgb {
    fn read(&self, offset: u64, _size: usize) -> u64 {
        let mut state = self.lock();
        state.reads += 1;
        if state.faults.gone || !self.config.memory_enabled() {
            return u64::MAX;
        }
        let mut value = match offset {
            RDT | TDT => self.doorbells.load(offset),
            _ => state.get(offset),
        };
        // A queue is enabled no sooner than its half of the chip.
        let of_queue = [(RXDCTL, RCTL, RCTL_EN), (TXDCTL, TCTL, TCTL_EN)];
        if let Some((_, control, enabled)) = of_queue.into_iter().find(|(queue, ..)| *queue == offset)
            && (state.get(control) & enabled == 0 || offset == RXDCTL && state.faults.never_enabled)
        {
            value &= !QUEUE_ENABLE;
        }
        let (bus_master, ctrl) = (self.config.bus_master(), state.get(CTRL));
        if let Some(silicon) = &mut state.silicon
            && let Some(other) = silicon.read(offset, value, bus_master, ctrl)
        {
            return u64::from(other);
        }
        if offset == SWSM {
            state.set(SWSM, value | SWSM_SMBI);
        }
        if STATISTICS.contains(&offset) && (state.silicon.is_some() || !KEPT.contains(&offset)) {
            state.set(offset, 0);
        }
        u64::from(value)
    }

    fn write(&self, offset: u64, _size: usize, value: u64) {
        let mut state = self.lock();
        if state.faults.gone || !self.config.memory_enabled() {
            return;
        }
        let mut value = value as u32;
        if let Some(silicon) = &mut state.silicon {
            let Some(taken) = silicon.write(offset, value) else { return };
            value = taken;
        }
        match offset {
            STATUS => {}
            RDT | TDT => self.doorbells.store(offset, value),
            CTRL if value & CTRL_RST != 0 && !state.faults.reset_hangs => {
                if let Some(silicon) = &mut state.silicon {
                    silicon.reset();
                }
                self.reset_all(&mut state);
            }
            CTRL => {
                state.set(CTRL, value);
                state.set_link();
            }
            MDIC => state.mdic(value),
            _ => state.set(offset, value),
        }
    }

    fn elapse(&self, time: Duration) {
        if let Some(silicon) = &mut self.lock().silicon {
            silicon.elapse(time);
        }
    }
}
