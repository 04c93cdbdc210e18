//! What the driver asks of the way to its device: registers on PCI, messages to a vhost-user peer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vireo_eal::Result;
use vireo_eal::dma::DmaMemory;

use super::Options;
use super::features::Features;
use super::split::{Kick, Virtqueue};
use crate::port::{MacAddr, PortConfig};

/// How long a device may take for a reset or a control command. A fuzzer has no time.
pub(super) const DEVICE_TIMEOUT: Duration = Duration::from_millis(if cfg!(fuzzing) { 1 } else { 1000 });

/// What follows when a device does not confirm that it has stopped.
pub(super) const KEPT: &str = "its DMA memory is kept until it does";

/// The way to a device. Only the control path takes it; packets need a [`Kick`] at most.
pub(super) trait Transport: fmt::Debug + Send {
    /// Name of the device, for messages.
    fn name(&self) -> &Arc<str>;

    /// Begins anew and agrees with the device on features for a port of `config` (3.1.1, steps 1 to 6): see
    /// [`Features::wanted`].
    fn negotiate(&mut self, options: Options, config: &PortConfig) -> Result<Features>;

    /// Pairs of queues that the device has; one where it did not agree on several.
    fn pairs(&self) -> Result<u16>;

    /// The station address, where the device has one.
    fn mac(&self) -> Result<Option<MacAddr>>;

    /// Longest frame in bytes, without frame check sequence, where the device agreed on one.
    fn longest_frame(&self) -> Option<usize>;

    /// Whether the device answers and says that its link is up.
    fn link_up(&self) -> bool;

    /// Whether the device is hardware, which sends at once. A peer may take its time.
    fn owes_completions(&self) -> bool;

    /// Fails where a device without control queue does not receive every frame anyway.
    fn receive_all(&self) -> Result<()>;

    /// Size of queue `index`: what was asked, or the device's maximum if that is less.
    fn queue_size(&self, index: u16, asked: u16) -> Result<u16>;

    /// Lets the device reach the regions in the map of `memory`, before it is told of queues in there.
    fn share(&mut self, memory: &DmaMemory) -> Result<()>;

    /// Lets the device, which runs, reach `memory`, whose region was added to its map.
    fn share_more(&mut self, memory: &DmaMemory) -> Result<()>;

    /// Gives queue `index` its memory.
    fn enable_queue(&mut self, index: u16, queue: &Virtqueue) -> Result<()>;

    /// What wakes the device for queue `index`.
    fn kick(&self, index: u16) -> Result<Kick>;

    /// Wakes the device for queue `index` once, for the control path.
    fn notify(&self, index: u16) -> Result<()>;

    /// Lets the device begin (3.1.1, step 8).
    fn go_live(&mut self) -> Result<()>;

    /// Ends DMA, or fails when the device does not confirm that, and says until when its memory is kept.
    fn stop(&mut self) -> Result<()>;

    /// Fails when the device is gone or asks for a reset.
    fn check_alive(&self) -> Result<()>;
}
