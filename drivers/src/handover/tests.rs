//! Ports and queues that move from process to process in the middle of their traffic: no frame is lost, duplicated or overtaken, and
//! no buffer is lost. Each process has a mapping of its own of the same memory, and a pool of its own.

use proptest::prelude::*;
use vireo_bus_pci::Function;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DescRing, Pool, PoolCache};
use vireo_eal::event::is_signaled;
use vireo_eal::handover::{ReceivedFds, encode};
use vireo_eal::mem::{Backing, Region};

use super::*;
use crate::driver::PciDriver;
use crate::fakedev::e1000::{FakeE1000, ID_82540EM, ID_82574L};
use crate::fakedev::igb::{FakeIgb, ID_82576};
use crate::fakedev::virtio::{Behaviour, VirtioNet, feature};
use crate::port::{MacAddr, Queues, RxBurst, TxBurst};
use crate::tied::{TieRx, TieTx};
use crate::{e1000, igb, virtio};

const BUFFERS: u32 = 512;
const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

/// A device that outlives the processes.
trait Wire {
    fn function(&self) -> Box<dyn Function>;
    fn attach(&self, memory: &DmaMemory);
    fn receive(&self, frame: &[u8]) -> bool;
    fn transmitted(&self) -> Vec<Vec<u8>>;
    fn resets(&self) -> u64;
}

macro_rules! wire {
    ($device:ty, $function:expr) => {
        impl Wire for $device {
            fn function(&self) -> Box<dyn Function> {
                $function(self)
            }
            fn attach(&self, memory: &DmaMemory) {
                self.attach(memory.device_view().unwrap());
            }
            fn receive(&self, frame: &[u8]) -> bool {
                self.receive(frame)
            }
            fn transmitted(&self) -> Vec<Vec<u8>> {
                self.transmitted()
            }
            fn resets(&self) -> u64 {
                self.resets()
            }
        }
    };
}
wire!(FakeE1000, |device: &FakeE1000| Box::new(device.clone()));
wire!(FakeIgb, |device: &FakeIgb| Box::new(device.clone()));
wire!(VirtioNet, |device: &VirtioNet| device.function());

/// A process that forwards what a port receives back to it.
struct Process<D: HandOver> {
    port: D,
    rx: D::Rx,
    tx: D::Tx,
    memory: Arc<DmaMemory>,
    pool: Arc<Pool>,
    cache: PoolCache,
}

impl<D: PciDriver + HandOver<Rx: TieRx, Tx: TieTx>> Process<D> {
    /// Starts the port of `wire`.
    fn start(wire: &dyn Wire, config: &PortConfig) -> Self {
        let mut port = D::open(wire.function(), &[]).unwrap();
        let memory = placed(region_for(&port, config));
        wire.attach(&memory);
        let pool = Pool::new(&memory, BUFFERS).unwrap();
        let mut cache = pool.cache();
        let (rx, tx) = port.start_pair(config, &memory, &mut cache).unwrap();
        Self { port, rx, tx, memory, pool, cache }
    }

    /// Continues in another process, and ends this one.
    fn next(self, wire: &dyn Wire, config: &PortConfig) -> Self {
        let Self { mut port, rx, tx, memory, pool, cache } = self;
        let queues = Queues::pair(rx, tx);
        let mut fds = Fds::default();
        let facts = port.facts(&mut fds).unwrap();
        let record = encode(&PortRecord::of(&port, &queues, config, &mut Fds::default()).unwrap()).unwrap();
        let fds = fds.duplicate().unwrap();

        let again = placed(adopted(&memory));
        let successor = Pool::new(&again, BUFFERS).unwrap();
        let facts = Facts { record: &facts, fds: &fds };
        let mut next = D::attach(wire.function(), &[], facts).unwrap();
        let mut free = successor.take_free();
        let record: PortRecord = decode(&record).unwrap();
        let other = config.with_max_frame(config.max_frame + 1);
        let refused = record.resume_on(&mut next, &other, &again, &mut free, &fds).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        let (old, queues) = (queues, record.resume_on(&mut next, config, &again, &mut free, &fds).unwrap());
        drop(free);
        let counted = (port.counters().read(), next.counters().read());
        assert_eq!(counted.0, counted.1);
        port.leave();
        drop(port);
        bury(old, cache, &pool);
        let (rx, tx) = queues.into_pair().unwrap();
        Self { port: next, rx, tx, cache: successor.cache(), memory: again, pool: successor }
    }

