//! Legacy descriptors (SDM 3.2.3 and 3.3.3).

use vireo_eal::dma::SendWord;

use super::regs::*;
use crate::intel::Format;

/// Legacy descriptor format, which both the 8254x and the 82574 support.
#[derive(Debug)]
pub struct Legacy;

impl Format for Legacy {
    const RXD_DD: u64 = RXD_DD;
    const RXD_EOP: u64 = RXD_EOP;
    const RXD_ERRORS: u64 = RXD_ERRORS;
    const RXD_LEN_SHIFT: u32 = 0;
    const RXD_OVERWRITES_ADDRESS: bool = false;
    const TXD_OVERWRITES_ADDRESS: bool = false;
    const TXD_RS: u64 = TXD_RS;
    const TXD_DD: u64 = TXD_DD;

    const SEND: SendWord =
        SendWord { bits: TXD_IFCS | TXD_EOP, front: 0, second_len: None, written_by_device: true };

    fn segment(len: u64, _whole: u64, is_last: bool) -> u64 {
        len | TXD_IFCS | if is_last { TXD_EOP } else { 0 }
    }
}
