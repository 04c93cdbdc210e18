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
//! [log](super::PeerLog), which has a mapping of its own.
//!
//! Nothing relies on what is read being whole: a ring's words are checked as they were loaded, and packets are bytes.

use std::ffi::c_void;
use std::fs::File;
use std::io::Write;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::{SFlag, fstat};

use super::ring::{RingView, Word, prefetch};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::page_size;
use crate::opaque;

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

#[derive(Debug)]
pub(super) struct Mapping {
    address: NonNull<c_void>,
    len: usize,
    /// Addresses of the bytes that a ring has.
    rings: Mutex<Vec<Range<usize>>>,
}

// SAFETY: a mapping belongs to the process, not to a thread; the value gives no access to it and only unmaps it. A mutex
// has the rest.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `address` and `len` describe a mapping that this value made and that nothing else unmaps; whoever
        // points into it borrows or holds the `PeerMemory`.
        if let Err(errno) = unsafe { munmap(self.address, self.len) } {
            tracing::error!("cannot unmap {} bytes of a frontend's memory: {errno}", self.len);
        }
    }
}

impl Mapping {
    /// Maps `len` bytes of a file from `offset` on, shared; gives where they are.
    pub(super) fn shared(fd: &OwnedFd, offset: u64, len: u64) -> Result<(Self, NonNull<u8>)> {
        let what = || format!("cannot map {} KiB of a frontend's memory", len >> 10);
        let refused = |why: &str| Error::new(ErrorKind::Protocol, what(), why);
        let stat = fstat(fd).map_err(|errno| Error::os(what(), errno))?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(refused("its descriptor is no file"));
        }
        let end = offset.checked_add(len).filter(|_| len > 0);
        let end = end.filter(|end| *end <= stat.st_size as u64).ok_or_else(|| {
            refused("its file is shorter than the region: an access behind the end would be SIGBUS")
        })?;
        // A hugetlb file is mapped by whole pages of its own size, which is its block size.
        let small = page_size() as u64;
        let page =
            Some(stat.st_blksize as u64).filter(|size| size.is_power_of_two()).unwrap_or(small).max(small);
        let start = offset & !(page - 1);
        let length = end.checked_next_multiple_of(page).and_then(|end| usize::try_from(end - start).ok());
        let length = length.and_then(NonZeroUsize::new).ok_or_else(|| refused("it is too large"))?;
        let from = i64::try_from(start).map_err(|_| refused("its offset is too large"))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let address = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, from) }
            .map_err(|errno| Error::os(what(), errno))?;
        // SAFETY: `start` is not above `offset`, and the mapping reaches from `start` to `end` or beyond.
        let base = unsafe { address.cast::<u8>().add((offset - start) as usize) };
        Ok((Self { address, len: length.get(), rings: Mutex::default() }, base))
    }

    /// Takes `bytes` for a ring; false if another one has some of them.
    fn take(&self, bytes: Range<usize>) -> bool {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = rings.iter().all(|ring| ring.end <= bytes.start || bytes.end <= ring.start);
        if is_free {
            rings.push(bytes);
        }
        is_free
    }

    /// Gives back what [`Mapping::take`] took.
    fn release(&self, bytes: &Range<usize>) {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner).retain(|ring| ring != bytes);
    }
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
        let length = NonZeroUsize::new(len as usize).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing of ours.
        let address =
            unsafe { nix::sys::mman::mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }.unwrap();
        let mapping = Arc::new(Mapping { address, len: length.get(), rings: Mutex::default() });
        Self::of(vec![Area { guest: 0, user: 0, len, base: address.cast(), mapping }], Box::default())
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

    /// The ring of `entries` entries at `user`, an address of the peer's own address space.
    ///
    /// # Errors
    /// `Usage` when `entries` is no power of two, `Protocol` when the ring is not aligned to its words, not within one
    /// region, or has bytes that another ring has, as long as that exists.
    pub fn ring<W: Word, const N: usize>(&self, user: u64, entries: usize) -> Result<PeerRing<W, N>> {
        let refused = |kind, why: &str| {
            Error::new(kind, format!("cannot use a frontend's ring of {entries} entries at {user:#x}"), why)
        };
        if !entries.is_power_of_two() {
            return Err(refused(ErrorKind::Usage, "the number is no power of two"));
        }
        let len = N.saturating_mul(size_of::<W>()).saturating_mul(entries);
        let at = self.all().find_map(|area| {
            let offset = user.wrapping_sub(area.user);
            let fits = offset <= area.len && len as u64 <= area.len - offset;
            // SAFETY: the offset is not beyond the area, as just checked.
            fits.then(|| (unsafe { area.base.add(offset as usize) }, &area.mapping))
        });
        let (at, mapping) =
            at.ok_or_else(|| refused(ErrorKind::Protocol, "it is not within one memory region"))?;
        let words = at.cast::<W>();
        if !words.is_aligned() {
            return Err(refused(ErrorKind::Protocol, "its address is not aligned"));
        }
        if !mapping.take(bytes_of(words, entries * N)) {
            return Err(refused(ErrorKind::Protocol, "it overlaps another ring"));
        }
        Ok(PeerRing { words, mask: entries - 1, mapping: Arc::clone(mapping) })
    }

    /// The regions by guest address, for the length of a loop.
    #[inline(always)]
    pub fn view(&self) -> PeerView<'_> {
        match self.areas.first() {
            Some(area) => PeerView::of(self, area),
            None => PeerView::of(self, &self.leaving[0]),
        }
    }
}

