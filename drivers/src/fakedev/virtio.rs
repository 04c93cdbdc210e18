//! Fake virtio-net device (virtio 1.2): modern PCI, split rings, no threads. Each call completes its work
//! before it returns. [`Behaviour`] selects a well-behaved, a limited or a misbehaving device.

mod registers;
mod rings;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vireo_bus_pci::{CAP_ID_VENDOR, DeviceId, Function};
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::DeviceView;
use vireo_eal::event::Event;
use vireo_eal::mmio::DoorbellPage;

use super::ConfigSpace;
use rings::Queue;

/// Receive virtqueue of the first pair.
pub const RX: u16 = 0;
/// Transmit virtqueue of the first pair.
pub const TX: u16 = 1;
/// Maximum number of queue pairs of a fake device.
const MAX_PAIRS: u16 = 2;

/// Feature bits for [`Behaviour::features`], under the specification's names.
#[allow(missing_docs)]
pub mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const MQ: u64 = 1 << 22;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const IN_ORDER: u64 = 1 << 35;
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    pub const RING_RESET: u64 = 1 << 40;
}

/// BAR with all registers, and its layout: one page per structure.
const BAR: u8 = 4;
const COMMON: u64 = 0x0000;
const DEVICE: u64 = 0x1000;
const NOTIFY: u64 = 0x2000;
const PAGE: u64 = 0x1000;
const NOTIFY_OFF_MULTIPLIER: u32 = 4;
/// Value of a doorbell that was not rung: no queue has this index.
const NOT_RUNG: u16 = u16::MAX;

const STATUS_DRIVER_OK: u8 = 4;

/// What the device offers and how it misbehaves. A change takes effect at the next access.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// Offered feature bits.
    pub features: u64,
    /// `max_virtqueue_pairs`. The device has at most two pairs.
    pub pairs: u16,
    /// `mtu` in config space.
    pub mtu: u16,
    /// Maximum size of every queue, in descriptors.
    pub queue_size: u16,
    /// Number of MSI-X vectors.
    pub vectors: u16,
    /// Station address.
    pub mac: [u8; 6],
    /// Link state in config space.
    pub link_up: bool,
    /// Result of [`Function::has_iommu`].
    pub iommu: bool,
    /// Uses the newest RX buffer first, and completes TX buffers from the last to the first.
    pub out_of_order: bool,
    /// Writes one used element for all buffers that are completed together, if `IN_ORDER` is negotiated.
    pub one_element: bool,
    /// Never accepts the driver's features.
    pub refuse_features: bool,
    /// Sets `DEVICE_NEEDS_RESET` in every status except 0.
    pub needs_reset: bool,
    /// Has lost `DRIVER_OK`, and does no work.
    pub halted: bool,
    /// Ignores a reset through the status register.
    pub ignore_reset: bool,
    /// Whether the function can be reset.
    pub function_reset: bool,
    /// Reads of all registers return all ones, as after removal.
    pub removed: bool,
    /// Changes `config_generation` on every read.
    pub config_changes: bool,
    /// `flags`, `csum_start` and `csum_offset` in the headers of received frames, if `GUEST_CSUM` is
    /// negotiated.
    pub checksum: (u8, u16, u16),
    /// `num_buffers` of received frames, instead of the correct number.
    pub num_buffers: Option<u16>,
    /// `queue_notify_off` of every queue, instead of its index.
    pub notify_off: Option<u16>,
    /// Response to control commands, or `None` to never respond.
    pub control_answer: Option<u8>,
}

impl Default for Behaviour {
    /// Behaves like QEMU's `virtio-net-pci,disable-legacy=on,iommu_platform=on`.
    fn default() -> Self {
        use feature::{ACCESS_PLATFORM, CTRL_RX, CTRL_VQ, EVENT_IDX, MAC, MRG_RXBUF, STATUS, VERSION_1};
        Self {
            features: MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | EVENT_IDX | VERSION_1 | ACCESS_PLATFORM,
            pairs: 1,
            mtu: 1500,
            queue_size: 256,
            vectors: 3,
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            link_up: true,
            iommu: true,
            out_of_order: false,
            one_element: false,
            refuse_features: false,
            needs_reset: false,
            halted: false,
            ignore_reset: false,
            function_reset: true,
            removed: false,
            config_changes: false,
            checksum: (0, 0, 0),
            num_buffers: None,
            notify_off: None,
            control_answer: Some(0),
        }
    }
}

/// Fake virtio-net device. Clones are handles of the same device.
#[derive(Clone, Debug)]
pub struct VirtioNet {
    address: Bdf,
    config: ConfigSpace,
    doorbells: Arc<DoorbellPage>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    behaviour: Behaviour,
    view: Option<DeviceView>,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    generation: u8,
    queues: [Queue; 2 * MAX_PAIRS as usize + 1],
    /// Number of queue pairs that the driver has enabled.
    pairs: u16,
    promiscuous: bool,
    interrupts: u64,
    /// Enabled MSI-X vectors.
    vectors: Vec<Event>,
    /// Vector for changes of the configuration.
    config_vector: Option<u16>,
    resets: u64,
    reads: u64,
    faults: Vec<&'static str>,
}

impl Default for VirtioNet {
    fn default() -> Self {
        Self::new(Behaviour::default())
    }
}

