//! The smallest driver that makes a NIC write to a given address, on the EAL alone: an e1000 with its PHY in
//! loopback, so that the frame it sends returns into the buffer that its only RX descriptor names.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vireo_bus_pci::{Function, PciDevice};
use vireo_drivers::e1000::regs::*;
use vireo_eal::dma::{DmaMemory, DmaRing};
use vireo_eal::mmio::Bar;
use vireo_eal::program::note;
use vireo_eal::{Error, ErrorKind, Result};

/// Descriptors per ring: the fewest that RDLEN and TDLEN allow.
const ENTRIES: usize = 8;
/// 64-bit words per page.
pub(super) const PAGE_WORDS: usize = 512;
/// A broadcast frame with an EtherType for experiments (IEEE 802, 9.2.4).
const FRAME: &[u8; 64] =
    b"\xff\xff\xff\xff\xff\xff\x02vireo\x88\xb5This NIC wrote to where its descriptor pointed it.";
/// Longest wait for a register to change.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time for a chip to load its registers from NVM after a reset. The PHY of an 82574 takes 25 ms after
/// EECD.AUTO_RD.
const RELOAD: Duration = Duration::from_millis(50);
/// Longest wait for the frame. QEMU's 82540EM receives nothing for a second after a write of RCTL.
const ARRIVAL: Duration = Duration::from_secs(3);
/// A frame that is not received within this time is sent again.
const RESEND: Duration = Duration::from_millis(100);

/// A NIC with rings for one frame. Dropping it resets the NIC before its memory is released.
pub(super) struct LoopNic {
    device: PciDevice,
    bar: Bar,
    rx: DmaRing<u64, 2>,
    tx: DmaRing<u64, 2>,
    frame: DmaRing<u64>,
    own: DmaRing<u64>,
    phy: u16,
    memory: Arc<DmaMemory>,
}

impl LoopNic {
    pub(super) fn new(device: PciDevice, memory: &Arc<DmaMemory>) -> Result<Self> {
        device.set_command(false)?;
        let bar = device.bar(0)?;
        let ring = || DmaRing::new(memory, ENTRIES, 128);
        let page = || DmaRing::new(memory, PAGE_WORDS, 4096);
        let (rx, tx, frame, own) = (ring()?, ring()?, page()?, page()?);
        let mut nic = Self { device, bar, rx, tx, frame, own, phy: 0, memory: Arc::clone(memory) };
        nic.reset()?;
        nic.phy = nic.phy_access(MDIC_OP_READ)? & !PHY_CONTROL_LOOPBACK;
        for (index, word) in frame_words().enumerate() {
            nic.frame.store::<0>(index, word);
        }
        Ok(nic)
    }

    /// Bytes of memory that the driver uses.
    pub(super) const MEMORY: usize = 4 * 4096;

    fn wait(&self, register: u64, done: impl Fn(u32) -> bool) -> Result<u32> {
        let since = Instant::now();
        loop {
            let value = self.bar.read32(register);
            if value != u32::MAX && done(value) {
                return Ok(value);
            }
            if since.elapsed() > PATIENCE {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    format!("cannot use {}", self.device.address()),
                    format!("register {register:#x} still reads {value:#x} after a second"),
                ));
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn phy_access(&self, operation: u32) -> Result<u16> {
        self.bar.write32(MDIC, operation | PHY_CONTROL << MDIC_REG_SHIFT | MDIC_PHY);
        self.wait(MDIC, |mdic| mdic & (MDIC_READY | MDIC_ERROR) != 0).map(|mdic| mdic as u16)
    }

    /// Resets the function if it supports a reset. Then resets the chip with CTRL.RST and clears the
    /// registers that CTRL.RST leaves.
    fn reset(&self) -> Result<()> {
        self.device.set_command(false)?;
        if self.device.reset()? {
            self.device.set_command(false)?;
        }
        self.bar.write32(CTRL, self.bar.read32(CTRL) | CTRL_RST);
        std::thread::sleep(Duration::from_micros(1));
        self.wait(CTRL, |ctrl| ctrl & CTRL_RST == 0)?;
        self.bar.pause(RELOAD);
        self.bar.write32(IMC, u32::MAX);
        for register in [RCTL, TCTL, RDH, RDT, TDH, TDT, RDLEN, TDLEN, RXCSUM] {
            self.bar.write32(register, 0);
        }
        Ok(())
    }

    /// Resets the NIC and lets it receive one frame into the buffer at `address`. Returns whether the NIC
    /// reports a received frame.
    pub(super) fn receive_into(&self, address: u64) -> Result<bool> {
        self.reset()?;
        let bar = &self.bar;
        self.rx.fill(0);
        self.tx.fill(0);
        self.rx.store::<0>(0, address);
        for (ring, [low, high, len]) in [(&self.rx, [RDBAL, RDBAH, RDLEN]), (&self.tx, [TDBAL, TDBAH, TDLEN])]
        {
            bar.write32(low, ring.iova() as u32);
            bar.write32(high, (ring.iova() >> 32) as u32);
            bar.write32(len, (ENTRIES * 16) as u32);
        }
        bar.write32(CTRL, bar.read32(CTRL) | CTRL_SLU);
        self.wait(STATUS, |status| status & STATUS_LU != 0)?;
        let loops = PHY_CONTROL_LOOPBACK | PHY_CONTROL_FULL_DUPLEX | PHY_CONTROL_SPEED_1000;
        self.phy_access(MDIC_OP_WRITE | u32::from(loops))?;
        self.device.set_command(true)?;
        bar.write32(TCTL, TCTL_EN | TCTL_PSP | TCTL_COLLISION);
        bar.write32(RCTL, RCTL_EN | RCTL_BAM | RCTL_SECRC);
        // RDH is 0, so this gives the NIC the first descriptor only.
        bar.write32(RDT, 1);
        let since = Instant::now();
        let mut sent = 0;
        let mut received = false;
        while !received && since.elapsed() < ARRIVAL {
            if since.elapsed() >= RESEND * sent {
                let index = sent as usize;
                self.tx.store::<0>(index, self.frame.iova());
                self.tx.store::<1>(index, FRAME.len() as u64 | TXD_EOP | TXD_IFCS);
                sent += 1;
                bar.write32(TDT, sent % ENTRIES as u32);
            }
            std::thread::sleep(Duration::from_millis(1));
            received = self.rx.load::<1>(0) & RXD_DD != 0;
        }
        self.phy_access(MDIC_OP_WRITE | u32::from(self.phy))?;
        self.reset()?;
        Ok(received)
    }

    /// Resets the NIC and returns whether a frame reaches the NIC's own buffer.
    pub(super) fn works(&self) -> Result<bool> {
        self.own.fill(0);
        let received = self.receive_into(self.own.iova())?;
        Ok(received && frame_words().enumerate().all(|(index, word)| self.own.load::<0>(index) == word))
    }

    /// The RX ring, as a target for another NIC.
    pub(super) fn ring(&self) -> &DmaRing<u64, 2> {
        &self.rx
    }
}

impl Drop for LoopNic {
    fn drop(&mut self) {
        if let Err(error) = self.reset() {
            Arc::clone(&self.memory).keep();
            note(&format!("vireo-vfio-bench: {error}; its memory is kept"));
        }
    }
}

fn frame_words() -> impl Iterator<Item = u64> {
    FRAME.as_chunks().0.iter().copied().map(u64::from_le_bytes)
}