/// Addresses of the bytes of `number` words, which are mapped.
fn bytes_of<W>(words: NonNull<W>, number: usize) -> Range<usize> {
    let start = words.addr().get();
    start..start + number * size_of::<W>()
}

/// A ring of entries of `N` words each in a peer's memory, which it keeps mapped; as
/// [`DmaRing`](super::DmaRing).
#[derive(Debug)]
pub struct PeerRing<W: Word, const N: usize = 1> {
    words: NonNull<W>,
    mask: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: `mapping` keeps the words mapped and gives them to no other ring, so all accesses of ours are atomics of their
// size, or copies into which the compiler does not look. Each word that is loaded is checked as input.
unsafe impl<W: Word, const N: usize> Send for PeerRing<W, N> {}
// SAFETY: as above.
unsafe impl<W: Word, const N: usize> Sync for PeerRing<W, N> {}

impl<W: Word, const N: usize> Drop for PeerRing<W, N> {
    fn drop(&mut self) {
        self.mapping.release(&bytes_of(self.words, self.entries() * N));
    }
}

impl<W: Word, const N: usize> PeerRing<W, N> {
    /// Number of entries.
    #[inline(always)]
    pub fn entries(&self) -> usize {
        self.mask + 1
    }

    /// The ring by value, for the length of a loop.
    #[inline(always)]
    pub fn view(&self) -> RingView<'_, W, N> {
        // SAFETY: the words of all entries were checked to be mapped and aligned; the borrow keeps them, and keeps other
        // rings away from them.
        unsafe { RingView::over(self.words, self.mask) }
    }

    /// Reads word `WORD` of the entry at `index`, which wraps.
    #[inline(always)]
    pub fn load<const WORD: usize>(&self, index: usize) -> W {
        self.view().load::<WORD>(index)
    }

    /// Writes word `WORD` of the entry at `index`, which wraps.
    #[inline(always)]
    pub fn store<const WORD: usize>(&self, index: usize, value: W) {
        self.view().store::<WORD>(index, value);
    }
}

/// [`PeerMemory`] in registers: the region that was last used, and all of them behind it.
#[derive(Clone, Copy, Debug)]
pub struct PeerView<'a> {
    guest: u64,
    len: u64,
    base: NonNull<u8>,
    memory: &'a PeerMemory,
}

impl<'a> PeerView<'a> {
    #[inline(always)]
    fn of(memory: &'a PeerMemory, area: &Area) -> Self {
        Self { guest: area.guest, len: area.len, base: area.base, memory }
    }

