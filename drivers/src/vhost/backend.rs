//! Handles the requests of one frontend connection (vhost-user, "Front-end message types").

mod record;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vireo_eal::dma::{MAX_PEER_REGIONS, PeerEvent, PeerLog, PeerMemory, PeerRegion};

use super::ring::{Addresses, Marks, Notifiers, Ring, RingFeatures};
use super::shared::{Shared, Slot};
use super::{RINGS_PER_PAIR, TRANSMIT};
use crate::virtio::Features;
pub(super) use record::BackendRecord;

/// Features that the port offers. Indirect descriptors are excluded because they cost the device a read per
/// packet.
pub(super) const FEATURES: Features =
    Features::VERSION_1.union(Features::MRG_RXBUF).union(Features::EVENT_IDX).union(Features::IN_ORDER);

/// `VHOST_F_LOG_ALL`: writes are marked in a log.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// Maximum queue size that the specification allows, in descriptors (virtio 1.2, 2.7).
const MAX_SIZE: u32 = 1 << 15;

/// State of one ring as the frontend set it.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    addresses: Option<Addresses>,
    /// Guest address of the used ring, if it is to be marked in the log (`VHOST_VRING_F_LOG`).
    logged: Option<u64>,
    /// Position of the next chain while no lcore has the ring.
    base: u16,
    notifiers: Notifiers,
    /// Whether the ring is started: from `SET_VRING_KICK` to `GET_VRING_BASE`.
    started: bool,
    enabled: bool,
}

/// State of a connection. Dropping it takes the rings away from the lcores.
#[derive(Debug)]
pub(super) struct Backend {
    name: Arc<str>,
    rings: Vec<Arc<Shared>>,
    vrings: Vec<Vring>,
    /// Features that the frontend accepted.
    features: u64,
    protocol_features: u64,
    memory: Option<Arc<PeerMemory>>,
    log: Option<Arc<PeerLog>>,
}

fn region(region: &VhostUserMemoryRegion, file: File) -> PeerRegion {
    PeerRegion {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        len: region.memory_size,
        offset: region.mmap_offset,
        fd: file.into(),
    }
}

fn event(fd: Option<File>) -> Result<Option<Arc<PeerEvent>>> {
    fd.map(|fd| PeerEvent::new(fd.into()).map(Arc::new)).transpose().map_err(failed)
}

fn failed(error: vireo_eal::Error) -> Error {
    Error::ReqHandlerError(std::io::Error::other(error))
}

impl Backend {
    pub(super) fn new(name: &Arc<str>, rings: Vec<Arc<Shared>>) -> Self {
        let vrings = rings.iter().map(|_| Vring::default()).collect();
        Self {
            name: Arc::clone(name),
            rings,
            vrings,
            features: 0,
            protocol_features: 0,
            memory: None,
            log: None,
        }
    }

    fn pairs(&self) -> usize {
        self.rings.len() / RINGS_PER_PAIR
    }

    fn vring(&mut self, index: u32) -> Result<(usize, &mut Vring)> {
        let at = index as usize;
        self.vrings.get_mut(at).map(|vring| (at, vring)).ok_or(Error::InvalidParam)
    }

