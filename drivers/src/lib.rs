//! NIC drivers of Vireo: [`virtio`], [`e1000`], [`igb`] and [`vhost`], each a control plane ([`port::Nic`]) and two
//! queues that move to lcores ([`port::RxBurst`], [`port::TxBurst`]). [`table`] is the list of them; [`ports`] takes an
//! application from its EAL arguments to started ports; [`fakedev`] plays the devices in tests.
#![forbid(unsafe_code)]

pub mod counters;
pub mod driver;
pub mod e1000;
#[cfg(test)]
mod endurance;
pub mod fakedev;
pub mod foreign;
mod frames;
pub mod igb;
mod intel;
pub mod memory;
pub mod port;
pub mod ports;
pub mod table;
pub mod vhost;
pub mod virtio;
