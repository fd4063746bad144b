//! Ranks as a backend sees them: processes that train one model together.

use std::ops::Range;

use super::cuda::nccl::Comm;
use super::memory::TENSOR_ALIGN;
use super::shards::{Piece, Shards};
use super::{Micro, Segment, Storage};
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
    /// The way from GPU to GPU, where the ranks are several and on GPUs.
    pub comm: Option<Comm>,
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
    /// all ranks. Otherwise micro-batches add up, and ranks are added in their order, or in NCCL's.
    pub in_chunks: bool,
}

/// How far a group's gradients of a step are, on one rank.
pub struct Progress {
    /// Gradients from this one on are final in the current micro-batch.
    done: usize,
    /// Buckets that were summed over the ranks.
    summed: usize,
}

/// What can be done because more gradients are final.
pub struct Advance {
    /// These gradients have become final in this micro-batch.
    pub fresh: Range<usize>,
    /// The number of this chunk on its rank, and the rank's number of chunks. `None`: gradients add up.
    pub chunk: Option<(usize, usize)>,
    /// These buckets are final in this step, and wait for their sum over the ranks.
    pub buckets: Range<usize>,
}

impl Progress {
    /// Before the first step.
    pub fn new(group: &Group) -> Self {
        Self { done: group.shards.padded(), summed: 0 }
    }

    /// Gradients from `from` on are final in `micro`.
    ///
    /// # Panics
    /// They become final from the last to the first.
    pub fn advance(&mut self, group: &Group, micro: Micro, from: usize) -> Advance {
        assert!(from <= self.done, "gradients become final from the last to the first");
        let Group { shards, samples, in_chunks, .. } = group;
        let is_last = micro.first + micro.samples == *samples;
        if is_last && self.done == shards.padded() {
            self.summed = 0;
        }
        let fresh = from..self.done;
        let first = self.summed;
        while is_last && self.summed < shards.buckets() && shards.bucket(self.summed).start >= from {
            self.summed += 1;
        }
        self.done = if from == 0 { shards.padded() } else { from };
        let chunk = in_chunks.then(|| (micro.first / micro.samples, samples / micro.samples));
        Advance { fresh, chunk, buckets: first..self.summed }
    }

    /// Checks that an update finds all gradients summed.
    ///
    /// # Panics
    /// It does not.
    pub fn assert_summed(&self, group: &Group) {
        assert_eq!(self.summed, group.shards.buckets(), "an update before all gradients were summed");
    }
}

impl Group {
    /// What this rank updates.
    pub fn pieces(&self) -> Vec<Piece> {
        match self.is_sharded {
            true => self.shards.pieces(&self.segments, self.ranks.rank()),
            false => Piece::whole(&self.segments),
        }
    }
}

/// Bytes of [`super::Arena::Exchange`] of a rank with `chunks` chunks of its own (1 without chunks): what it
/// receives of a bucket, the sums of chunks that wait for their right neighbours in the tree, and on a device
/// with memory of its own the squares of blocks and the signals of ranks.
pub fn exchange_bytes(storage: Storage, shards: &Shards, chunks: usize) -> usize {
    let levels = chunks.ilog2() as usize;
    let sums = (received_elements(shards) + levels * shards.padded()) * 4;
    let squares = if storage.has_device_memory() { 2 * (shards.blocks() + shards.ranks()) * 8 } else { 0 };
    (sums + squares).next_multiple_of(TENSOR_ALIGN)
}

/// Elements that a rank receives at a time.
pub(in crate::backend) fn received_elements(shards: &Shards) -> usize {
    if shards.ranks() > 1 { shards.largest_bucket() } else { 0 }
}