    /// Whether the frontend has accepted the protocol features.
    pub(super) fn is_negotiated(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    fn accepted(&self, feature: Features) -> bool {
        self.features & feature.bits() != 0
    }

    /// Whether a ring is enabled. Without protocol features there is no SET_VRING_ENABLE, and a ring starts
    /// enabled (vhost-user, "Ring states").
    fn is_enabled(&self, vring: &Vring) -> bool {
        vring.enabled || !self.is_negotiated()
    }

    /// Builds a ring with its current settings; `Stopped` while a setting is missing or the frontend has not
    /// started the ring.
    fn ring(&self, at: usize) -> Result<Slot> {
        let vring = &self.vrings[at];
        let (Some(memory), Some(addresses)) = (&self.memory, vring.addresses) else {
            return Ok(Slot::Stopped);
        };
        if !vring.started || !self.accepted(Features::VERSION_1) {
            return Ok(Slot::Stopped);
        }
        let terms = RingFeatures {
            event_idx: self.accepted(Features::EVENT_IDX),
            mergeable: self.accepted(Features::MRG_RXBUF),
        };
        let log = self.log.as_ref().filter(|_| self.features & LOG_ALL != 0);
        let marks = log.map(|log| Marks { log: Arc::clone(log), used: vring.logged });
        let is_logged = marks.is_some();
        let notifiers = vring.notifiers.clone();
        let ring = Ring::new(memory, vring.size, addresses, terms, notifiers, marks).map_err(failed)?;
        Ok(match Box::new(ring) {
            ring if !self.is_enabled(vring) => Slot::Disabled(ring),
            ring if is_logged => Slot::Logged(ring),
            ring => Slot::Running(ring),
        })
    }

    /// Takes the ring from its lcore, and returns it with its current settings.
    fn update(&mut self, at: usize) -> Result<()> {
        let shared = Arc::clone(&self.rings[at]);
        shared.lock().replace(|slot| {
            if let Slot::Broken(_) = slot {
                return (slot, Ok(()));
            }
            if let Some(next) = slot.next() {
                self.vrings[at].base = next;
            }
            // No byte belongs to two rings.
            drop(slot);
            match self.ring(at) {
                Ok(slot) => (slot, Ok(())),
                Err(error) => (Slot::Stopped, Err(error)),
            }
        })
    }

    /// Updates each ring as [`Backend::update`] does, even if another one fails.
    fn update_all(&mut self) -> Result<()> {
        (0..self.rings.len()).map(|at| self.update(at)).fold(Ok(()), Result::and)
    }

    /// Takes the ring from its lcore for good; returns the position where it ended.
    fn stop(&mut self, at: usize) -> u16 {
        let vring = &mut self.vrings[at];
        self.rings[at].lock().replace(|slot| {
            if let Some(next) = slot.next() {
                vring.base = next;
            }
            (Slot::Stopped, ())
        });
        vring.started = false;
        vring.base
    }

    /// Replaces the memory with one that differs in single regions. A ring outside the memory waits for its
    /// region to be added.
    fn change_memory(&mut self, memory: Option<Arc<PeerMemory>>) {
        let _old = std::mem::replace(&mut self.memory, memory);
        if let Err(error) = self.update_all() {
            tracing::warn!("{}: a ring waits for its memory: {error}", self.name);
        }
    }

    /// Whether no removed region is still mapped.
    pub(super) fn is_settled(&self) -> bool {
        self.memory.as_ref().is_none_or(|memory| memory.is_settled())
    }

    /// Unmaps the removed regions.
    pub(super) fn settle(&mut self) {
        if !self.is_settled() {
            self.change_memory(self.memory.as_ref().and_then(|memory| memory.settled()));
        }
    }

    /// Returns the disabled rings through which the frontend transmits, each with the end of its current
    /// content; `None` if no ring is disabled. Does not lock enabled rings: an lcore that found its ring
    /// locked would miss a burst after each request.
    pub(super) fn disabled(&self) -> Option<Vec<(Arc<Shared>, u16)>> {
        let transmit = self.rings.iter().zip(&self.vrings).skip(TRANSMIT).step_by(RINGS_PER_PAIR);
        let mut disabled = None;
        for (shared, _) in transmit.filter(|(_, vring)| vring.started && !self.is_enabled(vring)) {
            if let Slot::Disabled(ring) = shared.lock().slot() {
                // An invalid index is reported when the ring is used after it is enabled.
                let end = ring.end().ok().map(|end| (Arc::clone(shared), end));
                disabled.get_or_insert_with(Vec::new).extend(end);
            }
        }
        disabled
    }

    fn stop_all(&mut self) {
        for at in 0..self.rings.len() {
            self.stop(at);
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop_all();
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let mut offered = FEATURES;
        offered.set(Features::MQ, self.pairs() > 1);
        Ok(offered.bits() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | LOG_ALL)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features;
        if features & LOG_ALL == 0 {
            self.log = None;
        }
        if !self.accepted(Features::VERSION_1) {
            tracing::warn!(
                "{}: the frontend does not accept VIRTIO_F_VERSION_1: it is not served until it does",
                self.name
            );
        }
        self.update_all()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions: Vec<PeerRegion> =
            regions.iter().zip(files).map(|(described, file)| region(described, file)).collect();
        // Unmapping takes long, so no ring that an lcore ends may be the last owner of the memory.
        let _old = self.memory.replace(PeerMemory::map(regions).map_err(failed)?);
        self.update_all().map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (at, vring) = self.vring(index)?;
        if !num.is_power_of_two() || num > MAX_SIZE {
            return Err(Error::InvalidParam);
        }
        vring.size = num as u16;
        self.update(at)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        desc: u64,
        used: u64,
        avail: u64,
        log: u64,
    ) -> Result<()> {
        let (at, vring) = self.vring(index)?;
        vring.logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        vring.addresses = Some(Addresses { desc, avail, used });
        self.update(at)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.vring(index)?.1.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (at, _) = self.vring(index)?;
        Ok(VhostUserVringState::new(index, self.stop(at).into()))
    }

    /// Starts the ring with this message instead of the first kick, because the port requests no kicks before an
    /// lcore sleeps.
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (at, _) = self.vring(index.into())?;
        self.stop(at);
        let vring = &mut self.vrings[at];
        vring.notifiers.kick = event(fd)?;
        vring.started = true;
        self.update(at)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (at, vring) = self.vring(index.into())?;
        let call = event(fd)?;
        vring.notifiers.call = call.clone();
        self.update(at)?;
        // The frontend was not woken for what a running ring returned before.
        if let Some(call) = call {
            call.signal();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(index.into()).map(drop)
    }

    /// Returns the protocol features. MQ is offered only with several pairs: QEMU and DPDK take the answer to
    /// GET_QUEUE_NUM for a number of pairs, cloud-hypervisor and crosvm for a number of queues. Without MQ
    /// all of them use one pair.
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut offered = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD;
        offered.set(VhostUserProtocolFeatures::MQ, self.pairs() > 1);
        Ok(offered)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_protocol_features()?.bits() != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.protocol_features = features;
        Ok(())
    }

    /// Returns the number of queue pairs.
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.pairs() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (at, vring) = self.vring(index)?;
        vring.enabled = enable;
        self.update(at)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_PEER_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        described: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let region = region(described, file);
        let memory = match &self.memory {
            Some(memory) => memory.with(region),
            None => PeerMemory::map(vec![region]),
        };
        self.change_memory(Some(memory.map_err(failed)?));
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.as_ref().ok_or(Error::InvalidParam)?;
        let memory = memory.without(region.guest_phys_addr, region.user_addr, region.memory_size);
        self.change_memory(Some(memory.map_err(failed)?));
        Ok(())
    }

    /// Replaces the log in which the rings mark what they write.
    fn set_log_base(&mut self, place: &VhostUserLog, file: File) -> Result<()> {
        self.log = Some(PeerLog::map(file, place.mmap_offset, place.mmap_size).map_err(failed)?);
        self.update_all()
    }

    // The following requests belong to protocol features that are not offered.

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("RESET_DEVICE was not offered"))
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation("CONFIG was not offered"))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("CONFIG was not offered"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is not a GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("SHARED_OBJECT was not offered"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("INFLIGHT_SHMFD was not offered"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("INFLIGHT_SHMFD was not offered"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("DEVICE_STATE was not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("DEVICE_STATE was not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("SHMEM was not offered"))
    }
}
