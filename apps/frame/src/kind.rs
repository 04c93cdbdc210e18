//! What the packets of a lane are.

use vireo_eal::dma::{Packet, frames};

/// A kind of lanes. [`forward`](crate::forward) is compiled for each, so that one costs the other nothing.
pub(crate) trait Kind {
    /// Whether frames may have several packets, and partial checksums.
    const GENERAL: bool;

    /// Number of frames in `packets`.
    fn count(packets: &[Packet]) -> usize;
}

/// Lanes between ports for frames of one buffer: each packet is a frame, and complete.
#[derive(Debug)]
pub(crate) enum Plain {}

/// Lanes between ports that were started for long frames or with offloads.
#[derive(Debug)]
pub(crate) enum General {}

impl Kind for Plain {
    const GENERAL: bool = false;

    #[inline(always)]
    fn count(packets: &[Packet]) -> usize {
        packets.len()
    }
}

impl Kind for General {
    const GENERAL: bool = true;

    fn count(packets: &[Packet]) -> usize {
        frames(packets).count()
    }
}
