//! Translation of packets to addresses.

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
pub(super) struct Place {
    /// First byte of the first buffer.
    base: *mut u8,
    bases: NonNull<u64>,
    /// Number of bases minus 1.
    mask: usize,
    /// [`Packet::fresh_bits`] of the pool's tag.
    pub(super) fresh_bits: u64,
}

impl Place {
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
    pub(super) fn buffers<'a>(self) -> Buffers<'a> {
        Buffers { place: self, _pool: PhantomData }
    }
}

/// Local copy of the addresses of a pool's buffers. It stays in registers, whereas the compiler would have to
/// read a cache's fields again after each store to shared memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::dma) struct Buffers<'a> {
    place: Place,
    _pool: PhantomData<&'a Pool>,
}

impl Buffers<'_> {
    /// Address of the first byte of the packet's data. The buffer has at least 64 bytes from there on, and at
    /// least [`METADATA`] plus [`DEVICE_HEADER`] bytes before it.
    #[inline(always)]
    pub(in crate::dma) fn data(&self, packet: &Packet) -> NonNull<u8> {
        assert!(packet.tag() == Packet::tag_in(self.place.fresh_bits), "the packet belongs to another pool");
        // SAFETY: no other pool has this tag while handles with it exist, so the buffer belongs to this pool.
        // Pool offsets are differences of addresses, because the regions adjoin.
        unsafe { NonNull::new_unchecked(self.place.base.add(packet.at() as usize)) }
    }

    /// Device address of the byte at the pool offset `at`. Only meaningful if this pool has that offset.
    #[inline(always)]
    pub(in crate::dma) fn iova_at(&self, at: u32) -> u64 {
        let index = (at as usize / BUFFER_SIZE) & self.place.mask;
        // SAFETY: the number of bases is a power of two and `mask` is that number minus 1, so the masked
        // index is below it. The borrowed pool keeps the bases.
        let base = unsafe { self.place.bases.add(index).read() };
        base.wrapping_add(u64::from(at))
    }

    #[inline(always)]
    pub(in crate::dma) fn iova(&self, packet: &Packet) -> u64 {
        assert!(packet.tag() == Packet::tag_in(self.place.fresh_bits), "the packet belongs to another pool");
        self.iova_at(packet.at())
    }

    #[inline(always)]
    pub(in crate::dma) fn write_header<const N: usize>(&self, packet: &mut Packet, bytes: &[u8; N]) {
        const { assert!(N <= DEVICE_HEADER) };
        // SAFETY: `data` is at least `DEVICE_HEADER` bytes into the buffer, so the header starts inside it.
        // The buffer has no other handle, and this one is borrowed mutably.
        unsafe { self.data(packet).as_ptr().sub(N).copy_from_nonoverlapping(bytes.as_ptr(), N) }
    }

    #[inline(always)]
    pub(in crate::dma) fn read_header<const N: usize>(&self, packet: &Packet) -> [u8; N] {
        const { assert!(N <= DEVICE_HEADER) };
        let mut bytes = [0; N];
        // SAFETY: as in `write_header`, in the other direction.
        unsafe { self.data(packet).as_ptr().sub(N).copy_to_nonoverlapping(bytes.as_mut_ptr(), N) };
        bytes
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
