//! Device registers: a [`Bar`] for set-up, a [`Doorbell`] for the packet path.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use vireo_vfio::{MappedRange, RegionFile};

use crate::dma::{dma_rmb, dma_wmb};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::page_size;
use crate::opaque::Whole;
use crate::vfio::Held;

/// Registers that a program emulates in place of a device, for tests without hardware.
///
/// Offsets are in bytes from the start of the BAR. Sizes are 1, 2, 4 or 8 bytes.
pub trait Registers: Send + Sync {
    /// Returns the value of a register read.
    fn read(&self, offset: u64, size: usize) -> u64;
    /// Handles a register write.
    fn write(&self, offset: u64, size: usize, value: u64);
    /// Advances the device's time by `time`, for which the driver waits.
    fn elapse(&self, _time: Duration) {}
}

/// Base address register (BAR) of a device. Its registers are mapped where the kernel allows it, and accessed
/// by `pread`/`pwrite` on the device's descriptor where it does not (I/O ports, the MSI-X table).
#[derive(Clone, Debug)]
pub struct Bar(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    size: u64,
    backing: Backing,
}

enum Backing {
    Device { mapped: Vec<MappedRange>, file: RegionFile<Held> },
    Emulated { registers: Arc<dyn Registers>, doorbells: Arc<DoorbellPage> },
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { mapped, .. } => {
                f.debug_list().entries(mapped.iter().map(MappedRange::range)).finish()
            }
            Self::Emulated { .. } => f.write_str("emulated"),
        }
    }
}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        #[doc = concat!("Reads a `", stringify!($type), "` at `offset` bytes. Returns all ones if no register answers.")]
        pub fn $read(&self, offset: u64) -> $type {
            const SIZE: usize = size_of::<$type>();
            match &self.0.backing {
                _ if !self.holds(offset, SIZE) => <$type>::MAX,
                Backing::Emulated { registers, .. } => registers.read(offset, SIZE) as $type,
                Backing::Device { mapped, file } => {
                    if let Some(at) = mapped.iter().find_map(|part| part.pointer(offset, SIZE)) {
                        // SAFETY: `pointer` gives an aligned address inside a live mapping of registers.
                        let value = unsafe { <$type>::peek(at.cast().as_ptr()) };
                        // If a register reports the state of memory (a completed reset), later reads must see
                        // it.
                        dma_rmb();
                        return value;
                    }
                    let mut bytes = [0; SIZE];
                    match file.read(offset, &mut bytes) {
                        Ok(()) => <$type>::from_le_bytes(bytes),
                        Err(_) => <$type>::MAX,
                    }
                }
            }
        }

        #[doc = concat!("Writes a `", stringify!($type), "` at `offset` bytes. Does nothing beyond the end of the BAR.")]
        pub fn $write(&self, offset: u64, value: $type) {
            const SIZE: usize = size_of::<$type>();
            match &self.0.backing {
                _ if !self.holds(offset, SIZE) => {
                    tracing::debug!("register {offset:#x} is beyond the BAR of {:#x} bytes", self.size());
                }
                Backing::Emulated { registers, .. } => registers.write(offset, SIZE, value as u64),
                Backing::Device { mapped, file } => {
                    dma_wmb();
                    if let Some(at) = mapped.iter().find_map(|part| part.pointer(offset, SIZE)) {
                        // SAFETY: as in the read.
                        unsafe { <$type>::poke(at.cast().as_ptr(), value) };
                    } else if let Err(error) = file.write(offset, &value.to_le_bytes()) {
                        tracing::debug!("cannot write register {offset:#x}: {error}");
                    }
                }
            }
        }
    };
}

impl Bar {
    pub(crate) fn device(mapped: Vec<MappedRange>, file: RegionFile<Held>) -> Self {
        Self(Arc::new(Inner { size: file.size(), backing: Backing::Device { mapped, file } }))
    }

    /// Returns whether `size` bytes at `offset` are within the BAR.
    fn holds(&self, offset: u64, size: usize) -> bool {
        offset.checked_add(size as u64).is_some_and(|end| end <= self.0.size)
    }

