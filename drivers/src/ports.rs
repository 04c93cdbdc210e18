//! Port set-up, from EAL arguments to started ports.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_bus_pci::{Bus, PciDevice, PciInfo, Report};
use vireo_eal::args::VdevArgs;
use vireo_eal::dma::{MAX_BUFFERS, MemoryMap};
use vireo_eal::handover::{Fds, ReceivedFds};
use vireo_eal::lcore::StopFlag;
use vireo_eal::vfio::{AddressSpace, DeviceRecord, Request, Vfio, VfioMode};
use vireo_eal::{Eal, Error, ErrorKind, Result};

use crate::driver::{Args, Facts};
use crate::handover::{HandOver, contradiction};
use crate::port::{Nic, PortConfig};
use crate::table::{AnyVdev, Drivers, Port};

/// Longest time to wait for links to come up.
const LINK_WAIT: Duration = Duration::from_secs(9);

/// An open port that is not started, and how it was acquired.
#[derive(Debug)]
pub struct OpenPort {
    /// The port.
    pub port: Port,
    /// Address of the port's function, or name of its virtual device.
    pub name: String,
    /// Kind of device and its location: the rest of [`OpenPort::describe`].
    kind: String,
    /// Mode, reason and times; `None` for a virtual port.
    pub report: Option<Report>,
    /// Address space of the port's DMA; `None` for a virtual port.
    pub space: Option<Arc<AddressSpace>>,
    /// NUMA node of the port's function, if the machine has several nodes.
    pub node: Option<u32>,
    /// Reports that the kernel wants the function back.
    request: Option<Request>,
}

/// Opens the ports that the EAL arguments select: PCI functions by address, then virtual devices in
/// command-line order. All open in parallel, because the kernel resets each function on the way, which takes
/// up to 100 ms, and a virtual device may wait for its peer until `stop` is set.
///
/// # Errors
/// The first failure to open a port.
pub fn open(eal: &Eal, drivers: &Drivers, bus: &Bus, stop: &StopFlag) -> Result<Vec<OpenPort>> {
    let chosen = bus.select(&eal.args, |id| drivers.driver_of(id).is_some())?;
    let open = |info: PciInfo| {
        let args = args_of(eal, &info);
        let mode = eal.args.mode_of(info.address);
        let device = bus.open(&info, &eal.vfio, mode)?.with_interrupts(eal.args.vfio_intr);
        take(drivers, device, info, args)
    };
    let vdevs = eal.args.vdevs.iter().map(|vdev| Ok((&*vdev.name, drivers.parse_vdev(vdev)?)));
    let vdevs = vdevs.collect::<Result<Vec<_>>>()?;
    check_listeners(&vdevs)?;
    let mut ports = std::thread::scope(|scope| -> Result<Vec<OpenPort>> {
        let functions = chosen.into_iter().map(|info| start(scope, || open(info)));
        let virtuals = vdevs.iter().map(|(name, device)| start(scope, || open_vdev(&**device, name, stop)));
        let threads: Vec<_> = functions.chain(virtuals).collect();
        threads
            .into_iter()
            .map(|thread| {
                thread?.join().unwrap_or_else(|_| {
                    Err(Error::new(
                        ErrorKind::Protocol,
                        "cannot open a port",
                        "its driver panicked; see above",
                    ))
                })
            })
            .collect()
    })?;
    pad_where_needed(&mut ports);
    Ok(ports)
}

/// A port of a running program, as its successor needs it.
#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
pub struct OfferedPort {
    /// Address of the function, or name of the virtual device.
    name: String,
    /// VFIO device of the function.
    device: Option<DeviceRecord>,
    facts: Vec<u8>,
}

