//! Memory of another process, by the descriptors that it sends: what the device's side of vhost-user works on.
//!
//! The peer is input. An address of it leads to memory only through [`PeerMemory::ring`], [`PeerView::at`] and
//! [`PeerView::parts`], which check it and its length against the regions; an index into a ring wraps; data is
//! copied, once.
//!
//! The peer may write its memory at any time, and its descriptors may lead two of our threads to the same bytes, or to the
//! words of a ring. No access of ours then races with another: copies are [opaque](crate::opaque) to the compiler, and a
//! mapping gives each byte to one ring at most, whose words are atomics. Where a peer has us map the same file twice, what
//! we write by one mapping is for the language another process's at the other. That is also so for the
//! [log](PeerLog), which has a mapping of its own.
//!
//! Nothing relies on what is read being whole: a ring's words are checked as they were loaded, and packets are bytes.

mod event;
mod log;
mod mapping;
mod ring;
#[cfg(test)]
mod tests;
mod view;

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use self::mapping::Mapping;
use crate::error::{Error, ErrorKind, Result};
pub use event::PeerEvent;
pub use log::PeerLog;
pub use ring::PeerRing;
pub use view::{PeerSlice, PeerView};

/// Most regions of a [`PeerMemory`]: as many as libvhost-user takes, and as KVM has memory slots for a guest.
pub const MAX_PEER_REGIONS: usize = 509;

/// A part of a peer's memory, as `VHOST_USER_SET_MEM_TABLE` and `VHOST_USER_ADD_MEM_REG` describe it.
#[derive(Debug)]
pub struct PeerRegion {
    /// Address in descriptors ("guest physical").
    pub guest: u64,
    /// Address in the peer's own address space, by which rings are named.
    pub user: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where the region begins in the file.
    pub offset: u64,
    /// The file.
    pub fd: OwnedFd,
}

#[derive(Clone, Debug)]
struct Area {
    guest: u64,
    user: u64,
    len: u64,
    /// First byte, valid for `len` bytes while `mapping` lives.
    base: NonNull<u8>,
    mapping: Arc<Mapping>,
}

impl Area {
    fn map(region: &PeerRegion) -> Result<Self> {
        let wraps = |start: u64| start.checked_add(region.len).is_none();
        if wraps(region.guest) || wraps(region.user) {
            return Err(PeerMemory::refused("the addresses of a region wrap"));
        }
        let (mapping, base) = Mapping::shared(&region.fd, region.offset, region.len)?;
        let (guest, user, len) = (region.guest, region.user, region.len);
        Ok(Self { guest, user, len, base, mapping: Arc::new(mapping) })
    }
}

/// The memory of one peer: up to [`MAX_PEER_REGIONS`] regions of files, mapped shared, and unmapped with the last
/// value that has them.
///
/// Files are checked to be long enough when they are mapped. A peer that truncates one later makes the next
/// access end this process by SIGBUS, as it does DPDK and QEMU. Vireo's own packet memory is sealed against
/// that (`F_SEAL_SHRINK`), and QEMU's memfd, but DPDK's is not, so no seal can be insisted on: a peer must be
/// trusted that far.
#[derive(Debug)]
pub struct PeerMemory {
    /// In the order of their guest addresses, none of which two have.
    areas: Box<[Area]>,
    /// Regions that the peer has removed, until the change is complete: see [`PeerMemory::without`]. `areas` and
    /// `leaving` have at least one region together.
    leaving: Box<[Area]>,
}

// SAFETY: the mappings belong to the process, not to a thread, and are reached by opaque copies and by the atomics of rings,
// which have no byte in common.
unsafe impl Send for PeerMemory {}
// SAFETY: as above; `&PeerMemory` gives no other access.
unsafe impl Sync for PeerMemory {}

