//! Packet headers as values: `read` copies a header out of a packet, `write` copies it into one.
//!
//! `read` returns `None` unless the packet holds the whole header, the header's lengths fit the packet, and
//! its checksum is correct. `write` sets the checksum, and returns `None` if the packet is too short.

use std::net::Ipv4Addr;
use std::ops::Range;

use vireo_drivers::port::MacAddr;

use crate::hook::PacketMut;

/// Ethernet II header (IEEE 802.3, 3.2), at the start of each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EthernetHeader {
    /// Address of the receiver.
    pub destination: MacAddr,
    /// Address of the sender.
    pub source: MacAddr,
    /// Protocol of the payload, such as [`EthernetHeader::IPV4`].
    pub ether_type: u16,
}

impl EthernetHeader {
    /// Length in bytes.
    pub const LEN: usize = 14;
    /// EtherType of IPv4.
    pub const IPV4: u16 = 0x0800;

    /// Reads the header of `packet`.
    pub fn read(packet: &PacketMut<'_>) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ether_type @ ..] = packet.read::<{ Self::LEN }>(0)?;
        Some(Self {
            destination: MacAddr([a, b, c, d, e, f]),
            source: MacAddr([g, h, i, j, k, l]),
            ether_type: u16::from_be_bytes(ether_type),
        })
    }

    /// Writes the header to `packet`.
    pub fn write(&self, packet: &mut PacketMut<'_>) -> Option<()> {
        packet.write(0, &self.destination.0)?;
        packet.write(6, &self.source.0)?;
        packet.write(12, &self.ether_type.to_be_bytes())
    }
}

/// IPv4 header (RFC 791, 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Header {
    /// Length of the header with its options, in bytes: 20 to 60.
    pub header_len: usize,
    /// Differentiated services and congestion notification.
    pub traffic_class: u8,
    /// Length of header and payload, in bytes.
    pub total_len: usize,
    /// Number shared by all fragments of a datagram.
    pub identification: u16,
    /// Flags (upper three bits), and fragment offset in units of 8 bytes.
    pub fragment: u16,
    /// Remaining hops.
    pub ttl: u8,
    /// Protocol of the payload, such as [`Ipv4Header::ICMP`].
    pub protocol: u8,
    /// Address of the sender.
    pub source: Ipv4Addr,
    /// Address of the receiver.
    pub destination: Ipv4Addr,
}

impl Ipv4Header {
    /// Length without options, in bytes.
    pub const LEN: usize = 20;
    /// Protocol number of ICMP.
    pub const ICMP: u8 = 1;
    /// "More fragments" flag and fragment offset, which are 0 in an unfragmented datagram.
    const FRAGMENT: u16 = 0x3fff;

    /// Reads the header at `at`.
    pub fn read(packet: &PacketMut<'_>, at: usize) -> Option<Self> {
        let [version, traffic_class, l, m, i, j, f, g, ttl, protocol, _, _, a, b, c, d, destination @ ..] =
            packet.read::<{ Self::LEN }>(at)?;
        let header_len = usize::from(version & 0xf) * 4;
        let total_len = usize::from(u16::from_be_bytes([l, m]));
        let fits = Self::LEN <= header_len && header_len <= total_len && total_len <= packet.len() - at;
        (version >> 4 == 4 && fits && packet.checksum(at..at + header_len)? == 0).then_some(Self {
            header_len,
            traffic_class,
            total_len,
            identification: u16::from_be_bytes([i, j]),
            fragment: u16::from_be_bytes([f, g]),
            ttl,
            protocol,
            source: [a, b, c, d].into(),
            destination: destination.into(),
        })
    }

    /// Writes the header at `at`. IPv4 options that are already in the packet, as `header_len` indicates, are
    /// kept.
    pub fn write(&self, packet: &mut PacketMut<'_>, at: usize) -> Option<()> {
        let words = u8::try_from(self.header_len / 4).ok().filter(|words| (5..16).contains(words))?;
        let [l, m] = u16::try_from(self.total_len).ok()?.to_be_bytes();
        let ([i, j], [f, g]) = (self.identification.to_be_bytes(), self.fragment.to_be_bytes());
        let (source, destination) = (self.source.octets(), self.destination.octets());
        packet.write(
            at,
            &[0x40 | words, self.traffic_class, l, m, i, j, f, g, self.ttl, self.protocol, 0, 0],
        )?;
        packet.write(at + 12, &source)?;
        packet.write(at + 16, &destination)?;
        let checksum = packet.checksum(at..at + usize::from(words) * 4)?;
        packet.write(at + 10, &checksum.to_be_bytes())
    }

    /// Returns the byte range of the payload in a packet with this header at `at`.
    pub fn payload(&self, at: usize) -> Range<usize> {
        at + self.header_len..at + self.total_len
    }

