//! Tests that restart and reopen ports many times, and that exhaust pools.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fakedev::e1000::{FakeE1000, ID_82540EM};
use crate::fakedev::igb::{FakeIgb, ID_82576};
use crate::fakedev::virtio::{Behaviour, VirtioNet};
use crate::port::{MacAddr, Nic, PortConfig, RxBurst, TxBurst};
use crate::table::{Port, RxQueue, TxQueue};
use crate::{e1000, igb, virtio};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DmaMemory, Pool, PoolCache};
use vireo_eal::mem::{Backing, Region};

const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);
const BUFFERS: u32 = 256;
/// Longest wait for other tests to give back their descriptors.
const PATIENCE: Duration = Duration::from_secs(100);
const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 3]);

#[derive(Clone, Copy)]
enum Kind {
    Virtio,
    E1000,
    Igb,
}

const KINDS: [Kind; 3] = [Kind::Virtio, Kind::E1000, Kind::Igb];

/// A fake device of any kind, seen from the wire.
enum Device {
    Virtio(VirtioNet),
    E1000(FakeE1000),
    Igb(FakeIgb),
}

impl Device {
    /// Creates the device and its port, which is not started.
    fn new(kind: Kind, memory: &Arc<DmaMemory>) -> (Self, Port) {
        let address = Bdf::new(0, 0, 3, 0).unwrap();
        let view = memory.device_view().unwrap();
        match kind {
            Kind::Virtio => {
                let device = VirtioNet::at(address, Behaviour::default());
                device.attach(view);
                let port = virtio::Device::probe(device.function()).unwrap();
                (Self::Virtio(device), Port::Virtio(port))
            }
            Kind::E1000 => {
                let (function, device) = FakeE1000::new(address, ID_82540EM, MAC);
                device.attach(view);
                (Self::E1000(device), Port::E1000(e1000::Device::probe(function).unwrap()))
            }
            Kind::Igb => {
                let (function, device) = FakeIgb::new(address, ID_82576, MAC);
                device.attach(view);
                (Self::Igb(device), Port::Igb(igb::Device::probe(function).unwrap()))
            }
        }
    }

    fn receive(&self, number: usize) -> bool {
        let frame = vec![number as u8; 60 + number % 1000];
        match self {
            Self::Virtio(device) => device.receive(&frame),
            Self::E1000(device) => device.receive(&frame),
            Self::Igb(device) => device.receive(&frame),
        }
    }

    /// Transmits the frames the driver handed over; returns their number.
    fn transmit(&self) -> usize {
        match self {
            Self::Virtio(device) => device.transmitted().len(),
            Self::E1000(device) => device.transmitted().len(),
            Self::Igb(device) => device.transmitted().len(),
        }
    }
}

fn memory() -> (Arc<DmaMemory>, Arc<Pool>) {
    let region = Region::new(Pool::bytes(BUFFERS) + (64 << 10), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    let pool = Pool::new(&memory, BUFFERS).unwrap();
    (memory, pool)
}

/// Receives `count` frames and sends them again; the device keeps the sent frames.
fn echo(device: &Device, (rx, tx): &mut (RxQueue, TxQueue), cache: &mut PoolCache, count: usize) {
    let mut burst = Burst::new();
    for number in 0..count {
        assert!(device.receive(number));
        rx.rx_burst(cache, &mut burst);
        assert_eq!((burst.len(), tx.tx_burst(cache, &mut burst)), (1, 1));
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Runs 1000 times for each kind of device, or as often as `VIREO_RESTARTS` says.
#[test]
fn queues_may_be_stopped_and_started_again_and_again() {
    let restarts = std::env::var("VIREO_RESTARTS").ok().and_then(|restarts| restarts.parse().ok());
    for kind in KINDS {
        let (memory, pool) = memory();
        let (device, mut port) = Device::new(kind, &memory);
        let mut cache = pool.cache();
        let (mut unfinished, mut left_unread) = (0, 0);
        for round in 0..restarts.unwrap_or(1000) {
            let mut queues = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
            let (sent, unsent, unread) = (round % 3, round / 3 % 4, round / 12 % 5);
            echo(&device, &mut queues, &mut cache, sent);
            assert_eq!(device.transmit(), sent);
            echo(&device, &mut queues, &mut cache, unsent);
            (0..unread).for_each(|number| assert!(device.receive(number)));
            port.stop_pair(queues.0, queues.1, &mut cache).unwrap();
            unfinished += unsent as u64;
            left_unread += unread as u64;
            let counted = (port.counters().tx(0).unfinished.get(), port.counters().rx(0).unread.get());
            assert_eq!(counted, (unfinished, left_unread), "round {round}");
            device.transmit();
        }
        drop(cache);
        assert_eq!(pool.available(), BUFFERS);
    }
}

#[test]
fn ports_may_be_closed_and_opened_a_thousand_times() {
    for kind in KINDS {
        let once = || {
            let (memory, pool) = memory();
            let (device, mut port) = Device::new(kind, &memory);
            let mut cache = pool.cache();
            let mut queues = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
            echo(&device, &mut queues, &mut cache, 5);
            port.stop_pair(queues.0, queues.1, &mut cache).unwrap();
            drop((port, cache));
            assert_eq!((pool.available(), Arc::strong_count(&pool)), (BUFFERS, 1));
        };
        once();
        let before = open_descriptors();
        (0..1000).for_each(|_| once());
        // Other tests of this process hold hundreds of descriptors at times, but give them back.
        let since = Instant::now();
        while open_descriptors() >= before + 500 {
            assert!(since.elapsed() < PATIENCE, "descriptors are left open");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_port_without_buffers_receives_again_when_one_comes_back() {
    for kind in KINDS {
        let (memory, pool) = memory();
        let (device, mut port) = Device::new(kind, &memory);
        let mut cache = pool.cache();
        let (mut rx, tx) = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        let mut held: Vec<_> = std::iter::from_fn(|| cache.allocate()).collect();
        let mut burst = Burst::new();
        // As many frames as the device has buffers for, and more than fresh buffers could replace.
        let mut arrived = 0;
        for _ in 0..10 {
            while device.receive(arrived) {
                arrived += 1;
            }
            rx.rx_burst(&mut cache, &mut burst);
            held.extend(burst.drain(..));
        }
        assert!(rx.counters().no_buffer.get() > 0);
        for _ in 0..200 {
            // One buffer at a time: the minimum.
            cache.free(held.pop().unwrap());
            rx.rx_burst(&mut cache, &mut burst);
            held.extend(burst.drain(..));
            while device.receive(arrived) {
                arrived += 1;
            }
        }
        assert!(rx.counters().packets.get() > 150, "{:?}", rx.counters().read());
        held.into_iter().for_each(|buffer| cache.free(buffer));
        port.stop_pair(rx, tx, &mut cache).unwrap();
        drop(cache);
        assert_eq!(pool.available(), BUFFERS);
    }
}
