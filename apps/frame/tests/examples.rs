//! The examples, as processes that packets go through: no NIC, hugepages or root.

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
