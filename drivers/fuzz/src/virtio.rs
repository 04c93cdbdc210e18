//! virtio-net on rings whose device follows the input.

use arbitrary::Arbitrary;
use vireo_drivers::fakedev::virtio::{Behaviour, RX, TX, VirtioNet, feature};
use vireo_drivers::virtio::Device;

use crate::port::{Poke, Poll, Port, memory, view};
use crate::{Word, decode};

#[derive(Arbitrary, Debug)]
struct Input {
    mergeable: bool,
    event_idx: bool,
    out_of_order: bool,
    checksums: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Poll(Poll),
    /// A frame of this length arrives.
    Arrive(u16),
    /// The device sends all queued frames.
    Transmit,
    /// A completion of this descriptor with this length.
    Complete {
        rx: bool,
        id: Word,
        len: Word,
    },
    /// `used.idx` moves without a completion.
    Jump {
        rx: bool,
        count: u16,
    },
    NumBuffers(Option<u16>),
    /// Checksum fields in the headers of received frames.
    Checksum(u8, u16, u16),
    Poke(Poke),
}

fn queue(rx: bool) -> u16 {
    if rx { RX } else { TX }
}

/// Runs a port while the device writes its used rings and any other memory that it can reach.
pub fn virtio_rings(data: &[u8]) {
    let Some(input) = decode::<Input>(data) else { return };
    let mut behaviour = Behaviour { out_of_order: input.out_of_order, ..Behaviour::default() };
    if input.checksums {
        behaviour.features |= feature::CSUM | feature::GUEST_CSUM;
    }
    for (wanted, bit) in [(input.mergeable, feature::MRG_RXBUF), (input.event_idx, feature::EVENT_IDX)] {
        if !wanted {
            behaviour.features &= !bit;
        }
    }
    let nic = VirtioNet::new(behaviour);
    let (memory, pool) = memory();
    nic.attach(view(&memory));
    let device = Device::probe(nic.function()).expect("an honest device");
    let mut port = Port::start(device, memory, &pool);
    // The fake device trusts the rings, so it does no more work once they were overwritten.
    let mut intact = true;
    for step in input.steps {
        match step {
            Step::Poll(poll) => port.poll(poll),
            Step::Arrive(len) if intact => drop(nic.receive(&vec![len as u8; usize::from(len % 4096)])),
            Step::Transmit if intact => drop(nic.transmitted()),
            Step::Arrive(_) | Step::Transmit => {}
            Step::Complete { rx, id, len } => nic.push_used(queue(rx), id.get(), len.get()),
            Step::Jump { rx, count } => nic.jump_used(queue(rx), count),
            Step::NumBuffers(num_buffers) => nic.behave(|behaviour| behaviour.num_buffers = num_buffers),
            Step::Checksum(flags, start, offset) => {
                nic.behave(|behaviour| behaviour.checksum = (flags, start, offset));
            }
            Step::Poke(poke) => {
                intact = false;
                port.poke(poke);
            }
        }
    }
    port.stop();
}
