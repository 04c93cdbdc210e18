//! Packet accounting: every packet that RX queues delivered was taken by TX queues, dropped, or consumed by
//! the application.

use std::collections::BTreeMap;

use serde::Serialize;
use vireo_eal::{Error, ErrorKind, Result};

use crate::counts::Counts;
use crate::route::Route;

/// Packet counts of one forwarding direction, from one port to another, at the end of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Balance {
    /// Port that received the packets.
    pub from: usize,
    /// Port that sent the packets.
    pub to: usize,
    /// Packets delivered by the RX queues of `from`.
    pub rx_packets: u64,
    /// Packets that the application's hook removed.
    #[serde(skip_serializing_if = "is_zero")]
    pub consumed: u64,
    /// Packets dropped because the TX queues of `to` were full.
    pub dropped: u64,
    /// Packets sent by the TX queues of `to`.
    pub tx_packets: u64,
    /// Packets taken by the TX queues of `to` and dropped because they did not fit.
    pub tx_errors: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Balance {
    /// Sums up the counts of `routes`, one balance per direction. The ports have stopped.
    pub(crate) fn of(routes: &[Route], counts: &Counts) -> Vec<Self> {
        let mut all: BTreeMap<(usize, usize), Self> = BTreeMap::new();
        for &Route { from, to, pair, .. } in routes {
            let sum = all.entry((from, to)).or_insert(Self { from, to, ..Self::default() });
            let rx = counts.port(from).rx(pair).read();
            let tx = counts.port(to).tx(pair).read();
            sum.rx_packets += rx.packets;
            sum.consumed += rx.consumed;
            sum.dropped += tx.dropped;
            sum.tx_packets += tx.packets;
            sum.tx_errors += tx.errors;
        }
        all.into_values().collect()
    }

    /// Formats the counts as one line of text with a line feed.
    pub fn text(&self) -> String {
        let Self { from, to, rx_packets, consumed, dropped, tx_packets, tx_errors } = self;
        let consumed = if *consumed > 0 { format!(" + consumed {consumed}") } else { String::new() };
        format!(
            "Port {from} to port {to}: rx_packets {rx_packets}; \
             tx_packets {tx_packets} + tx_errors {tx_errors} + dropped {dropped}{consumed}\n"
        )
    }

    /// Checks that the counts add up: no packet was lost or counted twice.
    ///
    /// # Errors
    /// `Protocol`, with the counts.
    pub fn check(&self) -> Result<()> {
        if self.rx_packets == self.tx_packets + self.tx_errors + self.dropped + self.consumed {
            return Ok(());
        }
        let what = "the packet counts of the run do not add up";
        Err(Error::new(ErrorKind::Protocol, what, self.text().trim_end())
            .with_hint("report this with the complete output"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_that_is_in_one_sum_only_is_told() {
        let good =
            Balance { from: 0, to: 1, rx_packets: 10, consumed: 1, dropped: 1, tx_packets: 7, tx_errors: 1 };
        good.check().unwrap();
        assert!(
            good.text().contains("tx_packets 7 + tx_errors 1 + dropped 1 + consumed 1"),
            "{}",
            good.text()
        );
        for bad in [
            Balance { rx_packets: 11, ..good },
            Balance { dropped: 2, ..good },
            Balance { consumed: 0, ..good },
            Balance { tx_packets: 6, ..good },
            Balance { tx_errors: 0, ..good },
        ] {
            let error = bad.check().unwrap_err();
            assert_eq!(error.kind().exit_code(), 70);
            assert!(error.to_string().contains("Port 0 to port 1"), "{error}");
        }
    }
}
