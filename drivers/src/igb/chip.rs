//! Mapping from device ids to chips, and the differences between the chips.

use crate::intel::chips;

/// Chips that the driver treats differently, under Linux's names (`e1000_mac_type`). Copper only, because
/// chips with fiber or SerDes have no PHY behind MDIC. The I210 and I211 are not supported: without flash
/// they need a workaround for their PLL (Linux, `igb_pll_workaround_i210`), and their semaphore differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MacType {
    I82576,
    I350,
}

// Linux: drivers/net/ethernet/intel/igb/e1000_hw.h.
chips! {
    MacType:
    0x10C9 I82576 "82576"
    0x10E8 I82576 "82576 (quad)"
    0x150A I82576 "82576NS"
    0x1526 I82576 "82576 (quad, ET2)"
    0x1521 I350   "I350"
}

impl MacType {
    /// Returns the size of the receive FIFO in KiB, given `rxpbs`, the value of RXPBS.
    pub(super) fn fifo_kib(self, rxpbs: u32) -> u32 {
        /// Linux, `e1000_82580_rxpbs_table`.
        const I350: [u32; 11] = [36, 72, 144, 1, 2, 4, 8, 16, 35, 70, 140];
        match self {
            Self::I82576 => rxpbs & super::regs::RXPBS_SIZE,
            // Values outside the table disable flow control.
            Self::I350 => I350.get(rxpbs as usize).copied().unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use vireo_bus_pci::DeviceId;

    use super::*;

    #[test]
    fn each_id_is_once_in_the_table_and_has_a_chip() {
        let count = |device| IDS.iter().filter(|(id, _)| id.device == device).count();
        assert!(IDS.iter().all(|(id, _)| count(id.device) == 1 && MacType::of(*id).is_some()));
        // A virtual function of the 82576, and an I210.
        for device in [0x10CA, 0x1533] {
            assert_eq!(MacType::of(DeviceId { vendor: 0x8086, device }), None);
        }
    }

    #[test]
    fn the_fifo_is_what_each_chip_says() {
        assert_eq!(MacType::I82576.fifo_kib(0xFF40), 64);
        assert_eq!([0, 2, 10, 11, u32::MAX].map(|rxpbs| MacType::I350.fifo_kib(rxpbs)), [36, 144, 140, 0, 0]);
    }
}
