//! Buffers that rings of another process own: a successor's rings claim them from its own pool.

use std::sync::Arc;

use super::free::Chunk;
use super::{BUFFER_SIZE, Pool};
use crate::dma::packet::Packet;

/// All buffers that were free in a [`Pool`] when [`Pool::take_free`] was called. Rings whose state comes from another
/// process claim theirs. The rest returns to the pool on drop.
///
/// Each buffer can be claimed once, so each keeps a single handle, whatever the other process says.
#[derive(Debug)]
pub struct FreeBuffers {
    pool: Arc<Pool>,
    /// Whether a buffer is free, by its number.
    is_free: Box<[bool]>,
}

impl Pool {
    /// Takes all buffers that are in no cache, ring or packet.
    pub fn take_free(self: &Arc<Self>) -> FreeBuffers {
        let end = self.nodes.iter().map(|node| node.numbers.end).max().unwrap_or(0);
        let mut is_free = vec![false; end as usize].into_boxed_slice();
        while let Some(chunk) = self.take_out(0) {
            chunk.into_iter().for_each(|slot| is_free[slot as usize / BUFFER_SIZE] = true);
        }
        FreeBuffers { pool: Arc::clone(self), is_free }
    }
}

impl FreeBuffers {
    /// Claims the buffer at the pool offset `slot`. Returns false if it is not free or there is none.
    pub(in crate::dma) fn claim(&mut self, slot: u32) -> bool {
        let is_free = self.is_free.get_mut(slot as usize / BUFFER_SIZE);
        slot.is_multiple_of(BUFFER_SIZE as u32) && is_free.is_some_and(std::mem::take)
    }

    /// Ends a claim. No handle of the buffer exists.
    pub(in crate::dma) fn give_back(&mut self, slot: u32) {
        self.is_free[slot as usize / BUFFER_SIZE] = true;
    }

    /// Claims the buffer of a packet whose [`Packet::buffer`] is `buffer`, as a packet without data. Returns `None` if
    /// it is not free or there is none.
    pub fn claim_packet(&mut self, buffer: u32) -> Option<Packet> {
        self.claim(buffer).then(|| Packet::in_slot(buffer, 0, self.fresh_bits()))
    }

    /// [`Packet::fresh_bits`] of the pool's tag.
    pub(in crate::dma) fn fresh_bits(&self) -> u64 {
        Packet::fresh_bits(self.pool.tag.get())
    }
}

impl Drop for FreeBuffers {
    fn drop(&mut self) {
        let free = self.is_free.iter().enumerate().filter(|(_, is_free)| **is_free);
        let mut chunk = Chunk::new();
        for (number, _) in free {
            chunk.push((number * BUFFER_SIZE) as u32);
            if chunk.is_full() {
                self.pool.take_back(std::mem::take(&mut chunk));
            }
        }
        if !chunk.is_empty() {
            self.pool.take_back(chunk);
        }
    }
}
