//! Interface between the driver and its device: registers on PCI, messages to a vhost-user peer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vireo_bus_pci::Function;
use vireo_eal::Result;
use vireo_eal::dma::DmaMemory;
use vireo_eal::event::Event;
use vireo_eal::handover::Fds;

use super::Options;
use super::features::Features;
use super::split::{Kick, Virtqueue};
use crate::port::{MacAddr, PortConfig};

/// Longest time that a device may take for a reset or a control command. A fuzzer does not wait that long.
pub(super) const DEVICE_TIMEOUT: Duration = Duration::from_millis(if cfg!(fuzzing) { 1 } else { 1000 });

/// Consequence when a device does not confirm that it has stopped.
pub(super) const KEPT: &str = "its DMA memory is kept until it stops";

/// Access path to a device. Only the control path uses it; the packet path needs at most a [`Kick`].
pub(super) trait Transport: fmt::Debug + Send {
    /// Name of the device, for messages.
    fn name(&self) -> &Arc<str>;

    /// PCI function of the device; `None` if it is a peer.
    fn function(&self) -> Option<&dyn Function>;

    /// Describes the access path for another process, with its descriptors in `fds`.
    fn record<'a>(&'a self, fds: &mut Fds<'a>) -> Result<Vec<u8>>;

    /// Continues with a device that another process has started with `features`. Returns the events of the RX queues'
    /// interrupts.
    fn resume(&mut self, features: Features) -> Vec<Event>;

    /// Restarts initialization and negotiates features with the device for a port of `config` (3.1.1, steps 1
    /// to 6): see [`Features::wanted`].
    fn negotiate(&mut self, options: Options, config: &PortConfig) -> Result<Features>;

    /// Number of queue pairs that the device has; 1 if several were not negotiated.
    fn pairs(&self) -> Result<u16>;

    /// Station address, if the device has one.
    fn mac(&self) -> Result<Option<MacAddr>>;

    /// Maximum frame length in bytes, without the frame check sequence, if one was negotiated.
    fn longest_frame(&self) -> Option<usize>;

    /// Whether the device answers and reports that its link is up.
    fn link_up(&self) -> bool;

    /// Whether the device is hardware, which sends at once. A peer may take its time.
    fn owes_completions(&self) -> bool;

    /// Fails if a device without a control queue does not already receive every frame.
    fn receive_all(&self) -> Result<()>;

    /// Size of queue `index`: the requested size, or the device's maximum if that is smaller.
    fn queue_size(&self, index: u16, asked: u16) -> Result<u16>;

    /// Gives the device access to the regions in the map of `memory`, before it is told of queues in them.
    fn share(&mut self, memory: &DmaMemory) -> Result<()>;

    /// Gives the running device access to `memory`, whose region was added to its map.
    fn share_more(&mut self, memory: &DmaMemory) -> Result<()>;

    /// Gives each of the first `count` RX queues an interrupt from its next [`Transport::enable_queue`] on, and takes
    /// it from all others. Returns the events that they signal. With `changes`, a device that can signals
    /// [`Transport::change_event`] from now on.
    fn set_interrupts(&mut self, count: u16, changes: bool) -> Result<Vec<Event>>;

    /// Event that the device signals when its configuration, and with it the state of its link, changes.
    fn change_event(&self) -> Option<&Event> {
        None
    }

    /// Passes the memory of queue `index` to the device.
    fn enable_queue(&mut self, index: u16, queue: &Virtqueue) -> Result<()>;

    /// Makes the device stop using queue `index`, until its next [`Transport::enable_queue`] (2.6.1).
    fn reset_queue(&mut self, index: u16) -> Result<()>;

    /// Returns what wakes the device for queue `index`.
    fn kick(&self, index: u16) -> Result<Kick>;

    /// Wakes the device for queue `index` once, for the control path.
    fn notify(&self, index: u16) -> Result<()>;

    /// Starts the device (3.1.1, step 8).
    fn go_live(&mut self) -> Result<()>;

    /// Ends DMA. If the device does not confirm that, fails with a hint on how long its memory is kept.
    fn stop(&mut self) -> Result<()>;

    /// Fails when the device is gone or requests a reset.
    fn check_alive(&self) -> Result<()>;
}
