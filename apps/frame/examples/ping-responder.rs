//! Answers ICMP echo requests to one IPv4 address: `ping-responder [EAL ARGUMENTS] -- --address 192.0.2.1`
//!
//! It does not answer ARP. Give the pinging host the port's address: `ip neighbour add 192.0.2.1 lladdr MAC dev DEV`.
#![forbid(unsafe_code)]

use std::net::Ipv4Addr;
use std::process::ExitCode;

use clap::Parser;
use vireo_frame::drivers::port::{MacAddr, Nic};
use vireo_frame::drivers::table::Drivers;
use vireo_frame::eal::{Result, program};
use vireo_frame::{App, Config, EthernetHeader, Hook, IcmpEcho, Ipv4Header, PacketMut, Packets};

/// Time to live of replies (RFC 1340).
const TTL: u8 = 64;

/// Arguments after `--`
#[derive(Parser)]
#[command(name = "ping-responder", disable_help_flag = true)]
struct Args {
    /// IPv4 address to answer for, on all ports
    #[arg(long)]
    address: Ipv4Addr,
}

/// Answers echo requests on one port.
struct Responder {
    mac: MacAddr,
    address: Ipv4Addr,
}

impl Responder {
    /// Turns an echo request to this port into a reply. Returns `None` for any other packet.
    fn answer(&self, packet: &mut PacketMut<'_>) -> Option<()> {
        let ethernet = EthernetHeader::read(packet)?;
        let ip = Ipv4Header::read(packet, EthernetHeader::LEN)?;
        let message = ip.payload(EthernetHeader::LEN);
        let echo = IcmpEcho::read(packet, message.clone())?;
        let is_for_us = (ethernet.destination, ethernet.ether_type) == (self.mac, EthernetHeader::IPV4)
            && (ip.destination, ip.protocol) == (self.address, Ipv4Header::ICMP);
        // RFC 1122, 3.2.1.3: no other source address identifies a host.
        let is_from_a_host = ethernet.source.is_valid_station()
            && !(ip.source.is_multicast() || ip.source.is_broadcast() || ip.source.is_unspecified());
        if !is_for_us || !is_from_a_host || ip.is_fragment() || echo.is_reply {
            return None;
        }
        EthernetHeader { destination: ethernet.source, source: self.mac, ..ethernet }.write(packet)?;
        Ipv4Header { destination: ip.source, source: self.address, ttl: TTL, ..ip }
            .write(packet, EthernetHeader::LEN)?;
        IcmpEcho { is_reply: true, ..echo }.write(packet, message)
    }
}

impl Hook for Responder {
    fn process(&mut self, packets: &mut Packets<'_>) {
        packets.retain(|packet| self.answer(packet).is_some());
    }
}

fn respond(app: &App, args: Args) -> Result<()> {
    let open = app.open_ports()?;
    let macs: Vec<MacAddr> = open.iter().map(|open| open.port.mac()).collect();
    let back: Vec<(usize, usize)> = (0..open.len()).map(|port| (port, port)).collect();
    let mut ports = app.reserve(open, app.assign_lcores(&back, 1)?, &Config::default())?;
    ports.start_all(false)?;
    ports.wait_for_links(&app.stop, || Ok(()))?;
    app.confine()?;
    program::print("answering\n")?;
    let responder = |port: usize| Responder { mac: macs[port], address: args.address };
    ports.forward(app, |route| responder(route.from), &|_| (), |_| ())?;
    for port in 0..macs.len() {
        let counts = ports.counts().of(port);
        program::print(&format!("port {port}: received {} sent {}\n", counts.received, counts.sent))?;
    }
    ports.finish(|_, _| Ok(()))
}

fn main() -> ExitCode {
    vireo_frame::main(Drivers::default(), respond)
}
