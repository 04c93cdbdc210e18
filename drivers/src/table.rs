//! The table of all drivers in Vireo, the types that stand for any driver's ports and queues, and the drivers
//! that an application adds. Higher layers look up drivers here; drivers do not depend on this module.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::args::VdevArgs;
use vireo_eal::dma::{Burst, DmaMemory, FreeBuffers, PoolCache};
use vireo_eal::handover::Fds;
use vireo_eal::lcore::StopFlag;
use vireo_eal::{Error, ErrorKind, Result};

use crate::counters::{PortCounters, QueueCounters};
use crate::driver::{Args, Facts, PciDriver, Vdev, unsupported};
use crate::foreign::{self, ForeignNic};
use crate::handover::{HandOver, Resume};
use crate::port::{
    Capabilities, Link, MacAddr, Nic, Offloads, PortConfig, Queues, RxBurst, TxBurst, queues_of_another,
};

macro_rules! drivers {
    ($($variant:ident: $driver:ident, pci: [$($pci:ident)?], vdev: [$($vdev:ident)?];)*) => {
        /// RX queue of any driver, for lcores that poll ports of several drivers.
        #[derive(Debug)]
        pub enum RxQueue { $(#[doc = concat!("RX queue of the ", stringify!($driver), " driver.")] $variant(crate::$driver::RxQueue)),* }

        /// TX queue of any driver.
        #[derive(Debug)]
        pub enum TxQueue { $(#[doc = concat!("TX queue of the ", stringify!($driver), " driver.")] $variant(crate::$driver::TxQueue)),* }

        /// Port of any driver.
        #[derive(Debug)]
        pub enum Port { $(#[doc = concat!("Port of the ", stringify!($driver), " driver.")] $variant(crate::$driver::Device)),* }

        impl RxBurst for RxQueue {
            #[inline(always)]
            fn rx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) {
                match self { $(Self::$variant(queue) => queue.rx_burst(cache, burst)),* }
            }
            fn counters(&self) -> &QueueCounters {
                match self { $(Self::$variant(queue) => queue.counters()),* }
            }
            fn event(&self) -> Option<BorrowedFd<'_>> {
                match self { $(Self::$variant(queue) => queue.event()),* }
            }
            fn arm(&mut self) -> bool {
                match self { $(Self::$variant(queue) => queue.arm()),* }
            }
            fn disarm(&mut self) {
                match self { $(Self::$variant(queue) => queue.disarm()),* }
            }
        }

        impl TxBurst for TxQueue {
            #[inline(always)]
            fn tx_burst(&mut self, cache: &mut PoolCache, burst: &mut Burst) -> usize {
                match self { $(Self::$variant(queue) => queue.tx_burst(cache, burst)),* }
            }
            fn counters(&self) -> &QueueCounters {
                match self { $(Self::$variant(queue) => queue.counters()),* }
            }
            fn offloads(&self) -> Offloads {
                match self { $(Self::$variant(queue) => queue.offloads()),* }
            }
        }

        impl Nic for Port {
            type Rx = RxQueue;
            type Tx = TxQueue;

            fn start(
                &mut self, config: &PortConfig, memory: &Arc<DmaMemory>, cache: &mut PoolCache,
            ) -> Result<Queues<RxQueue, TxQueue>> {
                match self { $(Self::$variant(device) => {
                    let queues = device.start(config, memory, cache)?;
                    Ok(queues.map(RxQueue::$variant, TxQueue::$variant))
                }),* }
            }
            fn start_from(
                &mut self, config: &PortConfig, memory: &Arc<DmaMemory>, caches: &mut [PoolCache],
            ) -> Result<Queues<RxQueue, TxQueue>> {
                match self { $(Self::$variant(device) => {
                    let queues = device.start_from(config, memory, caches)?;
                    Ok(queues.map(RxQueue::$variant, TxQueue::$variant))
                }),* }
            }
            fn stop(
                &mut self, queues: Queues<RxQueue, TxQueue>, cache: &mut PoolCache,
            ) -> Result<()> {
                match self { $(Self::$variant(device) => {
                    let own = queues.try_map(
                        |rx| if let RxQueue::$variant(rx) = rx { Some(rx) } else { None },
                        |tx| if let TxQueue::$variant(tx) = tx { Some(tx) } else { None },
                    );
                    device.stop(own.ok_or_else(queues_of_another)?, cache)
                }),* }
            }
            fn update_memory(&mut self, memory: &DmaMemory) -> Result<()> {
                match self { $(Self::$variant(device) => device.update_memory(memory)),* }
            }
            fn mac(&self) -> MacAddr {
                match self { $(Self::$variant(device) => device.mac()),* }
            }
            fn capabilities(&self) -> Capabilities {
                match self { $(Self::$variant(device) => device.capabilities()),* }
            }
            fn pad_short_frames(&mut self) {
                match self { $(Self::$variant(device) => device.pad_short_frames()),* }
            }
            fn link(&self) -> Link {
                match self { $(Self::$variant(device) => device.link()),* }
            }
            fn link_event(&self) -> Option<BorrowedFd<'_>> {
                match self { $(Self::$variant(device) => device.link_event()),* }
            }
            fn check(&mut self) -> Result<()> {
                match self { $(Self::$variant(device) => device.check()),* }
            }
            fn set_promiscuous(&mut self, on: bool) -> Result<()> {
                match self { $(Self::$variant(device) => device.set_promiscuous(on)),* }
            }
            fn retry_stop(&mut self, cache: &mut PoolCache) -> Result<()> {
                match self { $(Self::$variant(device) => device.retry_stop(cache)),* }
            }
            fn counters(&self) -> &PortCounters {
                match self { $(Self::$variant(device) => device.counters()),* }
            }
        }

        impl HandOver for Port {
            fn function(&self) -> Option<&dyn Function> {
                match self { $(Self::$variant(device) => device.function()),* }
            }
            fn facts<'a>(&'a self, fds: &mut Fds<'a>) -> Result<Vec<u8>> {
                match self { $(Self::$variant(device) => device.facts(fds)),* }
            }
            fn record(&self, fds: &mut Fds<'_>) -> Result<Vec<u8>> {
                match self { $(Self::$variant(device) => device.record(fds)),* }
            }
            fn rx_record(&self, rx: &RxQueue) -> Result<Vec<u8>> {
                match (self, rx) {
                    $((Self::$variant(device), RxQueue::$variant(rx)) => device.rx_record(rx),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn tx_record(&self, tx: &TxQueue) -> Result<Vec<u8>> {
                match (self, tx) {
                    $((Self::$variant(device), TxQueue::$variant(tx)) => device.tx_record(tx),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn lend_rx(&self, rx: &mut RxQueue, cache: &mut PoolCache) -> Result<()> {
                match (self, rx) {
                    $((Self::$variant(device), RxQueue::$variant(rx)) => device.lend_rx(rx, cache),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn lend_tx(&self, tx: &mut TxQueue, cache: &mut PoolCache) -> Result<()> {
                match (self, tx) {
                    $((Self::$variant(device), TxQueue::$variant(tx)) => device.lend_tx(tx, cache),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn take_back_rx(&self, rx: &mut RxQueue, record: &[u8], free: &mut FreeBuffers) -> Result<()> {
                match (self, rx) {
                    $((Self::$variant(device), RxQueue::$variant(rx)) => device.take_back_rx(rx, record, free),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn take_back_tx(&self, tx: &mut TxQueue, record: &[u8], free: &mut FreeBuffers) -> Result<()> {
                match (self, tx) {
                    $((Self::$variant(device), TxQueue::$variant(tx)) => device.take_back_tx(tx, record, free),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn halt_rx(&mut self, number: u16) -> Result<()> {
                match self { $(Self::$variant(device) => device.halt_rx(number)),* }
            }
            fn halt_tx(&mut self, number: u16) -> Result<()> {
                match self { $(Self::$variant(device) => device.halt_tx(number)),* }
            }
            fn renew_rx(&mut self, number: u16, rx: &mut RxQueue, cache: &mut PoolCache) -> Result<()> {
                match (self, rx) {
                    $((Self::$variant(device), RxQueue::$variant(rx)) => device.renew_rx(number, rx, cache),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn renew_tx(&mut self, number: u16, tx: &mut TxQueue) -> Result<()> {
                match (self, tx) {
                    $((Self::$variant(device), TxQueue::$variant(tx)) => device.renew_tx(number, tx),)*
                    _ => Err(queues_of_another()),
                }
            }
            fn take_fault(&mut self) -> Option<&'static str> {
                match self { $(Self::$variant(device) => device.take_fault()),* }
            }
            fn resume(&mut self, resume: Resume<'_>) -> Result<Queues<RxQueue, TxQueue>> {
                match self { $(Self::$variant(device) => {
                    Ok(device.resume(resume)?.map(RxQueue::$variant, TxQueue::$variant))
                }),* }
            }
            fn keep(&mut self) {
                match self { $(Self::$variant(device) => device.keep()),* }
            }
            fn leave(&mut self) {
                match self { $(Self::$variant(device) => device.leave()),* }
            }
        }

        $(impl From<crate::$driver::Device> for Port {
            fn from(device: crate::$driver::Device) -> Self {
                Self::$variant(device)
            }
        })*

        /// Drivers of PCI functions.
        static PCI: &[PciEntry] = &[$($(PciEntry::of::<crate::$driver::$pci>(),)?)*];
        /// Drivers of virtual devices.
        static VDEVS: &[VdevEntry] = &[$($(VdevEntry::of::<crate::$driver::$vdev>(),)?)*];
    };
}

// One line per driver: its variant, its module, and that module's types that open a PCI function or a virtual
// device.
drivers! {
    Virtio: virtio, pci: [Device], vdev: [UserOptions];
    E1000: e1000, pci: [Device], vdev: [];
    Igb: igb, pci: [Device], vdev: [];
    Vhost: vhost, pci: [], vdev: [Options];
    // Drivers of other crates: see `Drivers`.
    Foreign: foreign, pci: [], vdev: [];
}

/// A driver of PCI functions, with its type erased.
#[derive(Clone, Copy)]
struct PciEntry {
    name: &'static str,
    ids: &'static [(DeviceId, &'static str)],
    keys: &'static [&'static str],
    open: Open,
    attach: Attach,
}

/// [`PciDriver::open`] of any driver.
type Open = fn(Box<dyn Function>, Args<'_>) -> Result<Port>;
/// [`HandOver::attach`] of any driver.
type Attach = fn(Box<dyn Function>, Args<'_>, Facts<'_>) -> Result<Port>;

impl PciEntry {
    const fn of<D: PciDriver + HandOver + Into<Port>>() -> Self {
        Self::with::<D>(
            |function, args| D::open(function, args).map(Into::into),
            |function, args, facts| D::attach(function, args, facts).map(Into::into),
        )
    }

    const fn with<D: PciDriver>(open: Open, attach: Attach) -> Self {
        Self { name: D::NAME, ids: D::IDS, keys: D::KEYS, open, attach }
    }
}

/// A driver of virtual devices, with its type erased.
#[derive(Clone, Copy)]
struct VdevEntry {
    names: [&'static str; 2],
    keys: &'static [&'static str],
    parse: fn(&str, Args<'_>) -> Result<Box<dyn AnyVdev>>,
}

impl VdevEntry {
    const fn of<V: Vdev<Device: Into<Port>> + 'static>() -> Self {
        Self { names: V::NAMES, keys: V::KEYS, parse: |name, args| Ok(Box::new(V::parse(name, args)?)) }
    }
}

/// A virtual device of any driver, as parsed from its arguments.
pub(crate) trait AnyVdev: Send + Sync {
    /// Path of the socket that the device creates, if it creates one.
    fn listens_at(&self) -> Option<&Path>;
    /// Opens the device with its driver; returns the port and its description.
    fn open(&self, name: &str, stop: &StopFlag) -> Result<(Port, String)>;
    /// Attaches to the device with its driver; returns the port and its description.
    fn attach(&self, name: &str, facts: Facts<'_>) -> Result<(Port, String)>;
}

impl<V: Vdev<Device: Into<Port>>> AnyVdev for V {
    fn listens_at(&self) -> Option<&Path> {
        Vdev::listens_at(self)
    }

    fn open(&self, name: &str, stop: &StopFlag) -> Result<(Port, String)> {
        Ok((Vdev::open(self, name, stop)?.into(), self.describe()))
    }

    fn attach(&self, name: &str, facts: Facts<'_>) -> Result<(Port, String)> {
        Ok((Vdev::attach(self, name, facts)?.into(), self.describe()))
    }
}

/// A virtual device of another crate.
struct ForeignVdev<V>(V);

impl<V: Vdev<Device: ForeignNic>> AnyVdev for ForeignVdev<V> {
    fn listens_at(&self) -> Option<&Path> {
        self.0.listens_at()
    }

    fn open(&self, name: &str, stop: &StopFlag) -> Result<(Port, String)> {
        Ok((foreign::erase(self.0.open(name, stop)?).into(), self.0.describe()))
    }

    fn attach(&self, _name: &str, _facts: Facts<'_>) -> Result<(Port, String)> {
        Err(unsupported())
    }
}

/// The drivers of an application: those of this crate, and any that the application adds.
pub struct Drivers {
    pci: Vec<PciEntry>,
    vdevs: Vec<VdevEntry>,
}

impl Default for Drivers {
    /// The drivers of this crate.
    fn default() -> Self {
        Self { pci: PCI.into(), vdevs: VDEVS.into() }
    }
}

impl Drivers {
    /// Adds a driver of PCI functions. IDs that earlier drivers claim stay with those drivers.
    #[must_use]
    pub fn with_pci<D: PciDriver + ForeignNic>(mut self) -> Self {
        self.pci.push(PciEntry::with::<D>(
            |function, args| Ok(foreign::erase(D::open(function, args)?).into()),
            |_, _, _| Err(unsupported()),
        ));
        self
    }

    /// Adds a driver of virtual devices. Names that earlier drivers claim stay with those drivers.
    #[must_use]
    pub fn with_vdev<V: Vdev<Device: ForeignNic> + 'static>(mut self) -> Self {
        let parse: fn(&str, Args<'_>) -> Result<Box<dyn AnyVdev>> =
            |name, args| Ok(Box::new(ForeignVdev(V::parse(name, args)?)));
        self.vdevs.push(VdevEntry { names: V::NAMES, keys: V::KEYS, parse });
        self
    }

    /// Returns the name of the driver for a function.
    pub fn driver_of(&self, id: DeviceId) -> Option<&'static str> {
        self.for_id(id).map(|driver| driver.name)
    }

    /// Returns the devargs that the drivers of PCI functions accept, for [`vireo_eal::args::Program`].
    pub fn device_keys(&self) -> Vec<&'static str> {
        self.pci.iter().flat_map(|driver| driver.keys).copied().collect()
    }

    /// Returns the names of the drivers of virtual devices (DPDK's name and alias), each with its argument
    /// keys, for [`vireo_eal::args::Program`].
    pub fn vdev_keys(&self) -> Vec<(&'static str, &'static [&'static str])> {
        self.vdevs.iter().flat_map(|driver| driver.names.map(|name| (name, driver.keys))).collect()
    }

    fn for_id(&self, id: DeviceId) -> Option<&PciEntry> {
        self.pci.iter().find(|driver| driver.ids.iter().any(|(known, _)| *known == id))
    }

    /// Opens a function with its driver.
    ///
    /// # Errors
    /// `Unavailable` when no driver supports the function, `Usage` for a devarg that its driver does not
    /// accept. Otherwise the driver's error.
    pub fn probe(&self, function: Box<dyn Function>, args: Args<'_>) -> Result<Port> {
        (self.driver_for(&*function, args)?.open)(function, args)
    }

    /// Attaches the driver of `function` to its device, which runs for another process. See [`HandOver::attach`].
    ///
    /// # Errors
    /// As for [`Drivers::probe`].
    pub fn attach(&self, function: Box<dyn Function>, args: Args<'_>, facts: Facts<'_>) -> Result<Port> {
        (self.driver_for(&*function, args)?.attach)(function, args, facts)
    }

    /// Returns the driver of `function`, which accepts `args`.
    fn driver_for(&self, function: &dyn Function, args: Args<'_>) -> Result<&PciEntry> {
        let cannot = |kind, what: &str, why| Error::new(kind, format!("cannot use {what}"), why);
        let (id, address) = (function.id(), function.address());
        let Some(driver) = self.for_id(id) else {
            let why = format!("no driver supports {id}");
            return Err(cannot(ErrorKind::Unavailable, &address.to_string(), why));
        };
        if let Some((key, _)) = args.iter().find(|(key, _)| !driver.keys.contains(&key.as_str())) {
            let knows = |other: &&PciEntry| other.keys.contains(&key.as_str());
            let others: Vec<&str> = self.pci.iter().filter(knows).map(|other| other.name).collect();
            let why = match others.as_slice() {
                [] => "there is no such key".to_owned(),
                others => format!("only {} supports it", others.join(" or ")),
            };
            return Err(cannot(ErrorKind::Usage, &format!("{key} for {address}"), why));
        }
        Ok(driver)
    }

    /// Parses the arguments of a virtual device.
    ///
    /// # Errors
    /// `Unavailable` when there is no such driver, `Usage` for an invalid argument.
    pub(crate) fn parse_vdev(&self, VdevArgs { name, driver, args }: &VdevArgs) -> Result<Box<dyn AnyVdev>> {
        let Some(entry) = self.vdevs.iter().find(|entry| entry.names.contains(&driver.as_str())) else {
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("cannot use {name}"),
                format!("there is no driver {driver}"),
            ));
        };
        (entry.parse)(name, args)
    }
}

/// Returns the name of this crate's driver for a function.
pub fn driver_of(id: DeviceId) -> Option<&'static str> {
    Drivers::default().driver_of(id)
}

#[cfg(test)]
mod tests {
    use vireo_eal::bdf::Bdf;

    use super::*;
    use crate::fakedev::e1000::{FakeE1000, ID_82574L};
    use crate::fakedev::igb::ID_82576;
    use crate::fakedev::virtio::{Behaviour, VirtioNet};

    fn args(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn each_id_has_one_driver_and_each_key_of_a_device_one_meaning() {
        assert_eq!(driver_of(DeviceId { vendor: 0x1af4, device: 0x1000 }), Some("virtio-net"));
        assert_eq!(driver_of(ID_82574L), Some("e1000"));
        assert_eq!(driver_of(ID_82576), Some("igb"));
        assert_eq!(driver_of(DeviceId { vendor: 0x8086, device: 0x10ca }), None);
        let mut ids: Vec<DeviceId> = PCI.iter().flat_map(|driver| driver.ids).map(|(id, _)| *id).collect();
        let all = ids.len();
        ids.sort_by_key(|id| (id.vendor, id.device));
        ids.dedup();
        assert_eq!(ids.len(), all);
        let drivers = Drivers::default();
        let mut keys = drivers.device_keys();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), drivers.device_keys().len());
    }

    #[test]
    fn a_devarg_is_for_its_driver() {
        let address = Bdf::new(0, 0, 3, 0).unwrap();
        let (function, _nic) = FakeE1000::new(address, ID_82574L, MacAddr([2, 0, 0, 0, 0, 1]));
        let drivers = Drivers::default();
        let error = drivers.probe(function, &args(&[("in_order", "1")])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert_eq!(error.to_string(), "cannot use in_order for 0000:00:03.0: only virtio-net supports it");
        let nic = VirtioNet::at(address, Behaviour::default());
        let wrong = drivers.probe(nic.function(), &args(&[("mrg_rxbuf", "yes")])).unwrap_err();
        assert!(wrong.to_string().contains("mrg_rxbuf=yes"), "{wrong}");
        assert!(matches!(drivers.probe(nic.function(), &args(&[("mrg_rxbuf", "0")])), Ok(Port::Virtio(_))));
    }

    #[test]
    fn a_virtual_device_has_two_names() {
        let vdev = |driver: &str| VdevArgs {
            name: format!("{driver}0"),
            driver: driver.to_owned(),
            args: args(&[("iface", "/tmp/socket"), ("client", "0")]),
        };
        let drivers = Drivers::default();
        for driver in ["net_vhost", "eth_vhost"] {
            let device = drivers.parse_vdev(&vdev(driver)).ok().unwrap();
            assert_eq!(device.listens_at(), Some(Path::new("/tmp/socket")));
        }
        let unknown = drivers.parse_vdev(&vdev("net_ring")).err().unwrap();
        assert!(unknown.to_string().contains("there is no driver net_ring"), "{unknown}");
        assert_eq!(drivers.vdev_keys().len(), 2 * VDEVS.len());
    }
}
