//! Fake Intel Gigabit Ethernet controllers: registers, rings and the wire. The family-specific parts are in a
//! [`Model`].
//!
//! A fake controller has no thread of its own and acts only when it is called. [`Fake::new`] makes it behave
//! like QEMU's models, [`Fake::silicon`] like the chips. [`Faults`] and [`Fake::receive_raw`] make it
//! misbehave.

mod model;
pub(crate) mod registers;
mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vireo_bus_pci::{DeviceId, Function, Interrupt};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::DeviceView;
use vireo_eal::event::Event;
use vireo_eal::mmio::{Bar, DoorbellPage, Registers};
use vireo_eal::vfio::Irq;
use vireo_eal::{Error, ErrorKind, Result};

use self::model::BAR_SIZE;
pub(crate) use self::model::{Model, RegisterFile};
use self::registers::*;
use self::state::{KEPT, State};
use super::ConfigSpace;
use crate::port::MacAddr;

/// Range of the statistics registers (SDM 13.7, 82576 8.19), which reads clear.
const STATISTICS: std::ops::RangeInclusive<u64> = CRCERRS..=0x40FC;
/// Destination address of PAUSE frames (IEEE 802.3, 31B.1).
pub const PAUSE_ADDRESS: MacAddr = MacAddr([0x01, 0x80, 0xC2, 0, 0, 1]);

/// Faults that a device can be given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Registers read as all ones, as on a removed device.
    pub gone: bool,
    /// CTRL.RST never clears.
    pub reset_hangs: bool,
    /// The function cannot be reset.
    pub no_function_reset: bool,
    /// Frames are sent, but no descriptor is marked done.
    pub never_done: bool,
    /// RAH0 reports that there is no address.
    pub no_address: bool,
    /// RXDCTL never reports that the queue is enabled, on chips where it can.
    pub never_enabled: bool,
}

/// Test handle of a device. Clones refer to the same device.
#[derive(Debug)]
pub struct Fake<M> {
    address: Bdf,
    config: ConfigSpace,
    doorbells: Arc<DoorbellPage>,
    state: Arc<Mutex<State<M>>>,
}

impl<M> Clone for Fake<M> {
    fn clone(&self) -> Self {
        Self {
            address: self.address,
            config: self.config.clone(),
            doorbells: Arc::clone(&self.doorbells),
            state: Arc::clone(&self.state),
        }
    }
}

impl<M: Model> Fake<M> {
    /// Creates a device that behaves like QEMU's model, after power-on. Returns the function for a driver,
    /// and the handle.
    pub fn new(address: Bdf, id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Self) {
        Self::with(address, id, mac, false)
    }

    /// Creates a device that behaves as the manuals and errata describe the chip, after power-on. Returns the
    /// function for a driver, and the handle.
    pub fn silicon(address: Bdf, id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Self) {
        Self::with(address, id, mac, true)
    }

    fn with(address: Bdf, id: DeviceId, mac: MacAddr, silicon: bool) -> (Box<dyn Function>, Self) {
        let (config, model) = (ConfigSpace::new(id), M::new(id, silicon));
        model.describe(&config);
        let device = Self {
            address,
            config,
            doorbells: DoorbellPage::new(BAR_SIZE),
            state: Arc::new(Mutex::new(State::new(model, mac))),
        };
        (Box::new(device.clone()), device)
    }

    fn lock(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies `change` to the family-specific state.
    pub(super) fn with_model<T>(&self, change: impl FnOnce(&mut M) -> T) -> T {
        change(&mut self.lock().model)
    }

    /// Gives the device the memory that it reads and writes.
    pub fn attach(&self, memory: DeviceView) {
        self.lock().memory = Some(memory);
    }

    /// Sets the faults of the device from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.lock().set_faults(faults);
    }

    /// Config space of the device.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// Returns the value of the register at `offset` bytes, without the side effects of a driver's read.
    pub fn register(&self, offset: u64) -> u32 {
        if Self::is_tail(offset) { self.doorbells.load(offset) } else { self.lock().get(offset) }
    }

    /// Sets a register, for example a counter or a semaphore.
    pub fn set_register(&self, offset: u64, value: u32) {
        self.lock().set(offset, value);
    }

    /// Puts the PHY to sleep, so that the link is down until the driver wakes the PHY.
    pub fn sleep_phy(&self) {
        self.lock().sleep_phy();
    }

    /// Plugs in or pulls the cable. The partner advertises `partner` in PHY register 5.
    pub fn plug(&self, cable: bool, partner: u16) {
        self.lock().plug(cable, partner);
    }

    /// Whether the chip hangs until it is power-cycled.
    pub fn is_hung(&self) -> bool {
        self.lock().model.is_hung()
    }

    /// Number of PAUSE frames that the transmitter obeyed.
    pub fn pauses(&self) -> u64 {
        self.lock().pauses
    }

    /// Number of RX descriptors that the driver has armed and the device has not used.
    pub fn armed(&self) -> usize {
        self.lock().between(M::RDBAL, self.doorbells.load(M::RDBAL + TAIL))
    }

