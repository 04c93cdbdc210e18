//! Translation of packets to addresses.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{NodeBuffers, Pool};
use crate::dma::packet::{BUFFER_SIZE, DEVICE_HEADER, METADATA, Packet};

/// Values to add to the pool offset of a packet's data to get its device address. There is one entry if all
/// buffers are contiguous for the device, else one per buffer number, with the number of entries rounded up
/// to a power of two.
///
/// # Panics
/// Panics if a page of the device is not aligned to the buffer size. All device pages are.
pub(super) fn bases(nodes: &[NodeBuffers]) -> Box<[u64]> {
    let base = |node: &NodeBuffers, number: u32| {
        let behind = (number - node.numbers.start) as usize * BUFFER_SIZE;
        let start = node.memory.iova(node.offset + behind);
        assert!(start.is_multiple_of(BUFFER_SIZE as u64), "a device page is not aligned to the buffer size");
        start.wrapping_sub(u64::from(number) * BUFFER_SIZE as u64)
    };
    let in_use = || nodes.iter().filter(|node| !node.numbers.is_empty());
    let mut firsts = in_use().map(|node| base(node, node.numbers.start));
    let first = firsts.next().unwrap_or(0);
    if firsts.all(|other| other == first) && in_use().all(|node| node.memory.translation().is_contiguous()) {
        return Box::new([first]);
    }
    let end = nodes.iter().map(|node| node.numbers.end).max().unwrap_or(0);
    // Numbers between those of two nodes belong to no buffer.
    let mut bases = vec![0; (end as usize).next_power_of_two()];
    for node in nodes {
        for number in node.numbers.clone() {
            bases[number as usize] = base(node, number);
        }
    }
    bases.into()
}

/// Addresses of a pool's buffers, for the CPU and for the device.
#[derive(Clone, Copy, Debug)]
pub(in crate::dma) struct PoolAddresses {
    /// First byte of the first buffer.
    base: *mut u8,
    bases: NonNull<u64>,
    /// Number of bases minus 1.
    mask: usize,
    /// [`Packet::fresh_bits`] of the pool's tag.
    pub(super) fresh_bits: u64,
}

impl PoolAddresses {
    pub(super) fn of(pool: &Pool) -> Self {
        let base = pool.nodes[0].start().as_ptr();
        assert!(
            base.addr().is_multiple_of(BUFFER_SIZE),
            "the region and the pool's offset in it are aligned"
        );
        let (bases, fresh_bits) = (NonNull::from(&*pool.bases).cast(), Packet::fresh_bits(pool.tag.get()));
        Self { base, bases, mask: pool.bases.len() - 1, fresh_bits }
    }

    #[inline(always)]
    pub(in crate::dma) fn buffers<'a>(self) -> Buffers<'a> {
        Buffers { addresses: self, _pool: PhantomData }
    }
}

/// Local copy of the addresses of a pool's buffers. It stays in registers, whereas the compiler would have to
/// read a cache's fields again after each store to shared memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::dma) struct Buffers<'a> {
    addresses: PoolAddresses,
    _pool: PhantomData<&'a Pool>,
}

