//! Packet processing of l2fwd: it rewrites Ethernet addresses.

use vireo_drivers::port::MacAddr;
use vireo_frame::{Hook, Packets, Uniform};

/// Destination and source addresses that packets leave with; `None` if packets keep theirs.
#[derive(Clone, Copy, Debug)]
pub struct Rewrite(Option<[u8; 12]>);

impl Rewrite {
    /// Leaves packets unchanged.
    pub const NONE: Self = Self(None);

    /// Returns the addresses that DPDK's l2fwd gives to packets leaving through port `tx_port` with address
    /// `source`: `02:00:00:00:00:PORT` as destination, and the port's own as source.
    pub fn of(tx_port: usize, source: MacAddr) -> Self {
        let mut bytes = [0; 12];
        bytes[0] = 2;
        bytes[5] = tx_port as u8;
        bytes[6..].copy_from_slice(&source.0);
        Self(Some(bytes))
    }
}

impl Hook for Rewrite {
    #[inline(always)]
    fn process(&mut self, packets: &mut Packets<'_>) {
        if let Some([a, b, c, d, e, f, g, h, last @ ..]) = self.0 {
            packets.write_each([a, b, c, d, e, f, g, h], last);
        }
    }

    #[inline(always)]
    fn uniform(&self) -> Option<Uniform> {
        Some(self.0.map_or(Uniform::Unchanged, Uniform::Addresses))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_dpdks() {
        let source = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        let bytes = [2, 0, 0, 0, 0, 3, 0x52, 0x54, 0, 0x12, 0x34, 0x56];
        assert_eq!(Rewrite::of(3, source).0, Some(bytes));
    }
}