impl OfferedPort {
    /// Describes `open`, which reaches the memory in `map`, with its descriptors in `fds`.
    ///
    /// # Errors
    /// `Unavailable` when its driver cannot hand over.
    pub fn of<'a>(open: &'a OpenPort, map: &MemoryMap, fds: &mut Fds<'a>) -> Result<Self> {
        let device = open.port.function().and_then(|function| function.vfio_device());
        let device = device.zip(open.report.as_ref());
        let device = device.map(|(device, report)| DeviceRecord::of(device, report.mode, map, fds));
        let facts = open.port.facts(fds).map_err(|error| {
            Error::new(error.kind(), format!("cannot hand over {}", open.name), error.why())
        });
        Ok(Self { name: open.name.clone(), device, facts: facts? })
    }
}

/// Attaches to the ports that a running program offers, which must be those that the EAL arguments select. Touches no
/// device.
///
/// # Errors
/// `Busy` when the program has other ports; otherwise as for [`Bus::take_over`] and [`Drivers::attach`].
pub fn take_over(
    eal: &Eal,
    drivers: &Drivers,
    bus: &Bus,
    offered: &[OfferedPort],
    fds: &ReceivedFds,
) -> Result<Vec<OpenPort>> {
    let chosen = bus.select(&eal.args, |id| drivers.driver_of(id).is_some())?;
    let functions = chosen.len();
    let own = chosen.iter().map(|info| info.address.to_string());
    let own: Vec<String> = own.chain(eal.args.vdevs.iter().map(|vdev| vdev.name.clone())).collect();
    let theirs: Vec<&str> = offered.iter().map(|port| &*port.name).collect();
    if own != theirs {
        let why = format!("its ports are {}, but these are {}", theirs.join(", "), own.join(", "));
        return Err(Error::new(ErrorKind::Busy, "cannot use the ports of the running program", why)
            .with_hint("give both the same arguments"));
    }
    let attach = |(info, offered): (PciInfo, &OfferedPort)| {
        let no_device = || contradiction("a PCI function without a VFIO device");
        let record = offered.device.as_ref().ok_or_else(no_device)?;
        let device = bus.take_over(&info, &eal.vfio, record, fds)?;
        let device = device.with_interrupts(eal.args.vfio_intr);
        let (report, space) = (device.report.clone(), Arc::clone(device.vfio().space()));
        let facts = Facts { record: &offered.facts, fds };
        let port = drivers.attach(Box::new(device), args_of(eal, &info), facts)?;
        Ok(OpenPort::of_function(drivers, port, info, report, space, None))
    };
    let attach_vdev = |(vdev, offered): (&VdevArgs, &OfferedPort)| {
        let facts = Facts { record: &offered.facts, fds };
        let (port, kind) = drivers.parse_vdev(vdev)?.attach(&vdev.name, facts)?;
        Ok(OpenPort::virtual_port(port, &vdev.name, kind))
    };
    let (of_functions, of_vdevs) = offered.split_at(functions);
    let functions = chosen.into_iter().zip(of_functions).map(attach);
    let virtuals = eal.args.vdevs.iter().zip(of_vdevs).map(attach_vdev);
    let mut ports = functions.chain(virtuals).collect::<Result<Vec<_>>>()?;
    pad_where_needed(&mut ports);
    Ok(ports)
}

/// Returns the devargs of a function.
fn args_of<'a>(eal: &'a Eal, info: &PciInfo) -> Args<'a> {
    let allowed = eal.args.allow.iter().find(|allowed| allowed.address == info.address);
    allowed.map_or(&[][..], |allowed| &allowed.args)
}

/// Makes the drivers of all ports pad frames if any port delivers frames that are too short for a wire.
fn pad_where_needed(ports: &mut [OpenPort]) {
    if ports.iter().any(|open| open.port.capabilities().receives_short_frames) {
        ports.iter_mut().for_each(|open| open.port.pad_short_frames());
    }
}

/// Returns an error if no thread can be created, where `scope.spawn` would panic.
fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    body: impl FnOnce() -> Result<OpenPort> + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, Result<OpenPort>>> {
    let thread = Builder::new().name("vireo-open".into());
    thread.spawn_scoped(scope, body).map_err(|error| Error::io("cannot start a thread", &error))
}