    /// Attaches to the port in a secondary process, which has no queues yet.
    fn secondary(&self, wire: &dyn Wire, config: &PortConfig) -> Self {
        let mut fds = Fds::default();
        let facts = self.port.facts(&mut fds).unwrap();
        let record = PortRecord::without_queues(&self.port, config, &mut Fds::default()).unwrap();
        let fds = fds.duplicate().unwrap();
        let memory = placed(adopted(&self.memory));
        let pool = Pool::new(&memory, BUFFERS).unwrap();
        let mut port = D::attach(wire.function(), &[], Facts { record: &facts, fds: &fds }).unwrap();
        let queues = record.resume_on(&mut port, config, &memory, &mut pool.take_free(), &fds).unwrap();
        port.leave();
        let (rx, tx) = queues.into_pair().unwrap();
        Self { port, rx, tx, cache: pool.cache(), memory, pool }
    }

    /// Passes the queues to another process, which has none.
    fn lend_to(&mut self, other: &mut Self) {
        let records = (self.port.rx_record(&self.rx).unwrap(), self.port.tx_record(&self.tx).unwrap());
        self.port.lend_rx(&mut self.rx, &mut self.cache).unwrap();
        self.port.lend_tx(&mut self.tx, &mut self.cache).unwrap();
        self.cache = self.pool.cache();
        assert_eq!(self.pool.available(), BUFFERS, "this process may use none of the buffers");
        let mut free = other.pool.take_free();
        other.port.take_back_rx(&mut other.rx, &records.0, &mut free).unwrap();
        other.port.take_back_tx(&mut other.tx, &records.1, &mut free).unwrap();
    }

    /// Polls once, and sends back what was received.
    fn poll(&mut self) {
        let mut burst = Burst::new();
        self.rx.rx_burst(&mut self.cache, &mut burst);
        self.tx.tx_burst(&mut self.cache, &mut burst);
        assert!(burst.is_empty(), "the TX ring has room");
    }

    /// Ends the last process: all buffers are its.
    fn stop(self) {
        let Self { mut port, rx, tx, pool, mut cache, .. } = self;
        port.stop_pair(rx, tx, &mut cache).unwrap();
        drop(cache);
        assert_eq!(pool.available(), BUFFERS);
    }
}

/// Does what the end of a process does: its handles are gone. Otherwise, their pools would use up all tags.
fn bury<R: TieRx, T: TieTx>(queues: Queues<R, T>, mut cache: PoolCache, pool: &Arc<Pool>) {
    let rx = queues.rx.into_iter().map(|rx| rx.detach().0);
    let rings: Vec<DescRing> = rx.chain(queues.tx.into_iter().map(|tx| tx.detach().0)).collect();
    rings.into_iter().for_each(|mut ring| ring.reclaim_all(&mut cache));
    drop(cache);
    assert_eq!(pool.available(), BUFFERS);
}

/// Reserves memory for `port` and for [`BUFFERS`].
fn region_for(port: &impl Nic, config: &PortConfig) -> Region {
    let bytes = (port.capabilities().ring_bytes)(config).iter().sum::<usize>();
    Region::new(Pool::bytes(BUFFERS) + bytes + (256 << 10), Backing::SmallPages).unwrap()
}

/// Maps `memory` as another process does.
fn adopted(memory: &DmaMemory) -> Region {
    let region = memory.region();
    let file = region.fd().unwrap().try_clone_to_owned().unwrap();
    Region::adopt(vec![file], &[(None, region.len())], region.backing()).unwrap().remove(0)
}

/// Gives each page an address of its own, as without an IOMMU. All addresses have 32 bits, for the 82540EM.
fn placed(region: Region) -> Arc<DmaMemory> {
    let (page, pages) = (region.page_size(), region.len() / region.page_size());
    let addresses: Vec<u64> = (0..pages).map(|at| (256 + (pages - at)) as u64 * page as u64).collect();
    DmaMemory::with_addresses(region, page, &addresses)
}

fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; len];
    frame[..4].copy_from_slice(&number.to_be_bytes());
    frame
}

/// Runs `steps`: frames that arrive, each followed by a poll or not, and a hand-over or not.
fn run<D: PciDriver + HandOver<Rx: TieRx, Tx: TieTx>>(
    wire: &dyn Wire,
    config: &PortConfig,
    steps: &[(u8, bool, bool)],
) {
    let mut process = Process::<D>::start(wire, config);
    let (resets, mut sent, mut returned) = (wire.resets(), Vec::new(), Vec::new());
    for (arriving, is_polled, is_handed_over) in steps {
        for _ in 0..*arriving {
            let len = 60 + sent.len() * 37 % (config.max_frame - 60);
            let frame = frame(sent.len() as u32, len);
            match wire.receive(&frame) {
                true => sent.push(frame),
                false => assert!(!sent.is_empty(), "the ring has buffers at first"),
            }
        }
        if *is_polled {
            process.poll();
        }
        returned.append(&mut wire.transmitted());
        if *is_handed_over {
            process = process.next(wire, config);
        }
    }
    while returned.len() < sent.len() {
        let before = returned.len();
        process.poll();
        returned.append(&mut wire.transmitted());
        assert!(returned.len() > before, "{before} of {} frames came back", sent.len());
    }
    assert!(returned == sent, "frames were changed or overtaken");
    if config.rx_interrupts {
        assert!(process.rx.arm(), "the ring has buffers");
        assert!(wire.receive(&frame(0, 60)));
        assert!(is_signaled(process.rx.event().unwrap()), "the device interrupts");
        process.rx.disarm();
        process.poll();
        assert_eq!(wire.transmitted().len(), 1);
    }
    assert_eq!(wire.resets(), resets);
    process.stop();
}

