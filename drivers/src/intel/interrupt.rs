//! Interrupt of the RX queue and of the link (SDM 13.4, DS 10.2.4, 82576 8.8).
//!
//! All families have the same registers for a single interrupt, by MSI or INTx. MSI-X has others in each family, and
//! a port with one RX queue has little use for more vectors, because the queue passes on changes of the link.

use std::os::fd::{AsFd, BorrowedFd};

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_bus_pci::{Interrupt, InterruptRecord};
use vireo_eal::Result;
use vireo_eal::event::Event;
use vireo_eal::handover::{Fds, ReceivedFds};
use vireo_eal::mmio::Bar;
use vireo_eal::vfio::Irq;

use super::Hardware;
use super::regs::*;

/// Causes that say that the RX queue has work.
const CAUSES: u32 = ICR_RXT0 | ICR_RXDMT0 | ICR_RXO;

/// The chip's only interrupt, which it keeps for all starts.
#[derive(Clone, Debug)]
pub(super) struct Vector {
    interrupt: Interrupt,
    /// Signaled for a change of the link by an RX queue that has the interrupt.
    link: Event,
}

/// A [`Vector`] for another process.
#[derive(Serialize, Deserialize, Schema)]
pub(super) struct VectorRecord {
    interrupt: InterruptRecord,
    link: u32,
}

impl Vector {
    /// Enables the interrupt of the chip. A conventional PCI chip has no MSI, or one with errata (Linux's e1000 driver
    /// uses INTx only).
    ///
    /// # Errors
    /// When the function has no such interrupt, or the kernel refuses.
    pub(super) fn enable(hardware: &Hardware, is_express: bool) -> Result<Option<Self>> {
        let kinds: &[Irq] = if is_express { &[Irq::Msi, Irq::Intx] } else { &[Irq::Intx] };
        let interrupt = hardware.function.enable_interrupts(kinds, 1)?.pop();
        interrupt.map(|interrupt| Ok(Self { interrupt, link: Event::new()? })).transpose()
    }

    pub(super) fn record<'a>(&'a self, fds: &mut Fds<'a>) -> VectorRecord {
        VectorRecord { interrupt: self.interrupt.record(fds), link: fds.add(self.link.as_fd()) }
    }

    /// # Errors
    /// `Protocol` when a descriptor is missing.
    pub(super) fn of(record: &VectorRecord, fds: &ReceivedFds) -> Result<Self> {
        let link = Event::from_fd(fds.get(record.link)?);
        Ok(Self { interrupt: Interrupt::of(&record.interrupt, fds)?, link })
    }
}

/// Who waits for the interrupt of a started chip.
#[derive(Clone, Debug)]
pub(super) enum Waiter {
    /// The RX queue, which passes changes of the link on.
    RxQueue(Vector),
    /// Whoever watches the link.
    Link(Vector),
}

impl Waiter {
    fn vector(&self) -> &Vector {
        match self {
            Self::RxQueue(vector) | Self::Link(vector) => vector,
        }
    }

    pub(super) fn is_line(&self) -> bool {
        self.vector().interrupt.is_line()
    }

    pub(super) fn is_rx_queue(&self) -> bool {
        matches!(self, Self::RxQueue(_))
    }

    /// Returns the interrupt for the RX queue, if that waits for it.
    pub(super) fn rx_interrupt(&self, hardware: &Hardware) -> Option<RxInterrupt> {
        self.is_rx_queue().then(|| RxInterrupt { vector: self.vector().clone(), bar: hardware.bar.clone() })
    }

    /// Event that is signaled when the link may have changed.
    pub(super) fn link_event(&self) -> BorrowedFd<'_> {
        match self {
            Self::RxQueue(vector) => vector.link.as_fd(),
            Self::Link(vector) => vector.interrupt.event().as_fd(),
        }
    }

    /// Lets the chip interrupt for the next change of the link, if no RX queue does.
    pub(super) fn watch(&self, bar: &Bar) {
        if let Self::Link(vector) = self {
            // Masked, because a read might not clear the cause of an interrupt otherwise (DS 10.2.4.1).
            bar.write32(IMC, u32::MAX);
            bar.read32(ICR);
            vector.interrupt.unmask();
            bar.write32(IMS, ICR_LSC);
        }
    }

    /// Takes the event. The state of the link must be read after this call.
    pub(super) fn take(&self, bar: &Bar) {
        match self {
            Self::RxQueue(vector) => _ = vector.link.take(),
            Self::Link(vector) if vector.interrupt.event().take() => self.watch(bar),
            Self::Link(_) => {}
        }
    }
}

/// The chip's interrupt as an RX queue uses it.
#[derive(Debug)]
pub(super) struct RxInterrupt {
    vector: Vector,
    bar: Bar,
}

impl RxInterrupt {
    pub(super) fn event(&self) -> &Event {
        self.vector.interrupt.event()
    }

    /// Lets the chip interrupt for packets that it receives, and changes of the link, after this call.
    pub(super) fn arm(&self) {
        // While all causes are masked, the read clears the causes of packets that were polled (DS 10.2.4.1).
        if self.bar.read32(ICR) & ICR_LSC != 0 {
            self.vector.link.signal();
        }
        self.vector.interrupt.unmask();
        self.bar.write32(IMS, CAUSES | ICR_LSC);
    }

    /// Masks the interrupt. Causes stay pending until the next [`RxInterrupt::arm`].
    pub(super) fn disarm(&self) {
        self.bar.write32(IMC, u32::MAX);
        self.event().take();
    }
}
