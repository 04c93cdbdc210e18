//! Memory of another process, mapped from the descriptors that it sends. The device side of vhost-user works
//! on it.
//!
//! Everything from the peer is input. A peer's address leads to memory only through [`PeerMemory::ring`],
//! [`PeerView::at`] and [`PeerView::parts`], which check the address and its length against the regions. An
//! index into a ring wraps. Data is copied, once.
//!
//! The peer may write its memory at any time, and its descriptors may lead two threads of this process to the
//! same bytes, or to the words of a ring. The accesses of this process still do not race with each other:
//! copies are [opaque](crate::opaque) to the compiler, and a mapping gives each byte to at most one ring,
//! whose words are atomics. If a peer makes Vireo map the same file twice, the language treats a write
//! through one mapping as another process's write at the other mapping. The same holds for the
//! [log](PeerLog), which has a mapping of its own.
//!
//! No code relies on untorn reads: a ring's word is checked after it was loaded, and packets are bytes.

mod event;
mod log;
mod mapping;
mod ring;
#[cfg(test)]
mod tests;
mod view;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use self::mapping::PeerMapping;
use crate::error::{Error, ErrorKind, Result};
pub use event::PeerEvent;
pub use log::PeerLog;
pub use ring::PeerRing;
pub use view::{PeerSlice, PeerView};

/// Maximum number of regions of a [`PeerMemory`]: as many as libvhost-user accepts, and as KVM has memory
/// slots for a guest.
pub const MAX_PEER_REGIONS: usize = 509;

/// A region of a peer's memory, as `VHOST_USER_SET_MEM_TABLE` and `VHOST_USER_ADD_MEM_REG` describe it.
#[derive(Debug)]
pub struct PeerRegion<F = OwnedFd> {
    /// Guest physical address, which descriptors use.
    pub guest: u64,
    /// Address in the peer's own address space, in which rings are located.
    pub user: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of the region in the file, in bytes.
    pub offset: u64,
    /// File that holds the region.
    pub fd: F,
}

#[derive(Clone, Debug)]
struct Area {
    guest: u64,
    user: u64,
    len: u64,
    /// First byte, valid for `len` bytes while `mapping` lives.
    base: NonNull<u8>,
    mapping: Arc<PeerMapping>,
    /// The file and the offset in it, for another process that continues with this memory.
    file: Option<Arc<(OwnedFd, u64)>>,
}

impl Area {
    fn map(region: PeerRegion) -> Result<Self> {
        let wraps = |start: u64| start.checked_add(region.len).is_none();
        if wraps(region.guest) || wraps(region.user) {
            return Err(PeerMemory::refused("the addresses of a region wrap around"));
        }
        let (mapping, base) = PeerMapping::shared(&region.fd, region.offset, region.len)?;
        let PeerRegion { guest, user, len, offset, fd } = region;
        Ok(Self { guest, user, len, base, mapping: Arc::new(mapping), file: Some(Arc::new((fd, offset))) })
    }
}

/// The memory of one peer: up to [`MAX_PEER_REGIONS`] regions of files, mapped shared. A region is unmapped
/// when the last value that has it is dropped.
///
/// Files are checked to be long enough when they are mapped. If a peer truncates one later, the next access
/// ends this process with SIGBUS, as it does DPDK and QEMU. Vireo's own packet memory and QEMU's memfd are
/// sealed against that (`F_SEAL_SHRINK`), but DPDK's memory is not, so Vireo cannot insist on a seal. A peer
/// must be trusted that far.
#[derive(Debug)]
pub struct PeerMemory {
    /// Sorted by guest address, without overlaps.
    areas: Box<[Area]>,
    /// Regions that the peer has removed, until the change is complete. See [`PeerMemory::without`]. `areas`
    /// and `leaving` together have at least one region.
    leaving: Box<[Area]>,
}

// SAFETY: the mappings belong to the process, not to a thread. They are accessed by opaque copies and by the
// atomics of rings, and no two rings share a byte.
unsafe impl Send for PeerMemory {}
// SAFETY: as above. `&PeerMemory` gives no other access.
unsafe impl Sync for PeerMemory {}