/// Runs `steps`: frames that arrive, each followed by a poll or not; then, the queues pass to the other one of two
/// processes, or not.
fn share<D: PciDriver + HandOver<Rx: TieRx, Tx: TieTx>>(
    wire: &dyn Wire,
    config: &PortConfig,
    steps: &[(u8, bool, bool)],
) {
    let mut primary = Process::<D>::start(wire, config);
    let mut secondary = primary.secondary(wire, config);
    let (resets, mut sent, mut returned, mut is_lent) = (wire.resets(), Vec::new(), Vec::new(), false);
    for (arriving, is_polled, passes) in steps {
        for _ in 0..*arriving {
            let frame = frame(sent.len() as u32, 60 + sent.len() * 37 % (config.max_frame - 60));
            if wire.receive(&frame) {
                sent.push(frame);
            }
        }
        if *is_polled {
            (if is_lent { &mut secondary } else { &mut primary }).poll();
        }
        returned.append(&mut wire.transmitted());
        if *passes {
            match is_lent {
                true => secondary.lend_to(&mut primary),
                false => primary.lend_to(&mut secondary),
            }
            is_lent = !is_lent;
        }
    }
    if is_lent {
        secondary.lend_to(&mut primary);
    }
    while returned.len() < sent.len() {
        let before = returned.len();
        primary.poll();
        returned.append(&mut wire.transmitted());
        assert!(returned.len() > before, "{before} of {} frames came back", sent.len());
    }
    assert!(returned == sent, "frames were changed or overtaken");
    // The end of a secondary process resets nothing, and neither does its death with the queues.
    primary.lend_to(&mut secondary);
    let Process { port, rx, tx, cache, pool, .. } = secondary;
    drop(port);
    bury(Queues::pair(rx, tx), cache, &pool);
    let halted = primary.port.halt_rx(0).and_then(|()| primary.port.halt_tx(0));
    match halted {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
        Ok(()) => {
            assert!(!wire.receive(&frame(0, 60)), "a queue that is halted receives nothing");
            primary.port.renew_tx(0, &mut primary.tx).unwrap();
            primary.port.renew_rx(0, &mut primary.rx, &mut primary.cache).unwrap();
            for number in 0..100 {
                let frame = frame(number, 60 + number as usize * 37 % (config.max_frame - 60));
                assert!(wire.receive(&frame));
                primary.poll();
                assert_eq!(wire.transmitted(), [frame]);
            }
        }
    }
    assert_eq!(wire.resets(), resets);
    primary.stop();
}

fn steps() -> impl Strategy<Value = Vec<(u8, bool, bool)>> {
    let step = (0_u8..12, any::<bool>(), proptest::bool::weighted(0.3));
    proptest::collection::vec(step, 1..40)
}

const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);

/// Configurations with or without interrupts, of long frames only if `may_be_long`.
fn configs(may_be_long: bool) -> impl Strategy<Value = PortConfig> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(move |(long, rx_interrupts, link_interrupt)| {
        let longest = if long && may_be_long { 9000 } else { 1514 };
        let config = CONFIG.with_max_frame(longest).with_rx_interrupts(rx_interrupts);
        config.with_link_interrupt(link_interrupt)
    })
}

