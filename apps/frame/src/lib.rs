//! The application frame: everything that a Vireo application needs except its packet processing, which it
//! supplies as a [`Hook`]. This application is complete, and forwards packets unchanged:
//!
//! ```no_run
#![doc = include_str!("../examples/forwarder.rs")]
//! ```
//!
//! | step | what it does |
//! |---|---|
//! | [`main`] | parses the arguments, starts the EAL, prints an error as one line, returns the exit code |
//! | [`App::open_ports`] | opens NICs and virtual devices |
//! | [`App::assign_lcores`] | decides which lcore polls which queue, and where the queue's packets go ([`Route`]) |
//! | [`App::reserve`] | reserves packet buffers and rings on the right NUMA node, maps them, and returns [`Ports`] |
//! | [`Ports::start_all`] | starts the ports |
//! | [`App::confine`] | drops root privileges (`--user`), enters the sandbox (unless `--no-sandbox`) |
//! | [`Ports::forward`] | polls on all lcores, restarts ports whose devices misbehave, returns when [`App::stop`] is set |
//! | [`Ports::finish`] | stops and closes the ports, checks that every buffer and packet is accounted for |
//!
//! A hook is called with packets that were received together ([`Packets`]). For each packet it can read
//! headers ([`PacketMut`], [`EthernetHeader`], [`Ipv4Header`], [`IcmpEcho`]), change the packet, and keep or
//! remove it. The polling loop, [`forward::forward`], is compiled for the hook's type. If a hook treats all
//! packets alike ([`Hook::uniform`]), the two queues of a lane share buffers ([`tied`]), unless
//! [`Ports::set_tied_lanes`] forbids it. The example `ping-responder` implements a hook, and the example
//! `net-null` a driver.
//!
//! Each step is a separate call, so an application can act between steps: `vireo-l2fwd` prints its output,
//! and `vireo-pktgen` polls the queues itself ([`Ports::take_queues`]).
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
mod sleep;
mod status;
mod supervised;
mod telemetry;
pub mod tied;

pub use app::{App, main, main_of_shareable};
pub use balance::Balance;
pub use caches::Caches;
pub use control::{Handover, PortState, RunEvent, SecondaryState};
pub use counts::{Counts, LcoreTicks, Totals};
pub use headers::{EthernetHeader, IcmpEcho, Ipv4Header};
pub use hook::{Hook, PacketMut, Packets, Uniform};
pub use ports::{Config, Ports};
pub use route::{Processes, Route, assign_lcores, neighbors, no_ports};
pub use sleep::Sleep;
pub use supervised::PortSummary;
pub use telemetry::Telemetry;
pub use {vireo_drivers as drivers, vireo_eal as eal};
