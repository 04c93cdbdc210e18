//! A guest: its memory, the driver's side of two split rings in it, and a vhost-user frontend.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vireo_eal::dma::{DeviceView, DmaMemory};
use vireo_eal::mem::{Backing, Region};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DESC_NEXT, DESC_WRITE, Features, HEADER, RECEIVE, TRANSMIT};
use crate::vhost::RINGS_PER_PAIR as RINGS;

/// Number of descriptors of each ring.
pub(super) const SIZE: u16 = 64;
/// Size of the memory in bytes, and its address in descriptors and in the frontend's own addresses.
pub(super) const MEMORY: u64 = 1 << 20;
pub(super) const GUEST: u64 = 0x1_0000_0000;
pub(super) const USER: u64 = 0x7f00_0000_0000;
/// Size of a buffer in bytes; each descriptor has a buffer of its own.
pub(super) const BUFFER: usize = 4096;
/// Distance between the rings' memory, and offsets of the parts in it.
pub(super) const RING: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
pub(super) const USED: u64 = 0x2000;
pub(super) const BUFFERS: u64 = 0x8000;

/// The driver's side of a ring.
pub(super) struct GuestRing {
    view: DeviceView,
    index: u64,
    pub(super) avail_idx: u16,
    used_idx: u16,
    next_descriptor: u16,
}

impl GuestRing {
    fn at(&self, part: u64) -> u64 {
        GUEST + self.index * RING + part
    }

    /// Sets the indices of a ring that has been used up to `position`.
    pub(super) fn begin_at(&mut self, position: u16) {
        (self.avail_idx, self.used_idx) = (position, position);
        self.view.store(self.at(AVAIL + 2), position).unwrap();
        self.view.store(self.at(USED + 2), position).unwrap();
    }

    pub(super) fn buffer(&self, descriptor: u16) -> u64 {
        GUEST + BUFFERS + (self.index * u64::from(SIZE) + u64::from(descriptor)) * BUFFER as u64
    }

    pub(super) fn describe(&self, descriptor: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.at(u64::from(descriptor) * 16);
        self.view.store(at, address).unwrap();
        self.view.store(at + 8, len).unwrap();
        self.view.store(at + 12, flags).unwrap();
        self.view.store(at + 14, next).unwrap();
    }

    pub(super) fn offer(&mut self, head: u16) {
        self.view.store(self.at(AVAIL + 4 + 2 * u64::from(self.avail_idx % SIZE)), head).unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.publish();
    }

    pub(super) fn publish(&self) {
        self.view.store(self.at(AVAIL + 2), self.avail_idx).unwrap();
    }

    /// Builds and offers a chain of `count` descriptors; `part` returns the address, length and flags of
    /// each.
    fn chain(&mut self, count: usize, mut part: impl FnMut(&Self, usize, u16) -> (u64, u32, u16)) {
        let descriptors: Vec<u16> =
            (0..count as u16).map(|i| self.next_descriptor.wrapping_add(i) % SIZE).collect();
        for (i, descriptor) in descriptors.iter().enumerate() {
            let (address, len, flags) = part(self, i, *descriptor);
            let next = descriptors.get(i + 1);
            let flags = flags | next.map_or(0, |_| DESC_NEXT);
            self.describe(*descriptor, address, len, flags, next.copied().unwrap_or(0));
        }
        self.next_descriptor = (self.next_descriptor + count as u16) % SIZE;
        self.offer(descriptors[0]);
    }

    fn used(&mut self) -> Option<(u16, u32)> {
        if self.view.load::<u16>(self.at(USED + 2)).unwrap() == self.used_idx {
            return None;
        }
        let at = self.at(USED + 4 + 8 * u64::from(self.used_idx % SIZE));
        self.used_idx = self.used_idx.wrapping_add(1);
        Some((self.view.load::<u32>(at).unwrap() as u16, self.view.load(at + 4).unwrap()))
    }

    pub(super) fn set_no_interrupt(&self) {
        self.view.store(self.at(AVAIL), 1_u16).unwrap();
    }

    pub(super) fn set_used_event(&self, position: u16) {
        self.view.store(self.at(AVAIL + 4 + 2 * u64::from(SIZE)), position).unwrap();
    }

    /// Whether a driver that has published its index since the last used chain would not kick.
    pub(super) fn wants_no_kick(&self, event_idx: bool) -> bool {
        let flags: u16 = self.view.load(self.at(USED)).unwrap();
        let event: u16 = self.view.load(self.at(USED + 4 + 8 * u64::from(SIZE))).unwrap();
        let passed = event.wrapping_sub(self.used_idx) < self.avail_idx.wrapping_sub(self.used_idx);
        if event_idx { flags == 0 && !passed } else { flags == 1 }
    }
}