fn address() -> Bdf {
    Bdf::new(0, 0, 3, 0).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_port_of_e1000_moves_with_every_frame(
        steps in steps(), is_express: bool, silicon: bool, config in configs(true),
    ) {
        let id = if is_express { ID_82574L } else { ID_82540EM };
        let make = if silicon { FakeE1000::silicon } else { FakeE1000::new };
        let (_, wire) = make(address(), id, MAC);
        run::<e1000::Device>(&wire, &config, &steps);
    }

    #[test]
    fn queues_of_e1000_pass_between_processes(
        steps in steps(), is_express: bool, silicon: bool, config in configs(true),
    ) {
        let id = if is_express { ID_82574L } else { ID_82540EM };
        let make = if silicon { FakeE1000::silicon } else { FakeE1000::new };
        let (_, wire) = make(address(), id, MAC);
        share::<e1000::Device>(&wire, &config, &steps);
    }

    #[test]
    fn queues_of_igb_pass_between_processes(steps in steps(), silicon: bool, config in configs(true)) {
        let make = if silicon { FakeIgb::silicon } else { FakeIgb::new };
        let (_, wire) = make(address(), ID_82576, MAC);
        share::<igb::Device>(&wire, &config, &steps);
    }

    #[test]
    fn queues_of_virtio_pass_between_processes(steps in steps(), config in configs(false)) {
        let features = Behaviour::default().features | feature::RING_RESET;
        share::<virtio::Device>(&VirtioNet::new(Behaviour { features, ..Behaviour::default() }), &config, &steps);
    }

    #[test]
    fn a_port_of_igb_moves_with_every_frame(steps in steps(), silicon: bool, config in configs(true)) {
        let make = if silicon { FakeIgb::silicon } else { FakeIgb::new };
        let (_, wire) = make(address(), ID_82576, MAC);
        run::<igb::Device>(&wire, &config, &steps);
    }

    #[test]
    fn a_port_of_virtio_moves_with_every_frame(
        steps in steps(), extra in 0_u64..8, one_element: bool, config in configs(false),
    ) {
        let chosen = [feature::IN_ORDER, feature::EVENT_IDX, feature::MRG_RXBUF];
        let chosen = (0..).zip(chosen).filter(|(bit, _)| extra & 1 << bit != 0).map(|(_, feature)| feature);
        let mut features = Behaviour::default().features & !(feature::EVENT_IDX | feature::MRG_RXBUF);
        features |= chosen.fold(0, |all, one| all | one);
        let wire = VirtioNet::new(Behaviour { features, one_element, ..Behaviour::default() });
        run::<virtio::Device>(&wire, &config, &steps);
    }
}

#[test]
fn a_port_that_is_only_attached_touches_nothing_and_starts_with_a_reset() {
    let (function, wire) = FakeE1000::new(address(), ID_82574L, MAC);
    let mut port = e1000::Device::probe(function).unwrap();
    port.set_promiscuous(true).unwrap();
    let (facts, resets) = (port.facts(&mut Fds::default()).unwrap(), wire.resets());
    let fds = ReceivedFds::default();
    let attach = || e1000::Device::attach(wire.function(), &[], Facts { record: &facts, fds: &fds });
    let mut attached = attach().unwrap();
    assert_eq!(attached.mac(), MAC);
    assert!(attached.set_promiscuous(false).unwrap_err().to_string().contains("receives every frame (-P)"));
    attached.set_promiscuous(true).unwrap();
    drop(attached);
    assert_eq!(wire.resets(), resets);
    let longer = [&facts[..], &[0]].concat();
    // Without all of what follows the form, which takes 8 bytes.
    for record in [&facts[..9], &longer] {
        let wrong = e1000::Device::attach(wire.function(), &[], Facts { record, fds: &fds });
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Protocol);
    }
    let region = Region::new(Pool::bytes(BUFFERS) + (64 << 10), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    let mut cache = Pool::new(&memory, BUFFERS).unwrap().cache();
    Wire::attach(&wire, &memory);
    let mut attached = attach().unwrap();
    let (rx, tx) = attached.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    assert_eq!(wire.resets(), resets + 1);
    attached.stop_pair(rx, tx, &mut cache).unwrap();
}

/// A successor allocates its rings in the order of a first start.
#[test]
fn a_port_of_several_queue_pairs_moves_after_a_restart() {
    let features = Behaviour::default().features | feature::MQ | feature::INDIRECT_DESC;
    let wire = VirtioNet::new(Behaviour { features, pairs: 2, ..Behaviour::default() });
    let config = CONFIG.with_pairs(2).with_max_frame(9000);
    let mut port = virtio::Device::open(wire.function(), &[]).unwrap();
    let memory = DmaMemory::map(region_for(&port, &config), &[]).unwrap();
    Wire::attach(&wire, &memory);
    let pool = Pool::new(&memory, BUFFERS).unwrap();
    let mut cache = pool.cache();
    let mut queues = port.start(&config, &memory, &mut cache).unwrap();
    for _ in 0..3 {
        port.stop(queues, &mut cache).unwrap();
        queues = port.start(&config, &memory, &mut cache).unwrap();
    }
    let (facts, fds) = (port.facts(&mut Fds::default()).unwrap(), ReceivedFds::default());
    let record = PortRecord::of(&port, &queues, &config, &mut Fds::default()).unwrap();
    let again = DmaMemory::map(adopted(&memory), &[]).unwrap();
    let mut free = Pool::new(&again, BUFFERS).unwrap().take_free();
    let facts = Facts { record: &facts, fds: &fds };
    let mut next = virtio::Device::attach(wire.function(), &[], facts).unwrap();
    record.resume_on(&mut next, &config, &again, &mut free, &fds).unwrap();
    next.leave();
    port.stop(queues, &mut cache).unwrap();
}
