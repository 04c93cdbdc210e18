//! Control virtqueue (virtio 1.2, 5.1.6.5): one command at a time.

use std::sync::Arc;
use std::time::Instant;

use vireo_eal::dma::{DmaMemory, DmaRing, dma_rmb};
use vireo_eal::{Error, ErrorKind, Result};

use super::split::{DESC_NEXT, DESC_WRITE, Virtqueue, shape};
use super::transport::{DEVICE_TIMEOUT, Transport};
use crate::port::Fault;

/// Number of descriptors: one for a command and one for its answer.
const SIZE: u16 = 2;
const ACK_OK: u8 = 0;
const CLASS_RX: u8 = 0;
const RX_PROMISC: u8 = 0;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;

/// The control virtqueue.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) queue: Virtqueue,
    pub(super) index: u16,
    /// The command, then its answer.
    bytes: DmaRing<u64>,
}

impl Control {
    /// Allocates control queue `index` of the device `name`.
    pub(super) fn new(memory: &Arc<DmaMemory>, index: u16, name: &Arc<str>) -> Result<Self> {
        // The waiting command reports any error, so the port's fault is not needed here.
        let queue = Virtqueue::new(memory, SIZE, name, &Fault::default())?;
        Ok(Self { queue, index, bytes: DmaRing::new(memory, 2, 8)? })
    }

    /// Reinitializes the queue and enables it.
    pub(super) fn restart(&mut self, transport: &mut dyn Transport, event_idx: bool) -> Result<()> {
        transport.queue_size(self.index, SIZE).and_then(|size| match size {
            SIZE => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Protocol,
                "cannot use the control virtqueue",
                "it has room for one descriptor, but a command needs two",
            )),
        })?;
        self.queue.restart(self.index, event_idx);
        self.queue.point_all_at_first();
        transport.enable_queue(self.index, &self.queue)
    }

    /// Receives every frame, or only those for this station (5.1.6.5.1).
    pub(super) fn set_promiscuous(&mut self, transport: &dyn Transport, on: bool) -> Result<()> {
        self.command(transport, "set the receive filter", &[CLASS_RX, RX_PROMISC, u8::from(on)])
    }

    /// Distributes packets over `pairs` queue pairs (5.1.6.5.5).
    pub(super) fn set_pairs(&mut self, transport: &dyn Transport, pairs: u16) -> Result<()> {
        let [low, high] = pairs.to_le_bytes();
        self.command(transport, "set the number of queues", &[CLASS_MQ, MQ_VQ_PAIRS_SET, low, high])
    }

    /// Sends a command and waits for the answer. Class, command and data take at most eight bytes.
    fn command(&mut self, transport: &dyn Transport, what: &str, command: &[u8]) -> Result<()> {
        let refused = |why: &str| Err(Error::new(ErrorKind::Protocol, format!("cannot {what}"), why));
        let mut word = [0; 8];
        word.iter_mut().zip(command).for_each(|(to, from)| *to = *from);
        self.bytes.store::<0>(0, u64::from_le_bytes(word));
        self.bytes.store::<0>(1, u64::MAX);
        // Each command starts at the first descriptor: with IN_ORDER, descriptors are used in ring order
        // (2.7.5).
        let ring = &mut self.queue.ring;
        ring.set(0, [self.bytes.iova(), shape(command.len() as u32, DESC_NEXT, 1)]);
        ring.set(1, [self.bytes.iova() + 8, shape(1, DESC_WRITE, 0)]);
        let before = self.queue.offered;
        let after = before.wrapping_add(1);
        self.queue.publish(after);
        transport.notify(self.index)?;

        let deadline = Instant::now() + DEVICE_TIMEOUT;
        while self.queue.used_idx() == before {
            transport.check_alive()?;
            if Instant::now() >= deadline {
                return refused("the device did not answer within 1 s");
            }
            std::thread::yield_now();
        }
        dma_rmb();
        if self.queue.used_idx() != after || self.queue.used.load::<0>(before.into()) as u32 != 0 {
            return refused("the device completed a different command");
        }
        match self.bytes.load::<0>(1).to_le_bytes()[0] {
            ACK_OK => Ok(()),
            _ => refused("the device answered with an error"),
        }
    }
}
