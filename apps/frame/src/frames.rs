//! What the packets of a lane are: frames, or segments of frames.

use vireo_eal::dma::{Packet, frames};

/// A kind of lanes. [`forward`](crate::forward) is compiled for each, so that one costs the other nothing.
pub(crate) trait Frames {
    /// Whether frames may have several packets.
    const SCATTERED: bool;

    /// Number of frames in `packets`.
    fn count(packets: &[Packet]) -> usize;
}

/// Lanes between ports for frames of one buffer: each packet is a frame.
#[derive(Debug)]
pub(crate) enum Single {}

/// Lanes between ports that were started for long frames, whose packets may be segments.
#[derive(Debug)]
pub(crate) enum Scattered {}

impl Frames for Single {
    const SCATTERED: bool = false;

    #[inline(always)]
    fn count(packets: &[Packet]) -> usize {
        packets.len()
    }
}

impl Frames for Scattered {
    const SCATTERED: bool = true;

    fn count(packets: &[Packet]) -> usize {
        frames(packets).count()
    }
}