    /// Creates a BAR whose registers a program emulates. Its size is that of `doorbells`.
    pub fn emulated(registers: Arc<dyn Registers>, doorbells: Arc<DoorbellPage>) -> Self {
        let size = (doorbells.words.len() * 4) as u64;
        Self(Arc::new(Inner { size, backing: Backing::Emulated { registers, doorbells } }))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Waits at least `time` for the device. For emulated registers it calls `Registers::elapse` and returns
    /// immediately.
    pub fn pause(&self, time: Duration) {
        match &self.0.backing {
            Backing::Device { .. } => std::thread::sleep(time),
            Backing::Emulated { registers, .. } => registers.elapse(time),
        }
    }

    access!(read8, write8, u8);
    access!(read16, write16, u16);
    access!(read32, write32, u32);
    access!(read64, write64, u64);

    /// Returns the 32-bit register at `offset` bytes as a doorbell, for writes on the packet path.
    ///
    /// # Errors
    /// `Protocol` if it is not in a mapped part of the BAR.
    pub fn doorbell32(&self, offset: u64) -> Result<Doorbell<u32>> {
        self.doorbell(offset, |page| page.word(offset).map(AtomicU32::as_ptr))
    }

    /// Returns the 16-bit register at `offset` bytes as a doorbell, for writes on the packet path.
    ///
    /// # Errors
    /// Same as [`Bar::doorbell32`].
    pub fn doorbell16(&self, offset: u64) -> Result<Doorbell<u16>> {
        self.doorbell(offset, |page| page.half(offset).map(AtomicU16::as_ptr))
    }

    fn doorbell<T>(
        &self,
        offset: u64,
        emulated: impl FnOnce(&DoorbellPage) -> Option<*mut T>,
    ) -> Result<Doorbell<T>> {
        let at = match &self.0.backing {
            Backing::Device { mapped, .. } => {
                mapped.iter().find_map(|m| m.pointer(offset, size_of::<T>())).map(|at| at.cast().as_ptr())
            }
            Backing::Emulated { doorbells, .. } => Some(doorbells)
                .filter(|_| offset.is_multiple_of(size_of::<T>() as u64))
                .and_then(|page| emulated(page)),
        };
        at.and_then(NonNull::new).map(|at| Doorbell { at, _bar: self.clone() }).ok_or_else(|| {
            let error = Error::new(
                ErrorKind::Protocol,
                format!("cannot map the doorbell at {offset:#x}"),
                format!("the BAR has {:#x} bytes, and this part of it cannot be mapped", self.0.size),
            );
            // On larger CPU pages, doorbells may share a page with the MSI-X table, or the BAR may be smaller
            // than a page.
            match page_size() {
                ..=4096 => error,
                page => error.with_hint(format!(
                    "boot a kernel with pages of 4 KiB: VFIO maps BARs in whole pages, which have {} KiB here",
                    page >> 10
                )),
            }
        })
    }
}

/// Doorbells of an emulated BAR. They are plain memory, so the packet path is the same as with a device.
/// 16-bit and 32-bit doorbells are stored separately, because atomic accesses of two sizes to the same bytes
/// are not defined.
#[derive(Debug)]
pub struct DoorbellPage {
    words: Box<[AtomicU32]>,
    halves: Box<[AtomicU16]>,
}

impl DoorbellPage {
    /// Creates zeroed doorbells for a BAR of `size` bytes.
    pub fn new(size: usize) -> Arc<Self> {
        let words = size.div_ceil(4);
        Arc::new(Self {
            words: (0..words).map(|_| AtomicU32::new(0)).collect(),
            halves: (0..2 * words).map(|_| AtomicU16::new(0)).collect(),
        })
    }

    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        self.words.get(usize::try_from(offset / 4).ok()?)
    }

    fn half(&self, offset: u64) -> Option<&AtomicU16> {
        self.halves.get(usize::try_from(offset / 2).ok()?)
    }

    /// Returns the value last written to the 32-bit doorbell at `offset` bytes, or all ones beyond the end.
    pub fn load(&self, offset: u64) -> u32 {
        self.word(offset).map_or(u32::MAX, |word| word.load(Ordering::Acquire))
    }

