//! The device half of `e1000`: registers, rings and the wire of an 82540EM or 82574L.
//!
//! It does what it is told when it is told, with no thread of its own. The hooks of [`Faults`] and
//! [`FakeE1000::receive_raw`] make it lie.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::DeviceView;
use vireo_eal::mmio::{Bar, DoorbellPage, Registers};
use vireo_eal::{Error, ErrorKind, Result};

use super::ConfigSpace;
use crate::e1000::regs::*;
use crate::port::MacAddr;

/// Size of BAR 0 in bytes.
const BAR_SIZE: usize = 0x20000;
/// Buffer size that RCTL.BSIZE 0 means, in bytes.
const BSIZE: usize = 2048;
/// First and last statistics register (SDM 13.7); reads clear them.
const STATISTICS: std::ops::RangeInclusive<u64> = CRCERRS..=0x40FC;

/// 82540EM: no function reset.
pub const ID_82540EM: DeviceId = DeviceId { vendor: 0x8086, device: 0x100E };
/// 82574L: with function reset.
pub const ID_82574L: DeviceId = DeviceId { vendor: 0x8086, device: 0x10D3 };

/// What the device does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Registers read all ones, as of a device that was pulled.
    pub gone: bool,
    /// CTRL.RST never clears.
    pub reset_hangs: bool,
    /// Frames are sent, but no descriptor is marked done.
    pub never_done: bool,
    /// RAH0 says that there is no address.
    pub no_address: bool,
}

/// The test's handle on the device. Clones are the same device.
#[derive(Clone, Debug)]
pub struct FakeE1000 {
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
    memory: Option<DeviceView>,
    faults: Faults,
    /// Bytes of a frame whose last descriptor is still to come.
    partial: Vec<u8>,
    sent: Vec<Vec<u8>>,
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
        self.partial.clear();
        let [a, b, c, d, e, f] = self.mac.0;
        self.set(RAL0, u32::from_le_bytes([a, b, c, d]));
        let valid = if self.faults.no_address { 0 } else { RAH_AV };
        self.set(RAH0, u32::from_le_bytes([e, f, 0, 0]) | valid);
        self.set_link();
    }

    fn set_link(&mut self) {
        let awake = self.phy_control & PHY_CONTROL_POWER_DOWN == 0;
        let up = STATUS_LU | STATUS_FD | 2 << STATUS_SPEED_SHIFT;
        self.set(STATUS, if awake { up } else { 0 });
    }

    /// Register 0 of the PHY is all there is of it.
    fn mdic(&mut self, mut value: u32) {
        if value & MDIC_OP_READ != 0 {
            value |= u32::from(self.phy_control);
        } else if value & MDIC_OP_WRITE != 0 {
            self.phy_control = value as u16;
            self.set_link();
        }
        self.set(MDIC, value | MDIC_READY);
    }
}

impl FakeE1000 {
    /// A device as it is after power-on: the function for a driver, and the handle.
    pub fn new(address: Bdf, id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Self) {
        let config = ConfigSpace::new(id);
        let mut state = State {
            mac,
            registers: vec![0; BAR_SIZE / 4],
            phy_control: 0,
            memory: None,
            faults: Faults::default(),
            partial: Vec::new(),
            sent: Vec::new(),
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
        let valid = if faults.no_address { 0 } else { RAH_AV };
        let high = state.get(RAH0) & !RAH_AV | valid;
        state.set(RAH0, high);
    }

    /// Its config space.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// What a register of [`e1000`](crate::e1000) holds at `offset` bytes; reading it so changes nothing.
    pub fn register(&self, offset: u64) -> u32 {
        match offset {
            RDT | TDT => self.doorbells.load(offset),
            _ => self.lock().get(offset),
        }
    }

    /// Sets a register, a counter for example.
    pub fn set_register(&self, offset: u64, value: u32) {
        self.lock().set(offset, value);
    }

    /// The link is down because the PHY sleeps; it comes up when the driver wakes it.
    pub fn sleep_phy(&self) {
        let mut state = self.lock();
        state.phy_control |= PHY_CONTROL_POWER_DOWN;
        state.set_link();
    }

    /// Descriptors that the driver has armed and the device has not used.
    pub fn armed(&self) -> usize {
        self.lock().between(RDH, self.doorbells.load(RDT))
    }

    /// A frame arrives on the wire. False when it finds no room, which MPC counts.
    pub fn receive(&self, frame: &[u8]) -> bool {
        let mut state = self.lock();
        let rdt = self.doorbells.load(RDT);
        let enabled = self.config.bus_master() && state.get(RCTL) & RCTL_EN != 0;
        if !enabled || state.between(RDH, rdt) < frame.len().div_ceil(BSIZE) {
            let missed = state.get(MPC) + 1;
            state.set(MPC, missed);
            return false;
        }
        let mut chunks = frame.chunks(BSIZE).peekable();
        while let Some(chunk) = chunks.next() {
            let last = if chunks.peek().is_none() { RXD_EOP } else { 0 };
            if state.complete_rx(chunk, chunk.len() as u64 | RXD_DD | last).is_none() {
                return false;
            }
        }
        true
    }

    /// Completes the next descriptor with `word` and no data, whatever it says and whether or not it is armed.
    pub fn receive_raw(&self, word: u64) {
        let _ = self.lock().complete_rx(&[], word);
    }

    /// Sends what the driver has queued, up to TDT.
    pub fn step(&self) {
        let mut state = self.lock();
        if !self.config.bus_master() || state.get(TCTL) & TCTL_EN == 0 {
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
            self.sent.push(std::mem::take(&mut self.partial));
        }
        if word & TXD_RS != 0 && !self.faults.never_done {
            memory.store(descriptor + 8, word | TXD_DD)?;
        }
        self.advance(TDH);
        Some(())
    }
}

impl Function for FakeE1000 {
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
        if index != 0 {
            let what = format!("cannot open BAR {index} of {}", self.address);
            return Err(Error::new(ErrorKind::Unavailable, what, "there is only BAR 0"));
        }
        Ok(Bar::emulated(Arc::new(self.clone()), Arc::clone(&self.doorbells)))
    }

    fn reset(&self) -> Result<bool> {
        if self.id() != ID_82574L {
            return Ok(false);
        }
        self.reset_all(&mut self.lock());
        self.config.reset();
        Ok(true)
    }

    fn has_iommu(&self) -> bool {
        true
    }
}

impl Registers for FakeE1000 {
    fn read(&self, offset: u64, _size: usize) -> u64 {
        let mut state = self.lock();
        state.reads += 1;
        if state.faults.gone || !self.config.memory_enabled() {
            return u64::MAX;
        }
        let value = match offset {
            RDT | TDT => self.doorbells.load(offset),
            _ => state.get(offset),
        };
        if STATISTICS.contains(&offset) {
            state.set(offset, 0);
        }
        u64::from(value)
    }

    fn write(&self, offset: u64, _size: usize, value: u64) {
        let mut state = self.lock();
        if state.faults.gone || !self.config.memory_enabled() {
            return;
        }
        let value = value as u32;
        match offset {
            STATUS => {}
            RDT | TDT => self.doorbells.store(offset, value),
            CTRL if value & CTRL_RST != 0 && !state.faults.reset_hangs => self.reset_all(&mut state),
            MDIC => state.mdic(value),
            _ => state.set(offset, value),
        }
    }
}