impl Buffers<'_> {
    /// Address of the first byte of the packet's data. The buffer has at least 64 bytes from there on, and at
    /// least [`METADATA`] plus [`DEVICE_HEADER`] bytes before it.
    #[inline(always)]
    pub(in crate::dma) fn data(&self, packet: &Packet) -> NonNull<u8> {
        self.check(packet.tag());
        // SAFETY: no other pool has this tag while handles with it exist, so the buffer belongs to this pool.
        // Pool offsets are differences of addresses, because the regions adjoin.
        unsafe { NonNull::new_unchecked(self.at(packet.at())) }
    }

    /// Address of the byte at the pool offset `at`.
    ///
    /// # Safety
    /// This pool has that offset.
    #[inline(always)]
    pub(in crate::dma) unsafe fn at(&self, at: u32) -> *mut u8 {
        // SAFETY: the byte is in the regions that adjoin, by the caller's contract.
        unsafe { self.addresses.base.add(at as usize) }
    }

    /// Device address of the byte at the pool offset `at`. Only meaningful if this pool has that offset.
    #[inline(always)]
    pub(in crate::dma) fn iova_at(&self, at: u32) -> u64 {
        let index = (at as usize / BUFFER_SIZE) & self.addresses.mask;
        // SAFETY: the number of bases is a power of two and `mask` is that number minus 1, so the masked
        // index is below it. The borrowed pool keeps the bases.
        let base = unsafe { self.addresses.bases.add(index).read() };
        base.wrapping_add(u64::from(at))
    }

    /// [`Buffers::iova_at`] for four pool offsets. Each vector of the result has two of the addresses.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(in crate::dma) fn four_iovas_at(&self, at: __m128i) -> [__m128i; 2] {
        const SHIFT: i32 = BUFFER_SIZE.ilog2() as i32;
        // SAFETY: SSE2 is part of x86-64. The masked indices are below the number of bases, as in `iova_at`.
        unsafe {
            let index =
                _mm_and_si128(_mm_srli_epi32::<SHIFT>(at), _mm_set1_epi32(self.addresses.mask as i32));
            let bases = |pair: __m128i| {
                let pair = _mm_cvtsi128_si64(pair) as u64;
                let base = |index: u64| self.addresses.bases.as_ptr().add(index as usize).cast::<f64>();
                _mm_castpd_si128(_mm_loadh_pd(
                    _mm_load_sd(base(pair & u64::from(u32::MAX))),
                    base(pair >> 32),
                ))
            };
            let zero = _mm_setzero_si128();
            [
                _mm_add_epi64(bases(index), _mm_unpacklo_epi32(at, zero)),
                _mm_add_epi64(bases(_mm_unpackhi_epi64(index, index)), _mm_unpackhi_epi32(at, zero)),
            ]
        }
    }

    #[inline(always)]
    pub(in crate::dma) fn iova(&self, packet: &Packet) -> u64 {
        self.check(packet.tag());
        self.iova_at(packet.at())
    }

    /// # Panics
    /// Panics if `tag` is not that of this pool.
    #[inline(always)]
    pub(in crate::dma) fn check(&self, tag: u8) {
        assert!(tag == Packet::tag_in(self.addresses.fresh_bits), "the packet belongs to another pool");
    }

    #[inline(always)]
    pub(in crate::dma) fn write_header<const N: usize>(&self, packet: &mut Packet, bytes: &[u8; N]) {
        self.check(packet.tag());
        // SAFETY: the tag is that of this pool, and the packet is borrowed mutably.
        unsafe { self.write_before(packet.at(), bytes) }
    }

    #[inline(always)]
    pub(in crate::dma) fn read_header<const N: usize>(&self, packet: &Packet) -> [u8; N] {
        self.check(packet.tag());
        // SAFETY: the tag is that of this pool, and the packet is borrowed.
        unsafe { self.read_before(packet.at()) }
    }

    /// Writes `bytes` directly before the data at pool offset `at`.
    ///
    /// # Safety
    /// `at` is the start of the data of a packet of this pool, or of a buffer that becomes one, and no other
    /// thread of this process accesses that buffer.
    #[inline(always)]
    pub(in crate::dma) unsafe fn write_before<const N: usize>(&self, at: u32, bytes: &[u8; N]) {
        const { assert!(N <= DEVICE_HEADER) };
        // SAFETY: data is at least `DEVICE_HEADER` bytes into its buffer, so the header starts inside it.
        unsafe { self.at(at).sub(N).cast::<[u8; N]>().write(*bytes) }
    }

    /// Reads the bytes directly before the data at pool offset `at`.
    ///
    /// # Safety
    /// As for [`Buffers::write_before`].
    #[inline(always)]
    pub(in crate::dma) unsafe fn read_before<const N: usize>(&self, at: u32) -> [u8; N] {
        const { assert!(N <= DEVICE_HEADER) };
        // SAFETY: as in `write_before`, in the other direction.
        unsafe { self.at(at).sub(N).cast::<[u8; N]>().read() }
    }

    /// Writes the packet's metadata from its byte `AT` on.
    pub(in crate::dma) fn write_metadata<const AT: usize, const N: usize>(
        &self,
        packet: &mut Packet,
        bytes: [u8; N],
    ) {
        const { assert!(AT + N <= METADATA) };
        // SAFETY: `data` is `offset` bytes into the buffer, which begins with the metadata. The buffer has no
        // other handle, and this one is borrowed mutably.
        unsafe { self.data(packet).as_ptr().sub(packet.offset()).add(AT).cast::<[u8; N]>().write(bytes) }
    }

    /// Reads the packet's metadata from its byte `AT` on.
    pub(in crate::dma) fn read_metadata<const AT: usize, const N: usize>(&self, packet: &Packet) -> [u8; N] {
        const { assert!(AT + N <= METADATA) };
        // SAFETY: as in `write_metadata`, in the other direction.
        unsafe { self.data(packet).as_ptr().sub(packet.offset()).add(AT).cast::<[u8; N]>().read() }
    }
}
