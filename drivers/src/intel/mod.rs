//! Family-independent part of the driver for Intel's Gigabit Ethernet controllers. Each family implements
//! [`Chip`]: [`e1000`](crate::e1000) and [`igb`](crate::igb). This module depends on neither.

mod chip;
mod counter;
mod device;
mod format;
mod hardware;
mod interrupt;
mod phy;
pub(crate) mod regs;
mod reset;
mod rx;
#[cfg(test)]
pub(crate) mod tests;
mod tx;

pub(crate) use self::chip::{Chip, QueueControl, RingRegisters, chips};
#[cfg(test)]
pub(crate) use self::counter::Drops;
pub(crate) use self::device::Device;
pub(crate) use self::format::Format;
pub(crate) use self::hardware::Hardware;
pub(crate) use self::phy::Phy;
pub(crate) use self::regs::registers;
pub(crate) use self::reset::Reset;
pub(crate) use self::rx::RxQueue;
pub(crate) use self::tx::TxQueue;