    /// Returns whether the packet holds only a part of the datagram.
    pub fn is_fragment(&self) -> bool {
        self.fragment & Self::FRAGMENT != 0
    }
}

/// ICMP echo request or reply (RFC 792); its data follows the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpEcho {
    /// Whether the message is a reply.
    pub is_reply: bool,
    /// Number chosen by the sender.
    pub identifier: u16,
    /// Sequence number of the request.
    pub sequence: u16,
}

impl IcmpEcho {
    /// Length in bytes.
    pub const LEN: usize = 8;
    const REPLY: u8 = 0;
    const REQUEST: u8 = 8;

    /// Reads the header of the message in the byte range `at`. Also returns `None` for any other ICMP
    /// message.
    pub fn read(packet: &PacketMut<'_>, at: Range<usize>) -> Option<Self> {
        let [kind, code, _, _, i, j, s, t] = packet.read::<{ Self::LEN }>(at.start)?;
        let is_echo = matches!(kind, Self::REPLY | Self::REQUEST) && code == 0 && at.len() >= Self::LEN;
        (is_echo && packet.checksum(at)? == 0).then_some(Self {
            is_reply: kind == Self::REPLY,
            identifier: u16::from_be_bytes([i, j]),
            sequence: u16::from_be_bytes([s, t]),
        })
    }

    /// Writes the header of the message in the byte range `at`, with a checksum that covers the message's
    /// data.
    pub fn write(&self, packet: &mut PacketMut<'_>, at: Range<usize>) -> Option<()> {
        let kind = if self.is_reply { Self::REPLY } else { Self::REQUEST };
        let ([i, j], [s, t]) = (self.identifier.to_be_bytes(), self.sequence.to_be_bytes());
        if at.len() < Self::LEN {
            return None;
        }
        packet.write(at.start, &[kind, 0, 0, 0, i, j, s, t])?;
        let checksum = packet.checksum(at.clone())?;
        packet.write(at.start + 2, &checksum.to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hook::tests::with_packet;

    #[test]
    fn lengths_must_fit_the_packet() {
        let ip = Ipv4Header {
            header_len: 24,
            traffic_class: 0,
            total_len: 46,
            identification: 0,
            fragment: 0,
            ttl: 64,
            protocol: Ipv4Header::ICMP,
            source: [192, 0, 2, 1].into(),
            destination: [192, 0, 2, 2].into(),
        };
        let read = |ip: Ipv4Header| {
            with_packet(&[0; 60], |packet| {
                ip.write(packet, EthernetHeader::LEN)?;
                Ipv4Header::read(packet, EthernetHeader::LEN)
            })
        };
        assert_eq!(read(ip), Some(ip));
        for (header_len, total_len) in [(24, 47), (24, 23), (16, 46), (64, 46), (48, 48)] {
            assert_eq!(read(Ipv4Header { header_len, total_len, ..ip }), None, "{header_len}, {total_len}");
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_back(bytes: [u8; 12], fields: [u16; 3], tail in 60_usize..200, words in 5_usize..16) {
            let [a, b, c, d, e, f, g, h, ttl, protocol, traffic_class, _] = bytes;
            let ethernet = EthernetHeader {
                destination: MacAddr([a, b, c, d, e, f]),
                source: MacAddr([f, e, d, c, b, a]),
                ether_type: fields[0],
            };
            let ip = Ipv4Header {
                header_len: words * 4,
                traffic_class,
                total_len: tail,
                identification: fields[0],
                fragment: fields[1],
                ttl,
                protocol,
                source: [a, b, c, d].into(),
                destination: [e, f, g, h].into(),
            };
            let echo = IcmpEcho { is_reply: ttl > 9, identifier: fields[1], sequence: fields[2] };
            with_packet(&vec![0x5a; EthernetHeader::LEN + tail], |packet| {
                ethernet.write(packet).unwrap();
                prop_assert_eq!(EthernetHeader::read(packet), Some(ethernet));
                ip.write(packet, 14).unwrap();
                prop_assert_eq!(Ipv4Header::read(packet, 14), Some(ip));
                let message = ip.payload(14);
                let fits = message.len() >= IcmpEcho::LEN;
                prop_assert_eq!(echo.write(packet, message.clone()).is_some(), fits);
                prop_assert_eq!(IcmpEcho::read(packet, message), fits.then_some(echo));
                Ok(())
            })?;
        }

        #[test]
        fn no_packet_panics(
            bytes in proptest::collection::vec(prop_oneof![Just(0x45), any::<u8>()], 0..100),
            at in 0_usize..100,
            end in prop_oneof![0_usize..100, any::<usize>()],
        ) {
            with_packet(&bytes, |packet| {
                let (_, ip) = (EthernetHeader::read(packet), Ipv4Header::read(packet, at));
                let _ = IcmpEcho::read(packet, at..end);
                if let Some(ip) = ip {
                    let _ = ip.write(packet, at);
                }
            });
        }
    }
}
