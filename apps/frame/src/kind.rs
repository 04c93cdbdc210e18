//! Kinds of lanes, by what their packets can be.

use vireo_eal::dma::{Packet, frames, has_segments};

/// Kind of a lane. [`forward`](crate::forward) is compiled for each kind, so that neither pays for the other.
pub(crate) trait Kind {
    /// Whether frames may consist of several packets, and have partial checksums.
    const GENERAL: bool;

    /// Returns the number of frames in `packets`.
    fn count(packets: &[Packet]) -> usize;
}

/// Lanes between ports for single-buffer frames: each packet is a frame without a partial checksum.
#[derive(Debug)]
pub(crate) enum Plain {}

/// Lanes between ports that are started for long frames or with offloads.
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
        if has_segments(packets) { frames(packets).count() } else { packets.len() }
    }
}