impl VirtioNet {
    /// Creates a device `1af4:1041` at `0000:00:03.0` with this behavior, just out of reset.
    pub fn new(behaviour: Behaviour) -> Self {
        const ADDRESS: Bdf = Bdf::new(0, 0, 3, 0).expect("a device number below 32");
        Self::at(ADDRESS, behaviour)
    }

    /// Same as [`VirtioNet::new`], at another address.
    pub fn at(address: Bdf, behaviour: Behaviour) -> Self {
        let config = ConfigSpace::new(DeviceId { vendor: 0x1af4, device: 0x1041 });
        for (kind, offset) in [(1, COMMON), (4, DEVICE), (2, NOTIFY)] {
            // After id and link: cap_len, cfg_type, bar, id, padding, offset, length, multiplier (4.1.4).
            let mut body = [0; 18];
            body[..3].copy_from_slice(&[20, kind, BAR]);
            body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
            body[10..14].copy_from_slice(&(PAGE as u32).to_le_bytes());
            body[14..].copy_from_slice(&NOTIFY_OFF_MULTIPLIER.to_le_bytes());
            config.add_capability(CAP_ID_VENDOR, &body);
        }
        let device = Self {
            address,
            config,
            doorbells: DoorbellPage::new((NOTIFY + PAGE) as usize),
            state: Arc::new(Mutex::new(State { behaviour, ..State::default() })),
        };
        device.reset_device();
        device
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the function, for the driver.
    pub fn function(&self) -> Box<dyn Function> {
        Box::new(self.clone())
    }

    /// Config space, which tests can corrupt.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// Changes how the device behaves.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        let mut state = self.state();
        let was_up = state.behaviour.link_up;
        change(&mut state.behaviour);
        let vector = state.config_vector.and_then(|vector| state.vectors.get(usize::from(vector)));
        if state.behaviour.link_up != was_up && state.status & STATUS_DRIVER_OK != 0 {
            vector.into_iter().for_each(Event::signal);
        }
    }

    /// Gives the device the memory that its IOMMU maps.
    pub fn attach(&self, view: DeviceView) {
        self.state().view = Some(view);
    }

    /// Whether the device is live: it is not halted, and the driver has set `DRIVER_OK` and enabled DMA.
    pub fn is_live(&self) -> bool {
        let state = self.state();
        self.config.bus_master() && state.status & STATUS_DRIVER_OK != 0 && !state.behaviour.halted
    }

    /// Feature bits that the driver accepted.
    pub fn driver_features(&self) -> u64 {
        self.state().driver_features
    }

    /// Whether the device is in promiscuous mode. A reset enables it.
    pub fn is_promiscuous(&self) -> bool {
        self.state().promiscuous
    }

    /// Number of interrupts that the driver did not suppress.
    pub fn interrupts(&self) -> u64 {
        self.state().interrupts
    }

    /// Number of register reads by the driver.
    pub fn reads(&self) -> u64 {
        self.state().reads
    }

    /// Number of resets of the device.
    pub fn resets(&self) -> u64 {
        self.state().resets
    }

    /// Rules of the specification that the driver broke.
    pub fn faults(&self) -> Vec<&'static str> {
        self.state().faults.clone()
    }

    /// Whether the doorbell of `queue` was rung since the last call.
    pub fn take_doorbell(&self, queue: u16) -> bool {
        let at = NOTIFY + u64::from(queue) * u64::from(NOTIFY_OFF_MULTIPLIER);
        let rung = self.doorbells.load16(at) == queue;
        self.doorbells.store16(at, NOT_RUNG);
        rung
    }

    /// Number of queue pairs that the driver requested by a control command; 1 after a reset.
    pub fn pairs(&self) -> u16 {
        self.state().pairs
    }

    /// Writes `frame` to RX buffers. Returns false if there are too few, or the device is not live.
    pub fn receive(&self, frame: &[u8]) -> bool {
        self.receive_on(0, frame)
    }

    /// Same as [`VirtioNet::receive`], on queue pair `pair`.
    pub fn receive_on(&self, pair: u16, frame: &[u8]) -> bool {
        self.is_live() && self.state().receive(RX + 2 * pair, frame).unwrap_or(false)
    }

    /// Like [`VirtioNet::receive`] for each of `frames`, which all become visible to the driver at once.
    pub fn receive_together(&self, frames: &[Vec<u8>]) -> bool {
        let mut state = self.state();
        let mut used = Vec::new();
        let all = frames.iter().all(|frame| state.fill(RX, frame, &mut used).unwrap_or(false));
        state.push_used(RX, &used);
        all
    }

    /// Sends everything that the driver made available, and returns the frames in order.
    pub fn transmitted(&self) -> Vec<Vec<u8>> {
        self.transmitted_on(0)
    }

    /// Same as [`VirtioNet::transmitted`], on queue pair `pair`.
    pub fn transmitted_on(&self, pair: u16) -> Vec<Vec<u8>> {
        if !self.is_live() {
            return Vec::new();
        }
        self.state().transmit(TX + 2 * pair).unwrap_or_default()
    }

    /// Completes descriptor `id` of `queue` with length `len`, even if the driver did not make it available.
    pub fn push_used(&self, queue: u16, id: u32, len: u32) {
        self.state().push_used(queue, &[(id, len)]);
    }

    /// Moves `used.idx` of `queue` by `count` without a completion.
    pub fn jump_used(&self, queue: u16, count: u16) {
        self.state().jump_used(queue, count);
    }
}
