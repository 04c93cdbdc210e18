//! The device half of `e1000`: registers, rings and the wire of an 82540EM or 82574L.
//!
//! It does what it is told when it is told, with no thread of its own: [`FakeE1000::new`] as QEMU's models do,
//! [`FakeE1000::silicon`] as the chips do. The hooks of [`Faults`] and [`FakeE1000::receive_raw`] make it lie.

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
use self::silicon::{Silicon, Write};
use super::ConfigSpace;
use crate::port::MacAddr;

/// Size of BAR 0 in bytes.
const BAR_SIZE: usize = 0x20000;
/// Buffer size that RCTL.BSIZE 0 means, in bytes.
const BSIZE: usize = 2048;
/// First and last statistics register (SDM 13.7); reads clear them.
const STATISTICS: std::ops::RangeInclusive<u64> = CRCERRS..=0x40FC;
/// Those which QEMU's 8254x keep at a read and a reset (hw/net/e1000.c, `macreg_readops`).
const KEPT: std::ops::RangeInclusive<u64> = CRCERRS..=MPC;
/// BAR of the I/O ports IOADDR and IODATA (SDM 13.2.2), and its size in bytes.
const IO_BAR: u8 = 1;
const IO_SIZE: usize = 8;
const IOADDR: u64 = 0;
/// PCI Express capability, and the bits of its link control that enable ASPM (PCI Express 4.0, 7.5.3.7).
const CAP_ID_EXPRESS: u8 = 0x10;
const LINK_CONTROL: u16 = 0x10;
const ASPM: u8 = 3;
/// What the PHY advertises (IEEE 802.3, 28.2.4.1.3): PAUSE and ASM_DIR among others.
const ADVERTISED: u16 = 0x0DE1;
/// The address of PAUSE frames, and their EtherType (IEEE 802.3, 31B.1).
pub const PAUSE_ADDRESS: MacAddr = MacAddr([0x01, 0x80, 0xC2, 0, 0, 1]);
const ETHERTYPE_MAC_CONTROL: u16 = 0x8808;
const ETHERTYPE_ARP: u16 = 0x0806;

/// 82540EM: no function reset.
pub const ID_82540EM: DeviceId = DeviceId { vendor: 0x8086, device: 0x100E };
/// 82574L: with function reset.
pub const ID_82574L: DeviceId = DeviceId { vendor: 0x8086, device: 0x10D3 };
/// 82545EM: as the 82540EM, for PCI-X.
pub const ID_82545EM: DeviceId = DeviceId { vendor: 0x8086, device: 0x100F };
/// 82544GC: the oldest.
pub const ID_82544GC: DeviceId = DeviceId { vendor: 0x8086, device: 0x100C };
/// 82545GM: the second 82545.
pub const ID_82545GM: DeviceId = DeviceId { vendor: 0x8086, device: 0x1026 };

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
    /// What the link partner advertises: PHY register 5.
    partner: u16,
    cable: bool,
    /// What is in IOADDR.
    io_address: u32,
    silicon: Option<Silicon>,
    /// Whether it is one of QEMU's 8254x.
    keeps_statistics: bool,
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
        let kept = *KEPT.start() as usize / 4..=*KEPT.end() as usize / 4;
        for (number, word) in self.registers.iter_mut().enumerate() {
            if !(self.keeps_statistics && kept.contains(&number)) {
                *word = 0;
            }
        }
        // As QEMU's models leave them.
        self.set(EECD, EECD_AUTO_RD);
        self.set(PBA, 0x0010_0030);
        for (register, value) in self.silicon.as_ref().map_or(&[][..], Silicon::defaults) {
            self.set(*register, *value);
        }
        self.partial.clear();
        let [a, b, c, d, e, f] = self.mac.0;
        self.set(RAL0, u32::from_le_bytes([a, b, c, d]));
        let valid = if self.faults.no_address { 0 } else { RAH_AV };
        self.set(RAH0, u32::from_le_bytes([e, f, 0, 0]) | valid);
        self.set_link();
    }

    fn set_link(&mut self) {
        let phy_lost = self.silicon.as_ref().is_some_and(|silicon| silicon.phy_lost);
        let awake = self.phy_control & PHY_POWER_DOWN == 0 && !phy_lost;
        let up = STATUS_LU | STATUS_FD | STATUS_SPEED_1000;
        self.set(STATUS, if awake && self.cable { up } else { 0 });
    }

    fn mdic(&mut self, mut value: u32) {
        let refused = self
            .silicon
            .as_ref()
            .is_some_and(|silicon| silicon.is_82574() && self.get(EXTCNF_CTRL) & EXTCNF_SW_OWNS_MDIO == 0);
        let linked = self.get(STATUS) & STATUS_LU != 0;
        let register = value >> 16 & 0x1F;
        if refused {
            value |= MDIC_ERROR;
        } else if value & MDIC_OP_READ != 0 {
            value |= u32::from(match register {
                0 => self.phy_control,
                1 if linked => PHY_AUTONEG_COMPLETE,
                4 => ADVERTISED,
                5 if linked => self.partner,
                _ => 0,
            });
        } else if value & MDIC_OP_WRITE != 0 && register == 0 {
            self.phy_control = value as u16;
            self.set_link();
        }
        self.set(MDIC, value | MDIC_READY);
    }

    /// Whether the chip keeps `frame` from the host: it is for the MAC, or for the firmware.
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
        if frame.starts_with(&PAUSE_ADDRESS.0) {
            return rctl & RCTL_MPE == 0;
        }
        kind == ETHERTYPE_ARP && self.get(MANC) & MANC_ARP_EN != 0
    }
}

