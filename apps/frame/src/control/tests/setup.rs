//! Ports on fake devices, between which an application forwards while a test acts on the devices.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vireo_drivers::counters::PortStats;
use vireo_drivers::fakedev::e1000::{FakeE1000, Faults, ID_82540EM};
use vireo_drivers::fakedev::virtio::{Behaviour, VirtioNet};
use vireo_drivers::memory::{MemoryNeed, PortMemory};
use vireo_drivers::port::{MacAddr, PortConfig};
use vireo_drivers::ports::OpenPort;
use vireo_drivers::table::{Drivers, Port};
use vireo_drivers::{e1000, virtio};
use vireo_eal::Eal;
use vireo_eal::args::{Outcome, Program, allowed_cpus, parse};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{DmaMemory, Pool};
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};

use crate::app::App;
use crate::balance::Balance;
use crate::control::{PortState, RunEvent, SecondaryState};
use crate::ports::Ports;
use crate::route::{Processes, Route};

pub(super) const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);
pub(super) const BUFFERS: u32 = 1024;
/// Longest wait for an event that takes less than a second on an idle machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A device of either kind, seen from the wire.
#[derive(Clone)]
pub(super) enum Device {
    Virtio(VirtioNet),
    E1000(FakeE1000),
}

impl Device {
    pub(super) fn new(virtio: bool, number: u8, memory: &Arc<DmaMemory>) -> (Self, OpenPort) {
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

    pub(super) fn receive(&self, frame: &[u8]) -> bool {
        match self {
            Self::Virtio(device) => device.receive(frame),
            Self::E1000(device) => device.receive(frame),
        }
    }

    pub(super) fn transmitted(&self) -> Vec<Vec<u8>> {
        match self {
            Self::Virtio(device) => device.transmitted(),
            Self::E1000(device) => device.transmitted(),
        }
    }

    pub(super) fn reads(&self) -> u64 {
        match self {
            Self::Virtio(device) => device.reads(),
            Self::E1000(device) => device.reads(),
        }
    }

    pub(super) fn resets(&self) -> u64 {
        match self {
            Self::Virtio(device) => device.resets(),
            Self::E1000(device) => device.resets(),
        }
    }

    /// If `gone`, makes registers read all ones and the bus unable to reset the device; otherwise ends this.
    pub(super) fn vanish(&self, gone: bool) {
        match self {
            Self::Virtio(device) => device.behave(|behaviour| {
                (behaviour.removed, behaviour.function_reset) = (gone, !gone);
            }),
            Self::E1000(device) => device.set_faults(Faults { gone, ..Faults::default() }),
        }
    }

    pub(super) fn set_link(&self, up: bool) {
        match self {
            Self::Virtio(device) => device.behave(|behaviour| behaviour.link_up = up),
            Self::E1000(device) => device.plug(up, 0),
        }
    }

    pub(super) fn virtio(&self) -> &VirtioNet {
        match self {
            Self::Virtio(device) => device,
            Self::E1000(_) => panic!("the device is an e1000"),
        }
    }

    pub(super) fn e1000(&self) -> &FakeE1000 {
        match self {
            Self::E1000(device) => device,
            Self::Virtio(_) => panic!("the device is virtio"),
        }
    }
}

pub(super) fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0x5a; 64];
    frame[..4].copy_from_slice(&number.to_be_bytes());
    frame
}

/// Sends frames with numbers from `first` on to `from`, until one of them leaves through `to`.
pub(super) fn passes(from: &Device, to: &Device, first: u32, what: &str) {
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

pub(super) fn app_with(arguments: &[&str]) -> App {
    App { eal: eal(arguments), drivers: Drivers::default(), stop: StopFlag::new() }
}

/// Initializes the EAL of a shareable application with main lcore 0 and worker lcore 1, on all CPUs.
pub(super) fn eal(arguments: &[&str]) -> Eal {
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
pub(super) struct Counted {
    /// Device errors of the RX and the TX queue.
    pub(super) device_errors: (u64, u64),
    pub(super) errors: u64,
    pub(super) restarts: u64,
    pub(super) secondaries: Vec<SecondaryState>,
}

/// Ports on devices, between which an application forwards.
#[derive(Clone, Copy)]
pub(super) struct Setup<'a> {
    pub(super) virtio: bool,
    pub(super) config: PortConfig,
    pub(super) buffers: u32,
    /// Lcores, and the ports that they forward from and to.
    pub(super) ways: &'a [(u32, usize, usize)],
    /// `--file-prefix` of the application, if a secondary process polls port 0.
    pub(super) prefix: Option<&'a str>,
}

impl Setup<'static> {
    /// Forwards between ports 0 and 1 on a worker, and between ports 2 and 3 on the main lcore.
    pub(super) fn new(virtio: bool) -> Self {
        let ways = &[(1, 0, 1), (1, 1, 0), (0, 2, 3), (0, 3, 2)];
        Self { virtio, config: CONFIG, buffers: BUFFERS, ways, prefix: None }
    }
}

impl Setup<'_> {
    /// Forwards while `act` runs on the devices.
    pub(super) fn run(self, act: impl FnOnce(&[Device]) + Send) -> Counted {
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
pub(super) struct Stop<'a>(pub(super) &'a StopFlag);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// Waits until the control thread, which alone reads registers meanwhile, has looked at the port of `device`.
pub(super) fn await_inspection(device: &Device) {
    let reads = device.reads();
    until(|| device.reads() != reads, "nobody looks at the port");
}

/// Waits until `is_so`.
pub(super) fn until(mut is_so: impl FnMut() -> bool, otherwise: &str) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < PATIENCE, "{otherwise}");
        std::thread::yield_now();
    }
}