    /// Receives a frame from the wire, which the chip may consume itself. Returns false, and increments MPC,
    /// if there is no room or no receiver.
    pub fn receive(&self, frame: &[u8]) -> bool {
        let mut state = self.lock();
        let rdt = self.doorbells.load(M::RDBAL + TAIL);
        let enabled = self.config.bus_master() && state.get(RCTL) & RCTL_EN != 0;
        let size = if enabled { state.model.buffer_size(&state.registers) } else { 0 };
        if size == 0 || state.between(M::RDBAL, rdt) < frame.len().div_ceil(size) {
            let missed = state.get(MPC) + 1;
            state.set(MPC, missed);
            return false;
        }
        if state.keeps(frame) {
            return true;
        }
        let mut chunks = frame.chunks(size).peekable();
        while let Some(chunk) = chunks.next() {
            let word = M::received(chunk.len(), chunks.peek().is_none());
            if state.complete_rx(chunk, word).is_none() {
                return false;
            }
        }
        true
    }

    /// Completes the next descriptor with `word` and no data. `word` can be any value, and the descriptor
    /// need not be armed.
    pub fn receive_raw(&self, word: u64) {
        let _ = self.lock().complete_rx(&[], word);
    }

    /// Completes the descriptor `ahead` positions after the next one, out of order. The next one stays next.
    pub fn receive_raw_ahead(&self, ahead: u32, word: u64) {
        let mut state = self.lock();
        let head = state.get(M::RDBAL + HEAD);
        state.advance(M::RDBAL, ahead);
        let _ = state.complete_rx(&[], word);
        state.set(M::RDBAL + HEAD, head);
    }

    /// Sends the frames that the driver has queued, up to TDT.
    pub fn step(&self) {
        let mut state = self.lock();
        let enabled = self.config.bus_master() && state.get(TCTL) & TCTL_EN != 0;
        if !enabled || !state.model.sends(&state.registers, &self.config) {
            return;
        }
        let tdt = self.doorbells.load(M::TDBAL + TAIL);
        while state.between(M::TDBAL, tdt) > 0 {
            if state.transmit().is_none() {
                return;
            }
        }
    }

    /// Sends the frames that the driver has queued, and returns all frames sent since the last call.
    pub fn transmitted(&self) -> Vec<Vec<u8>> {
        self.step();
        std::mem::take(&mut self.lock().sent)
    }

    /// Number of register reads by the driver.
    pub fn reads(&self) -> u64 {
        self.lock().reads
    }

    /// Number of resets of the device.
    pub fn resets(&self) -> u64 {
        self.lock().resets
    }

    fn is_tail(offset: u64) -> bool {
        offset == M::RDBAL + TAIL || offset == M::TDBAL + TAIL
    }

    /// Resets the device, through CTRL.RST or through its function.
    pub(super) fn reset_all(&self, of_function: bool) {
        let state = &mut *self.lock();
        state.model.begin_reset(&state.registers, self.config.bus_master(), of_function);
        state.reset();
        state.resets += 1;
        self.doorbells.store(M::RDBAL + TAIL, 0);
        self.doorbells.store(M::TDBAL + TAIL, 0);
    }
}

impl<M: Model> Function for Fake<M> {
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
        M::bar(self, index).ok_or_else(|| {
            let what = format!("cannot open BAR {index} of {}", self.address);
            Error::new(ErrorKind::Unavailable, what, "the device has no such BAR")
        })
    }

    fn reset(&self) -> Result<bool> {
        {
            let state = self.lock();
            if !state.model.has_function_reset() || state.faults().no_function_reset {
                return Ok(false);
            }
        }
        self.reset_all(true);
        self.config.reset();
        Ok(true)
    }

    fn has_iommu(&self) -> bool {
        true
    }

    fn enable_interrupts(&self, kinds: &[Irq], _count: u16) -> Result<Vec<Interrupt>> {
        let event = Event::new()?;
        self.lock().interrupt = Some(event.clone());
        // A signal of this event stays unread: the fake line is never masked.
        let unmask = if kinds.contains(&Irq::Msi) { None } else { Some(Event::new()?) };
        Ok(vec![Interrupt::new(event, unmask)])
    }
}

impl<M: Model> Registers for Fake<M> {
    fn read(&self, offset: u64, _size: usize) -> u64 {
        let state = &mut *self.lock();
        state.reads += 1;
        let faults = state.faults();
        if faults.gone || !self.config.memory_enabled() {
            return u64::MAX;
        }
        let value = if Self::is_tail(offset) { self.doorbells.load(offset) } else { state.get(offset) };
        let value = state.model.read(offset, value, &mut state.registers, faults, self.config.bus_master());
        if offset == ICR && state.get(IMS) == 0 {
            state.set(ICR, 0);
        }
        if STATISTICS.contains(&offset) && !(KEPT.contains(&offset) && state.model.keeps_statistics()) {
            state.set(offset, 0);
        }
        u64::from(value)
    }

    fn write(&self, offset: u64, _size: usize, value: u64) {
        let mut state = self.lock();
        if state.faults().gone || !self.config.memory_enabled() {
            return;
        }
        let Some(value) = state.model.write(offset, value as u32) else { return };
        if M::RESETS.contains(&offset) && value & CTRL_RST != 0 && !state.faults().reset_hangs {
            drop(state);
            return self.reset_all(false);
        }
        match offset {
            STATUS => {}
            MDIC => state.mdic(value),
            IMS | IMC => {
                let mask = state.get(IMS);
                state.set_mask(if offset == IMS { mask | value } else { mask & !value });
            }
            _ if Self::is_tail(offset) => self.doorbells.store(offset, value),
            CTRL => {
                state.set(CTRL, value);
                state.set_link();
            }
            _ => state.set(offset, value),
        }
    }

    fn elapse(&self, time: Duration) {
        self.lock().model.elapse(time);
    }
}