impl FakeE1000 {
    /// A device as QEMU models it, after power-on: the function for a driver, and the handle.
    pub fn new(address: Bdf, id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Self) {
        Self::with(address, id, mac, None)
    }

    /// A device as the manuals and errata describe the chip, after power-on.
    pub fn silicon(address: Bdf, id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Self) {
        Self::with(address, id, mac, Some(Silicon::new(id)))
    }

    fn with(address: Bdf, id: DeviceId, mac: MacAddr, silicon: Option<Silicon>) -> (Box<dyn Function>, Self) {
        let config = ConfigSpace::new(id);
        if id == ID_82574L {
            // Link control is at 10h; what is before it does not matter here.
            let mut body = [0; 0x12];
            body[usize::from(LINK_CONTROL) - 2] = ASPM;
            config.add_capability(CAP_ID_EXPRESS, &body);
        }
        config.set_bar(IO_BAR, 0xC001);
        let mut state = State {
            mac,
            registers: vec![0; BAR_SIZE / 4],
            phy_control: 0,
            partner: 0,
            cable: true,
            io_address: 0,
            keeps_statistics: silicon.is_none() && id != ID_82574L,
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
        state.phy_control |= PHY_POWER_DOWN;
        state.set_link();
    }

    /// Plugs the cable in or pulls it. The partner advertises `partner` in PHY register 5.
    pub fn plug(&self, cable: bool, partner: u16) {
        let mut state = self.lock();
        (state.cable, state.partner) = (cable, partner);
        state.set_link();
    }

    /// The slot is PCI-X: the chip uses addresses of 64 bits. In silicon mode only.
    pub fn set_pcix(&self) {
        if let Some(silicon) = &mut self.lock().silicon {
            silicon.pcix = true;
        }
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

    /// A frame arrives on the wire; the chip may keep it to itself. False when it finds no room, which MPC counts.
    pub fn receive(&self, frame: &[u8]) -> bool {
        let mut state = self.lock();
        let rdt = self.doorbells.load(RDT);
        let enabled = self.config.bus_master() && state.get(RCTL) & RCTL_EN != 0;
        if !enabled || state.between(RDH, rdt) < frame.len().div_ceil(BSIZE) {
            let missed = state.get(MPC) + 1;
            state.set(MPC, missed);
            return false;
        }
        if state.keeps(frame) {
            return true;
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
        let mut aspm = [0];
        if self.id() == ID_82574L {
            // The only capability, so the first byte behind the header.
            self.config.read(0x40 + LINK_CONTROL, &mut aspm);
        }
        let register = |offset| state.get(offset);
        if state
            .silicon
            .as_ref()
            .is_some_and(|silicon| !silicon.keeps_completions(register, aspm[0] & ASPM != 0))
        {
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
        let owns_mdio = state.get(EXTCNF_CTRL) & EXTCNF_SW_OWNS_MDIO != 0;
        if let Some(silicon) = &mut state.silicon {
            silicon.reset(owns_mdio, self.config.bus_master());
        }
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
    fn descriptor(&mut self, head: u64) -> Option<u64> {
        let base = u64::from(self.get(head - RDH + RDBAL)) | u64::from(self.get(head - RDH + RDBAH)) << 32;
        let base = self.address(base);
        let len = u64::from(self.get(head - RDH + RDLEN));
        if self.silicon.as_mut().is_some_and(|silicon| !silicon.may_use(base, len)) {
            return None;
        }
        Some(base + 16 * u64::from(self.get(head)))
    }

    /// `address` as it comes out of the chip.
    fn address(&self, address: u64) -> u64 {
        self.silicon.as_ref().map_or(address, |silicon| silicon.address(address))
    }

    fn advance(&mut self, head: u64) {
        let entries = (self.get(head - RDH + RDLEN) / 16).max(1);
        let next = (self.get(head) + 1) % entries;
        self.set(head, next);
    }

    fn complete_rx(&mut self, bytes: &[u8], word: u64) -> Option<()> {
        let memory = self.memory.clone()?;
        let descriptor = self.descriptor(RDH)?;
        memory.write(self.address(memory.load::<u64>(descriptor)?), bytes)?;
        memory.store(descriptor + 8, word)?;
        self.advance(RDH);
        Some(())
    }

    fn transmit(&mut self) -> Option<()> {
        let memory = self.memory.clone()?;
        let descriptor = self.descriptor(TDH)?;
        let word = memory.load::<u64>(descriptor + 8)?;
        let old = self.partial.len();
        self.partial.resize(old + (word & 0xFFFF) as usize, 0);
        memory.read(self.address(memory.load::<u64>(descriptor)?), &mut self.partial[old..])?;
        if word & TXD_EOP != 0 {
            let mut frame = std::mem::take(&mut self.partial);
            if let (Some(silicon), true) = (&self.silicon, self.get(TCTL) & TCTL_PSP != 0) {
                silicon.pad(&mut frame);
            }
            self.sent.push(frame);
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
        match index {
            0 => Ok(Bar::emulated(Arc::new(self.clone()), Arc::clone(&self.doorbells))),
            IO_BAR => Ok(Bar::emulated(Arc::new(Ports(self.clone())), DoorbellPage::new(IO_SIZE))),
            _ => {
                let what = format!("cannot open BAR {index} of {}", self.address);
                Err(Error::new(ErrorKind::Unavailable, what, "there are only BAR 0 and 1"))
            }
        }
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
        let mut value = match offset {
            RDT | TDT => self.doorbells.load(offset),
            _ => state.get(offset),
        };
        let ctrl = state.get(CTRL);
        if let Some(silicon) = &mut state.silicon {
            if let Some(other) = silicon.read(offset, self.config.bus_master(), ctrl) {
                return u64::from(other);
            }
            value |= if offset == STATUS { silicon.status() } else { 0 };
        }
        if STATISTICS.contains(&offset) && !(state.keeps_statistics && KEPT.contains(&offset)) {
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
        match state.silicon.as_mut().map(|silicon| silicon.write(offset, value)) {
            Some(Write::Lost) => return,
            Some(Write::Reset) => return self.reset_all(&mut state),
            Some(Write::Taken) | None => {}
        }
        match offset {
            STATUS => {}
            RDT | TDT => self.doorbells.store(offset, value),
            CTRL | CTRL_DUP if value & CTRL_RST != 0 && !state.faults.reset_hangs => {
                self.reset_all(&mut state)
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

/// I/O ports of the device. QEMU's models have them and let nothing through.
struct Ports(FakeE1000);

impl Registers for Ports {
    fn read(&self, offset: u64, _size: usize) -> u64 {
        let state = self.0.lock();
        let answers = state.silicon.is_some() && self.0.config.io_enabled();
        if answers && offset == IOADDR { u64::from(state.io_address) } else { 0 }
    }

    fn write(&self, offset: u64, _size: usize, value: u64) {
        let mut state = self.0.lock();
        if !self.0.config.io_enabled() {
            return;
        }
        if offset == IOADDR {
            state.io_address = value as u32;
            return;
        }
        let register = u64::from(state.io_address);
        let written = state.silicon.as_mut().map(|silicon| silicon.write_io(register, value as u32));
        if written == Some(Write::Reset) {
            self.0.reset_all(&mut state);
        }
    }
}
