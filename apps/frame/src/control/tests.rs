//! Misbehaving devices under a running application. The misbehavior is counted, the port is restarted,
//! forwarding continues, other ports are unaffected, and no buffer is lost.

mod secondaries;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vireo_drivers::counters::PortStats;
use vireo_drivers::fakedev::e1000::{FakeE1000, Faults, ID_82540EM};
use vireo_drivers::fakedev::virtio::{Behaviour, RX, TX, VirtioNet};
use vireo_drivers::memory::{MemoryNeed, PortMemory};
use vireo_drivers::port::{MacAddr, Nic, PortConfig, QueuesOf};
use vireo_drivers::ports::OpenPort;
use vireo_drivers::table::{Drivers, Port};
use vireo_drivers::{e1000, virtio};
use vireo_eal::Eal;
use vireo_eal::args::{Outcome, Program, allowed_cpus, parse};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{DATA_ROOM, DmaMemory, Pool};
use vireo_eal::event::is_signaled;
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};

use super::{INSPECTION_PERIOD, PortState, RunEvent, SecondaryState, SupervisedPort};
use crate::app::App;
use crate::balance::Balance;
use crate::ports::Ports;
use crate::route::{Processes, Route};

const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);
const BUFFERS: u32 = 1024;
/// Longest wait for an event that takes less than a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A device of either kind, seen from the wire.
#[derive(Clone)]
enum Device {
    Virtio(VirtioNet),
    E1000(FakeE1000),
}

impl Device {
    fn new(virtio: bool, number: u8, memory: &Arc<DmaMemory>) -> (Self, OpenPort) {
        let address = Bdf::new(0, 0, number, 0).unwrap();
        let (device, port) = if virtio {
            let device = VirtioNet::at(address, Behaviour::default());
            device.attach(memory.device_view().unwrap());
            let port = virtio::Device::probe(device.function()).unwrap();
            (Self::Virtio(device), Port::Virtio(port))
        } else {
            let mac = MacAddr([0x52, 0x54, 0, 0, 0, number]);
            let (function, device) = FakeE1000::new(address, ID_82540EM, mac);
            device.attach(memory.device_view().unwrap());
            (Self::E1000(device), Port::E1000(e1000::Device::probe(function).unwrap()))
        };
        (device, OpenPort::virtual_port(port, &address.to_string(), "(played)".to_owned()))
    }

    fn receive(&self, frame: &[u8]) -> bool {
        match self {
            Self::Virtio(device) => device.receive(frame),
            Self::E1000(device) => device.receive(frame),
        }
    }

    fn transmitted(&self) -> Vec<Vec<u8>> {
        match self {
            Self::Virtio(device) => device.transmitted(),
            Self::E1000(device) => device.transmitted(),
        }
    }

    fn reads(&self) -> u64 {
        match self {
            Self::Virtio(device) => device.reads(),
            Self::E1000(device) => device.reads(),
        }
    }

    fn resets(&self) -> u64 {
        match self {
            Self::Virtio(device) => device.resets(),
            Self::E1000(device) => device.resets(),
        }
    }

    /// If `gone`, makes registers read all ones and the bus unable to reset the device; otherwise ends this.
    fn vanish(&self, gone: bool) {
        match self {
            Self::Virtio(device) => device.behave(|behaviour| {
                (behaviour.removed, behaviour.function_reset) = (gone, !gone);
            }),
            Self::E1000(device) => device.set_faults(Faults { gone, ..Faults::default() }),
        }
    }

    fn set_link(&self, up: bool) {
        match self {
            Self::Virtio(device) => device.behave(|behaviour| behaviour.link_up = up),
            Self::E1000(device) => device.plug(up, 0),
        }
    }

    fn virtio(&self) -> &VirtioNet {
        match self {
            Self::Virtio(device) => device,
            Self::E1000(_) => panic!("the device is an e1000"),
        }
    }

    fn e1000(&self) -> &FakeE1000 {
        match self {
            Self::E1000(device) => device,
            Self::Virtio(_) => panic!("the device is virtio"),
        }
    }
}

fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0x5a; 64];
    frame[..4].copy_from_slice(&number.to_be_bytes());
    frame
}

/// Sends frames with numbers from `first` on to `from`, until one of them leaves through `to`.
fn passes(from: &Device, to: &Device, first: u32, what: &str) {
    let since = Instant::now();
    for number in first.. {
        from.receive(&frame(number));
        // Frames that were sent earlier may leave only now.
        if to.transmitted().iter().any(|sent| sent[..4] >= first.to_be_bytes()[..]) {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "{what}: nothing passes");
        std::thread::yield_now();
    }
}

/// Creates an application with main lcore 0 and worker lcore 1, on all CPUs.
pub(crate) fn app() -> App {
    app_with(&["--in-memory"])
}

