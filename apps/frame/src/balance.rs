//! Whether every packet of a run is accounted for: what was received is what was sent and what was dropped, and the
//! drivers counted the same.

use std::collections::BTreeMap;

use serde::Serialize;
use vireo_eal::{Error, ErrorKind, Result};

use crate::counts::Counts;
use crate::route::Route;
use crate::supervised::SupervisedPort;

/// What was forwarded from one port to another, at the end of a run. The counts are of packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Balance {
    /// Port that received.
    pub from: usize,
    /// Port that sent.
    pub to: usize,
    /// Packets that the RX queues of `from` gave, by their drivers' count.
    pub rx_packets: u64,
    /// Packets that lcores took from these.
    pub received: u64,
    /// Packets that the application took out.
    #[serde(skip_serializing_if = "is_zero")]
    pub consumed: u64,
    /// Packets that lcores handed to the TX queues of `to`.
    pub sent: u64,
    /// Packets that found no room there.
    pub dropped: u64,
    /// Packets that the TX queues took, by their drivers' count.
    pub tx_packets: u64,
    /// Packets that these drivers dropped because they do not fit.
    pub tx_errors: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Balance {
    /// The sums of `routes` between ports that have stopped, one for each two ports.
    pub(crate) fn of(routes: &[Route], ports: &[SupervisedPort], counts: &Counts) -> Vec<Self> {
        let mut all: BTreeMap<(usize, usize), Self> = BTreeMap::new();
        for &Route { from, to, pair, .. } in routes {
            let sum = all.entry((from, to)).or_insert(Self { from, to, ..Self::default() });
            let ((rx, _), (_, tx)) = (ports[from].pairs[pair], ports[to].pairs[pair]);
            let (received, sent) = (counts.of_pair(from, pair), counts.of_pair(to, pair));
            sum.rx_packets += rx.packets;
            sum.received += received.received.get();
            sum.consumed += received.consumed.get();
            sum.sent += sent.sent.get();
            sum.dropped += sent.dropped.get();
            sum.tx_packets += tx.packets;
            sum.tx_errors += tx.errors;
        }
        all.into_values().collect()
    }

    /// Both sums in words, and a line feed.
    pub fn text(&self) -> String {
        let Self { from, to, rx_packets, received, consumed, sent, dropped, tx_packets, tx_errors } = self;
        let consumed = if *consumed > 0 { format!(" + consumed {consumed}") } else { String::new() };
        format!(
            "Port {from} to port {to}: received {received} of rx_packets {rx_packets}, \
             sent {sent} + dropped {dropped}{consumed}; sent as tx_packets {tx_packets} + tx_errors {tx_errors}\n"
        )
    }

    /// Whether no packet was lost or made between the two ports.
    ///
    /// # Errors
    /// `Protocol`, with the sums.
    pub fn check(&self) -> Result<()> {
        if self.rx_packets == self.received
            && self.received == self.sent + self.dropped + self.consumed
            && self.sent == self.tx_packets + self.tx_errors
        {
            return Ok(());
        }
        let what = "the packets of the run do not add up";
        Err(Error::new(ErrorKind::Protocol, what, self.text().trim_end())
            .with_hint("report it, with the whole output"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_that_is_in_one_sum_only_is_told() {
        let good = Balance {
            from: 0,
            to: 1,
            rx_packets: 10,
            received: 10,
            consumed: 1,
            sent: 8,
            dropped: 1,
            tx_packets: 7,
            tx_errors: 1,
        };
        good.check().unwrap();
        assert!(good.text().contains("sent 8 + dropped 1 + consumed 1; sent as"), "{}", good.text());
        for bad in [
            Balance { rx_packets: 11, ..good },
            Balance { rx_packets: 11, received: 11, ..good },
            Balance { dropped: 2, ..good },
            Balance { consumed: 0, ..good },
            Balance { tx_packets: 6, ..good },
        ] {
            let error = bad.check().unwrap_err();
            assert_eq!(error.kind().exit_code(), 70);
            assert!(error.to_string().contains("Port 0 to port 1"), "{error}");
        }
    }
}
