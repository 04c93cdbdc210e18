//! Intel NICs whose descriptors the input completes.

use arbitrary::Arbitrary;
use vireo_drivers::fakedev::{e1000, igb};
use vireo_drivers::port::MacAddr;
use vireo_eal::bdf::Bdf;

use crate::decode;
use crate::port::{Poke, Poll, Port, memory, view};

#[derive(Arbitrary, Debug)]
enum Step {
    Poll(Poll),
    /// A frame of this length arrives.
    Arrive(u16),
    /// The device sends all queued frames.
    Transmit,
    /// The next RX descriptor is completed, armed or not, with this second word.
    Complete(u64),
    NeverDone(bool),
    Poke(Poke),
}

macro_rules! rings {
    ($name:ident: $driver:ident, $fake:ident, $id:ident) => {
        #[doc = concat!("Descriptors, and all other memory that the NIC of ", stringify!($driver), " can write.")]
        pub fn $name(data: &[u8]) {
            let Some(steps) = decode::<Vec<Step>>(data) else { return };
            let address = Bdf::new(0, 0, 3, 0).expect("a device number below 32");
            let (function, nic) = $driver::$fake::new(address, $driver::$id, MacAddr([2, 0, 0, 0, 0, 1]));
            let (memory, pool) = memory();
            nic.attach(view(&memory));
            let device = vireo_drivers::$driver::Device::probe(function).expect("an honest device");
            let mut port = Port::start(device, memory, &pool);
            for step in steps {
                match step {
                    Step::Poll(poll) => port.poll(poll),
                    Step::Arrive(len) => drop(nic.receive(&vec![len as u8; usize::from(len % 4096)])),
                    Step::Transmit => drop(nic.transmitted()),
                    Step::Complete(word) => nic.receive_raw(word),
                    Step::NeverDone(never_done) => {
                        nic.set_faults($driver::Faults { never_done, ..$driver::Faults::default() });
                    }
                    Step::Poke(poke) => port.poke(poke),
                }
            }
            port.stop();
        }
    };
}

rings!(e1000_rings: e1000, FakeE1000, ID_82574L);
rings!(igb_rings: igb, FakeIgb, ID_82576);