fn open_vdev(device: &dyn AnyVdev, name: &str, stop: &StopFlag) -> Result<OpenPort> {
    let (port, kind) = device.open(name, stop)?;
    Ok(OpenPort::virtual_port(port, name, kind))
}

/// Rejects two devices that create the same socket. Otherwise the error would blame another process for the
/// first one's socket.
fn check_listeners(vdevs: &[(&str, Box<dyn AnyVdev>)]) -> Result<()> {
    let mut seen: BTreeMap<PathBuf, (&str, &Path)> = BTreeMap::new();
    for (name, device) in vdevs {
        let Some(path) = device.listens_at() else { continue };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = std::fs::canonicalize(parent.unwrap_or(Path::new("."))).unwrap_or_default();
        let file = path.file_name().map_or_else(|| path.to_owned(), |file| directory.join(file));
        if let Some((other, at)) = seen.insert(file, (*name, path)) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot use {name}"),
                format!("{other} on this command line also listens at {}", at.display()),
            )
            .with_hint("give each port a socket of its own"));
        }
    }
    Ok(())
}

/// Opens one port in `mode` with its devargs, using a driver of this crate.
///
/// # Errors
/// When the kernel or the device refuses, or a devarg is invalid.
pub fn open_one(bus: &Bus, vfio: &Vfio, info: PciInfo, mode: VfioMode, args: Args<'_>) -> Result<OpenPort> {
    take(&Drivers::default(), bus.open(&info, vfio, mode)?, info, args)
}

fn take(drivers: &Drivers, device: PciDevice, info: PciInfo, args: Args<'_>) -> Result<OpenPort> {
    let (report, space) = (device.report.clone(), Arc::clone(device.vfio().space()));
    let request = device.vfio().watch_release_request().inspect_err(|error| tracing::debug!("{error}")).ok();
    let port = drivers.probe(Box::new(device), args)?;
    Ok(OpenPort::of_function(drivers, port, info, report, space, request))
}

/// Gives up the privileges that only set-up needed; see [`Eal::confine`].
///
/// # Errors
/// As for [`Eal::confine`].
pub fn confine(eal: &Eal) -> Result<()> {
    // Ports remove their sockets at the end, and create or connect to them again when a peer returns.
    let sockets = eal.args.vdevs.iter().flat_map(|vdev| &vdev.args);
    let sockets = sockets.filter(|(key, _)| key == "iface" || key == "path");
    let directory = |(_, path): &(String, String)| match Path::new(path).parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    eal.confine(&sockets.map(directory).collect::<Vec<_>>())
}