    /// The `len` bytes at the guest address `guest`; none when they are not within one region.
    #[inline(always)]
    pub fn at(&mut self, guest: u64, len: usize) -> Option<PeerSlice<'a>> {
        let covers = |view: &Self| {
            let offset = guest.wrapping_sub(view.guest);
            (offset <= view.len && len as u64 <= view.len - offset).then_some(offset as usize)
        };
        let offset = match covers(self) {
            Some(offset) => offset,
            None => {
                self.turn_to(guest);
                covers(self)?
            }
        };
        // SAFETY: the offset is not beyond the region, which `memory` keeps mapped.
        Some(PeerSlice { at: unsafe { self.base.add(offset) }, len, _memory: PhantomData })
    }

    /// Calls `each` for the `len` bytes at the guest address `guest`, once for each region that has some of them: a buffer
    /// may cross from one region into the next. Ends with none at the first byte that is in no region, or when `each`
    /// gives none.
    pub fn parts(
        &mut self,
        guest: u64,
        len: usize,
        mut each: impl FnMut(PeerSlice<'a>) -> Option<()>,
    ) -> Option<()> {
        if len == 0 {
            return each(self.at(guest, len)?);
        }
        let (mut guest, mut len) = (guest, len);
        while len > 0 {
            self.turn_to(guest);
            let rest = self.len.checked_sub(guest.wrapping_sub(self.guest)).filter(|rest| *rest > 0)?;
            let part = len.min(usize::try_from(rest).unwrap_or(usize::MAX));
            each(self.at(guest, part)?)?;
            // No region reaches beyond the last address.
            guest += part as u64;
            len -= part;
        }
        Some(())
    }

    /// Makes the region of `guest` the one that is looked at, if there is one.
    #[cold]
    #[inline(never)]
    fn turn_to(&mut self, guest: u64) {
        if let Some(area) = self.memory.find(guest) {
            *self = Self::of(self.memory, area);
        }
    }
}

/// Bytes of a peer's memory. They are copied and never borrowed: the peer may write at any time.
#[derive(Clone, Copy, Debug)]
pub struct PeerSlice<'a> {
    /// Valid for `len` bytes.
    pub(super) at: NonNull<u8>,
    pub(super) len: usize,
    _memory: PhantomData<&'a PeerMemory>,
}

impl PeerSlice<'_> {
    /// Length in bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes up to `middle` and those from it on; a `middle` beyond the end becomes it.
    #[inline(always)]
    pub fn split_at(self, middle: usize) -> (Self, Self) {
        let middle = middle.min(self.len);
        // SAFETY: `middle` is not beyond the end.
        let at = unsafe { self.at.add(middle) };
        (Self { len: middle, ..self }, Self { at, len: self.len - middle, ..self })
    }

    /// Copies `bytes` to the front, as far as there is room.
    pub fn write(self, bytes: &[u8]) {
        let len = bytes.len().min(self.len);
        // SAFETY: both have `len` bytes, and a slice of ours does not overlap a mapping that hands out none. The mapping is
        // copied or atomic wherever it is accessed.
        unsafe { opaque::write(bytes.as_ptr(), self.at.as_ptr(), len) }
    }

    /// Asks for the first cache line, to be written.
    #[inline(always)]
    pub(super) fn prefetch_write(self) {
        // The compiler's hint becomes a prefetch to read where PREFETCHW is no part of the target, as in x86-64.
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: a prefetch reads nothing and faults nowhere; a processor that does not have this one takes it
        // for a NOP (AMD64 manual, volume 3, and Intel SDM, volume 2: PREFETCHW).
        unsafe {
            std::arch::asm!("prefetchw [{}]", in(reg) self.at.as_ptr(), options(readonly, nostack, preserves_flags));
        }
    }

    /// Asks for the first cache line, to be read.
    #[inline(always)]
    pub(super) fn prefetch(self) {
        prefetch(self.at);
    }
}

