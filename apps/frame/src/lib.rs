//! The frame of an application on Vireo. An application says what happens to packets, by a [`Hook`]; the frame does everything
//! else. This application is complete, and forwards packets as they are:
//!
//! ```no_run
#![doc = include_str!("../examples/forwarder.rs")]
//! ```
//!
//! | step | what it does |
//! |---|---|
//! | [`main`] | reads the arguments of EAL and application, starts the EAL, turns an error into a line and an exit code |
//! | [`App::open_ports`] | opens NICs and virtual devices |
//! | [`App::share_out`] | decides which lcore polls which queue, and where its packets go ([`Route`]) |
//! | [`App::reserve`] | reserves packet buffers and rings on the right NUMA node, maps them, and gives [`Ports`] |
//! | [`Ports::start_all`] | starts the ports |
//! | [`App::confine`] | gives up root, closes the sandbox |
//! | [`Ports::forward`] | polls on all lcores, restarts ports whose devices misbehave, returns when [`App::stop`] is set |
//! | [`Ports::finish`] | stops and closes the ports, checks that every buffer came back and every packet is accounted for |
//!
//! A hook gets the packets that were received together ([`Packets`]). It reads headers of each packet ([`PacketMut`],
//! [`EthernetHeader`], [`Ipv4Header`], [`IcmpEcho`]), changes the packet, and keeps it or takes it out. The loop around the hook,
//! [`forward::forward`], is compiled for the hook's type. The example `ping-responder` has a hook, the example `net-null` a
//! driver of its own.
//!
//! Each step is a call of its own, so that an application may do more between them: `vireo-l2fwd` prints, and `vireo-pktgen`
//! polls the queues itself ([`Ports::take_queues`]).
#![forbid(unsafe_code)]

mod app;
mod balance;
mod caches;
mod checksum;
mod control;
mod counts;
pub mod forward;
mod headers;
mod hook;
mod idle;
mod kind;
mod launch;
mod ports;
mod recall;
mod route;
mod supervised;

pub use app::{App, main};
pub use balance::Balance;
pub use caches::Caches;
pub use control::PortState;
pub use counts::{Counts, Totals};
pub use headers::{EthernetHeader, IcmpEcho, Ipv4Header};
pub use hook::{Hook, PacketMut, Packets};
pub use ports::{Config, Ports};
pub use route::{Route, neighbours, no_ports, share_out};
pub use supervised::PortSummary;
pub use {vireo_drivers as drivers, vireo_eal as eal};
