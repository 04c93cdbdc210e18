//! An example that runs as a process, and the peer of its ports: virtio-user ports of this process.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vireo_drivers::port::{Queues, RxBurst, TxBurst};
use vireo_drivers::table::{Drivers, RxQueue, TxQueue};
use vireo_eal::Eal;
use vireo_eal::args::{Outcome, Program, allowed_cpus, parse};
use vireo_eal::dma::{Burst, PoolCache};
use vireo_eal::lcore::StopFlag;
use vireo_frame::{App, Config, Ports, Route};

/// Longest wait for an event that normally takes a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running example with vhost ports, killed on drop.
pub(crate) struct Example {
    child: Child,
    stdout: BufReader<ChildStdout>,
    sockets: TempDir,
    ports: usize,
}

impl Example {
    /// Starts the example `name` with `ports` ports. Port `N` has the MAC address `02:00:00:00:00:0N`.
    pub(crate) fn start(name: &str, ports: usize, arguments: &[&str]) -> Self {
        let test = std::env::current_exe().unwrap();
        let program = test.parent().unwrap().with_file_name("examples").join(name);
        assert!(program.exists(), "build it: cargo build -p vireo-frame --examples");
        let sockets = tempfile::tempdir().unwrap();
        let cpu = allowed_cpus().unwrap()[0].to_string();
        let mut command = Command::new(program);
        command.args(["--no-pci", "--no-huge", "--in-memory", "-l", &cpu]);
        for port in 0..ports {
            let socket = sockets.path().join(port.to_string());
            let device = format!("net_vhost{port},iface={},mac=02:00:00:00:00:0{port}", socket.display());
            command.args(["--vdev", &device]);
        }
        let mut child = command.arg("--").args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout, sockets, ports }
    }

    /// Connects to the ports of the example.
    pub(crate) fn connect(&self) -> Peer {
        let since = Instant::now();
        while !(0..self.ports).all(|port| self.listens(port)) {
            assert!(since.elapsed() < PATIENCE, "the example makes no sockets");
            std::thread::sleep(Duration::from_millis(10));
        }
        let devices = (0..self.ports).map(|port| {
            ["--vdev".into(), format!("net_virtio_user{port},path={}", self.socket(port).display())]
        });
        Peer::new(devices.flatten().collect())
    }

    /// Returns whether the example listens on the socket of a port, which the kernel's list shows as
    /// `00010000`. The socket file exists a moment earlier.
    fn listens(&self, port: usize) -> bool {
        let (sockets, path) = (std::fs::read_to_string("/proc/net/unix").unwrap(), self.socket(port));
        sockets.lines().any(|line| line.contains(" 00010000 ") && line.ends_with(&*path.to_string_lossy()))
    }

    fn socket(&self, port: usize) -> PathBuf {
        self.sockets.path().join(port.to_string())
    }

    /// Reads the next line of the example's output.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line
    }

    /// Stops the example with SIGINT and returns what it printed. It must exit with code 0 and remove its
    /// sockets.
    pub(crate) fn stop(mut self) -> String {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).unwrap();
        let mut text = String::new();
        self.stdout.read_to_string(&mut text).unwrap();
        assert!(self.child.wait().unwrap().success(), "{text}");
        assert!((0..self.ports).all(|port| !self.socket(port).exists()));
        text
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ports of this process that are connected to the ports of an example.
pub(crate) struct Peer {
    queues: Vec<(RxQueue, TxQueue)>,
    cache: PoolCache,
    ports: Ports,
}

impl Peer {
    fn new(devices: Vec<String>) -> Self {
        let words = ["peer", "--no-pci", "--no-huge", "--in-memory"].map(Into::into);
        let arguments = words.into_iter().chain(devices.into_iter().map(Into::into));
        let drivers = Drivers::default();
        let vdev_keys = drivers.vdev_keys();
        let program = Program { vdev_keys: &vdev_keys, ..Program::default() };
        let Outcome::Run(parsed) = parse(arguments, &program).unwrap() else { panic!("no run") };
        let app = App { eal: Eal::init(parsed.eal).unwrap(), drivers, stop: StopFlag::new() };
        let open = app.open_ports().unwrap();
        let routes =
            (0..open.len()).map(|port| Route { lcore: 0, from: port, to: port, pair: 0, process: 0 });
        let mut ports = app.reserve(open, routes.collect(), &Config::default()).unwrap();
        ports.start_all(true).unwrap();
        let queues = (0..ports.count()).filter_map(|port| ports.take_queues(port)?.into_pair()).collect();
        Self { queues, cache: ports.cache(), ports }
    }

    /// Sends `frame` on a port.
    pub(crate) fn send(&mut self, port: usize, frame: &[u8]) {
        let mut packet = self.cache.allocate().unwrap().with_len(frame.len());
        self.cache.write(&mut packet, 0, frame);
        let mut burst: Burst = [packet].into_iter().collect();
        let since = Instant::now();
        while self.queues[port].1.tx_burst(&mut self.cache, &mut burst) == 0 {
            assert!(since.elapsed() < PATIENCE, "the TX ring stays full");
            std::thread::yield_now();
        }
    }

    /// Receives the next `count` frames on a port.
    pub(crate) fn receive(&mut self, port: usize, count: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let since = Instant::now();
        while frames.len() < count {
            assert!(since.elapsed() < PATIENCE, "{} frames of {count} came", frames.len());
            let mut burst = Burst::new();
            self.queues[port].0.rx_burst(&mut self.cache, &mut burst);
            for packet in burst {
                let mut frame = vec![0; packet.len()];
                self.cache.read(&packet, 0, &mut frame);
                self.cache.free(packet);
                frames.push(frame);
            }
            std::thread::yield_now();
        }
        frames
    }

    /// Stops the ports and checks that every buffer was returned.
    pub(crate) fn stop(self) {
        let Self { queues, cache, mut ports } = self;
        for (port, (rx, tx)) in queues.into_iter().enumerate() {
            ports.put_queues(port, Queues::pair(rx, tx));
            ports.close(port);
        }
        drop(cache);
        ports.check_buffers().unwrap();
    }
}