/// The eventfd by which a peer is woken.
///
/// The peer has the same open file and may take `O_NONBLOCK` from it at any time: a write then sleeps while the
/// counter is full, until the peer reads it. Nothing helps against that: a look at the flag or at the room is old
/// when the write comes, and an eventfd's write has no other way not to sleep (`RWF_NOWAIT` is not for it). So a
/// peer must be trusted with the lcore that serves it.
#[derive(Debug)]
pub struct PeerEvent(File);

impl PeerEvent {
    /// Takes the descriptor, and makes its writes return at once, as long as the peer leaves them so.
    ///
    /// # Errors
    /// `Protocol` when it is no eventfd: a write to anything else could block though the peer does nothing wrong.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let what = "cannot use a frontend's call descriptor";
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|error| Error::io(what, &error))?;
        if link.as_os_str() != "anon_inode:[eventfd]" {
            return Err(Error::new(ErrorKind::Protocol, what, format!("{} is no eventfd", link.display())));
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|errno| Error::os(what, errno))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(|errno| Error::os(what, errno))?;
        Ok(Self(fd.into()))
    }

    /// Wakes the peer. A counter that is full has woken it, so the error of a write says nothing.
    #[cold]
    #[inline(never)]
    pub fn signal(&self) {
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::dma::{Burst, DATA_ROOM, DmaMemory, Pool};
    use crate::mem::{Backing, Region};
    use proptest::prelude::*;

    const PAGE: u64 = 4096;
    const LEN: u64 = 4 * PAGE;

    fn file(len: u64) -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file.into()
    }

    fn region(guest: u64, user: u64, offset: u64) -> PeerRegion {
        PeerRegion { guest, user, len: LEN - offset, offset, fd: file(LEN) }
    }

    fn pool() -> Arc<Pool> {
        let memory = DmaMemory::map(Region::new(Pool::bytes(64), Backing::SmallPages).unwrap(), &[]).unwrap();
        Pool::new(&memory, 64).unwrap()
    }

    #[test]
    fn regions_outside_of_their_file_are_refused() {
        let short = |len, offset, guest| PeerRegion { guest, user: 0, len, offset, fd: file(LEN) };
        for bad in [
            short(LEN + 1, 0, 0),
            short(LEN, 1, 0),
            short(u64::MAX, 2, 0),
            short(0, 0, 0),
            short(LEN, 0, u64::MAX - PAGE),
        ] {
            assert_eq!(PeerMemory::map(&[bad]).unwrap_err().kind(), ErrorKind::Protocol);
        }
        assert_eq!(PeerMemory::map(&[]).unwrap_err().kind(), ErrorKind::Protocol);
        for (first, second) in [(0, LEN - 1), (LEN - 1, 0), (0, 0)] {
            let error = PeerMemory::map(&[region(first, 0, 0), region(second, 0, 0)]).unwrap_err();
            assert!(error.to_string().contains("overlap"), "{error}");
        }
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let fd = socket.into();
        let error = PeerMemory::map(&[PeerRegion { guest: 0, user: 0, len: 1, offset: 0, fd }]).unwrap_err();
        assert!(error.to_string().contains("no file"), "{error}");
    }

    #[test]
    fn regions_come_and_go_one_by_one() {
        let at = |i: u64| region(i * LEN, 0x7000_0000 + i * LEN, 0);
        // From the highest down: they are in order all the same.
        let mut memory = PeerMemory::map(&[at(508)]).unwrap();
        for i in (0..508).rev() {
            memory = memory.with(&at(i)).unwrap();
            memory.view().at(i * LEN, 1).unwrap().write(&[i as u8]);
        }
        let error = memory.with(&at(600)).unwrap_err().to_string();
        assert!(error.contains("510 regions, not 1 to 509"), "{error}");
        let mut view = memory.view();
        assert!((0..509).all(|i| view.at(i * LEN + 5, LEN as usize - 5).is_some()));
        assert!(view.at(509 * LEN, 1).is_none());

        // What was taken away is there until the memory is settled, and behind what has its addresses.
        for wrong in [(LEN, 0, LEN), (LEN, 0x7000_0000 + LEN, LEN - 1), (1, 0x7000_0000, LEN)] {
            assert_eq!(memory.without(wrong.0, wrong.1, wrong.2).unwrap_err().kind(), ErrorKind::Protocol);
        }
        let memory = memory.without(LEN, 0x7000_0000 + LEN, LEN).unwrap();
        assert!(!memory.is_settled() && memory.without(LEN, 0x7000_0000 + LEN, LEN).is_err());
        memory.ring::<u64, 1>(0x7000_0000 + LEN, 1).unwrap();
        let half = PeerRegion { guest: LEN, user: 0x9000_0000, len: LEN / 2, offset: 0, fd: file(LEN) };
        let memory = memory.with(&half).unwrap();
        let mut view = memory.view();
        let mut found = Vec::new();
        view.parts(LEN - 1, LEN as usize + 2, |part| {
            found.push(part.len());
            Some(())
        });
        assert_eq!(found, [1, LEN as usize / 2, LEN as usize / 2, 1]);
        let settled = memory.settled().unwrap();
        assert!(settled.is_settled() && settled.view().at(LEN + LEN / 2, 1).is_none());
        assert!(settled.view().at(LEN, 1).is_some());
        assert!(settled.ring::<u64, 1>(0x7000_0000 + LEN, 1).is_err());
        let none = PeerMemory::map(&[at(0)]).unwrap().without(0, 0x7000_0000, LEN).unwrap();
        assert!(none.view().at(0, 1).is_some() && none.settled().is_none());
    }

    #[test]
    fn rings_are_found_by_user_address_and_data_by_guest_address() {
        let regions = [region(0, 0x7000_0000, 0), region(0x10_0000, 0x9000_0000, 100)];
        let memory = PeerMemory::map(&regions).unwrap();
        let ring: PeerRing<u32, 2> = memory.ring(0x9000_0000, 8).unwrap();
        ring.store::<1>(9, 0x0403_0201);
        let mut view = memory.view();
        let pool = pool();
        let mut cache = pool.cache();
        let mut burst = Burst::new();
        assert_eq!(cache.receive_copies(9, &mut burst, |i| view.at(0x10_000c, 4).filter(|_| i < 2)), 2);
        let mut bytes = [0; 4];
        cache.read(&burst[1], 0, &mut bytes);
        assert_eq!((bytes, burst[1].len()), ([1, 2, 3, 4], 4));
        let end = 0x10_0000 + LEN - 100;
        let inside = [(0, 1), (LEN, 0), (0x10_0000, LEN as usize - 100), (end - 1, 1), (end, 0)];
        assert!(inside.iter().all(|(guest, len)| view.at(*guest, *len).is_some()));
        let outside =
            [(LEN - 1, 2), (LEN, 1), (u64::MAX, 1), (end - 1, 2), (0x10_0000, usize::MAX), (end, 1)];
        assert!(outside.iter().all(|(guest, len)| view.at(*guest, *len).is_none()));
        burst.into_iter().for_each(|packet| cache.free(packet));

        let refused = |ring: Result<PeerRing<u64>>| ring.unwrap_err().kind();
        assert_eq!(refused(memory.ring(0x7000_0000, 3)), ErrorKind::Usage);
        for (user, entries) in [(0x7000_0004, 2), (0x7000_0000 + LEN - 8, 2), (0x6fff_fff8, 2), (0, 1 << 40)]
        {
            assert_eq!(refused(memory.ring(user, entries)), ErrorKind::Protocol);
        }
        memory.ring::<u64, 1>(0x7000_0000 + LEN - 8, 1).unwrap();
    }

    #[test]
    fn a_byte_is_given_to_one_ring_at_a_time() {
        let memory = PeerMemory::map(&[region(0, 0x7000_0000, 0)]).unwrap();
        let ring: PeerRing<u32, 2> = memory.ring(0x7000_0010, 4).unwrap();
        let refused = |user, entries| {
            let error = memory.ring::<u16, 1>(user, entries).unwrap_err();
            assert!(
                error.kind() == ErrorKind::Protocol && error.why() == "it overlaps another ring",
                "{error}"
            );
        };
        for (user, entries) in
            [(0x7000_0010, 1), (0x7000_0000, 16), (0x7000_002e, 1), (0x7000_002e, 32), (0x7000_0000, 64)]
        {
            refused(user, entries);
        }
        // What touches it does not overlap it, nor does a ring without a word.
        let around =
            [(0x7000_000e, 1), (0x7000_0030, 2)].map(|(user, n)| memory.ring::<u16, 1>(user, n).unwrap());
        drop(memory.ring::<u32, 0>(0x7000_0010, 4).unwrap());
        refused(0x7000_0010, 1);
        // A region that stays is the same mapping in other memory, and one that is mapped again another.
        let grown = memory.with(&region(LEN, 0x8000_0000, 0)).unwrap();
        assert!(grown.ring::<u64, 1>(0x7000_0010, 1).is_err());
        let again = memory.without(0, 0x7000_0000, LEN).unwrap();
        assert!(again.ring::<u64, 1>(0x7000_0010, 1).is_err());
        PeerMemory::map(&[region(0, 0x7000_0000, 0)]).unwrap().ring::<u64, 1>(0x7000_0010, 1).unwrap();

        drop(ring);
        let ring: PeerRing<u64> = grown.ring(0x7000_0010, 4).unwrap();
        refused(0x7000_0028, 1);
        drop((ring, around));
        memory.ring::<u16, 1>(0x7000_0000, 64).unwrap();
    }

    #[test]
    fn a_ring_whose_size_overflows_is_in_no_region() {
        let memory = PeerMemory::map(&[region(0, 0x7000_0000, 0)]).unwrap();
        let error = memory.ring::<u64, { 1 << 61 }>(0x7000_0000, 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
    }

    #[test]
    fn only_an_eventfd_is_a_call_descriptor() {
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        let call = PeerEvent::new(event.as_fd().try_clone_to_owned().unwrap()).unwrap();
        call.signal();
        call.signal();
        assert_eq!(event.read().unwrap(), 2);
        event.write(u64::MAX - 1).unwrap();
        call.signal();
        assert_eq!(PeerEvent::new(file(1)).unwrap_err().kind(), ErrorKind::Protocol);
    }

    proptest! {
        /// The model says of an address, without any modulus, in which region its bytes are.
        #[test]
        fn an_address_leads_into_its_region_or_nowhere(
            cuts in proptest::collection::btree_set(
                prop_oneof![0..4 * PAGE, u64::MAX - 4 * PAGE..u64::MAX], 2..=16,
            ),
            probes in proptest::collection::vec((any::<prop::sample::Index>(), -3..3_i64, prop_oneof![
                0..5_usize, 0..LEN as usize, any::<usize>(),
            ]), 1..40),
        ) {
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let pairs = cuts.chunks_exact(2).filter(|pair| pair[1] - pair[0] <= LEN);
            let regions: Vec<PeerRegion> = pairs
                .map(|pair| (pair[0], pair[1] - pair[0]))
                .map(|(guest, len)| PeerRegion { guest, user: guest, len, offset: LEN - len, fd: file(LEN) })
                .collect();
            prop_assume!(!regions.is_empty());
            let memory = PeerMemory::map(&regions).unwrap();
            let mut view = memory.view();
            for (cut, distance, len) in probes {
                let guest = cut.get(&cuts).saturating_add_signed(distance);
                let at = u128::from(guest);
                let inside = |area: &&Area| {
                    let start = u128::from(area.guest);
                    (start..=start + u128::from(area.len)).contains(&at)
                        && at + len as u128 <= start + u128::from(area.len)
                };
                let slice = view.at(guest, len).map(|slice| (slice.at, slice.len));
                // A slice of no bytes may be at the end of one region, where the next begins.
                let wanted = memory.areas.iter().filter(inside).map(|area| {
                    // SAFETY: the model says that it is inside.
                    (unsafe { area.base.add((guest - area.guest) as usize) }, len)
                });
                let wanted: Vec<_> = wanted.collect();
                prop_assert!(slice.map_or(wanted.is_empty() || len == 0, |slice| wanted.contains(&slice)));
            }
        }

        /// The model is a byte for each address that is in a region.
        #[test]
        fn a_buffer_in_regions_that_touch_is_all_of_its_parts(
            lens in proptest::collection::vec((1..100_u64, prop_oneof![3 => Just(0), 1 => 1..9_u64]), 1..=8),
            probes in proptest::collection::vec((0..1000_u64, 0..300_usize), 1..40),
        ) {
            let (mut guest, mut regions, mut bytes) = (PAGE, Vec::new(), std::collections::HashMap::new());
            for (len, gap) in lens {
                regions.push(PeerRegion { guest, user: guest, len, offset: guest % 100, fd: file(LEN) });
                bytes.extend((guest..guest + len).map(|at| (at, (at % 251) as u8)));
                guest += len + gap;
            }
            let memory = PeerMemory::map(&regions).unwrap();
            let mut view = memory.view();
            bytes.iter().for_each(|(at, byte)| view.at(*at, 1).unwrap().write(&[*byte]));
            let (pool, at) = (pool(), PAGE - 10);
            let mut cache = pool.cache();
            for (offset, len) in probes {
                let wanted: Option<Vec<u8>> =
                    (at + offset..at + offset + len as u64).map(|at| bytes.get(&at).copied()).collect();
                let mut packet = cache.allocate().unwrap();
                let whole = view.parts(at + offset, len, |part| cache.append_from_peer(&mut packet, part));
                let mut read = vec![0; packet.len()];
                cache.read(&packet, 0, &mut read);
                cache.free(packet);
                // No bytes are nowhere, or at an end.
                prop_assert!(len == 0 || whole.map(|()| read) == wanted);
            }
        }

        #[test]
        fn packets_go_there_and_back_unchanged(lens in proptest::collection::vec(0_usize..=DATA_ROOM, 1..8)) {
            let memory = PeerMemory::map(&[region(0, 0, 0)]).unwrap();
            let (pool, mut burst) = (pool(), Burst::new());
            let mut cache = pool.cache();
            for (i, len) in lens.iter().enumerate() {
                let mut packet = cache.allocate().unwrap().with_len(*len);
                let bytes: Vec<u8> = (0..*len).map(|at| (at * 7 + i) as u8).collect();
                cache.write(&mut packet, 0, &bytes);
                burst.push(packet);
            }
            let mut view = memory.view();
            let (all, mut round) = (lens.len(), Burst::new());
            while round.len() < all {
                let (len, number) = (lens[round.len()], round.len());
                let before = [view.at(0, 1).unwrap(), view.at(13 + len as u64, 1).unwrap()];
                before.iter().for_each(|guard| guard.write(&[0xee]));
                prop_assert_eq!(cache.send_copies(9, &mut burst, [5; 12], |i, len| {
                    view.at(1, 12 + len).filter(|_| i == 0)
                }), 1);
                cache.receive_copies(1, &mut round, |_| view.at(13, len));
                let mut bytes = vec![0; len];
                cache.read(&round[number], 0, &mut bytes);
                prop_assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == (at * 7 + number) as u8));
                for at in [0, 13 + len as u64] {
                    let mut guard = Burst::new();
                    cache.receive_copies(1, &mut guard, |_| view.at(at, 1));
                    let mut byte = [0];
                    let guard = guard.remove(0);
                    cache.read(&guard, 0, &mut byte);
                    cache.free(guard);
                    prop_assert_eq!(byte, [0xee]);
                }
            }
            round.into_iter().for_each(|packet| cache.free(packet));
            drop(cache);
            prop_assert_eq!(pool.available(), 64);
        }
    }
}
