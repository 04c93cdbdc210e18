//! Advanced descriptors: receive descriptors with one buffer (DS 7.1.5) and transmit data descriptors (DS
//! 7.2.2). The device overwrites a receive descriptor from its first word on, so a refill writes both words.

use vireo_eal::dma::SendWord;

use super::regs::*;
use crate::intel::Format;

/// Bits of every descriptor that sends data.
const DATA: u64 = TXD_DTYP_DATA | TXD_DEXT | TXD_IFCS;

/// Advanced descriptor format.
#[derive(Debug)]
pub struct Advanced;

impl Format for Advanced {
    const RXD_DD: u64 = RXD_DD;
    const RXD_EOP: u64 = RXD_EOP;
    const RXD_ERRORS: u64 = RXD_ERRORS;
    const RXD_LEN_SHIFT: u32 = RXD_LEN_SHIFT;
    const RXD_OVERWRITES_ADDRESS: bool = true;
    const TXD_OVERWRITES_ADDRESS: bool = true;
    const TXD_RS: u64 = TXD_RS;
    const TXD_DD: u64 = TXD_DD;

    const SEND: SendWord = SendWord {
        bits: DATA | TXD_EOP,
        front: 0,
        second_len: Some(TXD_PAYLEN_SHIFT),
        written_by_device: true,
    };

    fn segment(len: u64, whole: u64, is_last: bool) -> u64 {
        let flags = DATA | if is_last { TXD_EOP } else { 0 };
        len | flags | whole << TXD_PAYLEN_SHIFT
    }
}
