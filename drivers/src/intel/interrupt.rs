//! Interrupt of the RX queue (SDM 13.4, DS 10.2.4, 82576 8.8).
//!
//! All families have the same registers for a single interrupt, by MSI or INTx. MSI-X has others in each family, and
//! a port with one RX queue gains nothing from more vectors.

use vireo_bus_pci::Interrupt;
use vireo_eal::Result;
use vireo_eal::event::Event;
use vireo_eal::mmio::Bar;
use vireo_eal::vfio::Irq;

use super::Hardware;
use super::regs::*;

/// Causes that say that the RX queue has work.
const CAUSES: u32 = ICR_RXT0 | ICR_RXDMT0 | ICR_RXO;

/// Enables the interrupt of the chip. A conventional PCI chip has no MSI, or one with errata (Linux's e1000 driver
/// uses INTx only).
///
/// # Errors
/// When the function has no such interrupt, or the kernel refuses.
pub(super) fn enable(hardware: &Hardware, is_express: bool) -> Result<Option<Interrupt>> {
    let kinds: &[Irq] = if is_express { &[Irq::Msi, Irq::Intx] } else { &[Irq::Intx] };
    Ok(hardware.function.enable_interrupts(kinds, 1)?.pop())
}

/// The chip's interrupt as an RX queue uses it.
#[derive(Debug)]
pub(super) struct RxInterrupt {
    interrupt: Interrupt,
    bar: Bar,
}

impl RxInterrupt {
    pub(super) fn new(interrupt: Interrupt, hardware: &Hardware) -> Self {
        Self { interrupt, bar: hardware.bar.clone() }
    }

    pub(super) fn event(&self) -> &Event {
        self.interrupt.event()
    }

    /// Lets the chip interrupt for packets that it receives after this call.
    pub(super) fn arm(&self) {
        // While all causes are masked, the read clears the causes of packets that were polled (DS 10.2.4.1).
        self.bar.read32(ICR);
        self.interrupt.unmask();
        self.bar.write32(IMS, CAUSES);
    }

    /// Masks the interrupt.
    pub(super) fn disarm(&self) {
        self.bar.write32(IMC, u32::MAX);
        self.event().take();
    }
}
