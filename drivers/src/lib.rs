//! NIC drivers of Vireo: [`virtio`], [`e1000`], [`igb`] and [`vhost`]. Each has a control plane
//! ([`port::Nic`]) and queues that move to lcores ([`port::RxBurst`], [`port::TxBurst`]). [`table`] lists the
//! drivers, [`ports`] takes an application from its EAL arguments to started ports, and [`fakedev`] simulates
//! the devices in tests.
#![forbid(unsafe_code)]

pub mod counters;
pub mod driver;
pub mod e1000;
#[cfg(test)]
mod endurance;
pub mod fakedev;
pub mod foreign;
mod frames;
pub mod handover;
pub mod igb;
mod intel;
pub mod memory;
pub mod port;
pub mod ports;
pub mod table;
pub mod tied;
pub mod vhost;
pub mod virtio;
