//! What a driver and a hook may do to a packet between tied rings.

use crate::dma::packet::{DEVICE_HEADER, HEADROOM, SHORT};
use crate::dma::pool::Buffers;

/// Packet on its way between tied rings.
#[derive(Debug)]
pub struct TiedPacket<'a> {
    /// Pool offset of the buffer.
    slot: u32,
    buffers: Buffers<'a>,
}

impl<'a> TiedPacket<'a> {
    /// # Safety
    /// `slot` is the pool offset of a buffer of the pool of `buffers` that has no handle.
    #[inline(always)]
    pub(super) unsafe fn new(slot: u32, buffers: Buffers<'a>) -> Self {
        Self { slot, buffers }
    }

    /// Address of the packet's data. The addition of a constant is part of each access.
    #[inline(always)]
    fn data(&self) -> *mut u8 {
        // SAFETY: by the contract of `new`, the buffer belongs to the pool.
        unsafe { self.buffers.at(self.slot).add(HEADROOM) }
    }

    /// Reads the bytes directly before the packet's data. See [`PoolCache::read_header`](crate::dma::PoolCache::read_header).
    #[inline(always)]
    pub fn read_header<const LEN: usize>(&self) -> [u8; LEN] {
        const { assert!(LEN <= DEVICE_HEADER) };
        // SAFETY: a tied ring owns the buffer, and is borrowed mutably. The data is `HEADROOM` bytes into it.
        unsafe { self.data().sub(LEN).cast::<[u8; LEN]>().read() }
    }

    /// Writes `bytes` directly before the packet's data. See [`PoolCache::write_header`](crate::dma::PoolCache::write_header).
    #[inline(always)]
    pub fn write_header<const LEN: usize>(&mut self, bytes: [u8; LEN]) {
        const { assert!(LEN <= DEVICE_HEADER) };
        // SAFETY: as above, in the other direction.
        unsafe { self.data().sub(LEN).cast::<[u8; LEN]>().write(bytes) }
    }

    /// Copies `first` and then `second` to the front of the packet's data. Both are values, so that they stay
    /// in registers for many packets.
    #[inline(always)]
    pub fn write<const N: usize, const M: usize>(&mut self, first: [u8; N], second: [u8; M]) {
        const { assert!(N + M <= SHORT) };
        // SAFETY: as above. Data starts at least `SHORT` bytes before the end of its buffer. Byte arrays need
        // no alignment.
        unsafe {
            self.data().cast::<[u8; N]>().write(first);
            self.data().add(N).cast::<[u8; M]>().write(second);
        }
    }
}
