//! Modern PCI transport (virtio 1.2, 4.1): the registers that the vendor capabilities describe.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use vireo_bus_pci::{CAP_ID_VENDOR, Function, Interrupt, InterruptRecord, capabilities};
use vireo_eal::dma::DmaMemory;
use vireo_eal::event::Event;
use vireo_eal::handover::{Fds, encode};
use vireo_eal::mmio::Bar;
use vireo_eal::vfio::Irq;
use vireo_eal::{Error, ErrorKind, Result};

use super::features::{Features, Status};
use super::split::{Kick, Virtqueue, negotiate_size};
use super::transport::{DEVICE_TIMEOUT, KEPT, Transport};
use super::{Options, pair_of_rx};
use crate::driver::Facts;
use crate::frames::ETHERNET;
use crate::handover::needs_reset;
use crate::port::{MacAddr, PortConfig};

/// Number of config space reads, each interrupted by a change, after which the driver gives up.
const GENERATION_RETRIES: usize = 100;
/// Value of `queue_msix_vector` and `config_msix_vector` without interrupts.
const NO_VECTOR: u16 = 0xffff;

/// Hint on how to get a device with the modern interface. Some clouds offer only legacy devices.
const MODERN: &str = "choose a virtio 1.0 NIC: in a cloud by machine or image type, in libvirt by model \
                      virtio-non-transitional, in QEMU by -device virtio-net-pci,disable-legacy=on";

/// Hint on how to get a device with an interrupt for each RX queue.
const VECTORS: &str = "give it more MSI-X vectors, in QEMU: -device virtio-net-pci,vectors=N";

/// Device status once the features are negotiated.
const READY: Status = Status::ACKNOWLEDGE.union(Status::DRIVER).union(Status::FEATURES_OK);

/// Offsets in `struct virtio_net_config` (5.1.4).
mod config {
    pub(super) const MAC: u64 = 0;
    pub(super) const STATUS: u64 = 6;
    /// Length up to and including `status`.
    pub(super) const LEN: u64 = 8;
    /// `max_virtqueue_pairs`, present only with `VIRTIO_NET_F_MQ`.
    pub(super) const MAX_PAIRS: u64 = 8;
    /// `mtu`, present only with `VIRTIO_NET_F_MTU`.
    pub(super) const MTU: u64 = 10;
    pub(super) const STATUS_LINK_UP: u16 = 1;
}

/// Offsets in `struct virtio_pci_cap` (4.1.4).
mod cap {
    pub(super) const CFG_TYPE: u16 = 3;
    pub(super) const BAR: u16 = 4;
    pub(super) const OFFSET: u16 = 8;
    pub(super) const LENGTH: u16 = 12;
    pub(super) const NOTIFY_OFF_MULTIPLIER: u16 = 16;
    pub(super) const TYPE_COMMON: u8 = 1;
    pub(super) const TYPE_NOTIFY: u8 = 2;
    pub(super) const TYPE_DEVICE: u8 = 4;
}

/// Offsets in `struct virtio_pci_common_cfg` (4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// Addresses of the descriptor table, the avail ring and the used ring.
    pub(super) const QUEUE_ADDRESSES: [u64; 3] = [0x20, 0x28, 0x30];
    pub(super) const LEN: u64 = 0x38;
    /// Present only with `VIRTIO_F_RING_RESET`.
    pub(super) const QUEUE_RESET: u64 = 0x3a;
}

/// Part of a BAR. The constructor checks that it has the length that register accesses need.
#[derive(Debug)]
struct Window {
    bar: Bar,
    offset: u64,
    len: u64,
}

impl Window {
    /// Opens the structure described by the capability at `at` in config space; it must have at least `least`
    /// bytes.
    fn new(function: &dyn Function, at: u16, align: u64, least: u64) -> Result<Self> {
        let bar = function.bar(function.config8(at + cap::BAR))?;
        let offset = u64::from(function.config32(at + cap::OFFSET));
        let len = u64::from(function.config32(at + cap::LENGTH));
        if len < least || !offset.is_multiple_of(align) || offset + len > bar.size() {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("cannot use virtio NIC {}", function.address()),
                format!(
                    "the capability at {at:#x} describes {len:#x} bytes at {offset:#x}, but needs {least:#x} \
                     aligned to {align} in a BAR of {:#x}",
                    bar.size()
                ),
            ));
        }
        Ok(Self { bar, offset, len })
    }
}

