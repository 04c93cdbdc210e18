//! Mapping from device ids to chips, and the differences between the chips.

use crate::intel::chips;

/// Chips that the driver treats differently, under Linux's names (`e1000_mac_type`). Copper only, because
/// chips with fiber or SerDes have no PHY behind MDIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MacType {
    I82544,
    I82540,
    /// First generation of the 82545 and 82546.
    I82545,
    /// 82545GM and 82546GB.
    I82545Gm,
    /// 82574 and 82583, on PCI Express (DS).
    I82574,
}

// Linux: drivers/net/ethernet/intel/e1000/e1000_hw.h and e1000e/hw.h.
chips! {
    MacType:
    0x1008 I82544   "82544EI"
    0x100C I82544   "82544GC"
    0x100D I82544   "82544GC (LOM)"
    0x100E I82540   "82540EM"
    0x1015 I82540   "82540EM (LOM)"
    0x1016 I82540   "82540EP (LOM)"
    0x1017 I82540   "82540EP"
    0x101E I82540   "82540EP (LP)"
    0x100F I82545   "82545EM"
    0x1010 I82545   "82546EB"
    0x101D I82545   "82546EB (quad)"
    0x1026 I82545Gm "82545GM"
    0x1079 I82545Gm "82546GB"
    0x1099 I82545Gm "82546GB (quad)"
    0x10B5 I82545Gm "82546GB (quad, KSP3)"
    0x10D3 I82574   "82574L"
    0x10F6 I82574   "82574LA"
    0x150C I82574   "82583V"
}

impl MacType {
    /// Whether CTRL.RST must be written through I/O space. These chips do not acknowledge the write in memory
    /// space (Linux, `e1000_reset_hw` in e1000_hw.c).
    pub(super) fn resets_through_io(self) -> bool {
        matches!(self, Self::I82544 | Self::I82540 | Self::I82545)
    }

    /// Whether the chip has MANC, for management controller firmware (SDM 13.4, DS 10.2.8).
    pub(super) fn has_management(self) -> bool {
        self != Self::I82544
    }
}

#[cfg(test)]
mod tests {
    use vireo_bus_pci::DeviceId;

    use super::*;

    #[test]
    fn each_id_is_once_in_the_table_and_has_the_name_of_the_kernel() {
        let name = |device| IDS.iter().filter(move |(id, _)| id.device == device).map(|(_, name)| *name);
        assert_eq!(name(0x1008).collect::<Vec<_>>(), ["Intel 82544EI"]);
        assert_eq!(name(0x100C).collect::<Vec<_>>(), ["Intel 82544GC"]);
        assert!(IDS.iter().all(|(id, _)| name(id.device).count() == 1 && MacType::of(*id).is_some()));
        assert_eq!(MacType::of(DeviceId { vendor: 0x8086, device: 0x10C9 }), None);
    }
}