/// Waits until the links of all `ports` are up, for at most 9 s as in DPDK's l2fwd, and calls `waiting` every
/// 100 ms. It polls because link changes are read from a register and raise no event.
///
/// # Errors
/// Errors of `waiting`.
pub fn wait_for_links<'a>(
    ports: impl Iterator<Item = &'a OpenPort> + Clone,
    stop: &StopFlag,
    mut waiting: impl FnMut() -> Result<()>,
) -> Result<()> {
    let since = Instant::now();
    while !stop.is_set() && since.elapsed() < LINK_WAIT && !ports.clone().all(|open| open.port.link().up) {
        waiting()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Returns the number of packet buffers for `ports` ports and `lcores` lcores, by the formula of DPDK's
/// l2fwd: enough for full rings, bursts and caches at once, but at least 8192 and at most what a pool can
/// hold.
pub fn buffers_needed(ports: usize, lcores: usize, config: &PortConfig) -> u32 {
    let queues = usize::from(config.rx_queues.max(config.tx_queues));
    let each = config.descriptors() + queues * (32 + lcores * 256);
    ports.saturating_mul(each).clamp(8192, MAX_BUFFERS as usize) as u32
}

impl OpenPort {
    fn of_function(
        drivers: &Drivers,
        port: Port,
        info: PciInfo,
        report: Report,
        space: Arc<AddressSpace>,
        request: Option<Request>,
    ) -> Self {
        space.set_dma_mask(port.capabilities().dma_mask);
        let driver = drivers.driver_of(info.id).unwrap_or("none");
        let kind = format!("({driver}, {}) in mode {}: {}", info.id, report.mode, report.why);
        let name = info.address.to_string();
        Self { port, name, kind, report: Some(report), space: Some(space), node: info.numa_node, request }
    }

    /// Watches for the kernel's request to release the function, in place of the process that it was taken over from.
    pub fn watch_release_request(&mut self) {
        let device = self.port.function().and_then(|function| function.vfio_device());
        let request = device.map(|device| device.watch_release_request());
        let request =
            request.and_then(|request| request.inspect_err(|error| tracing::debug!("{error}")).ok());
        self.request = request;
    }

    /// Creates a port that is not on a bus.
    pub fn virtual_port(port: Port, name: &str, kind: String) -> Self {
        Self { port, name: name.to_owned(), kind, report: None, space: None, node: None, request: None }
    }

    /// Whether the kernel has asked for the function since the last call, to unplug or unbind it. The kernel
    /// waits until the port is dropped.
    pub fn release_requested(&self) -> bool {
        self.request.as_ref().is_some_and(Request::take)
    }

    /// Whether the NIC uses physical addresses.
    pub fn is_physical(&self) -> bool {
        self.space.as_ref().is_some_and(|space| space.is_physical())
    }

    /// Returns one line for the start-up report.
    pub fn describe(&self) -> String {
        format!("{} {}", self.name, self.kind)
    }
}

#[cfg(test)]
mod tests {
    use vireo_eal::bdf::Bdf;
    use vireo_eal::dma::{Burst, DmaMemory, Pool};
    use vireo_eal::mem::{Backing, Region};

    use super::*;
    use crate::fakedev::e1000::{FakeE1000, ID_82574L};
    use crate::fakedev::virtio::{Behaviour, VirtioNet};
    use crate::port::{MacAddr, TxBurst};
    use crate::{e1000, virtio};

    #[test]
    fn no_more_buffers_are_asked_for_than_a_pool_can_have() {
        let config = PortConfig::default();
        assert_eq!(buffers_needed(1, 1, &config), 8192);
        assert_eq!(buffers_needed(64, 128, &config.with_pairs(128)), MAX_BUFFERS);
    }

    #[test]
    fn what_comes_from_a_virtio_peer_is_padded_before_an_82574_sends_it() {
        let address = |device| Bdf::new(0, 0, device, 0).unwrap();
        for silicon in [false, true] {
            let make = if silicon { FakeE1000::silicon } else { FakeE1000::new };
            let (function, nic) = make(address(3), ID_82574L, MacAddr([2, 0, 0, 0, 0, 1]));
            let virtio = VirtioNet::at(address(4), Behaviour::default());
            let mut ports = [
                Port::Virtio(virtio::Device::probe(virtio.function()).unwrap()),
                Port::E1000(e1000::Device::probe(function).unwrap()),
            ]
            .map(|port| OpenPort::virtual_port(port, "port", String::new()));
            pad_where_needed(&mut ports);

            let region = Region::new(Pool::bytes(256) + (64 << 10), Backing::SmallPages).unwrap();
            let memory = DmaMemory::map(region, &[]).unwrap();
            nic.attach(memory.device_view().unwrap());
            let mut cache = Pool::new(&memory, 256).unwrap().cache();
            let config = PortConfig::with_descriptors(64, 64);
            let (rx, mut tx) = ports[1].port.start_pair(&config, &memory, &mut cache).unwrap();
            for len in 0..20 {
                let mut packet = cache.allocate().unwrap().with_len(len);
                cache.write(&mut packet, 0, &vec![7; len]);
                let mut burst: Burst = [packet].into_iter().collect();
                assert_eq!(tx.tx_burst(&mut cache, &mut burst), 1);
                let mut wanted = vec![7; len];
                wanted.resize(60, 0);
                assert_eq!(nic.transmitted(), [wanted], "{len}");
            }
            ports[1].port.stop_pair(rx, tx, &mut cache).unwrap();
        }
    }
}