pub(super) struct Guest {
    pub(super) memory: Arc<DmaMemory>,
    pub(super) view: DeviceView,
    pub(super) frontend: Frontend,
    pub(super) socket: UnixStream,
    pub(super) rings: [GuestRing; RINGS],
    pub(super) calls: [EventFd; RINGS],
    kicks: [EventFd; RINGS],
    pub(super) regions: u64,
    introduced: bool,
    pub(super) last_num_buffers: Vec<u16>,
}

impl Guest {
    pub(super) fn connect(path: &Path) -> Self {
        Self::on(UnixStream::connect(path).unwrap())
    }

    /// Creates a guest whose port is at the other end of `socket`.
    pub(super) fn on(socket: UnixStream) -> Self {
        let region = Region::new(MEMORY as usize, Backing::SmallPages).unwrap();
        let memory = DmaMemory::with_addresses(region, MEMORY as usize, &[GUEST]);
        let view = memory.device_view().unwrap();
        Self {
            frontend: Frontend::from_stream(socket.try_clone().unwrap(), RINGS as u64),
            socket,
            rings: [0, 1].map(|index| GuestRing {
                view: view.clone(),
                index,
                avail_idx: 0,
                used_idx: 0,
                next_descriptor: 0,
            }),
            calls: [(); RINGS].map(|()| EventFd::new(EFD_NONBLOCK).unwrap()),
            kicks: [(); RINGS].map(|()| EventFd::new(0).unwrap()),
            regions: 1,
            introduced: false,
            memory,
            view,
            last_num_buffers: Vec::new(),
        }
    }