impl PeerMemory {
    /// Maps all of `regions`, whose files stay open.
    ///
    /// # Errors
    /// `Protocol` if there are no regions or too many, or if a region is not within its file or overlaps
    /// another. Otherwise the error of `mmap`.
    pub fn map(regions: Vec<PeerRegion>) -> Result<Arc<Self>> {
        Self::check_number(regions.len())?;
        let areas: Result<Vec<Area>> = regions.into_iter().map(Area::map).collect();
        Self::of(areas?, Box::default())
    }

    /// Creates memory with one anonymous region of `len` bytes at address 0. Miri cannot map files.
    #[cfg(test)]
    pub(super) fn anonymous(len: u64) -> Arc<Self> {
        let (mapping, base) = PeerMapping::anonymous(len);
        let area = Area { guest: 0, user: 0, len, base, mapping: Arc::new(mapping), file: None };
        Self::of(vec![area], Box::default()).unwrap()
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
        // The sum does not overflow, because no region extends beyond the last address.
        if areas.windows(2).any(|pair| pair[0].guest + pair[0].len > pair[1].guest) {
            return Err(Self::refused("two of its regions overlap in guest addresses"));
        }
        Ok(Arc::new(Self { areas: areas.into(), leaving }))
    }

    /// Returns this memory with `region` added.
    ///
    /// # Errors
    /// Same as [`PeerMemory::map`].
    pub fn with(&self, region: PeerRegion) -> Result<Arc<Self>> {
        Self::check_number(self.areas.len() + 1)?;
        let mut areas = self.areas.to_vec();
        areas.push(Area::map(region)?);
        Self::of(areas, self.leaving.clone())
    }

    /// Returns this memory without the region of `len` bytes at these addresses. Until
    /// [`PeerMemory::settled`], the region stays accessible where no other region has its addresses: a peer
    /// that moves the border between two regions removes both before it adds others, while its rings run.
    ///
    /// # Errors
    /// `Protocol` if there is no such region.
    pub fn without(&self, guest: u64, user: u64, len: u64) -> Result<Arc<Self>> {
        let (mut areas, mut leaving) = (self.areas.to_vec(), self.leaving.to_vec());
        let at = areas.iter().position(|area| (area.guest, area.user, area.len) == (guest, user, len));
        let at =
            at.ok_or_else(|| Self::refused(format!("it has no region of {len:#x} bytes at {guest:#x}")))?;
        // The newest comes first, and there are at most as many as `PeerMemory` can have.
        leaving.insert(0, areas.remove(at));
        leaving.truncate(MAX_PEER_REGIONS);
        Self::of(areas, leaving.into())
    }

    /// Returns whether no removed region is accessible any more.
    pub fn is_settled(&self) -> bool {
        self.leaving.is_empty()
    }

    /// Returns this memory without the removed regions, or `None` if no other region is left.
    pub fn settled(&self) -> Option<Arc<Self>> {
        let areas = Some(&self.areas).filter(|areas| !areas.is_empty())?;
        Some(Arc::new(Self { areas: areas.clone(), leaving: Box::default() }))
    }

    /// Regions that the peer has not removed.
    pub fn regions(&self) -> impl Iterator<Item = PeerRegion<BorrowedFd<'_>>> {
        self.areas.iter().filter_map(|area| {
            let (fd, offset) = &**area.file.as_ref()?;
            let Area { guest, user, len, .. } = *area;
            Some(PeerRegion { guest, user, len, offset: *offset, fd: fd.as_fd() })
        })
    }

    fn all(&self) -> impl Iterator<Item = &Area> {
        self.areas.iter().chain(&self.leaving)
    }

    /// Finds the region that has the byte at `guest`.
    fn find(&self, guest: u64) -> Option<&Area> {
        let has = |area: &&Area| guest.wrapping_sub(area.guest) < area.len;
        let up_to = self.areas.partition_point(|area| area.guest <= guest);
        self.areas[..up_to].last().filter(has).or_else(|| self.leaving.iter().find(has))
    }
}