impl PeerMemory {
    /// Maps all of `regions`; their descriptors can be closed then.
    ///
    /// # Errors
    /// `Protocol` when there are none or too many, or one is not within its file or overlaps another; else what `mmap`
    /// says.
    pub fn map(regions: &[PeerRegion]) -> Result<Arc<Self>> {
        Self::check_number(regions.len())?;
        let areas: Result<Vec<Area>> = regions.iter().map(Area::map).collect();
        Self::of(areas?, Box::default())
    }

    /// One region of `len` bytes at address 0 that are no file's: Miri maps none.
    #[cfg(test)]
    pub(super) fn anonymous(len: u64) -> Arc<Self> {
        let (mapping, base) = Mapping::anonymous(len);
        Self::of(vec![Area { guest: 0, user: 0, len, base, mapping: Arc::new(mapping) }], Box::default())
            .unwrap()
    }

    fn check_number(regions: usize) -> Result<()> {
        match regions {
            1..=MAX_PEER_REGIONS => Ok(()),
            _ => Err(Self::refused(format!("it has {regions} regions, not 1 to {MAX_PEER_REGIONS}"))),
        }
    }

    fn refused(why: impl Into<String>) -> Error {
        Error::new(ErrorKind::Protocol, "cannot use a frontend's memory", why)
    }

    fn of(mut areas: Vec<Area>, leaving: Box<[Area]>) -> Result<Arc<Self>> {
        areas.sort_by_key(|area| area.guest);
        // No region reaches beyond the last address.
        if areas.windows(2).any(|pair| pair[0].guest + pair[0].len > pair[1].guest) {
            return Err(Self::refused("two of its regions overlap in guest addresses"));
        }
        Ok(Arc::new(Self { areas: areas.into(), leaving }))
    }

    /// This memory and `region`.
    ///
    /// # Errors
    /// As for [`PeerMemory::map`].
    pub fn with(&self, region: &PeerRegion) -> Result<Arc<Self>> {
        Self::check_number(self.areas.len() + 1)?;
        let mut areas = self.areas.to_vec();
        areas.push(Area::map(region)?);
        Self::of(areas, self.leaving.clone())
    }

    /// This memory without the region of `len` bytes at these addresses. The region can still be reached, where no other
    /// one has its addresses, until [`PeerMemory::settled`]: a peer that moves the border between two regions removes
    /// both before it adds others, while its rings run.
    ///
    /// # Errors
    /// `Protocol` when there is no such region.
    pub fn without(&self, guest: u64, user: u64, len: u64) -> Result<Arc<Self>> {
        let (mut areas, mut leaving) = (self.areas.to_vec(), self.leaving.to_vec());
        let at = areas.iter().position(|area| (area.guest, area.user, area.len) == (guest, user, len));
        let at =
            at.ok_or_else(|| Self::refused(format!("it has no region of {len:#x} bytes at {guest:#x}")))?;
        // The newest first, and no more than there can be regions.
        leaving.insert(0, areas.remove(at));
        leaving.truncate(MAX_PEER_REGIONS);
        Self::of(areas, leaving.into())
    }

    /// Whether no removed region can still be reached.
    pub fn is_settled(&self) -> bool {
        self.leaving.is_empty()
    }

    /// This memory without the removed regions; none if no other is left.
    pub fn settled(&self) -> Option<Arc<Self>> {
        let areas = Some(&self.areas).filter(|areas| !areas.is_empty())?;
        Some(Arc::new(Self { areas: areas.clone(), leaving: Box::default() }))
    }

    fn all(&self) -> impl Iterator<Item = &Area> {
        self.areas.iter().chain(&self.leaving)
    }

    /// The region that has the byte at `guest`.
    fn find(&self, guest: u64) -> Option<&Area> {
        let has = |area: &&Area| guest.wrapping_sub(area.guest) < area.len;
        let up_to = self.areas.partition_point(|area| area.guest <= guest);
        self.areas[..up_to].last().filter(has).or_else(|| self.leaving.iter().find(has))
    }
}
