//! State of a connection as a record, by which another process continues the connection.

use std::os::fd::AsFd;
use std::sync::Arc;

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::Result;
use vireo_eal::dma::{PeerEvent, PeerMemory, PeerRegion};
use vireo_eal::handover::{Fds, ReceivedFds};

use super::{Backend, Vring};
use crate::driver::cannot_hand_over;
use crate::handover::contradiction;
use crate::vhost::ring::{Addresses, Notifiers};
use crate::vhost::shared::Slot;

/// State of a connection, for another process. Descriptors are numbers.
#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
pub(in crate::vhost) struct BackendRecord {
    features: u64,
    protocol_features: u64,
    regions: Vec<RegionRecord>,
    vrings: Vec<VringRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
struct RegionRecord {
    guest: u64,
    user: u64,
    len: u64,
    offset: u64,
    file: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize, Schema)]
struct VringRecord {
    size: u16,
    addresses: Option<Addresses>,
    /// Position of the next chain.
    next: u16,
    call: Option<u32>,
    kick: Option<u32>,
    started: bool,
    enabled: bool,
    /// Whether the frontend misbehaved on the ring.
    broken: bool,
}

impl BackendRecord {
    /// Features and protocol features that the frontend has accepted.
    pub(in crate::vhost) fn features(&self) -> (u64, u64) {
        (self.features, self.protocol_features)
    }
}

impl Backend {
    /// Describes the connection for another process.
    ///
    /// # Errors
    /// `Unavailable` while the guest migrates or the memory changes; `Os` if the process has too many open files.
    pub(in crate::vhost) fn record(&self, fds: &mut Fds<'_>) -> Result<BackendRecord> {
        if self.log.is_some() {
            return Err(cannot_hand_over("its guest migrates"));
        }
        if !self.is_settled() {
            return Err(cannot_hand_over("its frontend is changing its memory"));
        }
        let region = |PeerRegion { guest, user, len, offset, fd }| {
            Ok(RegionRecord { guest, user, len, offset, file: fds.add_duplicate(fd)? })
        };
        let regions = self.memory.iter().flat_map(|memory| memory.regions());
        let regions = regions.map(region).collect::<Result<_>>()?;
        let mut vrings = Vec::new();
        for (shared, vring) in self.rings.iter().zip(&self.vrings) {
            let state = shared.lock();
            let (next, broken) = (state.slot().next(), matches!(state.slot(), Slot::Broken(_)));
            let Vring { size, addresses, ref notifiers, started, enabled, .. } = *vring;
            let mut number = |event: &Option<Arc<PeerEvent>>| {
                event.as_ref().map(|event| fds.add_duplicate(event.as_fd())).transpose()
            };
            let (call, kick) = (number(&notifiers.call)?, number(&notifiers.kick)?);
            let next = next.unwrap_or(vring.base);
            vrings.push(VringRecord { size, addresses, next, call, kick, started, enabled, broken });
        }
        let (features, protocol_features) = (self.features, self.protocol_features);
        Ok(BackendRecord { features, protocol_features, regions, vrings })
    }

    /// Continues a connection that another process has described, whose features the frontend has accepted here, too.
    ///
    /// # Errors
    /// `Protocol` if the record contradicts itself, or another number of rings.
    pub(in crate::vhost) fn restore(&mut self, record: &BackendRecord, fds: &ReceivedFds) -> Result<()> {
        if record.vrings.len() != self.vrings.len() {
            let why = format!("it has {} rings, but these are {}", record.vrings.len(), self.vrings.len());
            return Err(contradiction(&why));
        }
        let region = |record: &RegionRecord| {
            let RegionRecord { guest, user, len, offset, file } = *record;
            Ok(PeerRegion { guest, user, len, offset, fd: fds.get(file)? })
        };
        if !record.regions.is_empty() {
            let regions = record.regions.iter().map(region).collect::<Result<_>>()?;
            self.memory = Some(PeerMemory::map(regions)?);
        }
        let event = |number: Option<u32>| {
            number.map(|number| PeerEvent::new(fds.get(number)?).map(Arc::new)).transpose()
        };
        for (vring, record) in self.vrings.iter_mut().zip(&record.vrings) {
            let VringRecord { size, addresses, next: base, started, enabled, .. } = *record;
            let notifiers = Notifiers { call: event(record.call)?, kick: event(record.kick)? };
            *vring = Vring { size, addresses, logged: None, base, notifiers, started, enabled };
        }
        self.update_all().map_err(|error| contradiction(&error.to_string()))?;
        for (shared, record) in self.rings.iter().zip(&record.vrings).filter(|(_, record)| record.broken) {
            shared.lock().put(Slot::Broken(record.next));
        }
        Ok(())
    }
}