fn app_with(arguments: &[&str]) -> App {
    App { eal: eal(arguments), drivers: Drivers::default(), stop: StopFlag::new() }
}

/// Initializes the EAL of a shareable application with main lcore 0 and worker lcore 1, on all CPUs.
fn eal(arguments: &[&str]) -> Eal {
    let cpus: Vec<String> = allowed_cpus().unwrap().iter().map(ToString::to_string).collect();
    let list = format!("0@({cpus}),1@({cpus})", cpus = cpus.join(","));
    let own = ["test", "--lcores", &list];
    let all = own.iter().chain(arguments).map(Into::into);
    let program = Program { peer_of: Some("test"), ..Program::default() };
    match parse(all, &program).unwrap() {
        Outcome::Run(parsed) => Eal::init(parsed.eal).unwrap(),
        Outcome::Print(text) => panic!("{text}"),
    }
}

/// What a run counted for port 0, and what it announced of its secondary processes.
struct Counted {
    /// Device errors of the RX and the TX queue.
    device_errors: (u64, u64),
    errors: u64,
    restarts: u64,
    secondaries: Vec<SecondaryState>,
}

/// Ports on devices, between which an application forwards.
#[derive(Clone, Copy)]
struct Setup<'a> {
    virtio: bool,
    config: PortConfig,
    buffers: u32,
    /// Lcores, and the ports that they forward from and to.
    ways: &'a [(u32, usize, usize)],
    /// `--file-prefix` of the application, if a secondary process polls port 0.
    prefix: Option<&'a str>,
}

impl Setup<'static> {
    /// Forwards between ports 0 and 1 on a worker, and between ports 2 and 3 on the main lcore.
    fn new(virtio: bool) -> Self {
        let ways = &[(1, 0, 1), (1, 1, 0), (0, 2, 3), (0, 3, 2)];
        Self { virtio, config: CONFIG, buffers: BUFFERS, ways, prefix: None }
    }
}

impl Setup<'_> {
    /// Forwards while `act` runs on the devices.
    fn run(self, act: impl FnOnce(&[Device]) + Send) -> Counted {
        let Self { virtio, config, buffers, ways, prefix } = self;
        let region = Region::new(Pool::bytes(buffers) + (1 << 20), Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        let (devices, open): (Vec<_>, Vec<_>) =
            (0..4).map(|number| Device::new(virtio, number, &memory)).unzip();
        let process = |from| u16::from(from == 0 && prefix.is_some());
        let routes =
            ways.iter().map(|&(lcore, from, to)| Route { lcore, from, to, pair: 0, process: process(from) });
        let need = MemoryNeed { buffers, send_only: 0, config };
        let app = prefix.map_or_else(app, |prefix| app_with(&["--file-prefix", prefix]));
        app.eal.open_handover();
        let processes = Processes::new(&app.eal, 1 + process(0), 0).unwrap();
        let ports = Ports::new(open, routes.collect(), PortMemory::from(memory), &need).unwrap();
        let mut ports = ports.shared_by(processes).unwrap();
        ports.start_all(false).unwrap();
        let stop = &app.stop;
        let counts = ports.counts().clone();
        let announced = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let acting = scope.spawn(|| {
                let _stop = Stop(stop);
                passes(&devices[ways[0].1], &devices[ways[0].2], 0, "before");
                let others: Vec<u64> = devices[1..].iter().map(Device::resets).collect();
                act(&devices);
                // A secondary process may still have the queues of the first way.
                for (_, from, to) in &ways[prefix.iter().len()..] {
                    passes(&devices[*from], &devices[*to], 1 << 31, "after");
                }
                assert_eq!(
                    devices[1..].iter().map(Device::resets).collect::<Vec<_>>(),
                    others,
                    "others were reset"
                );
            });
            scope.spawn(|| {
                let read = || [0, 1, 2, 3].map(|port| counts.port(port).read());
                let mut last = read();
                while !stop.is_set() {
                    let now = read();
                    for (last, now) in last.iter().zip(&now) {
                        let grows = |of: fn(&PortStats) -> u64| of(now) >= of(last);
                        assert!(
                            grows(|stats| stats.rx_sum().packets) && grows(|stats| stats.tx_sum().bytes),
                            "a counter went back: {last:?} {now:?}"
                        );
                    }
                    last = now;
                    std::thread::yield_now();
                }
            });
            let announce = |event| announced.lock().unwrap().push(event);
            ports.forward(&app, |_| (), &announce, |_| ()).unwrap();
            acting.join().unwrap();
        });
        let closed: Vec<_> = (0..4).map(|number| ports.close(number)).collect();
        ports.check_buffers().unwrap();
        let balances = ports.balances();
        assert_eq!(balances.len(), ways.len());
        balances.iter().for_each(|balance| Balance::check(balance).unwrap());
        let (mut of_ports, mut secondaries) = (Vec::new(), Vec::new());
        for event in announced.into_inner().unwrap() {
            match event {
                RunEvent::Secondary { process: 1, state, .. } => secondaries.push(state),
                other => of_ports.push(other),
            }
        }
        let states = [PortState::Restarting, PortState::Running];
        let restarts = states.map(|state| RunEvent::Port { port: 0, state });
        assert_eq!(of_ports, restarts.repeat(closed[0].restarts as usize));
        let stats = &closed[0].stats;
        Counted {
            device_errors: (stats.rx_sum().device_errors, stats.tx_sum().device_errors),
            errors: stats.rx_sum().errors,
            restarts: closed[0].restarts,
            secondaries,
        }
    }
}