    /// Sends the first requests of a connection.
    pub(super) fn introduce(&mut self, features: Features) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(offered & (features.bits() | protocol), features.bits() | protocol);
        let known = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS | VhostUserProtocolFeatures::REPLY_ACK;
        let offered = known | VhostUserProtocolFeatures::LOG_SHMFD;
        assert_eq!(frontend.get_protocol_features().unwrap(), offered);
        frontend.set_protocol_features(known).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features.bits() | protocol).unwrap();
        self.introduced = true;
    }

    /// Sends all requests up to running rings.
    pub(super) fn start(&mut self, features: Features) {
        if !self.introduced {
            self.introduce(features);
        }
        self.set_mem_table();
        [RECEIVE, TRANSMIT].into_iter().for_each(|ring| self.start_ring(ring));
    }

    pub(super) fn set_mem_table(&self) {
        let len = MEMORY / self.regions;
        let fd = self.memory.region().fd().unwrap().as_raw_fd();
        let regions: Vec<VhostUserMemoryRegionInfo> = (0..self.regions)
            .map(|i| VhostUserMemoryRegionInfo {
                guest_phys_addr: GUEST + i * len,
                memory_size: len,
                userspace_addr: USER + i * len,
                mmap_offset: i * len,
                mmap_handle: fd,
            })
            .collect();
        self.frontend.set_mem_table(&regions).unwrap();
    }

    pub(super) fn addresses(ring: usize) -> VringConfigData {
        let at = USER + ring as u64 * RING;
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: at + USED,
            avail_ring_addr: at + AVAIL,
            log_addr: None,
        }
    }

    pub(super) fn start_ring(&mut self, ring: usize) {
        let frontend = &mut self.frontend;
        frontend.set_vring_num(ring, SIZE).unwrap();
        frontend.set_vring_addr(ring, &Self::addresses(ring)).unwrap();
        frontend.set_vring_base(ring, self.rings[ring].used_idx).unwrap();
        frontend.set_vring_kick(ring, &self.kicks[ring]).unwrap();
        frontend.set_vring_call(ring, &self.calls[ring]).unwrap();
        frontend.set_vring_enable(ring, true).unwrap();
    }

    pub(super) fn enable(&mut self, ring: usize, on: bool) {
        self.frontend.set_vring_enable(ring, on).unwrap();
    }

    /// Builds a `VHOST_USER_SET_VRING_ENABLE` request.
    fn enabling(ring: u32, on: u32, ask: bool) -> Vec<u8> {
        [18, 1 | u32::from(ask) << 3, 8, ring, on].into_iter().flat_map(u32::to_ne_bytes).collect()
    }

    /// Enables a ring with a request of which the backend has only the first `sent` bytes while `meanwhile`
    /// runs.
    pub(super) fn begin_to_enable(&mut self, ring: usize, sent: usize, meanwhile: impl FnOnce(&mut Self)) {
        let request = Self::enabling(ring as u32, 1, false);
        self.socket.write_all(&request[..sent]).unwrap();
        meanwhile(self);
        self.socket.write_all(&request[sent..]).unwrap();
    }

    /// Enables or disables a ring before the features are set, as QEMU does at first. Returns the answer if
    /// `ask` is set.
    pub(super) fn enable_early(&mut self, ring: u32, on: u32, ask: bool) -> Option<u64> {
        self.socket.write_all(&Self::enabling(ring, on, ask)).unwrap();
        let mut answer = [0; 20];
        ask.then(|| self.socket.read_exact(&mut answer).unwrap())?;
        assert_eq!(answer[..12], [18, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        Some(u64::from_ne_bytes(*answer[12..].first_chunk().unwrap()))
    }

    /// Stops `ring`; returns the position that the backend reports.
    pub(super) fn frontend_base(&self, ring: usize) -> u32 {
        self.frontend.get_vring_base(ring).unwrap()
    }

    /// Stops the rings and resets them.
    pub(super) fn stop(&mut self) {
        for ring in [RECEIVE, TRANSMIT] {
            self.frontend_base(ring);
            self.rings[ring].begin_at(0);
        }
    }

    pub(super) fn is_disconnected(&self) -> bool {
        self.frontend.get_features().is_err()
    }

    pub(super) fn clear_calls(&self) {
        self.calls.iter().for_each(|call| drop(call.read()));
    }

    pub(super) fn take_call(&self, ring: usize) -> bool {
        self.calls[ring].read().is_ok()
    }

    /// Kicks for what was transmitted since the last used chain, if the device wants that. Returns whether it does.
    pub(super) fn kick(&self, event_idx: bool) -> bool {
        let wanted = !self.rings[TRANSMIT].wants_no_kick(event_idx);
        if wanted {
            self.kicks[TRANSMIT].write(1).unwrap();
        }
        wanted
    }

    pub(super) fn transmit(&mut self, frame: &[u8]) {
        self.transmit_chain(frame, &[]);
    }

    /// Transmits a header and `frame`, split into descriptors at `cuts`.
    pub(super) fn transmit_chain(&mut self, frame: &[u8], cuts: &[usize]) {
        let mut bytes = vec![0xa5; HEADER];
        bytes.extend(frame);
        let mut ends: Vec<usize> = cuts.iter().map(|cut| *cut.min(&bytes.len())).collect();
        ends.push(bytes.len());
        let view = self.view.clone();
        self.rings[TRANSMIT].chain(ends.len(), |ring, i, descriptor| {
            let start = if i == 0 { 0 } else { ends[i - 1] };
            view.write(ring.buffer(descriptor), &bytes[start..ends[i]]).unwrap();
            (ring.buffer(descriptor), (ends[i] - start) as u32, 0)
        });
    }

    pub(super) fn reap_transmitted(&mut self) -> usize {
        std::iter::from_fn(|| self.rings[TRANSMIT].used()).inspect(|(_, len)| assert_eq!(*len, 0)).count()
    }

    /// Waits until `count` frames have been transmitted; returns how many have.
    pub(super) fn await_transmitted(&mut self, count: usize) -> usize {
        let begin = Instant::now();
        let mut transmitted = 0;
        while transmitted < count && begin.elapsed() < Duration::from_secs(20) {
            transmitted += self.reap_transmitted();
            std::thread::yield_now();
        }
        transmitted
    }

    /// Offers a chain of buffers with these lengths to receive into.
    pub(super) fn provide(&mut self, lens: &[u32]) {
        self.rings[RECEIVE]
            .chain(lens.len(), |ring, i, descriptor| (ring.buffer(descriptor), lens[i], DESC_WRITE));
    }

    /// Offers a whole buffer with each descriptor that the device does not have.
    pub(super) fn provide_all(&mut self) {
        while self.rings[RECEIVE].avail_idx.wrapping_sub(self.rings[RECEIVE].used_idx) < SIZE {
            self.provide(&[BUFFER as u32]);
        }
    }

    /// Returns the received frames. If the device still has buffers, offers whole buffers with all other
    /// descriptors.
    pub(super) fn received(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut chunks = 0;
        self.last_num_buffers.clear();
        while let Some((head, len)) = self.rings[RECEIVE].used() {
            let bytes = self.chain_bytes(head, len as usize);
            if chunks == 0 {
                assert_eq!(bytes[..HEADER - 2], [0; HEADER - 2]);
                chunks = u16::from_le_bytes([bytes[HEADER - 2], bytes[HEADER - 1]]);
                self.last_num_buffers.push(chunks);
                frames.push(bytes[HEADER..].to_vec());
            } else {
                frames.last_mut().unwrap().extend(bytes);
            }
            chunks -= 1;
        }
        assert_eq!(chunks, 0);
        if self.rings[RECEIVE].avail_idx.wrapping_sub(self.rings[RECEIVE].used_idx) > 0 {
            self.provide_all();
        }
        frames
    }

    fn chain_bytes(&self, head: u16, len: usize) -> Vec<u8> {
        let ring = &self.rings[RECEIVE];
        let (mut bytes, mut descriptor) = (vec![0; len], head);
        let mut done = 0;
        while done < len {
            let at = ring.at(u64::from(descriptor) * 16);
            let room = self.view.load::<u32>(at + 8).unwrap() as usize;
            let part = room.min(len - done);
            self.view.read(self.view.load(at).unwrap(), &mut bytes[done..done + part]).unwrap();
            done += part;
            descriptor = self.view.load(at + 14).unwrap();
        }
        bytes
    }
}
