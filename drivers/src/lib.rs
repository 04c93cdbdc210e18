//! NIC drivers of Vireo: [`virtio`] and [`e1000`], each a control plane ([`port::Nic`]) and two queues
//! that move to lcores ([`port::RxBurst`], [`port::TxBurst`]). [`ports`] takes an application from its
//! EAL arguments to started ports; [`fakedev`] plays the devices in tests.
#![forbid(unsafe_code)]

pub mod e1000;
pub mod fakedev;
pub mod port;
pub mod ports;
pub mod virtio;