/// A virtio device on the PCI bus.
pub(super) struct Pci {
    name: Arc<str>,
    common: Window,
    notify: Window,
    notify_off_multiplier: u32,
    device: Window,
    /// Features from the last negotiation.
    features: Features,
    /// Enabled MSI-X vectors. RX queue n has vector n.
    vectors: Vec<Interrupt>,
    /// Number of RX queues that have an interrupt.
    interrupting: u16,
    /// Whether changes of the configuration have the vector after those of the RX queues.
    signals_changes: bool,
    /// Whether the device is live: from `DRIVER_OK` to the reset.
    live: bool,
    /// Dropped after the windows on its registers.
    function: Box<dyn Function>,
}

impl fmt::Debug for Pci {
    /// Prints only the name, because `Function` does not require `Debug`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Pci {
    /// Takes ownership of the function, which may start no DMA before [`Transport::go_live`].
    ///
    /// # Errors
    /// `Unavailable` for a device that has only the legacy interface, `Protocol` when all capabilities of a kind point
    /// outside their BARs.
    pub(super) fn new(function: Box<dyn Function>) -> Result<Self> {
        function.set_command(false)?;
        Self::with_vectors(function, Vec::new(), false)
    }

    /// Attaches to a device that runs for another process, which has made the record in `facts`.
    ///
    /// # Errors
    /// As for [`Pci::new`].
    pub(super) fn attach(function: Box<dyn Function>, facts: Facts<'_>) -> Result<Self> {
        let (vectors, signals_changes) = facts.decode::<(Vec<InterruptRecord>, bool)>()?;
        let vectors = vectors.iter().map(|vector| Interrupt::of(vector, facts.fds));
        Self::with_vectors(function, vectors.collect::<Result<_>>()?, signals_changes)
    }

    /// Finds the registers of a device whose `vectors` are enabled. If `signals_changes`, the last vector is for
    /// changes of the configuration. Of each kind, the first usable capability counts (4.1.4.1). The ISR register is not used, because
    /// the driver takes interrupts by MSI-X only.
    fn with_vectors(
        function: Box<dyn Function>,
        vectors: Vec<Interrupt>,
        signals_changes: bool,
    ) -> Result<Self> {
        let (mut common, mut notify, mut device) = (None, None, None);
        let mut refused = None;
        let mut usable =
            |window: Result<Window>| window.map_err(|error| refused.get_or_insert(error).kind()).ok();
        for capability in capabilities(&*function)?.into_iter().filter(|c| c.id == CAP_ID_VENDOR) {
            let at = capability.offset;
            // A reserved BAR number marks a capability to skip (4.1.4).
            if function.config8(at + cap::BAR) > 5 {
                continue;
            }
            match function.config8(at + cap::CFG_TYPE) {
                cap::TYPE_COMMON if common.is_none() => {
                    common = usable(Window::new(&*function, at, 4, common::LEN));
                }
                cap::TYPE_NOTIFY if notify.is_none() => {
                    let multiplier = function.config32(at + cap::NOTIFY_OFF_MULTIPLIER);
                    notify = usable(Window::new(&*function, at, 2, 2)).map(|window| (window, multiplier));
                }
                cap::TYPE_DEVICE if device.is_none() => {
                    device = usable(Window::new(&*function, at, 4, config::LEN));
                }
                _ => {}
            }
        }
        let (Some(common), Some((notify, notify_off_multiplier)), Some(device)) = (common, notify, device)
        else {
            return Err(refused.unwrap_or_else(|| {
                Error::new(
                    ErrorKind::Unavailable,
                    format!("cannot use virtio NIC {}", function.address()),
                    "it has the legacy interface only (virtio 0.9), not the modern one (virtio 1.0)",
                )
                .with_hint(MODERN)
            }));
        };
        let name = function.address().to_string().into();
        let features = Features::empty();
        Ok(Self {
            name,
            common,
            notify,
            notify_off_multiplier,
            device,
            features,
            interrupting: vectors.len().saturating_sub(signals_changes.into()) as u16,
            vectors,
            signals_changes,
            live: false,
            function,
        })
    }

    fn read8(&self, register: u64) -> u8 {
        self.common.bar.read8(self.common.offset + register)
    }

    fn read16(&self, register: u64) -> u16 {
        self.common.bar.read16(self.common.offset + register)
    }

    fn write16(&self, register: u64, value: u16) {
        self.common.bar.write16(self.common.offset + register, value);
    }

    fn read32(&self, register: u64) -> u32 {
        self.common.bar.read32(self.common.offset + register)
    }

    fn write32(&self, register: u64, value: u32) {
        self.common.bar.write32(self.common.offset + register, value);
    }

    /// Reads `device_status`; `None` when the device does not answer.
    fn status(&self) -> Option<Status> {
        match self.read8(common::DEVICE_STATUS) {
            0xff => None,
            bits => Some(Status::from_bits_retain(bits)),
        }
    }

