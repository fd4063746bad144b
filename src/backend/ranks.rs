//! Ranks as a backend sees them: processes that train one model together.

use super::memory::TENSOR_ALIGN;
use super::shards::{Piece, Shards};
use super::{Segment, Storage};
use crate::error::Result;

/// Moves bytes between ranks. Whoever calls it does the arithmetic, in an order of its own.
pub trait Ranks: Send {
    /// Number of this rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Sends part `r` of `parts` to rank `r`, and receives this rank's part of each rank, in rank order.
    ///
    /// # Errors
    /// Another rank ended.
    fn all_to_all(&self, parts: &[u8], own: &mut [u8]) -> Result<()>;
    /// Gives every rank the bytes of all ranks, in rank order. All pass the same length.
    ///
    /// # Errors
    /// Another rank ended.
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()>;
}

/// What a backend needs to know to do its part of every step ([`super::Backend::join`]). One rank that sums
/// its gradients in chunks is a group too.
pub struct Group {
    /// The way to the other ranks.
    pub ranks: Box<dyn Ranks>,
    /// How the gradients are divided.
    pub shards: Shards,
    /// Whether each rank updates its shard only, and holds the moments and the average of that. Otherwise all
    /// ranks update everything, from gradients that they gather: a rule needs whole tensors.
    pub is_sharded: bool,
    /// Every tensor of an update.
    pub segments: Vec<Segment>,
    /// Samples of a whole batch on this rank.
    pub samples: usize,
    /// Every micro-batch is a chunk. Its gradients are assigned, and added in a binary tree over the chunks of
    /// all ranks. Otherwise micro-batches add up, and ranks are added in their order.
    pub in_chunks: bool,
}

impl Group {
    /// What this rank updates.
    pub fn pieces(&self) -> Vec<Piece> {
        match self.is_sharded {
            true => self.shards.pieces(&self.segments, self.ranks.rank()),
            false => Piece::whole(&self.segments),
        }
    }

    /// Whether moments and average are spread over several ranks.
    pub fn is_spread(&self) -> bool {
        self.is_sharded && self.ranks.size() > 1
    }
}

/// Bytes of [`super::Arena::Exchange`] of a rank with `chunks` chunks of its own (1 without chunks): what it
/// receives of a bucket, and the sums of chunks that wait for their right neighbours in the tree.
pub fn exchange_bytes(_storage: Storage, shards: &Shards, chunks: usize) -> usize {
    let received = if shards.ranks() > 1 { shards.largest_bucket() } else { 0 };
    let levels = chunks.ilog2() as usize;
    ((received + levels * shards.padded()) * 4).next_multiple_of(TENSOR_ALIGN)
}