    /// Writes to the 32-bit doorbell at `offset` bytes, as the device's reset would.
    pub fn store(&self, offset: u64, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Release);
        }
    }

    /// Same as [`DoorbellPage::load`], but for a 16-bit doorbell.
    pub fn load16(&self, offset: u64) -> u16 {
        self.half(offset).map_or(u16::MAX, |half| half.load(Ordering::Acquire))
    }

    /// Same as [`DoorbellPage::store`], but for a 16-bit doorbell.
    pub fn store16(&self, offset: u64, value: u16) {
        if let Some(half) = self.half(offset) {
            half.store(value, Ordering::Release);
        }
    }
}

/// Write-only register of the packet path. A write is one store, ordered after all stores to descriptors.
#[derive(Debug)]
pub struct Doorbell<T> {
    at: NonNull<T>,
    _bar: Bar,
}

// SAFETY: the register stays mapped while `_bar` lives. It is accessed only by one store of its whole word,
// which the compiler does not see.
unsafe impl<T: Send> Send for Doorbell<T> {}

impl Doorbell<u32> {
    /// Writes `value`.
    #[inline(always)]
    pub fn ring(&self, value: u32) {
        dma_wmb();
        // SAFETY: `at` is aligned and inside a part of the BAR that `_bar` keeps mapped.
        unsafe { u32::poke(self.at.as_ptr(), value) };
    }
}

impl Doorbell<u16> {
    /// Writes `value`.
    #[inline(always)]
    pub fn ring(&self, value: u16) {
        dma_wmb();
        // SAFETY: as for the 32-bit doorbell.
        unsafe { u16::poke(self.at.as_ptr(), value) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::vfio::fake_file;

    struct Echo;
    impl Registers for Echo {
        fn read(&self, offset: u64, size: usize) -> u64 {
            offset << 8 | size as u64
        }
        fn write(&self, _: u64, _: usize, _: u64) {}
    }

    #[test]
    fn emulated_registers_answer_and_doorbells_are_memory() {
        let page = DoorbellPage::new(64);
        let bar = Bar::emulated(Arc::new(Echo), Arc::clone(&page));
        assert_eq!(bar.read16(3), 0x302);
        bar.doorbell32(8).unwrap().ring(5);
        assert_eq!(page.load(8), 5);
        assert!(bar.doorbell32(64).is_err());
        assert!(bar.doorbell16(9).is_err());
        bar.doorbell16(10).unwrap().ring(7);
        assert_eq!((page.load16(10), page.load16(8), page.load(8)), (7, 0, 5));
    }

    #[test]
    fn a_file_answers_where_nothing_is_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1, 2, 3, 4], 16).unwrap();
        let bar = Bar::device(Vec::new(), RegionFile::new(&fake_file(file), 16, 8));
        assert_eq!((bar.read32(0), bar.read32(4)), (0x0403_0201, u32::MAX));
        assert!(bar.doorbell32(0).is_err());
    }

    #[test]
    fn no_offset_reaches_another_region() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 64], 0).unwrap();
        let bar = Bar::device(Vec::new(), RegionFile::new(&fake_file(file.try_clone().unwrap()), 16, 8));
        for offset in [5, 8, 32, u64::MAX - 15, u64::MAX - 3, u64::MAX] {
            assert_eq!(bar.read32(offset), u32::MAX, "{offset:#x}");
            bar.write32(offset, 0);
        }
        bar.write32(4, 0);
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == 7).count(), 60);
        assert_eq!(bytes[20..24], [0; 4]);
    }

    #[test]
    fn a_played_device_is_asked_for_its_own_registers_only() {
        let bar = Bar::emulated(Arc::new(Echo), DoorbellPage::new(64));
        assert_eq!([60, 61, 64, u64::MAX].map(|at| bar.read32(at) == u32::MAX), [false, true, true, true]);
    }

    #[test]
    fn registers_keep_the_address_space() {
        let device = fake_file(tempfile::tempfile().unwrap());
        let space = Arc::downgrade(&device.kept().space);
        let doorbells = DoorbellPage::new(64);
        let mut kept = vec![Bar::device(Vec::new(), RegionFile::new(&device, 0, 8))];
        drop(device);
        kept.push(kept[0].clone());
        kept.remove(0);
        assert!(space.upgrade().is_some());
        kept[0] = Bar::emulated(Arc::new(Echo), doorbells);
        assert!(space.upgrade().is_none());
    }
}
