//! Runs the examples as processes and sends packets through them. Needs no NIC, hugepages or root.

#[cfg(test)]
mod peer;

use peer::Example;

const FRONT_PAGE: &str = include_str!("../examples/forwarder.rs");

#[test]
fn the_forwarder_of_the_front_page_forwards() {
    assert!(FRONT_PAGE.lines().count() <= 40);
    let mut forwarder = Example::start("forwarder", 2, &[]);
    let mut peer = forwarder.connect();
    assert_eq!(forwarder.line(), "forwarding\n");
    for (from, to) in [(0, 1), (1, 0)] {
        for round in 0..20_u8 {
            let frames: Vec<Vec<u8>> = (0..32).map(|number| [from as u8, round, number].repeat(20)).collect();
            frames.iter().for_each(|frame| peer.send(from, frame));
            assert_eq!(peer.receive(to, frames.len()), frames);
        }
    }
    peer.stop();
    let said = forwarder.stop();
    for port in [0, 1] {
        let counters = said.lines().find(|line| line.starts_with(&format!("port {port}: "))).unwrap();
        assert!(
            counters.contains("(\"rx_packets\", 640)") && counters.contains("(\"tx_packets\", 640)"),
            "{said}"
        );
    }
}

/// Computes the Internet checksum as RFC 1071 defines it.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn set_checksum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 2].fill(0);
    let sum = checksum(bytes).to_be_bytes();
    bytes[at..at + 2].copy_from_slice(&sum);
}

/// Creates an ICMP message of `kind` from 192.0.2.9 to 192.0.2.1, with `options` bytes of IPv4 options and
/// `data` bytes of data, in an Ethernet frame that is padded at the end.
fn echo(kind: u8, ttl: u8, swapped: bool, options: usize, data: usize) -> Vec<u8> {
    let (us, it) = ([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 0]);
    let ends = |a: &[u8], b: &[u8]| if swapped { [b, a].concat() } else { [a, b].concat() };
    let mut frame = [ends(&it, &us), vec![8, 0]].concat();
    let len = (20 + options + 8 + data) as u16;
    let mut ip = vec![0x45 + options as u8 / 4, 0, 0, 0, 0x12, 0x34, 0x40, 0, ttl, 1, 0, 0];
    ip[2..4].copy_from_slice(&len.to_be_bytes());
    ip.extend(ends(&[192, 0, 2, 9], &[192, 0, 2, 1]));
    ip.extend(vec![1; options]);
    set_checksum(&mut ip, 10);
    let mut icmp = vec![kind, 0, 0, 0, 0xbe, 0xef, 0, 7];
    icmp.extend((0..data).map(|number| number as u8));
    set_checksum(&mut icmp, 2);
    frame.extend(ip);
    frame.extend(icmp);
    frame.resize(frame.len().max(60), 0x77);
    frame
}

#[test]
fn echo_requests_are_answered_and_nothing_else() {
    let mut responder = Example::start("ping-responder", 1, &["--address", "192.0.2.1"]);
    let mut peer = responder.connect();
    assert_eq!(responder.line(), "answering\n");
    let request = echo(8, 3, false, 0, 56);
    let changed = |at: usize, byte: u8| {
        let mut frame = request.clone();
        frame[at] ^= byte;
        frame
    };
    let in_ip = |at: usize, byte: u8| {
        let mut frame = changed(14 + at, byte);
        set_checksum(&mut frame[14..34], 10);
        frame
    };
    let others = [
        ("to another station", changed(5, 1)),
        ("from a group", changed(6, 1)),
        ("from a multicast address", in_ip(12, 0xc0 ^ 0xe0)),
        ("ARP", changed(13, 6)),
        ("IPv6", in_ip(0, 0x20)),
        ("a header that is too short", in_ip(0, 1)),
        ("a header that is longer than the datagram", {
            let mut frame = echo(8, 3, false, 0, 0);
            frame[14] = 0x4f;
            frame.resize(90, 0x77);
            set_checksum(&mut frame[14..74], 10);
            frame
        }),
        ("wrong sum of the header", changed(24, 1)),
        ("longer than the frame", in_ip(2, 1)),
        ("a first fragment", in_ip(6, 0x20)),
        ("a later fragment", in_ip(7, 1)),
        ("UDP", in_ip(9, 16)),
        ("to another address", in_ip(19, 2)),
        ("wrong sum of the message", changed(97, 1)),
        ("a reply", echo(0, 3, false, 0, 56)),
        ("a code", {
            let mut frame = changed(35, 1);
            set_checksum(&mut frame[34..], 2);
            frame
        }),
        ("less than an IPv4 header", request[..17].to_vec()),
        ("a header that ends early", request[..33].to_vec()),
    ];
    // Each is followed by a request, whose reply must be the next frame to arrive.
    for (number, (what, frame)) in others.iter().enumerate() {
        peer.send(0, frame);
        let data = number * 97;
        let options = number % 3 * 4;
        peer.send(0, &echo(8, 3, false, options, data));
        assert_eq!(peer.receive(0, 1), [echo(0, 64, true, options, data)], "{what}");
    }
    peer.stop();
    assert_eq!(responder.stop(), format!("port 0: received {} sent {}\n", 2 * others.len(), others.len()));
}
