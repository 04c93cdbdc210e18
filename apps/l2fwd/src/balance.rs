//! Whether every packet of a run is accounted for: what was received is what was sent and what was dropped, and the
//! drivers counted the same.

use serde::Serialize;
use vireo_eal::{Error, ErrorKind, Result};

use crate::control::Managed;
use crate::report::Totals;

/// One direction of forwarding at the end of a run. The counts are of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Balance {
    /// Port that received.
    pub from: usize,
    /// Port that sent.
    pub to: usize,
    /// What the RX queues of `from` gave, by their drivers' count.
    pub rx_packets: u64,
    /// What l2fwd took from them.
    pub received: u64,
    /// What l2fwd handed to the TX queues of `to`.
    pub sent: u64,
    /// What found no room there.
    pub dropped: u64,
    /// What the TX queues took, by their drivers' count.
    pub tx_packets: u64,
    /// What their drivers dropped because it does not fit.
    pub tx_errors: u64,
}

impl Balance {
    /// Between two of `ports`, which are stopped; `totals` gives what lcores counted of a port.
    pub fn of(from: usize, to: usize, ports: &[Managed], totals: impl Fn(usize) -> Totals) -> Self {
        let Totals { sent, dropped, .. } = totals(to);
        Self {
            from,
            to,
            rx_packets: ports[from].rx.packets,
            received: totals(from).received,
            sent,
            dropped,
            tx_packets: ports[to].tx.packets,
            tx_errors: ports[to].tx.errors,
        }
    }

    /// Both sums in words.
    pub fn text(&self) -> String {
        let Self { from, to, rx_packets, received, sent, dropped, tx_packets, tx_errors } = self;
        format!(
            "Port {from} to port {to}: received {received} of rx_packets {rx_packets}, \
             sent {sent} + dropped {dropped}; sent as tx_packets {tx_packets} + tx_errors {tx_errors}\n"
        )
    }

    /// Whether no packet was lost or made between the two ports.
    ///
    /// # Errors
    /// `Protocol`, with the sums.
    pub fn check(&self) -> Result<()> {
        if self.rx_packets == self.received
            && self.received == self.sent + self.dropped
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
            sent: 8,
            dropped: 2,
            tx_packets: 7,
            tx_errors: 1,
        };
        good.check().unwrap();
        for bad in [
            Balance { rx_packets: 11, ..good },
            Balance { rx_packets: 11, received: 11, ..good },
            Balance { dropped: 1, ..good },
            Balance { tx_packets: 6, ..good },
        ] {
            let error = bad.check().unwrap_err();
            assert_eq!(error.kind().exit_code(), 70);
            assert!(error.to_string().contains("Port 0 to port 1"), "{error}");
        }
    }
}