/// Stops threads even after a panic, or the test would not end.
struct Stop<'a>(&'a StopFlag);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// Waits until the control thread, which alone reads registers meanwhile, has looked at the port of `device`.
fn await_inspection(device: &Device) {
    let reads = device.reads();
    until(|| device.reads() != reads, "nobody looks at the port");
}

/// Waits until `is_so`.
fn until(mut is_so: impl FnMut() -> bool, otherwise: &str) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < PATIENCE, "{otherwise}");
        std::thread::yield_now();
    }
}

#[test]
fn every_lie_of_virtio_is_counted_and_its_port_restarted() {
    type Lie = (&'static str, fn(&VirtioNet));
    let lies: [Lie; 12] = [
        ("id far beyond the ring", |nic| nic.push_used(RX, 40_000, 72)),
        ("id of another lap", |nic| nic.push_used(RX, 300, 72)),
        ("length beyond the buffer", |nic| nic.push_used(RX, 40, 70_000)),
        ("length of one byte too many", |nic| nic.push_used(RX, 40, (12 + DATA_ROOM + 1) as u32)),
        ("length -1", |nic| nic.push_used(RX, 40, u32::MAX)),
        ("length below the header", |nic| nic.push_used(RX, 40, 5)),
        ("index ahead", |nic| nic.jump_used(RX, 1000)),
        ("index behind", |nic| nic.jump_used(RX, 65_000)),
        ("num_buffers 0", |nic| deliver_as(nic, 0)),
        ("num_buffers 65535", |nic| deliver_as(nic, u16::MAX)),
        ("sent id far beyond the ring", |nic| nic.push_used(TX, 40_000, 0)),
        ("sent index ahead", |nic| nic.jump_used(TX, 1000)),
    ];
    for (what, lie) in lies {
        let is_sent = what.starts_with("sent");
        let counted = Setup::new(true).run(|devices| {
            let before = devices[0].resets();
            lie(devices[0].virtio());
            let is_reset = || {
                // The driver inspects a TX ring when there is something to send. Sent frames are taken out,
                // so that only the misbehavior can stop the queue.
                if is_sent {
                    devices[1].receive(&frame(0));
                    devices[0].transmitted();
                }
                devices[0].resets() != before
            };
            until(is_reset, &format!("{what}: no reset"));
        });
        let expected = if is_sent { (0, 1) } else { (1, 0) };
        assert_eq!((counted.device_errors, counted.restarts), (expected, 1), "{what}");
    }
}

/// Delivers a frame that claims to be in `num_buffers` buffers. While a busy machine leaves the ring without
/// buffers, there is nothing to deliver it into.
fn deliver_as(nic: &VirtioNet, num_buffers: u16) {
    nic.behave(|behaviour| behaviour.num_buffers = Some(num_buffers));
    until(|| nic.receive(&frame(1)), "the ring has no buffers");
    nic.behave(|behaviour| behaviour.num_buffers = None);
}

/// A virtio port is not reset in this case, because its device may be waiting for a switch that restarts.
#[test]
fn an_e1000_that_sends_nothing_is_reset() {
    let counted = Setup::new(false).run(|devices| {
        let device = &devices[0];
        device.e1000().set_faults(Faults { never_done: true, ..Faults::default() });
        let before = device.resets();
        let is_reset = || {
            devices[1].receive(&frame(0));
            device.resets() != before
        };
        until(is_reset, "no reset");
        device.e1000().set_faults(Faults::default());
    });
    assert_eq!((counted.device_errors.0, counted.restarts), (0, 1));
}

#[test]
fn a_device_that_asks_for_a_reset_or_goes_away_is_taken_back() {
    for virtio in [true, false] {
        let faults: &[fn(&Device, bool)] = match virtio {
            true => {
                &[|device, on| device.virtio().behave(|behaviour| behaviour.needs_reset = on), Device::vanish]
            }
            false => &[Device::vanish],
        };
        for fault in faults {
            let counted = Setup::new(virtio).run(|devices| {
                fault(&devices[0], true);
                // The partner of the port is cut off, and the other ports continue.
                for round in 0..100 {
                    passes(&devices[2], &devices[3], 1 << 30 | round << 16, "others");
                }
                await_inspection(&devices[0]);
                fault(&devices[0], false);
            });
            assert!(counted.restarts >= 1);
        }
    }
}

/// The spare buffers of the pool are fewer than an RX ring needs, and more than all TX rings can hold. The
/// restarted port must therefore get back the buffers that it had, and those in the lcores' caches.
#[test]
fn a_port_comes_up_again_from_a_pool_that_is_hardly_large_enough() {
    let config = PortConfig::with_descriptors(256, 64);
    for virtio in [true, false] {
        let counted = Setup { config, buffers: 4 * 256 + 240, ..Setup::new(virtio) }.run(|devices| {
            devices[0].vanish(true);
            await_inspection(&devices[0]);
            devices[0].vanish(false);
        });
        assert!(counted.restarts >= 1);
    }
}

/// The TX queue of the restarted port is polled by no lcore.
#[test]
fn a_port_that_forwards_one_way_is_restarted() {
    for virtio in [true, false] {
        let counted = Setup { ways: &[(1, 0, 1)], ..Setup::new(virtio) }.run(|devices| {
            let before = devices[0].resets();
            devices[0].vanish(true);
            await_inspection(&devices[0]);
            devices[0].vanish(false);
            until(|| devices[0].resets() != before, "no reset");
        });
        assert!(counted.restarts >= 1);
    }
}

#[test]
fn bad_frames_of_an_e1000_are_dropped_without_a_reset() {
    const DD: u64 = 1 << 32;
    const EOP: u64 = 1 << 33;
    const CRC_ERROR: u64 = 1 << 40;
    let counted = Setup::new(false).run(|devices| {
        let nic = devices[0].e1000();
        for word in [DD | EOP, DD | EOP | 0xFFFF, DD | EOP | 60 | CRC_ERROR] {
            nic.receive_raw(word);
        }
        // Two parts of one frame, which the second descriptor ends.
        nic.receive_raw(DD | 60);
        nic.receive_raw(DD | EOP | 60);
    });
    assert_eq!((counted.device_errors, counted.errors, counted.restarts), ((2, 0), 2, 0));
}

/// Starts a port of its own, and calls `body` with its device, the port, its queues and its pool.
fn with_port(
    virtio: bool,
    config: &PortConfig,
    body: impl FnOnce(&Device, SupervisedPort, QueuesOf<Port>, &Arc<Pool>),
) {
    let region = Region::new(Pool::bytes(BUFFERS) + (1 << 20), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    let pool = Pool::new(&memory, BUFFERS).unwrap();
    let (device, open) = Device::new(virtio, 0, &memory);
    let mut port = SupervisedPort::new(open);
    let queues = port.open.as_mut().unwrap().port.start(config, &memory, &mut pool.cache()).unwrap();
    body(&device, port, queues, &pool);
}

#[test]
fn a_change_of_a_link_asks_for_an_inspection_of_a_port_that_runs() {
    let config = CONFIG.with_pairs(1).with_link_interrupt(true);
    for virtio in [true, false] {
        with_port(virtio, &config, |device, mut port, queues, pool| {
            port.begin();
            device.set_link(false);
            assert!(port.link_event().is_none(), "the port has just been started");
            port.last_start -= Duration::from_secs(1);
            assert!(is_signaled(port.link_event().unwrap()));
            port.link_change(0);
            assert!(
                port.link_event().is_none(),
                "a device that signals all the time does not keep anybody busy"
            );
            port.last_link_event = Some(Instant::now() - INSPECTION_PERIOD);
            assert!(!is_signaled(port.link_event().unwrap()), "the inspection takes the event");
            device.set_link(true);
            assert!(is_signaled(port.link_event().unwrap()));
            port.is_down = true;
            assert!(port.link_event().is_none(), "nobody inspects the link of a port that is down");
            port.stop(Some(queues), &mut pool.cache());
        });
    }
}

#[test]
fn a_stop_that_is_not_confirmed_is_tried_again() {
    for virtio in [true, false] {
        with_port(virtio, &CONFIG.with_pairs(1), |device, mut port, queues, pool| {
            let mut cache = pool.cache();
            device.vanish(true);
            port.stop(Some(queues), &mut cache);
            let told = port.unconfirmed.as_ref().unwrap().to_string();
            assert!(told.contains("reset"), "{told}");
            port.stop(None, &mut cache);
            assert!(port.unconfirmed.is_some());
            device.vanish(false);
            port.stop(None, &mut cache);
            assert!(port.unconfirmed.is_none());
            drop(cache);
            assert_eq!(pool.available(), BUFFERS);
        });
    }
}