    /// Events of the RX queues that have an interrupt.
    fn rx_events(&self) -> Vec<Event> {
        self.vectors.iter().take(self.interrupting.into()).map(|vector| vector.event().clone()).collect()
    }

    fn error(&self, kind: ErrorKind, verb: &str, why: impl Into<String>) -> Error {
        Error::new(kind, format!("cannot {verb} virtio NIC {}", self.name), why)
    }

    /// Writes `device_status`.
    fn set_status(&self, status: Status) {
        self.common.bar.write8(self.common.offset + common::DEVICE_STATUS, status.bits());
    }

    /// Sets bits of `device_status`. A driver clears bits only with a reset (2.1.1).
    fn add_status(&self, bits: Status) {
        self.set_status(self.status().unwrap_or(Status::empty()) | bits);
    }

    /// Resets the device and waits until it confirms the reset (2.4).
    ///
    /// # Errors
    /// `Protocol` when the device does not answer, or does not finish within a second.
    fn reset(&self) -> Result<()> {
        self.set_status(Status::empty());
        let deadline = Instant::now() + DEVICE_TIMEOUT;
        loop {
            let why = match self.status() {
                Some(status) if status.is_empty() => return Ok(()),
                Some(_) if Instant::now() < deadline => {
                    std::thread::yield_now();
                    continue;
                }
                Some(status) => format!("its status is still {:#x} after 1 s", status.bits()),
                None => "it does not answer".to_owned(),
            };
            return Err(self.error(ErrorKind::Protocol, "reset", why));
        }
    }

    /// Reads the features that the device offers.
    fn device_features(&self) -> Features {
        let half = |select| {
            self.write32(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.read32(common::DEVICE_FEATURE))
        };
        Features::from_bits_truncate(half(0) | half(1) << 32)
    }

    /// Writes the features that the driver uses.
    fn set_driver_features(&self, features: Features) {
        for select in 0..2 {
            self.write32(common::DRIVER_FEATURE_SELECT, select);
            self.write32(common::DRIVER_FEATURE, (features.bits() >> (32 * select)) as u32);
        }
    }

    /// Reads `N` bytes of device config space at `offset`, all of one generation (2.5.3).
    ///
    /// # Errors
    /// `Protocol` when the device keeps changing them.
    fn config_bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        for _ in 0..GENERATION_RETRIES {
            let before = self.read8(common::CONFIG_GENERATION);
            let bytes =
                std::array::from_fn(|i| self.device.bar.read8(self.device.offset + offset + i as u64));
            if self.read8(common::CONFIG_GENERATION) == before {
                return Ok(bytes);
            }
        }
        let why = format!("it changed during each of {GENERATION_RETRIES} reads");
        Err(self.error(ErrorKind::Protocol, "read the config space of", why))
    }

    /// Reads a 16-bit field of device config space, which needs no generation check.
    fn config16(&self, offset: u64) -> u16 {
        self.device.bar.read16(self.device.offset + offset)
    }

    /// Returns the offset in the notify BAR of the doorbell of queue `index` (4.1.4.4).
    fn notify_offset(&self, index: u16) -> Result<u64> {
        self.write16(common::QUEUE_SELECT, index);
        let offset = u64::from(self.read16(common::QUEUE_NOTIFY_OFF)) * u64::from(self.notify_off_multiplier);
        if offset + 2 > self.notify.len {
            let why = format!(
                "the doorbell of virtqueue {index} at {offset:#x} is beyond the {:#x} bytes of doorbells",
                self.notify.len
            );
            return Err(self.error(ErrorKind::Protocol, "use", why));
        }
        Ok(self.notify.offset + offset)
    }

    /// Negotiates features with a device that was just reset.
    fn agree(&self, options: Options, config: &PortConfig) -> Result<Features> {
        let offered = self.device_features();
        if !offered.contains(Features::VERSION_1) {
            return Err(self
                .error(ErrorKind::Unavailable, "use", "it does not offer VIRTIO_F_VERSION_1")
                .with_hint(MODERN));
        }
        if self.function.has_iommu() && !offered.contains(Features::ACCESS_PLATFORM) {
            let why = "it bypasses the IOMMU: VIRTIO_F_ACCESS_PLATFORM is not offered";
            return Err(self.error(ErrorKind::Unavailable, "use", why).with_hint(
                "in QEMU: -device virtio-net-pci,iommu_platform=on; in libvirt: <driver iommu='on'/>; or remove \
                 the IOMMU from the virtual machine and use --vfio-mode noiommu",
            ));
        }
        let mut features = offered.wanted(options, config);
        features.set(Features::MTU, features.contains(Features::MTU) && self.device.len >= config::MTU + 2);
        let can_reset = features.contains(Features::RING_RESET) && self.common.len >= common::QUEUE_RESET + 2;
        features.set(Features::RING_RESET, can_reset);
        // MQ needs the control queue (5.1.3.1), which sets the number of pairs.
        features.set(Features::MQ, features.contains(Features::MQ | Features::CTRL_VQ));
        self.set_driver_features(features);
        self.add_status(Status::FEATURES_OK);
        self.check_alive()?;
        if self.status() != Some(READY) {
            let why = format!("it refuses features that it offers: {features:?}");
            return Err(self.error(ErrorKind::Protocol, "use", why));
        }
        Ok(features)
    }
}

impl Transport for Pci {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn function(&self) -> Option<&dyn Function> {
        Some(&*self.function)
    }

    fn record<'a>(&'a self, fds: &mut Fds<'a>) -> Result<Vec<u8>> {
        let used = usize::from(self.interrupting) + usize::from(self.signals_changes);
        let vectors = self.vectors.iter().take(used).map(|vector| vector.record(fds));
        encode(&(vectors.collect::<Vec<_>>(), self.signals_changes))
    }

    fn resume(&mut self, features: Features) -> Vec<Event> {
        (self.features, self.live) = (features, true);
        self.rx_events()
    }

    fn negotiate(&mut self, options: Options, config: &PortConfig) -> Result<Features> {
        self.live = false;
        self.reset()?;
        self.add_status(Status::ACKNOWLEDGE);
        self.add_status(Status::DRIVER);
        let agreed = self.agree(options, config);
        self.features = agreed.inspect_err(|_| self.add_status(Status::FAILED))?;
        Ok(self.features)
    }

    fn pairs(&self) -> Result<u16> {
        if !self.features.contains(Features::MQ) || self.device.len < config::MAX_PAIRS + 2 {
            return Ok(1);
        }
        match u16::from_le_bytes(self.config_bytes(config::MAX_PAIRS)?) {
            pairs @ 1..=0x8000 => Ok(pairs),
            pairs => {
                let why = format!("it reports {pairs} pairs of queues");
                Err(self.error(ErrorKind::Protocol, "use", why))
            }
        }
    }

    fn mac(&self) -> Result<Option<MacAddr>> {
        match self.features.contains(Features::MAC) {
            true => self.config_bytes(config::MAC).map(|bytes| Some(MacAddr(bytes))),
            false => Ok(None),
        }
    }

    fn longest_frame(&self) -> Option<usize> {
        let reported = self.features.contains(Features::MTU);
        reported.then(|| ETHERNET + usize::from(self.config16(config::MTU)))
    }

    fn link_up(&self) -> bool {
        let reported = self.features.contains(Features::STATUS);
        let up = !reported || self.config16(config::STATUS) & config::STATUS_LINK_UP != 0;
        up && self.check_alive().is_ok()
    }

    fn owes_completions(&self) -> bool {
        true
    }

    fn receive_all(&self) -> Result<()> {
        let why = "its receive filter is fixed: VIRTIO_NET_F_CTRL_RX is not offered";
        let error = self.error(ErrorKind::Unavailable, "receive every frame on", why);
        Err(error.with_hint(
            "leave out -P, and send to its own address; in QEMU: -device virtio-net-pci,ctrl_vq=on,ctrl_rx=on",
        ))
    }

    fn queue_size(&self, index: u16, asked: u16) -> Result<u16> {
        self.write16(common::QUEUE_SELECT, index);
        match self.read16(common::QUEUE_SIZE) {
            0 => {
                let why = format!("it has no virtqueue {index} (size 0)");
                Err(self.error(ErrorKind::Unavailable, "use", why))
            }
            most => negotiate_size(asked, most),
        }
    }

    /// Does nothing: VFIO maps the memory.
    fn share(&mut self, _memory: &DmaMemory) -> Result<()> {
        Ok(())
    }

    /// Does nothing, as `share`.
    fn share_more(&mut self, _memory: &DmaMemory) -> Result<()> {
        Ok(())
    }

    /// The vector for changes may be missing, because the link is also polled.
    fn set_interrupts(&mut self, count: u16, changes: bool) -> Result<Vec<Event>> {
        let has_fewer = |vectors: &Vec<_>, than: u16| vectors.len() < usize::from(than);
        if changes && has_fewer(&self.vectors, count + 1) {
            self.vectors = self.function.enable_interrupts(&[Irq::Msix], count + 1).unwrap_or_else(|error| {
                tracing::debug!("the link is only polled: {error}");
                Vec::new()
            });
        }
        if has_fewer(&self.vectors, count) {
            let enabled = self.function.enable_interrupts(&[Irq::Msix], count);
            self.vectors = enabled.map_err(|error| error.with_hint(VECTORS))?;
        }
        self.interrupting = count;
        let vector = if changes && !has_fewer(&self.vectors, count + 1) { count } else { NO_VECTOR };
        self.write16(common::CONFIG_MSIX_VECTOR, vector);
        // A device that has no resources for the vector says so here (4.1.5.1.2.1).
        self.signals_changes = vector != NO_VECTOR && self.read16(common::CONFIG_MSIX_VECTOR) == vector;
        Ok(self.rx_events())
    }

    fn change_event(&self) -> Option<&Event> {
        let vector = self.vectors.get(usize::from(self.interrupting)).filter(|_| self.signals_changes)?;
        Some(vector.event())
    }

    /// Follows 4.1.5.1.3.
    fn enable_queue(&mut self, index: u16, queue: &Virtqueue) -> Result<()> {
        self.write16(common::QUEUE_SELECT, index);
        self.write16(common::QUEUE_SIZE, queue.size());
        let size = self.read16(common::QUEUE_SIZE);
        if size != queue.size() {
            let why = format!("virtqueue {index} has a size of {size} instead of {}", queue.size());
            return Err(self.error(ErrorKind::Protocol, "use", why));
        }
        let vector = pair_of_rx(index).filter(|pair| *pair < self.interrupting).unwrap_or(NO_VECTOR);
        self.write16(common::QUEUE_MSIX_VECTOR, vector);
        // A device that has no resources for the vector says so here (4.1.5.1.2.1).
        if vector != NO_VECTOR && self.read16(common::QUEUE_MSIX_VECTOR) != vector {
            let why = format!("it has no interrupt left for virtqueue {index}");
            return Err(self.error(ErrorKind::Unavailable, "use", why));
        }
        for (register, address) in common::QUEUE_ADDRESSES.into_iter().zip(queue.addresses()) {
            self.write32(register, address as u32);
            self.write32(register + 4, (address >> 32) as u32);
        }
        self.write16(common::QUEUE_ENABLE, 1);
        Ok(())
    }

    fn reset_queue(&mut self, index: u16) -> Result<()> {
        if !self.features.contains(Features::RING_RESET) {
            return Err(needs_reset());
        }
        self.write16(common::QUEUE_SELECT, index);
        self.write16(common::QUEUE_RESET, 1);
        let deadline = Instant::now() + DEVICE_TIMEOUT;
        // The device resets the queue before this reads as 0 (4.1.4.3.2).
        while self.read16(common::QUEUE_RESET) != 0 {
            if Instant::now() >= deadline {
                let why = format!("it does not reset virtqueue {index} within 1 s");
                return Err(self.error(ErrorKind::Protocol, "use", why));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn kick(&self, index: u16) -> Result<Kick> {
        self.notify.bar.doorbell16(self.notify_offset(index)?).map(Kick::Register)
    }

    fn notify(&self, index: u16) -> Result<()> {
        self.notify.bar.write16(self.notify_offset(index)?, index);
        Ok(())
    }

    fn go_live(&mut self) -> Result<()> {
        self.function.set_command(true)?;
        self.add_status(Status::DRIVER_OK);
        self.live = true;
        self.check_alive()
    }

    /// Resets the device, or its PCI function if that fails.
    fn stop(&mut self) -> Result<()> {
        self.live = false;
        let reset = self.reset().or_else(|error| match self.function.reset() {
            Ok(true) => Ok(()),
            _ => Err(error),
        });
        reset.and(self.function.set_command(false)).map_err(|error| error.with_hint(KEPT))
    }

    fn check_alive(&self) -> Result<()> {
        match self.status() {
            None => Err(self.error(ErrorKind::Unavailable, "reach", "it does not answer")),
            Some(status) if status.contains(Status::DEVICE_NEEDS_RESET) => Err(self.error(
                ErrorKind::Protocol,
                "continue using",
                "it reports an error and needs a reset (DEVICE_NEEDS_RESET)",
            )),
            // QEMU clears the bit when bus mastering is switched off; so does a reset by another party.
            Some(status) if self.live && !status.contains(Status::DRIVER_OK) => Err(self.error(
                ErrorKind::Protocol,
                "continue using",
                format!("its status {:#x} has lost DRIVER_OK", status.bits()),
            )),
            Some(_) => Ok(()),
        }
    }
}
